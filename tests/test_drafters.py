"""Drafters: what CLaSp's does as the paper says, and why no drafter can change the text."""
import pytest
import torch
from conftest import DEVICE, feed, model_that_overflows, random_model, tokens_of
from enumeration import NUCLEUS, error_of_the_induced_distribution

import speculative
from model import KVCache
from speculative import (
    Clasp,
    Draft,
    Drafter,
    FixedSet,
    SettingsError,
    Stats,
    Text,
    autoregressive,
    clasp,
    decode,
    distribution,
    draft_by_skipping,
)


def new_text(model, tokens: list[int], count: int = 20, stop=(), **settings) -> Text:
    """A text in the state in which the loop asks for a draft."""
    chosen = {"temperature": 0.0, "top_p": 1.0} | settings
    cache = KVCache(model, len(tokens) + count)
    if tokens[:-1]:
        feed(model, cache, tokens[:-1])
    rng = torch.Generator(DEVICE).manual_seed(0)
    return Text(model, cache, list(tokens), len(tokens) + count, None,
                rng=rng, stop=stop, stats=Stats(), **chosen)


# ---------------------------------------------------------------- drafting without some layers

def draft_logits(model, tokens: list[int], drafted: list[int], skip) -> list[torch.Tensor]:
    """The draft model's logits at the pending token and after each drafted one.

    The keys and values of the text are the whole model's, and those of the draft its own.
    """
    cache = KVCache(model, 40)
    feed(model, cache, tokens[:-1])
    logits = []
    for token in [tokens[-1], *drafted]:
        state = model(torch.tensor([[token]], device=DEVICE), cache, skip)[-1]
        logits.append(model.logits(state)[0, 0])
    return logits


def test_a_greedy_draft_is_the_choice_of_the_layers_that_are_left():
    model = random_model()
    text = new_text(model, [1, 2, 3, 4])
    draft = draft_by_skipping(text, {2, 3}, 6)
    logits = draft_logits(model, text.tokens, draft.tokens, {2, 3})
    assert draft.tokens == [int(row.argmax()) for row in logits[:6]]
    assert draft.distributions == [None] * 6


def test_a_sampled_draft_has_the_distributions_it_was_drawn_from():
    """The draft model's, at the text's temperature and top-p."""
    model = random_model()
    text = new_text(model, [1, 2, 3, 4], temperature=0.5, top_p=0.9)
    draft = draft_by_skipping(text, {2, 3}, 6)
    logits = draft_logits(model, text.tokens, draft.tokens, {2, 3})
    for token, q, row in zip(draft.tokens, draft.distributions, logits):
        assert torch.allclose(q, distribution(row, 0.5, 0.9), atol=1e-5)
        assert q[token] > 0


@pytest.mark.parametrize("temperature, top_p", [(0, 1), (3.0, 0.5)])
def test_a_draft_ends_after_a_token_that_it_is_not_sure_of(temperature, top_p):
    """By its top probability before temperature and top-p; thresholds just below and above each."""
    model = random_model()
    chosen = {"temperature": temperature, "top_p": top_p}
    text = new_text(model, [1, 2, 3, 4], **chosen)
    tokens = draft_by_skipping(text, {2, 3}, 6).tokens
    logits = draft_logits(model, text.tokens, tokens, {2, 3})[:6]
    confidences = [row.softmax(-1).max().item() for row in logits]
    thresholds = [c * factor for c in confidences for factor in (0.999, 1.001)]
    for threshold in thresholds:
        unsure = [i for i, c in enumerate(confidences) if c < threshold]
        expected = tokens[:unsure[0] + 1] if unsure else tokens
        drafter = FixedSet({2, 3}, draft_length=6, exit_threshold=threshold)
        assert drafter.propose(new_text(model, [1, 2, 3, 4], **chosen), 6).tokens == expected


