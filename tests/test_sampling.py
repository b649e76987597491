"""Sampling: the text has the whole model's own distribution, and a test that can see when not.

Every path that the draws can take is walked on a tiny model (enumeration.py); seven seeded mistakes
are found that way. On the bundled model it is chi-square over a thousand tokens, and the same seven
mistakes.
"""
import collections

import pytest
import torch
from conftest import DEVICE, all_but, tokens_of
from enumeration import NUCLEUS, chi_square_is_plausible, error_of_the_induced_distribution

import speculative
from speculative import (
    LIKELIEST,
    Clasp,
    Draft,
    Stats,
    accept_greedy,
    accept_sampled,
    clasp,
    distribution,
    draft_by_skipping,
    nucleus,
    pick,
)


def drafting(**settings):
    """A function that makes CLaSp's drafter for a model of three layers."""
    chosen = {"skip_layers": 2, "draft_length": 2} | settings
    return lambda model: Clasp(model, **chosen)


# ---------------------------------------------------------------- by enumeration

@pytest.mark.parametrize("drafter, settings", [
    ({}, {}),
    ({}, {"width": 3}),
    ({}, NUCLEUS),
    ({"exit_threshold": 0.5}, {}),
    ({"exit_threshold": 0.5}, NUCLEUS),
    ({"opt_interval": 1}, {}),
], ids=str)
def test_every_text_has_the_models_own_probability(drafter, settings):
    error = error_of_the_induced_distribution(drafting(**drafter), **settings)
    assert error < 1e-6


# Ways to get it wrong.

def draw(p: torch.Tensor, rng) -> int:
    return int(torch.multinomial(p, 1, generator=rng))


def always_accept(drafted, q, p, rng):
    return len(drafted), draw(p[-1], rng)


def no_residual(drafted, q, p, rng):
    accepted, own = accept_sampled(drafted, q, p, rng)
    if accepted < len(drafted):
        own = draw(p[accepted], rng)
    return accepted, own


def wrong_row(drafted, q, p, rng):
    return accept_sampled(drafted, q, p.roll(1, dims=0), rng)


def q_before_top_p(logits, temperature, top_p, rng):
    token, _ = pick(logits, temperature, top_p, rng)
    return token, distribution(logits, temperature, 1)


def unlikely_token_dropped(*args):
    tokens, q, _ = draft_by_skipping(*args)
    while tokens and q[-1][tokens[-1]] < 0.1:
        tokens.pop()
        q.pop()
    return Draft(tokens, q)


def exit_by_the_verifier(drafted, q, p, rng):
    unlikely = [i for i, token in enumerate(drafted) if p[i, token] < 0.1]
    kept = unlikely[0] if unlikely else len(drafted)
    return accept_sampled(drafted[:kept], q[:kept], p[:kept + 1], rng)


def bonus_from_the_draft(drafted, q, p, rng):
    accepted, own = accept_sampled(drafted, q, p, rng)
    if drafted and accepted == len(drafted):
        own = draw(q[-1], rng)
    return accepted, own


@pytest.mark.parametrize("name, wrong, settings", [
    ("accept_sampled", always_accept, {}),
    ("accept_sampled", no_residual, {}),
    ("accept_sampled", wrong_row, {}),
    ("pick", q_before_top_p, NUCLEUS),
    ("draft_by_skipping", unlikely_token_dropped, {"temperature": 0.5}),
    ("accept_sampled", exit_by_the_verifier, {"temperature": 0.5}),
    ("accept_sampled", bonus_from_the_draft, {}),
])
def test_enumeration_finds_a_broken_rule(monkeypatch, name, wrong, settings):
    monkeypatch.setattr(speculative, name, wrong)
    error = error_of_the_induced_distribution(drafting(), vocabulary=3, **settings)
    assert error > 1e-3


# ---------------------------------------------------------------- by chi-square

def places_are_uniform(model, count: int, temperature=1.0, top_p=1.0, **settings) -> bool:
    """Do some ``count`` tokens fall where chance would have them in the model's distribution?

    Put the vocabulary in any order that the text before a token decides. The token's place, which
    is the probability of all before it in that order and a random share of its own, is then uniform
    on 0 .. 1, and independent of other tokens' places. Chi-square over 5 bins, for two orders: by
    probability, and by how much the draft undervalues.
    """
    chosen = {"temperature": temperature, "top_p": top_p}
    chance = torch.Generator(DEVICE).manual_seed(1)
    by_probability = collections.Counter()
    by_undervaluing = collections.Counter()
    for seed in range(count // 240):
        prompt = tokens_of(model, 3, seed)
        stats = Stats()
        list(clasp(model, prompt, 240, seed=seed, stats=stats, **chosen, **settings))
        text = [*prompt, *stats.tokens]
        written = torch.tensor(stats.tokens, device=DEVICE)[:, None]
        skipped = stats.skip_sets[0][1]
        p = probabilities(model, text, (), **chosen)[-240:]
        q = probabilities(model, text, skipped, **chosen)[-240:]
        by_probability.update(bins(p, p, written, chance))
        by_undervaluing.update(bins(p, p - q, written, chance))
    even = dict.fromkeys(range(5), 0.2)
    return (chi_square_is_plausible(by_probability, even)
            and chi_square_is_plausible(by_undervaluing, even))


def probabilities(model, text: list[int], skip, temperature, top_p) -> torch.Tensor:
    """Of all tokens at each place of a text but the first."""
    states = model(torch.tensor([text[:-1]], device=DEVICE), skip=skip)
    return distribution(model.logits(states[-1])[0], temperature, top_p)


def bins(p, order, written, chance) -> list[int]:
    """Which fifth of 0 .. 1 each written token's place lies in, the first in the order first."""
    own = order.gather(1, written)
    share = torch.rand(len(own), generator=chance, device=DEVICE)
    before = (p * (order > own)).sum(1)
    equal = (p * (order == own)).sum(1)
    return [min(4, int(5 * place)) for place in (before + share * equal).tolist()]


def test_samples_of_the_bundled_model_have_its_distribution(bundled):
    assert places_are_uniform(bundled, 480, skip_layers=all_but(3, bundled))


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [
    {},
    {"top_p": 0.5},
    {"temperature": 1.3, "exit_threshold": 0.3},
], ids=str)
def test_many_samples_of_the_bundled_model_have_its_distribution(bundled, settings):
    assert places_are_uniform(bundled, 3360, skip_layers=all_but(3, bundled), **settings)


