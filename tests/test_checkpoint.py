"""checkpoint.py: no model is loaded that would come out wrong, and text goes in and out whole."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import (
    BUNDLED,
    Tokenizer,
    empty_model,
    find_folder,
    load_model,
    named_weights,
    read_config,
    suggested_settings,
)
from conftest import DEVICE, ROOT
from model import ModelError

GOLDEN = Path(__file__).parent / "golden" / "gqa-untied"


def set_fields(folder: Path, file: str, **fields):
    """Change fields of a JSON file; None takes one out."""
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    wanted = {name: value for name, value in (known | fields).items() if value is not None}
    path.write_text(json.dumps(wanted))


# ---------------------------------------------------------------- finding it

@pytest.mark.parametrize("name", [
    "/no/such/folder",
    "./nor-such",
    "justaname",
    "a/b/c",
    "~nobody-of-that-name/folder",
    "x" * 5000,
    str(ROOT / "model.py"),
], ids=lambda name: name[:20])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ModelError, match="no folder"):
        find_folder(name)


@pytest.mark.parametrize("error, advice", [
    ("GatedRepoError", "accept its licence"),
    ("RepositoryNotFoundError", "neither"),
    ("HFValidationError", "neither"),
])
def test_gated_and_missing_repos_say_what_to_do(monkeypatch, error, advice):
    import huggingface_hub

    def fail(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)                       # its constructor wants a live response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=advice):
        find_folder("someone/something")


def test_a_repo_is_downloaded_only_if_its_config_can_be_used(monkeypatch, tmp_path):
    """config.json comes first, and gigabytes follow only then."""
    import huggingface_hub
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ModelError, match="mistral"):
        find_folder("someone/something")
    assert asked == [["config.json"]]
    shutil.copy(GOLDEN / "config.json", tmp_path)
    assert find_folder("someone/something") == tmp_path
    assert len(asked) == 3 and "model.safetensors" in asked[-1]


@pytest.mark.thorough
def test_a_repo_without_network_says_what_to_do():
    code = """
import checkpoint
try:
    checkpoint.find_folder("someone/something")
except checkpoint.ModelError as error:
    print(error)