@pytest.mark.parametrize("skip", [{99}, {-1, 2}, range(1, 7)], ids=str)
def test_layers_that_a_model_does_not_have_are_refused(skip):
    with pytest.raises(SettingsError, match="layers to skip lie between 0 and 5, not"):
        list(decode(random_model(layers=6), [1, 2, 3], 5, FixedSet(skip)))


def test_a_draft_ends_after_a_stop_token_and_at_its_length():
    model = random_model()
    tokens = draft_by_skipping(new_text(model, [1, 2, 3, 4]), {2, 3}, 6).tokens
    stop = tokens[2]
    text = new_text(model, [1, 2, 3, 4], stop={stop})
    assert draft_by_skipping(text, {2, 3}, 6).tokens == tokens[:tokens.index(stop) + 1]
    drafter = FixedSet({2, 3}, draft_length=4)
    assert drafter.propose(new_text(model, [1, 2, 3, 4]), 6).tokens == tokens[:4]
    assert drafter.propose(new_text(model, [1, 2, 3, 4]), 2).tokens == tokens[:2]
    assert drafter.propose(new_text(model, [1, 2, 3, 4]), 0).tokens == []


def test_the_confidence_of_a_drafted_stop_token_is_told_too():
    asked = []

    def go_on(confidence):
        asked.append(confidence)
        return True

    model = random_model()
    text = new_text(model, [1, 2, 3, 4], stop=range(61))
    assert len(draft_by_skipping(text, {2}, 3, go_on).tokens) == len(asked) == 1


def test_a_threshold_of_1_drafts_one_token_a_cycle():
    stats = Stats()
    list(clasp(random_model(), [1, 2], 30, draft_length=5, exit_threshold=1, stats=stats))
    assert 0 < stats.drafted <= stats.cycles


# ---------------------------------------------------------------- CLaSp

def test_skip_sets_are_chosen_after_the_prefill_and_every_interval():
    model = random_model()
    stats = Stats()
    list(clasp(model, [1, 2, 3], 60, skip_layers=2, opt_interval=4, stats=stats))
    assert stats.optimizations == len(stats.skip_sets) == 1 + (stats.cycles - 1) // 4
    assert stats.skip_sets[0][0] == 0
    assert all(len(skipped) == 2 for _, skipped in stats.skip_sets)


def test_after_a_prompt_of_one_token_the_set_waits_for_the_first_pass():
    stats = Stats()
    list(clasp(random_model(), [1], 60, skip_layers=2, opt_interval=1000, stats=stats))
    assert stats.skip_sets[0][0] == 1
    assert stats.optimizations == 1
    assert stats.drafted > 0


def test_half_of_the_layers_are_skipped_by_default():
    assert Clasp(random_model(layers=7)).budget == 3


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_the_dp_gets_the_states_of_the_last_tokens(monkeypatch, tokens):
    """Recorded on their way to the DP, and computed anew from the text so far."""
    given = []
    optimize = speculative.optimize

    def recorded(model, cache, hidden, budget, select):
        given.append((cache.length, hidden.clone()))
        return optimize(model, cache, hidden, budget, select)

    monkeypatch.setattr(speculative, "optimize", recorded)
    model = random_model()
    stats = Stats()
    written = clasp(model, [1, 2, 3], 40, skip_layers=3, opt_interval=1, opt_tokens=tokens,
                    stats=stats)
    text = [1, 2, 3, *written]
    assert stats.accepted and len(given) == stats.optimizations == stats.cycles
    assert len({length for length, _ in given}) == stats.cycles
    for length, hidden in given:
        states = model(torch.tensor([text[:length]], device=DEVICE))
        expected = torch.stack([state[0, -tokens:] for state in states])
        assert torch.allclose(hidden, expected, atol=1e-5)


def test_a_cache_with_few_scratch_slots_makes_the_dp_look_at_fewer_tokens():
    model = random_model()
    cache = KVCache(model, 60)                       # 6 slots: two tokens' for 3 layers skipped
    drafter = Clasp(model, skip_layers=3, opt_interval=2, opt_tokens=8)
    written = list(decode(model, [1, 2, 3], 40, drafter, cache=cache))
    assert written == list(autoregressive(model, [1, 2, 3], 40))


