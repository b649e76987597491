"""extras/skipping.py: how many layers are skipped, how far is drafted, and when the DP runs."""
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, tokens_of

import extras.skipping
import speculative
from extras.auto import Auto
from extras.lookup import Lookup
from extras.skipping import SLOPE, TRIAL, distance_of
from extras.worth import VERIFY_ROWS
from speculative import Draft, Stats, decode, draft_by_skipping, new_text

CHEAP = {"draft": 1.0, "plain": 1.0, "verify": 1.0, "optimize": 0.5}
HOPELESS = {"draft": 1.0, "plain": 1.0, "verify": 9.0, "optimize": 1.5}
ONE_SET = {3: frozenset({1, 2, 3})}                      # the only choice: leave out three layers


class Blind(Lookup):
    """Finds nothing."""

    def look(self, text, most):
        pass


def blind(model, draft_length=4, costs=None, layers_pay=True) -> Auto:
    """An Auto that can only skip layers."""
    auto = Auto(model, draft_length, costs)
    auto.skipping.hopeful |= layers_pay
    auto.lookup = Blind()
    return auto


def agreeable(**shape):
    """A model whose layers matter little, so that drafts are right."""
    return random_model(residual=0.01, **shape)


def write(model, auto: Auto, count: int, prompt=(1, 2, 3), **chosen) -> Stats:
    stats = Stats()
    assert len(list(decode(model, list(prompt), count, auto, stats=stats, **chosen))) == count
    return stats


def test_the_dp_has_a_price_only_where_it_ran(monkeypatch):
    """Not in the first cycle of a text, where it ran after the last cycle of the text before."""
    model = agreeable()
    auto = blind(model, costs=CHEAP)
    events = []
    note, run_dp = auto.costs.note, auto.skipping.run_dp

    def noted(kind, *rest):
        events.append(kind)
        note(kind, *rest)

    def ran(*rest):
        events.append("dp")
        run_dp(*rest)

    monkeypatch.setattr(auto.costs, "note", noted)
    monkeypatch.setattr(auto.skipping, "run_dp", ran)
    for count in range(2, 60):
        events.append("text")
        write(model, auto, count)
    kinds = [kind for kind in events if kind in ("text", "dp", "optimize")]
    before = {earlier for earlier, kind in itertools.pairwise(kinds) if kind == "optimize"}
    assert before == {"dp"}
    assert ("dp", "text") in itertools.pairwise(kinds)    # so the case was there


def test_the_sets_reported_are_those_used(monkeypatch):
    """Auto may turn to another set at any cycle, without a run of the DP, and for a second text."""
    model = agreeable()
    auto = blind(model, costs=CHEAP)
    used = []

    def watched(text, skip, *rest):
        assert text.stats.skip_sets[-1][1] == skip
        used.append(skip)
        return draft_by_skipping(text, skip, *rest)

    monkeypatch.setattr(extras.skipping, "draft_by_skipping", watched)
    for seed in (1, 2):
        assert write(model, auto, 120, tokens_of(model, 5, seed), temperature=1).drafted
    assert len(set(used)) > 1


@pytest.mark.parametrize("residual", [0.01, 1.0])
def test_where_it_does_not_pay_trials_cost_no_more_than_their_share(residual):
    model = random_model(residual=residual, context=2048)
    auto = blind(model, 1, HOPELESS)
    stats = write(model, auto, 1500)
    verify = auto.costs.pass_times(1)[1]
    trial = verify + auto.costs.share(1 / 6) * HOPELESS["draft"]     # one layer left out, at most
    spent = stats.optimizations * HOPELESS["optimize"]
    spent += stats.drafted * trial + (stats.cycles - stats.drafted) * HOPELESS["plain"]
    assert stats.optimizations > 1                       # it did try again
    assert stats.drafted
    assert spent < 1500 * HOPELESS["plain"] * (1 + TRIAL) + HOPELESS["optimize"] + 4


def test_a_text_that_becomes_easy_is_noticed():
    """The draft always wrong at first, as far as the statistics know; then always right."""
    model = agreeable(context=1024)
    costs = {"draft": 1.0, "plain": 1.0, "verify": 1.1, "optimize": 0.1}
    auto = blind(model, 4, costs)
    rejections = auto.skipping.stopping.rejections
    for ratio in (rejections.overall, *(rejections.by_budget[m] for m in range(1, 6))):
        ratio.note(10, 0.1)
    stats = write(model, auto, 1000)
    assert not any(stats.from_draft[:5])
    assert sum(stats.from_draft[-200:]) > 100


