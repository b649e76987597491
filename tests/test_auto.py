"""auto.py: whatever it decides, the text is the whole model's; and what it decides is worth it."""
import itertools
import json
import random
from statistics import median

import pytest
import torch
from conftest import at_length, random_model, same_bits, tokens_of, valid, width_for
from enumeration import NUCLEUS, error_of_the_induced_distribution
from folders import set_fields, small_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import extras.auto
import generate
import speculative
from checkpoint import BUNDLED
from extras.auto import SHAPE, SLOPE, TRIAL, VERIFY_ROWS, Auto, Costs, Ratio, distance_of
from model import KVCache
from speculative import (
    Draft,
    SettingsError,
    Stats,
    autoregressive,
    decode,
    draft_by_skipping,
    new_text,
)

CHEAP = {"draft": 1.0, "plain": 1.0, "verify": 1.0, "optimize": 0.5}
HOPELESS = {"draft": 1.0, "plain": 1.0, "verify": 9.0, "optimize": 1.5}
DRAFTS_FREE = {"draft": 0.1, "plain": 1.0, "verify": 1.0, "optimize": 0.1}
ONE_SET = {3: frozenset({1, 2, 3})}                      # the only choice: leave out three layers


def agreeable(**shape):
    """A model whose layers matter little, so that drafts are right."""
    return random_model(residual=0.01, **shape)


def write(model, auto: Auto, count: int, prompt=(1, 2, 3), **chosen) -> Stats:
    stats = Stats()
    assert len(list(decode(model, list(prompt), count, auto, stats=stats, **chosen))) == count
    return stats


# ---------------------------------------------------------------- the text

situations = st.fixed_dictionaries({
    "residual": st.sampled_from([0.01, 0.3, 1.0]),
    "costs": st.fixed_dictionaries({kind: st.floats(0.1, 4) for kind in SHAPE}),
    "draft_length": st.integers(1, 6),
    "count": st.integers(1, 60),
    "length": st.integers(1, 8),
})


def check_greedy_text(residual, costs, draft_length, count, length):
    """Of two texts in passes of one shape: the second starts with what the first one taught."""
    model = random_model(layers=4, residual=residual)
    width = width_for(model, draft_length + 1)
    prompt = tokens_of(model, length)
    plain = KVCache(model, 80, 24)
    expected = list(autoregressive(model, prompt, count, width=width, cache=plain))
    auto = Auto(model, draft_length, costs)
    for _ in range(2):
        cache = KVCache(model, 80, 24)
        stats = write(model, auto, count, prompt, width=width, cache=cache)
        assert stats.tokens == expected
        assert stats.accepted + stats.cycles == stats.new_tokens
        assert stats.drafted <= draft_length * stats.cycles
        assert len(stats.skip_sets) >= stats.optimizations
        assert cache.length == plain.length == length + count - 1
        assert same_bits(valid(cache), valid(plain))


