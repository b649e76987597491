"""How many layers to skip, how far to draft, and whether to draft at all: whatever is fastest.

The paper fixes M, K, the exit threshold and the interval by hand; set badly, they make decoding
slower. But one run of the DP (dp_skip.py) holds the best set for *every* M, and with it how far its
last state lies from the true one,

    d(M) = |u - v|,  u and v the two states scaled to length 1:  d^2 = 2 (1 - cosine).

On the models measured, the share of draft tokens that the whole model rejects is about d itself
(see docs/auto.md). So, with s near 1 and learned from what was accepted,

    a(M) = 1 - s d(M)       the chance that a drafted token is accepted
    E = 1 + a + ... + a^k   tokens expected of a cycle that drafts k
    T = k t(M) + v(k+1)     its time: k draft tokens at t(M) each, and a verify pass of k+1 rows

and M and k are those of the largest E / T. If that is below one token in the time of a plain step,
nothing is drafted. Now and then drafting is tried again: when what the attempt is expected to lose
is at most TRIAL of the time that passed since. While drafting, each token's confidence sharpens the
guess: with P the chance that all tokens so far are accepted, one more is worth its time if
P a >= t(M) E / T, that is, if it brings more than the same time brings on average.

Nothing here looks at what the draft is compared with before that is done, so the output stays the
whole model's. But measured times decide, and another run may decide otherwise. Under sampling a new
Auto with fixed ``costs`` gives the same text again by the same seed.

Read ``Auto`` first, then what it is made of: ``Costs``, ``Rejections``.
"""
import math
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from statistics import median_low

from torch import Tensor

from dp_skip import select_layers
from model import Llama
from speculative import (
    DRAFT_LENGTH,
    NO_DRAFT,
    Draft,
    Drafter,
    Outcome,
    Text,
    draft_by_skipping,
    optimize,
    require,
    require_draft_length,
)

SLOPE = 0.9                   # s before anything is known: 0.7 and 1.0 on the models measured
TRIAL = 0.01                  # of the time without drafts may go into trying whether they pay
SHARE = 0.015                 # of the time, at most, may go into the DP
FIRST_INTERVAL = 16           # cycles between runs of the DP to begin with, and their limits
SHORTEST_INTERVAL = 8
LONGEST_INTERVAL = 512
NEAREST = 1e-2                # no distance counts as less: cosines are rounded

# Times in plain steps, before any is measured. "draft" is a token with nothing skipped, "verify" a
# pass of VERIFY_ROWS rows.
SHAPE = {"draft": 1.0, "plain": 1.0, "verify": 1.2, "optimize": 1.5}
VERIFY_ROWS = 5


@dataclass(frozen=True)
class Choice:
    """Draft ``length`` tokens a cycle without ``budget`` layers; and what is expected of it."""
    budget: int = 0
    length: int = 0
    seconds: float = 0.0      # of a cycle
    rate: float = 0.0         # tokens a second


