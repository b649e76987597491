"""What is compared. Each method is a drafter on the one loop, so that only the drafting differs.

    autoregressive   plain decoding, one row a pass: what all are measured against
    clasp            the DP chooses the layers to skip, every few cycles (the paper)
    auto             looks words up, skips layers, or drafts nothing (extras/auto.py)
    best-fixed       the best set of layers that is found beforehand           (fixed.py)
    self-sd          one set of layers, searched for beforehand                (search.py)
    swift            one set of layers, searched for while decoding            (search.py)
    even, random     one set of layers, evenly spaced or at random
    prompt-lookup    drafts what followed the same words before; skips nothing (extras/lookup.py)

All sets have the same size M. Drafts have the same greatest length K; but those of prompt lookup
and auto, which choose it, are at their best with a limit of their own.
"""
import random
from collections.abc import Collection, Iterator
from typing import NamedTuple

from bench.search import SWIFT_TRIALS, Search, Swift, best_fixed, self_sd
from bench.target import Target
from extras.auto import Auto
from extras.lookup import Lookup
from model import Llama
from speculative import Clasp, Drafter, FixedSet, autoregressive, decode, require


class Method(NamedTuple):
    """A way to decode. The drafter goes from text to text, and keeps what it has learned."""
    drafter: Drafter | None       # None: plain decoding
    passes: dict[str, int] = {}   # how wide they are, see ``exact_passes``; {}: as needed

    def tokens(self, model: Llama, prompt: list[int], count: int, **settings) -> Iterator[int]:
        """New tokens, as they come. settings: see ``speculative.new_text``.

        Samples are compared with nothing bit for bit, so their passes are never padded.
        """
        if settings.get("temperature", 0) == 0:
            settings |= self.passes
        if self.drafter is None:
            return autoregressive(model, prompt, count, **settings)
        return decode(model, prompt, count, self.drafter, **settings)


def exact(target: Target, drafter: Drafter | None) -> Method:
    """To the last bit: the greedy text of plain decoding in such passes."""
    return Method(drafter, target.passes)


PLAIN = "autoregressive"          # the name of what all are measured against
UNPADDED = ("auto", "prompt-lookup")


def clasp(target: Target, **changes) -> Method:
    """CLaSp with the target's settings, but for ``changes``; exact to the last bit."""
    return exact(target, Clasp(target.model, **target.settings | changes))


def auto(target: Target) -> Method:
    """Without padding: it saves time, and plain steps are as fast as those it is compared with."""
    settled = Clasp(target.model, **target.settings) if target.suited else None
    return Method(Auto(target.model, clasp=settled))


def lookup(target: Target) -> Method:
    """Without padding, which it would pay for in every cycle that finds nothing to draft."""
    return Method(Lookup())


def fixed(target: Target, skip: Collection[int]) -> Method:
    """One set of layers for everything."""
    drafter = FixedSet(frozenset(skip), target.draft_length, target.settings["exit_threshold"])
    return exact(target, drafter)


def swift(target: Target, seed: int, trials: int = SWIFT_TRIALS) -> Method:
    search = Search(target, seed, trials)
    drafter = Swift(search, target.draft_length, target.settings["exit_threshold"])
    return exact(target, drafter)


def even_set(layers: int, budget: int) -> list[int]:
    return [int((i + 0.5) * layers / budget) for i in range(budget)]


def random_set(layers: int, budget: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(layers), budget)


def new_method(name: str, target: Target, seed: int) -> Method:
    """The method of a name. What is to be searched for beforehand, is."""
    layers = target.layers
    budget = target.settings["skip_layers"]
    match name:
        case "autoregressive":
            return Method(None)
        case "clasp":
            return clasp(target)
        case "auto":
            return auto(target)
        case "best-fixed":
            return fixed(target, best_fixed(target, seed))
        case "self-sd":
            return fixed(target, self_sd(target, seed).best)
        case "swift":
            return swift(target, seed)
        case "even":
            return fixed(target, even_set(layers, budget))
        case "random":
            return fixed(target, random_set(layers, budget, seed))
        case "prompt-lookup":
            return lookup(target)


NAMES = (
    "autoregressive", "clasp", "auto", "best-fixed", "self-sd", "swift", "even", "random",
    "prompt-lookup",
)


def require_known(names: list[str]):
    unknown = sorted(set(names) - set(NAMES))
    require(not unknown, f"unknown methods {', '.join(unknown)}: choose from {', '.join(NAMES)}")


def new_methods(names: list[str], target: Target, seed: int) -> dict[str, Method]:
    """The methods of these names, and plain decoding first."""
    wanted = dict.fromkeys([PLAIN, *names])               # each once, in this order
    return {name: new_method(name, target, seed) for name in wanted}
