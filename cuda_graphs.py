"""CUDA graphs: decode without launching every kernel from Python. Imported by programs, not by the core.

A row through a decoder layer is some twenty kernels, which a GPU may run faster than Python asks for them. A CUDA graph
is a recording of kernels, asked for as one. ``GraphedLlama`` wraps a ``Llama`` and stands in for it in speculative.py:

* One graph for each layer, so that *skipping a layer is not replaying its graph*. All layers of a pass update one
  hidden state in place; one graph before them makes it from the tokens, one behind them makes logits of it.
* A recording has fixed shapes and addresses. So there are graphs for each number of rows and of slots, slots come in
  blocks, and what differs from pass to pass lies in tensors: tokens, slots, positions, and the mask made of them.
* A row sees the slots before its position, and its own. For a text's rows, each at the slot of its position, that is
  the causal mask; for the DP's candidates, all at one position, each in a scratch slot, it is theirs (§3.6).

On a CPU, for tests, nothing is recorded, and the same work on the same tensors is called. Not yet run on a GPU.
"""
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from dp_skip import Layer
from model import BLOCK, KVCache, Llama
from packed import attend_folded

FEW = 16                      # rows; passes of more, the prompt's, run without graphs unless their width is fixed
MOST_PASSES = 64              # kinds of passes kept per cache: some 10 KB of the GPU for each kernel of each layer


class Rows:
    """Tensors of all passes of so many rows, always at the same place; what one pass leaves here, the next overwrites."""

    def __init__(self, model: Llama, rows: int):
        c, like = model.config, model.embed.weight
        self.rows, self.count = rows, torch.arange(rows, device=like.device)
        self.tokens = torch.zeros(1, rows, dtype=torch.long, device=like.device)
        self.slot, self.position = torch.zeros(2, rows, dtype=torch.long, device=like.device)
        self.cos, self.sin = torch.zeros(2, rows, c.head_dim, dtype=like.dtype, device=like.device)
        self.all = torch.zeros(c.num_hidden_layers + 2, rows, c.hidden_size, dtype=like.dtype, device=like.device)
        self.x, *self.states = self.all.split(1)               # the hidden state as it is now, and h_0 .. h_L
        self.logits = self.head = None                         # made when first needed


