"""Checks of problem 3, on toy layers that are a matrix each.

Those that hold for both readings of Algorithm 1 take the function's name: problem 4 shares them.
"""
import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from checks.common import PropertyError, check, close, equal, golden, random, show

FILE = "checks/problem3.py"   # where a student finds the toys of the examples
SHAPES = [                    # layers, budget
    (layers, budget)
    for layers in (1, 2, 3, 4, 6)
    for budget in sorted({1, layers // 2, layers - 1, layers} - {0})
]
TOKENS = 2                    # where the states are of several


# ---------------------------------------------------------------------------- toys and doubles

def toy(layers: int, seed: int, tokens: int | None = None):
    """Layers that are a matrix each, and states that are *not* what they make of each other.

    Of one token (L+1, 4), or of several ``tokens`` (L+1, T, 4).
    """
    one = (1, 4) if tokens is None else (1, tokens, 4)

    def noise(*shape: int, seed: int) -> Tensor:
        return random(*shape, seed=seed, dtype=torch.float64)

    weights = noise(layers, 4, 4, seed=seed) * 0.6
    states = [noise(*one, seed=100 + seed)]

    def layer(i, candidates: Tensor) -> Tensor:
        changes = (candidates.double() @ weights[i]).tanh()
        return candidates + changes.to(candidates.dtype)

    for i in range(layers):
        other = 0.2 * noise(*one, seed=200 + 10 * seed + i)
        states.append(layer(i, states[-1]) + other)
    return layer, torch.cat(states)


def consistent_toy(layers: int, seed: int, tokens: int | None = None, dtype=torch.float64):
    """The same layers, and the states that they make of each other."""
    layer, states = toy(layers, seed, tokens)
    states = [states[:1].to(dtype)]
    for i in range(layers):
        states.append(layer(i, states[-1]))
    return layer, torch.cat(states)


FAR = 3000.0


def far_out(layer, states: Tensor):
    """A toy with another dimension, in which all are equal and far out: so directions are nearly
    one. A cosine in float32 has no digits left to tell them apart; distances have.
    """
    def same(i: int, candidates: Tensor) -> Tensor:
        return torch.cat((layer(i, candidates[..., :-1]), candidates[..., -1:]), dim=-1)

    return same, torch.cat((states, torch.full_like(states[..., :1], FAR)), dim=-1).float()


def manhattan(candidates: Tensor, state: Tensor) -> Tensor:
    """In ``distances``' place, to tell a mistake there from one in the DP.

    The same for states of any length. Of several tokens: the mean. Of infinity NaN, as there.
    """
    scaled = 3 * state / state.abs().sum(-1, keepdim=True)
    apart = (candidates - scaled).abs().sum(-1).reshape(len(candidates), -1).mean(-1)
    return apart.masked_fill(apart.isinf(), torch.nan)


def of_the_last_token(candidates: Tensor, state: Tensor) -> Tensor:
    """A ``measure`` of states of several tokens, which sees no more than one of them."""
    return manhattan(candidates[:, -1], state[-1])


def cells(skipped, layers: int, budget: int, *_) -> frozenset:
    """In ``walk_back``'s place: no path, but all cells that skip their layer.

    Of those that can lead to (layers, budget).
    """
    found = set()
    for j in range(budget + 1):
        for i in range(max(1, j), layers - budget + j + 1):
            if bool(skipped(i, j)):
                found.add((i, j))
    return frozenset(found)


class Kind(NamedTuple):
    """States to choose by."""
    seeds: int                # cases of each shape
    tokens: int | None = None                          # None: (L+1, 4). Else (L+1, T, 4)
    measure: Callable | None = None                    # None: ``distances``
    change: Callable | None = None                     # of the toy
    distance: float = 1.0     # about how far candidates lie from h_i

    def toy(self, layers: int, seed: int):
        made = toy(layers, seed, self.tokens)
        return self.change(*made) if self.change else made


KINDS = {
    "dp": Kind(3),
    "dp of tokens": Kind(1, TOKENS),
    "dp of one token": Kind(1, 1),                     # which has an axis of its own
    "dp by another measure": Kind(1, TOKENS, of_the_last_token),
    "dp far out": Kind(1, change=far_out, distance=1 / FAR),
}


def named(
    layers: int, budget: int, toy: str = "toy", rest: str = "", seed: int = 0, kind: Kind = Kind(1)
) -> str:
    """A case, in an example."""
    of_tokens = "" if kind.tokens is None else f", {kind.tokens}"
    measured = f", measure = {kind.measure.__name__}" if kind.measure else ""
    made = f"{toy}({layers}, {seed}{of_tokens})"
    if kind.change:
        made = f"{kind.change.__name__}(*{made})"
    return f"L = {layers}, M = {budget}{rest}, layer, states = {made}{measured} of {FILE}"


SMALL = 1e-4                  # times distances, where a cosine would have no digits left


@contextlib.contextmanager
def doubles(times: float = 1.0):
    """distances and walk_back exchanged. times: by which distances are multiplied."""
    def distances(candidates: Tensor, state: Tensor) -> Tensor:
        return times * manhattan(candidates, state).float()

    with mock.patch("dp_skip.distances", distances), mock.patch("dp_skip.walk_back", cells):
        yield


NO_COSINE = 7.0


def no_cosines(candidates: Tensor, state: Tensor) -> list[float]:
    """In ``cosines``' place, where nothing is to be chosen by them."""
    return [NO_COSINE] * len(candidates)


def function(name: str):
    import dp_skip
    return getattr(dp_skip, name)


def selected(select, layer, states: Tensor, budget: int, example: str, *smallest: int):
    """What a reading of the DP returns, if it is a set and a cosine for every budget."""
    from dp_skip import Selection
    got = select(layer, states, budget, *smallest)
    least = sum(smallest)
    if not isinstance(got, Selection):
        raise PropertyError(
            "The DP returns a Selection(skip_sets, cosines)", f"{example}: got {show(got)}")
    first = "smallest" if smallest else "0"
    for name, values in zip(got._fields, got):
        equal(len(values), budget - least + 1,
              f"{name} has an entry for every budget from {first} to M", f"{example}, len({name})")
    return got


# ---------------------------------------------------------------------------- what both must do

def same_sets(name: str, kind: str = "dp"):
    """Every case's choices, with doubles, so that only this function's own mistakes are found.

    Or else its sets as they are: it may do distances' and walk_back's work itself, and right. Where
    it goes by the doubles it goes by smaller distances too.
    """
    try:
        with doubles(), mock.patch("dp_skip.cosines", no_cosines):
            golden_sets(name, kind, "cells")
    except Exception as error:
        try:
            golden_sets(name, kind, "skip_sets")
            if kind == "dp":
                golden_sets(name, "dp far out", "skip_sets")
        except PropertyError:
            raise
        except Exception:
            raise error from None
    else:
        with doubles(SMALL), mock.patch("dp_skip.cosines", no_cosines):
            golden_sets(name, kind, "cells", f", all distances {SMALL:g} times as large")


def golden_sets(name: str, kind: str, key: str, rest: str = ""):
    measure = KINDS[kind].measure
    select = function(name)
    if measure:
        select = partial(select, measure=measure)
    for case in golden()[kind]:
        layers, budget, seed = case["case"]
        example = named(layers, budget, seed=seed, kind=KINDS[kind])
        sets, _ = selected(select, *KINDS[kind].toy(layers, seed), budget, example)
        note = ", cells (i, j) that skip their layer" if key == "cells" else ""
        note += rest
        for m, (chosen, expected) in enumerate(zip(sets, case[key])):
            members = [tuple(e) if isinstance(e, list) else e for e in expected]
            equal(frozenset(chosen), frozenset(members),
                  "Each cell keeps the candidate closer to h_i: of g(i-1, j) through layer i and "
                  "g(i-1, j-1) as it is", f"{example}, m = {m}{note}")


def several_tokens(name: str):
    """States of several tokens, by distances and by another measure."""
    for kind in ("dp of tokens", "dp of one token"):
        same_sets(name, kind)
        same_cosines(name, kind)
    same_sets(name, "dp by another measure")
    layer, states = consistent_toy(4, 0, TOKENS)
    example = named(4, 2, "consistent_toy", kind=KINDS["dp by another measure"])
    select = partial(function(name), measure=of_the_last_token)
    with doubles(), mock.patch("dp_skip.cosines", no_cosines):
        _, got = selected(select, layer, states, 2, example)
    if list(got) == [NO_COSINE] * 3:                         # they are what ``cosines`` makes
        return
    sets, got = selected(select, layer, states, 2, example)
    close(torch.tensor(got), [cosine_of(skip, layer, states) for skip in sets],
          "Cosines are cosines, whatever measure has chosen the sets", example, ("m",))


def same_cosines(name: str, kind: str = "dp"):
    """cos(h_L, g(L, m)): by really running each set, on states the layers do make of each other."""
    select = function(name)
    for case in golden()[f"{kind}, consistent"]:
        layers, budget = case["case"]
        layer, states = consistent_toy(layers, 0, KINDS[kind].tokens)
        example = named(layers, budget, "consistent_toy", kind=KINDS[kind])
        with doubles():
            _, got = selected(select, layer, states, budget, example)
        if torch.allclose(torch.tensor(got), torch.tensor(case["manhattan"]), atol=1e-4):
            continue
        sets, got = selected(select, layer, states, budget, example)
        close(torch.tensor(got), [cosine_of(skip, layer, states) for skip in sets],
              "cosines[m] is the cosine of h_L and what the layers outside skip_sets[m] make of "
              "h_0, of several tokens the mean", example, ("m",))
        if kind == "dp":
            layer, states = consistent_toy(layers, 0, dtype=torch.bfloat16)
            sets, got = selected(select, layer, states, budget, example)
            close(torch.tensor(got), [cosine_of(skip, layer, states) for skip in sets],
                  "Cosines are computed in float32", f"{example}, states in bfloat16", ("m",),
                  tolerance=2e-4)


def cosine_of(skip, layer, states: Tensor) -> float:
    x = states[:1]
    for i in range(len(states) - 1):
        if i not in skip:
            x = layer(i, x)
    return torch.cosine_similarity(x.double(), states[-1:].double(), dim=-1).mean().item()


def largest(select, layer, states: Tensor, budget: int) -> frozenset:
    """The set for m = M."""
    sets, _ = selected(select, layer, states, budget, f"L = {len(states) - 1}, M = {budget}")
    return frozenset(sets[budget])


def ties(name: str):
    select = function(name)

    def unchanged(i, candidates):
        return candidates.clone()

    for layers, budget in ((2, 1), (3, 2)):
        states = torch.ones(layers + 1, 4)
        with doubles():                            # all is equal: distances are 0 by any measure
            got = largest(select, unchanged, states, budget)
        if got != frozenset((i, i) for i in range(1, budget + 1)):
            equal(largest(select, unchanged, states, budget), frozenset(range(budget)),
                  "At a tie the layer is run",
                  f"L = {layers}, M = {budget}, layers that change nothing, all states equal, "
                  f"m = {budget}")


def overflow(name: str):
    select = function(name)
    _, states = toy(2, 0)

    def broken(i, candidates):
        return candidates * torch.nan

    with doubles():
        got = largest(select, broken, states, 1)
    if got != frozenset({(1, 1), (2, 1)}):
        equal(largest(select, broken, states, 1), frozenset({1}),
              "A candidate that overflowed, so that its distance is NaN, is never chosen over one "
              "that did not", "L = 2, M = 1, layers that return NaN, m = 1")

    def one_overflows(i, candidates):
        """Layer 1 doubles a row, layer 2 makes (0, 1) of it; but of (1, 0) infinity."""
        if i < 2:
            return 2 * candidates
        first = candidates[..., :1]
        made = torch.cat((0 * first, first), dim=-1) / 2
        return torch.where(first == 1, torch.inf, made)

    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    with doubles():
        chosen, _ = selected(select, one_overflows, states, 2, "L = 3, M = 2")
    if [frozenset(cells) for cells in chosen[1:]] != [{(1, 1)}, {(1, 1), (2, 2), (3, 2)}]:
        chosen, _ = selected(select, one_overflows, states, 2, "L = 3, M = 2")
        equal([sorted(skip) for skip in chosen], [[], [0], [0, 2]],
              "A candidate that overflowed to infinity is never chosen over one that did not, and "
              "others of its layer stay as they are",
              "L = 3, M = 2, states (1, 0), (1, 0), (2, 0), (0, 1), layers 0 and 1 that double a "
              "row, layer 2 that makes (0, 1) of (2, 0) and infinity of (1, 0): skip_sets")


def refuses(name: str, *budgets: tuple[int, ...]):
    """budgets: those that are too many or too few; of ``select_layers`` also with ``smallest``."""
    select = function(name)
    layer, states = toy(2, 0)
    for budget, *smallest in ((-1,), (3,), *budgets):
        try:
            got = select(layer, states, budget, *smallest)
        except ValueError:
            continue
        raise PropertyError(
            "A budget below 0 or above L is a ValueError, and so is a smallest below 0 or above M",
            f"L = 2, M = {budget}" + "".join(f", smallest = {least}" for least in smallest)
            + f": got {show(got)}")


class Counted:
    """A layer that notes its calls: (layer, shape of the rows)."""

    def __init__(self, layer):
        self.layer = layer
        self.calls = []
        self.dtypes = set()

    def __call__(self, i: int, candidates: Tensor) -> Tensor:
        self.calls.append((i, tuple(candidates.shape)))
        self.dtypes.add(candidates.dtype)
        return self.layer(i, candidates)

    def in_their_dtype(self, states: Tensor):
        """Some models' layers can take no other."""
        others = sorted(str(dtype) for dtype in self.dtypes - {states.dtype})
        equal(others, [],
              "Layers run on candidates in the states' own dtype; only distances are in float32",
              f"states in {states.dtype}: other dtypes")


# ---------------------------------------------------------------------------- the checks

DIRECTIONS = [                # sentence, row, its distance from (1, 0, 0)
    ("A row is at distance 0 from its own direction, at any length", [6.0, 0.0, 0.0], 0.0),
    ("Opposite directions are at distance 2", [-1.0, 0.0, 0.0], 2.0),
    ("The distance of two directions is |u - v| of their unit vectors", [0.0, 5.0, 0.0], 1.414214),
    ("The distance of two directions is |u - v| of their unit vectors", [3.0, 4.0, 0.0], 0.894427),
    ("A row's length plays no part, however short it is", [0.03, 0.04, 0.0], 0.894427),
]
OF_TOKENS = [                 # candidates (m, T, dim), the state (T, dim), their distances
    ([[[2.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -3.0]]], [[1.0, 0.0], [0.0, -1.0]],
     [1.414214, 1.414214]),
    ([[[3.0, 4.0], [0.0, 1.0]], [[4.0, 3.0], [5.0, 0.0]]], [[3.0, 4.0], [0.0, 2.0]],
     [0.0, 1.019804]),
    ([[[3.0, 4.0]], [[10.0, 1.0]]], [[3.0, 4.0]], [0.0, 0.804207]),
]


@check(2, "Distances")
def distances():
    from dp_skip import distances as distance
    target = torch.tensor([1.0, 0.0, 0.0])
    for sentence, row, expected in DIRECTIONS:
        got = distance(torch.tensor([row]), target)
        close(got, [expected], sentence, f"rows {[row]}, target {show(target)}", ("row",))
    for length in (3, 0.03):
        close(distance(torch.tensor([[0.0, 5.0, 0.0]]), length * target), [1.414214],
              "The true state may have any length too",
              f"rows (0, 5, 0), target ({length}, 0, 0)", ("row",))
    got = distance(torch.ones(1, 3, dtype=torch.bfloat16), target.bfloat16())
    equal(got.dtype, torch.float32,
          "Distances are computed in float32", "rows in bfloat16, dtype")
    rows = torch.tensor([[3.0, 4.03125, 0.0]], dtype=torch.bfloat16)
    target = torch.tensor([3.0, 4.0, 0.0], dtype=torch.bfloat16)
    close(distance(rows, target) * 1e3, [3.731],
          "Distances are computed in float32: in bfloat16 a unit vector has two or three digits",
          "rows (3, 4.03125, 0), target (3, 4, 0), both in bfloat16, distances in units of 1e-3",
          ("row",), tolerance=0.01)
    target = torch.tensor([1.0, 1e-4, 1e-4])
    rows = torch.tensor([[1e4, 1.0, 1.2], [1e4, 1.0, 1.4], [1e4, 1.0, 1.1]])
    close(distance(rows, target) * 1e5, [2.0, 4.0, 1.0],
          "Directions that are all but equal keep the digits of their distance, which a cosine in "
          "float32 has lost (see the docstring of distances)",
          "target (1, 1e-4, 1e-4), rows (10000, 1, 1.2), (10000, 1, 1.4), (10000, 1, 1.1), "
          "distances in units of 1e-5", ("row",), tolerance=0.1)
    overflowed = distance(torch.tensor([[3.0, torch.nan], [3.0, 4.0]]), torch.tensor([3.0, 4.0]))
    equal(overflowed.isfinite().tolist(), [False, True],
          "The distance of a candidate that overflowed is NaN, so that it can be told from others",
          "rows (3, NaN) and (3, 4), target (3, 4): which distances are numbers")
    close(distance(*random_rows()), golden()["distances"],
          "The distance of two directions is |u - v| of their unit vectors",
          "random rows (3, 8) and target", ("row",))
    for rows, state, expected in OF_TOKENS:
        close(distance(torch.tensor(rows), torch.tensor(state)), expected,
              "Of candidates of T tokens (m, T, dim) it is the root of the mean square over the "
              "tokens", f"candidates {rows}, state {state}", ("candidate",))


def random_rows():
    return random(3, 8, seed=21), random(8, seed=22)


PATHS = [                     # layers, budget, cells that skip, the set
    (1, 0, [], set()),
    (1, 1, [(1, 1)], {0}),
    (2, 1, [(1, 1), (2, 1)], {1}),
    (2, 1, [(1, 1)], {0}),
    (3, 2, [(1, 1), (2, 2), (3, 2)], {0, 2}),
    (3, 2, [(1, 1), (2, 1), (2, 2), (3, 2)], {1, 2}),
    (4, 2, [(1, 1), (2, 2), (3, 1), (4, 1), (4, 2)], {2, 3}),
    (4, 2, [(1, 1), (2, 2), (3, 2), (4, 1)], {0, 2}),
]


@check(3, "The walk back through the choices")
def walk_back():
    from dp_skip import walk_back as walk
    for layers, budget, skips, expected in PATHS:
        table = set(skips)
        example = f"L = {layers}, m = {budget}, cells that skip {show(table)}"

        def skipped(i, j, layers=layers, table=table, example=example):
            if not (1 <= i <= layers and 0 <= j <= i):
                raise PropertyError(
                    "The walk asks for cells (i, j) with 1 <= i <= L and 0 <= j <= i only",
                    f"{example}: it asked for cell {(i, j)}")
            return (i, j) in table

        equal(walk(skipped, layers, budget), expected,
              "The walk starts at cell (L, m); a cell (i, j) that skips adds layer i - 1 and leads "
              "to (i-1, j-1), one that runs leads to (i-1, j)", example)


    for case, expected in zip(random_tables(), golden()["paths"]):
        skipped, layers, budget = case
        equal(walk(skipped, layers, budget), set(expected),
              "The walk follows the choices from cell (L, m) to the first layer",
              f"L = {layers}, m = {budget}, a random table")


def random_tables():
    """Choices as walk_back asks for them; cell (i, i) skips, and (i, 0) runs."""
    for layers, budget in ((5, 2), (6, 3), (8, 4), (8, 5)):
        draws = random(layers + 1, layers + 1, seed=23 + budget).tolist()

        def skipped(i, j, draws=draws):
            return j == i or (j > 0 and draws[i][j] > 0)

        yield skipped, layers, budget


@check(3, "The sets it chooses")
def sets():
    same_sets("select_layers_plain")


@check(1, "States of several tokens, and another measure")
def states_of_tokens():
    several_tokens("select_layers_plain")


@check(2, "The cosines that belong to the sets")
def cosines():
    same_cosines("select_layers_plain")


@check(2, "Ties and overflow")
def tie():
    ties("select_layers_plain")
    overflow("select_layers_plain")


@check(2, "Layer calls and refusals")
def calls():
    from dp_skip import select_layers_plain
    for layers, budget in ((2, 0), (2, 1), (3, 2)):
        layer, states = toy(layers, 0)
        counted = Counted(layer)
        with doubles():
            select_layers_plain(counted, states, budget)
        expected = []
        for i in range(layers):
            expected += [(i, (1, 4))] * min(i, budget)
        counted.in_their_dtype(states)
        equal(sorted(counted.calls), expected,
              "A layer is called once for each cell 0 < j < i, on one row: for j = 0 the true "
              "state is known, and for j = i nothing ran",
              f"L = {layers}, M = {budget}, calls (layer, shape)")
    refuses("select_layers_plain")
