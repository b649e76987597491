"""A page that shows a run: what was drafted, checked, kept and timed, and each table of the DP.

    python generate.py --trace run.html --compare

``Traced`` is a drafter around a drafter. It passes all calls on and notes what goes in and out, so
that neither the loop nor the drafter knows of it, and nothing is slower where it is not used. What
passes no drafter is made up for when the text is finished (``record``), from what was kept:

    the DP's tables       see dp_table.py
    p of a draft token    the passes of the whole model again
    the drawn numbers     the random generator again, from its state before each check

The page is trace.html with trace.css and the record in it: one file, which needs no network.
"""
import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from dp_skip import Measure, distances
from extras.dp_table import DPRun, OtherDPError, dp_record, rounded
from extras.skipping import Skipping
from speculative import (
    Clasp,
    Draft,
    Drafter,
    Outcome,
    Text,
    clock,
    distribution,
    full_pass,
    measure_of,
)

TEMPLATE = Path(__file__).with_suffix(".html")
PLACES = ("LOOK_OF_THE_PAGE", "RECORD_OF_THE_RUN")     # in the template, once each
CONTEXT = 16                          # tokens before a draft that its text may depend on


@dataclass
class Cycle:
    """A draft, and what came of it."""
    start: int                        # tokens of the text before it
    draft: Draft
    q: list[float]                    # of each draft token; [] when greedy
    ends: list[float]                 # seconds from the draft's begin until each token was there
    rng: Tensor | None                # the generator's state before the check
    sets: int                         # how many sets had been chosen, in ``Stats.skip_sets``
    seconds: dict[str, float] | None = None            # see ``Outcome``; None: not yet checked


