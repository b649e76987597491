"""CUDA graphs: decode without launching every kernel from Python.

A row through a decoder layer is some twenty kernels, which a GPU may run faster than Python asks
for them. A CUDA graph is a recording of kernels, asked for as one. ``GraphedLlama`` wraps a
``Llama`` and stands in for it in speculative.py:

* One graph for each layer, so that *skipping a layer is not replaying its graph*. All layers of a
  pass update one hidden state in place; one graph before them makes it from the tokens, one behind
  them makes logits of it.
* A recording has fixed shapes and addresses. So there are graphs for each number of rows and of
  slots, slots come in blocks, and what differs from pass to pass lies in tensors: tokens, slots,
  positions, and the mask made of them.
* A row sees the slots before its position, and its own. For a text's rows, each at the slot of its
  position, that is the causal mask; for the DP's candidates, all at one position, each in a scratch
  slot, it is theirs (§3.6).

On a CPU, for tests, nothing is recorded, and the same work on the same tensors is called. Not yet
run on a GPU.

Read ``GraphedLlama.forward`` first, then ``begin``, ``Pass`` and ``capture``.
"""
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from extras.attention import attend_by, choose
from model import BLOCK, KVCache, Llama, storable, whole_blocks

FEW = 16                      # rows; passes of more, the prompt's, run without graphs
MOST_PASSES = 64              # kinds kept per cache: some 10 KB for each kernel of each layer


class Rows:
    """Tensors of all passes of so many rows, always at the same place.

    What one pass leaves here, the next overwrites.
    """

    def __init__(self, model: Llama, rows: int):
        c = model.config
        weight = model.embed.weight
        self.rows = rows
        self.count = torch.arange(rows, device=weight.device)
        self.tokens = self.count.new_zeros(1, rows)
        self.slot = self.count.clone()
        self.position = self.count.clone()
        self.cos = weight.new_zeros(rows, c.head_dim)
        self.sin = weight.new_zeros(rows, c.head_dim)
        self.all = weight.new_zeros(c.num_hidden_layers + 2, rows, c.hidden_size)
        self.x, *self.states = self.all.split(1)         # the state as it is now, and h_0 .. h_L
        self.logits = None                               # made when first needed, as its graph is
        self.head = None


@dataclass(eq=False)
class CacheMemory:
    """The tensors of a cache, and the passes that know their addresses."""
    slots: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor
    passes: dict = field(default_factory=dict)           # by (rows, slots)

    @classmethod
    def of(cls, cache: KVCache) -> "CacheMemory":
        return cls(cache.slots, cache.keys, cache.values, cache.cos, cache.sin)

    @property
    def capacity(self) -> int:
        return self.slots.shape[-2]

    def lend(self, cache: KVCache):
        """Move a cache in here with all that it holds: who set its length back may go on later."""
        self.slots.zero_()
        self.slots[..., :cache.slots.shape[-2], :] = cache.slots
        cache.slots, cache.keys, cache.values = self.slots, self.keys, self.values
        cache.cos, cache.sin = self.cos, self.sin


