"""How much memory models need, by calculation and measured.

    python tools/memory.py table                     LLaMA 3 of all sizes, on several devices
    python tools/memory.py load llama3.2-1b          measured on the CPU
    python tools/memory.py load llama3-8b --dtype bfloat16
    python tools/memory.py load llama3-8b --weights int8

``load`` writes random weights, loads them, and deletes them. It prints the most that the process
held above what it held before, beside the weights as they are kept; and the time, beside that of
reading the files and of packing the matrices by themselves; then the seconds to a first token. The
files are read from memory, where writing left them, if it is enough. Needs as much disk as the
model has in 16 bits.
"""
import json
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from common import require, run_tool
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bench.target import SHAPES, synthetic
from checkpoint import load_model, parts, side_by_side, weight_files
from extras.memory import GB, Plan, gb, needed
from extras.packed import bytes_read, choose_threads, pack
from generate import Parser, choose_device, form_of_weights
from model import Config, Llama
from speculative import autoregressive

SHARD = 2 ** 31               # bytes of a file, about
PROMPT = list(range(32))
CPU = torch.device("cpu")


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "load"])
    parser.add_argument("shape", choices=list(SHAPES), nargs="?", default="llama3.2-1b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="that it is computed in; the files have bfloat16")
    parser.add_argument("--weights", choices=["int8"])
    parser.add_argument("--folder", metavar="DIR", help="where to write; default: as Python says")
    return parser.parse_args()


# ---------------------------------------------------------------------------- by calculation

TABLE_TOKENS = 8192
TABLE_DEVICE = 80 * GB


def table():
    """For an NVIDIA GPU, where packing keeps nothing in another form."""
    print(f"| | weights | each of 2 | each of 8 | cache of {TABLE_TOKENS:,} tokens | "
          f"devices of {gb(TABLE_DEVICE)} |")
    print("|---|---|---|---|---|---|")
    for name in ("llama3-8b", "llama3-70b", "llama3.1-405b"):
        for weights in (None, "int8"):
            plan = Plan(SHAPES[name], torch.device("cuda"), torch.bfloat16, TABLE_TOKENS, weights)
            needs = {count: needed(plan._replace(processes=count)) for count in (1, 2, 4, 8)}
            enough = [count for count, need in needs.items() if need.total <= TABLE_DEVICE]
            print(f"| {name}, {weights or 'bfloat16'} | {gb(needs[1].weights)} | "
                  f"{gb(needs[2].total)} | {gb(needs[8].total)} | {gb(needs[1].cache)} | "
                  f"{enough[0] if enough else 'more than 8'} |")


# ---------------------------------------------------------------------------- the files

def write_model(folder: Path, config: Config):
    """config.json and random weights in bfloat16, in shards."""
    fields = {"model_type": "llama", **asdict(config)}
    (folder / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        model = Llama(config)
    shard = {}
    where = {}
    written = 0
    for part in tqdm(parts(model), "writing", leave=False, disable=None):
        width = model.get_submodule(part.module).weight.shape[1:]
        for name, rows in zip(part.names, part.rows):
            shard[name] = random_weight(rows, *width)
            where[name] = f"model-{written}.safetensors"
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            save_file(shard, folder / f"model-{written}.safetensors")
            shard = {}
            written += 1
    save_file(shard, folder / f"model-{written}.safetensors")
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def random_weight(rows: int, *width: int) -> Tensor:
    if not width:
        return torch.ones(rows, dtype=torch.bfloat16)
    few = min(rows, 1024)                              # rows, repeated: making numbers is slow
    block = torch.randn(few, *width) * width[0] ** -0.5
    return block.bfloat16().repeat(-(-rows // few), 1)[:rows].contiguous()


# ---------------------------------------------------------------------------- what is measured

def memory(what: str) -> int:
    """Of this process, in bytes: VmRSS now, VmHWM at its most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", status)[1])


def loaded(folder: Path, dtype: torch.dtype, weights: str | None) -> dict:
    """What it took. To be called in a process of its own."""
    warm_up(dtype, weights)
    before = memory("VmRSS")
    start = time.perf_counter()
    model = pack(load_model(folder, CPU, dtype, form_of_weights(weights, CPU, dtype)))
    seconds = time.perf_counter() - start
    choose_threads(model)
    peak = memory("VmHWM") - before
    next(autoregressive(model, PROMPT, 1))
    first_token = time.perf_counter() - start
    return {
        "seconds": seconds,
        "first token": first_token,
        "peak": peak,
        "peak with a token": memory("VmHWM") - before,
        "kept": kept(model),
    }


def warm_up(dtype: torch.dtype, weights: str | None):
    """So that the libraries' own memory is not counted."""
    model = synthetic(SHAPES["tiny"], 1, CPU, dtype)
    form = form_of_weights(weights, CPU, dtype)
    for layer in model.layers:
        layer.down = form(layer.down)
    next(autoregressive(pack(model), PROMPT, 1))


def kept(model: Llama) -> int:
    """Bytes of all weights."""
    embedding = model.embed.weight.nbytes if model.head is not None else 0
    return bytes_read(model) + embedding


def reading(folder: Path) -> float:
    """Seconds to read the files into memory, one after the other."""
    start = time.perf_counter()
    for path in weight_files(folder):
        path.read_bytes()
    return time.perf_counter() - start


def packing(config: Config, dtype: torch.dtype, weights: str | None) -> float:
    """Seconds to pack the matrices of one layer, as often as there are layers, and the head."""
    form = form_of_weights(weights, CPU, dtype)
    with torch.device("meta"):
        model = Llama(config)
    modules = [model.embed, *model.layers[0].children()]
    head, *layer = [linear_of(module, dtype) for module in modules if module.weight.ndim == 2]
    start = time.perf_counter()
    side_by_side(form, [head, *layer * config.num_hidden_layers])
    return time.perf_counter() - start


def linear_of(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Random weights of a module's shape."""
    linear = nn.Linear(1, 1, bias=False)
    weight = random_weight(*module.weight.shape).to(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def in_a_process(work, *args):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(work, *args).result()


def load(args):
    config = SHAPES[args.shape]
    _, dtype = choose_device("cpu", args.dtype, args.weights)
    require(sys.platform == "linux", "memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        in_a_process(write_model, folder, config)
        read = reading(folder)
        packed = in_a_process(packing, config, dtype, args.weights)
        found = in_a_process(loaded, folder, dtype, args.weights)
    expected = needed(Plan(config, CPU, dtype, len(PROMPT) + 1, args.weights))
    print(f"{args.shape}, saved in bfloat16, computed in {dtype}, weights "
          f"{args.weights or 'in 16 bits'}, {torch.get_num_threads()} threads")
    print(f"memory: {gb(found['peak'])} at most while loading, {gb(found['peak with a token'])} "
          f"with a first token, {gb(expected.total)} calculated; kept: {gb(found['kept'])} "
          f"(ratio {found['peak'] / found['kept']:.2f})")
    print(f"time: {found['seconds']:.1f} s; reading alone {read:.1f}, packing alone {packed:.1f} "
          f"(ratio {found['seconds'] / (read + packed):.2f}); "
          f"to a first token {found['first token']:.1f} s")


def run():
    args = arguments()
    if args.what == "table":
        table()
    else:
        load(args)


if __name__ == "__main__":
    sys.exit(run_tool("memory.py", run))
