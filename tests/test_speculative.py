"""speculative.py: the output is the whole model's own. Greedy: token for token. Sampled: in distribution."""
import collections
import itertools

import pytest
import torch

import speculative
from conftest import DEVICE, random_model, tokens_of
from speculative import SettingsError, Stats, accept_greedy, accept_sampled, autoregressive, clasp, distribution


def generator(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


# ---------------------------------------------------------------- greedy

@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_greedy_equals_plain_decoding(any_model, share):
    layers = len(any_model.layers)
    skip = min(layers - 1, round(share * layers))
    for seed, (draft_length, threshold, interval) in enumerate([(1, 0, 1), (4, 0, 3), (6, 0.3, 2), (3, 1, 1000)]):
        prompt = tokens_of(any_model, 1 + 5 * seed, seed)
        expected = list(autoregressive(any_model, prompt, 24))
        stats = Stats()
        assert expected == list(clasp(any_model, prompt, 24, skip_layers=skip, draft_length=draft_length,
                                      exit_threshold=threshold, opt_interval=interval, stats=stats))
        assert stats.accepted + stats.cycles == stats.new_tokens == 24


def test_a_draft_by_the_whole_model_is_always_accepted(any_model):
    stats = Stats()
    list(clasp(any_model, tokens_of(any_model, 9), 40, skip_layers=0, draft_length=3, stats=stats))
    assert stats.accepted == stats.drafted and stats.tau == 4


def test_one_token_can_be_asked_for_and_the_context_can_be_filled():
    model = random_model()
    assert list(clasp(model, [3], 1)) == list(autoregressive(model, [3], 1))
    prompt = tokens_of(model, 200)
    assert list(clasp(model, prompt, 56)) == list(autoregressive(model, prompt, 56))


@pytest.mark.parametrize("skip", [0, 1, 3, 5])           # the stop token is drafted and accepted, or the verifier's own
def test_decoding_ends_after_a_stop_token(skip):
    model = random_model()
    free = list(autoregressive(model, [7, 8], 40))
    for stop in set(free[1:]):
        expected = free[:free.index(stop) + 1]
        stats = Stats()
        assert expected == list(clasp(model, [7, 8], 40, skip_layers=skip, stop={stop}, stats=stats))
        assert expected == list(autoregressive(model, [7, 8], 40, stop={stop}))
        assert stats.accepted + stats.cycles - stats.from_draft[-1] == stats.new_tokens == len(expected)


def test_a_long_prompt_goes_through_in_pieces(monkeypatch):
    model, prompt = random_model(), tokens_of(random_model(), 100)
    expected = list(autoregressive(model, prompt, 20))
    monkeypatch.setattr(speculative, "PREFILL_ROWS", 7)
    assert list(clasp(model, prompt, 20)) == expected == list(autoregressive(model, prompt, 20))


def test_the_caller_may_stop_and_start_again():
    model = random_model()
    expected = list(autoregressive(model, [1, 2, 3], 20))
    for taken in range(1, 8):
        assert list(itertools.islice(clasp(model, [1, 2, 3], 20), taken)) == expected[:taken]
    assert list(clasp(model, [1, 2, 3], 20)) == expected


def test_a_draft_ends_after_a_token_below_the_exit_threshold():
    model, stats = random_model(), Stats()
    list(clasp(model, [1, 2], 30, draft_length=5, exit_threshold=1, stats=stats))
    assert stats.drafted <= stats.cycles                 # no draft is ever certain: one token each


def test_skip_sets_are_chosen_after_the_prefill_and_every_interval():
    model, stats = random_model(), Stats()
    list(clasp(model, [1, 2, 3], 60, skip_layers=2, opt_interval=4, stats=stats))
    assert stats.optimizations == len(stats.skip_sets) == 1 + (stats.cycles - 1) // 4
    one_token = Stats()
    list(clasp(model, [1], 60, skip_layers=2, opt_interval=1000, stats=one_token))
    assert one_token.skip_sets[0][0] == 1 and one_token.drafted > 0       # after the first pass there is a state
    assert stats.skip_sets[0][0] == 0 and all(len(skipped) == 2 for _, skipped in stats.skip_sets)


@pytest.mark.parametrize("settings, word", [
    (dict(skip_layers=6), "fewer than the model's 6"), (dict(skip_layers=-1), "at least 0"),
    (dict(draft_length=0), "draft length"), (dict(exit_threshold=1.5), "threshold"), (dict(opt_interval=0), "interval"),
    (dict(temperature=-1), "temperature"), (dict(top_p=0), "top-p"), (dict(top_p=1.1), "top-p"), (dict(prompt=[]), "empty"),
    (dict(max_new_tokens=0), "new tokens"), (dict(max_new_tokens=254), "context of 256")])
def test_impossible_settings_are_refused(settings, word):
    settings = dict(prompt=[1, 2, 3], max_new_tokens=5) | settings
    with pytest.raises(SettingsError, match=word):
        next(clasp(random_model(), **settings))


# ---------------------------------------------------------------- sampling

def chi_square_is_plausible(counts: collections.Counter, expected: dict) -> bool:
    """Pearson's test at about 5 standard deviations: never by chance, always for a broken rule."""
    total = sum(counts.values())
    cells = [(counts[key], total * p) for key, p in expected.items() if total * p >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = len(cells) - 1
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5 + 5


def always_accept(drafted, q, p, rng):
    return len(drafted), int(torch.multinomial(p[-1], 1, generator=rng))


def no_residual(drafted, q, p, rng):
    accepted, own = accept_sampled(drafted, q, p, rng)
    return accepted, int(torch.multinomial(p[accepted], 1, generator=rng))


def wrong_row(drafted, q, p, rng):
    return accept_sampled(drafted, q, p.roll(1, dims=0), rng)


def sampled_pairs(rule, monkeypatch, model, count, **settings) -> bool:
    """Do the first two tokens of ``count`` runs have the distribution that the model gives them?"""
    monkeypatch.setattr(speculative, "accept_sampled", rule)
    prompt, expected, temperature, top_p = [1, 2, 3], {}, settings.get("temperature", 1), settings.get("top_p", 1)

    def next_of(tokens):
        logits = model.logits(model(torch.tensor([tokens], device=DEVICE))[-1])[0, -1]
        return distribution(logits, temperature, top_p).tolist()

    for a, p in enumerate(next_of(prompt)):
        expected |= {(a, b): p * q for b, q in enumerate(next_of([*prompt, a]))}
    counts = collections.Counter(tuple(clasp(model, prompt, 2, seed=seed, **settings)) for seed in range(count))
    return chi_square_is_plausible(counts, expected)


@pytest.mark.parametrize("settings", [
    dict(temperature=1), dict(temperature=0.7, top_p=0.8), dict(temperature=1, exit_threshold=0.5)], ids=str)
def test_samples_have_the_models_distribution(monkeypatch, settings):
    model = random_model(layers=3, vocabulary=7, seed=1, residual=1.0, head_scale=0.6)
    assert sampled_pairs(accept_sampled, monkeypatch, model, 2000, skip_layers=2, draft_length=2, **settings)


@pytest.mark.parametrize("broken", [always_accept, no_residual, wrong_row])
def test_the_same_test_fails_for_a_broken_acceptance_rule(monkeypatch, broken):
    model = random_model(layers=3, vocabulary=7, seed=1, residual=1.0, head_scale=0.6)
    assert not sampled_pairs(broken, monkeypatch, model, 2000, skip_layers=2, draft_length=2, temperature=1)


def test_acceptance_gives_p_whatever_the_draft_believes():
    """The rule alone, many draws: first token after accepting or correcting one drafted token."""
    g = generator()
    p, q = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4], device=DEVICE), torch.tensor([0.1, 0.2, 0.1, 0.6], device=DEVICE)
    counts = collections.Counter()
    for drafted in torch.multinomial(q, 8000, replacement=True, generator=g).tolist():
        accepted, own = accept_sampled([drafted], [q], p, g)
        counts[drafted if accepted else own] += 1
    assert chi_square_is_plausible(counts, dict(enumerate(p[0].tolist())))


def test_greedy_acceptance_is_the_longest_agreeing_prefix():
    logits = torch.eye(5)[[4, 2, 0, 1]]                  # the whole model wants 4, 2, 0, 1
    assert accept_greedy([4, 2, 0], logits) == (3, 1)    # all, and a bonus
    assert accept_greedy([4, 3, 0], logits) == (1, 2)    # one, and the correction
    assert accept_greedy([3, 2, 0], logits) == (0, 4)
    assert accept_greedy([], logits[:1]) == (0, 4)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, 1, 1).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert distribution(logits, 1, 0.5).tolist() == pytest.approx([1, 0, 0, 0])
    assert distribution(logits, 1, 0.79).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(logits, 1, 1e-9).tolist() == pytest.approx([1, 0, 0, 0])
    assert distribution(logits, 0.5, 1)[0].item() == pytest.approx(0.25 / 0.365)
