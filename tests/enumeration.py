"""Chance made countable: the exact distribution of what decoding writes, and a test of samples.

``error_of_the_induced_distribution`` walks every path that the draws of decoding can take, on a
model small enough for it, and compares the probability of each text with the whole model's own. A
broken rule of acceptance shows as an error of percents, where a right one leaves 1e-7.
"""
import collections
from collections.abc import Callable, Iterable

import pytest
import torch
from conftest import DEVICE, random_model

from speculative import Clasp, Drafter, decode, distribution

NUCLEUS = {"temperature": 0.7, "top_p": 0.8}
PROMPT = [0, 1, 2]


class Enumerated:
    """Stands in for chance: each draw is a fork, and each path through the forks is walked once.

    ``torch.multinomial`` and ``torch.bernoulli`` ask ``fork`` which way to go. A path's probability
    is the product of those of its turns.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        patch.setattr(torch, "multinomial", self.multinomial)
        patch.setattr(torch, "bernoulli", self.bernoulli)

    def multinomial(self, p: torch.Tensor, count: int, generator) -> torch.Tensor:
        assert count == 1
        return p.new_tensor([self.fork(p.tolist())], dtype=torch.long)

    def bernoulli(self, p: torch.Tensor, generator) -> torch.Tensor:
        return p.new_tensor([self.fork([1 - x, x]) for x in p.tolist()])

    def fork(self, weights: list[float]) -> int:
        """Which of the weighted ways this path takes here."""
        total = sum(weights)
        ways = [(i, weight / total) for i, weight in enumerate(weights) if weight > 0]
        if self.step == len(self.path):                # never been here: the first way
            self.path.append(0)
            self.ways.append(len(ways))
        choice, probability = ways[self.path[self.step]]
        self.probability *= probability
        self.step += 1
        return choice

    def distribution(self, run: Callable[[], Iterable[int]]) -> dict[tuple, float]:
        """What ``run()`` returns, with the probability of each outcome."""
        outcomes = collections.Counter()
        self.path = []                                 # the way taken at each fork
        self.ways = []                                 # how many there are at each
        while True:
            self.step = 0
            self.probability = 1.0
            outcome = tuple(run())
            outcomes[outcome] += self.probability
            while self.path and self.path[-1] == self.ways[-1] - 1:
                self.path.pop()                        # back to the last fork with a way untried
                self.ways.pop()
            if not self.path:
                return outcomes
            self.path[-1] += 1


def own_distribution(model, prompt: list[int], count: int, temperature=1.0, top_p=1.0) -> dict:
    """The model's own distribution over the next tokens, from whole passes without a cache."""
    expected = {(): 1.0}
    for _ in range(count):
        longer = {}
        for tokens, probability in expected.items():
            text = torch.tensor([[*prompt, *tokens]], device=DEVICE)
            logits = model.logits(model(text)[-1])[0, -1]
            for token, p in enumerate(distribution(logits, temperature, top_p).tolist()):
                longer[(*tokens, token)] = probability * p
        expected = longer
    return expected


def usual(model) -> Drafter:
    return Clasp(model, skip_layers=2, draft_length=2)


def error_of_the_induced_distribution(
    new_drafter: Callable[..., Drafter] = usual,
    vocabulary: int = 4,
    count: int = 3,
    temperature: float = 1.0,
    top_p: float = 1.0,
    **settings,
) -> float:
    """Largest error, over all texts of ``count`` tokens, of the probability of writing them.

    new_drafter(model): made anew for each text.
    """
    model = random_model(layers=3, vocabulary=vocabulary, seed=1, residual=1.0, head_scale=0.6)
    chosen = {"temperature": temperature, "top_p": top_p}
    expected = own_distribution(model, PROMPT, count, **chosen)

    def write():
        return decode(model, PROMPT, count, new_drafter(model), **chosen, **settings)

    with pytest.MonkeyPatch.context() as patch:
        induced = Enumerated(patch).distribution(write)
    assert sum(induced.values()) == pytest.approx(1, abs=1e-6)
    error = max(abs(induced.get(text, 0) - p) for text, p in expected.items())
    print(f"largest error {error:.1e}")
    return error


def chi_square_is_plausible(counts: collections.Counter, expected: dict) -> bool:
    """Pearson's test at about 5 standard deviations: never by chance, always for a broken rule."""
    total = sum(counts.values())
    cells = [(counts[key], total * p) for key, p in expected.items() if total * p >= 5]
    rest_seen = total - sum(seen for seen, _ in cells)
    rest_expected = total - sum(wanted for _, wanted in cells)
    if rest_expected >= 5:
        cells.append((rest_seen, rest_expected))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5 + 5
