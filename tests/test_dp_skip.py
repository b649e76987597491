"""dp_skip.py: two readings of one algorithm that agree, and what they claim measured on the models."""
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICE, feed, random_model, tokens_of
from dp_skip import select_layers, select_layers_plain
from model import KVCache
from speculative import candidate_layer, optimize


def toy(layers, size=16, seed=0):
    """Residual layers without any attention, and the true states of one token through them."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, size, size, generator=g, dtype=torch.float64) * 0.6 / size ** 0.5

    def layer(i, rows):
        return rows + (rows @ weights[i]).tanh()

    states = [torch.randn(1, size, generator=g, dtype=torch.float64)]
    for i in range(layers):
        states.append(layer(i, states[-1]))
    return layer, torch.cat(states)


def cosine_of(layer, hidden, skipped):
    """What a skip set really costs: run the other layers and compare with h_L."""
    x = hidden[:1]
    for i in range(len(hidden) - 1):
        if i not in skipped:
            x = layer(i, x)
    return F.cosine_similarity(x.float(), hidden[-1:].float()).item()


def same(fast, plain):
    assert fast.skip_sets == plain.skip_sets
    assert fast.cosines == pytest.approx(plain.cosines, abs=1e-5)


@pytest.mark.parametrize("layers, budget", [(1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (7, 6), (7, 7), (24, 12)])
def test_fast_and_plain_agree(layers, budget):
    for seed in range(10):
        layer, hidden = toy(layers, seed=seed)
        same(select_layers(layer, hidden, budget), select_layers_plain(layer, hidden, budget))


@pytest.mark.parametrize("smallest, budget", [(0, 0), (3, 3), (2, 5), (5, 8), (9, 9), (10, 10)])
def test_leaving_out_small_budgets_changes_nothing_for_the_others(smallest, budget):
    for seed in range(5):
        layer, hidden = toy(10, seed=seed)
        every, some = select_layers(layer, hidden, budget), select_layers(layer, hidden, budget, smallest)
        assert some.skip_sets == every.skip_sets[smallest:]
        assert some.cosines == pytest.approx(every.cosines[smallest:], abs=1e-6)


def survivors_by_sum(layer, hidden, costs):
    """Algorithm 1 over the sums of unequal costs, written down naively: {sum saved: (set, state)} after the last layer."""
    g = {0: (frozenset(), hidden[0])}
    for i, cost in enumerate(costs):
        options = {}
        for j, (skipped, state) in g.items():
            run = layer(i, state[None])[0] if skipped else hidden[i + 1]
            options.setdefault(j, []).append((skipped, run))
            options.setdefault(j + cost, []).append((skipped | {i}, state))
        g = {j: max(choices, key=lambda c: F.cosine_similarity(c[1], hidden[i + 1], dim=0)) for j, choices in options.items()}
    return g


@pytest.mark.parametrize("costs", [(1,) * 8, (2, 1, 2, 1, 2, 1, 2, 1), (3, 3, 3, 3, 3, 3), (1, 5, 2, 2, 7, 1, 3)])
def test_costs_that_differ(costs):
    for seed in range(5):
        layer, hidden = toy(len(costs), seed=seed)
        naive = survivors_by_sum(layer, hidden, costs)
        for smallest, budget in ((0, sum(costs) - 1), (sum(costs) // 2, sum(costs) // 2 + 4)):
            wanted = [j for j in sorted(naive) if smallest <= j <= budget]
            assert select_layers(layer, hidden, budget, smallest, costs).skip_sets == [naive[j][0] for j in wanted]


def test_costs_must_be_one_a_layer_and_at_least_1():
    layer, hidden = toy(3)
    for costs in ((1, 2), (1, 0, 1)):
        with pytest.raises(ValueError, match="3 layers need as many costs"):
            select_layers(layer, hidden, 2, 0, costs)


@pytest.mark.parametrize("algorithm", [select_layers, select_layers_plain])
def test_a_candidate_that_overflows_is_chosen_last(algorithm):
    layer, hidden = toy(6)
    skip_sets, cosines = algorithm(lambda i, rows: layer(i, rows) * (torch.nan if i == 3 else 1), hidden, 4)
    assert [len(skipped) for skipped in skip_sets] == [0, 1, 2, 3, 4] and all(abs(c) <= 1.000001 for c in cosines)


def test_each_budget_gets_a_set_of_its_size_and_the_cosine_is_what_that_set_gives():
    layer, hidden = toy(12)
    for budget, (skipped, cosine) in enumerate(zip(*select_layers(layer, hidden, 9))):
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
            every = [cosine_of(layer, hidden, set(s)) for s in itertools.combinations(range(8), budget)]
            assert cosine <= max(every) + 1e-6
            gained += cosine - sum(every) / len(every)
    assert gained > 1                                  # summed over 5 x 7 cases


def test_layers_that_do_nothing_are_the_ones_skipped():
    layer, hidden = toy(9)
    idle = {1, 4, 7}

    def with_idle(i, rows):
        return rows if i in idle else layer(i, rows)

    states = [hidden[:1]]
    for i in range(9):
        states.append(with_idle(i, states[-1]))
    selection = select_layers(with_idle, torch.cat(states), 3)
    assert selection.skip_sets[3] == idle and selection.cosines[3] == pytest.approx(1)


def test_fast_calls_each_layer_once_on_at_most_budget_rows():
    layer, hidden = toy(10)
    calls = []
    select_layers(lambda i, rows: calls.append((i, len(rows))) or layer(i, rows), hidden, 4)
    assert calls == [(i, min(i, 4)) for i in range(1, 10)]     # before layer 0 nothing can be skipped


@pytest.mark.parametrize("budget", [-1, 6])
def test_a_budget_outside_the_layers_is_an_error(budget):
    layer, hidden = toy(5)
    for select in (select_layers, select_layers_plain):
        with pytest.raises(ValueError, match="cannot skip"):
            select(layer, hidden, budget)


# ---------------------------------------------------------------- on models: position, mask, scratch slots

def positions(model, count):
    """Caches of different lengths with the last token's states; the first at position 0, the second rolled back."""
    for number in range(count):
        cache = KVCache(model, 100)
        feed(model, cache, tokens_of(model, 1 if number == 0 else random.Random(number).randint(2, 60), number))
        if number == 1:
            feed(model, cache, tokens_of(model, 9, 99))
            cache.length -= 7
        if number > 0:
            cache.length -= 1                          # once more alone, for its states
            yield cache, feed(model, cache, tokens_of(model, 1, number + 50))
        else:
            cache.length = 0
            yield cache, feed(model, cache, tokens_of(model, 1, 0))


