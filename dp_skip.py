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

One token's states are a noisy judge. The same DP over the last T tokens takes T states a cell, each
run at its own token's position, and compares the root of their mean square. With T = 1 and the
cosine it is the paper's; with more tokens decoding goes by ``relative_distances``.

Two errata of the paper: Eq. (1) prints arg min where the arg max of the cosine is meant, and the
pseudocode recovers the path by comparing vectors; here every cell's choice is kept.

``select_layers_plain`` is that definition, cell by cell: read it first. ``select_layers`` is what
decoding uses: each layer runs once at most, on all cells of one i, packed as rows (§3.6). This file
knows tensors and a callable, not what a LLaMA is.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# layer(i, candidates): decoder layer i (counted from 0) on candidates (m, dim), each a state of the
# *same* token, none of which may see another; or (m, T, dim), each T states of the same T tokens.
# Returns the same shape.
Layer = Callable[[int, Tensor], Tensor]

# measure(candidates, state): how far candidates (m, dim) lie from the true state (dim,): (m,). Of
# candidates (m, T, dim) and T states (T, dim): the root of the mean square over the T tokens.
Measure = Callable[[Tensor, Tensor], Tensor]


class Selection(NamedTuple):
    """The answer for each budget m = 0 .. M (or from ``smallest`` on)."""
    skip_sets: list[frozenset[int]]     # the layers to skip, counted from 0
    cosines: list[float]                # cosine of h_L with the state that the set leads to
                                        # (of T tokens: the mean)


def select_layers_plain(
    layer: Layer, states: Tensor, budget: int, measure: Measure | None = None
) -> Selection:
    """Algorithm 1 as it reads: one layer call per cell.

    states: h_0 .. h_L of one token (L+1, dim), or of T tokens (L+1, T, dim).
    measure: how to compare with h_i; None: ``distances``, the paper's.
    Raises ValueError unless 0 <= budget <= L.
    """
    layers = layer_count(states, budget)
    measure = measure or distances
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
                to_run, to_skip = measure(torch.stack((run, skip)), states[i]).tolist()
                skipped[i, j] = not to_run <= to_skip    # NaN, from overflow, compares as false
                g[i, j] = skip if skipped[i, j] else run
    final = torch.stack([g[layers, m] for m in range(budget + 1)])
    sets = [walk_back(lambda i, j: skipped[i, j], layers, m) for m in range(budget + 1)]
    return Selection(sets, cosines(final, states[layers]))


def select_layers(
    layer: Layer, states: Tensor, budget: int, smallest: int = 0, measure: Measure | None = None
) -> Selection:
    """The same in fewer than L calls of ``layer``, each on at most ``budget`` rows (§3.6).

    states: h_0 .. h_L of one token (L+1, dim), or of T tokens (L+1, T, dim). Row j of g is g(i, j):
    all start as h_0, and layer i updates the cells that have a choice, 0 < j < i, from themselves
    and their left neighbours:

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
    measure = measure or distances
    g = states[0].expand(budget + 1, *states[0].shape).clone()       # (budget + 1, [T,] dim)
    one_each = [1] * states[0].dim()                                 # to broadcast over a cell
    skipped = states.new_ones(layers + 1, budget + 1, dtype=torch.bool)     # of cell (i, j)
    skipped[:, 0] = False
    for i in range(1, layers + 1):
        first = max(1, smallest - (layers - i))
        end = min(i, budget + 1)                                     # cells first .. end - 1
        if first < end:
            run = layer(i - 1, g[first:end])                         # (cells, [T,] dim)
            skip = g[first - 1:end - 1]
            run_is_closer = measure(run, states[i]) <= measure(skip, states[i])
            skipped[i, first:end] = ~run_is_closer       # NaN, from overflow, compares as false
            g[first:end] = torch.where(run_is_closer.reshape(-1, *one_each), run, skip)
        g[0] = states[i]
    table = skipped.tolist()
    budgets = range(smallest, budget + 1)
    sets = [walk_back(lambda i, j: table[i][j], layers, m) for m in budgets]
    return Selection(sets, cosines(g[smallest:], states[layers]))


def walk_back(skipped: Callable[[int, int], bool], layers: int, budget: int) -> frozenset[int]:
    """The set behind cell (layers, budget): follow the choices from the last layer to the first."""
    chosen = set()
    j = budget
    for i in range(layers, 0, -1):
        if skipped(i, j):
            chosen.add(i - 1)
            j -= 1
    return frozenset(chosen)


def distances(candidates: Tensor, state: Tensor) -> Tensor:
    """The paper's measure, by direction: |u - v|, u and v the two scaled to length 1.

    A smaller distance is a larger (mean) cosine: cos = 1 - |u - v|^2 / 2. Not the cosine itself,
    since a few huge entries can bring every cosine within 1e-7 of 1 (a text's first token is so),
    where float32 has no digits left.
    """
    u = F.normalize(candidates.float(), dim=-1)
    v = F.normalize(state.float(), dim=-1)
    return root_mean_square(u - v)


def relative_distances(candidates: Tensor, state: Tensor) -> Tensor:
    """|x - h| / |h|. Unlike the cosine it sees a state of the right direction and a wrong length.

    What later layers add is not scaled along with it, so that a wrong length turns into a wrong
    direction further up.
    """
    state = state.float()
    length = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
    return root_mean_square((candidates.float() - state) / length)


def root_mean_square(apart: Tensor) -> Tensor:
    """Lengths of vectors (m, dim): (m,). Of (m, T, dim): the root of the mean square over T."""
    tokens = apart[0].numel() / apart.shape[-1]
    return torch.linalg.vector_norm(apart.flatten(1), dim=-1) / tokens ** 0.5


def cosines(candidates: Tensor, state: Tensor) -> list[float]:
    """Of each candidate and the true state; means over T tokens."""
    return (1 - distances(candidates, state).square() / 2).tolist()


def layer_count(states: Tensor, budget: int, smallest: int = 0) -> int:
    """L, after checking that ``smallest`` to ``budget`` of L layers can be skipped."""
    layers = len(states) - 1
    if layers < 1 or not 0 <= smallest <= budget <= layers:
        raise ValueError(f"cannot skip {smallest} to {budget} of {layers} layers")
    return layers