@settings(max_examples=settings().max_examples // 2)
@given(situations)
def test_greedy_text_is_plain_decodings_bit_for_bit(situation):
    check_greedy_text(**situation)


@pytest.mark.thorough
@at_length()
@given(situations)
def test_greedy_text_is_plain_decodings_bit_for_bit_at_length(situation):
    check_greedy_text(**situation)


@pytest.mark.parametrize("nucleus", [{}, NUCLEUS], ids=str)
def test_every_text_has_the_models_own_probability(nucleus):
    costs = {"draft": 1.0, "plain": 2.0, "verify": 1.0, "optimize": 0.1}
    drafts = []

    class Watched(Auto):
        def propose(self, text, most):
            draft = super().propose(text, most)
            drafts.append(len(draft.tokens))
            return draft

    def new_drafter(model):
        return Watched(model, costs=costs)

    assert error_of_the_induced_distribution(new_drafter, **nucleus) < 1e-6
    assert any(drafts)


def test_measured_times_decide_nothing_about_the_text(any_model):
    width = width_for(any_model, 5)
    prompt = tokens_of(any_model, 5)
    plain = list(autoregressive(any_model, prompt, 40, width=width))
    assert write(any_model, Auto(any_model, 4), 40, prompt, width=width).tokens == plain


def test_fixed_costs_make_a_seed_give_the_same_text_again():
    model = random_model()
    a, b = (write(model, Auto(model, costs=CHEAP), 80, temperature=1, seed=3) for _ in range(2))
    assert a.drafted
    assert a.tokens == b.tokens


def test_the_sets_reported_are_those_used(monkeypatch):
    """Auto may turn to another set at any cycle, without a run of the DP, and for a second text."""
    model = agreeable()
    auto = Auto(model, costs=CHEAP)
    used = []

    def watched(text, skip, *rest):
        assert text.stats.skip_sets[-1][1] == skip
        used.append(skip)
        return draft_by_skipping(text, skip, *rest)

    monkeypatch.setattr(extras.auto, "draft_by_skipping", watched)
    for seed in (1, 2):
        assert write(model, auto, 120, tokens_of(model, 5, seed), temperature=1).drafted
    assert len(set(used)) > 1


# ---------------------------------------------------------------- the choice

def test_the_choice_is_the_best_of_all():
    costs = {"draft": 0.9, "plain": 1.0, "verify": 1.2, "optimize": 1.0}
    row = (costs["verify"] - costs["plain"]) / (VERIFY_ROWS - 1)     # a pass's time for each more
    chance = random.Random(0)
    for _ in range(20):
        auto = Auto(random_model(layers=8), chance.randint(1, 7), costs)
        auto.sets = {m: frozenset(range(m)) for m in range(1, 8)}
        auto.distance = {m: chance.random() ** 3 for m in auto.sets}
        auto.choose()
        rates = {}
        for m, k in itertools.product(auto.sets, range(1, auto.draft_length + 1)):
            a = max(0.0, 1 - SLOPE * auto.distance[m])
            tokens = sum(a ** i for i in range(k + 1))
            seconds = k * 0.9 * auto.costs.share(m / 8) + 1.0 + k * row
            rates[m, k] = tokens / seconds
        best = max(rates, key=rates.get)
        assert (auto.choice.budget, auto.choice.length) == best
        assert auto.choice.rate == pytest.approx(rates[best])
        assert auto.choice.seconds == pytest.approx(
            best[1] * auto.draft_time(best[0]) + 1.0 + best[1] * row)
        assert auto.pays == (rates[best] >= 1)


def test_it_drafts_where_that_pays():
    model = agreeable()
    stats = write(model, Auto(model, 4, CHEAP), 100)
    assert stats.tau > 4
    assert len(stats.skip_sets[-1][1]) == 5              # all layers but one


@pytest.mark.parametrize("residual", [0.01, 1.0])
def test_where_it_does_not_pay_trials_cost_no_more_than_their_share(residual):
    model = random_model(residual=residual, context=2048)
    auto = Auto(model, 1, HOPELESS)
    stats = write(model, auto, 1500)
    verify = auto.costs.verify_times([2], HOPELESS)[0]
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
    auto = Auto(model, 4, costs)
    for ratio in (auto.rejections.overall, *(auto.rejections.by_budget[m] for m in range(1, 6))):
        ratio.note(10, 0.1)
    stats = write(model, auto, 1000)
    assert not any(stats.from_draft[:20])
    assert sum(stats.from_draft[-200:]) > 100


def test_many_short_texts_do_not_each_try():
    model = agreeable()
    for count in (1, 2):
        auto = Auto(model, costs=HOPELESS)
        runs = sum(write(model, auto, count).optimizations for _ in range(40))
        assert runs <= 2


@pytest.mark.parametrize("shape, length, message", [
    ({"layers": 1}, 4, "auto needs a model of at least two layers"),
    ({}, 0, "the draft length must lie between"),
    ({}, 128, "the draft length must lie between"),
])
def test_what_auto_cannot_do_is_refused(shape, length, message):
    with pytest.raises(SettingsError, match=message):
        Auto(random_model(**shape), length)


# ---------------------------------------------------------------- what is learned

def new_draft(auto: Auto, confidences: list[float]) -> list[bool]:
    """At each token of a draft that is so sure: would it go on?"""
    auto.choose()
    auto.confidences = []
    auto.alive = 1.0
    return [auto.is_worth_another(confidence) for confidence in confidences]


def test_the_rejection_rate_is_learned():
    """Unsure tokens are wrong in 6 of 10 cases, sure ones in 1; half of them are unsure."""
    auto = Auto(random_model(), 4, CHEAP)
    auto.sets = ONE_SET
    auto.distance = {3: 0.5}
    wrong = {0.15: 0.6, 0.95: 0.1}
    chance = random.Random(1)
    for _ in range(400):
        confidences = chance.choices(list(wrong), k=4)
        new_draft(auto, confidences)
        rejected = [chance.random() < wrong[confidence] for confidence in confidences]
        auto.learn([*rejected, True].index(True))
    assert auto.rejection(3) == pytest.approx(0.35, abs=0.06)
    for confidence, expected in wrong.items():
        new_draft(auto, [confidence])
        assert 1 - auto.alive == pytest.approx(expected, abs=0.08)


def test_a_draft_ends_where_another_token_is_not_worth_its_time():
    costs = {"draft": 1.0, "plain": 1.0, "verify": 2.0, "optimize": 1.0}
    auto = Auto(random_model(), 6, costs)
    auto.sets = ONE_SET
    auto.distance = {3: 0.4}
    auto.rejections.by_confidence[9].note(0, 100.0)      # so sure, and all were right
    auto.rejections.by_confidence[1].note(200, 100.0)    # so unsure, and none was
    # What follows a wrong token is lost, however sure.
    assert new_draft(auto, [0.95, 0.15, 0.95]) == [True, False, False]


def test_old_evidence_fades():
    ratio = Ratio()
    assert ratio.estimate(0.5, 1.0) == 0.5
    for rejected in [1] * 1000 + [0] * 1000:
        ratio.note(rejected, 1.0)
    assert ratio.estimate(0.5, 1.0) < 0.02


# ---------------------------------------------------------------- the DP

def test_the_dp_runs_rarely_while_its_sets_stay():
    """With two layers there is one budget, and here the first layer does nothing."""
    model = random_model(layers=2, residual=0.01, context=4096)
    model.layers[0].o.weight.mul_(0)
    model.layers[0].down.weight.mul_(0)
    stats = write(model, Auto(model, 2, CHEAP | {"optimize": 0.01}), 2000)
    gaps = [b - a for (a, _), (b, _) in zip(stats.skip_sets, stats.skip_sets[1:])]
    assert len(gaps) > 2
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0]


