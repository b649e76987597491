"""bench/: every method writes the whole model's text; results are kept, summed up and drawn."""
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from conftest import DEVICE, random_model

import bench.race
from bench import __main__ as program
from bench import experiments, fixed, search
from bench.methods import (
    NAMES,
    Method,
    clasp,
    even_set,
    lookup,
    new_methods,
    random_set,
    swift,
)
from bench.prompts import PROMPTS, Question, read_questions
from bench.race import Plan, Prompt, interleave, race, run
from bench.results import Results, header_of
from bench.search import Search, Swift, self_sd
from bench.table import quartiles, summary
from bench.target import SHAPES, Target, fingerprint_of, load_target
from checkpoint import BUNDLED
from extras.cuda_graphs import GraphedLlama
from extras.int8 import Int8Linear
from extras.packed import MATRICES
from model import Config
from speculative import Clasp, FixedSet, SettingsError

pytestmark = pytest.mark.thorough

TINY = ["--device", DEVICE, "--limit", "1", "--repeat", "2", "--max-new-tokens", "16"]
SKIPPED = 14


@pytest.fixture(scope="module")
def target() -> Target:
    argv = ["--device", DEVICE, "--skip-layers", str(SKIPPED)]
    return load_target(program.arguments(argv))


@pytest.fixture(scope="module")
def methods(target) -> dict[str, Method]:
    with pytest.MonkeyPatch.context() as patch:           # short searches
        patch.setattr(fixed, "TRIALS", 8)
        patch.setattr(search, "SELF_SD_TRIALS", 16)
        return new_methods(NAMES, target, seed=0)


def small_target(**changes) -> Target:
    settings = {"skip_layers": 3, "draft_length": 3, "exit_threshold": 0.0,
                "opt_interval": 4, "opt_tokens": 2}
    fields = {"name": "small", "model": random_model(), "tokenizer": None, "settings": settings}
    return Target(**fields | changes)


# ---------------------------------------------------------------- methods

@pytest.fixture(scope="module")
def prompt(target) -> list[int]:
    return target.encode(["The old king said to the old king"])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_writes_the_whole_models_greedy_text(target, methods, prompt, name):
    """To the last bit, in passes of one width; also those that are measured without padding."""
    if target.width is None:
        pytest.skip("no number of rows is exact on this machine")
    expected, _ = run(target, Method(None, target.passes), prompt, 60)
    stats, _ = run(target, methods[name]._replace(passes=target.passes), prompt, 60)
    assert stats.tokens == expected.tokens


@pytest.mark.parametrize("name", NAMES)
def test_every_method_decodes_as_it_is_measured(target, methods, prompt, name):
    stats, wall = run(target, methods[name], prompt, 60)
    assert stats.new_tokens == 60
    assert 0 < stats.seconds <= wall                      # its own seconds lie within those outside
    stats, _ = run(target, methods[name], prompt, 30, temperature=1.0)
    assert stats.new_tokens == 30 or stats.tokens[-1] in target.stop


@pytest.mark.parametrize("name", NAMES)
def test_all_methods_skip_the_same_number_of_layers(target, methods, prompt, name):
    drafter = methods[name].drafter
    if not isinstance(drafter, FixedSet):
        pytest.skip("chooses it itself, or skips nothing")
    stats, _ = run(target, methods[name], prompt, 60)
    assert len(drafter.skip) == SKIPPED
    assert all(len(skip) == SKIPPED for _, skip in stats.skip_sets)
    assert drafter.draft_length == target.draft_length


def test_padding_is_for_all_but_plain_decoding_auto_and_prompt_lookup(target, methods):
    unpadded = {"autoregressive", "auto", "prompt-lookup"}
    for name, method in methods.items():
        assert method.passes == ({} if name in unpadded else target.passes)


def test_plain_decoding_comes_first_and_no_method_comes_twice(target):
    assert list(new_methods(["even", "clasp", "even"], target, 0)) == [
        "autoregressive", "even", "clasp"]