"""
    bare = {"HF_HUB_OFFLINE": "1", "HOME": "/nonexistent", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code],
                          cwd=ROOT, env=bare, capture_output=True, text=True)
    assert "check the network and HF_HUB_OFFLINE" in done.stdout, done.stderr


# ---------------------------------------------------------------- config.json and weights

@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good model folder, to be broken."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "mistral"),
    ({"attention_bias": True}, "attention biases"),
    ({"mlp_bias": True}, "MLP biases"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
    ({"rope_parameters": "linear"}, "RoPE"),
    ({"partial_rotary_factor": 0.5}, "a part"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_attention_heads": 0}, "positive|zero"),
    ({"hidden_size": "big"}, "big"),
    ({"num_key_value_heads": 3}, "divide"),
    ({"head_dim": 7}, "even"),
], ids=str)
def test_what_would_give_wrong_text_is_refused_by_name(folder, change, word):
    set_fields(folder, "config.json", **change)
    with pytest.raises(ModelError, match=word):
        load_model(folder)


def test_weights_go_out_and_in_again_unchanged(tmp_path):
    """named_weights is the one map of names, for loading and for saving."""
    original = load_model(BUNDLED)
    weights = {name: weight.contiguous() for name, weight in named_weights(original).items()}
    shutil.copy(BUNDLED / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    again = load_model(tmp_path).state_dict()
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, again[name])


def test_an_empty_model_has_memory_for_every_weight():
    model = empty_model(read_config(GOLDEN), DEVICE, torch.bfloat16)
    for weight in model.state_dict().values():
        assert weight.device.type == DEVICE and weight.dtype == torch.bfloat16
    assert not model.training and not any(w.requires_grad for w in model.parameters())


def test_what_can_be_derived_may_lie_in_the_file_too(folder):
    """Old files hold RoPE's frequencies, and tied models may hold their head."""
    expected = load_model(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(weight, expected[name])


# ---------------------------------------------------------------- text

@pytest.fixture
def text_folder(tmp_path) -> Path:
    """The bundled tokenizer's folder without weights, to be varied."""
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(BUNDLED / file, tmp_path)
    return tmp_path


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.library.encode(text, add_special_tokens=False).ids


def special_id(tokenizer: Tokenizer, name: str) -> int:
    return tokenizer.library.token_to_id(tokenizer.special[name])


@pytest.mark.parametrize("written", ["Grüße, 日本語 and 🙂🙂!", "plain", "🙂"])
def test_streaming_never_breaks_a_character(text_folder, written):
    tokenizer = Tokenizer(text_folder)
    prompt = tokenizer.encode("A ")
    tokens = plain_ids(tokenizer, written)
    pieces = list(tokenizer.stream(prompt, iter(tokens)))
    assert "".join(pieces) == written
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(tokens)


def test_streaming_survives_bytes_that_are_no_text(text_folder):
    tokenizer = Tokenizer(text_folder)
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(2, 300, (40,), generator=random).tolist()
        assert len(list(tokenizer.stream([0], iter(tokens)))) == 40


def test_special_tokens_are_not_printed(text_folder):
    tokenizer = Tokenizer(text_folder)
    tokens = [*plain_ids(tokenizer, "the end"), special_id(tokenizer, "eos_token")]
    assert "".join(tokenizer.stream([0], iter(tokens))) == "the end"
    assert tokenizer.decode(tokens) == "the end"


def test_settings_of_training_do_not_cut_a_text(text_folder):
    """Some tokenizer.json files carry a truncation and a padding."""
    whole = Tokenizer(text_folder).encode("a king and a queen " * 20)
    set_fields(text_folder, "tokenizer.json",
               truncation={"max_length": 8, "strategy": "LongestFirst", "direction": "Right",
                           "stride": 0})
    assert Tokenizer(text_folder).encode("a king and a queen " * 20) == whole


@pytest.mark.parametrize("add_begin, begins", [(None, 1), (True, 1), (False, 0)])
def test_begin_of_text_comes_once_or_as_the_files_say(text_folder, add_begin, begins):
    if add_begin is not None:
        set_fields(text_folder, "tokenizer_config.json", add_bos_token=add_begin)
    tokenizer = Tokenizer(text_folder)
    ids = tokenizer.encode("a king")
    assert ids.count(special_id(tokenizer, "bos_token")) == begins


@pytest.mark.parametrize("fields, stop", [
    ({"eos_token_id": 7}, {7}),
    ({"eos_token_id": [7, 9]}, {7, 9}),
])
def test_stop_tokens_are_one_or_a_list_and_generation_config_comes_first(
    text_folder, fields, stop
):
    set_fields(text_folder, "config.json", eos_token_id=3)
    assert Tokenizer(text_folder).stop == {3}
    set_fields(text_folder, "generation_config.json", **fields)
    assert Tokenizer(text_folder).stop == stop


def test_a_model_may_have_no_stop_token(text_folder):
    set_fields(text_folder, "config.json", eos_token_id=None)
    assert Tokenizer(text_folder).stop == set()


# ---------------------------------------------------------------- chat templates

TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_models_own_chat_template_is_used_wherever_it_stands(text_folder):
    assert not Tokenizer(text_folder).has_chat_template
    begin = Tokenizer(text_folder).special["bos_token"]
    expected = f'{begin}[user] "hé"\n[assistant]'
    by_name = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    for template in (TEMPLATE, by_name):
        set_fields(text_folder, "tokenizer_config.json", chat_template=template)
        assert Tokenizer(text_folder).has_chat_template
        assert Tokenizer(text_folder).render(["hé"]) == expected
    set_fields(text_folder, "tokenizer_config.json", chat_template="the file has precedence")
    (text_folder / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer(text_folder).render(["hé"]) == expected


def test_turns_of_a_conversation_alternate(text_folder):
    (text_folder / "chat_template.jinja").write_text(TEMPLATE)
    rendered = Tokenizer(text_folder).render(["a", "b", "c"])
    assert rendered.endswith('[user] "a"\n[assistant] "b"\n[user] "c"\n[assistant]')


def test_a_chat_begins_once(text_folder):
    """Begin-of-text comes from the template; the tokenizer adds no second one."""
    (text_folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(text_folder)
    ids = tokenizer.encode("hé", chat=True)
    assert ids.count(special_id(tokenizer, "bos_token")) == 1


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}",
    "{% if %}",
    "{{ 1 + 'a' }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
])
def test_a_bad_or_hostile_template_is_refused(text_folder, template):
    set_fields(text_folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match="chat template failed"):
        Tokenizer(text_folder).render(["x"])


# ---------------------------------------------------------------- settings

def test_a_model_may_suggest_settings(tmp_path):
    assert suggested_settings(None) == suggested_settings(tmp_path) == {}
    chosen = {"skip_layers": 3, "exit_threshold": 0.5}
    set_fields(tmp_path, "generation_config.json", clasp=chosen)
    assert suggested_settings(tmp_path) == chosen


@pytest.mark.parametrize("suggested", [
    {"depth": 3},
    {"draft_length": 4.5},
    {"skip_layers": "many"},
    [1],
], ids=str)
def test_suggestions_that_make_no_sense_are_refused(tmp_path, suggested):
    set_fields(tmp_path, "generation_config.json", clasp=suggested)
    with pytest.raises(ModelError, match="clasp may give"):
        suggested_settings(tmp_path)


def test_the_bundled_models_suggestions_fit_it(bundled):
    suggested = suggested_settings(BUNDLED)
    assert suggested.get("skip_layers", 0) < len(bundled.layers)
    assert suggested.get("draft_length", 1) >= 1
