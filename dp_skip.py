"""Which layers to skip: CLaSp's dynamic programme (arXiv 2505.24196, §3.4, Algorithm 1).

After a verify pass we hold one token's hidden states h_0 (embedding) ... h_L (after the last layer). We look
for the M layers whose omission moves the final state least: the set S, |S| = M, that maximises
cos(h_L, state after running only the layers outside S). There are L-choose-M sets; the programme keeps one
survivor for each number of layers seen, i, and of those skipped, j:

    g(i, j) = the closer to h_i, by cosine, of   f_i(g(i-1, j))    run layer i
                                          and    g(i-1, j-1)       skip layer i
    g(i, 0) = h_i      nothing was skipped: the true state
    g(i, i) = h_0      everything was

Keeping one survivor a cell makes it an approximation (§3.5): what is closest to h_i need not become closest
to h_L. In return L layers and M budgets cost L*M layer calls, and the last column holds a set for *every*
budget up to M. (The paper's Eq. 1 prints arg min where the arg max of the cosine is meant, and its pseudocode
recovers the path by comparing vectors; here the choices are kept as bits.)

``select_layers_plain`` is that definition, cell by cell: read it first. ``select_layers`` is what decoding
uses: the cells of one i do not depend on each other, so each layer runs once on all of them, packed as rows
(§3.6). This file knows tensors and a callable, not what a LLaMA is.
"""
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# layer(i, rows): decoder layer i (from 0) on rows (m, dim), each a candidate state of the *same* token,
# none of which may see another. Returns (m, dim).
Layer = Callable[[int, Tensor], Tensor]


class Selection(NamedTuple):
    """For each budget m = 0 .. M (or from ``smallest`` on), the layers to skip (indices from 0) and the final state's cosine with h_L."""
    skip_sets: list[frozenset[int]]
    cosines: list[float]


def select_layers_plain(layer: Layer, states: Tensor, budget: int) -> Selection:
    """Algorithm 1 as it reads: one layer call per cell. states (L+1, dim): h_0 .. h_L of one token.

    Raises ValueError unless 0 <= budget <= L.
    """
    layers, targets = layer_count(states, budget), unit(states)
    g, skipped = {(0, 0): states[0]}, {}
    for i in range(1, layers + 1):
        for j in range(min(i, budget) + 1):
            if j == 0:
                g[i, j], skipped[i, j] = states[i], False
            elif j == i:
                g[i, j], skipped[i, j] = states[0], True
            else:
                run, skip = layer(i - 1, g[i - 1, j][None])[0], g[i - 1, j - 1]
                if_run, if_skip = distances(torch.stack((run, skip)), targets[i]).tolist()
                skipped[i, j] = not if_run <= if_skip            # so that a NaN, from overflow, is never run
                g[i, j] = skip if skipped[i, j] else run
    final = torch.stack([g[layers, m] for m in range(budget + 1)])
    return Selection([walk_back(lambda i, j: skipped[i, j], layers, m) for m in range(budget + 1)],
                     cosines(final, targets[-1]))


def select_layers(layer: Layer, states: Tensor, budget: int, smallest: int = 0) -> Selection:
    """The same in L calls of ``layer``, each on at most ``budget`` rows (§3.6). states (L+1, dim): h_0 .. h_L.

    smallest: the least budget whose set is wanted; the lists start with it. Cells from which so many layers can no
    longer be skipped are left out: for one budget M, (L-M) * M rows run in all, where every budget up to M takes
    M * (M-1) / 2 more. Nothing is read back to the host before the end.
    Raises ValueError unless 0 <= smallest <= budget <= L.
    """
    layers = layer_count(states, budget, smallest)
    targets = unit(states)
    never = targets.new_full((1,), torch.inf)                 # the distance of a choice that a cell does not have
    survivors, low, columns = states[:1], 0, []               # of j = low, low + 1, ...; here g(0, 0)
    for i in range(1, layers + 1):
        before, low = low, max(0, smallest - (layers - i))
        candidates = survivors[max(low, 1) - before:]
        run = layer(i - 1, candidates) if len(candidates) else candidates
        both = torch.cat((states[i:i + 1], run, survivors) if low == 0 else (run, survivors))
        runs, cells = len(both) - len(survivors), min(i, budget) - low + 1
        distance = distances(both, targets[i])
        if_run, if_skip = distance[:runs], distance[runs:]
        if runs < cells:
            if_run = torch.cat((if_run, never))               # j = i cannot have run layer i,
        if low == before:
            if_skip = torch.cat((never, if_skip))             # j = 0 cannot have skipped it
        skip = (if_run <= if_skip[:cells]).logical_not()
        from_skip = runs - (low == before)                    # cell j skips from cell j - 1 of the column before
        survivors = torch.where(skip[:, None], both[from_skip:from_skip + cells], both[:cells])
        columns.append((low, skip))
    table = torch.cat([skip for _, skip in columns]).tolist()
    starts = [0, *itertools.accumulate(len(skip) for _, skip in columns)]
    return Selection([walk_back(lambda i, j: table[starts[i - 1] + j - columns[i - 1][0]], layers, m)
                      for m in range(smallest, budget + 1)], cosines(survivors, targets[-1]))


def walk_back(skipped: Callable[[int, int], bool], layers: int, budget: int) -> frozenset[int]:
    """The set behind cell (layers, budget): follow the choices from the last layer to the first."""
    chosen, j = set(), budget
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
    """How far the directions of rows (m, dim) lie from a unit vector (dim,): |u - v|, (m,); smaller is a larger cosine.

    Not the cosine itself, 1 - |u - v|^2 / 2: a few huge entries can bring every cosine within 1e-7 of 1 (a text's first
    token is like that), where float32 has no digits left for it.
    """
    return torch.linalg.vector_norm(unit(rows) - target, dim=-1)


def cosines(rows: Tensor, target: Tensor) -> list[float]:
    return (1 - distances(rows, target).square() / 2).tolist()


def layer_count(states: Tensor, budget: int, smallest: int = 0) -> int:
    """L, after checking that ``smallest`` to ``budget`` of L layers can be skipped."""
    layers = len(states) - 1
    if layers < 1 or not 0 <= smallest <= budget <= layers:
        raise ValueError(f"cannot skip {f'{smallest} to ' * bool(smallest)}{budget} of {layers} layers")
    return layers