def test_the_dp_takes_its_share_of_the_time_at_most():
    """Its sets change at almost every run here."""
    model = random_model(context=4096)
    auto = Auto(model, 2, CHEAP | {"optimize": 2.0})
    stats = write(model, auto, 1000)
    assert stats.optimizations * 2.0 < 0.03 * stats.cycles * 2 + 4


def test_nothing_is_noted_of_a_dp_that_did_not_run():
    """A prompt of one token has no states for it; it runs after the first pass, and once."""
    model = agreeable()
    auto = Auto(model)
    stats = Stats()
    written = decode(model, [1], 60, auto, stats=stats)
    next(written)
    next(written)
    assert stats.optimizations == 1
    assert len(auto.costs.last["plain"]) == 1
    assert not auto.costs.last["optimize"]               # that of the first pass: nothing was done
    list(written)
    assert 1 <= len(auto.costs.last["optimize"]) <= stats.optimizations


def test_a_set_whose_state_overflows_is_no_good_choice():
    model = random_model()
    auto = Auto(model, costs=CHEAP)
    text, hidden = new_text(model, [1, 2, 3, 4], 20)

    def overflow(module, given, out):
        return torch.full_like(out, torch.nan)

    model.layers[5].register_forward_hook(overflow)
    auto.begin(text, hidden)
    assert sorted(auto.sets) == [1, 2, 3, 4, 5]
    assert all(5 in skipped for skipped in auto.sets.values())
    assert distance_of(torch.nan) == 2.0                 # none is farther
    assert distance_of(-1.0) == 2.0


# ---------------------------------------------------------------- times

def test_times_are_compared_at_equal_pace():
    """On a machine slower for a while, ratios of what is measured then and before stay."""
    costs = Costs(random_model())
    true = {"draft": 1.0, "plain": 1.5, "verify": 1.6, "optimize": 2.0}
    drafting = ("draft", "verify")
    for pace, kinds in ((1, SHAPE), (2, drafting), (1, drafting), (3, drafting)):
        for _ in range(60):
            for kind in kinds:
                if kind == "verify":
                    costs.note_verify(true[kind] * pace, VERIFY_ROWS)
                else:
                    costs.note(kind, true[kind] * pace)
    times = costs.current()
    verify = costs.verify_times([VERIFY_ROWS], times)[0]
    assert verify / times["draft"] == pytest.approx(1.6, rel=0.05)
    assert median(costs.last["plain"]) / times["draft"] == pytest.approx(1.5, rel=0.25)


