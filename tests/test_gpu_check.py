"""tools/gpu_check.py runs to its end on a CPU, with small shapes; see docs/gpu.md."""
import subprocess
import sys

import pytest
from conftest import DEVICE, ROOT

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="there it runs for good")


def gpu_check(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.thorough
def test_all_stages_write_their_tables(tmp_path):
    done = gpu_check("all", "--tiny", "--out", str(tmp_path))
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


def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu-memory.md").mkdir()                          # cannot be written
    done = gpu_check("memory", "environment", "--tiny", "--out", str(out))
    assert done.returncode == 1
    assert "failed: memory" in done.stderr
    assert "memory reads at" in (out / "gpu-environment.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = gpu_check("all", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())
