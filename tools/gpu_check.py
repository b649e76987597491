"""All that is to be run on an NVIDIA GPU, in stages, each a table in results/; see docs/gpu.md.

    python tools/gpu_check.py all                    every stage, in the order below
    python tools/gpu_check.py steps memory           some of them; each ends within 10 minutes
    python tools/gpu_check.py all --tiny             small shapes, on a CPU: does it run?

    environment    the machine, and how fast its memory reads
    tests          the tests on the GPU
    equal          CLaSp against plain decoding, by the bit: three dtypes, eager and graphs
    steps          each kind of step, of 1B, 3B and 8B after 250, 1,000 and 8,000 tokens
    table          whole texts, LLaMA-3-8B's shape, at three levels of acceptance
    memory         weights, cache, graphs, the peak
    transformers   plain decoding beside transformers' compiled generate (if that is installed)
    large          LLaMA-3-70B's shape in bfloat16: 131 GiB

A stage writes what it has as it goes. One that fails says why, and the next one runs.
"""
import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from common import ROOT, run_tool  # and the path

from bench.methods import clasp
from bench.race import run
from bench.steps import draft_share, generate_by, read_rate, step_seconds, timed
from bench.target import Target, load_target, target_arguments
from generate import Parser, say
from speculative import autoregressive, full_pass, new_text

GIB = 2 ** 30
DTYPES = ("float32", "bfloat16", "float16")
RESIDUALS = (0.02, 0.03, 0.04)         # high, middle and low acceptance: see docs/gpu.md
LIMIT = 570                            # seconds of a stage


class Check:
    """A stage's options, and the file that it writes."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.tiny = args.tiny
        self.device = "cpu" if args.tiny else "cuda"
        self.deadline = time.monotonic() + LIMIT
        args.out.mkdir(parents=True, exist_ok=True)
        self.path = args.out / f"gpu-{name}.md"
        self.path.write_text(f"# {name}\n\nMade by `python tools/gpu_check.py {name}"
                             f"{' --tiny' if args.tiny else ''}`.\n\n")

    def write(self, line: str = ""):
        """A line, on the screen and in the file."""
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def head(self, *cells):
        self.row(*cells)
        self.row(*["---"] * len(cells))

    def row(self, *cells):
        self.write("| " + " | ".join(str(cell) for cell in cells) + " |")

    def target(self, shape: str, *options: str) -> Target:
        """Random weights of a shape, on the GPU, in bfloat16."""
        shape = "tiny" if self.tiny else shape
        return load_target(target_arguments(
            ["--synthetic", shape, "--dtype", "bfloat16", "--device", self.device, *options]))

    def program(self, *command: str) -> str:
        """What one of the project's programs prints at its end; raises if it fails."""
        environment = os.environ | {"CLASP_TEST_DEVICE": self.device}
        if self.tiny:
            environment["OMP_NUM_THREADS"] = "1"           # threads would only wait
        left = max(1, self.deadline - time.monotonic())
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=left)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        return done.stdout.strip()


# ---------------------------------------------------------------------------- stages

def environment(check: Check):
    check.write(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python "
                f"{platform.python_version()}, {os.cpu_count()} CPU cores")
    device = torch.device(check.device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        check.write(f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, "
                    f"{properties.multi_processor_count} multiprocessors, capability "
                    f"{properties.major}.{properties.minor}")
    check.write(f"memory reads at {read_rate(device, 9) / 1e9:.0f} GB/s")


def tests(check: Check):
    what = ["tests/test_model.py"] if check.tiny else ["tests", "tests/test_cuda_graphs.py"]
    check.write(check.program("-m", "pytest", "-q", *what).splitlines()[-1])


def equal(check: Check):
    """As verify.py has it: passes that check k drafted rows against passes of single rows."""
    for graphs in ([], ["--cuda-graphs"]):
        for dtype in DTYPES:
            few = ["--prompts", "2", "--max-new-tokens", "20"] if check.tiny else []
            verify(check, "--dtype", dtype, *graphs, *few)
        shape = "tiny" if check.tiny else "llama3-8b"
        verify(check, "--synthetic", shape, "--dtype", "bfloat16", "--prompts", "3",
               "--max-new-tokens", "60", *graphs)


def verify(check: Check, *options: str):
    output = check.program("tools/verify.py", "equal", "--device", check.device, *options)
    check.write(f"* `{' '.join(options)}`: {output.splitlines()[-1]}")


def steps(check: Check):
    rate = read_rate(torch.device(check.device), 9)
    check.write(f"Memory reads at {rate / 1e9:.0f} GB/s. Times in ms, but for plain steps' share "
                "of that rate and drafts' of their layers.\n")
    check.head("shape", "tokens", "graphs", "plain", "of the rate", "kernels", "verify", "8 rows",
               "draft", "of its share", "DP")
    for shape in ("llama3.2-1b", "llama3.2-3b", "llama3-8b"):
        for graphs in ([], ["--cuda-graphs"]):
            target = check.target(shape, *graphs)
            for tokens in (20, 40) if check.tiny else (250, 1000, 8000):
                write_steps(check, target, shape, tokens, rate)
            del target
            release()


@torch.inference_mode()
def write_steps(check: Check, target: Target, shape: str, tokens: int, rate: float):
    prompt = list(range(1, tokens + 1))
    seconds = step_seconds(target, prompt, 3 if check.tiny else 9)
    plain, verify, eight, draft, dp = (
        f"{1e3 * seconds[name]:.2f} ({seconds[name] / seconds['plain step']:.2f})"
        for name in ("plain step", "verify pass", "8 rows", "draft token", "DP"))
    bytes_read = target.bytes_read + cache_bytes(target, tokens)
    share = bytes_read / seconds["plain step"] / rate
    check.row(shape, tokens, "yes" if target.has_graphs else "no", plain, f"{share:.2f}",
              kernels(target, prompt), verify, eight, draft, f"{draft_share(target, seconds):.2f}",
              dp)


def cache_bytes(target: Target, tokens: int) -> int:
    """Keys and values that a token reads."""
    c = target.model.config
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * tokens
    return numbers * target.model.embed.weight.element_size()


def kernels(target: Target, prompt: list[int]) -> int:
    """Of a plain step: a GPU's kernels; on a CPU, operators."""
    text, _ = new_text(target.model, prompt, 4)
    step = partial(full_pass, target.model, text.cache, prompt[-1:], None)
    step()
    text.roll_back()
    on_gpu = target.model.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        step()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in profile.events())