def test_a_plain_step_is_never_thought_to_take_longer_than_a_verify_pass():
    """The first one of a process is slow, and while drafts pay there are no others."""
    costs = Costs(random_model())
    costs.note("plain", 50.0)
    for _ in range(9):
        costs.note_verify(1.2, rows=5)
        costs.note("draft", 0.5, costs.share(0.5))
    times = costs.current()
    assert times["plain"] <= costs.verify_times([5], times)[0]


def test_shares_follow_the_weights():
    model = random_model(layers=6)
    matrices = [weight for weight in model.layers[0].parameters() if weight.ndim == 2]
    layer = sum(weight.numel() for weight in matrices)
    head = model.head.weight.numel()
    costs = Costs(model)
    assert costs.share(0) == pytest.approx(1)
    assert costs.share(4 / 6) == pytest.approx((head + 2 * layer) / (head + 6 * layer))


def test_in_one_shape_a_plain_step_costs_a_verify_pass():
    costs = Costs(random_model(), HOPELESS)
    assert costs.current()["plain"] == 1
    costs.one_shape = True
    times = costs.current()
    assert times == HOPELESS | {"plain": 9.0}
    assert costs.verify_times([2, 5, 60], times) == [9.0] * 3


def test_in_one_shape_all_passes_are_measured_as_one_kind():
    costs = Costs(random_model())
    costs.one_shape = True
    for rows in (2, 9, 4):
        costs.note_verify(3.0, rows)
    times = costs.current()
    assert times["plain"] == times["verify"] == pytest.approx(3.0)
    assert costs.verify_times([60], times)[0] == pytest.approx(3.0)


def times_of(costs: Costs, *rows: int) -> list[float]:
    times = costs.current()
    return costs.verify_times(list(rows), times)


def test_a_pass_costs_what_passes_of_its_rows_took():
    """Between two sizes: the line through both. A plain step is a pass of one row."""
    costs = Costs(random_model())
    for _ in range(costs.ENOUGH):
        costs.note("plain", 1.0)
        costs.note("draft", 1.0)
        costs.note_verify(1.2, rows=3)
        costs.note_verify(41.2, rows=103)
    assert times_of(costs, 3, 103) == pytest.approx([1.2, 41.2])
    assert times_of(costs, 2, 53) == pytest.approx([1.1, 21.2])
    by_row = (SHAPE["verify"] - SHAPE["plain"]) / (VERIFY_ROWS - 1)
    assert times_of(costs, 113) == pytest.approx([41.2 + 10 * by_row])


def test_one_slow_pass_says_nothing_yet():
    costs = Costs(random_model())
    costs.note("plain", 1.0)
    costs.note("draft", 1.0)
    guessed = times_of(costs, 2, 5, 101)
    assert guessed == sorted(guessed)
    costs.note_verify(100.0, rows=101)
    costs.note_verify(100.0, rows=5)
    assert times_of(costs, 2, 5, 101) == guessed


def test_fixed_costs_are_not_changed_by_what_is_measured():
    costs = Costs(random_model(), CHEAP | {"verify": 2.0})
    for rows in (2, 5, 9):
        for _ in range(9):
            costs.note_verify(77.0, rows)
    assert times_of(costs, 1, 5, 9) == pytest.approx([1.0, 2.0, 3.0])


def test_a_long_draft_that_was_dear_does_not_stop_short_ones():
    """Passes of 61 rows took 60 plain steps' time; those of a few rows little more than one's."""
    auto = Auto(random_model(), 60)
    auto.sets = ONE_SET
    auto.distance = {3: 0.3}
    for _ in range(5):
        auto.costs.note("plain", 1.0)
        auto.costs.note("draft", 0.5, auto.costs.share(0.5))
        auto.costs.note_verify(1.1, rows=3)
        auto.costs.note_verify(60.0, rows=61)
    auto.choose()
    assert 1 <= auto.choice.length <= 3
    assert auto.pays


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

    monkeypatch.setattr(extras.auto, "draft_by_skipping", first_is_wrong)
    stats = write(model, Auto(model, 60), 200)
    assert lengths[0] > 8
    assert sum(stats.from_draft[:100]) > 50


# ---------------------------------------------------------------- the command line

@pytest.fixture
def autos(monkeypatch) -> list[tuple[Auto, dict | None]]:
    """Each Auto that generate.py makes, and the costs that it was given; drafts pay for all."""
    made = []

    def new_auto(model, draft_length, costs):
        auto = Auto(model, draft_length, DRAFTS_FREE)
        made.append((auto, costs))
        return auto

    monkeypatch.setattr(generate, "Auto", new_auto)
    return made


