"""auto.py: whatever it decides, the text is the whole model's; and what it decides is worth it."""
import json
import math

import pytest
from conftest import at_length, random_model, same_bits, tokens_of, valid, width_for
from enumeration import NUCLEUS, error_of_the_induced_distribution
from folders import set_fields, small_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
from extras.auto import Auto
from extras.lookup import LONGEST, MOST, Lookup
from extras.skipping import Skipping
from extras.worth import SHAPE
from model import KVCache
from speculative import Clasp, Draft, Outcome, Stats, autoregressive, decode, new_text

CHEAP = {"draft": 1.0, "plain": 1.0, "verify": 1.0, "optimize": 0.5}
HOPELESS = {"draft": 1.0, "plain": 1.0, "verify": 9.0, "optimize": 1.5}
LAPS = {"draft": 0.02, "verify": 0.01, "optimize": 0.03}
DRAFTS_FREE = {"draft": 0.1, "plain": 1.0, "verify": 1.0, "optimize": 0.1}


def agreeable(**shape):
    """A model whose layers matter little, so that drafts are right."""
    return random_model(residual=0.01, **shape)


def write(model, auto: Auto, count: int, prompt=(1, 2, 3), **chosen) -> Stats:
    stats = Stats()
    assert len(list(decode(model, list(prompt), count, auto, stats=stats, **chosen))) == count
    return stats


def hopeful(auto: Auto) -> Auto:
    """It runs the DP at once, and not first after many steps."""
    auto.skipping.hopeful = True
    return auto


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
        assert stats.from_draft.count(True) == stats.accepted
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


# ---------------------------------------------------------------- who drafts

def sources(tokens: list[int], costs: dict, layers_right: float, words_right: float) -> str:
    """Who drafts after these tokens, if that share of each one's drafts is thought to be right."""
    model = agreeable()
    auto = hopeful(Auto(model, 4, costs))
    text, hidden = new_text(model, tokens, 20)
    auto.begin(text, hidden)
    auto.skipping.distance = dict.fromkeys(auto.skipping.sets, 1.0)
    for budget in auto.skipping.sets:
        auto.skipping.stopping.rejections.by_budget[budget].note(1e6 * (1 - layers_right), 1e6)
    auto.lookup.shift = 0.0
    auto.lookup.shifts = [math.log(words_right / (1 - words_right))] * LONGEST
    auto.skipping.choose()
    draft = auto.propose(text, 8)
    return draft.source if draft.tokens else "nothing"


AGAIN = [5, 1, 2, 3, 4, 5, 1, 2, 3]                      # "1 2 3" stood before
DEAR_ROWS = CHEAP | {"verify": 3.0}


@pytest.mark.parametrize("tokens, costs, layers_right, words_right, who", [
    (AGAIN, CHEAP, 0.0, 0.9, "lookup"),
    (AGAIN, CHEAP, 0.9, 0.9, "lookup"),                  # as good, and free
    (AGAIN, DRAFTS_FREE, 1.0, 0.1, "layers"),
    ([5, 1, 2, 3], DRAFTS_FREE, 1.0, 0.9, "layers"),     # nothing stood before
    ([5, 1, 2, 3], CHEAP, 0.0, 0.9, "nothing"),
    (AGAIN, DEAR_ROWS, 0.0, 0.2, "nothing"),             # a row costs more than it brings
], ids=str)
def test_whoever_brings_most_drafts(tokens, costs, layers_right, words_right, who):
    assert sources(tokens, costs, layers_right, words_right) == who


def test_a_text_that_is_copied_is_drafted_at_full_length():
    """The model knows no better than to repeat its prompt, which it nearly does here."""
    model = random_model(vocabulary=13, residual=0.01)
    stats = write(model, Auto(model, costs=CHEAP), 200)
    assert "lookup" in stats.sources
    assert stats.tau > 5


def test_both_sources_may_draft_in_one_text():
    """By layers until the text goes in circles, then by looking up."""
    model = agreeable()
    stats = write(model, hopeful(Auto(model, 4, CHEAP)), 200)
    assert {"layers", "lookup", ""} <= set(stats.sources)


def with_settings(model, costs=CHEAP) -> Auto:
    """It knows how many layers to skip, and how far to draft."""
    return Auto(model, 4, costs, Clasp(model, 3, 4, opt_interval=8))


def test_known_settings_are_used_and_words_looked_up_where_that_is_better():
    model = agreeable()
    stats = write(model, with_settings(model), 200)
    assert {"layers", "lookup"} <= set(stats.sources)
    assert {len(skip) for _, skip in stats.skip_sets} == {3}


