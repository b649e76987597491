"""dp_skip.py: two readings of one algorithm that agree, and its claims measured on models."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, feed, random_model, tokens_of, valid

from dp_skip import distances, relative_distances, select_layers, select_layers_plain
from model import KVCache
from speculative import SettingsError, optimize, prefill


def toy(layers: int, size: int = 16, seed: int = 0):
    """Residual layers without any attention, and the true states of one token through them."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, size, size, generator=random, dtype=torch.float64)
    weights *= 0.6 / size ** 0.5

    def layer(i, rows):
        return rows + (rows @ weights[i]).tanh()

    start = torch.randn(1, size, generator=random, dtype=torch.float64)
    return layer, states_of(layer, layers, start)


def states_of(layer, layers: int, start: torch.Tensor) -> torch.Tensor:
    states = [start]
    for i in range(layers):
        states.append(layer(i, states[-1]))
    return torch.cat(states)


def cosine_of(layer, hidden: torch.Tensor, skipped) -> float:
    """What a skip set really costs: run the other layers and compare with h_L."""
    x = hidden[:1]
    for i in range(len(hidden) - 1):
        if i not in skipped:
            x = layer(i, x)
    return F.cosine_similarity(x.float(), hidden[-1:].float()).item()


def assert_same(fast, plain):
    assert fast.skip_sets == plain.skip_sets
    assert fast.cosines == pytest.approx(plain.cosines, abs=1e-5)


# ---------------------------------------------------------------- the algorithm

def survivors(layer, hidden: torch.Tensor, budget: int) -> list[frozenset[int]]:
    """Algorithm 1 once more, from the paper alone: {layers skipped: (set, state)} after each."""
    g = {0: (frozenset(), hidden[0])}
    for i, target in enumerate(hidden[1:]):
        options = {}
        for j, (skipped, state) in g.items():
            run = layer(i, state[None])[0] if skipped else target
            options.setdefault(j, []).append((skipped, run))
            options.setdefault(j + 1, []).append((skipped | {i}, state))
        g = {}
        for j, choices in options.items():
            cosines = [F.cosine_similarity(state, target, dim=0) for _, state in choices]
            g[j] = choices[cosines.index(max(cosines))]
    return [g[j][0] for j in range(budget + 1)]


@pytest.mark.parametrize("algorithm", [select_layers, select_layers_plain])
def test_it_is_algorithm_1(algorithm):
    for seed in range(5):
        layer, hidden = toy(9, seed=seed)
        assert algorithm(layer, hidden, 7).skip_sets == survivors(layer, hidden, 7)


