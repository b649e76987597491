"""What a user can get wrong: one line on standard error, exit status 2, nothing on standard output, no traceback.

    python -m pytest -q -rP tests/test_refusals.py | grep '^|'        the table of mistakes and the lines they get
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from conftest import BUNDLED, ROOT
from generate import main

SHORT = ["--max-new-tokens", "12", "--device", "cpu"]


def refused(capsys, argv: list[str]) -> str:
    """The line that generate.py prints; checks all else that a refusal promises."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("generate.py: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("argv, word", [
    (["--model", "/no/such/folder"], "no folder"),
    (["--skip-layers", "20"], "fewer than the model's 20"),
    (["--skip-layers", "-1"], "at least 0"),
    (["--draft-length", "0"], "draft length"),
    (["--draft-length", "1000000000000000000"], "draft length"),
    (["--draft-exit-threshold", "2"], "threshold"),
    (["--opt-interval", "0"], "interval"),
    (["--temperature", "-1"], "temperature"),
    (["--temperature", "1e-40"], "temperature"),
    (["--temperature", "nan"], "temperature"),
    (["--top-p", "0"], "top-p"),
    (["--top-p", "1.5"], "top-p"),
    (["--seed", "-1"], "seed"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--max-new-tokens", "many"], "invalid int"),
    (["--prompt", ""], "empty"),
    (["--prompt", "\udce9"], "cannot read"),
    (["--prompt-file", "/no/file"], "cannot read"),
    (["--prompt-file", str(ROOT)], "cannot read"),
    (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
    (["--prompt", "word " * 2000], "context of"),
    (["--max-new-tokens", "9999"], "context of"),
    (["--device", "tpu"], "unknown device"),
    (["--device", "cuda:99"], "no device"),
    (["--dtype", "int4"], "invalid choice"),
    (["--cuda-graphs", "--device", "cpu"], "needs an NVIDIA GPU"), (["--seed", str(2 ** 64)], "seed"), (["--top-p", "1e-46"], "top-p"),
    (["--method", "magic"], "invalid choice"),
    (["--chat"], "no chat template"),
    (["--nonsense"], "unrecognized")], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_a_bad_flag(capsys, argv, word):
    line = refused(capsys, argv)
    assert word in line
    print(f"| `{' '.join(argv).encode('ascii', 'replace').decode()[:40]}` | {line} |")


# ---------------------------------------------------------------- the model's folder

def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def overwrite(folder, name, content: bytes):
    (folder / name).write_bytes(content)


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")
                                                                     | {names[0]: "model-00002-of-00002.safetensors"}}))


NORM = "model.norm.weight"
DAMAGE = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config.json is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "not readable"),
    "config.json is not JSON": (lambda f: overwrite(f, "config.json", b"{"), "not readable as JSON"),
    "config.json is a list": (lambda f: overwrite(f, "config.json", b"[1]"), "not a JSON object"),
    "config.json lacks a field": (lambda f: edit_config(f, vocab_size=None), "'vocab_size' is missing"),
    "wrong architecture": (lambda f: edit_config(f, model_type="mistral"), "model_type 'mistral'"),
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer.json is damaged": (lambda f: overwrite(f, "tokenizer.json", b"{}"), "tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "only a pickle": (only_a_pickle, "model.safetensors is missing"),
    "truncated weights": (lambda f: overwrite(f, "model.safetensors", (f / "model.safetensors").read_bytes()[:-500]), "truncated"),
    "corrupt header": (lambda f: overwrite(f, "model.safetensors", b"\xff" * 1000), "damaged"),
    "empty weights": (lambda f: overwrite(f, "model.safetensors", b""), "damaged"),
    "a missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "a missing tensor": (lambda f: edit_weights(f, lambda w: w.pop(NORM)), f"no weights for {NORM}"),
    "an extra tensor": (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))), "unexpected tensor extra"),
    "a tensor of another shape": (lambda f: edit_weights(f, lambda w: w.update({NORM: torch.ones(3)})), "(3,)"),
    "a tensor of integers": (lambda f: edit_weights(f, lambda w: w.update({NORM: torch.ones(256).int()})), "int32"),
    "NaN weights": (lambda f: edit_weights(f, lambda w: w[NORM].fill_(torch.nan)), "NaN or infinity"),
    "one infinite weight": (lambda f: edit_weights(f, lambda w: w[NORM][:1].fill_(torch.inf)), "NaN or infinity"),
    "hostile chat template": (lambda f: overwrite(f, "chat_template.jinja", b"{{ ''.__class__.__mro__ }}"), "chat template failed"),
    "eos_token_id is no id": (lambda f: overwrite(f, "generation_config.json", b'{"eos_token_id": [[1]]}'), "eos_token_id"),
    "an index of no files": (lambda f: overwrite(f, "model.safetensors.index.json", b'{"weight_map": {"a": 1}}'), "weight_map"),
    "half a draft length": (lambda f: overwrite(f, "generation_config.json", b'{"clasp": {"draft_length": 4.5}}'), "clasp may give"),
    "bad suggested settings": (lambda f: overwrite(f, "generation_config.json", b'{"clasp": {"depth": 3}}'), "clasp may give"),
}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(BUNDLED, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "*.md")))


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_folder(capsys, folder, name, temperature):
    damage, word = DAMAGE[name]
    damage(folder)
    line = refused(capsys, [*SHORT, "--model", str(folder), "--temperature", temperature, *["--chat"] * ("template" in name)])
    assert word in line
    if temperature == "0":
        print(f"| {name} | {line.replace(str(folder), 'FOLDER')} |")


def test_plain_decoding_notices_nan_too(capsys, folder):
    DAMAGE["NaN weights"][0](folder)
    refused(capsys, [*SHORT, "--model", str(folder), "--method", "autoregressive"])


# ---------------------------------------------------------------- while it runs

def test_out_of_memory_says_what_to_lower(capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")
    monkeypatch.setattr(generate, "load_model", fail)
    line = refused(capsys, SHORT)
    assert "lower --max-new-tokens" in line
    print(f"| out of GPU memory | {line} |")


def start(*argv):
    """A child that hears Ctrl-C, even where these tests run in the background of a shell, which ignores it."""
    return subprocess.Popen([sys.executable, "-u", ROOT / "generate.py", "--max-new-tokens", "450", "--prompt", "The king", *argv],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("argv", [[], ["--method", "autoregressive"]], ids=str)
def test_ctrl_c_keeps_the_text_and_prints_the_statistics(argv):
    run = start(*argv)
    begun = run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and len(begun) == 20
    assert b"interrupted" in err and b"tokens/s" in err and b"Traceback" not in err


def test_ctrl_c_keeps_what_json_has(monkeypatch, capsys):
    def stop_after_five(*args, **kwargs):
        for i, token in enumerate(generate_clasp(*args, **kwargs)):
            if i == 5:
                raise KeyboardInterrupt
            yield token
    generate_clasp = generate.clasp
    monkeypatch.setattr(generate, "clasp", stop_after_five)
    assert main([*SHORT, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["text"]


def test_a_closed_pipe_is_no_error():
    run = start()
    run.stdout.read(5)
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait(timeout=60) == 141 and b"Traceback" not in err and b"Error" not in err
