"""Fixed sets at their best; and how many drafted tokens any set gets accepted, without decoding.

A greedy text of the whole model is known before it is drafted. So is what becomes of a draft at any
of its places: the tokens up to the first that differs are accepted. ``Written`` drafts at many
places at once, as rows of one pass, which is some ten times faster than decoding.

``best_fixed_set`` is what a set that never changes can reach: the best block of neighbours, the
layers that the DP skips most often, and what a search finds from there. Drafts' first tokens judge
the search, whole drafts its finalists.
"""
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm  # comes with huggingface-hub

from dp_skip import select_layers
from model import KVCache, Llama
from speculative import as_row, measure_of, optimize

AHEAD = 24                    # places drafted at in one pass
TRIALS = 500                  # sets that the search tries
SPACING = 6                   # tokens between the places where it tries them
PARENTS = 6                   # of the best sets so far one is changed
FINALISTS = 8                 # sets that are compared at the end, by whole drafts
COUNTED = 24                  # tokens between the DP's sets that are counted
COUNTED_TOKENS = 8            # states of so many tokens go into each


class Written:
    """A greedy text of the whole model, with the states, keys and values of all its tokens."""

    @torch.inference_mode()
    def __init__(
        self, model: Llama, prompt: list[int], answer: list[int], length: int, opt_tokens: int = 1
    ):
        """length: tokens of a draft. opt_tokens: the most that ``chosen`` is asked to go by."""
        self.model = model
        self.tokens = [*prompt, *answer]
        self.length = length
        self.first = len(prompt) - 1                      # the place of the first draft
        layers = len(model.layers)
        self.scratch = max(AHEAD * length, max(COUNTED_TOKENS, opt_tokens) * layers)
        self.cache = KVCache(model, len(self.tokens), self.scratch)
        states = model(as_row(model, self.tokens), self.cache)
        self.states = torch.stack([state[0] for state in states])     # (L+1, tokens, hidden)
        self.known = {}                                   # accepted, by set and place

    @property
    def places(self) -> range:
        """Of the pending tokens after which a whole draft can be judged."""
        return range(self.first, len(self.tokens) - self.length - 1)

    @torch.inference_mode()
    def accepted(self, skip: frozenset[int], places: list[int], length: int) -> list[int]:
        """How many of ``length`` tokens drafted after each place's are the text's own."""
        model = self.model
        cache = self.cache
        count = len(places)
        place = torch.tensor(places, device=model.device)
        row = torch.arange(count, device=model.device)
        mask = torch.full((count, cache.tokens + count * length), -torch.inf,
                          dtype=cache.cos.dtype, device=model.device)
        before = torch.arange(cache.tokens, device=model.device) < place[:, None]
        mask[:, :cache.tokens].masked_fill_(before, 0)
        tokens = torch.tensor(self.tokens, device=model.device)
        drafted = tokens[place]
        right = torch.ones_like(row, dtype=torch.bool)
        accepted = torch.zeros_like(row)
        for i in range(length):
            slots = cache.tokens + length * row + i       # of each row's own keys and values
            mask = mask.index_put((row, slots), mask.new_zeros(()))   # a new one: see FoldOnce
            drafted = self.draft_token(skip, drafted, place + i, slots, mask)
            right &= drafted == tokens[place + i + 1]
            accepted += right
        return accepted.tolist()

    def draft_token(
        self, skip: frozenset[int], tokens: Tensor, position: Tensor, slots: Tensor, mask: Tensor
    ) -> Tensor:
        """The next token of each draft: (drafts,) -> (drafts,)."""
        cache = self.cache
        cos = cache.cos[position]
        sin = cache.sin[position]
        x = self.model.embed(tokens[None])
        for i, layer in enumerate(self.model.layers):
            if i not in skip:
                x = layer(x, cos, sin, mask, partial(self.store, i, slots, mask.shape[1]))
        return self.model.logits(x)[0].argmax(-1)

    def store(
        self, i: int, slots: Tensor, end: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys = self.cache.keys[i]
        values = self.cache.values[i]
        keys[:, :, slots] = k
        values[:, :, slots] = v
        return keys[:, :, :end], values[:, :, :end]

    @torch.inference_mode()
    def chosen(self, place: int, budget: int, tokens: int) -> frozenset[int] | None:
        """The DP's set before a place, by the last tokens' states, as ``Clasp`` chooses it.

        None where there are no tokens before.
        """
        if place == 0:
            return None
        first = max(0, place - tokens)
        slots = slice(place, place + budget * (place - first))
        covered = self.cache.slots[..., slots, :].clone()
        self.cache.length = place
        select = partial(select_layers, smallest=budget, measure=measure_of(tokens))
        selection = optimize(
            self.model, self.cache, self.states[:, first:place], budget, select)
        self.cache.slots[..., slots, :] = covered
        return selection.skip_sets[-1]

    def walk(self, choose: Callable[[int, int], frozenset[int] | None]) -> tuple[int, int]:
        """Tokens accepted and drafted in decoding this text.

        choose(cycle, place): the layers that the draft after a place leaves out. None: no draft
        there, and so no cycle.
        """
        accepted = 0
        cycles = 0
        place = self.first
        while place in self.places:
            skip = choose(cycles, place)
            if skip is None:
                place += 1
                continue
            if (skip, place) not in self.known:
                ahead = list(self.places[place - self.first:][:AHEAD])
                counts = self.accepted(skip, ahead, self.length)
                self.known |= {(skip, p): count for p, count in zip(ahead, counts)}
            accepted += self.known[skip, place]
            cycles += 1
            place += self.known[skip, place] + 1
        return accepted, cycles * self.length


# ---------------------------------------------------------------------------- shares accepted

def share_accepted(texts: list[Written], skip: frozenset[int]) -> float:
    """By one set for all texts."""
    counts = torch.tensor([text.walk(lambda cycle, place: skip) for text in texts]).sum(0)
    return (counts[0] / counts[1]).item()


def share_accepted_by_dp(texts: list[Written], budget: int, tokens: int, interval: int) -> float:
    """By the set that the DP chooses after the prompt and then every ``interval`` cycles."""
    counts = [text.walk(by_the_dp(text, budget, tokens, interval)) for text in texts]
    accepted, drafted = torch.tensor(counts).sum(0).tolist()
    return accepted / drafted


def by_the_dp(text: Written, budget: int, tokens: int, interval: int) -> Callable:
    """What ``walk`` is to choose by, see ``share_accepted_by_dp``."""
    skip = None

    def choose(cycle: int, place: int) -> frozenset[int] | None:
        nonlocal skip
        if cycle % interval == 0:
            skip = text.chosen(place, budget, tokens)
        return skip

    return choose


# ---------------------------------------------------------------------------- fixed sets

def blocks(layers: int, budget: int) -> Iterator[frozenset[int]]:
    """Every set of neighbours."""
    for first in range(layers - budget + 1):
        yield frozenset(range(first, first + budget))


def most_frequent(texts: list[Written], budget: int) -> frozenset[int]:
    """The layers that the DP skips most often."""
    counts = Counter()
    for text in texts:
        for place in text.places[::COUNTED]:
            counts.update(text.chosen(place, budget, COUNTED_TOKENS))
    return frozenset(i for i, _ in counts.most_common(budget))


def first_tokens_right(texts: list[Written], skip: frozenset[int]) -> float:
    """The share of drafts' first tokens that are right, at places spread over the texts."""
    right = []
    for text in texts:
        places = list(text.places[::SPACING])
        for i in range(0, len(places), AHEAD):
            right += text.accepted(skip, places[i:i + AHEAD], 1)
    return sum(right) / len(right)


def best_fixed_set(
    texts: list[Written], budget: int, seed: int = 0, trials: int | None = None
) -> frozenset[int]:
    """The best set that is found from blocks and the DP's most frequent set on.

    One of the best so far has one or two layers exchanged, ``trials`` times (None: TRIALS).
    """
    trials = TRIALS if trials is None else trials
    layers = range(len(texts[0].model.layers))
    draws = random.Random(seed)
    score = partial(first_tokens_right, texts)
    scores = {skip: score(skip) for skip in blocks(len(layers), budget)}
    likely = most_frequent(texts, budget)
    scores[likely] = score(likely)
    bar = tqdm(range(trials), desc=f"fixed sets of {budget}", leave=False, disable=None)
    for _ in bar:
        best = sorted(scores, key=scores.get, reverse=True)
        changed = set(draws.choice(best[:PARENTS]))
        for _ in range(draws.choice((1, 1, 2))):
            if 0 < len(changed) < len(layers):
                removed = draws.choice(sorted(changed))
                added = draws.choice([i for i in layers if i not in changed])
                changed = changed - {removed} | {added}
        skip = frozenset(changed)
        if skip not in scores:
            scores[skip] = score(skip)
    best = sorted(scores, key=scores.get, reverse=True)
    return max(best[:FINALISTS], key=partial(share_accepted, texts))
