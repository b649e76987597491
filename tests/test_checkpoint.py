"""checkpoint.py: no model is loaded that would come out wrong, and text goes in and out whole."""
import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from os.path import commonprefix
from pathlib import Path
from threading import Event

import pytest
import torch
from conftest import DEVICE, ROOT, at_length
from folders import (
    BYTE_FALLBACK,
    byte_fallback_tokenizer,
    copy_tokenizer,
    edit_weights,
    set_fields,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    BROKEN,
    BUNDLED,
    Tokenizer,
    find_folder,
    load_model,
    named_weights,
    read_config,
    short_name,
    suggested_settings,
)
from model import ModelError

GOLDEN = Path(__file__).parent / "golden" / "gqa-untied"


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
    assert len(asked) == 3
    for file in ("model.safetensors", "model-00001-of-00002.safetensors",
                 "model.safetensors-00001-of-00002.safetensors",
                 "pytorch_model-00001-of-00002.safetensors"):
        assert any(fnmatch(file, pattern) for pattern in asked[-1])
    for file in ("consolidated.safetensors", "checkpoint-500/model.safetensors"):
        assert not any(fnmatch(file, pattern) for pattern in asked[-1])


def test_a_title_names_the_repository_or_the_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("Tiny-Story").mkdir()
    Path("model").symlink_to("Tiny-Story")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("someone/Tiny-Story", "Tiny-Story/", "model", "~/model", str(tmp_path / "Tiny-Story"))
    assert [short_name(name) for name in names] == ["Tiny-Story"] * 5


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
    ({"is_causal": False}, "later tokens"),
    ({"is_causal": 0.0}, "later tokens"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
    ({"rope_parameters": "linear"}, "RoPE"),
    ({"partial_rotary_factor": 0.5}, "part of each head"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each"),
    ({"partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 0.5}}, "a part"),
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


def test_a_loaded_model_is_for_inference_on_its_device_and_in_its_dtype():
    model = load_model(GOLDEN, DEVICE, torch.bfloat16)
    for weight in model.state_dict().values():
        assert weight.device.type == DEVICE and weight.dtype == torch.bfloat16
    assert not model.training and not any(w.requires_grad for w in model.parameters())


def test_each_matrix_is_put_into_its_form_as_soon_as_it_is_there(tied_folder):
    """Also a head that is tied, beside the embedding."""
    asked = []

    def form(linear):
        asked.append(linear.weight.shape)
        return Scaled(linear)

    plain = load_model(tied_folder)
    model = load_model(tied_folder, form=form)
    matrices = [*plain.layers.parameters(), plain.embed.weight]
    assert sorted(asked) == sorted(weight.shape for weight in matrices if weight.ndim == 2)
    assert type(model.head) is type(model.layers[1].qkv) is Scaled
    state = torch.randn(3, 32)
    assert torch.equal(model.logits(state), 2 * plain.logits(state))


class Scaled(torch.nn.Module):
    """Twice what a linear layer makes."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * torch.nn.functional.linear(x, self.linear.weight)


def test_nothing_is_read_of_files_that_do_not_fit(folder, monkeypatch):
    edit_weights(folder, model_norm_weight=None)
    monkeypatch.setattr("checkpoint.read_into", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelError, match="no weights for model.norm.weight"):
        load_model(folder)


def test_loading_shows_no_progress_where_standard_error_is_closed(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    load_model(folder)


def test_what_can_be_derived_may_lie_in_the_file_too(folder):
    """Old files hold RoPE's frequencies, and tied models may hold their head."""
    expected = load_model(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(weight, expected[name])


def test_weights_come_from_model_safetensors_though_an_index_lies_beside_it(folder):
    """As transformers does; a stale index may name files of another model."""
    expected = load_model(folder).state_dict()
    other = {"model.norm.weight": torch.ones(3)}
    save_file(other, folder / "model-00001-of-00002.safetensors")
    files = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    set_fields(folder, "model.safetensors.index.json", weight_map=files)
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(weight, expected[name])


def llama3_scaling(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize("parameters", [
    {"rope_type": "default", "rope_theta": 10000.0},
    llama3_scaling(2.0),
    {"rope_type": "yarn"},
], ids=lambda parameters: parameters["rope_type"])
def test_rope_scaling_goes_before_rope_parameters(folder, parameters):
    set_fields(folder, "config.json", rope_scaling=llama3_scaling(8.0),
               rope_parameters=parameters, rope_theta=500.0)
    config = read_config(folder)
    assert config.rope_scaling["factor"] == 8.0
    assert config.rope_theta == 500.0


def test_the_original_context_may_stand_beside_the_rope_fields_and_wins(folder):
    scaling = llama3_scaling(8.0)
    set_fields(folder, "config.json", rope_scaling=scaling, original_max_position_embeddings=32)
    assert read_config(folder).rope_scaling["original_max_position_embeddings"] == 32
    del scaling["original_max_position_embeddings"]
    set_fields(folder, "config.json", rope_scaling=scaling)
    assert read_config(folder).rope_scaling["original_max_position_embeddings"] == 32


def test_an_empty_rope_scaling_is_none(folder):
    set_fields(folder, "config.json", rope_scaling={}, rope_parameters=llama3_scaling(4.0))
    assert read_config(folder).rope_scaling["factor"] == 4.0


# ---------------------------------------------------------------- a head stored with a tied model

@pytest.fixture
def tied_folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN.parent / "mha-tied", tmp_path / "tied"))


def store_a_head(folder: Path) -> torch.Tensor:
    """Another matrix than the embedding, though the config goes on saying that they are one."""
    head = torch.randn(61, 32, generator=torch.Generator().manual_seed(0))
    edit_weights(folder, **{"lm_head.weight": head})
    return head


def test_a_stored_head_that_differs_from_the_embedding_is_used(tied_folder):
    before = load_model(tied_folder)
    head = store_a_head(tied_folder)
    model = load_model(tied_folder)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.embed.weight, before.embed.weight)
    assert not model.config.tie_word_embeddings
    state = torch.randn(5, 32)
    torch.testing.assert_close(model.logits(state), model.norm(state) @ head.T)
    assert named_weights(model).keys() == named_weights(before).keys() | {"lm_head.weight"}


def test_a_stored_head_that_equals_the_embedding_stays_tied(tied_folder):
    embedding = load_model(tied_folder).embed.weight
    edit_weights(tied_folder, **{"lm_head.weight": embedding.clone()})
    model = load_model(tied_folder)
    assert model.head is None
    assert model.config == read_config(tied_folder)
    assert model.config.tie_word_embeddings


def test_a_tied_matrix_may_be_stored_as_the_head(tied_folder):
    """As safetensors' own save_model does: of two names for one tensor it keeps the first."""
    before = load_model(tied_folder)
    rename_weight(tied_folder, "model.embed_tokens.weight", "lm_head.weight")
    model = load_model(tied_folder)
    assert model.head is None
    assert torch.equal(model.embed.weight, before.embed.weight)


def rename_weight(folder: Path, old: str, new: str):
    weights = load_file(folder / "model.safetensors")
    weights[new] = weights.pop(old)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.thorough
@pytest.mark.parametrize("is_stored", [True, False])
def test_logits_of_a_stored_head_are_those_of_transformers(tied_folder, is_stored):
    transformers = pytest.importorskip("transformers")
    if is_stored:
        store_a_head(tied_folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tied_folder, dtype=torch.float32)
    ours = load_model(tied_folder)
    tokens = torch.arange(40)[None]
    expected = theirs.eval()(tokens).logits
    error = (ours.logits(ours(tokens)[-1]) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


# ---------------------------------------------------------------- text

@pytest.fixture
def text_folder(tmp_path) -> Path:
    """The bundled tokenizer's folder without weights, to be varied."""
    copy_tokenizer(tmp_path)
    shutil.copy(BUNDLED / "config.json", tmp_path)
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


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> Tokenizer:
    """As LLaMA 1 and 2 have: what no other token writes is written byte by byte."""
    folder = tmp_path_factory.mktemp("byte-fallback")
    byte_fallback_tokenizer(folder / "tokenizer.json")
    return Tokenizer(folder)


def check_streaming(tokenizer: Tokenizer, ids: list[int], cut: int):
    """Joined, the pieces are the text of all, from where it is no longer the prompt's."""
    prompt = ids[:cut]
    tokens = ids[cut:]
    pieces = list(tokenizer.stream(prompt, iter(tokens)))
    text = tokenizer.decode(ids)
    known = commonprefix((tokenizer.decode(prompt), text))
    assert "".join(pieces) == text[len(known):]
    assert len(tokens) <= len(pieces) <= len(tokens) + 1


@pytest.mark.parametrize("before", ["A ", "a{special}b"])
def test_a_prompt_that_ends_in_the_sign_for_broken_characters_is_not_shown_again(
        byte_level, before):
    """Nor with a special token within, whose place the text does not say."""
    special = byte_level.special["eos_token"]
    prompt = byte_level.encode(before.format(special=special) + BROKEN)
    assert "".join(byte_level.stream(prompt, iter(plain_ids(byte_level, " cat")))) == " cat"


def test_nor_behind_a_special_token_where_texts_begin_with_a_space(byte_fallback):
    sign = [3 + byte for byte in BROKEN.encode()]
    prompt = [BYTE_FALLBACK.index(token) for token in ("▁a", "</s>")] + sign
    assert byte_fallback.decode(prompt) == f"a{BROKEN}"
    assert "".join(byte_fallback.stream(prompt, iter([BYTE_FALLBACK.index("b")]))) == "b"


def cut_anywhere(ids: st.SearchStrategy):
    """Token ids, and how many of them are the prompt: at least one, and not all."""
    texts = st.lists(ids, min_size=2, max_size=24)
    return texts.flatmap(lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1)))


# Half of them single bytes: of byte-level tokenizers these come after the special tokens.
LEVEL_IDS = cut_anywhere(st.integers(0, 300) | st.integers(0, 4000))
# Mostly bytes that can make a character together, here 日, é and 🙂, and whole tokens between.
CHARACTER_BYTES = [3 + byte for byte in "日é🙂".encode()]
FALLBACK_IDS = cut_anywhere(
    st.sampled_from(CHARACTER_BYTES) | st.integers(0, len(BYTE_FALLBACK) - 1)
    | st.integers(3 + 256, len(BYTE_FALLBACK) - 1))
TEXTS = st.tuples(st.text("abé日🙂 \ufffd", min_size=1, max_size=12), st.floats(0, 1))


def check_streaming_of_a_text(tokenizer: Tokenizer, text: str, share: float):
    ids = [*tokenizer.encode("a"), *tokenizer.encode(text)]
    check_streaming(tokenizer, ids, 1 + int(share * (len(ids) - 2)))


@given(LEVEL_IDS)
def test_byte_level_pieces_join_to_the_whole_text(byte_level, ids_and_cut):
    check_streaming(byte_level, *ids_and_cut)


@given(FALLBACK_IDS)
def test_byte_fallback_pieces_join_to_the_whole_text(byte_fallback, ids_and_cut):
    check_streaming(byte_fallback, *ids_and_cut)


@given(TEXTS)
def test_pieces_of_real_text_join_to_it(byte_level, byte_fallback, text_and_share):
    check_streaming_of_a_text(byte_level, *text_and_share)
    check_streaming_of_a_text(byte_fallback, *text_and_share)


@pytest.mark.thorough
@at_length()
@given(LEVEL_IDS, FALLBACK_IDS, TEXTS)
def test_pieces_join_to_the_whole_text_at_length(byte_level, byte_fallback, level, fallback, text):
    check_streaming(byte_level, *level)
    check_streaming(byte_fallback, *fallback)
    check_streaming_of_a_text(byte_level, *text)
    check_streaming_of_a_text(byte_fallback, *text)


def test_a_prompt_may_end_within_a_character(byte_level, byte_fallback):
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode("日a")
        check_streaming(tokenizer, ids, len(ids) - 3)


def test_streaming_survives_bytes_that_are_no_text(byte_level):
    """The library's own DecodeStream raises on some of these."""
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(2, 300, (40,), generator=random).tolist()
        check_streaming(byte_level, [0, *tokens], 1)


def test_a_character_of_bytes_comes_in_one_piece(byte_fallback):
    """The bytes that follow decide what a byte is, so it waits for another token, or the end."""
    tokenizer = byte_fallback
    prompt = tokenizer.encode("ab")
    smile = [3 + byte for byte in "🙂".encode()]
    letter = BYTE_FALLBACK.index("b")
    assert list(tokenizer.stream(prompt, iter([*smile, letter]))) == ["", "", "", "", "🙂b"]
    assert list(tokenizer.stream(prompt, iter(smile))) == ["", "", "", "", "🙂"]
    broken = list(tokenizer.stream(prompt, iter(smile[:2])))
    assert broken == ["", "", BROKEN * 2]


def test_bytes_join_across_a_special_token(byte_fallback):
    """Which is not printed, so those after it decide about those before it."""
    special = BYTE_FALLBACK.index("</s>")
    sun = [3 + byte for byte in "日".encode()]
    check_streaming(byte_fallback, [*sun, special, sun[0]], 1)
    check_streaming(byte_fallback, [*sun[:2], special, sun[2]], 1)


def test_a_space_at_the_start_of_a_piece_is_kept(byte_fallback):
    """The decoder takes one off, but only at the start of the whole text."""
    ids = byte_fallback.encode("ab ab a")
    for cut in range(1, len(ids)):
        check_streaming(byte_fallback, ids, cut)
    assert byte_fallback.decode(ids) == "ab ab a"


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


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json",
     lambda i: {"added_tokens_decoder": {str(i): {"content": "<|tool|>", "special": True}}}),
    ("tokenizer_config.json", lambda i: {"additional_special_tokens": ["<|tool|>"]}),
    ("special_tokens_map.json", lambda i: {"pad_token": {"content": "<|tool|>"}}),
    ("added_tokens.json", lambda i: {"<|tool|>": i}),
], ids=["by id", "more", "by name", "of an older folder"])
def test_tokens_may_be_added_beside_tokenizer_json(text_folder, file, content):
    """Else one in a prompt would be read as ordinary text, in pieces."""
    before = Tokenizer(text_folder)
    end = before.library.get_vocab_size()
    set_fields(text_folder, file, **content(end))
    tokenizer = Tokenizer(text_folder)
    assert tokenizer.encode("king<|tool|>queen").count(end) == 1
    assert tokenizer.encode("a king") == before.encode("a king")
    assert (end in tokenizer.special_ids) == (file != "added_tokens.json")