def test_known_settings_have_the_scratch_slots_that_their_dp_wants():
    """Else it would see fewer tokens than it is told to."""
    model = agreeable()
    clasp = Clasp(model, 3, 4, opt_tokens=5)
    auto = Auto(model, costs=CHEAP, clasp=clasp)
    seen = []

    def recorded(text):
        seen.append(text.cache.scratch // clasp.budget)
        Clasp.choose_layers(clasp, text)

    clasp.choose_layers = recorded
    write(model, auto, 20)
    assert seen and min(seen) >= 5


def test_known_settings_that_do_not_pay_are_seldom_tried():
    model = random_model(residual=1.0, context=2048)
    auto = with_settings(model)
    places = []
    propose = auto.skipping.propose

    def noted(text, most):
        places.append(text.stats.new_tokens)
        return propose(text, most)

    auto.skipping.propose = noted
    write(model, auto, 1500)
    assert 1 < len(places) < 60
    assert places[-1] > 700                              # it does not give up


def test_with_known_settings_drafts_end_where_they_are_unsure():
    """Half of what was drafted unsurely was wrong, and rows are dear; all the rest was right."""
    model = agreeable()
    auto = with_settings(model, CHEAP | {"verify": 2.0})
    text, hidden = new_text(model, [5, 1, 2, 3], 20)
    auto.begin(text, hidden)
    stopping = auto.skipping.stopping
    stopping.rejections.overall.note(0, 1000.0)
    stopping.rejections.by_confidence[0].note(500.0, 1000.0)
    least = 0.6
    for confidence, goes_on in ((0.95, True), (0.05, False)):
        stopping.begin(3, 1.0, least)
        assert stopping.is_worth_another(confidence) == goes_on
    stopping.learn(accepted=0)
    assert stopping.rejections.by_confidence[0].part > 500 * 0.99
    assert len(auto.skipping.propose(text, 8).tokens) <= 4


@pytest.mark.parametrize("residual", [0.01, 0.3])
def test_with_known_settings_too_the_text_is_plain_decodings(residual):
    model = random_model(layers=4, residual=residual)
    width = width_for(model, 5)
    prompt = tokens_of(model, 5)
    plain = list(autoregressive(model, prompt, 100, width=width))
    assert write(model, with_settings(model, None), 100, prompt, width=width).tokens == plain


def test_a_model_of_one_layer_is_drafted_for_by_lookup_alone():
    model = random_model(layers=1, vocabulary=13, residual=0.01)
    stats = write(model, Auto(model, costs=DRAFTS_FREE), 100)
    assert set(stats.sources) == {"lookup", ""}
    assert stats.optimizations == 0


def test_lookup_learns_while_layers_draft_and_costs_are_learned_from_both():
    model = agreeable()
    auto = hopeful(Auto(model, 4))
    text, hidden = new_text(model, AGAIN, 20)
    auto.begin(text, hidden)
    auto.propose(text, 4)
    outcome = Outcome(Draft([4, 5], [None, None], "layers"), 2, hidden, LAPS)
    text.tokens += [4, 5, 1]
    auto.observe(text, outcome)
    assert auto.lookup.shift > 0
    assert auto.costs.measured == {"draft": 1, "optimize": 1, 3: 1}


# ---------------------------------------------------------------- the command line

@pytest.fixture
def autos(monkeypatch) -> list[tuple[Auto, dict | None]]:
    """Each Auto that generate.py makes, and the costs that it was given; drafts pay for all."""
    made = []

    def new_auto(model, draft_length, costs, clasp):
        auto = Auto(model, draft_length, DRAFTS_FREE, clasp)
        if clasp is None:
            auto.skipping.hopeful = True
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


def test_auto_is_the_default_where_no_setting_of_layers_is_typed(capsys, silent_folder, autos):
    answer(capsys, silent_folder)
    answer(capsys, silent_folder, "--draft-length", "3")
    assert [auto.lookup.draft_length for auto, _ in autos] == [MOST, 3]
    autos.clear()
    for by_hand in (("--skip-layers", "1"), ("--opt-interval", "8"),
                    ("--draft-exit-threshold", "0.3")):
        answer(capsys, silent_folder, *by_hand)
    assert not autos


def test_auto_skips_layers_as_the_model_suggests(capsys, tmp_path, autos):
    folder = small_folder(tmp_path / "model")
    set_fields(folder, "generation_config.json", clasp={"exit_threshold": 0.2, "draft_length": 2})
    answer(capsys, folder)
    for asking in ("--drafter", "--skip-layers"):
        answer(capsys, folder, asking, "auto")
    for length in ("1", "64"):
        answer(capsys, folder, "--draft-length", length)
    assert [auto.lookup.draft_length for auto, _ in autos] == [MOST] * 3 + [1, 64]
    found = [auto.skipping.clasp for auto, _ in autos]
    assert [clasp.draft_length for clasp in found] == [2, 2, 2, 1, 2]     # a limit, not a length
    assert {(clasp.budget, clasp.exit_threshold) for clasp in found} == {(1, 0.2)}


def test_a_draft_length_alone_says_nothing_of_layers(capsys, tmp_path, autos):
    folder = small_folder(tmp_path / "model")
    set_fields(folder, "generation_config.json", clasp={"draft_length": 2})
    answer(capsys, folder)
    ((auto, _),) = autos
    assert isinstance(auto.skipping, Skipping)


def drafter_of(folder, *argv):
    args = generate.arguments(["--model", str(folder), "--temperature", "0", *argv])
    return generate.Decoder(args, folder, random_model(), set())


def test_who_drafts_can_be_asked_for(silent_folder):
    layers = drafter_of(silent_folder, "--drafter", "layers")
    assert isinstance(layers.drafter, Clasp) and layers.drafter.budget == 3
    assert layers.passes["width"] == layers.drafter.draft_length + 1
    lookup = drafter_of(silent_folder, "--drafter", "lookup")
    assert isinstance(lookup.drafter, Lookup) and lookup.drafter.draft_length == MOST
    assert not lookup.is_exact
    short = drafter_of(silent_folder, "--drafter", "lookup", "--draft-length", "3")
    assert short.drafter.draft_length == 3


def test_exactness_costs_no_more_rows_than_layers_draft(silent_folder):
    """A long limit for lookup's drafts does not make every pass as wide."""
    for argv in ((), ("--draft-length", "64")):
        for drafter in ("auto", "lookup"):
            decoder = drafter_of(silent_folder, "--drafter", drafter, "--exact", *argv)
            assert 5 <= decoder.passes["width"] < 13
    long = drafter_of(silent_folder, "--skip-layers", "2", "--draft-length", "20")
    assert long.passes["width"] >= 21


def test_a_seed_gives_a_sample_again(capsys, silent_folder):
    """Times that are fixed by the model's shape decide, not the clock."""
    def sample(seed):
        return answer(capsys, silent_folder, "--seed", str(seed))["tokens"]

    assert sample(3) == sample(3) != sample(4)


def test_the_clock_decides_only_where_text_is_greedy(capsys, silent_folder, autos):
    answer(capsys, silent_folder)
    answer(capsys, silent_folder, "--temperature", "0")
    assert [costs for _, costs in autos] == [SHAPE, None]


def test_greedy_text_is_the_same_whoever_drafts(capsys, silent_folder):
    greedy = ("--temperature", "0", "--exact")
    texts = [
        answer(capsys, silent_folder, *greedy, *asking)["tokens"]
        for asking in ([], *(["--drafter", name] for name in ("auto", "layers", "lookup")))
    ]
    assert all(tokens == texts[0] for tokens in texts)


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
    def hopeless(model, draft_length, costs, clasp):
        return Auto(model, draft_length, HOPELESS, clasp)

    monkeypatch.setattr(generate, "Auto", hopeless)
    assert generate.main(["--max-new-tokens", "12", "--skip-layers", "auto"]) == 0
    assert "no drafts" in capsys.readouterr().err


@pytest.mark.parametrize("argv, line", [
    (["--skip-layers", "auto", "--opt-interval", "4"], "leave the others out"),
    (["--drafter", "auto", "--draft-exit-threshold", "0.3"], "leave the others out"),
    (["--drafter", "lookup", "--skip-layers", "4"], "leave the others out"),
    (["--drafter", "layers", "--skip-layers", "auto"], "does not go with --drafter layers"),
    (["--drafter", "words"], "invalid choice"),
    (["--drafter", "lookup", "--draft-length", "128"], "the draft length must lie between"),
    (["--skip-layers", "some"], "neither a number nor auto"),
    (["--skip-layers", "auto", "--draft-length", "0"], "the draft length must lie between"),
])
def test_what_does_not_go_with_auto_is_refused_in_one_line(capsys, argv, line):
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
