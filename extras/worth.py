"""What a draft is worth: the tokens that are expected of it, by the time that it takes.

Drafters that decide whether to draft, and how far (auto.py), learn two things as they go: how often
what they propose is right (``Ratio``), and how long each step takes (``Costs``). From these follows
the best length of a draft (``best_choice``).
"""
import math
from collections import defaultdict, deque
from functools import cached_property
from statistics import median
from typing import NamedTuple

from extras.parallel import over_ranks
from model import Llama

# Times in plain steps, before any is measured. "draft" is a token with nothing skipped, "verify" a
# pass of VERIFY_ROWS rows.
SHAPE = {"draft": 1.0, "plain": 1.0, "verify": 1.2, "optimize": 2.5}
VERIFY_ROWS = 5
RECENT = 9                    # measurements that tell how fast the machine is now
# The n-th measurement moves what is typical by the share max(SMALLEST_STEP, FIRST_STEP / n).
FIRST_STEP = 0.25
SMALLEST_STEP = 0.003


class Choice(NamedTuple):
    """Draft ``length`` tokens: then a cycle brings so many tokens in so many seconds, likely."""
    length: int
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


NOTHING = Choice(0, 0.0, 1.0)


def best_choice(chances: list[float], draft_time: float, pass_times: list[float]) -> Choice:
    """The length of the highest rate, of 1 at least; NOTHING without ``chances``.

    chances: of each token in turn, that it is right if those before it are.
    pass_times: ``[k]`` is the time of the pass that checks k tokens. draft_time: of each of them.

        tokens  = 1 + a1 + a1 a2 + ... + a1 .. ak            of a cycle that drafts k
        seconds = k draft_time + pass_times[k]
    """
    best = NOTHING
    tokens = 1.0
    all_right = 1.0
    for length, chance in enumerate(chances, 1):
        all_right *= chance
        if all_right < draft_time * best.rate:           # and so will all longer ones
            break
        tokens += all_right
        choice = Choice(length, tokens, length * draft_time + pass_times[length])
        if choice.rate > best.rate:
            best = choice
    return best


class Ratio:
    """How much of one thing comes with another, as it is now: what is long past counts less."""
    KEEP = 0.995

    def __init__(self):
        self.part = 0.0
        self.whole = 0.0

    def note(self, part: float, whole: float = 1.0):
        self.part = self.KEEP * self.part + part
        self.whole = self.KEEP * self.whole + whole

    def estimate(self, prior: float, weight: float) -> float:
        """As if ``weight`` of the whole had been seen before at the ratio ``prior``."""
        return (self.part + weight * prior) / (self.whole + weight)