class Pass:
    """The work of a pass of so many rows over so many slots, and a graph of each of its parts."""

    def __init__(self, model: Llama, memory: CacheMemory, at: Rows, slots: int):
        self.model = model
        self.memory = memory
        self.at = at
        self.graphs = {}                                 # by layer; None: what comes before them
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.mask = at.cos.new_zeros(self.groups * at.rows, slots)

    def start(self):
        """From tokens, slots and positions to h_0, angles and mask."""
        at = self.at
        at.all[:2] = self.model.embed(at.tokens)         # x and h_0
        at.cos.copy_(self.memory.cos.index_select(0, at.position))
        at.sin.copy_(self.memory.sin.index_select(0, at.position))
        slot = torch.arange(self.mask.shape[1], device=self.mask.device)
        before = slot < at.position[:, None]
        own = slot == at.slot[:, None]
        seen = (before | own).repeat(self.groups, 1)
        self.mask.fill_(-torch.inf).masked_fill_(seen, 0)

    def layer(self, i: int):
        at = self.at
        store = partial(self.store, i)
        out = self.model.layers[i](at.x, at.cos, at.sin, self.mask, store)
        at.all[:i + 3:i + 2] = out       # x and h_(i+1), first and last of the slice: one kernel

    def store(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.memory.keys[i]
        values = self.memory.values[i]
        keys.index_copy_(2, self.at.slot, storable(k))
        values.index_copy_(2, self.at.slot, storable(v))
        slots = self.mask.shape[1]
        return keys[:, :, :slots], values[:, :, :slots]


class GraphedLlama:
    """A ``Llama`` whose passes of a few rows over a KVCache are replayed from CUDA graphs.

    Graphs are captured when first needed, which takes as long as some passes do: time a second
    text, not the first. Hidden states and logits that come from a graph hold until the next pass of
    as many rows. The layers of the wrapped model take the form of attention for its device from now
    on. A new cache gets the memory, and so the graphs, of one that is gone and was as large.
    """

    def __init__(self, model: Llama):
        self.model = model
        self.config = model.config
        self.embed = model.embed
        self.layers = model.layers
        self.head = model.head
        self.device = model.device
        self.clock = model.clock
        self.rows = {}                                   # by number: Rows
        self.captures = 0
        self.in_use = weakref.WeakKeyDictionary()        # by cache: CacheMemory
        self.empty = []                                  # that of caches which are gone
        attend_by(model, choose(model))
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.pool = torch.cuda.graph_pool_handle()

    # ------------------------------------------------------------------ what a Llama does

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        skip: Collection[int] = (),
        slots: int | None = None,
    ) -> list[Tensor]:
        """As ``Llama.forward``."""
        rows = tokens.shape[1]
        if cache is None or (rows > FEW and slots is None):
            return self.model(tokens, cache, skip, slots)
        current = self.begin(cache, rows, slots or cache.length + rows, tokens)
        cache.length += rows
        states = current.at.states[:1]
        for i in range(len(self.layers)):
            if i in skip:
                states.append(states[-1])
            else:
                self.play(current, i)
                states.append(current.at.states[i + 1])
        states[-1] = current.at.x                        # the same numbers; ``logits`` knows it
        return states

    __call__ = forward

    @torch.inference_mode()
    def logits(self, state: Tensor) -> Tensor:
        """As ``Llama.logits``; by a graph if ``state`` is the last of a pass's graphs."""
        at = next((at for at in self.rows.values() if at.x is state), None)
        if at is None:
            return self.model.logits(state)
        if at.head is None:
            at.logits = state.new_zeros(1, at.rows, self.config.vocab_size)
            at.head = self.capture(lambda: at.logits.copy_(self.model.logits(at.x)), at)
        at.head()
        return at.logits

    @torch.inference_mode()
    def candidate_layer(
        self, cache: KVCache, count: int, tokens: int = 1
    ) -> Callable[[int, Tensor], Tensor]:
        """As ``Llama.candidate_layer``.

        Fewer candidates than ``count`` have rows of zeros behind them, which cannot overflow.
        """
        n = cache.length
        position = torch.arange(n - tokens, n, device=self.device).repeat(max(count, 1))
        current = self.begin(cache, len(position), n + len(position), position=position)

        @torch.inference_mode()
        def layer(i: int, candidates: Tensor) -> Tensor:
            x = current.at.x[0]
            given = candidates.flatten(end_dim=-2)
            m = len(given)
            x[:m] = given
            x[m:] = 0
            self.play(current, i)
            return x[:m].clone().view_as(candidates)

        return layer

    # ------------------------------------------------------------------ passes

    def begin(
        self,
        cache: KVCache,
        rows: int,
        end: int,
        tokens: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Pass:
        """A pass whose rows take the slots from cache.length on, ready for its first layer.

        end: it looks over the slots before it, and some after it: there are four lengths from one
        power of two to the next, so that a long text asks for few kinds of passes.
        position: (rows,), of each row; None, each at its slot.
        """
        memory = self.memory_of(cache)
        blocks = whole_blocks(end) // BLOCK
        step = BLOCK * max(1, 2 ** (blocks - 1).bit_length() // 8)
        slots = min(-(-end // step) * step, memory.capacity)
        current = self.pass_of(memory, rows, slots)
        at = current.at
        torch.add(at.count, cache.length, out=at.slot)
        if tokens is not None:
            at.tokens.copy_(tokens)
        if position is None:
            at.position.copy_(at.slot)
        else:
            at.position.copy_(position)
        self.play(current)
        return current

    def pass_of(self, memory: CacheMemory, rows: int, slots: int) -> Pass:
        if rows not in self.rows:
            self.rows[rows] = Rows(self.model, rows)
        if (rows, slots) not in memory.passes:
            if len(memory.passes) == MOST_PASSES:
                self.forget()
            memory.passes[rows, slots] = Pass(self.model, memory, self.rows[rows], slots)
        return memory.passes[rows, slots]

    def memory_of(self, cache: KVCache) -> CacheMemory:
        """A cache's memory. A new cache moves in where an old one is gone."""
        if cache not in self.in_use:
            needed = cache.slots.shape[-2]
            fits = [memory for memory in self.empty if memory.capacity >= needed]
            if fits:
                memory = fits[0]
                self.empty.remove(memory)
                memory.lend(cache)
            else:
                if self.empty:                           # those that are too small are not kept
                    self.forget()
                    self.empty.clear()
                memory = CacheMemory.of(cache)
            self.in_use[cache] = memory
            weakref.finalize(cache, self.empty.append, memory).atexit = False
        return self.in_use[cache]

    # ------------------------------------------------------------------ graphs

    def play(self, current: Pass, part: int | None = None):
        """Layer ``part`` of a pass, or what comes before the layers."""
        if part not in current.graphs:
            work = current.start if part is None else partial(current.layer, part)
            current.graphs[part] = self.capture(work, current.at)
        current.graphs[part]()

    def capture(self, work: Callable[[], object], at: Rows) -> Callable[[], object]:
        """A callable that does ``work`` on the device, recorded. The hidden state stays as it was.

        All graphs share one pool of memory for what they need in between. They may, in whatever
        order they are replayed, because they run one at a time and leave nothing in it: results go
        to tensors made outside.
        """
        self.captures += 1
        x = at.x.clone()
        if self.device.type != "cuda":
            work()                                       # as below
            at.x.copy_(x)
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                work()                                   # libraries set up what cannot be recorded
            here.wait_stream(self.stream)
            at.x.copy_(x)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        return graph.replay

    def forget(self):
        """Drop the graphs, and all of them.

        With one, PyTorch frees the cuBLAS workspace of all captured on its stream
        (https://github.com/pytorch/pytorch/issues/193402).
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.pool = torch.cuda.graph_pool_handle()   # the old one is gone with its last graph
        for memory in (*self.in_use.values(), *self.empty):
            for current in memory.passes.values():
                current.graphs.clear()                   # someone may still hold the pass
            memory.passes.clear()
        for at in self.rows.values():
            at.head = None
