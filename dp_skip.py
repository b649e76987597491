"""Which layers to skip: CLaSp's dynamic programming (DP), arXiv 2505.24196, §3.4, Algorithm 1.

After a verify pass we hold one token's hidden states h_0 (embedding) .. h_L (after the last layer).
We look for the M layers whose omission moves the final state least: the set S, |S| = M, that
maximises cos(h_L, state after running only the layers outside S). There are L-choose-M sets. The DP
keeps one survivor for each number i of layers seen and each number j of those skipped (layers are
counted from 1 here, and from 0 in code):

    g(i, j) = the closer to h_i, by cosine, of   f_i(g(i-1, j))    run layer i
                                          and    g(i-1, j-1)       skip layer i
    g(i, 0) = h_i      nothing was skipped: the true state
    g(i, i) = h_0      everything was

Keeping one survivor a cell makes it an approximation (§3.5): what is closest to h_i need not become
closest to h_L. In return L layers and M budgets cost at most L * M layer calls, and the last row of
the table holds a set for *every* budget up to M.

Two errata of the paper: Eq. (1) prints arg min where the arg max of the cosine is meant, and the
pseudocode recovers the path by comparing vectors; here every cell's choice is kept.

``select_layers_plain`` is that definition, cell by cell: read it first. ``select_layers`` is what
decoding uses: each layer runs once at most, on all cells of one i, packed as rows (§3.6). This file
knows tensors and a callable, not what a LLaMA is.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# layer(i, rows): decoder layer i (counted from 0) on rows (m, dim), each a candidate state of the
# *same* token, none of which may see another. Returns (m, dim).
Layer = Callable[[int, Tensor], Tensor]


class Selection(NamedTuple):
    """The answer for each budget m = 0 .. M (or from ``smallest`` on)."""
    skip_sets: list[frozenset[int]]     # the layers to skip, counted from 0
    cosines: list[float]                # cosine of h_L with the state that the set leads to


def select_layers_plain(layer: Layer, states: Tensor, budget: int) -> Selection:
    """Algorithm 1 as it reads: one layer call per cell. states (L+1, dim): h_0 .. h_L of one token.

    Raises ValueError unless 0 <= budget <= L.
    """
    layers = layer_count(states, budget)
    targets = unit(states)
    g = {(0, 0): states[0]}
    skipped = {}                                         # (i, j): did this cell skip layer i?
    for i in range(1, layers + 1):
        for j in range(min(i, budget) + 1):
            if j == 0:
                g[i, j], skipped[i, j] = states[i], False
            elif j == i:
                g[i, j], skipped[i, j] = states[0], True
            else:
                run = layer(i - 1, g[i - 1, j][None])[0]
                skip = g[i - 1, j - 1]
                to_run, to_skip = distances(torch.stack((run, skip)), targets[i]).tolist()
                skipped[i, j] = not to_run <= to_skip    # NaN, from overflow, compares as false
                g[i, j] = skip if skipped[i, j] else run
    final = torch.stack([g[layers, m] for m in range(budget + 1)])
    sets = [walk_back(lambda i, j: skipped[i, j], layers, m) for m in range(budget + 1)]
    return Selection(sets, cosines(final, targets[layers]))


def select_layers(layer: Layer, states: Tensor, budget: int, smallest: int = 0) -> Selection:
    """The same in fewer than L calls of ``layer``, each on at most ``budget`` rows (§3.6).

    states (L+1, dim): h_0 .. h_L of one token. Row j of g is g(i, j): all start as h_0, and layer
    i updates the cells that have a choice, 0 < j < i, from themselves and their left neighbours:

                j = 0    1    2    3
        i = 0     h_0  h_0  h_0  h_0
        i = 1     h_1  h_0  h_0  h_0       g(1, 1) = h_0: nothing to choose
        i = 2     h_2   *   h_0  h_0       * = closer to h_2 of  f_2(g(1, 1))  and  g(1, 0)
        i = 3     h_3   *    *   h_0

    smallest: the least budget whose set is wanted; the lists start with it. A cell (i, j) with
    j < smallest - (L - i) is left out: too few layers follow it. So for one budget M, (L-M) * M
    rows run in all, where every budget up to M takes M * (M-1) / 2 more.

    Nothing is read back to the host before the end. Raises ValueError unless
    0 <= smallest <= budget <= L.
    """
    layers = layer_count(states, budget, smallest)
    targets = unit(states)
    g = states[:1].repeat(budget + 1, 1)                             # (budget + 1, dim)
    skipped = states.new_ones(layers + 1, budget + 1, dtype=torch.bool)     # of cell (i, j)
    skipped[:, 0] = False
    for i in range(1, layers + 1):
        first = max(1, smallest - (layers - i))
        end = min(i, budget + 1)                                     # cells first .. end - 1
        if first < end:
            run = layer(i - 1, g[first:end])                         # (cells, dim)
            skip = g[first - 1:end - 1]
            run_is_closer = distances(run, targets[i]) <= distances(skip, targets[i])
            skipped[i, first:end] = ~run_is_closer       # NaN, from overflow, compares as false
            g[first:end] = torch.where(run_is_closer[:, None], run, skip)
        g[0] = states[i]
    table = skipped.tolist()
    budgets = range(smallest, budget + 1)
    sets = [walk_back(lambda i, j: table[i][j], layers, m) for m in budgets]
    return Selection(sets, cosines(g[smallest:], targets[layers]))


def walk_back(skipped: Callable[[int, int], bool], layers: int, budget: int) -> frozenset[int]:
    """The set behind cell (layers, budget): follow the choices from the last layer to the first."""
    chosen = set()
    j = budget
    for i in range(layers, 0, -1):
        if skipped(i, j):
            chosen.add(i - 1)
            j -= 1
    return frozenset(chosen)


def unit(rows: Tensor) -> Tensor:
    """Rows (m, dim) scaled to length 1, in float32."""
    rows = rows.float()
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def distances(rows: Tensor, target: Tensor) -> Tensor:
    """How far the directions of rows (m, dim) lie from a unit vector (dim,): |u - v|, (m,).

    A smaller distance is a larger cosine: cos = 1 - |u - v|^2 / 2. Not the cosine itself, since a
    few huge entries can bring every cosine within 1e-7 of 1 (a text's first token is like that),
    where float32 has no digits left.
    """
    return torch.linalg.vector_norm(unit(rows) - target, dim=-1)


def cosines(rows: Tensor, target: Tensor) -> list[float]:
    """The cosines of rows (m, dim) with a unit vector (dim,)."""
    return (1 - distances(rows, target).square() / 2).tolist()


def layer_count(states: Tensor, budget: int, smallest: int = 0) -> int:
    """L, after checking that ``smallest`` to ``budget`` of L layers can be skipped."""
    layers = len(states) - 1
    if layers < 1 or not 0 <= smallest <= budget <= layers:
        raise ValueError(f"cannot skip {smallest} to {budget} of {layers} layers")
    return layers
