"""What a user can get wrong: one line on standard error, status 2, and no traceback.

    python -m pytest -q -rP tests/test_refusals.py | grep '^|'      the mistakes and their lines
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from folders import edit_weights, set_fields, small_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import generate
from checkpoint import BUNDLED, read_config
from generate import main

SHORT = ["--max-new-tokens", "12", "--device", "cpu"]


def refused(capsys, argv: list[str]) -> str:
    """The line that generate.py prints; checks all else that a refusal promises."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err)
    return err.strip()


def assert_one_line(err: str):
    assert err.startswith("generate.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


# ---------------------------------------------------------------- the command line

LAYERS = str(read_config(BUNDLED).num_hidden_layers)
CONTEXT = str(read_config(BUNDLED).max_position_embeddings)
BAD_FLAGS = [
    (["--model", "/no/such/folder"], "no folder"),
    (["--model", "a\0b"], "no folder"),
    (["--skip-layers", LAYERS], f"fewer than the model's {LAYERS}"),
    (["--skip-layers", "-1"], "at least 0"),
    (["--skip-layers", "1.5"], "neither a number nor auto"),
    (["--skip-layers", "auto", "--opt-interval", "3"], "leave the others out"),
    (["--draft-length", "0"], "draft length"),
    (["--draft-length", "1000000000000000000"], "draft length"),
    (["--draft-exit-threshold", "2"], "threshold"),
    (["--opt-interval", "0"], "interval"),
    (["--opt-tokens", "0"], "between 1 and 64"),
    (["--opt-tokens", "-1"], "between 1 and 64"),
    (["--opt-tokens", "9" * 30], "between 1 and 64"),
    (["--skip-layers", "auto", "--opt-tokens", "3"], "leave the others out"),
    (["--temperature", "-1"], "temperature"),
    (["--temperature", "1e-40"], "temperature"),
    (["--temperature", "nan"], "temperature"),
    (["--top-p", "0"], "top-p"),
    (["--top-p", "1e-46"], "top-p"),
    (["--top-p", "1.5"], "top-p"),
    (["--seed", "-1"], "seed"),
    (["--seed", str(2 ** 64)], "seed"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--max-new-tokens", "-100000"], "at least 1"),
    (["--max-new-tokens", "many"], "invalid int"),
    (["--max-new-tokens", "9" * 400], "context of"),
    (["--max-new-tokens", CONTEXT], "context of"),
    (["--prompt", ""], "empty"),
    (["--prompt", "\udce9"], "cannot read"),
    (["--prompt", "word " * int(CONTEXT)], "context of"),
    (["--prompt-file", "/no/file"], "cannot read"),
    (["--prompt-file", "a\0b"], "cannot read"),
    (["--prompt-file", str(ROOT)], "cannot read"),
    (["--prompt-file", str(BUNDLED / "model.safetensors")], "cannot read"),
    (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
    (["--device", "tpu"], "unknown device"),
    (["--device", "cuda:99"], "no device"),
    (["--dtype", "int4"], "invalid choice"),
    (["--cuda-graphs", "--device", "cpu"], "needs an NVIDIA GPU"),
    (["--method", "magic"], "invalid choice"),
    (["--nonsense"], "unrecognized"),
]


def flags(argv) -> str:
    """For the table, and for the names of the tests."""
    text = " ".join(argv).replace(str(ROOT), "ROOT").replace("\0", "NUL")
    return text.encode("ascii", "replace").decode()[:40]


@pytest.mark.parametrize("argv, word", BAD_FLAGS, ids=[flags(argv) for argv, _ in BAD_FLAGS])
def test_a_bad_flag(capsys, argv, word):
    line = refused(capsys, argv)
    assert word in line
    print(f"| `{flags(argv)}` | {line[:300]} |".replace(str(ROOT), "ROOT").replace("\0", "NUL"))


# ---------------------------------------------------------------- the model's folder

NORM = "model.norm.weight"


def config(**fields):
    """A damage: these fields of config.json changed."""
    return partial(set_fields, file="config.json", **fields)


def content(file: str, data: bytes):
    """A damage: a file that holds this."""
    def damage(folder):
        (folder / file).write_bytes(data)
    return damage


def without(file: str):
    def damage(folder):
        (folder / file).unlink()
    return damage


def a_folder(file: str):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()
    return damage


def a_pipe(file: str):
    """A FIFO: nobody ever writes into it, and reading it would wait for ever."""
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
    return damage


def norm(change):
    """A damage: another final norm. change(weights of the norm): the tensor to store."""
    def damage(folder):
        weight = load_file(folder / "model.safetensors")[NORM]
        edit_weights(folder, model_norm_weight=change(weight))
    return damage


def filled(value: float, count: int | None = None):
    def damage(folder):
        weight = load_file(folder / "model.safetensors")[NORM]
        weight[:count] = value
        edit_weights(folder, model_norm_weight=weight)
    return damage


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def index(**files):
    """A damage: no model.safetensors, but an index that names these files."""
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        value = json.dumps({"weight_map": files})
        (folder / "model.safetensors.index.json").write_text(value)
    return damage


def outside(path: str):
    """A damage: the index names a file of good weights that lies outside the folder."""
    def damage(folder):
        target = folder.parent / "elsewhere.safetensors"
        (folder / "model.safetensors").rename(target)
        names = load_file(target)
        files = dict.fromkeys(names, path.format(target=target))
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    return damage


def few_words(folder):
    """A damage: a tokenizer that knows one word, and no token for others."""
    library = Tokenizer(models.WordLevel({"once": 0}))
    library.save(str(folder / "tokenizer.json"))


def an_extra_tensor(folder):
    edit_weights(folder, extra=torch.ones(1))


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
DAMAGE = {
    # config.json
    "no config.json": (without("config.json"), "config.json is missing"),
    "config.json is a folder": (a_folder("config.json"), "not readable"),
    "config.json is a pipe": (a_pipe("config.json"), "not a file"),
    "config.json is not JSON": (content("config.json", b"{"), "not readable as JSON"),
    "config.json is no UTF-8": (content("config.json", b'{"a": "\xff"}'), "not readable as JSON"),
    "config.json is a list": (content("config.json", b"[1]"), "not a JSON object"),
    "config.json is nested deeply": (content("config.json", DEEP), "not readable as JSON"),
    "config.json lacks a field": (config(vocab_size=None), "'vocab_size' is missing"),
    "another architecture": (config(model_type="mistral"), "model_type 'mistral'"),
    "a negative rms_norm_eps": (config(rms_norm_eps=-1e-5), "rms_norm_eps must be a positive"),
    "an infinite rms_norm_eps": (config(rms_norm_eps=float("inf")), "rms_norm_eps must be"),
    "a rope_theta that is NaN": (config(rope_theta=float("nan")), "rope_theta must be a positive"),
    "a negative rope_theta": (config(rope_theta=-1.0), "rope_theta must be a positive"),
    "a rope_theta of 400 digits": (config(rope_theta=10 ** 400), "too large"),
    "a RoPE factor of 0": (config(rope_scaling=SCALING | {"factor": 0}), "factor must be"),
    "RoPE's low factor over its high one": (
        config(rope_scaling=SCALING | {"low_freq_factor": 4.0}), "more than low_freq_factor"),
    "a hidden size of 1e18": (config(hidden_size=10 ** 18, head_dim=8), "its sizes imply"),
    "a hidden size of 400 digits": (config(hidden_size=10 ** 400, head_dim=8), "its sizes imply"),
    "an intermediate size of 1e18": (config(intermediate_size=10 ** 18), "its sizes imply"),
    "a head size of 1e18": (config(head_dim=10 ** 18), "its sizes imply"),
    "a vocabulary of 1e9": (config(vocab_size=10 ** 9), "its sizes imply"),
    "20,000 layers": (config(num_hidden_layers=20_000), "its sizes imply"),
    "a size that is no whole number": (config(vocab_size=1e18), "positive integers"),
    "a size that is true": (config(hidden_size=True, head_dim=8), "positive integers"),
    "a negative size": (config(intermediate_size=-48), "positive integers"),
    # the tokenizer and the other settings
    "no tokenizer.json": (without("tokenizer.json"), "tokenizer.json"),
    "tokenizer.json is a folder": (a_folder("tokenizer.json"), "tokenizer.json"),
    "tokenizer.json is a pipe": (a_pipe("tokenizer.json"), "tokenizer.json"),
    "tokenizer.json is damaged": (content("tokenizer.json", b"{}"), "tokenizer.json"),
    "tokenizer.json is nested deeply": (content("tokenizer.json", DEEP), "tokenizer.json"),
    "a tokenizer without a token for unknown words": (few_words, "cannot encode the text"),
    "tokenizer_config.json is nested deeply": (
        content("tokenizer_config.json", DEEP), "not readable as JSON"),
    "a token of another id than tokenizer.json's": (
        content("added_tokens.json", b'{"<|tool|>": 7}'), "token 7 is not"),
    "added tokens that are no table": (
        content("tokenizer_config.json", b'{"added_tokens_decoder": [3]}'), "no table of added"),
    "an infinite id": (
        content("added_tokens.json", b'{"<|tool|>": Infinity}'), "no table of added"),
    "special tokens that are no list": (
        content("tokenizer_config.json", b'{"additional_special_tokens": "<|a|>"}'), "not a list"),
    "an added token without text": (
        content("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {}}}'), "no table of"),
    "eos_token_id is no id": (
        content("generation_config.json", b'{"eos_token_id": [[1]]}'), "eos_token_id"),
    "half a draft length": (
        content("generation_config.json", b'{"clasp": {"draft_length": 4.5}}'), "clasp may give"),
    "an unknown suggestion": (
        content("generation_config.json", b'{"clasp": {"depth": 3}}'), "clasp may give"),
    "a suggestion out of range": (
        content("generation_config.json", b'{"clasp": {"skip_layers": 3}}'), "fewer than"),
    # the weights
    "no weights": (without("model.safetensors"), "model.safetensors is missing"),
    "only a pickle": (only_a_pickle, "model.safetensors is missing"),
    "the weights are a folder": (a_folder("model.safetensors"), "is not a file"),
    "the weights are a pipe": (a_pipe("model.safetensors"), "is not a file"),
    "truncated weights": (truncated, "truncated"),
    "a corrupt header": (content("model.safetensors", b"\xff" * 1000), "damaged"),
    "empty weights": (content("model.safetensors", b""), "damaged"),
    "a missing shard": (
        index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is missing"),
    "an index of no files": (index(a=1), "weight_map"),
    "a shard in another folder": (outside("../elsewhere.safetensors"), "not in this folder"),
    "a shard by an absolute path": (outside("{target}"), "not in this folder"),
    "a shard that is the folder itself": (index(a=".."), ".."),
    "a shard of an endless name": (index(a=300 * "a"), "damaged or truncated"),
    "a missing tensor": (norm(lambda weight: None), f"no weights for {NORM}"),
    "an extra tensor": (an_extra_tensor, "unexpected tensor extra"),
    "a tensor of another shape": (norm(lambda weight: torch.ones(3)), "(3,)"),
    "a tensor of integers": (norm(torch.Tensor.int), "I32"),
    "a tensor of fp8": (norm(lambda weight: weight.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "NaN weights": (filled(torch.nan), "NaN or infinity"),
    "one infinite weight": (filled(torch.inf, 1), "NaN or infinity"),
}
TEMPLATES = {
    "no chat template": (lambda folder: None, "no chat template"),
    "a hostile chat template": (
        content("chat_template.jinja", b"{{ ''.__class__.__mro__ }}"), "chat template failed"),
    "a chat template that refuses": (
        content("chat_template.jinja", b"{{ raise_exception('no') }}"), "chat template failed: no"),
    "a chat template that is no template": (
        content("chat_template.jinja", b"{% if %}"), "chat template failed"),
    "a chat template that is a pipe": (a_pipe("chat_template.jinja"), "not a file"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return small_folder(tmp_path / "model")


def check_refusal(capsys, folder: Path, name: str, damage, word: str, *flags: str):
    damage(folder)
    line = refused(capsys, [*SHORT, "--model", str(folder), *flags])
    assert word in line
    shown = line.replace(str(folder), "FOLDER").replace(str(folder.parent), "..")
    print(f"| {name} | {shown[:300]} |")


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_folder(capsys, folder, name):
    check_refusal(capsys, folder, name, *DAMAGE[name], "--temperature", "0")


@pytest.mark.thorough
@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("flags", [
    ["--temperature", "1"],
    ["--method", "autoregressive"],
], ids=" ".join)
def test_a_bad_folder_is_refused_in_every_kind_of_decoding(capsys, folder, name, flags):
    if "suggestion" in name and "autoregressive" in flags:
        pytest.skip("plain decoding asks for no suggestions")
    check_refusal(capsys, folder, name, *DAMAGE[name], *flags)


@pytest.mark.parametrize("flags", [
    ["--temperature", "1"],
    ["--method", "autoregressive"],
    ["--method", "autoregressive", "--temperature", "1"],
], ids=" ".join)
def test_every_kind_of_decoding_notices_nan(capsys, folder, flags):
    check_refusal(capsys, folder, " ".join(flags), *DAMAGE["NaN weights"], *flags)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bad_chat_template(capsys, folder, name):
    check_refusal(capsys, folder, name, *TEMPLATES[name], "--chat")


@pytest.mark.thorough
def test_a_chat_template_without_end_ends(folder):
    """The process too: the template's thread does not keep it."""
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    run = start(folder, "--chat")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert out == b""
    assert_one_line(err.decode())
    assert b"did not end" in err


# ---------------------------------------------------------------- while it runs

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd further lines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Cannot allocate memory (os error 12)"),
], ids=["GPU", "CPU", "a file"])
def test_out_of_memory_says_what_to_lower(capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(generate, "load_model", fail)
    line = refused(capsys, SHORT)
    assert "lower --max-new-tokens" in line
    print(f"| out of memory | {line} |")


def test_other_runtime_errors_are_no_user_s_mistake(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(generate, "load_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(SHORT)


TOKENS = 20_000               # enough that a process is still writing when its test interferes


@pytest.fixture
def long_folder(tmp_path) -> Path:
    """Of a model that writes for long."""
    return small_folder(tmp_path / "model", context=TOKENS + 100)


def hear_ctrl_c():
    """In the child: also where a shell in the background has told it to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *argv: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "generate.py", "--model", folder, "--device", "cpu",
               "--prompt", "The king", "--temperature", "1", "--max-new-tokens", str(TOKENS), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)


def check_ctrl_c(folder, *argv):
    run = start(folder, *argv)
    begun = run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert len(begun) == 20
    assert b"interrupted" in err
    assert b"tokens/s" in err
    assert b"Traceback" not in err


def test_ctrl_c_keeps_the_text_and_prints_the_statistics(long_folder):
    check_ctrl_c(long_folder)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it says that PyTorch loads")
@pytest.mark.parametrize("seconds", [0.0, 0.4, 0.9])
def test_ctrl_c_while_the_program_loads_ends_it_without_a_traceback(long_folder, seconds):
    run = start(long_folder)
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(seconds)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (130, -signal.SIGINT)
    assert b"Traceback" not in err


@pytest.mark.thorough
def test_ctrl_c_keeps_the_text_of_plain_decoding_too(long_folder):
    check_ctrl_c(long_folder, "--method", "autoregressive")


def test_a_closed_pipe_is_no_error(long_folder):
    run = start(long_folder)
    run.stdout.read(5)
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait(timeout=60) == 141
    assert b"Traceback" not in err
    assert b"Error" not in err


def interrupted_after(tokens: int, function):
    """The same function of tokens, with Ctrl-C after so many."""
    def run(*args, **settings):
        for i, token in enumerate(function(*args, **settings)):
            if i == tokens:
                raise KeyboardInterrupt
            yield token
    return run


def test_ctrl_c_keeps_what_json_has(monkeypatch, capsys):
    monkeypatch.setattr(generate, "decode", interrupted_after(5, generate.decode))
    assert main([*SHORT, "--json"]) == 130
    out = json.loads(capsys.readouterr().out)
    assert out["text"]
    assert len(out["tokens"]) in (5, 6)                # the sixth may be counted, but is not out


def test_ctrl_c_in_a_comparison_keeps_the_text(monkeypatch, capsys):
    plain = generate.autoregressive

    def interrupted(*args, **settings):
        if "stats" in settings:                        # not while it warms up
            return interrupted_after(5, plain)(*args, **settings)
        return plain(*args, **settings)

    monkeypatch.setattr(generate, "autoregressive", interrupted)
    assert main([*SHORT, "--json", "--compare"]) == 130
    out, err = capsys.readouterr()
    out = json.loads(out)
    assert out["text"] and len(out["tokens"]) == 12
    assert "autoregressive" not in out
    assert err.endswith("interrupted\n")


# ---------------------------------------------------------------- files that are full or closed

def shell(redirections: str, *argv: str) -> subprocess.CompletedProcess:
    """generate.py as a shell starts it, with standard files redirected."""
    command = shlex.join([sys.executable, str(ROOT / "generate.py"), *SHORT, *argv])
    return subprocess.run(
        ["sh", "-c", f"{command} {redirections}"], capture_output=True, text=True)


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@needs_dev_full
def test_a_full_disk_is_named(folder):
    done = shell(">/dev/full", "--model", str(folder))
    assert done.returncode == 2
    assert_one_line(done.stderr)
    assert "cannot write the output: No space left" in done.stderr
    print(f"| `> /dev/full` | {done.stderr.strip()} |")


@needs_dev_full
@pytest.mark.thorough
def test_a_full_disk_is_named_after_the_statistics_of_json(folder):
    done = shell(">/dev/full", "--model", str(folder), "--json")
    assert done.returncode == 2
    assert "tokens/s" in done.stderr
    assert done.stderr.endswith("cannot write the output: No space left on device\n")


def check_text_without_stderr(folder, redirection):
    done = shell(redirection, "--model", str(folder))
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr == ""


def test_text_goes_on_where_standard_error_is_closed(folder):
    check_text_without_stderr(folder, "2>&-")


@needs_dev_full
@pytest.mark.thorough
def test_text_goes_on_where_standard_error_is_full(folder):
    check_text_without_stderr(folder, "2>/dev/full")


@pytest.mark.parametrize("redirection, argv, word", [
    (">&-", [], "standard output is closed"),
    ("<&-", ["--prompt-file", "-"], "standard input is closed"),
], ids=["output", "input"])
def test_a_closed_standard_file_is_named(redirection, argv, word):
    done = shell(redirection, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr)
    assert word in done.stderr
    print(f"| `{' '.join([*argv, redirection])}` | {done.stderr.strip()} |")


@pytest.mark.thorough
def test_nothing_is_said_where_nothing_can_be_said():
    done = shell(">&- 2>&-")
    assert done.returncode == 2
    assert done.stdout == done.stderr == ""