class Pass:
    """The work of a pass of so many rows over so many slots of one cache, in parts, and the graph of each part."""

    def __init__(self, model: Llama, tensors: dict, at: Rows, slots: int):
        self.model, self.tensors, self.at, self.graphs = model, tensors, at, {}
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.mask = at.cos.new_zeros(self.groups * at.rows, slots)

    def start(self):
        """From tokens, slots and positions to h_0, angles and mask."""
        at, slot = self.at, torch.arange(self.mask.shape[1], device=self.mask.device)
        at.all[:2] = self.model.embed(at.tokens)               # x and h_0
        at.cos.copy_(self.tensors["cos"].index_select(0, at.position))
        at.sin.copy_(self.tensors["sin"].index_select(0, at.position))
        seen = (slot < at.position[:, None]) | (slot == at.slot[:, None])
        self.mask.fill_(-torch.inf).masked_fill_(seen.repeat(self.groups, 1), 0)

    def layer(self, i: int):
        at = self.at
        out = self.model.layers[i](at.x, at.cos, at.sin, self.mask, partial(self.store, i))
        at.all[:i + 3:i + 2] = out                             # x and h_(i+1), first and last of the slice: one kernel

    def store(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, slots = self.tensors["keys"][i], self.tensors["values"][i], self.mask.shape[1]
        keys.index_copy_(2, self.at.slot, k)
        values.index_copy_(2, self.at.slot, v)
        return keys[:, :, :slots], values[:, :, :slots]


class GraphedLlama:
    """A ``Llama`` whose passes of a few rows over a KVCache are replayed from CUDA graphs.

    Graphs are captured when first needed, which takes as long as some passes do: time a second text, not the first.
    Hidden states and logits that come from a graph hold until the next pass of as many rows. The layers of the wrapped
    model take ``packed.folded_attention`` from now on. A new cache gets the memory, and so the graphs, of one that is gone and
    was as large.
    """

    def __init__(self, model: Llama):
        self.model, self.config, self.embed, self.layers = model, model.config, model.embed, model.layers
        self.device, self.block_costs, self.parts = model.embed.weight.device, None, model.layers
        self.rows, self.captures = {}, 0
        self.homes, self.empty = weakref.WeakKeyDictionary(), []             # of caches in use; of those gone
        attend_folded(model)
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object], at: Rows) -> Callable[[], None]:
        """A callable that does ``work`` on the device, recorded. What ``work`` does to the hidden state is undone.

        All graphs share one pool of memory for what they need in between. They may, in whatever order they are replayed,
        because they run one at a time and leave nothing in it: results go to tensors made outside.
        """
        self.captures += 1
        x = at.x.clone()
        if self.device.type != "cuda":
            work()                                             # as below
            at.x.copy_(x)
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                work()                                         # libraries set themselves up, which cannot be recorded
            here.wait_stream(self.stream)
            at.x.copy_(x)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        return graph.replay

    def play(self, this: Pass, part: int | None = None):
        """Layer ``part`` of a pass, or what comes before the layers."""
        if part not in this.graphs:
            this.graphs[part] = self.capture(this.start if part is None else partial(this.layer, part), this.at)
        this.graphs[part]()

    def forget(self):
        """Drop the graphs, and all of them: with one, PyTorch frees the cuBLAS workspace of all captured on its stream
        (https://github.com/pytorch/pytorch/issues/193402)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.pool = torch.cuda.graph_pool_handle()         # the old one is gone with its last graph
        for home in (*self.homes.values(), *self.empty):
            for this in home.passes.values():
                this.graphs.clear()                            # someone may still hold the pass
            home.passes.clear()
        for at in self.rows.values():
            at.head = None

    def home_of(self, cache: KVCache) -> SimpleNamespace:
        """The tensors of a cache and the passes that know their addresses. A new cache moves in where an old one is gone."""
        if cache not in self.homes:
            fits = [i for i, home in enumerate(self.empty) if home.capacity >= cache.slots.shape[-2]]
            if fits:
                home = self.empty.pop(fits[0])
                slots = home.tensors["slots"].zero_()
                slots[..., :cache.length, :] = cache.slots[..., :cache.length, :]
                vars(cache).update(home.tensors)
            else:
                if self.empty:                                 # those that are too small are not kept
                    self.forget()
                    self.empty.clear()
                tensors = {name: vars(cache)[name] for name in ("slots", "keys", "values", "cos", "sin")}
                home = SimpleNamespace(tensors=tensors, capacity=cache.slots.shape[-2], passes={})
            self.homes[cache] = home
            weakref.finalize(cache, self.empty.append, home).atexit = False
        return self.homes[cache]

    def begin(self, cache: KVCache, rows: int, end: int, tokens: Tensor | None = None, position: int | None = None) -> Pass:
        """A pass whose rows take the slots from cache.length on, ready for its first layer.

        end: it looks over the slots before it, and some after it: four lengths from one power of two to the next, so that a
        long text asks for few kinds of passes. position: of all rows; None, each at its slot.
        """
        home, blocks = self.home_of(cache), -(-end // BLOCK)
        step = BLOCK * max(1, 2 ** (blocks - 1).bit_length() // 8)
        key = rows, min(-(-end // step) * step, home.capacity)
        if rows not in self.rows:
            self.rows[rows] = Rows(self.model, rows)
        if key not in home.passes:
            if len(home.passes) == MOST_PASSES:
                self.forget()
            home.passes[key] = Pass(self.model, home.tensors, self.rows[rows], key[1])
        this, at = home.passes[key], self.rows[rows]
        torch.add(at.count, cache.length, out=at.slot)
        if tokens is not None:
            at.tokens.copy_(tokens)
        at.position.copy_(at.slot) if position is None else at.position.fill_(position)
        self.play(this)
        return this

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache | None = None, skip=(), slots: int | None = None) -> list[Tensor]:
        """As ``Llama.forward``."""
        rows = tokens.shape[1]
        if cache is None or (rows > FEW and slots is None):
            return self.model(tokens, cache, skip, slots)
        this = self.begin(cache, rows, slots or cache.length + rows, tokens)
        cache.length += rows
        states = this.at.states[:1]
        for i in range(len(self.layers)):
            if i not in skip:
                self.play(this, i)
            states.append(states[-1] if i in skip else this.at.states[i + 1])
        states[-1] = this.at.x                                 # the same numbers, and what ``logits`` knows
        return states

    __call__ = forward

    @torch.inference_mode()
    def logits(self, state: Tensor) -> Tensor:
        """As ``Llama.logits``; by a graph for the last state of the last pass of its number of rows."""
        at = next((at for at in self.rows.values() if at.x is state), None)
        if at is None:
            return self.model.logits(state)
        if at.head is None:
            at.logits = state.new_zeros(1, at.rows, self.config.vocab_size)
            at.head = self.capture(lambda: at.logits.copy_(self.model.logits(at.x)), at)
        at.head()
        return at.logits

    def candidate_layer(self, cache: KVCache, rows: int) -> Layer:
        """As in speculative.py. Fewer candidates than ``rows`` have rows of zeros behind them, which cannot overflow."""
        n = cache.length
        this = self.begin(cache, max(rows, 1), n + rows, position=n - 1)

        def layer(i: int, candidates: Tensor) -> Tensor:
            x, m = this.at.x[0], len(candidates)
            x[:m], x[m:] = candidates, 0
            self.play(this, i)
            return x[:m].clone()

        return layer
