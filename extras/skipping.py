"""Which layers to skip, and how far to draft without them: CLaSp without settings.

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
is at most TRIAL of the time that passed since. While drafting, each token's confidence tells
whether one more is worth its time (``Stopping``).

Where a model suggests how many layers to skip, CLaSp chooses the sets, and only the length of each
draft is left to be found (``Settled``).
"""
import math
from collections import defaultdict
from functools import partial

from torch import Tensor

from dp_skip import select_layers
from extras.worth import NOTHING, Costs, Ratio, best_choice, weights_of_layers
from model import Llama
from speculative import (
    NO_DRAFT,
    Clasp,
    Draft,
    Drafter,
    Outcome,
    Text,
    draft_by_skipping,
    optimize,
    require_draft_length,
)

SLOPE = 0.9                   # s before anything is known: 0.7 and 1.0 on the models measured
TRIAL = 0.02                  # of the time without drafts may be lost by trying whether they pay;
                              # after one trial that failed half of it, after two a third, and so on
LARGE = 10 ** 9               # weights from which on layers are skipped at once; small models can
                              # seldom spare one
SHARE = 0.015                 # of the time, at most, may go into the DP
FIRST_INTERVAL = 16           # cycles between runs of the DP to begin with, and their limits
SHORTEST_INTERVAL = 8
LONGEST_INTERVAL = 512
RIGHT = 0.65                  # of tokens drafted with known settings, before anything is known,
CYCLES = 3                    # which counts as much as so many cycles
NO_DISTANCE = 1.0             # where none is known: rejections are counted by the token
NEAREST = 1e-2                # no distance counts as less: cosines are rounded


class Skipping(Drafter):
    """Drafts without as many layers, and as far, as gives the most tokens per second, if any do.

    A part of ``Auto``, which decides when it drafts. One object may go from text to text.
    """

    def __init__(self, model: Llama, costs: Costs, draft_length: int):
        """costs: of passes too, which Auto notes. draft_length: most tokens of a draft."""
        require_draft_length(draft_length)
        self.layers = len(model.layers)
        # Should the DP run at once, and not first after many steps, as a trial?
        self.hopeful = weights_of_layers(model) >= LARGE
        self.draft_length = draft_length
        self.costs = costs
        self.stopping = Stopping(SLOPE)
        self.sets: dict[int, frozenset[int]] = {}        # by budget, from the last run of the DP
        self.distance: dict[int, float] = {}             # by budget: d
        self.budget = 0                                  # the best M at present
        self.choice = NOTHING                            # how far to draft, and what that brings
        self.interval = FIRST_INTERVAL                   # cycles between runs of the DP
        self.since = 0                                   # cycles since the last one
        self.dp_ran = False                              # right before the present cycle?
        self.allowance = 0.0                             # time that may be lost by trials
        self.failed = 0                                  # trials since drafts last paid
        self.trying = False                              # is the next draft a trial?

    # ------------------------------------------------------------------ what Auto asks

    def begin(self, text: Text, hidden: Tensor | None):
        self.choose()
        self.dp_ran = False
        if hidden is not None and self.dp_is_due():
            self.run_dp(text, hidden[:, -1:])

    def beats(self, rate: float) -> bool:
        """Should this draft, where something else has the rate? Yes, too, if it is to be tried."""
        return self.trying or self.choice.rate > rate

    def propose(self, text: Text, most: int) -> Draft:
        length = min(most, self.choice.length)
        if length == 0:
            return NO_DRAFT
        skip = self.sets[self.budget]
        self.report(text, skip)
        price = self.draft_time(self.budget) + self.costs.row_time(length)
        self.stopping.begin(self.budget, self.distance[self.budget], price * self.choice.rate)
        return draft_by_skipping(text, skip, length, self.stopping.is_worth_another)

    def observe(self, text: Text, outcome: Outcome):
        seconds = outcome.seconds
        if self.dp_ran:
            self.costs.note("optimize", seconds["optimize"])
            self.dp_ran = False
        self.since += 1
        if outcome.draft.source == "layers":
            share = self.costs.share(self.budget / self.layers)
            self.costs.note("draft", seconds["draft"] / len(outcome.draft.tokens), share)
            self.trying = False
            self.stopping.learn(outcome.accepted)
            self.choose()
        else:
            self.allowance += TRIAL / (1 + self.failed) * self.costs.plain
        if self.dp_is_due():
            self.run_dp(text, outcome.hidden[:, -1:])

    # ------------------------------------------------------------------ the choice

    @property
    def pays(self) -> bool:
        """Does the choice promise at least plain decoding's rate?"""
        return self.choice.rate * self.costs.plain >= 1

    def choose(self):
        """The budget and draft length of the highest expected rate."""
        pass_times = self.costs.pass_times(self.draft_length)
        self.choice = NOTHING
        for budget in self.sets:
            chances = [1 - self.rejection(budget)] * self.draft_length
            choice = best_choice(chances, self.draft_time(budget), pass_times)
            if choice.rate > self.choice.rate:
                self.choice = choice
                self.budget = budget

    def rejection(self, budget: int) -> float:
        return self.stopping.rejections.chance(budget, self.distance[budget])

    def draft_time(self, budget: int) -> float:
        return self.costs.draft_time(budget / self.layers)

    # ------------------------------------------------------------------ the DP

    def dp_is_due(self) -> bool:
        """Should the DP run before the next cycle?"""
        if self.layers == 1:
            return False
        if self.hopeful and not self.sets:
            return True
        if not self.pays:
            return self.begin_trial()
        self.failed = 0
        by_share = self.costs.time("optimize") / (SHARE * self.choice.seconds)
        return self.since > max(self.interval, by_share)

    def begin_trial(self) -> bool:
        """Drafts do not pay: try them in the next cycle, if that may be lost. Is it tried?"""
        expected_loss = self.costs.time("optimize") + self.loss_of_a_draft
        self.trying = self.allowance >= expected_loss
        if self.trying:
            self.allowance -= expected_loss
            self.failed += 1
        return self.trying

    @property
    def loss_of_a_draft(self) -> float:
        """The time by which a cycle takes longer than plain steps for as many tokens."""
        if not self.sets:                                # nothing is known yet
            return self.costs.plain
        return self.choice.seconds - self.choice.tokens * self.costs.plain

    def run_dp(self, text: Text, hidden: Tensor):
        """Find the best sets of all budgets, or of those around the last choice; then choose."""
        lowest = 1
        highest = self.layers - 1
        if self.pays:
            reach = max(2, self.layers // 8)
            lowest = max(lowest, self.budget - reach)
            highest = min(highest, self.budget + reach)
        select = partial(select_layers, smallest=lowest)
        selection = optimize(text.model, text.cache, hidden, highest, select)

        before = self.sets.get(self.budget)
        self.sets = {len(skip): skip for skip in selection.skip_sets}
        for budget, cosine in zip(self.sets, selection.cosines):
            distance = distance_of(cosine)
            self.distance[budget] = (distance + self.distance.get(budget, distance)) / 2
        if before is not None:
            self.adapt_interval(same=before == self.sets.get(self.budget))
        self.since = 0
        self.dp_ran = True
        self.choose()
        text.stats.optimizations += 1
        self.report(text, self.sets[self.budget], anew=True)

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


class Settled(Drafter):
    """CLaSp with settings that are known to suit the model; how far it drafts is found on the way.

    When it drafts is Auto's decision too. Cycles that it does not draft in make what it knows of
    its rate less certain, so that it is tried again.
    """

    def __init__(self, model: Llama, clasp: Clasp, costs: Costs):
        self.clasp = clasp
        self.costs = costs
        self.skipped = clasp.budget / len(model.layers)  # the share of layers
        self.stopping = Stopping(1 - RIGHT)
        self.gain = Ratio()                              # tokens, by plain steps' time for them

    def begin(self, text: Text, hidden: Tensor | None):
        self.clasp.begin(text, hidden)

    def beats(self, rate: float) -> bool:
        return self.rate > rate

    @property
    def rate(self) -> float:
        """Tokens expected per unit of time."""
        longest = self.clasp.draft_length
        pass_times = self.costs.pass_times(longest)
        hoped = best_choice([RIGHT] * longest, self.draft_time, pass_times).rate
        plain = self.costs.plain
        return self.gain.estimate(hoped * plain, CYCLES) / plain

    @property
    def draft_time(self) -> float:
        return self.costs.draft_time(self.skipped)

    def propose(self, text: Text, most: int) -> Draft:
        if self.clasp.skip is None:                      # no states were known to choose it by
            return NO_DRAFT
        longest = self.clasp.draft_length
        price = self.draft_time + self.costs.row_time(longest)
        self.stopping.begin(self.clasp.budget, NO_DISTANCE, price * self.rate)
        return draft_by_skipping(
            text, self.clasp.skip, min(most, longest), self.stopping.is_worth_another)

    def observe(self, text: Text, outcome: Outcome):
        drafted = len(outcome.draft.tokens)
        if drafted and outcome.draft.source == "layers":
            share = self.costs.share(self.skipped)
            self.costs.note("draft", outcome.seconds["draft"] / drafted, share)
            self.stopping.learn(outcome.accepted)
            seconds = drafted * self.draft_time + self.costs.pass_times(drafted)[drafted]
            self.gain.note(outcome.accepted + 1, seconds / self.costs.plain)
        else:
            self.gain.note(0, 0)
        self.clasp.observe(text, outcome)


def distance_of(cosine: float) -> float:
    """d; at its largest for a state that overflowed."""
    if math.isnan(cosine):
        return 2.0
    return max(NEAREST, max(0.0, 2 - 2 * cosine) ** 0.5)


class Stopping:
    """Whether a draft should go on, by how sure it was of its tokens.

    With P the chance that all tokens so far are accepted, and a that of one more, that one is worth
    its time if P a >= its price * the present rate: if it brings more than the same time brings on
    average. Its price is that of a draft token, and of a row of the pass that verifies it.
    """

    def __init__(self, prior: float):
        """prior: rejections per unit of distance, before anything is known."""
        self.rejections = Rejections(prior)

    def begin(self, budget: int, distance: float, least: float):
        """A draft starts. least: what its next token must bring, in tokens."""
        self.budget = budget
        self.distance = distance
        self.least = least
        self.confidences = []                            # at each token
        self.all_right = 1.0                             # chance that all are right

    def is_worth_another(self, confidence: float) -> bool:
        """Is one more worth its time, after one that the draft was so sure of?"""
        at = self.budget, self.distance
        self.confidences.append(confidence)
        self.all_right *= 1 - self.rejections.chance_at(confidence, *at)
        return self.all_right * (1 - self.rejections.chance(*at)) >= self.least

    def learn(self, accepted: int):
        """From tokens up to the first rejected one; those behind it say nothing."""
        for i, confidence in enumerate(self.confidences[:accepted + 1]):
            self.rejections.note(i == accepted, confidence, self.budget, self.distance)


class Rejections:
    """How often a drafted token is rejected, learned as it comes; what is long past counts less."""

    def __init__(self, prior: float):
        """prior: per unit of distance, before anything is known."""
        self.prior = prior
        self.overall = Ratio()
        self.by_budget = defaultdict(Ratio)
        self.by_confidence = defaultdict(Ratio)          # in tenths

    def chance(self, budget: int, distance: float) -> float:
        """Before the token is known.

        What is known of all budgets counts as 10 tokens of this one, the prior as 3.
        """
        overall = self.overall.estimate(self.prior, 3 * distance)
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