def test_prompt_lookup_drafts_what_followed_before_and_skips_nothing(target):
    stats, _ = run(target, lookup(target), [5, 6, 7, 8, 9] * 6, 40)
    assert stats.drafted > 0
    assert stats.skip_sets == []


@pytest.mark.parametrize("layers, budget", [(20, 17), (30, 15), (8, 1), (5, 4), (6, 0)])
def test_fixed_sets_have_their_size(layers, budget):
    for skip in (even_set(layers, budget), random_set(layers, budget, seed=0)):
        assert len(set(skip)) == budget
        assert set(skip) <= set(range(layers))


# ---------------------------------------------------------------- searches

def check_better_than_at_random(search, startup: int):
    """The Bayesian part finds better sets on average than the random start; the best is kept."""
    start = search.scores[:startup]
    later = search.scores[startup:]
    assert sum(later) / len(later) > sum(start) / len(start)
    assert search.score == max(search.scores)
    assert len(search.best) == SKIPPED


def test_self_sd_search_improves_on_its_random_start(target):
    check_better_than_at_random(self_sd(target, seed=0, trials=150), 50)


def test_swift_search_improves_on_its_random_start_and_stops(target):
    method = swift(target, seed=0, trials=120)
    search = method.drafter.search
    for seed, text in enumerate(PROMPTS["tale"] * 3):
        run(target, method, target.encode([text]), 120, temperature=1.0, seed=seed)
    assert search.left == 0
    assert len(search.scores) == 120
    check_better_than_at_random(search, 40)


def test_a_search_is_taken_up_where_it_was(target, prompt):
    """After some trials at random and some by what was learned of those it tries the same sets."""
    one, again = (Swift(Search(target, 0, trials=60), 4, 0.0) for _ in range(2))
    run(target, Method(one), prompt, 120)
    found = one.search.scores
    assert 20 < len(found) < 60
    again.search.resume(json.loads(json.dumps(found)))
    assert (again.search.best, again.search.score) == (one.search.best, one.search.score)
    assert again.search.left == one.search.left
    sets = [[search.ask()[1] for _ in range(5)] for search in (one.search, again.search)]
    assert sets[0] == sets[1]


# ---------------------------------------------------------------- races

def test_a_race_goes_a_token_of_each_in_turn(target):
    order = []

    class Runner:
        def __init__(self, name: str, count: int):
            self.name = name
            self.count = count

        def tokens(self, model, prompt, count, *, stats, stop):
            stats.prefill_seconds = 1.0
            for i in range(self.count):
                order.append(self.name)
                yield i

    runners = {name: Runner(name, count) for name, count in (("long", 3), ("short", 1), ("no", 0))}
    found = race(target, runners, [1], 9)
    assert order == ["long", "short", "long", "long"]
    assert list(found) == ["long", "short", "no"]
    for _, wall in found.values():                        # the prefill's second is taken off
        assert -1 <= wall < 0


def test_a_race_ends_each_text_at_a_stop_token(target, methods, prompt):
    everything = set(range(target.model.config.vocab_size))
    stopped = SimpleNamespace(model=target.model, stop=everything)
    for stats, _ in race(stopped, methods, prompt, 20).values():
        assert stats.new_tokens == 1


def test_with_graphs_every_prompt_is_warmed_before_it_is_timed(monkeypatch):
    """On a GPU what is not yet recorded is recorded then, which takes as long as many tokens do."""
    target = small_target(model=GraphedLlama(random_model(context=512)))
    methods = {"autoregressive": Method(None), "clasp": clasp(target)}
    prompts = [
        Prompt(f"{length} tokens", 0, "chat", [5] * length, []) for length in (3, 300, 150)
    ]
    captures = []

    def watched(*work, **settings):
        before = target.model.captures
        found = race(*work, **settings)
        captures.append((len(settings) > 0, target.model.captures - before))
        return found

    monkeypatch.setattr(bench.race, "race", watched)
    interleave(target, methods, prompts, Plan(max_new_tokens=12, repeat=1), {})
    timed = [count for is_timed, count in captures if is_timed]    # others have no temperature
    assert timed == [0] * 6
    assert sum(count for _, count in captures) > 0