def table(check: Check):
    """Table 1 with random weights; ``--residual`` sets the acceptance."""
    shape = "tiny" if check.tiny else "llama3-8b"
    count = "8" if check.tiny else "128"
    for graphs in ([], ["--cuda-graphs"]):
        for residual in RESIDUALS:
            out = check.path.with_suffix(f".{residual}{'.graphs' if graphs else ''}.jsonl")
            out.unlink(missing_ok=True)                    # bench would go on with it
            check.write(check.program(
                "-m", "bench", "--synthetic", shape, "--dtype", "bfloat16", "--device",
                check.device, "--residual", str(residual), "--skip-layers", layers_to_skip(check),
                "--draft-length", "7", "--opt-interval", "64", "--methods", "clasp,auto",
                "--temperatures", "0", "--repeat", "1", "--limit", "1", "--max-new-tokens", count,
                "--out", str(out), *graphs))


def layers_to_skip(check: Check) -> str:
    return "4" if check.tiny else "14"


@torch.inference_mode()
def memory(check: Check):
    check.head("", "GiB")
    target = check.target("llama3-8b", "--cuda-graphs")
    parts = {"weights": used(check)}
    prompt = list(range(1, 60)) if check.tiny else list(range(1, 513))
    for _ in range(2):
        stats, _ = run(target, clasp(target), prompt, 16 if check.tiny else 256)
    parts["cache of this text"] = cache_bytes(target, len(prompt) + stats.new_tokens)
    parts["now: weights, caches, what graphs write to"] = used(check)
    parts["peak"] = peak(check)
    if check.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        parts["the whole device, with CUDA and the graphs themselves"] = total - free
    for name, size in parts.items():
        check.row(name, f"{size / GIB:.2f}")
    check.write(f"\n{target.model.captures} captures, tau {stats.tau:.2f}, "
                f"{stats.tokens_per_second:.1f} tokens/s")


def transformers(check: Check):
    """Of the same shape with random weights, in bfloat16, 128 tokens after 32."""
    if find_spec("transformers") is None:
        check.write("left out: transformers is not installed")
        return
    target = check.target("llama3.2-1b", "--cuda-graphs")
    prompt = list(range(1, 33))
    count = 8 if check.tiny else 128
    theirs = generate_by(target.model.config, target.model.device, torch.bfloat16)
    work = {
        "ours": lambda: list(autoregressive(target.model, prompt, count)),
        "theirs": lambda: theirs(prompt, count),
    }
    found = timed(target.model, work, 3)
    ratio = statistics.median(found["theirs"]) / statistics.median(found["ours"])
    check.write(f"plain decoding is {ratio:.2f}x as fast as transformers' generate with a static "
                f"cache, {count} tokens after {len(prompt)}")


@torch.inference_mode()
def large(check: Check):
    if check.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < 135 * GIB:
            check.write(f"left out: needs 135 GiB free, and there are {free / GIB:.0f}")
            return
    rate = read_rate(torch.device(check.device), 3)
    target = check.target("llama3-70b", "--cuda-graphs")
    check.head("shape", "tokens", "graphs", "plain", "of the rate", "kernels", "verify", "8 rows",
               "draft", "of its share", "DP")
    write_steps(check, target, "llama3-70b", 20 if check.tiny else 250, rate)
    check.write(f"\npeak {peak(check) / GIB:.1f} GiB")


# ---------------------------------------------------------------------------- memory of a device

def used(check: Check) -> int:
    return torch.cuda.memory_allocated() if check.device == "cuda" else 0


def peak(check: Check) -> int:
    return torch.cuda.max_memory_allocated() if check.device == "cuda" else 0


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------- which

STAGES: dict[str, Callable[[Check], None]] = {
    stage.__name__: stage
    for stage in (environment, tests, equal, steps, table, memory, transformers, large)
}


def run_stage(check: Check, stage: Callable[[Check], None]):
    try:
        stage(check)
    except Exception:
        check.write("\nfailed")
        raise


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=["all", *STAGES])
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="default: results/")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here (--tiny runs on a CPU)")
    if args.tiny:
        torch.set_num_threads(1)
    failed = []
    for name in STAGES if "all" in args.stages else args.stages:
        start = time.monotonic()
        say(f"{name} ...")
        try:
            run_stage(Check(name, args), STAGES[name])
        except Exception as error:                         # a stage's own; the others go on
            failed.append(name)
            say(f"failed: {type(error).__name__}: {error}")
        release()
        say(f"{name}: {time.monotonic() - start:.0f} s")
    if failed:
        parser.exit(1, f"gpu_check.py: failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    sys.exit(run_tool("gpu_check.py", main))
