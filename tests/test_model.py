"""model.py: the right numbers, a cache that rolls back, and no model loaded that would come out wrong."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import BUNDLED, DEVICE, ROOT, feed, random_model, tokens_of
from model import KVCache, ModelError, find_folder, load_model, named_weights

GOLDEN = Path(__file__).parent / "golden"
TINY = sorted(path.parent for path in GOLDEN.glob("*/config.json"))


def relative_error(got, expected):
    return ((got.cpu() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("folder", TINY, ids=lambda path: path.name)
def test_logits_equal_an_independent_implementation(folder):
    expected, model = load_file(folder / "expected"), load_model(folder, DEVICE)
    tokens = expected["tokens"].to(DEVICE)
    at_once = model.logits(model(tokens[None])[-1])[0]
    assert relative_error(at_once, expected["logits"]) < 1e-4
    cache = KVCache(model, len(tokens))
    in_pieces = torch.cat([model.logits(model(piece[None], cache)[-1])[0] for piece in tokens.split([1, 20, 1, 5, 21])])
    assert relative_error(in_pieces, expected["logits"]) < 1e-4


def test_logits_of_a_real_model_equal_an_independent_implementation(real):
    expected = load_file(GOLDEN / "smollm2.expected")
    logits = real.logits(real(expected["tokens"].to(DEVICE)[None])[-1])[0]
    assert relative_error(logits[:, ::256], expected["logits"]) < 1e-4


def test_skipping_layers_is_leaving_them_out():
    model, tokens = random_model(layers=4), torch.tensor([[5, 6, 7]], device=DEVICE)
    skipping = model(tokens, skip={1, 2})
    assert torch.equal(skipping[2], skipping[1]) and torch.equal(skipping[3], skipping[1])
    del model.layers[1:3]
    assert torch.equal(model(tokens)[-1], skipping[-1])


def test_rollback_is_an_integer():
    model = random_model()
    kept, rejected, after = tokens_of(model, 7, 1), tokens_of(model, 5, 2), tokens_of(model, 3, 3)
    caches = [KVCache(model, 20) for _ in range(2)]
    for cache in caches:
        feed(model, cache, kept)
    feed(model, caches[1], rejected)
    caches[1].length = len(kept)
    assert torch.equal(feed(model, caches[0], after), feed(model, caches[1], after))


@pytest.fixture
def folder(tmp_path):
    """A copy of a good model folder, to be broken."""
    return Path(shutil.copytree(GOLDEN / "gqa-untied", tmp_path / "model"))


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "mistral"), ({"attention_bias": True}, "attention biases"),
    ({"mlp_bias": True}, "MLP biases"), ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "quantised"), ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"vocab_size": None}, "vocab_size"), ({"num_attention_heads": 0}, "positive"), ({"hidden_size": "big"}, "big"),
    ({"num_key_value_heads": 3}, "divide"), ({"rope_parameters": "linear"}, "RoPE"), ({"partial_rotary_factor": 0.5}, "a part"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor")])
def test_what_would_give_wrong_text_is_refused_by_name(folder, change, word):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=word):
        load_model(folder)


def test_weights_go_out_and_in_again_unchanged(tmp_path):
    shutil.copy(BUNDLED / "config.json", tmp_path)
    save_file({name: w.cpu().contiguous() for name, w in named_weights(load_model(BUNDLED)).items()},
              tmp_path / "model.safetensors")
    for name, weight in load_model(BUNDLED).state_dict().items():
        assert torch.equal(weight, load_model(tmp_path).state_dict()[name])


@pytest.mark.parametrize("name", ["/no/such/folder", "./nor-this", "justaname", "a/b/c", str(ROOT / "README.md")])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ModelError, match="no folder"):
        find_folder(name)


@pytest.mark.parametrize("error, advice", [("GatedRepoError", "accept its licence"), ("RepositoryNotFoundError", "neither")])
def test_gated_and_missing_repos_say_what_to_do(monkeypatch, error, advice):
    import huggingface_hub

    def fail(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)                       # its constructor wants a live response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=advice):
        find_folder("someone/something")


def test_a_repo_without_network_says_what_to_do():
    code = "import model\ntry: model.find_folder('someone/something')\nexcept model.ModelError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env={"HF_HUB_OFFLINE": "1", "HOME": "/nonexistent", "PATH": ""})
    assert "check the network and HF_HUB_OFFLINE" in out.stdout, out.stderr
