"""The table of a run of the DP, written down: of each cell the two candidates, and which survived.

A drafter keeps only the set that it chose. But the same call again, on the same states, with a
measure that takes notes, gives the whole table. To read the notes one must know in which order
``select_layers`` asks: a DP that is written otherwise has no table here.
"""
from dataclasses import dataclass
from functools import partial
from math import isfinite

from torch import Tensor

from dp_skip import Measure, cosines, distances, select_layers, walk_back
from speculative import Text, optimize


class OtherDPError(Exception):
    """The notes are not those of ``select_layers`` as this file knows it."""


@dataclass
class DPRun:
    """A run of the DP, with all that is needed to run it again."""
    cycle: int                        # that came after it
    new_tokens: int                   # that there were
    length: int                       # of the cache
    chose: int                        # its set's number in ``Stats.skip_sets``
    hidden: Tensor                    # (L+1, T, hidden size)
    smallest: int                     # it was for the budgets from this
    budget: int                       # to this
    measure: Measure


def dp_record(text: Text, run: DPRun) -> dict:
    """The whole table of a run, for all budgets; see ``dp_cells``.

    Rounding may depend on how many cells a call has, and decide between two that all but tie. So
    the cells that counted are from the very call that the drafter made.

    Raises OtherDPError.
    """
    cells = dp_cells(text, run, smallest=0) | dp_cells(text, run, run.smallest)
    layers = range(1, len(run.hidden))
    skip = text.stats.skip_sets[run.chose][1]

    def skipped(i: int, j: int) -> bool:
        return j == i or (j > 0 and cells[i, j][0] == 0)

    if walk_back(skipped, len(layers), len(skip)) != skip:
        raise OtherDPError
    return {
        "cycle": run.cycle,
        "new_tokens": run.new_tokens,
        "skip": sorted(skip),
        "budget": run.budget,
        "tokens": run.hidden.shape[1],
        "by_cosine": run.measure is distances,
        "table": [[cells[i, j] for j in range(1, min(i, run.budget + 1))] for i in layers],
    }


def dp_cells(text: Text, run: DPRun, smallest: int) -> dict[tuple[int, int], list]:
    """``select_layers`` once more, by a measure that writes down what it is asked.

    Of each cell (i, j) that has a choice: is layer i run? Then of its two candidates, layer run
    and layer skipped, the cosines, and the distances that decided. Raises OtherDPError.
    """
    calls = []                                         # of each layer: to run it, to skip it

    def noted(candidates: Tensor, state: Tensor) -> Tensor:
        apart = run.measure(candidates, state)
        calls.append(list(zip(cosines(candidates, state), apart.tolist())))
        return apart

    layers = len(run.hidden) - 1
    text.cache.length = run.length
    select = partial(select_layers, smallest=smallest, measure=noted)
    optimize(text.model, text.cache, run.hidden, run.budget, select)
    cells_of = [[(i, j) for j in range(max(1, smallest - (layers - i)), min(i, run.budget + 1))]
                for i in range(1, layers + 1)]         # of each layer, those that have a choice
    places = [cells for cells in cells_of if cells]
    if [len(call) for call in calls] != [len(cells) for cells in places for _ in range(2)]:
        raise OtherDPError
    found = {}
    for cells, to_run, to_skip in zip(places, calls[::2], calls[1::2]):
        for cell, (cosine, apart), (skip_cosine, skip_apart) in zip(cells, to_run, to_skip):
            numbers = rounded([cosine, skip_cosine, apart, skip_apart])
            found[cell] = [int(apart <= skip_apart), *numbers]
    return found


def rounded(numbers: list[float]) -> list[float | None]:
    """To five digits; None for what JSON has no number for."""
    return [float(f"{x:.5g}") if isfinite(x) else None for x in numbers]
