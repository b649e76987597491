"""extras/lookup.py: drafts what followed the same words before, and never changes the text."""
import math
import random

import pytest
import torch
from conftest import DEVICE, at_length, random_model, same_bits, tokens_of, valid, width_for
from enumeration import NUCLEUS, error_of_the_induced_distribution
from hypothesis import given
from hypothesis import strategies as st

import extras.lookup
from extras.lookup import LONGEST, WORTH, Lookup
from model import KVCache
from speculative import NO_DRAFT, Outcome, Stats, Text, autoregressive, decode


def new_text(tokens: list[int], temperature=0.0, stop=()) -> Text:
    model = random_model(layers=1)
    cache = KVCache(model, 200)
    rng = torch.Generator(DEVICE).manual_seed(0)
    return Text(model, cache, list(tokens), 200, None, temperature, 1.0, rng, stop, Stats())


def sure(lookup: Lookup) -> Lookup:
    """As if all its guesses had been right so far."""
    lookup.shift = 20.0
    return lookup


def draft(tokens: list[int], length: int = 3, most: int = 100, **settings):
    text = new_text(tokens, **settings)
    lookup = sure(Lookup(length))
    lookup.begin(text, None)
    return lookup.propose(text, most)


# ---------------------------------------------------------------- what it finds

@pytest.mark.parametrize("tokens, expected", [
    ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),               # 1 2 3 stood before
    ([9, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),               # 2 3 did
    ([9, 8, 3, 4, 5, 1, 2, 3], [4, 5, 1]),               # 3 did
    ([3, 7, 1, 2, 3, 6, 2, 3], [6, 2, 3]),               # most recently: 2 3 6, not 3 7
    ([2, 3, 5, 9, 2, 3, 6, 9, 2, 3], [6, 9, 2]),         # twice before: the later one
    ([1, 2, 3, 5, 2, 3, 6, 3, 7, 1, 2, 3], [5, 2, 3]),   # the longest run, though others are later
    ([1, 1], [1, 1, 1]),                                 # a run may overlap what follows it
    ([4, 5, 4, 5], [4, 5, 4]),
    ([7, *range(20), 9, *range(20)], [9, 0, 1]),         # no more than 8 are compared
    ([1, 2, 3], []),                                     # nothing stood before
    ([1], []),
], ids=str)
def test_it_finds_what_followed_the_longest_run_most_recently(tokens, expected):
    assert draft(tokens).tokens == expected


def what_followed(tokens: list[int], length: int) -> list[int]:
    """The same, by looking through the whole text."""
    for run in range(min(LONGEST, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, run - 1, -1):
            if tokens[end - run:end] == tokens[-run:]:
                return (tokens[end:] * length)[:length]
    return []


def check_index(pieces, length):
    """The index grows with the text: at every step it finds what a search would."""
    text = new_text(pieces[0])
    lookup = sure(Lookup(length))
    lookup.begin(text, None)
    for piece in [[], *pieces[1:]]:
        text.tokens.extend(piece)
        assert lookup.propose(text, 100).tokens == what_followed(text.tokens, length)


texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=10)


@given(texts, st.integers(1, 5))
def test_the_index_finds_what_a_search_finds(pieces, length):
    check_index(pieces, length)


@pytest.mark.thorough
@at_length()
@given(texts, st.integers(1, 5))
def test_the_index_finds_what_a_search_finds_at_length(pieces, length):
    check_index(pieces, length)


def test_a_draft_is_no_longer_than_it_may_be():
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert draft(tokens, length=2).tokens == [4, 5]
    assert draft(tokens, length=9, most=1).tokens == [4]
    assert draft(tokens, most=0).tokens == []


def test_a_draft_ends_after_a_stop_token():
    assert draft([1, 2, 3, 4, 5, 6, 1, 2, 3], stop={5}).tokens == [4, 5]
    assert draft([1, 2, 3, 4, 5, 6, 1, 2, 3], stop={4}).tokens == [4]


def test_another_text_starts_with_nothing_known():
    lookup = sure(Lookup())
    for tokens, expected in (([1, 2, 1], [2, 1, 2, 1]), ([5, 1], [])):
        text = new_text(tokens)
        lookup.begin(text, None)
        assert lookup.propose(text, 4).tokens == expected


# ---------------------------------------------------------------- how far it drafts

def test_it_drafts_as_long_as_all_are_likely_right():
    """After a match of 2 tokens, and 3, and 4, ..: the chances multiply."""
    chances = (0.1, 0.8, 0.5, 0.9, 0.2, 0.9, 0.9, 0.9)
    text = new_text([1, 2, 3, 4, 5, 6, 7, 1, 2])
    lookup = Lookup(9)
    lookup.shifts = [math.log(chance / (1 - chance)) for chance in chances]
    lookup.begin(text, None)
    lookup.look(text, 9)
    expected = [*chances[1:], 0.9, 0.9]
    assert lookup.chances() == pytest.approx(expected)
    assert 0.8 * 0.5 * 0.9 > WORTH > 0.8 * 0.5 * 0.9 * 0.2
    assert lookup.propose(text, 9).tokens == [3, 4, 5]


