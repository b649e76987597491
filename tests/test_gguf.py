"""tools/gguf_to_safetensors.py: a model written as GGUF comes back with the same logits and the same tokens."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from generate import Text
from model import inverse_frequencies, load_model, read_config

sys.path.insert(0, str(ROOT / "tools"))
import gguf_to_safetensors  # noqa: E402

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parent / "golden"
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: Path, architecture="llama", extra=lambda writer: None):
    """A golden model as GGUF: rows of q and k interleaved, a byte-level tokenizer of 61 letters."""
    c = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<end>", *(chr(ord("A") + i) for i in range(58)), "AB", "ABC"])
    writer.add_token_merges(["A B", "AB C"])
    writer.add_token_types([3] + [1] * 60)
    writer.add_eos_token_id(0)
    for name, w in load_file(model / "model.safetensors").items():
        *_, kind, suffix = name.split(".")
        kind = f"self_attn.{kind}" if "self_attn" in name else f"mlp.{kind}" if ".mlp." in name else kind
        for which, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if which in kind:
                w = w.unflatten(0, (c[heads], 2, c["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        writer.add_tensor(f"{block}{NAMES[kind]}.weight", w.contiguous().numpy())
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source, out, *flags):
    return subprocess.run([sys.executable, ROOT / "tools" / "gguf_to_safetensors.py", source, out, *flags],
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", ["gqa-untied", "mha-tied", "head-dim"])
def test_a_model_comes_back_with_its_logits_and_tokenizer(tmp_path, name):
    write_gguf(tmp_path / "m.gguf", GOLDEN / name)
    done = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    expected, model = load_file(GOLDEN / name / "expected"), load_model(tmp_path / "out")
    logits = model.logits(model(expected["tokens"][None])[-1])[0]
    assert (logits - expected["logits"]).abs().max() < 1e-4 * expected["logits"].abs().max()
    text = Text(tmp_path / "out")
    assert text.encode("ABCAB", chat=False) == [60, 59] and text.stop == {0}


def test_llama3_rope_scaling_is_recognised_by_its_divisors(tmp_path):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
    plain = replace(read_config(GOLDEN / "llama3-rope"), rope_scaling=None)
    divisors = inverse_frequencies(plain) / inverse_frequencies(replace(plain, rope_scaling=scaling))
    for name, values, status in (("good", divisors, 0), ("bad", torch.tensor([1, 2.0, 3.0, 8.0]), 2)):
        write_gguf(tmp_path / name, GOLDEN / "llama3-rope",
                   extra=lambda writer, values=values: writer.add_tensor("rope_freqs.weight", values.numpy()))
        done = convert(tmp_path / name, tmp_path / f"{name}-out")
        assert done.returncode == status, done.stderr
    assert read_config(tmp_path / "good-out").rope_scaling == scaling
    assert "rope_freqs" in done.stderr and not (tmp_path / "bad-out").exists()


def test_a_sentencepiece_vocabulary_merges_by_score(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", *(f"<0x{i:02X}>" for i in range(52))]
    fields = {"model": "llama", "tokens": pieces, "token_type": [2, 3, 3] + [1] * 6 + [6] * 52, "bos_token_id": 1,
              "eos_token_id": 2, "scores": [0.0, 0, 0, -9, -9, -9, -2, -1, -3, *[0.0] * 52]}
    tokenizer = gguf_to_safetensors.read_tokenizer(lambda name, *default: fields.get(name.split(".")[-1], *default))
    assert tokenizer.encode("ab a").tokens == ["<s>", "\u2581ab", "\u2581a"]
    assert tokenizer.encode("\n").tokens == ["<s>", "\u2581", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab a\n").ids) == "ab a\n"


@pytest.mark.parametrize("make, word", [
    (lambda path: path.write_bytes(b"not gguf at all, but long enough to be read"), "cannot be read"),
    (lambda path: None, "cannot be read"),
    (lambda path: write_gguf(path, GOLDEN / "gqa-untied", architecture="gemma"), "gemma"),
    (lambda path: write_gguf(path, GOLDEN / "gqa-untied", extra=lambda w: w.add_tensor(
        "blk.0.attn_q.bias", torch.zeros(32).numpy())), "attn_q.bias")], ids=["garbage", "missing", "gemma", "bias"])
def test_bad_files_are_refused_in_one_line_and_nothing_is_left(tmp_path, make, word):
    make(tmp_path / "m.gguf")
    done = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
