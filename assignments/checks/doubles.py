"""What stands in for earlier problems: layers, a cache and angles that show what they were given.

``marked_model`` is the student's Llama with layers that add 2^i (problems 2 and 4).
``token_model`` is a whole model whose cache holds token ids (problem 6).
"""
import functools
import random as chances
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from checks.common import PropertyError, config, equal, show


class Scale(nn.Module):
    """In a norm's place."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Matrix(nn.Module):
    """In the place of a layer's matrix: it can be called, and no more."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)

    @property
    def weight(self):
        raise PropertyError(
            "A matrix is called, as self.head(x): the program puts faster forms in its place, "
            "which have no weight to look at", "weight was asked for")


# ---------------------------------------------------------------------------- marked layers

class Call(NamedTuple):
    """What a layer was given."""
    layer: int
    x: Tensor                 # (batch, rows, hidden)
    positions: list[float]    # of each row, read off the marked cos; or what is wrong with it
    from_sin: list[float]     # the same, read off sin
    sees: list[list[float]]   # for each row, the marks of the slots it may look at
    dtype: torch.dtype        # of the angles
    mask_dtype: torch.dtype | None
    mask_shape: tuple[int, ...] | None


class MarkedLayer(nn.Module):
    """In a decoder layer's place: adds 2^i, so a state tells which layers made it.

    It notes what it was given. A row's first number is its mark, which is what it caches.
    """

    def __init__(self, i: int, calls: list[Call]):
        super().__init__()
        self.i = i
        self.calls = calls

    def forward(self, x, cos, sin, mask=None, store=None):
        return self.mlp_block(self.attention_block(x, cos, sin, mask, store))

    def attention_block(self, x, cos, sin, mask=None, store=None):
        require_rows(x, store)
        rows = x.shape[1]
        marks = x[:1, :, :1][:, None]                          # (1, 1 head, rows, 1)
        if store is not None:
            marks, _ = store(marks, -marks)                    # keys, values
        sees = marks_seen(marks[0, 0, :, 0].tolist(), mask, rows)
        where = positions(cos, rows), positions(-sin, rows)
        of_mask = (None, None) if mask is None else (mask.dtype, tuple(mask.shape))
        self.calls.append(Call(self.i, x.clone(), *where, sees, cos.dtype, *of_mask))
        return x + 2.0 ** self.i

    def mlp_block(self, x):
        return x


def require_rows(x, store):
    shape = tuple(x.shape)
    if len(shape) != 3:
        raise PropertyError("A layer takes x as (batch, rows, hidden)", f"got shape {shape}")
    if store is not None and shape[0] != 1:
        raise PropertyError(
            "With a cache, what goes through a layer is one sequence, x (1, rows, hidden): each "
            "candidate of the DP is a row of it, not a text of a batch", f"got shape {shape}")


def marks_seen(marks: list[float], mask: Tensor | None, rows: int) -> list[list[float]]:
    """For each row the marks of the slots that a mask lets it see."""
    slots = len(marks)
    if mask is None and rows == 1:
        return [marks]
    if mask is None:
        equal(slots, rows,
              "Without a mask several rows are all that there is to see: see attention",
              f"{rows} rows, no mask: slots that store returns")
        return [marks[:r + 1] for r in range(rows)]
    if tuple(mask.shape[-2:]) not in ((rows, slots), (1, slots)):
        raise PropertyError(
            "A layer's mask is (rows, slots), over the slots that store returns",
            f"{rows} rows and {slots} slots: got a mask of shape {tuple(mask.shape)}")
    mask = mask.expand(*mask.shape[:-2], rows, slots).reshape(-1, rows, slots)[0]
    others = mask[(mask != 0) & (mask != -torch.inf)]
    if len(others):
        raise PropertyError(
            "A mask holds 0 where a row may look and -inf elsewhere, and nothing else",
            f"a mask of shape {tuple(mask.shape)} holds {show(others[0].item())}")
    open_slots = (mask == 0).tolist()
    return [[mark for mark, is_open in zip(marks, row) if is_open] for row in open_slots]


def positions(angles: Tensor, rows: int) -> list[float] | str:
    """Of each row, as the marked angles tell; or what their shape is, if it is wrong."""
    if angles.shape[-1] != 2 or angles.dim() < 2 or angles.shape[-2] not in (1, rows):
        return f"cos or sin of shape {tuple(angles.shape)}, where (rows, head_dim) is wanted"
    found = angles[..., 0].flatten()
    return found.expand(rows).tolist() if len(found) == 1 else found.tolist()


def stands_at(call: Call, expected: list[float], sentence: str, example: str):
    """Were its rows turned by the angles of these positions?"""
    equal(call.positions, expected, sentence, f"{example}: positions, by cos")
    equal(call.from_sin, expected,
          "cos and sin are taken from the same positions", f"{example}: positions, by sin")


def marked_angles(length: int) -> tuple[Tensor, Tensor]:
    """In RoPE's place: row p of cos is p, and of sin -p, so that a layer can tell positions."""
    numbers = torch.arange(float(length))[:, None].expand(length, 2)
    return numbers, -numbers


def marked_table(config, length, device=None, dtype=torch.float32):
    cos, sin = marked_angles(length)
    return cos.to(dtype), sin.to(dtype)