@pytest.mark.parametrize("written, right", [
    ([9], {2: 0}),                                       # not 3, which stood after "1 2"
    ([3, 9], {2: 1, 3: 0}),                              # 3, but not 4, which stood after "1 2 3"
    ([3, 4, 5], {2: 1, 3: 1, 4: 1}),
    ([9, 4, 5], {2: 0}),                                 # what follows a wrong one says nothing
], ids=str)
def test_it_learns_from_what_is_written_whether_drafted_or_not(written, right):
    """Of each length of match, was the guess right?"""
    text = new_text([1, 2, 3, 4, 5, 1, 2])
    lookup = Lookup()
    lookup.begin(text, None)
    lookup.look(text, 9)
    learned = {}
    lookup.learn = learned.__setitem__
    text.tokens.extend(written)
    lookup.observe(text, Outcome(NO_DRAFT, len(written) - 1, None, {}))
    assert learned == right


def test_chances_become_the_shares_that_are_right():
    chance = random.Random(0)
    true = {1: 0.1, 2: 0.3, 5: 0.9, 8: 0.97}
    lookup = Lookup()
    tail = {match: [] for match in true}
    for i in range(20000):
        match = chance.choice(list(true))
        lookup.learn(match, chance.random() < true[match])
        if i > 2000:
            tail[match].append(lookup.chance(match))
    for match, chances in tail.items():
        assert sum(chances) / len(chances) == pytest.approx(true[match], abs=0.03)


def test_what_is_seen_of_one_length_tells_of_the_others():
    """A text that never repeats itself: longer matches are trusted less, before there are any."""
    lookup = Lookup()
    before = lookup.chance(5)
    for _ in range(30):
        lookup.learn(1, False)
    assert lookup.chance(1) < 0.1
    assert lookup.chance(1) < lookup.chance(5) < before


def test_what_it_learned_counts_in_the_next_text():
    """Drafts become longer where guesses were right, shorter where they were not."""
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    lengths = {}
    for right in (0, 1):
        lookup = Lookup()
        for _ in range(20):
            for match in range(2, LONGEST + 1):
                lookup.learn(match, bool(right))
        text = new_text(tokens)
        lookup.begin(text, None)
        lengths[right] = len(lookup.propose(text, 9).tokens)
    assert lengths == {0: 0, 1: 9}


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 5, 1, 2, 3], [1, 2, 3]])
def test_its_distributions_leave_nothing_to_chance(tokens):
    found = draft(tokens, temperature=1.0)
    assert len(found.distributions) == len(found.tokens)
    for token, q in zip(found.tokens, found.distributions):
        assert q.shape == (61,) and q[token] == 1 and q.sum() == 1


# ---------------------------------------------------------------- and the text stays

@pytest.mark.parametrize("settings", [{}, NUCLEUS, {"width": 3}], ids=str)
def test_every_text_has_the_models_own_probability(settings):
    error = error_of_the_induced_distribution(lambda model: Lookup(2), count=4, vocabulary=3,
                                              **settings)
    assert error < 1e-6


def uncertain(tokens, text):
    """As if the draft had been drawn from all tokens alike."""
    size = text.model.config.vocab_size
    return torch.full((len(tokens), size), 1 / size, device=text.model.device)


def another_token(tokens, text):
    """Certain of a token that was not proposed."""
    size = text.model.config.vocab_size
    return exact_one_hot([(token + 1) % size for token in tokens], text)


exact_one_hot = extras.lookup.one_hot


@pytest.mark.parametrize("wrong", [uncertain, another_token])
def test_the_same_test_finds_a_wrong_distribution(monkeypatch, wrong):
    monkeypatch.setattr(extras.lookup, "one_hot", wrong)
    error = error_of_the_induced_distribution(lambda model: Lookup(2), count=4, vocabulary=3)
    assert error > 1e-3


def test_greedy_text_is_plain_decodings_bit_for_bit(any_model):
    prompt = tokens_of(any_model, 6) * 3
    width = width_for(any_model, 5)
    plain = KVCache(any_model, 100, width)
    cache = KVCache(any_model, 100, width)
    stats = Stats()
    expected = list(autoregressive(any_model, prompt, 60, width=width, cache=plain))
    got = list(decode(any_model, prompt, 60, Lookup(4), width=width, cache=cache, stats=stats))
    assert got == expected
    assert same_bits(valid(cache), valid(plain))
    assert stats.drafted > 0 and stats.optimizations == 0


def test_a_text_that_repeats_itself_is_drafted():
    """A tiny greedy model soon goes in circles."""
    stats = Stats()
    list(decode(random_model(vocabulary=13, residual=0.01), [1, 2], 100, Lookup(4), stats=stats))
    assert stats.tau > 2