def test_one_drafter_may_write_one_text_after_another():
    model = random_model()
    drafter = Clasp(model, skip_layers=3)
    for seed in range(3):
        prompt = tokens_of(model, 1 + seed, seed)
        used = Stats()
        fresh = Stats()
        list(decode(model, prompt, 20, drafter, stats=used))
        list(decode(model, prompt, 20, Clasp(model, skip_layers=3), stats=fresh))
        assert used.tokens == fresh.tokens
        assert used.skip_sets == fresh.skip_sets


@pytest.mark.parametrize("skip", [set(), {2}, {0, 5}, set(range(6))], ids=str)
def test_any_fixed_set_writes_the_models_own_text(skip):
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 30))
    stats = Stats()
    assert list(decode(model, [1, 2, 3], 30, FixedSet(skip), stats=stats)) == expected
    assert stats.drafted > 0 and stats.optimizations == 0


def test_layers_that_overflow_when_others_are_left_out_do_no_harm():
    model = model_that_overflows()
    for width in (None, 8):
        expected = list(autoregressive(model, [1, 2, 3], 30, width=width))
        for settings in ({}, {"exit_threshold": 0.1}):
            cache = KVCache(model, 40, 8)
            drafter = FixedSet({3}, **settings)
            got = list(decode(model, [1, 2, 3], 30, drafter, cache=cache, width=width))
            assert got == expected
            assert cache.slots[..., :cache.length, :].isfinite().all()
        sampled = decode(model, [1, 2, 3], 30, FixedSet({3}), temperature=1.0, width=width)
        assert len(list(sampled)) == 30


# ---------------------------------------------------------------- any drafter at all

class Recorder(Drafter):
    """Notes all that the loop tells it, and drafts by order: some right tokens, some wrong ones."""

    def __init__(self, right: list[int] = (), wrong_from: int = 3):
        self.right = right                  # the text that is known to come
        self.wrong_from = wrong_from
        self.told = []

    def begin(self, text, hidden):
        self.prompt = len(text.tokens)
        self.told.append(("begin", list(text.tokens), hidden))

    def propose(self, text, most):
        at = len(text.tokens) - self.prompt
        tokens = list(self.right[at:at + min(most, 4)])
        tokens[self.wrong_from:] = [(token + 1) % 61 for token in tokens[self.wrong_from:]]
        self.told.append(("propose", list(text.tokens), tokens))
        return Draft(tokens, [None] * len(tokens))

    def observe(self, text, outcome):
        self.told.append(("observe", list(text.tokens), outcome))


@pytest.mark.parametrize("wrong_from", [0, 1, 3, 9])
def test_a_drafter_is_told_what_became_of_its_draft(wrong_from):
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 21))
    recorder = Recorder(expected, wrong_from)
    assert list(decode(model, [1, 2, 3], 21, recorder)) == expected

    events = [event for event, _, _ in recorder.told]
    cycles = events.count("propose")
    assert events == ["begin", *["propose", "observe"] * (cycles - 1), "propose"]
    for (_, before, proposed), (_, after, outcome) in zip(recorder.told[1::2], recorder.told[2::2]):
        assert outcome.draft.tokens == proposed
        assert outcome.accepted == min(wrong_from, len(proposed))
        assert after == [1, 2, 3, *expected][:len(before) + outcome.accepted + 1]
        assert set(outcome.seconds) >= {"draft", "verify", "optimize"}


def test_a_drafter_gets_the_states_of_the_last_tokens_in_the_cache():
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 21))
    recorder = Recorder(expected, wrong_from=2)
    list(decode(model, [1, 2, 3], 21, recorder))
    for event, tokens, what in recorder.told:
        if event == "propose":
            continue
        hidden = what if event == "begin" else what.hidden
        count = 2 if event == "begin" else what.accepted + 1
        assert hidden.shape[1] == count
        states = model(torch.tensor([tokens[:-1]], device=DEVICE))
        assert torch.allclose(hidden, torch.stack([s[0, -count:] for s in states]), atol=1e-5)
    alone = Recorder()
    next(decode(model, [1], 5, alone))
    assert alone.told[0] == ("begin", [1], None)