def test_a_special_token_may_take_the_white_space_beside_it(text_folder):
    token = {"content": "<|tool|>", "lstrip": True, "rstrip": True}
    set_fields(text_folder, "tokenizer_config.json", additional_special_tokens=[token])
    tokenizer = Tokenizer(text_folder)
    assert tokenizer.encode("king <|tool|> queen") == tokenizer.encode("king<|tool|>queen")


@pytest.mark.parametrize("described", [False, True])
def test_what_a_file_beside_says_is_special_is_not_printed(text_folder, described):
    """Also where tokenizer.json has it as an ordinary added token, as fine-tunes may."""
    path = text_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    end = content["added_tokens"][-1]
    end["rstrip"] = True                                 # a flag, which stays
    path.write_text(json.dumps(content))
    if described:
        set_fields(text_folder, "tokenizer_config.json", eos_token=None, added_tokens_decoder={
            str(end["id"]): {"content": end["content"], "special": True, "rstrip": True}})
    else:
        set_fields(text_folder, "tokenizer_config.json", eos_token=end["content"])
    tokenizer = Tokenizer(text_folder)
    tokens = [*plain_ids(tokenizer, "the end"), end["id"]]
    marked = "the" + end["content"] + " end"
    assert plain_ids(tokenizer, marked) == plain_ids(tokenizer, marked.replace(" ", ""))
    assert tokenizer.decode(tokens) == "the end"
    assert "".join(tokenizer.stream([0], iter(tokens))) == "the end"


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
    ({"eos_token_id": []}, {3}),
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


