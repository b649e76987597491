"""speculative.py, the loop: greedy text is the whole model's own, whatever is drafted.

Sampling is test_sampling.py's business, drafters have test_drafters.py, and equality to the last
bit is in test_exact.py and test_properties.py.
"""
import itertools

import pytest
import torch
from conftest import DEVICE, all_but, random_model, tokens_of

import speculative
from model import KVCache, ModelError
from speculative import (
    Drafter,
    SettingsError,
    Stats,
    autoregressive,
    clasp,
    decode,
    full_pass,
    prefill,
)

# ---------------------------------------------------------------- greedy text

@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_greedy_equals_plain_decoding(any_model, share):
    layers = len(any_model.layers)
    skip = min(layers - 1, round(share * layers))
    for seed, (draft_length, exit_threshold, opt_interval) in enumerate([
        (1, 0, 1), (4, 0, 3), (6, 0.3, 2), (3, 1, 1000),
    ]):
        prompt = tokens_of(any_model, 1 + 5 * seed, seed)
        expected = list(autoregressive(any_model, prompt, 24))
        stats = Stats()
        got = list(clasp(any_model, prompt, 24, skip_layers=skip, draft_length=draft_length,
                         exit_threshold=exit_threshold, opt_interval=opt_interval, stats=stats))
        assert got == expected == stats.tokens
        assert stats.accepted + stats.cycles == stats.new_tokens == 24


def test_plain_decoding_is_the_models_own_choice(any_model):
    """Held against whole passes without a cache."""
    prompt = tokens_of(any_model, 4)
    text = [*prompt, *autoregressive(any_model, prompt, 12)]
    logits = any_model.logits(any_model(torch.tensor([text], device=DEVICE))[-1])[0]
    assert logits.argmax(-1).tolist()[3:-1] == text[4:]


def test_a_draft_by_the_whole_model_is_always_accepted(any_model):
    stats = Stats()
    prompt = tokens_of(any_model, 9)
    list(clasp(any_model, prompt, 40, skip_layers=0, draft_length=3, stats=stats))
    assert stats.accepted == stats.drafted
    assert stats.tau == 4


def test_without_drafts_it_is_plain_decoding():
    model = random_model()
    stats = Stats()
    got = list(decode(model, [1, 2], 20, Drafter(), stats=stats))
    assert got == list(autoregressive(model, [1, 2], 20))
    assert stats.tau == 1
    assert stats.drafted == stats.accepted == 0


def test_one_token_can_be_asked_for_and_the_context_can_be_filled():
    model = random_model(context=256)
    assert list(clasp(model, [3], 1)) == list(autoregressive(model, [3], 1))
    prompt = tokens_of(model, 200)
    assert list(clasp(model, prompt, 56)) == list(autoregressive(model, prompt, 56))


def test_a_long_prompt_goes_through_in_pieces(monkeypatch):
    model = random_model()
    prompt = tokens_of(model, 100)
    expected = list(autoregressive(model, prompt, 20))
    monkeypatch.setattr(speculative, "PREFILL_ROWS", 7)
    assert list(clasp(model, prompt, 20)) == expected
    assert list(autoregressive(model, prompt, 20)) == expected


# ---------------------------------------------------------------- where a text ends

@pytest.mark.parametrize("skip", [0, 1, 3, 5])           # drafted and accepted, or the verifier's
def test_decoding_ends_after_a_stop_token(skip):
    model = random_model()
    free = list(autoregressive(model, [7, 8], 40))
    for stop in set(free[1:]):
        expected = free[:free.index(stop) + 1]
        stats = Stats()
        written = list(clasp(model, [7, 8], 40, skip_layers=skip, stop={stop}, stats=stats))
        assert written == expected
        assert list(autoregressive(model, [7, 8], 40, stop={stop})) == expected
        assert stats.accepted + stats.cycles - stats.from_draft[-1] == len(expected)


def test_the_caller_may_stop_and_start_again():
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 20))
    for taken in range(1, 8):
        assert list(itertools.islice(clasp(model, [1, 2, 3], 20), taken)) == expected[:taken]
    assert list(clasp(model, [1, 2, 3], 20)) == expected


def test_the_caller_may_go_on_with_the_cache():
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 20))
    for taken in range(1, 8):
        cache = KVCache(model, 23)
        begun = list(itertools.islice(clasp(model, [1, 2, 3], 20, cache=cache), taken))
        assert cache.length == 3 + taken - 1             # all tokens but the pending one
        rest = clasp(model, [1, 2, 3, *begun], 20 - taken, cache=cache)
        assert begun + list(rest) == expected


def test_a_cache_may_hold_the_prompt_or_its_beginning():
    model = random_model()
    prompt = tokens_of(model, 9)
    expected = list(autoregressive(model, prompt, 10))
    for known in (1, 5, 8):
        cache = KVCache(model, 20)
        prefill(model, cache, prompt[:known])
        assert list(clasp(model, prompt, 10, cache=cache)) == expected


# ---------------------------------------------------------------- what the statistics say

def test_statistics_tell_who_wrote_what():
    model = random_model()
    stats = Stats()
    written = list(clasp(model, [1, 2, 3], 40, skip_layers=3, stats=stats))
    assert stats.tokens == written
    assert len(stats.from_draft) == 40
    assert sum(stats.from_draft) == stats.accepted > 0
    assert stats.new_tokens - stats.accepted == stats.cycles
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    assert stats.tau == 40 / stats.cycles


