"""speculative.py: the output is the whole model's own. Greedy: token for token. Sampled: in distribution."""
import collections
import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch

import speculative
from conftest import DEVICE, ROOT, random_model, tokens_of
from model import KVCache
from speculative import (SettingsError, Stats, accept_greedy, accept_sampled, autoregressive, clasp, distribution, draft,
                         exact_width, pick)


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
    (dict(draft_length=0), "draft length"), (dict(draft_length=128), "draft length"), (dict(prompt=[-1]), "vocabulary"),
    (dict(stats=Stats(tokens=[1])), "another text"), (dict(exit_threshold=1.5), "threshold"), (dict(opt_interval=0), "interval"),
    (dict(temperature=-1), "temperature"), (dict(top_p=0), "top-p"), (dict(top_p=1.1), "top-p"), (dict(prompt=[]), "empty"),
    (dict(max_new_tokens=0), "new tokens"), (dict(max_new_tokens=254), "context of 256")])
def test_impossible_settings_are_refused(settings, word):
    settings = dict(prompt=[1, 2, 3], max_new_tokens=5) | settings
    with pytest.raises(SettingsError, match=word):
        next(clasp(random_model(), **settings))


def test_a_pass_is_as_wide_as_the_kernels_want_it(monkeypatch):
    """Where the last row of 5 or 6 would come out differently, the next width that is even on this machine is taken."""
    def uneven(x, weight, bias=None):
        out = linear(x, weight)
        if x.shape[-2] in (5, 6):
            out[..., -1, :] += 1e-3
        return out

    linear, model = torch.nn.functional.linear, random_model()
    even = [width for width in (4, *range(7, 16)) if exact_width(random_model(), width) == width]
    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    assert [exact_width(model, rows) for rows in (4, 5, 6, 7)] == [min(w for w in even if w >= rows) for rows in (4, 5, 6, 7)]


def test_uneven_attention_is_found_too(monkeypatch):
    def uneven(q, k, v, **settings):
        out = attention(q, k, v, **settings)
        if q.shape[2] == 5:
            out[:, :, 0, 0] *= 1 + 2 ** -7
        return out

    attention, model = torch.nn.functional.scaled_dot_product_attention, random_model().to(torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", uneven)
    assert exact_width(model, 5) > 5


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of a CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_is_exact_on_an_older_cpu(dtype):
    """MKL and oneDNN told to take a CPU with AVX2 only, whose kernels treat 7 rows unevenly."""
    code = f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from conftest import random_model, load_model, BUNDLED
from model import KVCache
from speculative import autoregressive, clasp, exact_width
torch.set_grad_enabled(False)
model = load_model(BUNDLED, dtype=torch.{dtype})
for prompt in ([5, 6, 7], [9, 300, 21, 8]):
    caches = [KVCache(model, 128, 20) for _ in range(2)]
    plain = list(autoregressive(model, prompt, 100, width=7, cache=caches[0]))
    assert plain == list(clasp(model, prompt, 100, skip_layers=16, draft_length=6, cache=caches[1]))
    for a, b in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values):
        assert torch.equal(a[:, :, :len(prompt) + 99], b[:, :, :len(prompt) + 99])
