"""bench/fixed.py: what a set of layers gets accepted, told without decoding."""
import pytest
from conftest import random_model, tokens_of

from bench.fixed import (
    Written,
    best_fixed_set,
    blocks,
    by_the_dp,
    first_tokens_right,
    most_frequent,
    share_accepted,
    share_accepted_by_dp,
)
from extras.packed import pack
from speculative import Clasp, FixedSet, Stats, autoregressive, decode

LENGTH = 3
PROMPT = 12
MOST_TOKENS = 60              # more than the scratch of a draft at many places has room for


@pytest.fixture(scope="module", params=[False, True], ids=["as loaded", "packed"])
def model(request):
    """Packed, as the bench has it, a model takes another form of attention."""
    model = random_model(layers=8)
    return pack(model) if request.param else model


def written(model, seed: int, tokens: int = 60, prompt_tokens: int = PROMPT) -> Written:
    prompt = tokens_of(model, prompt_tokens, seed)
    answer = list(autoregressive(model, prompt, tokens))
    return Written(model, prompt, answer, LENGTH, opt_tokens=MOST_TOKENS)


@pytest.fixture(scope="module")
def texts(model) -> list[Written]:
    return [written(model, seed) for seed in range(3)]


def accepted_by_cycle(model, text: Written, drafter) -> list[int]:
    """Of each cycle of real decoding that drafted in full."""
    counts = []
    observe = drafter.observe

    def noted(text, outcome):
        counts.append(outcome.accepted)
        observe(text, outcome)

    drafter.observe = noted
    prompt = text.tokens[:text.first + 1]
    stats = Stats()
    assert [*prompt, *decode(model, prompt, 60, drafter, stats=stats)] == text.tokens
    return counts


def walked(text: Written, choose) -> list[int]:
    """Accepted tokens of each cycle, as ``walk`` counts them."""
    places = []

    def noted(cycle: int, place: int):
        places.append(place)
        return choose(cycle, place)

    text.walk(noted)
    return [later - place - 1 for place, later in zip(places, places[1:])]


@pytest.mark.parametrize("skip", [{2}, {1, 4, 5}, {0, 2, 3, 6, 7}])
def test_a_walk_accepts_what_decoding_accepts(model, texts, skip):
    skip = frozenset(skip)
    for text in texts:
        decoded = accepted_by_cycle(model, text, FixedSet(skip, LENGTH))
        counts = walked(text, lambda cycle, place: skip)
        assert len(counts) > 5
        assert counts == decoded[:len(counts)]


@pytest.mark.parametrize("tokens, interval", [(1, 4), (8, 1), (8, 128), (MOST_TOKENS, 4)])
def test_a_walk_by_the_dp_accepts_what_clasp_accepts(model, texts, tokens, interval):
    for text in texts:
        clasp = Clasp(model, 4, LENGTH, opt_interval=interval, opt_tokens=tokens)
        decoded = accepted_by_cycle(model, text, clasp)
        counts = walked(text, by_the_dp(text, 4, tokens, interval))
        assert counts == decoded[:len(counts)]
    share = share_accepted_by_dp(texts, 4, tokens, interval)
    assert 0 <= share <= 1


@pytest.mark.parametrize("tokens, interval", [(1, 4), (8, 128)])
def test_after_a_prompt_of_one_token_the_first_cycle_has_no_draft_in_either(
    model, tokens, interval
):
    text = written(model, seed=1, prompt_tokens=1)
    clasp = Clasp(model, 4, LENGTH, opt_interval=interval, opt_tokens=tokens)
    decoded = accepted_by_cycle(model, text, clasp)
    counts = walked(text, by_the_dp(text, 4, tokens, interval))
    assert decoded[0] == counts[0] == 0
    assert counts == decoded[:len(counts)]
    assert share_accepted_by_dp([text], 4, tokens, interval) > 0


def test_all_is_accepted_of_a_draft_that_skips_nothing(texts):
    assert share_accepted(texts, frozenset()) == 1
    assert first_tokens_right(texts, frozenset()) == 1


def test_blocks_are_all_sets_of_neighbours():
    assert list(blocks(4, 3)) == [{0, 1, 2}, {1, 2, 3}]
    assert len(list(blocks(20, 10))) == 11


def test_the_best_fixed_set_is_better_than_a_block_usually_is(texts):
    best = best_fixed_set(texts, 4, trials=30)
    assert len(best) == 4
    shares = [share_accepted(texts, skip) for skip in blocks(8, 4)]
    assert share_accepted(texts, best) > sum(shares) / len(shares)


def test_the_most_frequent_set_has_its_size(texts):
    assert len(most_frequent(texts, 3)) == 3
