"""Which layers to skip: CLaSp's dynamic programme (arXiv 2505.24196, §3.4, Algorithm 1).

After a verify pass we hold one token's hidden states h_0 (embedding) ... h_L (after the last layer). We look for the M
layers whose omission moves the final state least: the set S, |S| = M, that maximises cos(h_L, state after running only
the layers outside S). Of the L-choose-M sets one survives for each number of layers seen, i, and of those skipped, j:

    g(i, j) = the closer to h_i, by cosine, of   f_i(g(i-1, j))    run layer i
                                          and    g(i-1, j-1)       skip layer i
    g(i, 0) = h_i      nothing was skipped: the true state
    g(i, i) = h_0      everything was

Keeping one survivor a cell makes it an approximation (§3.5): what is closest to h_i need not become closest to h_L. In
return L layers and M budgets cost L*M layer calls, and the last column holds a set for *every* budget up to M. (The
paper's Eq. 1 prints arg min where the arg max of the cosine is meant, and its pseudocode recovers the path by comparing
vectors; here the choices are kept as bits.)

``select_layers_plain`` is that definition, cell by cell: read it first. ``select_layers`` is what decoding uses: each layer
runs once on all cells of one i, packed as rows (§3.6). This file knows tensors and a callable, not what a LLaMA is.
"""
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# layer(i, rows): decoder layer i (from 0) on rows (m, dim), each a candidate state of the *same* token, none of which may
# see another. Returns (m, dim).
Layer = Callable[[int, Tensor], Tensor]


class Selection(NamedTuple):
    """For each budget m = 0 .. M (or from ``smallest`` on), the layers to skip (from 0) and the last state's cosine with h_L."""
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


def select_layers(layer: Layer, states: Tensor, budget: int, smallest: int = 0,
                  costs: Sequence[int] | None = None) -> Selection:
    """The same in L calls of ``layer``, each on at most ``budget`` rows (§3.6). states (L+1, dim): h_0 .. h_L.

    smallest: the least budget whose set is wanted; the lists start with it. Cells from which so many layers can no
    longer be skipped are left out: for one budget M, (L-M) * M rows run in all, where every budget up to M takes
    M * (M-1) / 2 more. Nothing is read back to the host before the end.
    costs: what leaving out each layer saves, whole numbers of at least 1, where that differs (past the paper); j then
    counts what is saved, and there is a set for each sum from ``smallest`` to ``budget`` that some layers have.
    Raises ValueError unless 0 <= smallest <= budget <= L (or the sum of the costs).
    """
    layers = layer_count(states, budget, smallest, costs)
    costs, targets = tuple(costs or [1] * layers), unit(states)
    columns = sources(costs, budget, smallest, states.device)
    never = targets.new_full((1,), torch.inf)                 # the distance of a choice that a cell does not have
    survivors, bits = states[:1], []                          # here g(0, 0)
    for i, (_, rows, from_run, from_skip) in enumerate(columns):
        candidates = survivors[rows]
        run = layer(i, candidates) if len(candidates) else candidates
        both = torch.cat((states[i + 1:i + 2], run, survivors))
        distance = torch.cat((distances(both, targets[i + 1]).nan_to_num(nan=torch.inf), never))
        skip = (distance[from_run] > distance[from_skip]) | (from_run == len(both))
        survivors = both[torch.where(skip, from_skip, from_run)]
        bits.append(skip)
    bits = iter(torch.cat(bits).tolist())
    table = {(i, j): next(bits) for i, (cells, *_) in enumerate(columns, 1) for j in cells}
    return Selection([walk_back(lambda i, j: table[i, j], layers, j, costs) for j in columns[-1][0]],
                     cosines(survivors, targets[-1]))


@lru_cache(maxsize=16)
def sources(costs: tuple[int, ...], budget: int, smallest: int, device: torch.device) -> list[tuple]:
    """For each layer: the j of its cells (what some of the layers so far save, if the others can bring it to ``smallest``),
    the survivors it runs on, and where its cells' two choices stand among (h_i, run, survivors), behind which stands the
    choice that a cell does not have. Made once and kept on the device."""
    cells, left, columns = [0], sum(costs), []
    for cost in costs:
        before, left = cells, left - cost
        cells = sorted({j + saved for j in before for saved in (0, cost) if smallest - left <= j + saved <= budget})
        running = [j for j in before if j in cells and j > 0]                # g(i, 0) is the true state: no need to
        run = {0: 0} | {j: 1 + r for r, j in enumerate(running)}
        skip = {j + cost: 1 + len(running) + s for s, j in enumerate(before)}
        never = 1 + len(running) + len(before)
        columns.append((cells, *(torch.tensor(indices, dtype=torch.long, device=device) for indices in (
            [before.index(j) for j in running], [run.get(j, never) for j in cells], [skip.get(j, never) for j in cells]))))
    return columns


def walk_back(skipped: Callable[[int, int], bool], layers: int, budget: int, costs=None) -> frozenset[int]:
    """The set behind cell (layers, budget): follow the choices from the last layer to the first."""
    chosen, j = set(), budget
    for i in range(layers, 0, -1):
        if skipped(i, j):
            chosen.add(i - 1)
            j -= costs[i - 1] if costs else 1
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


def layer_count(states: Tensor, budget: int, smallest: int = 0, costs: Sequence[int] | None = None) -> int:
    """L, after checking that ``smallest`` to ``budget`` of L layers can be skipped."""
    layers = len(states) - 1
    if costs is not None and (len(costs) != layers or min(costs) < 1):
        raise ValueError(f"{layers} layers need as many costs, of at least 1, not {list(costs)}")
    if layers < 1 or not 0 <= smallest <= budget <= sum(costs or [1] * layers):
        raise ValueError(f"cannot skip {f'{smallest} to ' * bool(smallest)}{budget} of {layers} layers")
    return layers
