"""A page that shows a run: what was drafted, checked, kept and timed, and each table of the DP.

    python generate.py --trace run.html --compare

``Traced`` is a drafter around a drafter. It passes all calls on and notes what goes in and out, so
that neither the loop nor the drafter knows of it, and nothing is slower where it is not used. What
passes no drafter is made up for when the text is finished (``record``), from what was kept:

    the DP's tables       the same call again, on the same states, with a measure that takes notes
    p of a draft token    one pass of the whole model over the text
    the drawn numbers     the random generator again, from its state before each check

The page is trace.html with the record in it as JSON: one file, which needs no network.
"""
import json
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dp_skip import Measure, cosines, distances, relative_distances, select_layers
from extras.auto import Auto
from speculative import Draft, Drafter, Outcome, Text, as_row, clock, distribution, optimize

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "RECORD_OF_THE_RUN"           # in the template, once: where the record goes
ROWS = 128                            # of the pass that computes p: the text goes in pieces
CONTEXT = 16                          # tokens before a draft that its text may depend on


class DPRun(NamedTuple):
    """A run of the DP, with all that is needed to run it again."""
    cycle: int                        # that came after it
    new_tokens: int                   # that there were
    length: int                       # of the cache
    hidden: Tensor                    # (L+1, T, hidden size)
    skip: frozenset[int]              # what the drafter made of it
    smallest: int                     # it was for the budgets from this
    budget: int                       # to this
    measure: Measure


@dataclass
class Cycle:
    """A draft, and what came of it."""
    start: int                        # tokens of the text before it
    draft: Draft
    q: list[float]                    # of each draft token; [] when greedy
    ends: list[float]                 # seconds from the draft's begin until each token was there
    rng: Tensor | None                # the generator's state before the check
    seconds: dict[str, float] | None = None            # see ``Outcome``; None: not yet checked