def test_a_template_knows_all_tokens_that_are_named(text_folder):
    template = "{{ sep_token }}{{ turn_token }}{{ image_token }}{{ messages | tojson(false, 1) }}"
    set_fields(text_folder, "tokenizer_config.json", chat_template=template, sep_token="<sep>",
               turn_token={"content": "<turn>"}, extra_special_tokens={"image_token": "<image>"})
    tokenizer = Tokenizer(text_folder)
    assert tokenizer.render(["hé"]).startswith("<sep><turn><image>[\n {")
    assert len(tokenizer.encode("<sep><turn><image>")) == 3 + len(tokenizer.encode(""))


def test_special_tokens_may_be_named_in_a_file_of_their_own(text_folder):
    (text_folder / "chat_template.jinja").write_text(TEMPLATE)
    expected = Tokenizer(text_folder).render(["hé"])
    begin = Tokenizer(text_folder).special["bos_token"]
    set_fields(text_folder, "tokenizer_config.json", bos_token=None)
    assert begin not in Tokenizer(text_folder).render(["hé"])
    set_fields(text_folder, "special_tokens_map.json", bos_token={"content": begin})
    assert Tokenizer(text_folder).render(["hé"]) == expected


@pytest.mark.parametrize("listed, first", [({}, "map"), ({"added_tokens_decoder": {}}, "config")])
def test_which_file_names_a_special_token_is_what_it_is_in_transformers(
    text_folder, listed, first
):
    """Where tokenizer_config.json lists no tokens, the folder is an old one: the map counts."""
    set_fields(text_folder, "tokenizer_config.json", sep_token="config", **listed)
    set_fields(text_folder, "special_tokens_map.json", sep_token="map", mask_token="mask")
    special = Tokenizer(text_folder).special
    assert special["sep_token"] == first
    assert special["mask_token"] == "mask"               # named once