@pytest.mark.parametrize("layers, budget", [
    (1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (7, 6), (7, 7), (24, 12),
])
def test_fast_and_plain_agree(layers, budget):
    for seed in range(10):
        layer, hidden = toy(layers, seed=seed)
        fast = select_layers(layer, hidden, budget)
        assert_same(fast, select_layers_plain(layer, hidden, budget))


def several_tokens(layers: int, tokens: int, size: int = 16, seed: int = 0):
    """The toy's layers, and the states (L+1, T, dim) of several tokens through them."""
    layer, _ = toy(layers, size, seed)
    start = torch.randn(1, tokens, size, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(seed + 100))
    return layer, states_of(layer, layers, start)


MEASURES = [distances, relative_distances]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_fast_and_plain_agree_over_several_tokens(tokens, measure):
    for seed in range(5):
        layer, hidden = several_tokens(9, tokens, seed=seed)
        fast = select_layers(layer, hidden, 7, measure=measure)
        assert_same(fast, select_layers_plain(layer, hidden, 7, measure))


@pytest.mark.parametrize("algorithm", [select_layers, select_layers_plain])
def test_the_same_token_several_times_is_one_token(algorithm):
    layer, hidden = toy(9)
    repeated = hidden[:, None].expand(-1, 4, -1)
    assert_same(algorithm(layer, repeated, 7), algorithm(layer, hidden, 7))


@pytest.mark.parametrize("measure", MEASURES)
def test_over_several_tokens_a_measure_is_the_root_of_the_mean_square(measure):
    random = torch.Generator().manual_seed(0)
    candidates = torch.randn(5, 3, 8, generator=random)
    state = torch.randn(3, 8, generator=random)
    by_token = torch.stack([measure(candidates[:, t], state[t]) for t in range(3)])
    expected = by_token.square().mean(0).sqrt()
    assert torch.allclose(measure(candidates, state), expected, atol=1e-6)


def test_only_the_relative_distance_sees_a_wrong_length():
    state = torch.tensor([3.0, 4.0])
    longer = 2 * state[None]
    assert distances(longer, state).item() == pytest.approx(0, abs=1e-6)
    assert relative_distances(longer, state).item() == pytest.approx(1)


def test_over_several_tokens_the_cosine_is_the_mean_of_what_the_set_gives_each():
    layer, hidden = several_tokens(12, 5)
    selection = select_layers(layer, hidden, 9, measure=relative_distances)
    for skipped, cosine in zip(*selection):
        by_token = [cosine_of(layer, hidden[:, t], skipped) for t in range(5)]
        assert cosine == pytest.approx(sum(by_token) / 5, abs=1e-6)


@pytest.mark.parametrize("smallest, budget", [
    (0, 0), (3, 3), (2, 5), (5, 8), (9, 9), (10, 10),
])
def test_leaving_out_small_budgets_changes_nothing_for_the_others(smallest, budget):
    for seed in range(5):
        layer, hidden = toy(10, seed=seed)
        every = select_layers(layer, hidden, budget)
        some = select_layers(layer, hidden, budget, smallest)
        assert some.skip_sets == every.skip_sets[smallest:]
        assert some.cosines == pytest.approx(every.cosines[smallest:], abs=1e-6)


@pytest.mark.parametrize("algorithm", [select_layers, select_layers_plain])
def test_a_candidate_that_overflows_is_chosen_last(algorithm):
    layer, hidden = toy(6)

    def overflows_at_3(i, rows):
        return layer(i, rows) * (torch.nan if i == 3 else 1)

    skip_sets, cosines = algorithm(overflows_at_3, hidden, 4)
    assert [len(skipped) for skipped in skip_sets] == [0, 1, 2, 3, 4]
    assert all(abs(cosine) <= 1.000001 for cosine in cosines)


def test_each_budget_gets_a_set_of_its_size_and_the_cosine_that_the_set_gives():
    layer, hidden = toy(12)
    selection = select_layers(layer, hidden, 9)
    for budget, (skipped, cosine) in enumerate(zip(*selection)):
        assert len(skipped) == budget
        assert cosine == pytest.approx(cosine_of(layer, hidden, skipped), abs=1e-6)


def test_one_run_holds_the_answer_of_every_smaller_budget():
    layer, hidden = toy(10)
    large = select_layers(layer, hidden, 8)
    for budget in range(8):
        small = select_layers(layer, hidden, budget)
        assert large.skip_sets[:budget + 1] == small.skip_sets
        assert large.cosines[:budget + 1] == pytest.approx(small.cosines, abs=1e-6)


def test_survivors_come_between_random_sets_and_brute_force():
    gained = 0
    for seed in range(5):
        layer, hidden = toy(8, seed=seed)
        for budget, cosine in enumerate(select_layers(layer, hidden, 6).cosines):
            sets = itertools.combinations(range(8), budget)
            every = [cosine_of(layer, hidden, skipped) for skipped in sets]
            assert cosine <= max(every) + 1e-6
            gained += cosine - sum(every) / len(every)
    assert gained > 1                                  # summed over 5 x 7 cases


def test_layers_that_do_nothing_are_the_ones_skipped():
    layer, hidden = toy(9)
    idle = {1, 4, 7}

    def with_idle(i, rows):
        return rows if i in idle else layer(i, rows)

    states = states_of(with_idle, 9, hidden[:1])
    selection = select_layers(with_idle, states, 3)
    assert selection.skip_sets[3] == idle
    assert selection.cosines[3] == pytest.approx(1)


def test_huge_entries_do_not_hide_the_differences():
    """Entries that bring every cosine within 1e-7 of 1, as a text's first token has them."""
    layer, hidden = toy(8)
    huge = torch.zeros(1, 16, dtype=torch.float64)
    huge[0, 0] = 3e3

    def with_huge(i, rows):
        return layer(i, rows - huge) + huge

    selection = select_layers(with_huge, (hidden + huge).float(), 4)
    exact = survivors(with_huge, hidden + huge, 4)
    assert selection.skip_sets == exact


def test_fast_calls_each_layer_once_on_at_most_budget_rows():
    layer, hidden = toy(10)
    calls = []

    def recorded(i, rows):
        calls.append((i, len(rows)))
        return layer(i, rows)

    select_layers(recorded, hidden, 4)
    assert calls == [(i, min(i, 4)) for i in range(1, 10)]     # before layer 0 nothing is skipped
    calls.clear()
    select_layers(recorded, hidden, 4, smallest=4)
    assert sum(rows for _, rows in calls) <= (10 - 4) * 4


@pytest.mark.parametrize("budget", [-1, 6])
@pytest.mark.parametrize("select", [select_layers, select_layers_plain])
def test_a_budget_outside_the_layers_is_an_error(select, budget):
    layer, hidden = toy(5)
    with pytest.raises(ValueError, match="cannot skip"):
        select(layer, hidden, budget)


# ---------------------------------------------------------------- on models

def positions(model, count: int):
    """(cache, last token, its hidden states) at places of different texts.

    The first is at position 0; the second was rolled back and has scratch behind it.
    """
    for number in range(count):
        cache = KVCache(model, 100)
        length = 1 if number == 0 else 2 + 17 * number % 59
        text = tokens_of(model, length, number)
        if number > 0:
            feed(model, cache, text[:-1])
        if number == 1:
            feed(model, cache, tokens_of(model, 9, 99))
            cache.length -= 9
        yield cache, text[-1], feed(model, cache, text[-1:])


def test_fast_and_plain_agree_on_models(any_model):
    budget = len(any_model.layers) // 2
    for cache, _, hidden in positions(any_model, 5):
        fast = optimize(any_model, cache, hidden, budget)
        assert_same(fast, optimize(any_model, cache, hidden, budget, select_layers_plain))


@pytest.mark.thorough
def test_fast_and_plain_agree_on_models_at_20_positions(any_model):
    budget = len(any_model.layers) // 2
    for cache, _, hidden in positions(any_model, 20):
        fast = optimize(any_model, cache, hidden, budget)
        assert_same(fast, optimize(any_model, cache, hidden, budget, select_layers_plain))


def several_states(model, tokens: int, length: int = 40):
    """(cache, states (L+1, T, hidden) of its last tokens)."""
    cache = KVCache(model, length, tokens * len(model.layers))
    return cache, prefill(model, cache, tokens_of(model, length, seed=length))[:, -tokens:]


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_fast_and_plain_agree_on_models_over_several_tokens(any_model, tokens):
    cache, hidden = several_states(any_model, tokens)
    before = valid(cache).clone()
    fast = optimize(any_model, cache, hidden, len(any_model.layers) // 2)
    plain = optimize(any_model, cache, hidden, len(any_model.layers) // 2, select_layers_plain)
    assert_same(fast, plain)
    assert torch.equal(valid(cache), before)


def test_each_token_of_a_candidate_is_a_candidate_of_its_own_token():
    """In its place it sees what the same state sees there when the cache ends at its token."""
    model = random_model()
    cache, hidden = several_states(model, 3)
    noise = torch.randn(2, 3, model.config.hidden_size, device=DEVICE)
    together = model.candidate_layer(cache, 2, tokens=3)(2, noise)
    for t in (2, 1, 0):                                # its scratch slots are later tokens' own
        cache.length = 38 + t
        alone = model.candidate_layer(cache, 2)(2, noise[:, t])
        assert torch.allclose(together[:, t], alone, atol=1e-5)


def test_the_cosine_is_what_the_draft_model_then_has_at_that_token(any_model):
    budget = len(any_model.layers) - 1
    for cache, token, hidden in positions(any_model, 4):
        selection = optimize(any_model, cache, hidden, budget)
        for m in {1, budget // 2, budget}:
            cache.length -= 1                          # the true keys and values before it
            skip = selection.skip_sets[m]
            drafted = any_model(torch.tensor([[token]], device=DEVICE), cache, skip)[-1][0]
            cosine = F.cosine_similarity(drafted, hidden[-1:]).item()
            assert cosine == pytest.approx(selection.cosines[m], abs=1e-4)


def test_the_dp_leaves_the_cache_as_it_was(any_model):
    for cache, _, hidden in positions(any_model, 3):
        length = cache.length
        before = valid(cache).clone()
        optimize(any_model, cache, hidden, len(any_model.layers) // 2)
        assert cache.length == length
        assert torch.equal(valid(cache), before)


def test_a_dp_that_the_cache_has_no_room_for_is_refused():
    model = random_model()
    cache = KVCache(model, 120, scratch=20)
    hidden = prefill(model, cache, tokens_of(model, 60))
    optimize(model, cache, hidden[:, -4:], 5)
    with pytest.raises(SettingsError, match="5 . 20 candidates"):
        optimize(model, cache, hidden[:, -20:], 5)


def test_the_dp_leaves_its_scratch_slots_clean():
    """A NaN in a masked slot would still spoil attention, since 0 * NaN is NaN."""
    model = random_model()
    cache = KVCache(model, 20)
    hidden = feed(model, cache, [1, 2, 3])

    def overflows(layer, states, budget):
        layer(0, torch.full_like(states[:budget], torch.inf))
        assert not cache.slots.isfinite().all()

    optimize(model, cache, hidden, 4, overflows)
    assert cache.slots.isfinite().all()


def test_candidates_do_not_see_each_other():
    model = random_model()
    cache, _, _ = next(positions(model, 1))
    layer = model.candidate_layer(cache, 3)
    rows = torch.randn(3, model.config.hidden_size, device=DEVICE)
    alone = torch.cat([layer(2, row[None]) for row in rows])
    assert torch.allclose(layer(2, rows), alone, atol=1e-5)


def test_a_candidate_takes_the_place_of_the_true_state():
    """It sees the keys and values before its position, and its own in place of the true ones."""
    model = random_model()
    text = tokens_of(model, 8)
    cache = KVCache(model, 20)
    feed(model, cache, text)
    candidate = torch.randn(1, model.config.hidden_size, device=DEVICE)
    got = model.candidate_layer(cache, 1)(2, candidate)[0]

    from_before = KVCache(model, 20)
    feed(model, from_before, text[:-1])
    cos, sin = from_before.cos[7:8], from_before.sin[7:8]

    def store(k, v):
        return from_before.put(2, 7, 8, k, v)

    expected = model.layers[2](candidate[None], cos, sin, None, store)[0, 0]
    assert torch.allclose(got, expected, atol=1e-5)