class Traced(Drafter):
    """Proposes what another drafter proposes, and keeps a record."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.scratch = drafter.scratch
        self.cycles: list[Cycle] = []

    def begin(self, text: Text, hidden: Tensor | None):
        self.text = text
        self.cycles = []
        self.dp_runs: list[DPRun] = []
        self.recent = deque(maxlen=getattr(self.drafter, "opt_tokens", 1))      # states, as Clasp's
        self.now = clock(text.model)
        self.times = []                                # when each token of a draft was chosen
        choose = text.choose

        def noted(logits: Tensor):
            chosen = choose(logits)
            self.times.append(self.now())
            return chosen

        text.choose = noted                            # a drafter calls it for each token
        self.drafter.begin(text, hidden)
        self.note_dp(hidden)

    def propose(self, text: Text, most: int) -> Draft:
        self.times.clear()
        begin = self.now()
        draft = self.drafter.propose(text, most)
        q = []
        state = None
        if text.temperature > 0 and draft.tokens:
            q = [float(q[token]) for token, q in zip(draft.tokens, draft.distributions)]
            state = text.rng.get_state()
        kept = draft._replace(distributions=[])        # they would fill the memory
        ends = [time - begin for time in self.times]
        self.cycles.append(Cycle(len(text.tokens), kept, q, ends, state))
        return draft

    def observe(self, text: Text, outcome: Outcome):
        self.cycles[-1].seconds = outcome.seconds
        self.drafter.observe(text, outcome)
        self.note_dp(outcome.hidden)

    def note_dp(self, hidden: Tensor | None):
        """Note the DP if the drafter has just run it."""
        if hidden is None:
            return
        text = self.text
        self.recent.append(hidden)
        if text.stats.optimizations > len(self.dp_runs):
            tokens, *call = self.dp_call(text)
            states = torch.cat(tuple(self.recent), 1)[:, -tokens:].clone()
            skip = text.stats.skip_sets[-1][1]
            self.dp_runs.append(DPRun(
                len(self.cycles), text.stats.new_tokens, text.cache.length, states, skip, *call))

    def dp_call(self, text: Text) -> tuple[int, int, int, Measure]:
        """How the drafter called the DP: tokens T, smallest budget, largest budget, measure."""
        drafter = self.drafter
        if isinstance(drafter, Auto):
            budgets = drafter.skipping.sets
            return 1, min(budgets), max(budgets), distances
        tokens = min(drafter.opt_tokens, text.cache.rows // max(drafter.budget, 1))
        measure = distances if drafter.opt_tokens == 1 else relative_distances
        return tokens, drafter.budget, drafter.budget, measure


# ---------------------------------------------------------------------------- after the text

@torch.inference_mode()
def record(traced: Traced, tokenizer, plain: list[float], about: str) -> dict:
    """All that the page shows, as JSON. This spoils the cache: call it when the text is done.

    plain: seconds from its begin until plain decoding had each token; [] if it was not timed.
    about: what the page says of the run. tokenizer: see checkpoint.Tokenizer.
    """
    text = traced.text
    prompt, new = text.tokens[:-text.stats.new_tokens], text.stats.tokens
    cycles = [cycle for cycle in traced.cycles if cycle.start < len(text.tokens)]
    cycles[-1].seconds = cycles[-1].seconds or dict(text.laps)     # the last had no ``observe``
    dp_runs = [run for run in traced.dp_runs if run.cycle < len(cycles)]
    # From the last to the first: a run writes candidates into the cache where later tokens were.
    tables = [dp_record(text, run) for run in reversed(dp_runs)][::-1]
    written = [cycle_record(cycle, text, tokenizer) for cycle in cycles]
    if text.temperature > 0:
        add_chances(written, cycles, text)
    return {
        "about": about,
        "layers": len(text.model.layers),
        "prompt": tokenizer.decode(prompt),
        "ids": new,
        "pieces": pieces(tokenizer, prompt, new),
        "cycles": written,
        "dp": tables,
        "plain": rounded(plain),
    }


def cycle_record(cycle: Cycle, text: Text, tokenizer) -> dict:
    first = cycle.start - len(text.tokens) + text.stats.new_tokens
    sources = text.stats.sources[first:]               # from this cycle on
    accepted = len(list(takewhile(bool, sources[:len(cycle.draft.tokens)])))
    context = text.tokens[max(0, cycle.start - CONTEXT):cycle.start]
    return {
        "first": first,                                # of the new tokens that it wrote
        "count": min(accepted + 1, len(sources)),
        "accepted": accepted,
        "source": cycle.draft.source,
        "draft": cycle.draft.tokens,
        "draft_pieces": pieces(tokenizer, context, cycle.draft.tokens),
        "ends": rounded(cycle.ends),
        "seconds": cycle.seconds,
    }


def add_chances(written: list[dict], cycles: list[Cycle], text: Text):
    """Add p, q and the drawn number u of each draft token that was judged: kept if u < p / q.

    u is what torch.bernoulli draws on a CPU; elsewhere it is left out.
    """
    wanted = {}                                # {position: (the list of p, the token after it)}
    for found, cycle in zip(written, cycles):
        judged = min(found["count"], len(cycle.draft.tokens))
        found["q"] = rounded(cycle.q[:judged])
        found["p"] = []
        if cycle.rng is not None and text.rng.device.type == "cpu":
            again = torch.Generator().set_state(cycle.rng)
            found["u"] = torch.rand(len(cycle.q), generator=again).tolist()[:judged]
        for i in range(judged):
            wanted[cycle.start + i - 1] = found["p"], cycle.draft.tokens[i]
    begin = len(text.tokens) - text.stats.new_tokens - 1
    for start in range(begin, len(text.tokens) - 1, ROWS):
        text.cache.length = start
        states = text.model(as_row(text.model, text.tokens[start:start + ROWS]), text.cache)
        p = distribution(text.model.logits(states[-1])[0], text.temperature, text.top_p)
        for position in sorted(wanted.keys() & set(range(start, start + len(p)))):
            chances, token = wanted[position]
            chances.append(float(p[position - start, token]))


def dp_record(text: Text, run: DPRun) -> dict:
    """The whole table of a run, for all budgets; see ``dp_cells``.

    Rounding may depend on how many cells a call has, and decide between two that all but tie. So
    the cells that counted are from the very call that the drafter made.
    """
    cells = dp_cells(text, run, smallest=0) | dp_cells(text, run, run.smallest)
    layers = range(1, len(run.hidden))
    return {
        "cycle": run.cycle,
        "new_tokens": run.new_tokens,
        "skip": sorted(run.skip),
        "budget": run.budget,
        "tokens": run.hidden.shape[1],
        "by_cosine": run.measure is distances,
        "table": [[cells[i, j] for j in range(1, min(i, run.budget + 1))] for i in layers],
    }


def dp_cells(text: Text, run: DPRun, smallest: int) -> dict[tuple[int, int], list]:
    """``select_layers`` once more, by a measure that writes down what it is asked.

    Of each cell (i, j) that has a choice: is layer i run? Then of its two candidates, layer run
    and layer skipped, the cosines, and the distances that decided.
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
    cells = {}
    for i in range(1, layers + 1):
        columns = range(max(1, smallest - (layers - i)), min(i, run.budget + 1))
        if columns:
            to_run, to_skip = calls.pop(0), calls.pop(0)
            for j, (cosine, apart), (skip_cosine, skip_apart) in zip(columns, to_run, to_skip):
                numbers = rounded([cosine, skip_cosine, apart, skip_apart])
                cells[i, j] = [int(apart <= skip_apart), *numbers]
    return cells


def pieces(tokenizer, before: list[int], tokens: list[int]) -> list[str]:
    """The text that each token adds; "" within a character of several tokens."""
    found = list(tokenizer.stream(before, tokens))
    found[len(tokens) - 1:] = ["".join(found[len(tokens) - 1:])]   # what is left at the end
    return found if tokens else []


def rounded(numbers: list[float]) -> list[float | None]:
    """To five digits; None for what JSON has no number for."""
    return [float(f"{x:.5g}") if isfinite(x) else None for x in numbers]


def page(found: dict) -> str:
    """The page, a whole HTML file, of what ``record`` found."""
    written = json.dumps(found, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, written.replace("<", "\\u003c"))