def test_with_graphs_swift_keeps_its_search_for_what_is_timed():
    target = small_target(model=GraphedLlama(random_model(context=512)))
    methods = {"swift": swift(target, seed=0)}
    bench.race.warm_up(target, methods, [Prompt("long", 0, "chat", [5] * 40, [])], 60)
    assert isinstance(methods["swift"].drafter, Swift)
    assert methods["swift"].drafter.search.scores == []


# ---------------------------------------------------------------- results

def test_a_stopped_run_goes_on_and_gives_the_table(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    argv = [*TINY, "--methods", "clasp,even", "--temperatures", "0", "--out", str(out)]
    assert program.main(argv) == 0
    table = capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert "| clasp |" in table
    assert "Made by `python -m bench --device" in table
    assert "--out run.jsonl`" in table
    assert (tmp_path / "run.md").read_text() + "\n" == table
    assert len(lines) == 1 + 7 * (1 + 2 * 3)    # a header; 7 prompts: the answer, 3 methods twice

    assert program.main(argv) == 0              # all is there: nothing is run again
    assert capsys.readouterr().out == table
    assert out.read_text().splitlines() == lines

    out.write_text("\n".join(lines[:22])[:-9])  # cut amid a line, and a race: that is run again
    assert program.main(argv) == 0
    again = out.read_text().splitlines()
    assert sorted(map(key_of, again[1:])) == sorted(map(key_of, lines[1:] + lines[20:21]))


def test_what_is_compared_was_run_in_one_race(tmp_path):
    out = tmp_path / "run.jsonl"

    def teams(methods: str) -> dict[str, list[str]]:
        argv = [*TINY, "--repeat", "1", "--temperatures", "0", "--out", str(out)]
        assert program.main([*argv, "--methods", methods]) == 0
        lines = map(json.loads, out.read_text().splitlines())
        return {line["key"][-1]: line["team"] for line in lines if "team" in line}

    teams("even")
    apart = teams("random")                       # plain decoding's lines are of this race now
    assert apart["even"] != apart["autoregressive"] == apart["random"]
    together = teams("even,random")
    assert together["even"] == together["autoregressive"] == together["random"]
    assert teams("even") == together              # it is there


def test_nothing_is_added_to_a_run_whose_search_goes_from_text_to_text(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    argv = [*TINY, "--repeat", "1", "--temperatures", "0", "--methods", "swift", "--out", str(out)]
    assert program.main(argv) == 0
    table = capsys.readouterr().out
    for more in (["--methods", "even,swift"], ["--repeat", "2"], ["--temperatures", "0,1"]):
        assert program.main([*argv, *more]) == 2
        assert "another run" in capsys.readouterr().err
    assert program.main(argv) == 0                # goes on, here with nothing
    assert capsys.readouterr().out == table


def key_of(line: str) -> str:
    return str(json.loads(line)["key"])


def test_results_of_another_run_are_refused_and_kept(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run.jsonl"
    argv = [*TINY, "--repeat", "1", "--methods", "even", "--temperatures", "0", "--out", str(out)]
    assert program.main(argv) == 0
    before = out.read_text()
    for other in (["--seed", "1"], ["--cuda-graphs"], ["--limit", "2"], ["--skip-layers", "9"]):
        assert program.main([*argv, *other]) == 2
        assert "another run" in capsys.readouterr().err
    assert out.read_text() == before

    out.write_text("a shopping list\nmilk")
    monkeypatch.setattr(program, "new_methods", None)    # no search comes before that
    assert program.main(argv) == 2
    assert "another run" in capsys.readouterr().err
    assert out.read_text() == "a shopping list\nmilk"


def test_a_header_alone_blocks_no_other_run(tmp_path):
    """As a run leaves it that is refused before anything is measured."""
    out = tmp_path / "run.jsonl"
    for seed in (1, 2):
        Results(out, {"seed": seed})
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert lines == [{"key": ["header"], "seed": seed}]

    Results(out, {"seed": 2})["one",] = {"key": ["one"]}
    with pytest.raises(SettingsError, match="another run"):
        Results(out, {"seed": 1})
    assert list(Results(out, {"seed": 2})) == [("header",), ("one",)]
    assert len(out.read_text().splitlines()) == 2


# ---------------------------------------------------------------- summaries

def line_of(question: str, method: str, repeat: int, seconds: float) -> dict:
    """10 tokens in 5 passes; half of the time drafting, half verifying."""
    return {
        "key": [question, 0, 0.0, repeat, method],
        "group": "chat",
        "identical": True,
        "wall": 1.25 * seconds,
        "new_tokens": 10,
        "prefill_seconds": 0.0,
        "seconds": seconds,
        "draft_seconds": seconds / 2,
        "verify_seconds": seconds / 2,
        "optimize_seconds": 0.0,
        "cycles": 5,
        "drafted": 10,
        "accepted": 5,
        "optimizations": 0,
    }


def test_a_speedup_is_the_median_over_prompts_of_ratios_of_medians():
    seconds = {
        ("a", "autoregressive"): [2.0, 2.0, 80.0],        # one outlier each: medians do not mind
        ("a", "clasp"): [1.0, 1.0, 90.0],                 # 2 times as fast
        ("b", "autoregressive"): [3.0, 3.0, 3.0],
        ("b", "clasp"): [1.0, 1.0, 1.0],                  # 3 times
        ("c", "autoregressive"): [8.0, 8.0, 8.0],
        ("c", "clasp"): [1.0, 1.0, 1.0],                  # 8 times
    }
    lines = [
        line_of(question, method, repeat, taken)
        for (question, method), runs in seconds.items()
        for repeat, taken in enumerate(runs)
    ]
    found = summary(lines, "clasp")
    quartiles = (found.lower_quartile, found.speedup, found.upper_quartile)
    assert quartiles == pytest.approx((2.5, 3, 5.5))
    assert summary(lines, "autoregressive").speedup == 1


@pytest.mark.parametrize("values", [[2.0], [0.2, 1.5], [1.0, 2.0, 9.0]])
def test_quartiles_lie_among_the_values(values):
    lower, middle, upper = quartiles(values)
    assert min(values) <= lower <= middle <= upper <= max(values)


def test_a_summary_holds_the_cost_models_bound():
    """tau / (1 + g c): 2 tokens a pass, 2 drafted for it, each at half the time of a pass."""
    lines = [line_of("a", "autoregressive", 0, 1.0), line_of("a", "clasp", 0, 1.0)]
    found = summary(lines, "clasp")
    assert (found.tau, found.g, found.c, found.accepted_share) == (2, 2, 0.5, 0.5)
    assert found.bound == 1
    assert (found.draft, found.verify, found.optimize) == pytest.approx((0.4, 0.4, 0.0))
    assert found.rest == pytest.approx(0.2)
    assert (found.runs, found.identical) == (1, 1)


def test_a_draft_token_has_no_price_where_none_was_drafted():
    lines = [line_of("a", name, 0, 1.0) | {"drafted": 0} for name in ("autoregressive", "clasp")]
    found = summary(lines, "clasp")
    assert (found.c, found.bound) == (0, found.tau)


# ---------------------------------------------------------------- questions and models

def test_spec_bench_questions_are_grouped_and_limited(tmp_path):
    path = tmp_path / "q.jsonl"
    questions = [
        {"question_id": i, "category": category, "turns": ["one", "two\u2028lines"]}
        for i, category in enumerate(["writing", "math", "rag"] * 10)
    ]
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    path.write_text("".join(lines) + "\n", encoding="utf-8-sig")   # with a byte order mark
    found = read_questions(path, limit=4)
    groups = [question.group for question in found]
    assert groups.count("chat") == 4
    assert groups.count("rag") == 4
    assert found[0].turns == ["one", "two\u2028lines"]
    assert len(read_questions(path)) == 30
    with pytest.raises(SettingsError, match="--limit"):
        read_questions(path, limit=0)


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "no json", '{"question_id": 1, "category": "qa", "turns": "one"}',
    '{"question_id": 1, "category": "qa", "turns": [1]}',
    '{"question_id": 1, "category": "qa", "turns": ["\\ud83d"]}',
])
def test_what_is_not_spec_benchs_file_is_refused(tmp_path, text):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(SettingsError, match="q.jsonl"):
        read_questions(path)


def test_a_synthetic_model_runs_and_says_so(tmp_path, capsys, monkeypatch):
    small = Config(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True)
    monkeypatch.setitem(SHAPES, "llama3.2-1b", small)
    argv = [*TINY, "--synthetic", "llama3.2-1b", "--methods", "clasp", "--out",
            str(tmp_path / "run.jsonl")]
    assert program.main([*argv, "--residual", "0.01"]) == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out.splitlines()[0]

    # With nothing added by the middle layers it does not matter that they are skipped.
    target = load_target(program.arguments([*argv, "--residual", "0"]))
    stats, _ = run(target, clasp(target, skip_layers=2), [1, 2, 3], 40)
    assert stats.accepted == stats.drafted > 0


def test_a_downloaded_model_is_called_by_its_repository(monkeypatch):
    """And not by its folder in the hub's cache, which is a commit's."""
    monkeypatch.setattr("bench.target.find_folder", {"someone/Tiny-Story": BUNDLED}.get)
    argv = ["--device", DEVICE, "--model", "someone/Tiny-Story"]
    assert load_target(program.arguments(argv)).name == "Tiny-Story"


def test_sets_without_layers_are_alike():
    assert experiments.similarities([frozenset()] * 3, 1) == [1.0, 1.0]


@pytest.mark.parametrize("options", [[], ["--synthetic", "llama3.2-1b"]], ids=str)
def test_weights_in_eight_bits_are_so_and_another_run(options, monkeypatch):
    """Also random ones; and their results never go on with those of other weights."""
    monkeypatch.setitem(SHAPES, "llama3.2-1b", SHAPES["tiny"])
    argv = ["--device", DEVICE, "--dtype", "bfloat16", *options]
    wide = load_target(program.arguments(argv))
    narrow = load_target(program.arguments([*argv, "--weights", "int8"]))
    assert narrow.bytes_read < wide.bytes_read
    matrices = [narrow.model.head, *(getattr(narrow.model.layers[1], name) for name in MATRICES)]
    assert all(isinstance(matrix, Int8Linear) for matrix in matrices)
    assert "int8" in narrow.where
    args = program.arguments(argv)
    assert header_of(wide, args, []) != header_of(narrow, args, [])


def test_runs_that_draft_by_another_auto_or_ask_otherwise_are_other_runs(tmp_path):
    """An auto with typed settings of layers; another template, another token that stops."""
    folder = shutil.copytree(BUNDLED, tmp_path / "m")

    def header(*options: str) -> dict:
        args = program.arguments(["--device", DEVICE, "--dtype", "float32", *options])
        return header_of(load_target(args), args, [Question("1", "qa", ["The dog"])])

    tiny = ("--synthetic", "tiny")
    assert header(*tiny) != header(*tiny, "--skip-layers", "4")      # half, as is the default
    before = header("--model", str(folder))
    assert header("--model", str(folder)) == before
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 14]}))
    stops = header("--model", str(folder))
    assert stops != before
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    assert header("--model", str(folder)) not in (before, stops)


