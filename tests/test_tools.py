"""tools/: each says how it is used, measures what it says, and refuses in one line."""
import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("optuna")

from conftest import DEVICE, ROOT
from folders import small_folder
from safetensors.torch import load_file, save_file

from checkpoint import BUNDLED

pytestmark = pytest.mark.thorough


PROGRAMS = [*(ROOT / "tools").glob("*.py"), BUNDLED / "train.py"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_says_how_it_is_used(path):
    """So it can be imported, at least."""
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout or path.name == "common.py"


def run_tool(name: str, *argv: str) -> subprocess.CompletedProcess:
    """In one thread: on a small model others would only wait."""
    command = [sys.executable, str(ROOT / "tools" / name), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("what, options, shown", [
    ("equal", ["--prompts", "2", "--max-new-tokens", "20"], "8 runs of 20 greedy tokens"),
    ("slice", ["--positions", "20"], "| 10 |"),
    ("dp", [], "420 sets equal"),
    ("equal", ["--prompts", "2", "--max-new-tokens", "150", "--synthetic", "tiny",
               "--cuda-graphs"], "8 runs of 150 greedy tokens"),
])
def test_a_model_is_verified(what, options, shown):
    done = run_tool("verify.py", what, "--device", DEVICE, *options)
    if "no number of rows is exact" in done.stderr:
        pytest.skip("no number of rows is exact on this machine")
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    if what == "equal":
        assert "0 differ from plain decoding" in done.stdout
        assert "; 0 of " in done.stdout


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_few_layers_is_verified(tmp_path, layers):
    folder = small_folder(tmp_path / "model", layers=layers)
    done = run_tool("verify.py", "equal", "--model", str(folder), "--prompts", "1",
                    "--max-new-tokens", "8", "--device", DEVICE)
    if "no number of rows is exact" in done.stderr:
        pytest.skip("no number of rows is exact on this machine")
    assert done.returncode == 0, done.stderr
    assert f"{layers} runs of 8 greedy tokens" in done.stdout


@pytest.mark.parametrize("what, options, shown", [
    ("reject", ["--prompts", "1", "--max-new-tokens", "60"], "| 18 |"),
    ("sweep", ["--max-new-tokens", "2", "--budgets", "17", "--repeat", "1", "--temperatures",
               "0"], "| overall |"),
])
def test_auto_is_studied(what, options, shown):
    done = run_tool("study_auto.py", what, "--device", DEVICE, *options)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("argv, word", [
    ([".", "--rounds", "1"], "at least 2"),
    (["/no", "--rounds", "2", "--", "--max-new-tokens", "8"], "/no"),
    ([".", "--rounds", "2", "--", "--method", "autoregressive", "--max-new-tokens", "2"],
     "nothing to compare"),
    ([], "required"),
])
def test_checkouts_are_raced_with_what_stands_after_two_dashes(argv, word):
    done = run_tool("race_checkouts.py", *argv)
    assert done.returncode != 0
    assert word in done.stderr and "Traceback" not in done.stderr


def test_what_eight_bits_cost_is_said_with_its_error():
    done = run_tool("weights.py", "--device", DEVICE, "--pieces", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"in int8 [\d.]+ \([+-][\d.]+ %, standard error [\d.]+\)", done.stdout)
    done = run_tool("weights.py", "--pieces", "1")
    assert done.returncode == 2 and "at least 2" in done.stderr


def test_of_keys_that_overflow_no_perplexity_is_told(tmp_path):
    """With q / 2^13 and k * 2^13 it is the same model, but not in float16."""
    folder = shutil.copytree(BUNDLED, tmp_path / "large")
    path = folder / "model.safetensors"
    factors = {"q_proj": 2.0 ** -13, "k_proj": 2.0 ** 13}
    scaled = {name: weight * factors.get(name.split(".")[-2], 1)
              for name, weight in load_file(path).items()}
    save_file(scaled, path)
    done = run_tool("weights.py", "--model", str(folder), "--pieces", "2", "--dtype", "float16")
    assert done.returncode == 2
    assert "too narrow" in done.stderr


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory):
    """A model of a smaller vocabulary and context than the text that it is asked about."""
    folder = tmp_path_factory.mktemp("few") / "model"
    return small_folder(folder, context=40)


@pytest.mark.parametrize("argv", [["weights.py"], ["verify.py", "dp"]], ids=" ".join)
def test_texts_that_a_model_cannot_read_are_refused(few_tokens, argv):
    done = run_tool(*argv, "--model", str(few_tokens), "--device", DEVICE)
    assert done.returncode == 2
    assert "do not fit the model's context of 40" in done.stderr


def test_auto_is_not_compared_on_the_prompts_it_was_made_with():
    done = run_tool("study_auto.py", "sweep", "--prompts", "1", "--budgets", "17", "--repeat", "1",
                    "--max-new-tokens", "2", "--temperatures", "0", "--device", DEVICE)
    assert done.returncode == 2
    assert "no prompt is left" in done.stderr


def test_texts_too_short_to_study_are_refused():
    done = run_tool("study_auto.py", "reject", "--prompts", "1", "--max-new-tokens", "5")
    assert done.returncode == 2
    assert "too short" in done.stderr


@pytest.mark.parametrize("name", ["verify.py", "study_auto.py"])
@pytest.mark.parametrize("argv, word", [
    (["nothing"], "invalid choice"),
    ([], "required"),
    (["equal", "--model", "/no"], "no folder"),
    (["equal", "--prompts", "0"], "at least 1"),
    (["equal", "--device", "tpu"], "unknown device"),
    (["equal", "--model", "/no", "--synthetic", "tiny"], "not both"),
], ids=str)
def test_mistakes_of_the_tools_are_one_line(name, argv, word):
    argv = ["reject" if name == "study_auto.py" and arg == "equal" else arg for arg in argv]
    done = run_tool(name, *argv)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["skip-layers", "exit-threshold", "opt-interval", "opt-tokens"])
def test_settings_that_verify_does_not_use_are_refused(option):
    done = run_tool("verify.py", "equal", f"--{option}", "1")
    assert done.returncode == 2
    assert f"--{option} does not go with" in done.stderr


@pytest.mark.parametrize("positions", [("3",), ("20", "100000")])
def test_places_outside_the_text_are_refused(positions):
    done = run_tool("verify.py", "slice", "--positions", *positions)
    assert done.returncode == 2
    assert "the text's end" in done.stderr


# ---------------------------------------------------------------- what is to be run on a GPU

needs_no_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="there it runs for good")


@needs_no_gpu
def test_all_stages_write_their_tables(tmp_path):
    (tmp_path / "gpu-table.0.02.jsonl").write_text("of an earlier check, which is measured anew")
    done = run_tool("gpu_check.py", "all", "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.md")}
    shown = {
        "gpu-environment": "memory reads at",
        "gpu-tests": " passed",
        "gpu-equal": "0 differ from plain decoding",
        "gpu-steps": "| llama3-8b | 40 | yes |",
        "gpu-table": "residual 0.04",
        "gpu-memory": "captures",
        "gpu-large": "| llama3-70b | 20 | yes |",
    }
    for stage, text in shown.items():
        assert text in written[stage]
    assert not any("failed" in text for text in written.values())


@needs_no_gpu
def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu-memory.md").mkdir()                          # cannot be written
    done = run_tool("gpu_check.py", "memory", "environment", "--tiny", "--out", str(out))
    assert done.returncode == 1
    assert "failed: memory" in done.stderr
    assert "memory reads at" in (out / "gpu-environment.md").read_text()


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_tool("gpu_check.py", "all", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())