@pytest.mark.parametrize("template, expected", [
    ({"default": "{{ messages[0].content }}"}, "x"),
    ([{"name": "tool_use", "template": "no"}], None),
    ("", None),
])
def test_a_chat_template_may_be_one_of_several_or_none(text_folder, template, expected):
    set_fields(text_folder, "tokenizer_config.json", chat_template=template)
    tokenizer = Tokenizer(text_folder)
    assert tokenizer.has_chat_template == (expected is not None)
    if expected:
        assert tokenizer.render(["x"]) == expected


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "chat_template.jinja").write_bytes(b"caf\xe9"),
    lambda folder: set_fields(folder, "tokenizer_config.json", chat_template=[{"template": "x"}]),
], ids=["no UTF-8", "without a name"])
def test_a_damaged_chat_template_is_there_and_refused_where_it_is_used(text_folder, damage):
    damage(text_folder)
    tokenizer = Tokenizer(text_folder)
    assert tokenizer.has_chat_template
    with pytest.raises(ModelError, match="chat template failed"):
        tokenizer.render(["x"])


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
    "{{ (3 ** (10 ** 9)) % 7 }}",
])
def test_a_bad_or_hostile_template_is_refused(text_folder, template):
    set_fields(text_folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match="chat template failed"):
        Tokenizer(text_folder).render(["x"])


