"""Checks of problem 3, on toy layers that are a matrix each. Problem 4 shares those that hold for both readings."""
import contextlib
import itertools
from unittest import mock

import torch

from checks.common import Wrong, check, close, equal, golden, random, show

CASES = [(layers, budget, seed) for layers in (1, 2, 3, 4, 6) for budget in sorted({1, layers // 2, layers - 1, layers})
         if budget for seed in range(3)]


def toy(layers: int, seed: int):
    """Layers that are a matrix each, and states that are *not* what they make of each other: float64."""
    weights, states = random(layers, 4, 4, seed=seed, dtype=torch.float64) * 0.6, [random(1, 4, seed=100 + seed, dtype=torch.float64)]
    for i in range(layers):
        states.append(states[-1] + (states[-1] @ weights[i]).tanh() + 0.2 * random(1, 4, seed=200 + 10 * seed + i, dtype=torch.float64))
    return lambda i, rows: rows + (rows @ weights[i]).tanh(), torch.cat(states)


def consistent_toy(layers: int, seed: int):
    layer, states = toy(layers, seed)
    states = [states[:1]]
    for i in range(layers):
        states.append(layer(i, states[-1]))
    return layer, torch.cat(states)


def manhattan(rows, target):
    """In ``distances``' place, to tell a mistake there from one in the programme; of any length of target the same."""
    return (rows - 3 * target / target.abs().sum()).abs().sum(-1)


def cells(skipped, layers, budget, *_):
    """In ``walk_back``'s place: no path, but all cells that can lead to (layers, budget) and skip their layer."""
    return frozenset((i, j) for i in range(1, layers + 1) for j in range(max(0, budget - layers + i), min(i, budget) + 1)
                     if bool(skipped(i, j)))


@contextlib.contextmanager
def doubles():
    with mock.patch("dp_skip.distances", manhattan), mock.patch("dp_skip.walk_back", cells):
        yield


def selected(select, layer, states, budget: int, example: str, *smallest: int):
    """What a reading of the programme returns, if it is a set and a cosine for every budget."""
    from dp_skip import Selection
    got, least = select(layer, states, budget, *smallest), sum(smallest)
    if not isinstance(got, Selection):
        raise Wrong("The programme returns a Selection(skip_sets, cosines)", f"{example}: got {show(got)}")
    for name, values in zip(got._fields, got):
        equal(len(values), budget - least + 1, f"{name} has an entry for every budget from {'smallest' if smallest else '0'} to M",
              f"{example}, len({name})")
    return got


def same_sets(name: str):
    """Every case's choices, with doubles, so that only ``name``'s own mistakes are found here; else its sets as they are."""
    import dp_skip
    select = getattr(dp_skip, name)

    def run(key):
        for case in golden()["dp"]:
            layers, budget, seed = case["case"]
            example = f"L = {layers}, M = {budget}, layer, states = toy({layers}, {seed}) of checks/problem3.py"
            got, _ = selected(select, *toy(layers, seed), budget, example)
            for m, (chosen, expected) in enumerate(zip(got, case[key])):
                expected = frozenset(tuple(e) if isinstance(e, list) else e for e in expected)
                equal(frozenset(chosen), expected, "Each cell keeps the candidate closer to h_i: of g(i-1, j) through layer i and "
                      "g(i-1, j-1) as it is", f"{example}, m = {m}" + ", cells (i, j) that skip their layer" * (key == "cells"))

    try:
        with doubles():
            run("cells")
    except Exception as error:                                 # it may do distances' and walk_back's work itself, and right
        try:
            run("skip_sets")
        except Exception as second:
            raise (second if isinstance(second, Wrong) else error) from None


def largest(select, layer, states, budget: int) -> frozenset:
    """The set for m = M."""
    sets, _ = selected(select, layer, states, budget, f"L = {len(states) - 1}, M = {budget}")
    return frozenset(sets[budget])


def ties(name: str):
    import dp_skip
    select = getattr(dp_skip, name)
    for layers, budget in ((2, 1), (3, 2)):
        states = torch.ones(layers + 1, 4)
        with doubles():                                        # all is equal, so all distances are 0 by any measure
            got = largest(select, lambda i, rows: rows.clone(), states, budget)
        if got != frozenset((i, i) for i in range(1, budget + 1)):
            got = largest(select, lambda i, rows: rows.clone(), states, budget)
            equal(got, frozenset(range(budget)), "At a tie the layer is run", f"L = {layers}, M = {budget}, layers that change "
                  f"nothing, all states equal, m = {budget}")


def overflow(name: str):
    import dp_skip
    select, (_, states) = getattr(dp_skip, name), toy(2, 0)

    def broken(i, rows):
        return rows * torch.nan

    with doubles():
        got = largest(select, broken, states, 1)
    if got != frozenset({(1, 1), (2, 1)}):
        equal(largest(select, broken, states, 1), frozenset({1}), "A candidate that overflowed, so that its distance is NaN, is "
              "never chosen over one that did not", "L = 2, M = 1, layers that return NaN, m = 1")


def refuses(name: str):
    import dp_skip
    layer, states = toy(2, 0)
    for budget in (-1, 3):
        try:
            got = getattr(dp_skip, name)(layer, states, budget)
        except ValueError:
            continue
        raise Wrong("A budget below 0 or above L is a ValueError", f"L = 2, M = {budget}: got {show(got)}")


@check(2, "Distances")
def distances():
    from dp_skip import distances as distance
    target = torch.tensor([1., 0., 0.])
    for sentence, row, expected in (
            ("A row is at distance 0 from its own direction, at any length", [6., 0., 0.], 0.),
            ("Opposite directions are at distance 2", [-1., 0., 0.], 2.),
            ("The distance of two directions is |u - v| of their unit vectors", [0., 5., 0.], 1.414214),
            ("The distance of two directions is |u - v| of their unit vectors", [3., 4., 0.], .894427)):
        close(distance(torch.tensor([row]), target), [expected], sentence, f"rows {[row]}, target {show(target)}", ("row",))
    equal(distance(torch.ones(1, 3, dtype=torch.bfloat16), target.bfloat16()).dtype, torch.float32,
          "Distances are computed in float32", "rows in bfloat16, dtype")
    target, rows = torch.tensor([1., 1e-4, 1e-4]), torch.tensor([[1e4, 1., 1.2], [1e4, 1., 1.4], [1e4, 1., 1.1]])
    close(distance(rows, target) * 1e5, [2., 4., 1.], "Directions that are all but equal keep the digits of their distance, which a "
          "cosine in float32 has lost (see the docstring of distances)", "target (1, 1e-4, 1e-4), rows (10000, 1, 1.2), (10000, 1, "
          "1.4), (10000, 1, 1.1), distances in units of 1e-5", ("row",), tolerance=0.1)


@check(3, "The walk back through the choices")
def walk_back():
    from dp_skip import walk_back as walk
    for layers, budget, skips, expected in (
            (1, 0, [], set()), (1, 1, [(1, 1)], {0}), (2, 1, [(1, 1), (2, 1)], {1}), (2, 1, [(1, 1)], {0}),
            (3, 2, [(1, 1), (2, 2), (3, 2)], {0, 2}), (3, 2, [(1, 1), (2, 1), (2, 2), (3, 2)], {1, 2}),
            (4, 2, [(1, 1), (2, 2), (3, 1), (4, 1), (4, 2)], {2, 3}), (4, 2, [(1, 1), (2, 2), (3, 2), (4, 1)], {0, 2})):
        table = set(skips)

        def skipped(i, j):
            if not (1 <= i <= layers and 0 <= j <= i):
                raise Wrong("The walk asks for cells (i, j) with 1 <= i <= L and 0 <= j <= i only", f"L = {layers}, m = {budget}, "
                            f"cells that skip {show(table)}: it asked for cell {(i, j)}")
            return (i, j) in table

        equal(walk(skipped, layers, budget), expected, "The walk starts at cell (L, m); a cell (i, j) that skips adds layer i - 1 and "
              "leads to (i-1, j-1), one that runs leads to (i-1, j)", f"L = {layers}, m = {budget}, cells that skip {show(table)}")


@check(4, "The sets it chooses")
def sets():
    same_sets("select_layers_plain")


@check(2, "The cosines that belong to the sets")
def cosines():
    same_cosines("select_layers_plain")


def same_cosines(name: str):
    """cos(h_L, g(L, m)): by really running each set, on states that the layers do make of each other."""
    import dp_skip
    select = getattr(dp_skip, name)
    for layers, budget in ((1, 1), (3, 2), (5, 5)):
        layer, states = consistent_toy(layers, 0)
        example = f"L = {layers}, M = {budget}, layer, states = consistent_toy({layers}, 0) of checks/problem3.py"

        def cosine(skip):
            x = states[:1]
            for i in itertools.filterfalse(skip.__contains__, range(layers)):
                x = layer(i, x)
            return torch.cosine_similarity(x, states[-1:]).item()

        with doubles():
            _, got = selected(select, layer, states, budget, example)
        manhattan_ones = next(case["manhattan"] for case in golden()["dp consistent"] if case["case"] == [layers, budget])
        if not torch.allclose(torch.tensor(got), torch.tensor(manhattan_ones), atol=1e-4):
            sets, got = selected(select, layer, states, budget, example)
            close(torch.tensor(got), [cosine(skip) for skip in sets], "cosines[m] is the cosine of h_L and what the "
                  "layers outside skip_sets[m] make of h_0", example, ("m",))


@check(2, "Ties and overflow")
def tie():
    ties("select_layers_plain")
    overflow("select_layers_plain")


@check(2, "Layer calls and refusals")
def calls():
    from dp_skip import select_layers_plain
    for layers, budget in ((2, 1), (3, 2)):
        layer, states = toy(layers, 0)
        asked = []
        with doubles():
            select_layers_plain(lambda i, rows: asked.append((i, tuple(rows.shape))) or layer(i, rows), states, budget)
        expected = [(i - 1, (1, 4)) for i in range(1, layers + 1) for j in range(1, min(i, budget + 1))]
        equal(sorted(asked), sorted(expected), "A layer is called once for each cell 0 < j < i, on one row: for j = 0 the true state is "
              "known, and for j = i nothing ran", f"L = {layers}, M = {budget}, calls (layer, shape)")
    refuses("select_layers_plain")