print(exact_width(model, 7))
"""
    old = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | old)
    assert done.returncode == 0, done.stderr


def test_the_programme_gets_the_states_of_the_last_accepted_token():
    """Recorded on their way to the optimizer, and computed anew from the text so far."""
    model, prompt, given, stats = random_model(), [1, 2, 3], [], Stats()

    def recorded(model, cache, hidden, budget):
        given.append((cache.length, hidden.clone()))
        return speculative.optimize(model, cache, hidden, budget)

    tokens = [*prompt, *clasp(model, prompt, 40, skip_layers=3, opt_interval=1, optimizer=recorded, stats=stats)]
    assert len(given) == stats.optimizations == stats.cycles and stats.accepted
    for length, hidden in given:
        states = model(torch.tensor([tokens[:length]], device=DEVICE))
        assert torch.allclose(hidden, torch.stack([state[0, -1] for state in states]), atol=1e-5)


def test_the_draft_goes_on_while_it_is_confident(monkeypatch):
    """Its top probability before temperature, against thresholds just below and above each."""
    model, cache = random_model(), KVCache(random_model(), 20)
    model(torch.tensor([[1, 2, 3]], device=DEVICE), cache)
    choose = functools.partial(pick, temperature=3.0, top_p=0.5, rng=generator())
    tokens, _ = draft(model, cache, 4, {2, 3}, 6, bool, choose, ())
    text, confidence = [1, 2, 3, 4, *tokens], []
    for i in range(6):
        fresh = KVCache(model, 20)
        model(torch.tensor([text[:3]], device=DEVICE), fresh)
        for token in text[3:4 + i]:
            state = model(torch.tensor([[token]], device=DEVICE), fresh, {2, 3})[-1]
        confidence.append(model.logits(state)[0, 0].softmax(-1).max().item())
    for threshold in [c * f for c in confidence for f in (0.999, 1.001)]:
        choose = functools.partial(pick, temperature=3.0, top_p=0.5, rng=generator())
        first = next((i for i, c in enumerate(confidence) if c < threshold), 5)
        assert draft(model, cache, 4, {2, 3}, 6, threshold.__le__, choose, ())[0] == tokens[:first + 1]
    assert cache.length == 3


def test_a_candidate_that_overflows_leaves_nothing_in_the_cache():
    model = random_model().to(torch.float16)
    cache = KVCache(model, 20)
    hidden = torch.stack([state[0, -1] for state in model(torch.tensor([[1, 2, 3]], device=DEVICE), cache)])

    def overflows(layer, states, budget):
        layer(0, torch.full_like(states[:budget], torch.inf))
        assert not all(x.isfinite().all() for x in cache.keys)

    speculative.optimize(model, cache, hidden, 4, overflows)
    assert all(x.isfinite().all() for x in cache.keys + cache.values)


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


class Enumerated:
    """Stands in for chance: every draw of decoding is a fork, and each path through the forks is walked once.

    ``torch.multinomial`` and ``torch.bernoulli`` ask ``fork`` which way to go; a path's probability is the
    product of those of its turns.
    """

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.new_tensor([self.fork(p.tolist())], dtype=torch.long))
        monkeypatch.setattr(torch, "bernoulli", lambda p, generator: p.new_tensor([self.fork([1 - x, x]) for x in p.tolist()]))

    def fork(self, weights: list[float]) -> int:
        turns = [(i, weight / sum(weights)) for i, weight in enumerate(weights) if weight > 0]
        if self.step == len(self.path):
            self.path.append(0)
            self.turns.append(len(turns))
        choice, probability = turns[self.path[self.step]]
        self.probability *= probability
        self.step += 1
        return choice

    def distribution(self, run) -> dict:
        """What ``run()`` returns, with the probability of each outcome."""
        outcomes, self.path, self.turns = collections.Counter(), [], []
        while True:
            self.step, self.probability = 0, 1.0
            outcomes[tuple(run())] += self.probability
            while self.path and self.path[-1] == self.turns[-1] - 1:        # to the last fork with a way untried
                self.path.pop(), self.turns.pop()
            if not self.path:
                return outcomes
            self.path[-1] += 1


def own_distribution(model, prompt, count, temperature=1, top_p=1, **_) -> dict:
    """The model's own distribution over the next ``count`` tokens, from whole forward passes without a cache."""
    expected = {(): 1.0}
    for _ in range(count):
        longer = {}
        for tokens, probability in expected.items():
            logits = model.logits(model(torch.tensor([[*prompt, *tokens]], device=DEVICE))[-1])[0, -1]
            longer |= {(*tokens, t): probability * p for t, p in enumerate(distribution(logits, temperature, top_p).tolist())}
        expected = longer
    return expected


def error_of_the_induced_distribution(monkeypatch, vocabulary=4, count=3, each=lambda model: {}, **settings) -> float:
    """Largest error, over all texts of ``count`` tokens, of the probability with which clasp writes them.

    each(model): settings made anew for each text.
    """
    model, prompt = random_model(layers=3, vocabulary=vocabulary, seed=1, residual=1.0, head_scale=0.6), [0, 1, 2]
    expected = own_distribution(model, prompt, count, **settings)
    settings = dict(temperature=1, skip_layers=2, draft_length=2) | settings
    induced = Enumerated(monkeypatch).distribution(lambda: clasp(model, prompt, count, **settings, **each(model)))
    assert sum(induced.values()) == pytest.approx(1, abs=1e-6)
    return max(abs(induced.get(tokens, 0) - p) for tokens, p in expected.items())


NUCLEUS, EXIT = dict(temperature=0.7, top_p=0.8), dict(exit_threshold=0.5)


@pytest.mark.parametrize("settings", [{}, dict(exact=False), NUCLEUS, EXIT, EXIT | NUCLEUS, dict(opt_interval=1)], ids=str)
def test_every_text_has_the_models_own_probability(monkeypatch, settings):
    error = error_of_the_induced_distribution(monkeypatch, **settings)
    print(f"largest error {error:.1e}")
    assert error < 1e-6


# Ways to get it wrong.

def always_accept(drafted, q, p, rng):
    return len(drafted), int(torch.multinomial(p[-1], 1, generator=rng))