def test_many_short_texts_do_not_each_try():
    model = agreeable()
    for count in (1, 2):
        auto = blind(model, costs=HOPELESS)
        runs = sum(write(model, auto, count).optimizations for _ in range(40))
        assert runs <= 2


def test_of_a_small_model_nothing_is_expected_until_it_is_tried():
    """Unless it is known to spare layers. Trials become rarer while they fail."""
    sets = []
    for layers_pay in (True, False):
        model = random_model(residual=1.0, context=2048)
        stats = write(model, blind(model, 1, HOPELESS, layers_pay), 1500)
        sets.append([at for at, _ in stats.skip_sets])
    assert sets[0][0] == 0 < 50 < sets[1][0]
    gaps = [b - a for a, b in zip(sets[1], sets[1][1:])]
    assert len(gaps) > 1 and gaps == sorted(gaps)


def test_of_a_large_model_much_is_expected(monkeypatch):
    monkeypatch.setattr(extras.skipping, "LARGE", 1000)
    model = random_model()
    assert write(model, blind(model, layers_pay=False), 1).optimizations == 1


@pytest.fixture
def new_draft(monkeypatch):
    """At each token of a draft that is so sure: would it go on?"""
    def ask(auto: Auto, confidences: list[float]) -> list[bool]:
        answers = []

        def ask_all(text, skip, most, go_on):
            answers.extend(go_on(confidence) for confidence in confidences)

        monkeypatch.setattr(extras.skipping, "draft_by_skipping", ask_all)
        auto.skipping.choose()
        auto.skipping.propose(SimpleNamespace(stats=Stats()), most=len(confidences))
        return answers
    return ask


def test_the_rejection_rate_is_learned(new_draft):
    """Unsure tokens are wrong in 6 of 10 cases, sure ones in 1; half of them are unsure."""
    auto = blind(random_model(), 4, CHEAP)
    auto.skipping.sets = ONE_SET
    auto.skipping.distance = {3: 0.5}
    wrong = {0.15: 0.6, 0.95: 0.1}
    chance = random.Random(1)
    for _ in range(400):
        confidences = chance.choices(list(wrong), k=4)
        new_draft(auto, confidences)
        rejected = [chance.random() < wrong[confidence] for confidence in confidences]
        auto.skipping.stopping.learn([*rejected, True].index(True))
    assert auto.skipping.rejection(3) == pytest.approx(0.35, abs=0.06)
    for confidence, expected in wrong.items():
        new_draft(auto, [confidence])
        assert 1 - auto.skipping.stopping.all_right == pytest.approx(expected, abs=0.08)


def test_a_draft_ends_where_another_token_is_not_worth_its_time(new_draft):
    costs = {"draft": 1.0, "plain": 1.0, "verify": 1.2, "optimize": 1.0}
    auto = blind(random_model(), 6, costs)
    auto.skipping.sets = ONE_SET
    auto.skipping.distance = {3: 0.4}
    by_confidence = auto.skipping.stopping.rejections.by_confidence
    by_confidence[9].note(0, 100.0)      # so sure, and all were right
    by_confidence[1].note(200, 100.0)    # so unsure, and none was
    # What follows a wrong token is lost, however sure.
    assert new_draft(auto, [0.95, 0.15, 0.95]) == [True, False, False]


def test_the_dp_runs_rarely_while_its_sets_stay():
    """With two layers there is one budget, and here the first layer does nothing."""
    model = random_model(layers=2, residual=0.01, context=4096)
    model.layers[0].o.weight.mul_(0)
    model.layers[0].down.weight.mul_(0)
    stats = write(model, blind(model, 2, CHEAP | {"optimize": 0.01}), 2000)
    gaps = [b - a for (a, _), (b, _) in zip(stats.skip_sets, stats.skip_sets[1:])]
    assert len(gaps) > 2
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0]


def test_the_dp_takes_its_share_of_the_time_at_most():
    """Its sets change at almost every run here."""
    model = random_model(context=4096)
    auto = blind(model, 2, CHEAP | {"optimize": 2.0})
    stats = write(model, auto, 1000)
    assert stats.optimizations * 2.0 < 0.03 * stats.cycles * 2 + 4


def test_nothing_is_noted_of_a_dp_that_did_not_run():
    """A prompt of one token has no states for it; it runs after the first pass, and once."""
    model = agreeable()
    auto = blind(model)
    stats = Stats()
    written = decode(model, [1], 60, auto, stats=stats)
    next(written)
    next(written)
    assert stats.optimizations == 1
    assert auto.costs.measured == {1: 1}                 # not that of before: nothing was done
    list(written)
    assert 1 <= auto.costs.measured["optimize"] <= stats.optimizations