def test_a_template_may_ask_for_tools_and_documents(text_folder):
    """There are none; transformers tells templates so by None."""
    template = (
        "{{ tools is none }} {{ documents is none }}"
        "{% if tools is not none %} use {{ tools }}{% endif %}"
    )
    set_fields(text_folder, "tokenizer_config.json", chat_template=template)
    assert Tokenizer(text_folder).render(["x"]) == "True True"


def test_a_template_may_mark_what_to_train_on(text_folder):
    template = (
        "{% for m in messages %}"
        "{% generation %}{% set x = m.content %}[{{ x }}]{% endgeneration %}{{ x }}"
        "{% endfor %}"
    )
    set_fields(text_folder, "tokenizer_config.json", chat_template=template)
    assert Tokenizer(text_folder).render(["a", "b"]) == "[a][b]"


def test_a_template_that_does_not_end_is_stopped(monkeypatch, text_folder):
    release = Event()
    monkeypatch.setattr(checkpoint, "TEMPLATE_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint.json, "dumps", lambda *_, **__: str(release.wait(60)))
    (text_folder / "chat_template.jinja").write_text("{{ messages | tojson }}")
    with pytest.raises(ModelError, match="did not end"):
        Tokenizer(text_folder).render(["x"])
    release.set()


# ---------------------------------------------------------------- settings

def test_a_model_may_suggest_settings(tmp_path):
    assert suggested_settings(None) == suggested_settings(tmp_path) == {}
    chosen = {"skip_layers": 3, "exit_threshold": 0.5}
    set_fields(tmp_path, "generation_config.json", clasp=chosen)
    assert suggested_settings(tmp_path) == suggested_settings(str(tmp_path)) == chosen


@pytest.mark.parametrize("suggested", [
    {"depth": 3},
    {"draft_length": 4.5},
    {"skip_layers": "many"},
    {"skip_layers": True},
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