def test_a_template_that_another_turn_is_put_into_otherwise_is_another_run(tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "m")
    args = program.arguments(["--model", str(folder), "--device", DEVICE, "--dtype", "float32"])

    def header(template: str) -> dict:
        (folder / "chat_template.jinja").write_text(template)
        return header_of(load_target(args), args, [Question("1", "qa", ["A dog", "And a cat?"])])

    text = "{% for m in messages %}{{ m.content }}{{ '!' if m.role == 'X' }}{% endfor %}"
    assert header(text.replace("X", "user")) != header(text.replace("X", "assistant"))
    assert header(text.replace("X", "assistant")) != header(text)


def test_an_answer_goes_into_the_conversation_without_its_stop_token(monkeypatch):
    """The template has its own, though the token were not special."""
    target = load_target(program.arguments(["--device", DEVICE]))
    seen = []
    monkeypatch.setattr(target, "encode", lambda turns: seen.append([*turns]) or [1, 2])
    monkeypatch.setattr(target, "decode", str)
    stop = next(iter(target.stop))
    question = Question("q", "chat", ["Hi", "More", "End"])
    results = {("q", turn, 0.0, 0, "reference"): {"tokens": tokens}
               for turn, tokens in enumerate([[5, stop], [6, 7], [8]])}
    bench.race.ask(target, [question], 3, results)
    assert seen[-1] == ["Hi", "[5]", "More", "[6, 7]", "End"]