class Costs:
    """Times of a draft token, a pass of the whole model, and a run of the DP, in any unit.

    They are measured (``note``), and until then guessed by SHAPE. A plain step is a pass of one
    row. A draft token's time is kept as if nothing were skipped, and scaled by the share of the
    weights that it reads (``share``).
    """

    def __init__(self, model: Llama, fixed: dict[str, float] | None = None):
        """fixed: {"draft": .., "plain": .., "verify": .., "optimize": ..} to be used instead."""
        self.fixed = fixed is not None
        self.shape = fixed or SHAPE
        self.row = (self.shape["verify"] - self.shape["plain"]) / (VERIFY_ROWS - 1)
        self.head_share = head_share(model)
        self.narrowest = 1            # rows of a plain step: more where passes are padded
        self.typical = {}             # time, by kind (see ``note``)
        self.measured = defaultdict(int)                 # how often, by kind
        self.recent = deque(maxlen=RECENT)               # (kind, time)

    def share(self, skipped: float) -> float:
        """Of a plain step's time: a draft token's, with this share of all layers skipped."""
        return self.head_share + (1 - self.head_share) * (1 - skipped)

    def draft_time(self, skipped: float) -> float:
        """Of a token drafted with this share of all layers skipped."""
        return self.time("draft") * self.share(skipped)

    def note(self, kind: str | int, seconds: float, share: float = 1.0):
        """kind: "draft", "optimize", or the rows of a pass. share: of its full price.

        Only ratios between kinds matter, and they are not all measured at the same time, while a
        shared machine is now faster, now slower. So a price counts as high or low by what the last
        few, of all kinds, took beside what is typical of theirs. What is typical starts as guessed
        and moves by steps of one size up and down, so towards the median, and smaller each time.
        """
        if self.fixed:
            return
        price = seconds / share
        if not self.typical:
            self.typical[kind] = price
        typical = self.time(kind)
        pace = median([price / self.typical[kind] for kind, price in self.recent] or [1.0])
        self.recent.append((kind, price))
        self.measured[kind] += 1
        step = 1 + max(SMALLEST_STEP, FIRST_STEP / self.measured[kind])
        if price > pace * typical:
            typical *= step
        elif price < pace * typical:
            typical /= step
        self.typical[kind] = typical
        self.__dict__.pop("known_passes", None)          # to be computed anew

    def pad_to(self, rows: int):
        """From now on passes have so many rows at least."""
        self.narrowest = rows
        self.__dict__.pop("known_passes", None)          # to be computed anew

    def note_pass(self, rows: int, seconds: float):
        """Of the whole model, with so many tokens; narrow ones are padded."""
        self.note(max(rows, self.narrowest), seconds)

    def time(self, kind: str | int) -> float:
        """Of a "draft" token with nothing skipped, a run of the DP ("optimize"), or a pass."""
        if kind in self.typical:
            return self.typical[kind]
        return self.unit * self.guess(kind)

    @property
    def plain(self) -> float:
        """Of a plain step."""
        return self.known_passes[0][1]

    def guess(self, kind: str | int) -> float:
        """By the shape, in its units."""
        if isinstance(kind, str):
            return self.shape[kind]
        return self.shape["plain"] + (kind - 1) * self.row

    @property
    def unit(self) -> float:
        """How long the shape's 1 takes, by the narrowest pass that was measured, or a draft."""
        sizes = [kind for kind in self.typical if isinstance(kind, int)]
        kind = min(sizes) if sizes else "draft"
        return self.typical[kind] / self.guess(kind) if kind in self.typical else 1.0

    def pass_times(self, most: int) -> list[float]:
        """Of passes that check 0 .. most tokens, so of 1 .. most + 1 rows.

        On the lines through the sizes that were measured; past the largest, on a line as steep as
        the shape's.
        """
        return times_between(self.known_passes, self.row * self.unit, most + 1)

    def row_time(self, most: int) -> float:
        """What one more token adds to a pass that checks some, on average up to ``most``."""
        times = self.pass_times(most)
        return (times[most] - times[1]) / max(1, most - 1)

    @cached_property
    def known_passes(self) -> list[tuple[int, float]]:
        """(rows, time) of a plain step and of the passes that were measured, in order.

        Fewer rows never take longer: what looks so is noise, or was a first pass.
        """
        measured = {kind for kind in self.typical if isinstance(kind, int)}
        sizes = sorted({self.narrowest, *(rows for rows in measured if rows > self.narrowest)})
        known = []
        bound = math.inf
        for rows in reversed(sizes):
            bound = min(bound, self.time(rows))
            known.append((rows, bound))
        return known[::-1]


def times_between(known: list[tuple[int, float]], row: float, most: int) -> list[float]:
    """At 1 .. most, on the lines through (rows, time), in order; after the last, one this steep.

    Before the first it is as there.
    """
    times = []
    lower, lower_time = known[0]
    left = known[1:]
    for rows in range(1, most + 1):
        if left and left[0][0] < rows:
            lower, lower_time = left.pop(0)
        steep = row
        if left:
            upper, upper_time = left[0]
            steep = (upper_time - lower_time) / (upper - lower)
        times.append(lower_time + steep * max(0, rows - lower))
    return times


def head_share(model: Llama) -> float:
    """Of the weights that one token reads, the head's share."""
    head = model.config.hidden_size * model.config.vocab_size
    return head / (head + weights_of_layers(model))


def weights_of_layers(model: Llama) -> float:
    """Of all layers; of a model that several processes share, all parts together."""
    return model.config.num_hidden_layers * over_ranks(model.config.layer_weights)