class Hostile(Drafter):
    """Proposes noise, moves cache.length, and writes over every slot that is not the text's."""

    def __init__(self, noise: float = 1e4, seed: int = 0):
        self.noise = noise
        self.random = torch.Generator().manual_seed(seed)

    def spoil(self, text: Text):
        cache = text.cache
        cache.slots[..., len(text.tokens) - 1:, :] = self.noise
        cache.length = self.some(cache.tokens)

    def some(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self.random))

    def propose(self, text, most):
        count = self.some(most + 1)
        tokens = torch.randint(61, (count,), generator=self.random).tolist()
        self.spoil(text)
        return Draft(tokens, [None] * count)

    def observe(self, text, outcome):
        self.spoil(text)


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("noise", [0.0, 1.0, -1e4])
def test_no_drafter_can_change_a_greedy_text(noise, width):
    model = random_model()
    for seed in range(5):
        prompt = tokens_of(model, 1 + 3 * seed, seed)
        expected = list(autoregressive(model, prompt, 40, width=width))
        hostile = Hostile(noise, seed)
        assert list(decode(model, prompt, 40, hostile, width=width)) == expected


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_not_even_by_what_is_no_number(garbage):
    """Without a width, a pass looks at slots only that it has written."""
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 40))
    assert list(decode(model, [1, 2, 3], 40, Hostile(garbage))) == expected


class Believer(Drafter):
    """Draws from a distribution that has nothing to do with the model."""

    def __init__(self, q: list[float]):
        self.q = torch.tensor(q, device=DEVICE)

    def propose(self, text, most):
        tokens = []
        for _ in range(min(most, 2)):
            tokens.append(int(torch.multinomial(self.q, 1, generator=text.rng)))
        return Draft(tokens, [self.q] * len(tokens))


@pytest.mark.parametrize("q", [[0.25] * 4, [0, 1, 0, 0], [0.9, 0, 0.1, 0]], ids=str)
@pytest.mark.parametrize("settings", [{}, NUCLEUS], ids=str)
def test_no_drafter_can_change_the_distribution_of_samples(q, settings):
    error = error_of_the_induced_distribution(lambda model: Believer(q), **settings)
    assert error < 1e-6


class Overeager(Drafter):
    def propose(self, text, most):
        return Draft([1] * (most + 1), [None] * (most + 1))


def test_a_drafter_that_proposes_too_much_is_named():
    with pytest.raises(ValueError, match="an? Overeager proposed 5 tokens .* room for 4"):
        next(decode(random_model(), [1, 2], 5, Overeager()))


class Asked(Drafter):
    """Notes how many tokens it may propose, and proposes as many."""

    def __init__(self):
        self.asked = []

    def propose(self, text, most):
        self.asked.append(most)
        return Draft([1] * most, [None] * most)


def test_a_draft_leaves_room_for_the_models_own_token():
    asked = Asked()
    list(decode(random_model(), [1, 2], 5, asked))
    assert asked.asked[0] == 4
    assert all(room >= 0 for room in asked.asked)
    narrow = Asked()
    list(decode(random_model(), [1, 2], 20, narrow, width=5))
    assert max(narrow.asked) == 4


def test_nothing_drafted_is_written_behind_a_stop_token():
    """A drafter that goes on behind it, and is right, changes nothing."""
    model = random_model()
    free = list(autoregressive(model, [7, 8], 30))
    stop = free[9]
    expected = free[:free.index(stop) + 1]
    recorder = Recorder(free, wrong_from=9)
    assert list(decode(model, [7, 8], 30, recorder, stop={stop})) == expected
