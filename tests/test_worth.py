"""extras/worth.py: what a draft brings, and what it costs, as learned from what was measured."""
import math
import random

import pytest
from conftest import random_model

from extras.worth import (
    NOTHING,
    SHAPE,
    VERIFY_ROWS,
    Costs,
    Ratio,
    best_choice,
    times_between,
)

CHEAP = {"draft": 1.0, "plain": 1.0, "verify": 1.0, "optimize": 0.5}
HOPELESS = {"draft": 1.0, "plain": 1.0, "verify": 9.0, "optimize": 1.5}
ROW = (SHAPE["verify"] - SHAPE["plain"]) / (VERIFY_ROWS - 1)


# ---------------------------------------------------------------- the best length

def test_the_best_choice_is_the_best_of_all():
    chance = random.Random(0)
    for _ in range(200):
        chances = [chance.random() ** 0.3 for _ in range(chance.randint(1, 12))]
        draft_time = chance.choice([0.0, 0.1, 0.5, 1.0])
        pass_times = sorted(1 + chance.random() for _ in range(len(chances) + 1))
        rates = {}
        for length in range(1, len(chances) + 1):
            tokens = 1 + sum(math.prod(chances[:i]) for i in range(1, length + 1))
            rates[length] = tokens / (length * draft_time + pass_times[length])
        choice = best_choice(chances, draft_time, pass_times)
        assert choice.rate == pytest.approx(max(rates.values()))
        assert choice.rate == pytest.approx(rates[choice.length])


def test_where_nothing_can_be_drafted_the_choice_is_worth_nothing():
    assert best_choice([], 0.5, [1.0]) is NOTHING
    assert NOTHING.rate == 0 and NOTHING.length == 0


def test_old_evidence_fades():
    ratio = Ratio()
    assert ratio.estimate(0.5, 1.0) == 0.5
    for rejected in [1] * 1000 + [0] * 1000:
        ratio.note(rejected, 1.0)
    assert ratio.estimate(0.5, 1.0) < 0.02


# ---------------------------------------------------------------- measured times

def measured(costs: Costs, true: dict, times: int = 60, slow=lambda i: 1.0):
    """Each kind is measured so often, in turn, on a machine that is ``slow(i)`` times as slow."""
    for i in range(times):
        for kind, time in true.items():
            costs.note(kind, time * slow(i))


def ratios(costs: Costs, kinds) -> list[float]:
    return [costs.time(kind) / costs.time(1) for kind in kinds]


def test_times_are_learned_as_ratios():
    costs = Costs(random_model())
    measured(costs, {1: 1.0, 5: 1.6, 16: 4.0, "draft": 0.5, "optimize": 7.0}, times=200)
    assert ratios(costs, (5, 16, "draft", "optimize")) == pytest.approx([1.6, 4, 0.5, 7], rel=0.03)


def test_a_slow_hour_changes_no_ratio():
    """What is measured only while the machine is slow is compared with what it took then."""
    costs = Costs(random_model())
    measured(costs, {1: 1.0, 5: 1.2}, times=100)
    measured(costs, {5: 3.6, 9: 4.2}, times=100)                     # three times as slow
    measured(costs, {1: 1.0, 5: 1.2}, times=100)
    assert ratios(costs, (5, 9)) == pytest.approx([1.2, 1.4], rel=0.1)


def test_outliers_do_not_add_up():
    """One in ten passes takes five times as long. Ratios stay, however long this goes on."""
    chance = random.Random(0)
    costs = Costs(random_model())
    for i in range(20000):
        kind = 16 if i % 200 == 0 else chance.choice([1, 5])
        true = {1: 1.0, 5: 1.2, 16: 2.0}[kind]
        costs.note(kind, true * chance.choice([1] * 9 + [5]) * chance.uniform(0.95, 1.05))
    assert ratios(costs, (5, 16)) == pytest.approx([1.2, 2.0], rel=0.15)


def test_one_measurement_moves_a_guess_a_little():
    costs = Costs(random_model())
    costs.note(1, 1.0)
    guessed = costs.pass_times(100)
    assert guessed == pytest.approx([1 + ROW * tokens for tokens in range(101)])
    costs.note(5, 1000.0)
    assert costs.pass_times(100)[4] == pytest.approx(1.25 * guessed[4])


def test_before_anything_is_measured_times_are_the_shapes():
    costs = Costs(random_model())
    for kind in ("draft", "optimize"):
        assert costs.time(kind) == SHAPE[kind]
    assert costs.pass_times(4)[4] == pytest.approx(SHAPE["verify"])
    costs.note("draft", 7 * SHAPE["draft"])
    assert costs.plain == pytest.approx(7 * SHAPE["plain"])


def test_a_pass_costs_what_passes_of_its_rows_took():
    """Between two sizes: the line through both. Past the last: as steep as the shape's."""
    known = [(1, 1.0), (3, 1.2), (103, 41.2)]
    times = times_between(known, 0.05, 113)
    assert [times[0], times[2], times[102]] == [1.0, 1.2, 41.2]
    assert times[1] == pytest.approx(1.1) and times[52] == pytest.approx(21.2)
    assert times[112] == pytest.approx(41.2 + 10 * 0.05)


def test_fewer_rows_never_take_longer():
    """The first pass of a process is slow, and while drafts pay it may be the only plain one."""
    costs = Costs(random_model())
    costs.note(1, 50.0)
    measured(costs, {5: 1.2, 9: 1.3})
    times = costs.pass_times(12)
    assert times == sorted(times)
    assert costs.plain == times[0] <= times[4]


def test_fixed_costs_are_not_changed_by_what_is_measured():
    costs = Costs(random_model(), CHEAP | {"verify": 2.0})
    measured(costs, {2: 77.0, 5: 77.0, 9: 77.0, "draft": 5.0})
    assert costs.pass_times(8) == pytest.approx([1 + 0.25 * tokens for tokens in range(9)])
    assert costs.time("draft") == 1.0


def test_where_passes_are_padded_a_plain_step_costs_as_much_as_a_short_draft():
    for fixed in (None, HOPELESS):
        costs = Costs(random_model(), fixed)
        costs.pass_times(8)
        costs.pad_to(5)
        for rows in (2, 4, 5):
            costs.note_pass(rows, 3.0)
        times = costs.pass_times(8)
        assert len(set(times[:5])) == 1
        assert times[4:] == sorted(set(times))
        assert costs.plain == times[0] == (9.0 if fixed else pytest.approx(3.0, rel=0.5))


def test_another_token_costs_what_it_adds_to_a_pass_that_checks_some():
    """The second row may cost more than those after it; but a draft that asks has paid for it."""
    costs = Costs(random_model())
    measured(costs, {1: 1.0, 2: 1.3, 5: 1.6})
    assert costs.row_time(4) == pytest.approx(0.1, abs=0.02)
    assert costs.row_time(1) == 0


def test_shares_follow_the_weights():
    model = random_model(layers=6)
    matrices = [weight for weight in model.layers[0].parameters() if weight.ndim == 2]
    layer = sum(weight.numel() for weight in matrices)
    head = model.head.weight.numel()
    costs = Costs(model)
    assert costs.share(0) == pytest.approx(1)
    assert costs.share(4 / 6) == pytest.approx((head + 2 * layer) / (head + 6 * layer))