def test_a_set_whose_state_overflows_is_no_good_choice():
    model = random_model()
    auto = blind(model, costs=CHEAP)
    text, hidden = new_text(model, [1, 2, 3, 4], 20)

    def overflow(module, given, out):
        return torch.full_like(out, torch.nan)

    model.layers[5].register_forward_hook(overflow)
    auto.begin(text, hidden)
    assert sorted(auto.skipping.sets) == [1, 2, 3, 4, 5]
    assert all(5 in skipped for skipped in auto.skipping.sets.values())
    assert distance_of(torch.nan) == 2.0                 # none is farther
    assert distance_of(-1.0) == 2.0


def test_it_drafts_where_that_pays():
    model = agreeable()
    stats = write(model, blind(model, 4, CHEAP), 100)
    assert stats.tau > 4
    assert len(stats.skip_sets[-1][1]) == 5              # all layers but one


def test_a_long_draft_that_was_dear_does_not_stop_short_ones():
    """Passes of 61 rows took 60 plain steps' time; those of a few rows little more than one's."""
    auto = blind(random_model(), 60)
    auto.skipping.sets = ONE_SET
    auto.skipping.distance = {3: 0.3}
    for _ in range(50):
        auto.costs.note(1, 1.0)
        auto.costs.note("draft", 0.5, auto.costs.share(0.5))
        auto.costs.note_pass(3, 1.1)
        auto.costs.note_pass(61, 60.0)
    auto.skipping.choose()
    assert 1 <= auto.skipping.choice.length <= 3
    assert auto.skipping.pays


class MadeUpClock:
    """Time as a model's passes are said to take it: up to 8 rows hardly more than one."""
    MANY = 20.0               # plain steps' time of a pass of more than 8 rows

    def __init__(self, model):
        self.now = 0.0
        self.model_forward = model.forward
        self.layers = len(model.layers)
        model.forward = self.forward

    def forward(self, tokens, cache=None, skip=(), slots=None):
        rows = tokens.shape[1]
        whole = self.MANY if rows > 8 else 1 + 0.02 * (rows - 1)
        self.now += whole * (1 - len(skip) / self.layers)
        return self.model_forward(tokens, cache, skip, slots)

    def __call__(self) -> float:
        self.now += 1e-3                                 # looking at the clock takes time too
        return self.now


def test_drafts_go_on_after_a_long_one_that_was_rejected(monkeypatch):
    """The first draft is wrong from its first token on, all that follow are right."""
    model = agreeable()
    clock = MadeUpClock(model)
    monkeypatch.setattr(speculative, "clock", lambda model: clock)
    lengths = []

    def first_is_wrong(text, skip, *rest):
        draft = draft_by_skipping(text, skip, *rest)
        lengths.append(len(draft.tokens))
        if len(lengths) > 1:
            return draft
        wrong = (draft.tokens[0] + 1) % model.config.vocab_size
        return Draft([wrong, *draft.tokens[1:]], draft.distributions)

    monkeypatch.setattr(extras.skipping, "draft_by_skipping", first_is_wrong)
    stats = write(model, blind(model, 60), 200)
    assert lengths[0] > 8
    assert sum(stats.from_draft[:100]) > 50


def test_the_choice_is_the_best_of_all():
    costs = {"draft": 0.9, "plain": 1.0, "verify": 1.2, "optimize": 1.0}
    row = (costs["verify"] - costs["plain"]) / (VERIFY_ROWS - 1)     # a pass's time for each more
    chance = random.Random(0)
    for _ in range(20):
        auto = blind(random_model(layers=8), chance.randint(1, 7), costs)
        auto.skipping.sets = {m: frozenset(range(m)) for m in range(1, 8)}
        auto.skipping.distance = {m: chance.random() ** 3 for m in auto.skipping.sets}
        auto.skipping.choose()
        rates = {}
        for m, k in itertools.product(auto.skipping.sets, range(1, auto.skipping.draft_length + 1)):
            a = max(0.0, 1 - SLOPE * auto.skipping.distance[m])
            tokens = sum(a ** i for i in range(k + 1))
            seconds = k * 0.9 * auto.costs.share(m / 8) + 1.0 + k * row
            rates[m, k] = tokens / seconds
        best = max(rates, key=rates.get)
        assert (auto.skipping.budget, auto.skipping.choice.length) == best
        assert auto.skipping.choice.rate == pytest.approx(rates[best])
        assert auto.skipping.choice.seconds == pytest.approx(
            best[1] * auto.skipping.draft_time(best[0]) + 1.0 + best[1] * row)
        assert auto.skipping.pays == (rates[best] >= 1)