def test_a_temperature_that_is_given_twice_counts_once():
    assert program.arguments(["--temperatures", "0,1,1.0,-0"]).temperatures == [0, 1]


def test_the_fingerprint_sees_every_layer():
    model = random_model()
    before = fingerprint_of(model)
    assert fingerprint_of(random_model()) == before
    rolled = random_model()
    rolled.embed.weight[8:] = rolled.embed.weight[8:].roll(1, 0)
    assert fingerprint_of(rolled) != before
    model.layers[-1].down.weight.mul_(1.01)
    assert fingerprint_of(model) != before


def test_settings_are_as_typed_else_as_the_model_suggests_else_the_default():
    typed = load_target(program.arguments(["--device", DEVICE, "--draft-length", "2"])).settings
    assert typed == {"skip_layers": 16, "draft_length": 2, "exit_threshold": 0.3,
                     "opt_interval": 128, "opt_tokens": 4}


# ---------------------------------------------------------------- figures and steps

FIGURES = {
    "3a_sparse_persistence", "skipped_layers", "3b_markov", "3c_time", "4a_skipped_layers",
    "bound", "4b_interval", "4c_exit_threshold", "acceptance",
}


def test_all_figures_are_drawn_with_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(fixed, "TRIALS", 5)
    assert program.main([*TINY, "--figures", str(tmp_path)]) == 0
    files = {f"{name}.{kind}" for name, kind in itertools.product(FIGURES, ("png", "csv"))}
    assert {path.name for path in tmp_path.iterdir()} == files | {"figures.md"}
    page = (tmp_path / "figures.md").read_text()
    for name in FIGURES:
        assert f"({name}.png)" in page
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) > 1