def no_residual(drafted, q, p, rng):
    accepted, own = accept_sampled(drafted, q, p, rng)
    return accepted, own if accepted == len(drafted) else int(torch.multinomial(p[accepted], 1, generator=rng))


def wrong_row(drafted, q, p, rng):
    return accept_sampled(drafted, q, p.roll(1, dims=0), rng)


def q_before_top_p(logits, temperature, top_p, rng):
    token, _ = pick(logits, temperature, top_p, rng)
    return token, distribution(logits, temperature, 1)


def unlikely_token_dropped(*args):
    drafted, q = draft(*args)
    while drafted and q[-1][drafted[-1]] < 0.1:
        drafted.pop(), q.pop()
    return drafted, q


def exit_by_the_verifier(drafted, q, p, rng):
    k = next((i for i, d in enumerate(drafted) if p[i, d] < 0.1), len(drafted))
    return accept_sampled(drafted[:k], q[:k], p[:k + 1], rng)


def bonus_from_the_draft(drafted, q, p, rng):
    accepted, own = accept_sampled(drafted, q, p, rng)
    return accepted, int(torch.multinomial(q[-1], 1, generator=rng)) if q and accepted == len(drafted) else own


@pytest.mark.parametrize("name, wrong, settings", [
    ("accept_sampled", always_accept, {}), ("accept_sampled", no_residual, {}), ("accept_sampled", wrong_row, {}),
    ("pick", q_before_top_p, NUCLEUS), ("draft", unlikely_token_dropped, dict(temperature=0.5)),
    ("accept_sampled", exit_by_the_verifier, dict(temperature=0.5)), ("accept_sampled", bonus_from_the_draft, {})])
def test_enumeration_finds_a_broken_rule(monkeypatch, name, wrong, settings):
    monkeypatch.setattr(speculative, name, wrong)
    error = error_of_the_induced_distribution(monkeypatch, vocabulary=3, **settings)
    print(f"{wrong.__name__}: largest error {error:.1e}")
    assert error > 1e-3


def places_are_uniform(model, count, temperature=1.0, top_p=1.0, **settings) -> bool:
    """Do about ``count`` written tokens fall where chance would have them in the model's own distribution?

    Put the vocabulary in any order that the text before a token decides. The token's place, the probability of
    all before it in that order and a random share of its own, is then uniform on 0 .. 1, and independent of other
    tokens' places. Chi-square over 5 bins, for two orders: by probability, and by how much the draft undervalues.
    """
    places, chance = {"likely": [], "undervalued": []}, torch.Generator(DEVICE).manual_seed(1)
    for seed in range(count // 240):
        prompt, stats = tokens_of(model, 3, seed), Stats()
        written = list(clasp(model, prompt, 240, temperature=temperature, top_p=top_p, seed=seed, stats=stats, **settings))
        text = torch.tensor([[*prompt, *written]], device=DEVICE)

        def probabilities(skip):
            return distribution(model.logits(model(text[:, :-1], skip=skip)[-1])[0, len(prompt) - 1:], temperature, top_p)

        p, q, written = probabilities(()), probabilities(stats.skip_sets[0][1]), text[0, len(prompt):, None]
        for name, key in (("likely", p), ("undervalued", p - q)):
            own = key.gather(1, written)
            share = torch.rand(len(own), generator=chance, device=DEVICE)
            places[name] += ((p * (key > own)).sum(1) + share * (p * (key == own)).sum(1)).tolist()
    return all(chi_square_is_plausible(collections.Counter(min(4, int(5 * place)) for place in some), dict.fromkeys(range(5), 0.2))
               for some in places.values())


@pytest.mark.parametrize("settings", [{}, dict(top_p=0.5), dict(temperature=1.3, exit_threshold=0.3)], ids=str)
def test_samples_of_the_bundled_model_have_its_distribution(bundled, settings):
    assert places_are_uniform(bundled, 1680, skip_layers=17, **settings)


@pytest.mark.parametrize("name, wrong, count, settings", [
    ("accept_sampled", always_accept, 480, {}), ("accept_sampled", no_residual, 960, dict(skip_layers=19)),
    ("accept_sampled", wrong_row, 240, {}), ("pick", q_before_top_p, 1920, dict(top_p=0.5)),
    ("draft", unlikely_token_dropped, 2400, dict(temperature=1.3)),
    ("accept_sampled", exit_by_the_verifier, 1680, {}), ("accept_sampled", bonus_from_the_draft, 1920, {})])
def test_the_same_test_fails_for_a_broken_rule(bundled, monkeypatch, name, wrong, count, settings):
    monkeypatch.setattr(speculative, name, wrong)
    assert not places_are_uniform(bundled, count, **dict(skip_layers=17) | settings)


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