class Auto(Drafter):
    """Decides all of CLaSp's settings but the longest draft, and whether to draft at all.

    One object may go from text to text, and keeps what it has learned.
    """

    def __init__(
        self,
        model: Llama,
        draft_length: int = DRAFT_LENGTH,
        costs: dict[str, float] | None = None,
    ):
        """draft_length: most tokens of a draft. costs: fixed, see ``Costs``; None: measured."""
        self.layers = len(model.layers)
        require(self.layers > 1, "auto needs a model of at least two layers")
        require_draft_length(draft_length)
        self.draft_length = draft_length
        self.costs = Costs(model, costs)
        self.times = self.costs.current()
        self.rejections = Rejections()
        self.sets: dict[int, frozenset[int]] = {}        # by budget, from the last run of the DP
        self.distance: dict[int, float] = {}             # by budget: d
        self.choice = Choice()
        self.interval = FIRST_INTERVAL                   # cycles between runs of the DP
        self.since = 0                                   # cycles since the last one
        self.allowance = 0.0                             # time that may be lost by trials
        self.trying = False                              # is the next draft a trial?
        self.confidences = []                            # at each token of the present draft
        self.alive = 1.0                                 # chance that all its tokens are right

    # ------------------------------------------------------------------ what the loop asks

    def begin(self, text: Text, hidden: Tensor | None):
        self.costs.one_shape = text.width is not None
        self.choose()
        if hidden is not None and self.dp_is_due():
            self.run_dp(text, hidden[:, -1:])

    def propose(self, text: Text, most: int) -> Draft:
        self.confidences = []
        self.alive = 1.0
        length = min(most, self.choice.length)
        if length == 0 or not (self.pays or self.trying):
            return NO_DRAFT
        skip = self.sets[self.choice.budget]
        self.report(text, skip)
        return draft_by_skipping(text, skip, length, self.is_worth_another)

    def observe(self, text: Text, outcome: Outcome):
        seconds = outcome.seconds
        if self.sets and self.since == 0:                # the DP ran before this cycle
            self.costs.note("optimize", seconds["optimize"])
        self.since += 1
        self.trying = False
        if self.confidences:
            share = self.costs.share(self.choice.budget / self.layers)
            self.costs.note("draft", seconds["draft"] / len(self.confidences), share)
            self.costs.note_verify(seconds["verify"], rows=len(self.confidences) + 1)
            self.learn(outcome.accepted)
            self.choose()
        else:
            self.costs.note("plain", seconds["verify"])
            self.times = self.costs.current()
            self.allowance += TRIAL * self.times["plain"]
        if self.dp_is_due():
            self.run_dp(text, outcome.hidden[:, -1:])

    # ------------------------------------------------------------------ the choice

    @property
    def pays(self) -> bool:
        """Does the choice promise at least plain decoding's rate?"""
        return self.choice.rate * self.times["plain"] >= 1

    def choose(self):
        """The budget and draft length of the highest expected rate."""
        self.times = self.costs.current()
        lengths = range(1, self.draft_length + 1)
        verify_times = self.costs.verify_times([length + 1 for length in lengths], self.times)
        best = Choice()
        for budget in self.sets:
            acceptance = 1 - self.rejection(budget)
            draft_time = self.draft_time(budget)
            tokens = 1.0
            for length, verify_time in zip(lengths, verify_times):
                one_more = acceptance ** length
                if one_more < draft_time * best.rate:        # and so for all that come after it
                    break
                tokens += one_more
                seconds = length * draft_time + verify_time
                if tokens / seconds > best.rate:
                    best = Choice(budget, length, seconds, tokens / seconds)
        self.choice = best

    def rejection(self, budget: int) -> float:
        return self.rejections.chance(budget, self.distance[budget])

    def draft_time(self, budget: int) -> float:
        return self.times["draft"] * self.costs.share(budget / self.layers)

    def is_worth_another(self, confidence: float) -> bool:
        """Is one more draft token worth its time, after one that the draft was so sure of?"""
        budget = self.choice.budget
        distance = self.distance[budget]
        self.confidences.append(confidence)
        self.alive *= 1 - self.rejections.chance_at(confidence, budget, distance)
        gain = self.alive * (1 - self.rejection(budget))
        return gain >= self.draft_time(budget) * self.choice.rate

    def learn(self, accepted: int):
        """Tokens up to the first rejected one; those behind it say nothing."""
        budget = self.choice.budget
        for i, confidence in enumerate(self.confidences[:accepted + 1]):
            self.rejections.note(i == accepted, confidence, budget, self.distance[budget])

    # ------------------------------------------------------------------ the DP

    def dp_is_due(self) -> bool:
        """Should the DP run before the next cycle? While drafts do not pay: for a trial of them."""
        if not self.sets:
            return True
        if self.pays:
            by_share = self.times["optimize"] / (SHARE * self.choice.seconds)
            return self.since > max(self.interval, by_share)
        expected_loss = self.choice.seconds * (1 - self.choice.rate * self.times["plain"])
        expected_loss += self.times["optimize"]
        self.trying = self.allowance >= expected_loss
        if self.trying:
            self.allowance -= expected_loss
        return self.trying

    def run_dp(self, text: Text, hidden: Tensor):
        """Find the best sets of all budgets, or of those around the last choice; then choose."""
        lowest = 1
        highest = self.layers - 1
        if self.pays:
            reach = max(2, self.layers // 8)
            lowest = max(lowest, self.choice.budget - reach)
            highest = min(highest, self.choice.budget + reach)
        select = partial(select_layers, smallest=lowest)
        selection = optimize(text.model, text.cache, hidden, highest, select)

        before = self.sets.get(self.choice.budget)
        self.sets = {len(skip): skip for skip in selection.skip_sets}
        for budget, cosine in zip(self.sets, selection.cosines):
            distance = distance_of(cosine)
            self.distance[budget] = (distance + self.distance.get(budget, distance)) / 2
        if before is not None:
            self.adapt_interval(same=before == self.sets.get(self.choice.budget))
        self.since = 0
        self.choose()
        text.stats.optimizations += 1
        self.report(text, self.sets[self.choice.budget], anew=True)

    def adapt_interval(self, same: bool):
        """Rarer while the set stays, more often when it changes."""
        if same:
            self.interval = min(2 * self.interval, LONGEST_INTERVAL)
        else:
            self.interval = max(self.interval // 2, SHORTEST_INTERVAL)

    def report(self, text: Text, skip: frozenset[int], anew: bool = False):
        """Note the set in the statistics; it may change at any cycle, without a run of the DP."""
        known = text.stats.skip_sets
        if anew or not known or known[-1][1] != skip:
            known.append((text.stats.new_tokens, skip))


def distance_of(cosine: float) -> float:
    """d; at its largest for a state that overflowed."""
    if math.isnan(cosine):
        return 2.0
    return max(NEAREST, max(0.0, 2 - 2 * cosine) ** 0.5)


class Rejections:
    """How often a drafted token is rejected, learned as it comes; what is long past counts less."""

    def __init__(self):
        self.overall = Ratio()
        self.by_budget = defaultdict(Ratio)
        self.by_confidence = defaultdict(Ratio)          # in tenths

    def chance(self, budget: int, distance: float) -> float:
        """Before the token is known.

        What is known of all budgets counts as 10 tokens of this one, the prior SLOPE as 3.
        """
        overall = self.overall.estimate(SLOPE, 3 * distance)
        slope = self.by_budget[budget].estimate(overall, 10 * distance)
        return min(1.0, slope * distance)

    def chance_at(self, confidence: float, budget: int, distance: float) -> float:
        """Once the draft's confidence at it is known; the chance before counts as 2 tokens."""
        prior = self.chance(budget, distance) / distance
        slope = self.by_confidence[tenths(confidence)].estimate(prior, 2 * distance)
        return min(1.0, slope * distance)

    def note(self, rejected: bool, confidence: float, budget: int, distance: float):
        for ratio in (self.overall, self.by_budget[budget], self.by_confidence[tenths(confidence)]):
            ratio.note(int(rejected), distance)


def tenths(confidence: float) -> int:
    return 0 if math.isnan(confidence) else min(int(10 * confidence), 9)


class Ratio:
    """Rejections per unit of distance."""
    KEEP = 0.995

    def __init__(self):
        self.rejected = 0.0
        self.distance = 0.0

    def note(self, rejected: int, distance: float):
        self.rejected = self.KEEP * self.rejected + rejected
        self.distance = self.KEEP * self.distance + distance

    def estimate(self, prior: float, weight: float) -> float:
        """As if ``weight`` of distance had been seen before at the rate ``prior``."""
        return (self.rejected + weight * prior) / (self.distance + weight)


class Costs:
    """Times of a draft token, a plain step, a verify pass and a run of the DP, in any unit.

    Measured ones (``note``) are medians of the last few; until there are any they are guessed from
    the shape. A draft token's time is kept as if nothing were skipped, and scaled by the share of
    the weights that it reads (``share``).
    """
    REMEMBERED = 15
    ENOUGH = 3                # measurements of one size of passes, before they count

    def __init__(self, model: Llama, fixed: dict[str, float] | None = None):
        """fixed: {"draft": .., "plain": .., "verify": .., "optimize": ..} to be used instead."""
        self.fixed = fixed
        self.head_share = head_share(model)
        self.one_shape = False        # plain steps too are passes as wide as those that verify
        self.last = defaultdict(lambda: deque(maxlen=self.REMEMBERED))   # by kind, or (kind, rows)
        self.pace = 1.0               # how slow the machine is now, beside what it was

    def share(self, skipped: float) -> float:
        """Of a plain step's time: a draft token's, with this share of all layers skipped."""
        return self.head_share + (1 - self.head_share) * (1 - skipped)

    def note(self, kind: str, seconds: float, share: float = 1.0):
        """share: of the kind's full price, what ``seconds`` was paid for.

        Only ratios between kinds matter, and they are not all measured at the same time: ``pace``
        follows how fast the machine happens to be, by what a kind took before, and is divided out.
        """
        full_price = seconds / share
        if self.last[kind]:
            slower = full_price / (self.pace * median_low(self.last[kind]))
            self.pace *= min(2.0, max(0.5, slower)) ** 0.2
        self.last[kind].append(full_price / self.pace)

    def note_verify(self, seconds: float, rows: int):
        """A pass of so many rows; in passes of one shape, the price of every pass."""
        self.note("verify" if self.one_shape else ("verify", rows), seconds)

    def verify_times(self, sizes: list[int], times: dict[str, float]) -> list[float]:
        """Of passes of so many rows each, by the passes nearest in size whose time is known.

        Between two sizes on the line through both; a plain step is a pass of 1 row. Past the
        largest, and before any is measured, by the guess of SHAPE (or the fixed times).
        """
        if self.one_shape:
            return [times["verify"]] * len(sizes)
        known = [(1, times["plain"]), *self.known_passes()]
        slope = (times["verify"] - times["plain"]) / (VERIFY_ROWS - 1)
        return [time_between(known, rows, slope) for rows in sizes]

    def known_passes(self) -> list[tuple[int, float]]:
        """(rows, time) of the verify passes measured often enough, in order."""
        if self.fixed:
            return []
        known = [
            (kind[1], median_low(times))
            for kind, times in self.last.items()
            if isinstance(kind, tuple) and len(times) >= self.ENOUGH
        ]
        return sorted(known)

    def current(self) -> dict[str, float]:
        times = dict(self.fixed) if self.fixed else self.measured()
        if self.one_shape:
            times["plain"] = times["verify"]
        return times

    def measured(self) -> dict[str, float]:
        known = {kind: median_low(self.last[kind]) for kind in SHAPE if self.last[kind]}
        steps = [kind for kind in ("draft", "plain", "verify") if kind in known]
        scale = known[steps[0]] / SHAPE[steps[0]] if steps else 1.0
        times = {kind: known.get(kind, guess * scale) for kind, guess in SHAPE.items()}
        # A plain step is rarely measured while drafts pay, but bounded by what is.
        passes = [time for _, time in self.known_passes()]
        times["plain"] = min(times["plain"], times["draft"], *(passes or [times["verify"]]))
        return times


def time_between(known: list[tuple[int, float]], rows: int, slope: float) -> float:
    """On the lines through (rows, time), in order; after the last, on one of this slope."""
    lower, lower_time = known[0]
    for size, time in known[1:]:
        if size >= rows:
            share = (rows - lower) / (size - lower)
            return lower_time + share * (time - lower_time)
        lower, lower_time = size, time
    return lower_time + slope * (rows - lower)


def head_share(model: Llama) -> float:
    """Of the weights that one token reads, the head's share."""
    c = model.config
    head = c.hidden_size * c.vocab_size
    return head / (head + c.num_hidden_layers * c.layer_weights)