@pytest.fixture(scope="module")
def silent_folder(tmp_path_factory):
    """A model that suggests no settings."""
    return small_folder(tmp_path_factory.mktemp("auto") / "model")


def answer(capsys, folder, *argv) -> dict:
    argv = ["--model", str(folder), "--max-new-tokens", "24", "--json", *argv]
    assert generate.main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_auto_is_the_default_where_the_model_suggests_nothing(capsys, silent_folder, autos):
    answer(capsys, silent_folder)
    answer(capsys, silent_folder, "--draft-length", "3")
    assert [auto.draft_length for auto, _ in autos] == [speculative.DRAFT_LENGTH, 3]
    autos.clear()
    for by_hand in (("--skip-layers", "1"), ("--opt-interval", "8"),
                    ("--draft-exit-threshold", "0.3")):
        answer(capsys, silent_folder, *by_hand)
    assert not autos


def test_a_suggestion_is_followed_unless_auto_is_asked_for(capsys, tmp_path, autos):
    folder = small_folder(tmp_path / "model")
    set_fields(folder, "generation_config.json", clasp={"exit_threshold": 0.2})
    answer(capsys, folder)
    assert not autos
    answer(capsys, folder, "--skip-layers", "auto")
    assert len(autos) == 1


def test_the_bundled_model_suggests_settings_and_auto_may_be_asked_for(capsys, autos):
    answer(capsys, BUNDLED)
    assert not autos
    answer(capsys, BUNDLED, "--skip-layers", "auto")
    assert len(autos) == 1


def test_a_model_of_one_layer_is_decoded_without_auto(capsys, tmp_path, autos, monkeypatch):
    def of_one_layer(**shape):
        return random_model(**shape | {"layers": 1})

    monkeypatch.setattr("folders.random_model", of_one_layer)
    folder = small_folder(tmp_path / "model")
    answer(capsys, folder)
    assert not autos


def test_a_seed_gives_a_sample_again(capsys, silent_folder):
    """Times that are fixed by the model's shape decide, not the clock."""
    def sample(seed):
        return answer(capsys, silent_folder, "--seed", str(seed))["tokens"]

    assert sample(3) == sample(3) != sample(4)


def test_the_clock_decides_only_where_text_is_greedy(capsys, silent_folder, autos):
    answer(capsys, silent_folder)
    answer(capsys, silent_folder, "--temperature", "0")
    assert [costs for _, costs in autos] == [SHAPE, None]


def test_greedy_text_is_the_same_however_auto_was_chosen(capsys, silent_folder):
    greedy = ("--temperature", "0", "--exact")
    by_default = answer(capsys, silent_folder, *greedy)["tokens"]
    assert by_default == answer(capsys, silent_folder, *greedy, "--skip-layers", "auto")["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_exact_only_where_that_is_asked_for(capsys, silent_folder, autos, dtype):
    chosen = ("--temperature", "0", "--dtype", dtype)
    assert not answer(capsys, silent_folder, *chosen)["exact"]
    out = answer(capsys, silent_folder, *chosen, "--exact", "--compare")
    assert out["exact"]
    assert out["stats"]["drafted"] > 0
    assert out["identical"] or out["difference"]["identical_at_same_width"]
    by_hand = answer(capsys, silent_folder, *chosen, "--skip-layers", "1")
    assert by_hand["exact"]


def test_a_text_without_drafts_says_so(capsys, monkeypatch):
    def hopeless(model, draft_length, costs):
        return Auto(model, draft_length, HOPELESS)

    monkeypatch.setattr(generate, "Auto", hopeless)
    assert generate.main(["--max-new-tokens", "12", "--skip-layers", "auto"]) == 0
    assert "no drafts" in capsys.readouterr().err


@pytest.mark.parametrize("argv, line", [
    (["--skip-layers", "auto", "--opt-interval", "4"], "leave them out"),
    (["--skip-layers", "auto", "--draft-exit-threshold", "0.3"], "leave them out"),
    (["--skip-layers", "some"], "neither a number nor auto"),
    (["--skip-layers", "auto", "--draft-length", "0"], "the draft length must lie between"),
])
def test_what_does_not_go_with_auto_is_refused_in_one_line(capsys, argv, line):
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
