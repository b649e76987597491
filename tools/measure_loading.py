"""How much memory and time loading takes: random weights of a shape are written, loaded, deleted.

    python tools/measure_loading.py llama3.2-1b
    python tools/measure_loading.py llama3-8b --dtype bfloat16

Memory: the most that the process held above what it held before, beside the weights as they are
kept. Time: beside that of reading the files and of packing the matrices by themselves; then the
seconds to a first token. The files are read from memory, where writing left them,
if it is enough. Needs as much disk as the model has in 16 bits.
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

from bench.target import SHAPES
from checkpoint import load_model, parts, side_by_side, weight_files
from extras.packed import bytes_read, choose_form, choose_threads, pack
from generate import Parser
from model import Config, Llama
from speculative import autoregressive

SHARD = 2 ** 31               # bytes of a file, about
PROMPT = list(range(32))


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                        help="that it is computed in; the files have bfloat16")
    parser.add_argument("--folder", metavar="DIR", help="where to write; default: as Python says")
    return parser.parse_args()


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


def loaded(folder: Path, dtype: torch.dtype) -> dict:
    """What it took. To be called in a process of its own."""
    device = torch.device("cpu")
    torch.ones(1) @ torch.ones(1)                      # so that libraries are there
    before = memory("VmRSS")
    start = time.perf_counter()
    model = pack(load_model(folder, device, dtype, choose_form(device, dtype)))
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


def packing(config: Config, dtype: torch.dtype) -> float:
    """Seconds to pack the matrices of one layer, as often as there are layers, and the head."""
    form = choose_form(torch.device("cpu"), dtype)
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


def run():
    args = arguments()
    config = SHAPES[args.shape]
    dtype = getattr(torch, args.dtype)
    require(sys.platform == "linux", "memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        in_a_process(write_model, folder, config)
        read = reading(folder)
        packed = in_a_process(packing, config, dtype)
        found = in_a_process(loaded, folder, dtype)
    gib = 2 ** 30
    print(f"{args.shape}, saved in bfloat16, computed in {args.dtype}, "
          f"{torch.get_num_threads()} threads")
    print(f"memory: {found['peak'] / gib:.2f} GiB at most while loading, "
          f"{found['peak with a token'] / gib:.2f} with a first token; kept: "
          f"{found['kept'] / gib:.2f} (ratio {found['peak'] / found['kept']:.2f})")
    print(f"time: {found['seconds']:.1f} s; reading alone {read:.1f}, packing alone {packed:.1f} "
          f"(ratio {found['seconds'] / (read + packed):.2f}); "
          f"to a first token {found['first token']:.1f} s")


if __name__ == "__main__":
    sys.exit(run_tool("measure_loading.py", run))