@pytest.mark.parametrize("name, wrong, kept, count, settings", [
    pytest.param("accept_sampled", always_accept, 3, 480, {}),
    pytest.param("accept_sampled", wrong_row, 3, 240, {}),
    *[pytest.param(*case, marks=pytest.mark.thorough) for case in [
        ("accept_sampled", no_residual, 1, 2880, {}),
        ("pick", q_before_top_p, 1, 960, {"top_p": 0.5, "temperature": 2.0}),
        ("draft_by_skipping", unlikely_token_dropped, 3, 2400, {"temperature": 1.3}),
        ("accept_sampled", exit_by_the_verifier, 3, 3360, {}),
        ("accept_sampled", bonus_from_the_draft, 3, 1920, {}),
    ]],
])
def test_the_same_test_fails_for_a_broken_rule(
    bundled, monkeypatch, name, wrong, kept, count, settings
):
    monkeypatch.setattr(speculative, name, wrong)
    skip = all_but(kept, bundled)
    assert not places_are_uniform(bundled, count, skip_layers=skip, **settings)


# ---------------------------------------------------------------- the rules alone

def test_acceptance_gives_p_whatever_the_draft_believes():
    """Many draws: the first token after accepting or correcting one drafted token."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4], device=DEVICE)
    q = torch.tensor([0.1, 0.2, 0.1, 0.6], device=DEVICE)
    counts = collections.Counter()
    for drafted in torch.multinomial(q, 8000, replacement=True, generator=rng).tolist():
        accepted, own = accept_sampled([drafted], [q], p, rng)
        counts[drafted if accepted else own] += 1
    assert chi_square_is_plausible(counts, dict(enumerate(p[0].tolist())))


def test_nothing_is_accepted_behind_a_rejected_token():
    """The second and third token would be accepted for certain; the first never is."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    p = torch.eye(4, device=DEVICE)[[3, 1, 2, 0]]
    q = torch.eye(4, device=DEVICE)[[0, 1, 2]]
    assert accept_sampled([0, 1, 2], list(q), p, rng) == (0, 3)


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
    assert distribution(logits, 1, 0.81).tolist() == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0])
    assert distribution(logits, 1, 1e-9).tolist() == pytest.approx([1, 0, 0, 0])


def test_temperature_divides_the_logits():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, 0.5, 1)[0].item() == pytest.approx(0.25 / 0.365)
    assert distribution(logits, 1e-6, 1).tolist() == [1, 0, 0, 0]
    assert distribution(1e30 * logits, 1e-6, 1).tolist() == [1, 0, 0, 0]


# ---------------------------------------------------------------- the nucleus

def nucleus_by_sorting(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """Its definition, a token at a time."""
    kept = torch.zeros_like(p)
    for token in p.argsort(descending=True).tolist():
        if kept.sum() >= top_p:
            break
        kept[token] = p[token]
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("vocabulary", [5, LIKELIEST, 3 * LIKELIEST])
def test_the_nucleus_is_the_fewest_likely_tokens_that_reach_top_p(vocabulary, sharpness, top_p):
    """Whether it lies within the likeliest tokens, which are looked at first, or beyond."""
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    p = (sharpness * logits).double().softmax(-1)
    got = nucleus(p, top_p)
    for row, expected in zip(got, p):
        assert torch.allclose(row, nucleus_by_sorting(expected, top_p), atol=1e-12)


def test_one_flat_row_among_peaked_ones_gets_its_whole_nucleus():
    flat = torch.arange(2.0 * LIKELIEST, 4 * LIKELIEST)
    flat = flat / flat.sum()
    peaked = torch.zeros(2 * LIKELIEST)
    peaked[7] = 1
    got = nucleus(torch.stack((peaked, flat)), 0.75)
    assert torch.equal(got[0], peaked)
    assert torch.allclose(got[1], nucleus_by_sorting(flat, 0.75))


def test_tokens_as_likely_as_the_last_of_the_nucleus_are_in_it():
    p = torch.tensor([0.125, 0.25, 0.125, 0.5])
    assert nucleus(p, 0.8).tolist() == [0.125, 0.25, 0.125, 0.5]
    assert nucleus(p, 0.75).tolist() == pytest.approx([0, 1 / 3, 0, 2 / 3])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_a_rows_nucleus_does_not_depend_on_the_rows_beside_it(top_p):
    """A pass checks several rows, plain decoding has one. In 16 bits many logits are equal."""
    random = torch.Generator().manual_seed(0)
    sharpness = torch.tensor([0.3, 1, 2, 4, 8])[:, None]                 # some reach far, some not
    logits = (sharpness * torch.randn(5, 8 * LIKELIEST, generator=random)).bfloat16()
    together = distribution(logits, 1, top_p)
    for row, alone in zip(together, logits):
        assert torch.equal(row, distribution(alone, 1, top_p))
