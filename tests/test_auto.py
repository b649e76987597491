"""auto.py: whatever it decides, the text is the whole model's; and what it decides is worth its time."""
import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto import SHAPE, SLOPE, TRIAL, Auto, Costs, Ratio, block_costs
from conftest import BUNDLED, DEVICE, feed, random_model, tokens_of
from exact import exact_width
from generate import main
from model import KVCache, load_model
from speculative import SettingsError, Stats, autoregressive, clasp, draft
from test_speculative import NUCLEUS, error_of_the_induced_distribution

CHEAP = dict(draft=1.0, plain=1.0, verify=1.0, optimize=0.5)
HOPELESS = dict(draft=1.0, plain=1.0, verify=3.0, optimize=1.5)


def agreeable(**more):
    """A model whose layers matter little, so that drafts are right."""
    return random_model(residual=0.01, **more)


@settings(max_examples=settings().max_examples // 3)
@given(st.sampled_from([0.01, 0.3, 1.0]), st.sampled_from([None, (1, 1), (1, 3)]), st.fixed_dictionaries(
    {kind: st.floats(0.1, 4) for kind in SHAPE}), st.integers(1, 6), st.integers(1, 60), st.integers(1, 8))
def test_greedy_text_is_plain_decodings_bit_for_bit(residual, blocks, costs, draft_length, count, length):
    model = random_model(layers=4, residual=residual)
    model.block_costs = blocks
    prompt, width = tokens_of(model, length), exact_width(model, draft_length + 1)
    caches = [KVCache(model, 80, 24) for _ in range(2)]
    plain = list(autoregressive(model, prompt, count, width=width, cache=caches[0]))
    auto = Auto(model, costs)
    for cache in (caches[1], KVCache(model, 80, 24)):                     # the second text starts with what the first taught
        stats = Stats()
        assert list(clasp(model, prompt, count, draft_length=draft_length, auto=auto, cache=cache, stats=stats)) == plain
        assert stats.accepted + stats.cycles == stats.new_tokens and stats.drafted <= draft_length * stats.cycles
        assert len(stats.skip_sets) >= stats.optimizations
        n = cache.length
        assert n == caches[0].length == length + count - 1
        assert torch.equal(cache.slots[..., :n, :], caches[0].slots[..., :n, :])


@pytest.mark.parametrize("settings", [{}, NUCLEUS], ids=str)
def test_every_text_has_the_models_own_probability(monkeypatch, settings):
    costs = dict(draft=1.0, plain=2.0, verify=1.0, optimize=0.1)                      # with these it drafts
    assert error_of_the_induced_distribution(monkeypatch, each=lambda model: dict(auto=Auto(model, costs)), **settings) < 1e-6


def test_measured_times_decide_nothing_about_the_text(any_model):
    prompt = tokens_of(any_model, 5)
    plain = list(autoregressive(any_model, prompt, 40, width=5))
    assert plain == list(clasp(any_model, prompt, 40, draft_length=4, auto=Auto(any_model)))


def test_the_sets_reported_are_those_used(monkeypatch):
    """Auto may turn to another set at any cycle, without a run of the programme, and keeps what it knows for a second text."""
    model, used = agreeable(), []
    auto = Auto(model, CHEAP)

    def watched(model, cache, token, skip, length, *rest):
        used.append((skip, length, stats.skip_sets[-1:]))
        return draft(model, cache, token, skip, length, *rest)

    monkeypatch.setattr("speculative.draft", watched)
    for seed in (1, 2):
        stats = Stats()
        list(clasp(model, tokens_of(model, 5, seed), 120, temperature=1, auto=auto, stats=stats))
        assert stats.drafted
    assert len({skip for skip, length, _ in used if length}) > 1
    assert all(reported[0][1] == skip for skip, length, reported in used if length)


def test_fixed_costs_make_a_seed_give_the_same_text_again():
    model = random_model()
    a, b = (list(clasp(model, [1, 2, 3], 80, temperature=1, seed=3, auto=Auto(model, CHEAP))) for _ in range(2))
    assert a == b


def test_the_choice_is_the_best_of_all():
    auto, choices = Auto(random_model(layers=8), dict(draft=0.9, plain=1.0, verify=1.2, optimize=1)), random.Random(0)
    for _ in range(20):
        auto.sets = {m: frozenset(range(m)) for m in range(1, 8)}
        auto.distance = {m: choices.random() ** 3 for m in auto.sets}
        auto.longest = choices.randint(1, 7)
        auto.choose()
        rates = {}
        for m, k in itertools.product(auto.sets, range(1, auto.longest + 1)):
            a = max(0.0, 1 - SLOPE * auto.distance[m])
            rates[m, k] = sum(a ** i for i in range(k + 1)) / (k * 0.9 * auto.costs.share(m / 8) + 1.2)
        best = max(rates, key=rates.get)
        assert (auto.budget, auto.length) == best and auto.rate == pytest.approx(rates[best])
        assert auto.pays == (auto.rate >= 1)


def test_in_one_shape_a_plain_step_costs_a_verify_pass():
    costs = Costs(random_model(), HOPELESS)
    assert costs.current()["plain"] == 1
    costs.one_shape = True
    assert costs.current() == HOPELESS | {"plain": 3.0}


def test_it_drafts_where_that_pays():
    model, stats = agreeable(), Stats()
    list(clasp(model, [1, 2, 3], 100, draft_length=4, auto=Auto(model, CHEAP), stats=stats))
    assert stats.tau > 4 and len(stats.skip_sets[-1][1]) == 5              # all layers but one


@pytest.mark.parametrize("residual", [0.01, 1.0])
def test_where_it_does_not_pay_trials_cost_no_more_than_their_share(residual):
    model, auto = random_model(residual=residual, context=2048), Auto(random_model(), HOPELESS)
    stats = Stats()
    list(clasp(model, [1, 2, 3], 1500, draft_length=1, auto=auto, stats=stats, exact=False))
    spent = stats.optimizations * HOPELESS["optimize"] + sum(
        HOPELESS["verify"] + auto.draft_time(auto.budget) if drafted else HOPELESS["plain"]
        for drafted in [True] * stats.drafted + [False] * (stats.cycles - stats.drafted))
    assert stats.optimizations > 1                                         # it did try again
    assert spent < 1500 * HOPELESS["plain"] * (1 + TRIAL) + HOPELESS["optimize"] + 4


def test_a_text_that_becomes_easy_is_noticed():
    """The draft always wrong at first, as far as the statistics know; then always right."""
    model = agreeable(context=1024)
    auto = Auto(model, dict(draft=1.0, plain=1.0, verify=1.1, optimize=0.1))
    for ratio in (auto.overall, *(auto.by_budget[m] for m in range(1, 6))):
        ratio.note(10, 0.1)
    stats = Stats()
    list(clasp(model, [1, 2, 3], 1000, draft_length=4, auto=auto, stats=stats))
    assert not any(stats.from_draft[:20]) and sum(stats.from_draft[-200:]) > 100


def test_the_rejection_rate_is_learned():
    auto, chance = Auto(random_model(), CHEAP), random.Random(1)
    auto.sets, auto.distance, auto.longest = {3: frozenset({1, 2, 3})}, {3: 0.5}, 4
    for _ in range(400):
        auto.choose()
        auto.plan()
        sure = [chance.choice([0.15, 0.95]) for _ in range(4)]
        for confidence in sure:
            auto.go_on(confidence)
        accepted = next((i for i, c in enumerate(sure) if chance.random() < (0.6 if c < 0.5 else 0.1)), 4)
        auto.learn(accepted, 0.0, 1.0, 1.0)
    assert auto.rejection(3) == pytest.approx(0.35, abs=0.06)              # half of the tokens 0.6, half 0.1
    for confidence, rejected in ((0.15, 0.6), (0.95, 0.1)):
        auto.alive = 1.0
        auto.go_on(confidence)
        assert 1 - auto.alive == pytest.approx(rejected, abs=0.08)


def test_a_draft_ends_where_another_token_is_not_worth_its_time():
    auto = Auto(random_model(), dict(draft=1.0, plain=1.0, verify=2.0, optimize=1))
    auto.sets, auto.distance, auto.longest = {3: frozenset({1, 2, 3})}, {3: 0.4}, 6
    auto.by_confidence[9].note(0, 100.0)                                   # at such confidence all were right, and
    auto.by_confidence[1].note(200, 100.0)                                 # at such none
    auto.choose()
    auto.plan()
    assert auto.go_on(0.95) and not auto.go_on(0.15)
    assert not auto.go_on(0.95)                                            # what follows a wrong token is lost


def test_the_programme_runs_rarely_while_its_sets_stay():
    model, stats = random_model(layers=2, residual=0.01, context=4096), Stats()            # one budget, and one set is best
    model.layers[0].o.weight.mul_(0)
    model.layers[0].down.weight.mul_(0)
    auto = Auto(model, CHEAP | dict(optimize=0.01))
    list(clasp(model, [1, 2, 3], 2000, draft_length=2, auto=auto, stats=stats))
    gaps = [b - a for (a, _), (b, _) in zip(stats.skip_sets, stats.skip_sets[1:])]
    assert len(gaps) > 2 and gaps == sorted(gaps) and gaps[-1] > 2 * gaps[0]


def test_the_programme_takes_its_share_of_the_time_at_most():
    model, stats = random_model(context=4096), Stats()                     # its sets change at almost every run
    list(clasp(model, [1, 2, 3], 1000, draft_length=2, auto=Auto(model, CHEAP | dict(optimize=2.0)), stats=stats))
    assert stats.optimizations * 2.0 < 0.03 * stats.cycles * 2 + 4


def test_times_are_compared_at_equal_pace():
    """A machine half as fast for a while: ratios of what is measured then, and what was before, stay."""
    costs, true = Costs(random_model()), dict(draft=1.0, plain=1.5, verify=1.6, optimize=2.0)
    for pace, kinds in ((1, SHAPE), (2, ("draft", "verify")), (1, ("draft", "verify")), (3, ("draft", "verify"))):
        for _ in range(60):
            for kind in kinds:
                costs.note(kind, true[kind] * pace)
    assert costs.current()["verify"] / costs.current()["draft"] == pytest.approx(1.6, rel=0.05)
    assert costs.last["plain"][0] / costs.current()["draft"] == pytest.approx(1.5, rel=0.25)


def test_a_plain_step_is_never_thought_to_take_longer_than_a_verify_pass():
    costs = Costs(random_model())
    costs.note("plain", 50.0)                                              # the first of a process: slow
    for _ in range(9):
        costs.note("verify", 1.2), costs.note("draft", 0.5, costs.share(0.5))
    assert costs.current()["plain"] <= costs.current()["verify"]


def test_shares_follow_the_weights():
    model = random_model(layers=6)
    costs, head, rows = Costs(model), model.embed.weight.numel(), sum(w.numel() for w in model.layers[0].parameters() if w.ndim == 2)
    assert costs.share(0) == pytest.approx(1)
    assert costs.share(4 / 6) == pytest.approx((head + 2 * rows) / (head + 6 * rows))


def test_old_evidence_fades():
    ratio = Ratio()
    for rejected in [1] * 1000 + [0] * 1000:
        ratio.note(rejected, 1.0)
    assert ratio.estimate(0.5, 1.0) < 0.02 and Ratio().estimate(0.5, 1.0) == 0.5


def test_blocks_cost_what_they_take():
    model = load_model(BUNDLED)
    weights = [sum(getattr(model.layers[0], name).weight.numel() for name in names) for names in (("qkv", "o"), ("gate_up", "down"))]
    a, m = block_costs(model, measured=False)
    assert a / m == pytest.approx(weights[0] / weights[1], rel=0.2)
    assert all(1 <= cost <= 4 for cost in block_costs(model))


def test_skipped_blocks_are_left_out():
    model = random_model().to(DEVICE)
    model.block_costs = (1, 2)
    tokens = torch.tensor([[1, 2, 3]], device=DEVICE)
    states = model(tokens, skip={0, 3, 11})
    assert len(states) == 13 and all(torch.equal(states[i], states[i + 1]) == (i in {0, 3, 11}) for i in range(12))
    whole = model(tokens)
    model.block_costs = None
    assert all(torch.equal(a, b) for a, b in zip(whole[::2], model(tokens)))
    assert torch.equal(model(tokens, skip={2})[3], model(tokens, skip={2})[2])


@pytest.mark.parametrize("costs", [(1, 1), (1, 3), (3, 2)])
def test_blocks_take_the_time_of_the_layers_asked_for(costs):
    model, stats = random_model(), Stats()
    model.block_costs = costs
    plain = list(autoregressive(model, [1, 2, 3], 40, width=5))
    assert plain == list(clasp(model, [1, 2, 3], 40, skip_layers=3, draft_length=4, opt_interval=2, stats=stats))
    for _, skipped in stats.skip_sets[1:]:
        assert sum(costs[i % 2] for i in skipped) == 3 * sum(costs)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_the_command_line(capsys, tmp_path, unit):
    (tmp_path / "costs.json").write_text(json.dumps(CHEAP))
    argv = ["--max-new-tokens", "24", "--temperature", "0", "--skip-layers", "auto", "--skip-unit", unit,
            "--costs", str(tmp_path / "costs.json"), "--dtype", "float32", "--json"]
    assert main(argv + ["--compare"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["identical"] and out["stats"]["drafted"] > 0


def test_auto_is_the_default_where_the_model_suggests_nothing(capsys, tmp_path, monkeypatch):
    """And by default a seed gives a sample again, since times that are fixed by the model's shape decide."""
    for file in BUNDLED.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    autos, fixed = [], []
    monkeypatch.setattr("generate.Auto", lambda model, costs: fixed.append(costs) or autos.append(Auto(model, costs)) or autos[-1])

    def run(*argv, model=tmp_path):
        autos.clear()
        assert main(["--model", str(model), "--max-new-tokens", "40", "--dtype", "float32", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)["tokens"], len(autos)

    assert run("--seed", "3") == run("--seed", "3") == run("--seed", "3", "--costs", "shape") != run("--seed", "4")
    assert fixed == 4 * [SHAPE]
    fixed.clear()
    assert run("--temperature", "0") == run("--temperature", "0", "--skip-layers", "auto")      # in float32: plain decoding's text
    run("--costs", "measured")
    assert fixed == 3 * [None]
    for by_hand in (["--skip-layers", "4"], ["--opt-interval", "8"], ["--draft-exit-threshold", "0.3"]):
        assert run(*by_hand)[1] == 0
    assert run(model=BUNDLED)[1] == 0                                  # it suggests settings of its own
    (tmp_path / "generation_config.json").write_text('{"clasp": {"exit_threshold": 0.2}}')
    assert run()[1] == 0


def test_a_text_without_drafts_says_so(capsys, tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps(HOPELESS))
    assert main(["--max-new-tokens", "12", "--skip-layers", "auto", "--costs", str(tmp_path / "costs.json")]) == 0
    assert "no drafts" in capsys.readouterr().err


@pytest.mark.parametrize("argv, measured", [
    ([], False), (["--skip-layers", "auto"], False), (["--temperature", "0", "--skip-layers", "auto"], True),
    (["--skip-layers", "auto", "--costs", "measured"], True), (["--temperature", "0", "--skip-layers", "4"], False)])
def test_blocks_are_priced_by_the_clock_only_where_the_clock_decides(monkeypatch, capsys, argv, measured):
    asked = []
    monkeypatch.setattr("generate.block_costs", lambda model, clock: asked.append(clock) or (1, 1))
    assert main(["--max-new-tokens", "4", "--skip-unit", "block", *argv]) == 0
    assert asked == [measured]


def test_blocks_are_priced_once_a_run(monkeypatch, capsys):
    """The warm-up before a comparison has an Auto of its own, but must not price the model's blocks anew."""
    prices = iter([(1, 1), (4, 3)])
    monkeypatch.setattr("generate.block_costs", lambda *_: next(prices))
    assert main(["--max-new-tokens", "12", "--skip-layers", "auto", "--skip-unit", "block", "--compare", "--json"]) == 0
    assert next(prices) == (4, 3)


@pytest.mark.parametrize("argv, line", [
    (["--skip-layers", "auto", "--opt-interval", "4"], "leave them out"), (["--skip-layers", "some"], "skip-layers"),
    (["--skip-layers", "4", "--costs", "FILE"], "for --skip-layers auto"), (["--skip-layers", "auto", "--costs", "BAD"], "positive number"),
    (["--skip-layers", "auto", "--costs", "NONE"], "positive number"),
    (["--costs", "shape"], "for --skip-layers auto")])
def test_refusals(capsys, tmp_path, argv, line):
    (tmp_path / "FILE").write_text(json.dumps(CHEAP))
    (tmp_path / "BAD").write_text(json.dumps(CHEAP | {"verify": 0}))
    assert main([str(tmp_path / a) if a in ("FILE", "BAD", "NONE") else a for a in argv]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_drafted_stop_token_is_counted():
    model, asked = random_model(), []
    cache = KVCache(model, 20)
    feed(model, cache, [1, 2, 3])
    tokens, _ = draft(model, cache, 4, {2}, 3, lambda sure: asked.append(sure) or True, lambda x: (x.argmax(), None), range(61))
    assert len(tokens) == len(asked) == 1


def test_nothing_is_noted_of_a_programme_that_did_not_run():
    model = agreeable()
    auto = Auto(model)
    next(clasp(model, [1], 20, auto=auto))
    assert not auto.costs.last["optimize"] and auto.costs.last["plain"]


def test_many_texts_of_one_token_do_not_each_try():
    model, auto, runs = agreeable(), Auto(random_model(), HOPELESS), 0
    for _ in range(40):
        stats = Stats()
        list(clasp(model, [1, 2, 3], 1, auto=auto, stats=stats))
        runs += stats.optimizations
    assert runs <= 2


def test_a_set_whose_state_overflows_is_no_good_choice():
    model, auto = random_model(), Auto(random_model(), CHEAP)
    cache = KVCache(model, 20)
    hidden = feed(model, cache, [1, 2, 3])
    model.layers[5].register_forward_hook(lambda module, given, out: torch.full_like(out, torch.nan))
    auto.begin(4, True)
    auto.optimize(model, cache, hidden, 5)
    assert all(5 in skipped or auto.distance[m] == 2 for m, skipped in auto.sets.items())


def test_settings_that_do_not_go_with_auto():
    for model, more in ((random_model(layers=1), {}), (random_model(), dict(optimizer=lambda *_: None))):
        with pytest.raises(SettingsError, match="auto needs two layers"):
            next(clasp(model, [1, 2], 5, auto=Auto(model), **more))
