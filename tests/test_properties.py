"""The whole loop under hypothesis: whatever the model, the settings and the draft.

    python -m pytest tests/test_properties.py                                   40 examples each
    python -m pytest tests/test_properties.py -m ""                             and 300 more
    python -m pytest tests/test_properties.py --hypothesis-profile thorough     5,000
"""
import contextlib
import functools
import itertools
from unittest import mock

import pytest
import torch
from conftest import at_length, random_model, same_bits, valid
from hypothesis import assume, event, given
from hypothesis import strategies as st

import extras.exact
import model as model_module
import speculative
from extras.exact import exact_width
from model import KVCache
from speculative import (
    Clasp,
    Draft,
    Stats,
    autoregressive,
    clasp,
    decode,
    full_pass,
    prefill,
)

CONTEXT = 48                  # small, so that the context fills up
VOCABULARY = 13               # and tokens repeat
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def small_model(layers: int, seed: int, dtype: torch.dtype):
    residual = 0.3 + 0.4 * (seed % 2)
    return random_model(layers, VOCABULARY, seed, residual, context=CONTEXT).to(dtype)


@st.composite
def situations(draw):
    """(model, prompt, how many new tokens, clasp's settings, slots in a block)."""
    layers = draw(st.integers(1, 5))
    model = small_model(layers, draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES)))
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))
    room = CONTEXT - len(prompt)
    count = draw(st.sampled_from([1, 2, 7, room - 1, room]) | st.integers(1, room))
    block = draw(st.sampled_from([4, 8, 16, 128]))
    chosen = {
        "skip_layers": draw(st.integers(0, layers - 1)),
        "draft_length": draw(st.integers(1, min(7, block - 1))),
        "exit_threshold": draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)),
        "opt_interval": draw(st.sampled_from([1, 2, 5, 1000])),
        "opt_tokens": draw(st.sampled_from([1, 2, 8, 64])),
    }
    return model, prompt, count, chosen, block


def blocks_of(slots: int):
    """Short texts would all lie in one block: make the blocks small too."""
    stack = contextlib.ExitStack()
    for module in (model_module, extras.exact, speculative):
        stack.enter_context(mock.patch.object(module, "BLOCK", slots))
    return stack


def assert_consistent(stats: Stats, model, count: int, stop, chosen: dict):
    """What must hold of the statistics of a text that came to its end."""
    # The model's own token behind a drafted stop token is dropped.
    dropped = stats.tokens[-1] in stop and stats.from_draft[-1]
    assert stats.accepted + stats.cycles - dropped == stats.new_tokens <= count
    assert len(stats.from_draft) == stats.new_tokens
    assert stats.accepted == sum(stats.from_draft) <= stats.drafted
    assert stats.drafted <= chosen["draft_length"] * stats.cycles
    if chosen["exit_threshold"] == 1:                   # no draft is that sure: it ends at once
        assert stats.drafted <= stats.cycles
    assert stats.optimizations == len(stats.skip_sets) <= stats.cycles
    places = [place for place, _ in stats.skip_sets]
    assert places == sorted(set(places))
    for _, skipped in stats.skip_sets:
        assert len(skipped) == chosen["skip_layers"]
        assert skipped < set(range(len(model.layers)))


# ---------------------------------------------------------------- greedy

class Adversary(Clasp):
    """Drafts right and wrong tokens to order, and spoils the slots behind the cache.

    plain: the text that plain decoding writes. hits: which drafted tokens are right, over and over.
    """

    def __init__(self, model, plain, hits, scratch, **chosen):
        super().__init__(model, **chosen)
        self.plain = plain
        self.hits = hits
        self.scratch = scratch

    def begin(self, text, hidden):
        super().begin(text, hidden)
        self.prompt = text.end - len(self.plain)

    def propose(self, text, most):
        most = min(most, self.draft_length if self.is_sure(0.99) else 1)
        n = text.cache.length
        text.cache.slots[..., n:n + most, :] = self.scratch     # as many as a pass writes anew
        at = len(text.tokens) - self.prompt
        tokens = []
        for i in range(at, at + most):
            right = self.plain[i]
            hit = self.hits[i % len(self.hits)]
            tokens.append(right if hit else (right + 1) % VOCABULARY)
            if tokens[-1] in text.stop:
                break
        scratch_rows = len(tokens) + 1                  # the pass writes those, and no more
        text.cache.slots[..., n + scratch_rows:n + most, :] = 0
        return Draft(tokens, [None] * len(tokens))


