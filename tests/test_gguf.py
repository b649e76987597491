"""tools/gguf_to_safetensors.py: a model in GGUF comes back with the same logits and tokens."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from checkpoint import Tokenizer, load_model, read_config
from model import inverse_frequencies

sys.path.insert(0, str(ROOT / "tools"))
import gguf_to_safetensors

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parent / "golden"
CONTROL = 3                   # GGUF's type of special tokens

# Hugging Face's names of weights, and GGUF's.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


# ---------------------------------------------------------------------------- writing GGUF

def write_gguf(
    path: Path,
    model: Path,
    architecture="llama",
    extra=None,
    heads=None,
    endianess=gguf.GGUFEndian.LITTLE,
    **tokenizer,
):
    """A golden model as GGUF, with a byte-level tokenizer of 61 letters.

    extra(writer): adds what the model does not have. heads: said in place of its own, or a list of
    those of each layer. tokenizer: see add_tokenizer.
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    add_config(writer, config, heads)
    add_tokenizer(writer, **tokenizer)
    for name, weight in load_file(model / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), interleaved(name, weight, config).numpy())
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer, config: dict, heads):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"] if heads is None else heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def add_tokenizer(writer, merges=("A B", "AB C"), eos=0):
    letters = [chr(ord("A") + i) for i in range(58)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<end>", *letters, "AB", "ABC"])
    writer.add_token_merges(merges)
    writer.add_token_types([CONTROL] + [1] * 60)
    writer.add_eos_token_id(eos)


def gguf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, number, *kind, _ = name.split(".")
    return f"blk.{number}.{LAYER_NAMES['.'.join(kind)]}.weight"


def interleaved(name: str, weight: torch.Tensor, config: dict) -> torch.Tensor:
    """Rows of q and k in GGUF's order: dimension i of a head beside i + head_dim/2."""
    for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if kind in name:
            halves = weight.unflatten(0, (config[heads], 2, config["head_dim"] // 2))
            weight = halves.transpose(1, 2).flatten(0, 2)
    return weight.contiguous()


@pytest.fixture
def convert(monkeypatch, capsys):
    """A function that runs the program: (exit status, what it wrote to standard error)."""
    def run(source: Path, out: Path, *flags: str) -> tuple[int, str]:
        argv = ["gguf_to_safetensors.py", str(source), str(out), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        status = 0
        try:
            gguf_to_safetensors.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err
    return run


def leftovers(folder: Path) -> set[str]:
    """Names of all that lies in a folder."""
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------- properties

@pytest.mark.parametrize("name", ["gqa-untied", "mha-tied", "head-dim"])
def test_a_model_comes_back_with_its_logits_and_tokenizer(tmp_path, convert, name):
    write_gguf(tmp_path / "m.gguf", GOLDEN / name)
    status, err = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "float32")
    assert status == 0, err
    assert leftovers(tmp_path) == {"m.gguf", "out"}

    expected = load_file(GOLDEN / name / "expected")
    model = load_model(tmp_path / "out")
    states = model(expected["tokens"][None])
    logits = model.logits(states[-1])[0]
    scale = expected["logits"].abs().max()
    assert (logits - expected["logits"]).abs().max() < 1e-4 * scale

    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.encode("ABCAB", chat=False) == [60, 59]
    assert tokenizer.stop == {0}


def add_divisors(divisors: torch.Tensor):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    return extra


def test_llama3_rope_scaling_is_recognised_by_its_divisors(tmp_path, convert):
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    plain = replace(read_config(GOLDEN / "llama3-rope"), rope_scaling=None)
    scaled = replace(plain, rope_scaling=scaling)
    divisors = inverse_frequencies(plain) / inverse_frequencies(scaled)
    write_gguf(tmp_path / "good", GOLDEN / "llama3-rope", extra=add_divisors(divisors))
    status, err = convert(tmp_path / "good", tmp_path / "out")
    assert status == 0, err
    assert read_config(tmp_path / "out").rope_scaling == scaling


def test_other_divisors_are_refused(tmp_path, convert):
    divisors = torch.tensor([1, 2.0, 3.0, 8.0])
    write_gguf(tmp_path / "bad", GOLDEN / "llama3-rope", extra=add_divisors(divisors))
    status, err = convert(tmp_path / "bad", tmp_path / "out")
    assert status == 2
    assert "rope_freqs" in err
    assert leftovers(tmp_path) == {"bad"}


def test_a_sentencepiece_vocabulary_merges_by_score():
    special = ["<unk>", "<s>", "</s>"]
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab"]
    bytes_ = [f"<0x{i:02X}>" for i in range(52)]
    fields = {
        "model": "llama",
        "tokens": special + pieces + bytes_,
        "token_type": [2, 3, 3] + [1] * len(pieces) + [6] * len(bytes_),
        "scores": [0.0, 0, 0, -9, -9, -9, -2, -1, -3] + [0.0] * len(bytes_),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    def field(name, *default):
        return fields.get(name.split(".")[-1], *default)

    tokenizer = gguf_to_safetensors.read_tokenizer(field)
    assert tokenizer.encode("ab a").tokens == ["<s>", "▁ab", "▁a"]
    assert tokenizer.encode("\n").tokens == ["<s>", "▁", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab a\n").ids) == "ab a\n"


def test_pieces_of_one_score_merge_in_the_order_of_the_vocabulary():
    """Some converters write the same score for all. "abc" is ab + c, since ab comes before bc."""
    tokens = ["c", "a", "b", "ab", "bc", "abc", "<end_of_turn>"]
    merges = gguf_to_safetensors.implied_merges(tokens, [-1000.0] * len(tokens))
    assert merges == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


def test_what_ends_a_turn_is_special_whatever_its_type():
    fields = {"tokens": ["a", "<tool>", "<|im_end|>"], "token_type": [1, 4, 4]}

    def field(name):
        return fields[name.removeprefix("tokenizer.ggml.")]

    [end] = gguf_to_safetensors.added_tokens(field, CONTROL)
    [tool] = gguf_to_safetensors.added_tokens(field, gguf_to_safetensors.USER_DEFINED)
    assert (end.content, end.special) == ("<|im_end|>", True)
    assert (tool.content, tool.special) == ("<tool>", False)


@pytest.mark.parametrize("fields, expected", [
    ({}, []),
    ({"eos_token_id": 1, "eot_token_id": 0}, [0, 1]),
    ({"eos_token_id": 1, "tokens": ["a", "<end>", "<|eot_id|>", "<|end_of_text|>"]}, [1, 2]),
])
def test_an_answer_ends_where_a_turn_does(fields, expected):
    """Files of 2024 name the end of a text alone."""
    def field(name, default=None):
        return ({"tokens": []} | fields).get(name.removeprefix("tokenizer.ggml."), default)

    found = gguf_to_safetensors.generation_config(field)
    assert found == {"eos_token_id": expected}


@pytest.mark.parametrize("room", [0, 5_000])
def test_large_models_come_in_several_files(tmp_path, monkeypatch, convert, room):
    """Of one tensor each, or of as many as there is room for: the same model."""
    monkeypatch.setattr(gguf_to_safetensors, "SHARD_BYTES", room)
    write_gguf(tmp_path / "m.gguf", GOLDEN / "gqa-untied")
    status, err = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "float32")
    assert status == 0, err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    expected = load_file(GOLDEN / "gqa-untied" / "expected")
    model = load_model(tmp_path / "out")
    best = model.logits(model(expected["tokens"][None])[-1])[0].argmax(-1)
    assert torch.equal(best, expected["logits"].argmax(-1))


# ---------------------------------------------------------------------------- refusals

def garbage(path: Path):
    path.write_bytes(b"not gguf at all, but long enough to be read")


def nothing(path: Path):
    """No file at all."""


def another_architecture(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", architecture="gemma")


def a_bias(path: Path):
    def extra(writer):
        writer.add_tensor("blk.0.attn_q.bias", torch.zeros(32).numpy())
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def an_unknown_merge(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", merges=["A B", "X1 X2"])


def a_merge_of_one(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", merges=["AB"])


def an_end_that_is_no_token(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", eos=61)


def an_unnamed_scaling(path: Path):
    def extra(writer):
        writer.add_float32("llama.rope.scaling.factor", 4.0)
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def a_scaling_of_2023(path: Path):
    def extra(writer):
        writer.add_float32("llama.rope.scale_linear", 4.0)
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def heads_of_each_layer(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", heads=[4, 4])


def no_heads(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", heads=0)


def half_a_head(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", extra=lambda writer: writer.add_float32(
        "llama.attention.head_count", 4.5))


def an_end_of_turns_that_is_text(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", extra=lambda writer: writer.add_string(
        "tokenizer.ggml.eot_token_id", "A"))


def too_few_divisors(path: Path):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", torch.ones(3).numpy())
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def a_part(path: Path):
    def extra(writer):
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 2)
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def a_part_in_words(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", extra=lambda w: w.add_string("split.count", "two"))


def seeing_later_tokens(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", extra=lambda w: w.add_causal_attention(False))


def a_weight_of_an_adapter(path: Path):
    weight = torch.zeros(32, 32).numpy()
    write_gguf(path, GOLDEN / "gqa-untied",
               extra=lambda writer: writer.add_tensor("blk.0.attn_q.weight.lora_a", weight))


def fewer_layers_than_it_says(path: Path):
    def extra(writer):
        writer.add_block_count(4)
    write_gguf(path, GOLDEN / "gqa-untied", extra=extra)


def big_endian(path: Path):
    write_gguf(path, GOLDEN / "gqa-untied", endianess=gguf.GGUFEndian.BIG)


@pytest.mark.parametrize("make, word", [
    (a_part, "part 1 of a model in 2 files"),
    (a_part_in_words, "of a model in two files"),
    (seeing_later_tokens, "later tokens"),
    (a_weight_of_an_adapter, "unexpected tensor blk.0.attn_q.weight.lora_a"),
    (fewer_layers_than_it_says, "no weights for model.layers.3."),
    (big_endian, "byte order"),
    (heads_of_each_layer, "head_count is not a whole number above 0"),
    (no_heads, "head_count is not a whole number above 0"),
    (half_a_head, "head_count is not a whole number above 0"),
    (an_end_of_turns_that_is_text, "tokenizer is damaged"),
    (too_few_divisors, "is not LLaMA 3.1's"),
    (an_unnamed_scaling, "unsupported RoPE scaling 'linear'"),
    (a_scaling_of_2023, "unsupported RoPE scaling 'linear'"),
    (an_unknown_merge, "tokenizer is damaged"),
    (a_merge_of_one, "tokenizer is damaged"),
    (an_end_that_is_no_token, "tokenizer is damaged"),
    (garbage, "cannot be read"),
    (nothing, "cannot be read"),
    (another_architecture, "gemma"),
    (a_bias, "attn_q.bias"),
])
def test_bad_files_are_refused_in_one_line_and_nothing_is_left(tmp_path, convert, make, word):
    make(tmp_path / "m.gguf")
    before = leftovers(tmp_path)
    status, err = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert status == 2
    assert word in err
    assert err.count("\n") == 1
    assert leftovers(tmp_path) == before


def test_the_program_ends_in_one_line_and_status_2(tmp_path):
    garbage(tmp_path / "m.gguf")
    program = ROOT / "tools" / "gguf_to_safetensors.py"
    done = subprocess.run([sys.executable, program, tmp_path / "m.gguf", tmp_path / "out"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gguf_to_safetensors.py: ")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------- other people's files

KEPT = ["out.partial", "out.tmp", "out.old"]


def other_folders(folder: Path):
    """Folders of such names as the tool's own might have, with something in each."""
    for name in KEPT:
        (folder / name).mkdir()
        (folder / name / "mine").write_text(name)


def assert_kept(folder: Path):
    for name in KEPT:
        assert (folder / name / "mine").read_text() == name


def test_nothing_that_it_did_not_make_is_deleted(tmp_path, convert):
    other_folders(tmp_path)
    write_gguf(tmp_path / "m.gguf", GOLDEN / "gqa-untied")
    status, err = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert status == 0, err
    assert_kept(tmp_path)
    assert leftovers(tmp_path) == {"m.gguf", "out", *KEPT}


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("broken"), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)
def test_a_conversion_that_fails_halfway_deletes_only_what_it_made(
    tmp_path, monkeypatch, convert, error
):
    other_folders(tmp_path)
    write_gguf(tmp_path / "m.gguf", GOLDEN / "gqa-untied")

    def fail(folder, *_):
        (folder / "half").write_text("of it")
        raise error

    monkeypatch.setattr(gguf_to_safetensors, "write_weights", fail)
    try:
        status, _ = convert(tmp_path / "m.gguf", tmp_path / "out")
        assert status == 2
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    assert_kept(tmp_path)
    assert leftovers(tmp_path) == {"m.gguf", *KEPT}


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_what_exists_already_stays(tmp_path, convert, existing):
    write_gguf(tmp_path / "m.gguf", GOLDEN / "gqa-untied")
    out = tmp_path / "out"
    if existing == "folder":
        out.mkdir()
        (out / "mine").write_text("kept")
    else:
        out.write_text("kept")
    status, err = convert(tmp_path / "m.gguf", out)
    assert status == 2
    assert "exists already" in err
    kept = out / "mine" if existing == "folder" else out
    assert kept.read_text() == "kept"
    assert leftovers(tmp_path) == {"m.gguf", "out"}
