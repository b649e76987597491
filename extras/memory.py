"""Will it fit? The memory that decoding takes, held against what the device has, before loading.

    weights   each matrix in the form that it is kept in, the embedding in the model's dtype
    cache     keys and values of all tokens
    scratch   the matrices that are being packed while loading; or, if that is more, the states of
              as many of the prompt's tokens as go through the model at once

``python tools/memory.py load`` measures what is calculated here.
"""
from pathlib import Path
from typing import NamedTuple

import torch

from extras.packed import has_arithmetic, is_x86
from extras.shares import Share, can_share
from model import BLOCK, Config, whole_blocks
from speculative import OPT_TOKENS, PREFILL_ROWS, require

LOADERS = 4                   # matrices that are in the making at once, at most: checkpoint.py's
ROWS = 16                     # of logits: what a pass of the whole model checks, about
ALTERNATIVES = 8              # numbers of devices that are tried
FILLED = 512                  # FBGEMM fills a matrix's columns up to a multiple of it
GB = 10 ** 9
CONTAINER = Path("/sys/fs/cgroup")                              # where Linux tells its limits


class Need(NamedTuple):
    """Bytes."""
    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        return sum(self)


class Plan(NamedTuple):
    """All that memory depends on."""
    config: Config
    device: torch.device
    dtype: torch.dtype
    tokens: int               # prompt and new ones
    weights: str | None = None           # "int8"; None: as packed.py keeps them
    processes: int = 1
    saved_bytes: int = 2      # of a weight in the files

    @property
    def share(self) -> Config:
        """What the last process has of the model; none has more."""
        return Share(self.processes - 1, self.processes).config(self.config)

    @property
    def weight_bytes(self) -> int:
        """Of a number in a matrix, as it is kept."""
        if self.weights == "int8":
            return 1
        if is_x86(self.device):                          # packed, in as many bits as are saved
            return min(self.saved_bytes, self.dtype.itemsize)
        return self.dtype.itemsize

    @property
    def is_widened(self) -> bool:
        """Kept by FBGEMM: 16-bit weights for a CPU that computes in float32?"""
        is_packed = self.weights is None and is_x86(self.device)
        return is_packed and self.weight_bytes == 2 and not has_arithmetic(self.dtype)

    @property
    def slot_bytes(self) -> int:
        """Of a token's keys and values."""
        c = self.share
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize


def needed(plan: Plan) -> Need:
    """Of each process."""
    return Need(weights_need(plan), cache_need(plan), max(loading_need(plan), prefill_need(plan)))


def weights_need(plan: Plan) -> int:
    c = plan.share
    embedding = c.vocab_size * c.hidden_size
    matrices = c.num_hidden_layers * sum(kept(plan, *shape) for shape in c.layer_shapes)
    if not c.tie_word_embeddings or plan.weights or is_x86(plan.device):
        matrices += kept(plan, c.vocab_size, c.hidden_size)          # the head
    return embedding * plan.dtype.itemsize + matrices * plan.weight_bytes


def kept(plan: Plan, rows: int, columns: int) -> int:
    """Numbers that a matrix is kept as."""
    if plan.is_widened:
        columns = -(-columns // FILLED) * FILLED
    return rows * columns


def cache_need(plan: Plan) -> int:
    return plan.slot_bytes * (whole_blocks(plan.tokens) + scratch_slots(plan.config))


def scratch_slots(config: Config) -> int:
    """For the DP's candidates by the default settings: of T tokens, M = half of the layers each."""
    return OPT_TOKENS * -(-config.num_hidden_layers // 2)


def loading_need(plan: Plan) -> int:
    """Of each matrix that is in the making, two copies beside what it will be kept as.

    FBGEMM takes float32.
    """
    if plan.weights is None and not is_x86(plan.device):
        return 0                                                     # they are kept as they come
    c = plan.share
    largest = 2 * c.intermediate_size * c.hidden_size                # gate and up
    loaders = min(LOADERS, torch.get_num_threads())
    taken = 4 if plan.is_widened else plan.dtype.itemsize
    return loaders * largest * (plan.dtype.itemsize + taken)


def prefill_need(plan: Plan) -> int:
    """The states between all layers, kept and stacked; a layer's MLP; masks; and logits.

    A mask, and the same repeated for the heads of a group, is held until the next is made.
    """
    c = plan.share
    rows = min(PREFILL_ROWS, plan.tokens)
    states = 2 * (c.num_hidden_layers + 1) * c.hidden_size
    mlp = 4 * c.intermediate_size
    groups = c.num_attention_heads // c.num_key_value_heads
    masks = 2 * (1 + groups) * whole_blocks(plan.tokens)
    return rows * (states + mlp + masks) * plan.dtype.itemsize + 4 * ROWS * c.vocab_size


# ---------------------------------------------------------------------------- what there is

def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take on a device; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [found for found in (available_memory(), limit_of_container()) if found is not None]
    return min(known, default=None)


def available_memory() -> int | None:
    """Of the machine, as Linux says; it counts what it would give up of its copies of files."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    lines = dict(line.split(":") for line in path.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def limit_of_container() -> int | None:
    """What a container (cgroup v2) may still take, its copies of files not counted."""
    try:
        limit = int((CONTAINER / "memory.max").read_text())          # "max": ValueError
        used = int((CONTAINER / "memory.current").read_text())
        lines = (CONTAINER / "memory.stat").read_text().splitlines()
        parts = dict(line.split() for line in lines)
        files = int(parts["active_file"]) + int(parts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None
    return limit - used + files


# ---------------------------------------------------------------------------- the verdict

def require_fits(plan: Plan, prompt: int, here: int = 1):
    """Refuse, in one line that says what would fit, what the device has no memory for.

    prompt: how many of the tokens are given. here: processes that share the device.
    """
    free = free_memory(plan.device)
    if free is None or needed(plan).total * here <= free:
        return
    free //= here
    need = needed(plan)
    others = alternatives(plan, free, prompt)
    advice = f"it would fit with {'; or '.join(others)}" if others else "nothing here makes it fit"
    require(False, f"not enough memory: {gb(need.total)} are needed (weights {gb(need.weights)}, "
                   f"cache {gb(need.cache)}, scratch {gb(need.scratch)}) and {plan.device} has "
                   f"{gb(free)} free; {advice}")


def alternatives(plan: Plan, free: int, prompt: int) -> list[str]:
    """What would fit."""
    found = []
    need = needed(plan)
    if plan.weights is None:
        smaller = plan._replace(weights="int8", dtype=torch.bfloat16)
        dtype = "" if plan.dtype == torch.bfloat16 else " --dtype bfloat16"
        if needed(smaller).total <= free:
            found.append(f"--weights int8{dtype} ({gb(needed(smaller).total)})")
    if plan.device.type == "cuda":
        for count in range(plan.processes + 1, ALTERNATIVES + 1):
            each = plan._replace(processes=count)
            if can_share(plan.config, count) and needed(each).total <= free:
                found.append(f"torchrun --nproc-per-node {count} ({gb(needed(each).total)} on each "
                             "of as many devices)")
                break
    left = free - need.weights - need.scratch
    slots = left // plan.slot_bytes - scratch_slots(plan.config)
    tokens = slots // BLOCK * BLOCK
    if tokens > prompt:
        found.append(f"--max-new-tokens {tokens - prompt}")
    return found


def is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size < GB else f"{size / GB:.1f} GB"