def up_to(tokens: list[int], stop) -> list[int]:
    """Tokens up to the first stop token, which is kept."""
    before = list(itertools.takewhile(lambda token: token not in stop, tokens))
    return tokens[:len(before) + 1]


def check_greedy_decoding(situation, data):
    """Text, cache and statistics; also if the caller stops anywhere and goes on."""
    model, prompt, count, chosen, block = situation
    with blocks_of(block):
        width = exact_width(model, chosen["draft_length"] + 1)
        assume(width is not None)
        plain_cache = KVCache(model, CONTEXT, width)
        plain = list(autoregressive(model, prompt, count, width=width, cache=plain_cache))
        stop = set()
        if data.draw(st.booleans(), "stop?"):
            stop = {plain[data.draw(st.integers(0, count - 1), "stop at")]}
        expected = up_to(plain, stop)
        taken = data.draw(st.integers(1, len(expected)), "taken")
        bits = st.lists(st.booleans(), min_size=1, max_size=8)
        hits = data.draw(st.none() | bits, "which drafted tokens are right")
        scratch = data.draw(st.sampled_from([0.0, 1.0, -1e4, torch.nan, torch.inf]), "scratch")

        drafter = Clasp(model, **chosen)
        if hits:
            drafter = Adversary(model, plain, hits, scratch, **chosen)
        stats = Stats()
        cache = KVCache(model, CONTEXT, width)
        settings = {"width": width, "stop": stop, "cache": cache}
        got = []
        written = decode(model, prompt, count, drafter, stats=stats, **settings)
        for token in itertools.islice(written, taken):
            got.append(token)
            assert cache.length == len(prompt) + len(got) - 1
        assert got == expected[:taken]
        assert same_bits(valid(cache), valid(plain_cache, cache.length))
        if taken == len(expected):
            assert_consistent(stats, model, count, stop, chosen)
            event("ended by a stop token" if stop else "ended by the length")
        else:                                           # stopped half-way: go on with the cache
            event("taken up again")
            rest = clasp(model, [*prompt, *got], count - taken, **settings, **chosen)
            assert got + list(rest) == expected
            assert same_bits(valid(cache), valid(plain_cache, cache.length))


@given(situations(), st.data())
def test_greedy_decoding_is_plain_decoding(situation, data):
    check_greedy_decoding(situation, data)


@pytest.mark.thorough
@at_length()
@given(situations(), st.data())
def test_greedy_decoding_is_plain_decoding_at_length(situation, data):
    check_greedy_decoding(situation, data)


# ---------------------------------------------------------------- sampled

samplings = st.fixed_dictionaries({
    "temperature": st.floats(0.2, 2),
    "top_p": st.sampled_from([1.0, 0.9, 0.3]),
    "seed": st.integers(0, 1000),
})


def check_sampling(situation, sampling):
    """The tokens are chance; the cache is what plain decoding of those tokens computes."""
    model, prompt, count, chosen, block = situation
    with blocks_of(block):
        width = exact_width(model, chosen["draft_length"] + 1)
        assume(width is not None)
        stats = Stats()
        cache = KVCache(model, CONTEXT, width)
        plain = KVCache(model, CONTEXT, width)
        written = clasp(model, prompt, count, width=width, cache=cache, stats=stats,
                        **sampling, **chosen)
        tokens = list(written)
        prefill(model, plain, prompt[:-1])
        for token in [prompt[-1], *tokens[:-1]]:
            full_pass(model, plain, [token], width)
        assert len(tokens) == count
        assert cache.length == plain.length == len(prompt) + count - 1
        assert same_bits(valid(cache), valid(plain))
        assert_consistent(stats, model, count, set(), chosen)


@given(situations(), samplings)
def test_sampling_leaves_the_cache_of_plain_decoding(situation, sampling):
    check_sampling(situation, sampling)


@pytest.mark.thorough
@at_length()
@given(situations(), samplings)
def test_sampling_leaves_the_cache_of_plain_decoding_at_length(situation, sampling):
    check_sampling(situation, sampling)