def test_fast_and_plain_agree_on_models_at_20_positions(any_model):
    budget = len(any_model.layers) // 2
    for cache, hidden in positions(any_model, 20 if any_model.config.hidden_size < 500 else 5):
        same(optimize(any_model, cache, hidden, budget),
             optimize(any_model, cache, hidden, budget, select=select_layers_plain))


def test_the_cosine_is_what_the_draft_model_then_has_at_that_token(any_model):
    budget = len(any_model.layers) - 1
    for number, (cache, hidden) in enumerate(positions(any_model, 4)):
        selection = optimize(any_model, cache, hidden, budget)
        token = tokens_of(any_model, 1, number + 50 if number else 0)
        for m in {1, budget // 2, budget}:
            cache.length -= 1                          # the true keys and values before it, and only its own there
            drafted = any_model(torch.tensor([token], device=DEVICE), cache, selection.skip_sets[m])[-1][0]
            assert F.cosine_similarity(drafted, hidden[-1:]).item() == pytest.approx(selection.cosines[m], abs=1e-4)


def test_the_dp_leaves_the_cache_as_it_was(any_model):
    for cache, hidden in positions(any_model, 3):
        n = cache.length
        before = [(k[:, :, :n].clone(), v[:, :, :n].clone()) for k, v in zip(cache.keys, cache.values)]
        optimize(any_model, cache, hidden, len(any_model.layers) // 2)
        assert cache.length == n
        for (k, v), new_k, new_v in zip(before, cache.keys, cache.values):
            assert torch.equal(k, new_k[:, :, :n]) and torch.equal(v, new_v[:, :, :n])


def test_candidates_do_not_see_each_other():
    model = random_model()
    cache, hidden = next(positions(model, 1))
    layer = candidate_layer(model, cache, 3)
    rows = torch.randn(3, model.config.hidden_size, device=DEVICE)
    alone = torch.cat([layer(2, row[None]) for row in rows])
    assert torch.allclose(layer(2, rows), alone, atol=1e-5)