class Traced(Drafter):
    """Proposes what another drafter proposes, and keeps a record."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.scratch = drafter.scratch
        self.cycles: list[Cycle] = []

    def begin(self, text: Text, hidden: Tensor | None):
        self.text = text
        self.prompt_length = len(text.tokens)
        self.cycles = []
        self.dp_runs: list[DPRun] = []
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
        drawn = text.temperature > 0
        q = [float(q[t]) for t, q in zip(draft.tokens, draft.distributions)] if drawn else []
        state = text.rng.get_state() if drawn and draft.tokens else None
        kept = draft._replace(distributions=[])        # they would fill the memory
        ends = [time - begin for time in self.times]
        sets = len(text.stats.skip_sets)
        self.cycles.append(Cycle(len(text.tokens), kept, q, ends, state, sets))
        return draft

    def observe(self, text: Text, outcome: Outcome):
        self.cycles[-1].seconds = dict(outcome.seconds)
        self.drafter.observe(text, outcome)
        self.note_dp(outcome.hidden)

    def note_dp(self, hidden: Tensor | None):
        """Note the DP if the drafter has just run it."""
        text = self.text
        if self.dp_drafter and text.stats.optimizations > len(self.dp_runs):
            chose = len(text.stats.skip_sets) - 1
            self.dp_runs.append(DPRun(
                len(self.cycles), text.stats.new_tokens, text.cache.length, chose,
                *self.dp_call(text, hidden)))

    @property
    def dp_drafter(self) -> Clasp | Skipping | None:
        """Who runs the DP, if anyone: in Auto the part that skips layers, which may be CLaSp."""
        drafter = getattr(self.drafter, "skipping", self.drafter)
        drafter = getattr(drafter, "clasp", drafter)
        return drafter if isinstance(drafter, Clasp | Skipping) else None

    def dp_call(self, text: Text, hidden: Tensor) -> tuple[Tensor, int, int, Measure]:
        """How the drafter called the DP: states, smallest budget, largest budget, measure."""
        drafter = self.dp_drafter
        if isinstance(drafter, Clasp):
            states = drafter.last_states(text.cache).clone()
            return states, drafter.budget, drafter.budget, measure_of(drafter.opt_tokens)
        sets = drafter.sets                            # of one run for several budgets
        return hidden[:, -1:].clone(), min(sets), max(sets), distances


# ---------------------------------------------------------------------------- after the text

@torch.inference_mode()
def record(traced: Traced, tokenizer, plain: list[float], about: str) -> dict:
    """All that the page shows, as JSON. This spoils the cache: call it when the text is done.

    plain: seconds from its begin until plain decoding had each token; [] if it was not timed.
    about: what the page says of the run. tokenizer: see checkpoint.Tokenizer.
    """
    text = traced.text
    prompt = text.tokens[:traced.prompt_length]
    new = text.stats.tokens                # after Ctrl-C text.tokens may hold one more, half noted
    cycles = [cycle for cycle in traced.cycles if cycle.start < len(prompt) + len(new)]
    cycles[-1].seconds = cycles[-1].seconds or dict(text.laps)     # the last had no ``observe``
    dp_runs = [run for run in traced.dp_runs if run.cycle < len(cycles)]
    # From the last to the first: a run writes candidates into the cache where later tokens were.
    try:
        tables = [dp_record(text, run) for run in reversed(dp_runs)][::-1]
    except OtherDPError:
        dp_runs = tables = []
    written = [cycle_record(cycle, text, len(prompt), tokenizer) for cycle in cycles]
    if text.temperature > 0:
        add_chances(written, cycles, text)
    return {
        "about": about,
        "layers": len(text.model.layers),
        "prompt": tokenizer.decode(prompt),
        "ids": new,
        "pieces": pieces(tokenizer, prompt, new),
        "cycles": written,
        "sets": sets_record(text, cycles, dp_runs),
        "dp": tables,
        "plain": rounded(plain),
    }


def sets_record(text: Text, cycles: list[Cycle], dp_runs: list[DPRun]) -> list[dict]:
    """The sets of layers to skip, and for each the number of the DP's run that it is from.

    A run may find sets of several sizes, and the drafter go from one to another without a new one.
    """
    return [
        {
            "new_tokens": new_tokens,
            "skip": sorted(skip),
            "run": sum(run.chose <= i for run in dp_runs) - 1,         # -1: of none on record
        }
        for i, (new_tokens, skip) in enumerate(text.stats.skip_sets[:cycles[-1].sets])
    ]


def cycle_record(cycle: Cycle, text: Text, prompt_length: int, tokenizer) -> dict:
    first = cycle.start - prompt_length
    sources = text.stats.sources[first:text.stats.new_tokens]      # from this cycle on
    accepted = len(list(takewhile(bool, sources[:len(cycle.draft.tokens)])))
    context = text.tokens[max(0, cycle.start - CONTEXT):cycle.start]
    return {
        "first": first,                                # of the new tokens that it wrote
        "count": min(accepted + 1, len(sources)),
        "accepted": accepted,
        "source": cycle.draft.source,
        "set": cycle.sets - 1,                         # by which layers draft; -1: no such set
        "draft": cycle.draft.tokens,
        "draft_pieces": pieces(tokenizer, context, cycle.draft.tokens),
        "ends": rounded(cycle.ends),
        "seconds": cycle.seconds,
    }


def add_chances(written: list[dict], cycles: list[Cycle], text: Text):
    """Add p, q and the drawn number u of each draft token that was judged: kept if u < p / q.

    u is what torch.bernoulli draws on a CPU; elsewhere it is left out. The passes are those of the
    run once more, one by one: others would round p otherwise.
    """
    for found, cycle in zip(written, cycles):
        tokens = [text.tokens[cycle.start - 1], *cycle.draft.tokens]
        text.cache.length = cycle.start - 1
        _, logits = full_pass(text.model, text.cache, tokens, text.pass_width(len(tokens)))
        p = distribution(logits, text.temperature, text.top_p)
        judged = range(min(found["count"], len(cycle.draft.tokens)))
        found["q"] = [cycle.q[i] for i in judged]
        found["p"] = [float(p[i, tokens[i + 1]]) for i in judged]
        if cycle.rng is not None and text.rng.device.type == "cpu":
            again = torch.Generator().set_state(cycle.rng)
            found["u"] = torch.rand(len(cycle.q), generator=again).tolist()[:len(judged)]


def pieces(tokenizer, before: list[int], tokens: list[int]) -> list[str]:
    """The text that each token adds; "" within a character of several tokens."""
    found = list(tokenizer.stream(before, tokens))
    found[len(tokens) - 1:] = ["".join(found[len(tokens) - 1:])]   # what is left at the end
    return found if tokens else []


def page(found: dict) -> str:
    """The page, a whole HTML file, of what ``record`` found."""
    written = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
    text = TEMPLATE.read_text(encoding="utf-8")
    style = TEMPLATE.with_suffix(".css").read_text(encoding="utf-8")
    for place, content in zip(PLACES, (style, written)):
        text = text.replace(place, content)
    return text
