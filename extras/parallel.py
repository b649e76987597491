"""One model over several processes (ranks), each with a GPU of its own, or cores of a CPU.

    torchrun --nproc-per-node 2 generate.py --model ...

Tensor parallelism: every rank has, of every layer, some of the heads and some of the MLP's width
(shares.py). All ranks run the same program on the same text, and hold the same hidden state x:

    x + sum over ranks of  o(attention of its heads of x)
    x + sum over ranks of  down(silu(gate) * up of its columns of x)

Two sums a layer, and none where it is skipped; embedding, norms and head are whole on every rank.
The rest of the project sees a ``Llama`` of fewer heads whose o and down add up (``Summed``).

What makes all ranks do the same:

* Sums are added in the order of the ranks, in float32. So every rank has the same bits, and a row's
  do not depend on its place, as those of an all-reduce do: decoding stays exact (exact.py).
* Random numbers come from the same seed, and logits are the same.
* What depends on time goes by one clock, that of rank 0 (``shared_clock``), and what depends on a
  rank's share of the weights by the sum of all shares (``over_ranks``).
* Rank 0 alone reads what is typed, and sends it (``SharedInput``). It alone prints.
"""
import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Llama

PATIENCE = 2.0                # seconds in which rank 0 may say what went wrong, before others do


class Place(NamedTuple):
    """Which process this is, as torchrun says it in the environment."""
    rank: int
    count: int
    local_rank: int           # on this machine
    local_count: int

    @property
    def is_alone(self) -> bool:
        return self.count == 1


def my_place() -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "MASTER_ADDR" in os.environ and all(os.environ.get(n, "").isdecimal() for n in names):
        return Place(*(int(os.environ[name]) for name in names))
    return Place(0, 1, 0, 1)


# ---------------------------------------------------------------------------- the model

def join_layers(model: Llama, add: Callable[[Tensor], Tensor]):
    """A rank's share of a model -> a part of the whole. add: added_in_order or all_reduced."""
    for layer in model.layers:
        layer.o = Summed(layer.o, add)
        layer.down = Summed(layer.down, add)
    model.clock = shared_clock(model.device)


class Summed(nn.Module):
    """A linear layer of whose inputs each rank has some: what comes out is added up."""

    def __init__(self, linear: nn.Module, add: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear = linear
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.linear(x))


def added_in_order(x: Tensor) -> Tensor:
    """The sum of all ranks' x, in float32, from the first rank to the last; then in x's dtype."""
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    with peers():
        dist.all_gather(every, x)
    total = every[0].float()
    for other in every[1:]:
        total = total + other
    return total.to(x.dtype)


def all_reduced(x: Tensor) -> Tensor:
    """The same sum in the library's order: faster on many ranks, but from three on not exact."""
    total = x.float()
    with peers():
        dist.all_reduce(total)
    return total.to(x.dtype)


# ---------------------------------------------------------------------------- one clock, one input

def shared_clock(device: torch.device) -> Callable[[], float]:
    """A clock for all ranks: what rank 0's shows, once each rank's device is done."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return sent(torch.tensor(time.perf_counter(), dtype=torch.float64)).item()

    return now


def sent(x: Tensor) -> Tensor:
    """Rank 0's tensor, on all ranks; each gives one of its shape, on the CPU."""
    with peers():
        dist.broadcast(x, 0)
    return x


def all_agree(yes: bool) -> bool:
    """Do all ranks say yes?"""
    return over_ranks(not yes) == 0


def over_ranks(number: float) -> float:
    """The sum of all ranks' numbers. A process that is alone is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    return added_in_order(torch.tensor(float(number))).item()


class SharedInput(io.RawIOBase):
    """Standard input of all ranks: rank 0 reads, and sends what it has read."""

    def __init__(self, source: io.RawIOBase | None):
        self.source = source                             # None: of another rank than 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.source.readinto(buffer) if self.source else 0
        count = int(sent(torch.tensor(count or 0)))
        if count:
            data = torch.frombuffer(buffer, dtype=torch.uint8)[:count]
            data.copy_(sent(data.clone()))
        return count


# ---------------------------------------------------------------------------- the processes

class LostPeerError(SystemExit):
    """Another process has ended; code: what the library says. For ``as_one_of_several``."""


@contextmanager
def peers():
    """Around all that ranks do together, which fails when one has ended."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(str(error).partition(". ")[0]) from None


def as_one_of_several(main: Callable[[], int]) -> int:
    """Run a program as one of several processes. If one fails, all end, with one line by it."""
    place = my_place()
    store, _, _ = next(dist.rendezvous("env://"))
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store,
                            rank=place.rank, world_size=place.count, timeout=timedelta(days=365))
    source = sys.stdin.buffer.raw if place.rank == 0 and sys.stdin else None
    sys.stdin = io.TextIOWrapper(io.BufferedReader(SharedInput(source)), "utf-8", "surrogateescape")
    stderr = sys.stderr
    if place.rank > 0:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = io.StringIO()
    try:
        status = main()
    except LostPeerError as error:                       # which has spoken, if it could
        status = 1
        if claims(store):
            print(f"\ngenerate.py: another process has ended ({error.code})", file=stderr)
    except Exception:                                    # a mistake in the code
        sys.stderr = stderr
        raise
    else:
        if status == 0:
            dist.destroy_process_group()
            return 0
        if place.rank > 0:
            time.sleep(PATIENCE)                         # if all have failed, rank 0 has spoken
        if claims(store) and place.rank > 0:
            print(sys.stderr.getvalue().strip().rpartition("\n")[2], file=stderr)
    sys.stdout.flush()
    os._exit(status)                                     # whatever waits for the others


def claims(store) -> bool:
    """Is this the first process to say what went wrong?"""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:                                 # the store has ended too
        return True