def marked_rope():
    """A patch that puts the marked angles in the place of the student's table."""
    return mock.patch("model.rope_table", marked_table)


def marked_cache(length: int, dtype=torch.float32):
    """A KVCache of 4 layers that holds marks: of a valid slot its number, of one never written -1.

    ``ends``: of each call of put, which is not the student's.
    """
    import model

    class MarkedCache(model.KVCache):
        def put(self, layer, slot, end, k, v):
            self.ends.append(end)
            if not torch.equal(v, -k):
                raise PropertyError(
                    "What a layer gives store as keys and values, put is given as such",
                    f"layer {layer}, slot {slot}: the keys as values, and the values as keys")
            for r, mark in enumerate(k[0, 0, :, 0].tolist()):
                self.slots[:, layer, ..., slot + r, :] = mark
            marks = self.slots[0, layer, :, :1, :end, :1]
            return marks, marks

        def marks(self, layer: int) -> dict[int, float]:
            """By slot, of those that were written."""
            marks = self.keys[layer][0, 0, :, 0].tolist()
            return {slot: mark for slot, mark in enumerate(marks) if mark != -1}

    with marked_rope():
        cache = MarkedCache(model.Llama(config()).to(dtype), 40)
    cache.slots.fill_(-1.0)
    cache.slots[..., :length, :] = torch.arange(float(length))[:, None]
    cache.length = length
    cache.ends = []
    return cache


def marked_model(calls: list[Call], **changes):
    """The student's Llama with marked layers. An embedding's first number is 100 * its token."""
    import model
    llama = model.Llama(config(**changes))
    llama.embed.weight = nn.Parameter(torch.zeros_like(llama.embed.weight))
    llama.embed.weight[:, 0] = torch.arange(5.0) * 100
    llama.layers = nn.ModuleList(MarkedLayer(i, calls) for i in range(len(llama.layers)))
    llama.norm = Scale(3.0)
    return llama


# ---------------------------------------------------------------------------- a model of token ids

VOCABULARY = 7
LAYERS = 4


@functools.lru_cache(maxsize=100_000)
def state(
    history: tuple[int, ...], skip: frozenset = frozenset(), layer: int = LAYERS
) -> tuple[float, ...]:
    """The token model's hidden state h_layer after these tokens."""
    chance = chances.Random(f"{history} {sorted(skip)} {layer}")
    return tuple(chance.gauss(0, 1) for _ in range(VOCABULARY))


def states_of(tokens: list[int]) -> Tensor:
    """h_0 .. h_L of the last of these tokens, (L+1, dim), by all layers."""
    return torch.tensor([state(tuple(tokens), frozenset(), i) for i in range(LAYERS + 1)])


def logits_after(history, skip=frozenset()) -> list[float]:
    """The token model's: its head is -1, so that its last state is not taken for logits."""
    return [-x for x in state(tuple(history), frozenset(skip))]


def best(history, skip=frozenset()) -> int:
    """The token model's greedy choice after these tokens."""
    logits = logits_after(history, skip)
    return logits.index(max(logits))


def token_model():
    """A Llama in all but what it computes: a fixed random function of the tokens before.

    It reads them from the cache. So a roll-back that is off by one, a wrong position or a token
    never fed changes what is written, with nothing of problems 1 to 5 in use. ``passes`` notes
    (start, rows, skip, what the cache held before).
    """
    import model

    class TokenModel(model.Llama):
        def forward(self, tokens, cache=None, skip=(), slots=None):
            start = cache.length
            rows = tokens[0].tolist()
            held = cache.keys[0][0, 0, :, 0]
            if start + len(rows) > len(held):
                raise PropertyError(
                    "No pass goes past the cache's last slot",
                    f"{len(rows)} rows from slot {start} on, {len(held)} slots")
            before = held[:start].int().tolist()
            note = SimpleNamespace(start=start, rows=rows, skip=frozenset(skip), before=before)
            self.passes.append(note)
            for r, token in enumerate(rows):
                held[start + r] = token
            cache.length = start + len(rows)
            ids = held.int().tolist()
            seen = [tuple(ids[:start + r + 1]) for r in range(len(rows))]
            return [self.state_after(seen, note.skip, i) for i in range(LAYERS + 1)]

        def state_after(self, histories, skip, layer):
            states = [[state(history, skip, layer) for history in histories]]
            return torch.tensor(states, dtype=self.dtype)

        def logits(self, state):
            logits = -state
            if self.broken is not None and self.broken[0] == len(self.passes) - 1:
                _, row, number = self.broken
                logits[:, row] = number
            return logits

    with marked_rope():
        llama = TokenModel(config(vocab_size=VOCABULARY))
    llama.passes = []
    llama.dtype = torch.float32
    llama.broken = None                                # pass, and row whose logits are which number
    return llama


def cache_of(llama, tokens=(), slots: int = 60, rows: int = 16):
    """A KVCache of the token model that holds these tokens."""
    import model
    with marked_rope():
        cache = model.KVCache(llama, slots, rows)
    cache.keys[0][0, 0, :len(tokens), 0] = torch.tensor(tokens, dtype=torch.float32)
    cache.length = len(tokens)
    return cache
