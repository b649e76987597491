"""What the checks share: how one is declared, how a failure is said, and the doubles for earlier problems."""
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn


class Wrong(Exception):
    """A property that does not hold: one sentence, and the smallest example found."""

    def __init__(self, sentence: str, example: str):
        super().__init__(f"{sentence}.\nSmallest example found: {example}.")


class Check(NamedTuple):
    number: str               # "3.2"
    title: str
    points: int
    run: Callable[[], None]


CHECKS: dict[int, list[Check]] = {}      # by problem


def check(points: int, title: str):
    """Declare a check: the module's name ends in the number of its problem."""
    def declare(run):
        problem = int(run.__module__[-1])
        own = CHECKS.setdefault(problem, [])
        own.append(Check(f"{problem}.{len(own) + 1}", title, points, run))
        return run
    return declare


@functools.cache
def golden() -> dict:
    """Numbers made by the reference: see golden.py of the project's assignments."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())


def show(value) -> str:
    """A value in an example: numbers short, tensors as lists, sets in order."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}" if value.numel() > 12 else show(value.tolist())
    if isinstance(value, float):
        return f"{value + 0:.6g}"                             # + 0: no -0
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(show(v) for v in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(show(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)


def parts(got, function: str, names: str, example: str):
    """What a function returned, if it is as many values as there are ``names``."""
    if not isinstance(got, (tuple, list)) or len(got) != names.count(",") + 1:
        raise Wrong(f"{function} returns ({names})", f"{example}: got {show(got)}")
    return got


def equal(got, expected, sentence: str, example: str):
    """Anything that is compared whole."""
    if got != expected or isinstance(got, bool) != isinstance(expected, bool):
        raise Wrong(sentence, f"{example}: expected {show(expected)}, got {show(got)}")


def close(got, expected, sentence: str, example: str, axes: tuple[str, ...] = (), tolerance: float = 1e-4):
    """A tensor against another, or a list: says the first place, in index order, where they differ."""
    expected = torch.as_tensor(expected)
    if not isinstance(got, Tensor):
        raise Wrong(sentence, f"{example}: expected a tensor of shape {tuple(expected.shape)}, got {show(got)}")
    if got.shape != expected.shape:
        raise Wrong(sentence, f"{example}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    got = got.to(torch.float64)
    expected = expected.to(torch.float64)
    bad = ~torch.isclose(got, expected, rtol=tolerance, atol=tolerance)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        names = axes or tuple(f"axis {i}" for i in range(len(index)))
        at = ", ".join(f"{name} {i}" for name, i in zip(names, index) if name)
        raise Wrong(sentence, f"{example}{', at ' * bool(at)}{at}: expected {show(expected[index].item())}, "
                              f"got {show(got[index].item())}")


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def config(**changes):
    """A LLaMA of 4 layers that is worked out by hand: 4 heads of 2 dimensions share 2 key-value heads."""
    from model import Config
    return Config(**dict(vocab_size=5, hidden_size=8, intermediate_size=3, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=2, max_position_embeddings=64) | changes)


# ---------------------------------------------------------------------------- doubles

class Call(NamedTuple):
    """What a layer was given."""
    layer: int
    x: Tensor                 # (batch, rows, hidden)
    positions: list[float]    # of each row, read off the marked angles
    sees: list[list[float]]   # for each row, the marks of the slots it may look at


class MarkedLayer(nn.Module):
    """In a decoder layer's place: adds 2^i, so a state tells which layers made it, and notes what it was given."""

    def __init__(self, i: int, calls: list[Call]):
        super().__init__()
        self.i, self.calls = i, calls

    def forward(self, x, cos, sin, mask=None, store=None):
        rows = x.shape[1]
        marks = x[:1, :, :1][:, None]                          # (1, 1 head, rows, 1): a row's first number is its mark
        if store is not None:
            marks, values = store(marks, marks.clone())
        marks = marks[0, 0, :, 0].tolist()
        if mask is None:
            sees = [marks] if rows == 1 else [marks[:r + 1] for r in range(rows)]
        else:
            if tuple(mask.shape[-2:]) not in ((rows, len(marks)), (1, len(marks))):
                raise Wrong("A layer's mask is (rows, slots), over the slots that store returns",
                            f"{rows} rows and {len(marks)} slots: got a mask of shape {tuple(mask.shape)}")
            flat = mask.expand(*mask.shape[:-2], rows, len(marks)).reshape(-1, rows, len(marks))[0]
            if not ((flat == 0) | (flat == -torch.inf)).all():
                raise Wrong("A mask holds 0 where a row may look and -inf elsewhere, and nothing else",
                            f"a mask of shape {tuple(mask.shape)} holds {show(flat[(flat != 0) & (flat != -torch.inf)][0].item())}")
            sees = [[mark for mark, open_ in zip(marks, (row == 0).tolist()) if open_] for row in flat]
        if cos.shape[-1] != 2 or cos.shape[-2] not in (1, rows) or sin.shape != cos.shape:
            raise Wrong("A layer's cos and sin are (rows, head_dim), or (1, head_dim) if all rows share a position",
                        f"{rows} rows, head_dim 2: got {tuple(cos.shape)} and {tuple(sin.shape)}")
        if not torch.equal(sin, -cos):
            raise Wrong("cos and sin are taken from the same positions",
                        f"positions {show(cos[..., 0].flatten())} in cos, {show((-sin[..., 0]).flatten())} in sin")
        positions = cos[..., 0].flatten().expand(rows).tolist() if cos.shape[-2] == 1 else cos[..., 0].flatten().tolist()
        self.calls.append(Call(self.i, x.clone(), positions, sees))
        return x + 2.0 ** self.i


def marked_angles(length: int) -> tuple[Tensor, Tensor]:
    """In RoPE's place: row p of cos is p, and of sin -p, so that a layer can tell the positions it was given."""
    positions = torch.arange(float(length))[:, None].expand(length, 2)
    return positions, -positions


def marked_rope():
    """A patch that puts the marked angles in the place of the student's table."""
    return mock.patch("model.rope_table", lambda config, length, *_, **__: marked_angles(length))


class MarkedCache:
    """In KVCache's place: which mark lies in which slot of which layer. Valid slots hold their own number."""

    def __init__(self, length: int, capacity: int = 40, layers: int = 4):
        self.length = length
        self.cos, self.sin = marked_angles(capacity)
        self.slots = [{slot: float(slot) for slot in range(length)} for _ in range(layers)]

    def put(self, layer, slot, end, k, v):
        for r, mark in enumerate(k[0, 0, :, 0].tolist()):
            self.slots[layer][slot + r] = mark
        marks = torch.tensor([self.slots[layer].get(s, -1.0) for s in range(end)])[None, None, :, None]
        return marks, marks


def marked_model(calls: list[Call], **changes):
    """The student's Llama with marked layers. An embedding's first number is 100 times its token."""
    import model
    llama = model.Llama(config(**changes))
    llama.embed.weight = nn.Parameter(torch.zeros_like(llama.embed.weight))
    llama.embed.weight[:, 0] = torch.arange(5.0) * 100
    llama.layers = nn.ModuleList(MarkedLayer(i, calls) for i in range(len(llama.layers)))
    return llama


class Scale(nn.Module):
    """In a norm's place."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor
