"""How many layers to skip, how far to draft, and whether to draft at all: whatever gives the most tokens per second.

The paper fixes M, K, the exit threshold and the interval by hand; set badly, they make decoding slower. But one run of
the programme (dp_skip.py) holds the best set for *every* M, and with it how far its last state lies from the true one,

    d(M) = |u - v|,  u and v the two states scaled to length 1:  d^2 = 2 (1 - cosine).

On the models measured the share of draft tokens that the whole model rejects is about d itself (README, "Auto"). So

    a(M) = 1 - s d(M)       the chance that a drafted token is accepted, s near 1 and learned from what was accepted
    E = 1 + a + ... + a^k   tokens expected of a cycle that drafts k
    T = k t(M) + v          its time: k draft tokens and a verify pass

and M and k are those of the largest E / T. If that is below 1 / (the time of a plain step), nothing is drafted; now and
then it is tried again, when what the attempt is expected to lose is at most TRIAL of the time that passed since. While
drafting, each token's confidence sharpens the guess: with P the chance that all tokens so far are accepted, one more
is worth its time if P a >= t(M) E / T, that is, if it brings more than the same time brings on average.

Nothing here looks at what the draft is compared with before that is done, so the output stays the whole model's. But
measured times decide, and another run may decide otherwise: under sampling, a new Auto with fixed ``costs`` gives the same
text again by the same seed. (KnapSpec, arXiv 2602.20217, too chooses by expected tokens per unit of time, and skips blocks
of unequal cost.)
"""
import itertools
import math
from collections import defaultdict, deque
from pathlib import Path
from statistics import median_low

import torch
from torch import Tensor

from dp_skip import Selection, select_layers
from model import KVCache, Llama, ModelError, read_json, rope_table
from speculative import clock, optimize

SLOPE = 0.9                   # rejections per unit of d before anything is known: 0.7 and 1.0 on the two models measured
TRIAL = 0.01                  # of the time without drafts may go into trying whether they pay by now
SHARE = 0.015                 # of the time, at most, may go into the programme
SHAPE = {"draft": 1.0, "plain": 1.0, "verify": 1.2, "optimize": 1.5}      # times in plain steps, before any is measured


class Costs:
    """Times of a draft token, a plain step, a verify pass and a run of the programme, in any unit.

    Measured ones (``note``) are medians of the last few; until there are any they are guessed from the shape. A draft
    token's time is kept as if nothing were skipped, and scaled by the share of the weights that it reads (``share``).
    fixed: {"draft": .., "plain": .., "verify": .., "optimize": ..} to be used instead; "draft" with nothing skipped.
    """

    def __init__(self, model: Llama, fixed: dict[str, float] | None = None):
        c = model.config
        layer = c.hidden_size * (2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) + 3 * c.intermediate_size)
        head = c.hidden_size * c.vocab_size
        self.head_share, self.fixed = head / (head + len(model.layers) * layer), fixed
        self.one_shape = False                                 # plain steps too are passes as wide as those that verify
        self.last, self.pace = {kind: deque(maxlen=15) for kind in SHAPE}, 1.0

    def share(self, skipped: float) -> float:
        """Of a plain step's time: a draft token's, with this share of all layers skipped."""
        return self.head_share + (1 - self.head_share) * (1 - skipped)

    def note(self, kind: str, seconds: float, share: float = 1.0):
        """share: of the kind's full price, what ``seconds`` was paid for.

        Only the ratios between kinds matter, and they are not all measured at the same time: ``pace`` follows how fast
        the machine happens to be now, by what a kind took before, and is divided out.
        """
        if self.last[kind]:
            self.pace *= min(2.0, max(0.5, seconds / share / (self.pace * median_low(self.last[kind])))) ** 0.2
        self.last[kind].append(seconds / share / self.pace)

    def current(self) -> dict[str, float]:
        if self.fixed:
            return self.fixed | ({"plain": self.fixed["verify"]} if self.one_shape else {})
        measured = {k: median_low(times) for k, times in self.last.items() if times}
        scale = next((measured[k] / SHAPE[k] for k in ("draft", "plain", "verify") if k in measured), 1.0)
        times = {k: measured.get(k, guess * scale) for k, guess in SHAPE.items()}
        # a plain step is rarely measured while drafts pay, but bounded by what is
        times["plain"] = times["verify"] if self.one_shape else min(times[k] for k in ("plain", "draft", "verify"))
        return times


def read_costs(name: str) -> dict[str, float] | None:
    """Fixed times for ``Costs``: None for "measured", guesses for "shape", else from a JSON file. Raises ModelError."""
    if name in ("measured", "shape"):
        return SHAPE if name == "shape" else None
    costs = read_json(Path(name))
    if costs.keys() != SHAPE.keys() or not all(type(cost) in (int, float) and 0 < cost < math.inf for cost in costs.values()):
        raise ModelError(f"{name} is not measured, shape or a JSON file of a positive number for each of {', '.join(SHAPE)}")
    return costs


class Ratio:
    """Rejections per unit of distance, learned as they come; what is long past counts less."""

    def __init__(self):
        self.rejected, self.distance = 0.0, 0.0

    def note(self, rejected: int, distance: float):
        self.rejected, self.distance = 0.995 * self.rejected + rejected, 0.995 * self.distance + distance

    def estimate(self, prior: float, weight: float) -> float:
        """As if ``weight`` of distance had been seen before at the rate ``prior``."""
        return (self.rejected + weight * prior) / (self.distance + weight)


class Auto:
    """Decides for ``clasp(auto=...)``. One object may go from text to text and keeps what it has learned.

    costs: fixed times, see ``Costs``; None: they are measured.
    """

    def __init__(self, model: Llama, costs: dict[str, float] | None = None):
        self.layers = len(model.layers)
        self.part_costs = (model.block_costs or (1,)) * self.layers
        self.total = sum(self.part_costs)                      # budgets count what is saved: of all layers, this
        self.layer_cost = self.total // self.layers
        self.costs = Costs(model, costs)
        self.times = self.costs.current()
        self.by_budget, self.by_confidence, self.overall = defaultdict(Ratio), defaultdict(Ratio), Ratio()
        self.sets: dict[int, frozenset[int]] = {}              # by budget, from the last run of the programme
        self.distance: dict[int, float] = {}
        self.budget, self.length, self.rate = 0, 0, 0.0        # the choice, and the tokens per time expected of it
        self.longest, self.cycle_time = 1, 0.0                 # most it may draft; time expected of a cycle of that choice
        self.pays, self.trying, self.allowance, self.loss = False, False, 0.0, 0.0     # for trials; expected of the next
        self.interval, self.since = 16, 0                      # between runs of the programme, and since the last: cycles
        self.alive, self.confidences = 1.0, []                 # of the draft: chance that it is right so far

    # -------------------------------------------------------------------- what is expected

    def rejection(self, budget: int) -> float:
        """Chance that a drafted token is rejected, before it is known."""
        distance = self.distance[budget]                       # what is known of all counts as 10 tokens, the prior as 3
        slope = self.by_budget[budget].estimate(self.overall.estimate(SLOPE, 3 * distance), 10 * distance)
        return min(1.0, slope * distance)

    def draft_time(self, budget: int) -> float:
        return self.times["draft"] * self.costs.share(budget / self.total)

    def choose(self):
        """The budget and draft length of the highest expected rate."""
        self.times, self.rate = self.costs.current(), 0.0
        for budget in self.sets:
            accepted, draft, time, tokens = 1 - self.rejection(budget), self.draft_time(budget), self.times["verify"], 1.0
            for length in range(1, self.longest + 1):
                tokens, time = tokens + accepted ** length, time + draft
                if tokens / time > self.rate:
                    self.budget, self.length, self.rate, self.cycle_time = budget, length, tokens / time, time
        self.pays = self.rate * self.times["plain"] >= 1

    # -------------------------------------------------------------------- what clasp asks, in this order in each cycle

    def begin(self, longest: int, exact: bool) -> bool:
        """A new text, with drafts of at most ``longest`` tokens; see ``due``."""
        self.longest, self.costs.one_shape = longest, exact
        self.choose()
        return self.due()

    def due(self) -> bool:
        """Should the programme run before the next cycle?"""
        if not self.sets:
            return True
        if self.pays:
            return self.since >= max(self.interval, self.times["optimize"] / (SHARE * self.cycle_time))
        self.loss = self.times["optimize"] + self.cycle_time * (1 - self.rate * self.times["plain"])
        self.trying = self.allowance >= self.loss
        return self.trying

    def optimize(self, model: Llama, cache: KVCache, hidden: Tensor, highest: int) -> Selection:
        """``speculative.optimize`` for every budget, or those around the last choice; returns the one set now chosen."""
        reach = max(2, self.layers // 8) * self.layer_cost
        low, high = self.layer_cost, highest
        if self.pays:
            low, high = max(low, self.budget - reach), min(high, self.budget + reach)
        selection = optimize(model, cache, hidden, highest, lambda layer, states, _: select_layers(
            layer, states, high, low, model.block_costs and self.part_costs))
        before, self.since = self.sets.get(self.budget), -1    # the cycle is still to come
        self.sets = {sum(self.part_costs[i] for i in skip): skip for skip in selection.skip_sets}
        for budget, cosine in zip(self.sets, selection.cosines):
            distance = 2.0 if math.isnan(cosine) else max(1e-4, 2 - 2 * cosine) ** 0.5       # no less: cosines are rounded
            self.distance[budget] = (distance + self.distance.get(budget, distance)) / 2
        if before is not None:
            self.interval = min(2 * self.interval, 512) if before == self.sets.get(self.budget) else max(8, self.interval // 2)
        self.choose()
        return Selection([self.sets[self.budget]], [selection.cosines[list(self.sets).index(self.budget)]])

    def plan(self) -> tuple[frozenset[int] | None, int]:
        """The layers to skip, None if nothing is known yet, and how many tokens to draft."""
        self.alive, self.confidences = 1.0, []
        return self.sets.get(self.budget), self.length if self.pays or self.trying else 0

    def go_on(self, confidence: float) -> bool:
        """Is another token worth its time, after one that the draft was so sure of?"""
        self.confidences.append(min(int(10 * confidence), 9))
        rejection, distance = self.rejection(self.budget), self.distance[self.budget]
        slope = self.by_confidence[self.confidences[-1]].estimate(rejection / distance, 2 * distance)
        self.alive *= 1 - min(1.0, slope * distance)
        return self.alive * (1 - rejection) >= self.draft_time(self.budget) * self.rate

    def learn(self, accepted: int, optimize_seconds: float, draft_seconds: float, verify_seconds: float) -> bool:
        """What came of the cycle; see ``due`` for the next. Tokens behind the first rejected one say nothing."""
        self.since += 1
        if self.since == 0:
            self.costs.note("optimize", optimize_seconds)
        if self.trying:
            self.allowance, self.trying = self.allowance - self.loss, False
        if not self.confidences:
            self.costs.note("plain", verify_seconds)
            self.times = self.costs.current()
            self.allowance += TRIAL * self.times["plain"]
            self.pays = self.rate * self.times["plain"] >= 1
            return self.due()
        self.costs.note("draft", draft_seconds / len(self.confidences), self.costs.share(self.budget / self.total))
        self.costs.note("verify", verify_seconds)
        for i, confidence in enumerate(self.confidences[:accepted + 1]):
            for ratio in (self.overall, self.by_budget[self.budget], self.by_confidence[confidence]):
                ratio.note(int(i == accepted), self.distance[self.budget])
        self.choose()
        return self.due()


def block_costs(model: Llama, measured: bool = True) -> tuple[int, int]:
    """Whole numbers up to 4 in about the ratio of the times of an attention and an MLP block on one row, for
    ``model.block_costs``; not measured: of their weights."""
    c, like, now = model.config, model.embed.weight, clock(model)
    attention, mlp = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads), 3 * c.intermediate_size
    if measured:
        row, times = torch.ones(1, 1, c.hidden_size, dtype=like.dtype, device=like.device), defaultdict(list)
        cos, sin = rope_table(c, 1, like.device, like.dtype)
        with torch.inference_mode():
            for layer, block in itertools.product(model.layers, ("attention_block", "mlp_block") * 3):
                start = now()
                getattr(layer, block)(row, cos, sin)
                times[block].append(now() - start)
        attention, mlp = (median_low(taken) for taken in times.values())
    return min(itertools.product(range(1, 5), repeat=2), key=lambda pair: abs(math.log(pair[0] * mlp / (pair[1] * attention))))