@pytest.mark.parametrize("wrap", [lambda model: model, GraphedLlama], ids=["plain", "graphs"])
def test_the_window_of_figure_3b_fits_small_models_and_graphs(wrap):
    target = small_target(model=wrap(random_model(layers=6)))
    rows = experiments.markov(target, [Prompt("q", 0, "chat", [1, 2, 3], [])])
    assert len(rows) == 7
    assert rows[0]["brute force"] == pytest.approx(1)
    for row in rows:                                      # nothing is better than the best
        assert row["brute force"] >= row["DP"] - 1e-6
        assert row["brute force"] >= row["random"]


def test_the_dp_chooses_a_set_at_every_token_for_figure_3a(target, prompt):
    drafter = experiments.SetAtEveryToken(target.model, 11)
    assert isinstance(drafter, Clasp)
    stats, _ = run(target, Method(drafter), prompt, 20)
    assert [new_tokens for new_tokens, _ in stats.skip_sets] == list(range(20))
    assert stats.drafted == 0


def test_figure_3a_asks_for_no_more_tokens_than_fit(target, prompt):
    long = prompt * (500 // len(prompt))
    assert len(long) + experiments.PERSISTENCE_TOKENS > 512
    (sets,) = experiments.sets_of_texts(target, [Prompt("q", 0, "chat", long, [])])
    assert 2 <= len(sets) <= 512 - len(long)


def test_figure_3a_refuses_answers_without_two_sets(target, prompt, monkeypatch):
    monkeypatch.setattr(experiments, "PERSISTENCE_TOKENS", 1)
    with pytest.raises(SettingsError, match="too short"):
        experiments.sets_of_texts(target, [Prompt("q", 0, "chat", prompt, [])])


def test_searches_take_any_seed():
    assert search.Search(small_target(), 2 ** 40, trials=1).budget > 0


def test_the_steps_are_timed_and_compared_with_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "steps.md"
    assert program.main([*TINY, "--repeat", "1", "--speed", str(path)]) == 0
    page = path.read_text()
    assert page + "\n" == capsys.readouterr().out
    for step in ("plain step", "verify pass", "draft token", "DP", "DP of one token, cell by cell"):
        assert f"| {step} | " in page
    assert "transformers' generate" in page


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("argv, word", [
    (["--methods", "magic"], "unknown methods magic"),
    (["--temperatures", "hot"], "temperatures"),
    (["--questions", "/no"], "question.jsonl"),
    (["--model", "/no"], "no folder"),
    (["--synthetic", "gpt"], "invalid choice"),
    (["--skip-layers", "20"], "fewer than"),
    (["--skip-layers", "25"], "fewer than"),
    (["--repeat", "0"], "at least 1"),
    (["--limit", "0"], "at least 1"),
    (["--out", "x.md"], ".jsonl"),
    (["--out", "/no/x.jsonl"], "no folder /no"),
    (["--out", ""], ".jsonl"),
    (["--synthetic", "llama3-8b", "--model", "x"], "not both"),
    (["--temperatures", "0,1e-9"], "temperature must be"),
    (["--seed", "-1"], "seed must lie"),
    (["--seed", str(2 ** 63 - 1)], "seed must lie"),
], ids=str)
def test_mistakes_are_one_line(tmp_path, capsys, argv, word):
    assert program.main([*TINY, "--out", str(tmp_path / "x.jsonl"), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--out", "--speed"])
def test_a_page_that_somebody_else_wrote_is_not_overwritten(tmp_path, capsys, option):
    page = tmp_path / "notes.md"
    page.write_text("# my notes\n")
    file = page.with_suffix(".jsonl") if option == "--out" else page
    assert program.main([*TINY, option, str(file)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert page.read_text() == "# my notes\n"


def test_pictures_that_somebody_else_drew_are_not_overwritten(tmp_path, capsys):
    picture = tmp_path / "acceptance.png"
    picture.write_bytes(b"mine")
    assert program.main([*TINY, "--figures", str(tmp_path)]) == 2
    assert "might be overwritten" in capsys.readouterr().err
    assert picture.read_bytes() == b"mine"


def test_figures_that_were_stopped_have_a_page_of_what_is_drawn(tmp_path, monkeypatch, capsys):
    def stopped(*args):
        yield program.figures.Figure("first", [{"x": 1}], lambda axes: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(program.figures, "new_figures", stopped)
    argv = [*TINY, "--limit", "1", "--max-new-tokens", "2", "--figures", str(tmp_path)]
    for _ in range(2):                                     # the second time over its own
        assert program.main(argv) == 130
    assert "(first.png)" in (tmp_path / "figures.md").read_text()


def test_a_table_that_somebody_else_wrote_is_not_overwritten(tmp_path, capsys):
    table = tmp_path / "notes.csv"
    table.write_text("my,own,figures\n")
    assert program.main([*TINY, "--out", str(table.with_suffix(".jsonl"))]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [table]
    assert table.read_text() == "my,own,figures\n"


@pytest.mark.parametrize("argv, package", [
    ([], "optuna"),
    (["--figures", "folder"], "matplotlib"),
])
def test_packages_that_are_missing_are_named_at_once(monkeypatch, capsys, argv, package):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    monkeypatch.setattr(program, "load_target", None)
    assert program.main(argv) == 2
    assert f"pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("word, shown", [
    ("/a/b c", "'b c'"),
    ("--model=/a/b", "--model=b"),
    ("owner/name", "owner/name"),
    ("~/b", "b"),
    ("results/x.jsonl", "results/x.jsonl"),
    ("../a/b/", "b"),
    ("0.5", "0.5"),
])
def test_the_command_that_made_a_file_shows_no_path_of_the_machine(word, shown):
    assert program.command(["--seed", "1", word], None) == f"python -m bench --seed 1 {shown}"


def test_the_models_folder_is_shown_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "one").mkdir(parents=True)
    shown = program.command(["--model", "models/one"], "models/one")
    assert shown == "python -m bench --model one"