def test_seconds_are_those_of_drafting_verifying_and_choosing_layers():
    model = random_model()
    stats = Stats()
    list(clasp(model, [1, 2, 3], 20, stats=stats))
    parts = [stats.draft_seconds, stats.verify_seconds, stats.optimize_seconds]
    assert stats.seconds == sum(parts)
    assert min(parts) > 0 and stats.prefill_seconds > 0
    plain = Stats()
    list(autoregressive(model, [1, 2, 3], 20, stats=plain))
    assert plain.seconds == plain.verify_seconds > 0
    assert plain.cycles == 20 and plain.tau == 1


def test_what_the_caller_does_between_tokens_is_not_in_the_seconds(monkeypatch):
    """A clock that goes on by one at each reading: the caller's readings do not count."""
    readings = itertools.count()
    monkeypatch.setattr(speculative, "clock", lambda model: lambda: float(next(readings)))
    model = random_model()
    totals = []
    for pause in (0, 1000):
        stats = Stats()
        for _ in clasp(model, [1, 2, 3], 20, stats=stats):
            for _ in range(pause):
                next(readings)
        totals.append(stats.seconds)
    assert totals[0] == totals[1] > 0


# ---------------------------------------------------------------- passes of the whole model

def test_logits_of_a_pass_follow_its_tokens_with_and_without_padding():
    model = random_model()
    text = tokens_of(model, 12)
    expected = model.logits(model(torch.tensor([text], device=DEVICE))[-1])[0, 9:]
    for width in (None, 3, 8):
        cache = KVCache(model, 40, 8)
        prefill(model, cache, text[:9])
        states, logits = full_pass(model, cache, text[9:], width)
        assert cache.length == 12                        # padding does not count
        assert logits.shape == (3, model.config.vocab_size)
        assert torch.allclose(logits, expected, atol=1e-4)
        assert len(states) == len(model.layers) + 1
        assert states[0].shape[1] == (width or 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [clasp, autoregressive])
def test_a_model_that_computes_no_numbers_is_refused(method, value):
    model = random_model()
    model.norm.weight.fill_(value)
    with pytest.raises(ModelError, match="NaN or infinity"):
        next(method(model, [1, 2], 5))
    with pytest.raises(ModelError, match="use float32"):
        next(method(model.to(torch.bfloat16), [1, 2], 5))


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("settings, word", [
    ({"skip_layers": 6}, "fewer than the model's 6"),
    ({"skip_layers": -1}, "at least 0"),
    ({"draft_length": 0}, "draft length"),
    ({"draft_length": 128}, "draft length"),
    ({"exit_threshold": 1.5}, "threshold"),
    ({"exit_threshold": -0.1}, "threshold"),
    ({"opt_interval": 0}, "interval"),
    ({"opt_tokens": 0}, "tokens that layers are chosen by"),
    ({"opt_tokens": 65}, "between 1 and 64"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-7}, "temperature"),
    ({"top_p": 0}, "top-p"),
    ({"top_p": 1.1}, "top-p"),
    ({"seed": -1}, "seed"),
    ({"seed": 2 ** 63}, "seed"),
    ({"prompt": []}, "empty"),
    ({"prompt": torch.tensor([1, 2])}, "token ids, a list of integers"),
    ({"prompt": torch.tensor([[1, 2]])}, "token ids, a list of integers"),
    ({"prompt": "abc"}, "token ids, a list of integers"),
    ({"prompt": [-1]}, "vocabulary"),
    ({"prompt": [61]}, "vocabulary"),
    ({"max_new_tokens": 0}, "new tokens"),
    ({"max_new_tokens": 254}, "context of 256"),
    ({"stats": Stats(tokens=[1])}, "another text"),
    ({"width": 0}, "the width must be at least 1"),
    ({"width": 5, "narrowest": 6}, "the narrowest pass no wider"),
], ids=str)
def test_impossible_settings_are_refused(settings, word):
    settings = {"prompt": [1, 2, 3], "max_new_tokens": 5} | settings
    with pytest.raises(SettingsError, match=word):
        next(clasp(random_model(), **settings))


def test_a_cache_without_room_is_refused():
    model = random_model()
    small = KVCache(model, 128)
    with pytest.raises(SettingsError, match="no room for 130 tokens"):
        next(clasp(model, [1, 2], 128, cache=small))
    with pytest.raises(SettingsError, match="passes of 9 rows"):
        next(clasp(model, [1, 2], 5, cache=small, width=9))
    small.length = 2
    with pytest.raises(SettingsError, match="holds 2 tokens"):
        next(clasp(model, [1, 2], 5, cache=small))


def test_nothing_is_computed_for_what_is_refused(bundled):
    """The first ``next`` raises, before a pass: the cache stays empty."""
    cache = KVCache(bundled, 20)
    context = bundled.config.max_position_embeddings
    skip = all_but(3, bundled)
    with pytest.raises(SettingsError, match="context"):
        next(clasp(bundled, [1, 2], context, skip_layers=skip, cache=cache))
    assert cache.length == 0
