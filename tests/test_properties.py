"""The whole loop under hypothesis: whatever the model, the settings and the draft, plain decoding's tokens and cache.

    python -m pytest tests/test_properties.py                                    300 examples of each property
    python -m pytest tests/test_properties.py --hypothesis-profile thorough      5,000
"""
import contextlib
import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import exact as exact_module
import model as model_module
import speculative
from conftest import BUNDLED, DEVICE, random_model
from model import KVCache, load_model
from exact import exact_width, full_pass
from speculative import Stats, autoregressive, clasp, prefill

CONTEXT, VOCABULARY = 48, 13                # small, so that the context fills up and tokens repeat
small_model = functools.cache(lambda layers, seed, dtype: random_model(
    layers, VOCABULARY, seed, residual=0.3 + 0.4 * (seed % 2), context=CONTEXT).to(dtype))


@st.composite
def situations(draw):
    """(model, prompt, how many new tokens, clasp's settings, slots in a block)."""
    layers = draw(st.integers(1, 5))
    model = small_model(layers, draw(st.integers(0, 3)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))
    room = CONTEXT - len(prompt)
    count = draw(st.sampled_from([1, 2, 7, room - 1, room]) | st.integers(1, room))
    block = draw(st.sampled_from([4, 8, 16, 128]))
    return model, prompt, count, dict(
        skip_layers=draw(st.integers(0, layers - 1)), draft_length=draw(st.integers(1, min(7, block - 1))),
        exit_threshold=draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)),
        opt_interval=draw(st.sampled_from([1, 2, 5, 10**9]))), block


def blocks_of(slots):
    """Short texts would all lie in one block: make the blocks small too."""
    stack = contextlib.ExitStack()
    for module in (model_module, exact_module, speculative):
        stack.enter_context(mock.patch.object(module, "BLOCK", slots))
    return stack


def valid(cache, length):
    return torch.stack(cache.keys)[..., :length, :], torch.stack(cache.values)[..., :length, :]


def same_bits(a, b):
    """Stricter than equality, for which 0 is -0."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b))


def consistent(stats, model, count, stop, *, skip_layers, draft_length, exit_threshold, **_):
    """What must hold of the statistics of a text that came to its end."""
    stopped_by_draft = stats.tokens[-1] in stop and stats.from_draft[-1]        # then the verifier's own token is dropped
    assert stats.accepted + stats.cycles - stopped_by_draft == stats.new_tokens == len(stats.from_draft) <= count
    assert stats.accepted == sum(stats.from_draft) <= stats.drafted <= draft_length * stats.cycles
    assert stats.optimizations == len(stats.skip_sets) <= stats.cycles
    assert all(len(s) == skip_layers and s < set(range(len(model.layers))) for _, s in stats.skip_sets)
    assert [at for at, _ in stats.skip_sets] == sorted({at for at, _ in stats.skip_sets})
    assert stats.seconds == pytest.approx(stats.draft_seconds + stats.verify_seconds + stats.optimize_seconds)
    if exit_threshold == 1:                             # no draft is that sure: it ends after one token
        assert stats.drafted <= stats.cycles


@given(situations(), st.data())
def test_greedy_decoding_is_plain_decoding(situation, data):
    model, prompt, count, chosen, slots = situation
    with blocks_of(slots):
        width = exact_width(model, chosen["draft_length"] + 1)
        plain_cache = KVCache(model, CONTEXT, width)
        plain = list(autoregressive(model, prompt, count, width=width, cache=plain_cache))
        stop = {plain[data.draw(st.integers(0, count - 1), "stop at")]} if data.draw(st.booleans(), "stop?") else set()
        expected = list(itertools.takewhile(lambda t: t not in stop, plain))
        expected = plain[:len(expected) + 1]
        hits = data.draw(st.none() | st.lists(st.booleans(), min_size=1, max_size=8), "which drafted tokens are right")
        scratch = data.draw(st.sampled_from([0.0, 1.0, -1e4, torch.nan, torch.inf]), "left in the cache by the draft")

        def adversary(model, cache, token, skip, length, go_on, choose, stop):
            """Drafts right and wrong tokens to order, and spoils the slots behind the cache."""
            at, tokens = cache.length - len(prompt) + 1, []
            for x in cache.keys + cache.values:         # as many as a draft writes: the pass writes them anew
                x[:, :, cache.length:cache.length + length] = scratch
            for i in range(length if go_on(0.99) else min(1, length)):
                right = plain[at + i]
                tokens.append(right if hits[(at + i) % len(hits)] else (right + 1) % VOCABULARY)
                if tokens[-1] in stop:
                    break
            return tokens, [None] * len(tokens)

        taken = data.draw(st.integers(1, len(expected)), "taken")
        stats, cache, got = Stats(), KVCache(model, CONTEXT, width), []
        with mock.patch.object(speculative, "draft", adversary if hits else speculative.draft):
            for token in itertools.islice(clasp(model, prompt, count, stop=stop, stats=stats, cache=cache, **chosen), taken):
                got.append(token)
                assert cache.length == len(prompt) + len(got) - 1
        assert got == expected[:taken]
        assert same_bits(valid(cache, cache.length), valid(plain_cache, cache.length))
        if taken == len(expected):
            consistent(stats, model, count, stop, **chosen)
            event(f"ended by {'the stop token, from the ' + ('draft' if stats.from_draft[-1] else 'verifier') if stop else 'length'}")
        else:                                           # stopped half-way: go on with the same cache
            event("taken up again")
            rest = list(clasp(model, [*prompt, *got], count - taken, stop=stop, cache=cache, **chosen))
            assert got + rest == expected
            assert same_bits(valid(cache, cache.length), valid(plain_cache, cache.length))


@given(situations(), st.floats(0.2, 2), st.sampled_from([1.0, 0.9, 0.3]), st.integers(0, 1000))
def test_sampling_leaves_the_cache_of_plain_decoding(situation, temperature, top_p, seed):
    """The tokens are chance; the cache must be what plain decoding of those very tokens computes."""
    model, prompt, count, chosen, slots = situation
    with blocks_of(slots):
        width = exact_width(model, chosen["draft_length"] + 1)
        stats, cache, plain = Stats(), KVCache(model, CONTEXT, width), KVCache(model, CONTEXT, width)
        tokens = list(clasp(model, prompt, count, temperature=temperature, top_p=top_p, seed=seed, stats=stats, cache=cache, **chosen))
        prefill(model, plain, prompt[:-1])
        for token in [prompt[-1], *tokens[:-1]]:
            full_pass(model, plain, [token], width)
        assert len(tokens) == count and cache.length == plain.length == len(prompt) + count - 1
        assert same_bits(valid(cache, cache.length), valid(plain, cache.length))
        consistent(stats, model, count, set(), **chosen)


def test_the_bundled_model_is_exact_in_every_precision_and_across_blocks():
    """Long enough to pass from one block of the cache to the next; greedy text, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_model(BUNDLED, DEVICE, dtype)
        plain, cache = KVCache(model, 300, 8), KVCache(model, 300, 8)
        expected = list(autoregressive(model, [5, 6, 7], 280, width=5, cache=plain))
        assert list(clasp(model, [5, 6, 7], 280, skip_layers=17, draft_length=4, cache=cache)) == expected
        assert same_bits(valid(cache, cache.length), valid(plain, plain.length))
