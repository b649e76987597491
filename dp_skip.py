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
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# layer(i, rows): decoder layer i (from 0) on rows (m, dim), each a candidate state of the *same* token,
# none of which may see another. Returns (m, dim).
Layer = Callable[[int, Tensor], Tensor]


class Selection(NamedTuple):
    """For each budget m = 0 .. M, the layers to skip (indices from 0) and the final state's cosine with h_L."""
    skip_sets: list[frozenset[int]]
    cosines: list[float]


def select_layers_plain(layer: Layer, states: Tensor, budget: int) -> Selection:
    """Algorithm 1 as it reads: one layer call per cell. states (L+1, dim): h_0 .. h_L of one token.

    Raises ValueError unless 0 <= budget <= L.
    """
    layers = layer_count(states, budget)
    g, skipped = {(0, 0): states[0]}, {}
    for i in range(1, layers + 1):
        for j in range(min(i, budget) + 1):
            if j == 0:
                g[i, j], skipped[i, j] = states[i], False
            elif j == i:
                g[i, j], skipped[i, j] = states[0], True
            else:
                run, skip = layer(i - 1, g[i - 1, j][None])[0], g[i - 1, j - 1]
                if_run, if_skip = distances(torch.stack((run, skip)), states[i]).tolist()
                skipped[i, j] = if_skip < if_run
                g[i, j] = skip if skipped[i, j] else run
    final = torch.stack([g[layers, m] for m in range(budget + 1)])
    return Selection([walk_back(lambda i, j: skipped[i, j], layers, m) for m in range(budget + 1)],
                     (1 - distances(final, states[-1])).tolist())


def select_layers(layer: Layer, states: Tensor, budget: int) -> Selection:
    """The same in L calls of ``layer``, each on at most ``budget`` rows (§3.6). states (L+1, dim).

    Nothing is read back to the host before the end. Raises ValueError unless 0 <= budget <= L.
    """
    layers = layer_count(states, budget)
    survivors, choices = states[:1], []                       # g(0, 0): (1, dim)
    for i in range(1, layers + 1):
        width = len(survivors)                                # column i-1 holds j = 0 .. width-1
        run = states[i:i + 1] if width == 1 else torch.cat((states[i:i + 1], layer(i - 1, survivors[1:])))
        both = torch.cat((run, survivors))                    # (2 * width, dim)
        distance = distances(both, states[i])
        if_run = F.pad(distance[:width], (0, 1), value=torch.inf)       # j = i cannot have run layer i,
        if_skip = F.pad(distance[width:], (1, 0), value=torch.inf)      # j = 0 cannot have skipped it
        skip = (if_skip < if_run)[:budget + 1]
        choices.append(F.pad(skip, (0, budget + 1 - len(skip))))
        j = torch.arange(len(skip), device=states.device)
        survivors = both[torch.where(skip, width + j - 1, j)]
    table = torch.stack(choices).tolist()                     # (L, M+1) of bool
    return Selection([walk_back(lambda i, j: table[i - 1][j], layers, m) for m in range(budget + 1)],
                     (1 - distances(survivors, states[-1])).tolist())


def walk_back(skipped: Callable[[int, int], bool], layers: int, budget: int) -> frozenset[int]:
    """The set behind cell (layers, budget): follow the choices from the last layer to the first."""
    chosen, j = set(), budget
    for i in range(layers, 0, -1):
        if skipped(i, j):
            chosen.add(i - 1)
            j -= 1
    return frozenset(chosen)


def distances(rows: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each row with one state, in float32: rows (m, dim), target (dim,) -> (m,).

    As |u - v|^2 / 2 of the unit vectors. A few huge entries can bring every cosine within 1e-7 of 1 (a text's
    first token is like that), where float32 has no digits left for a cosine, but for its distance from 1.
    """
    apart = F.normalize(rows.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return (apart.square().sum(-1) / 2).nan_to_num(nan=torch.inf)    # a candidate that overflowed is chosen last


def layer_count(states: Tensor, budget: int) -> int:
    """L, after checking that ``budget`` of L layers can be skipped."""
    layers = len(states) - 1
    if layers < 1 or not 0 <= budget <= layers:
        raise ValueError(f"cannot skip {budget} of {layers} layers")
    return layers
