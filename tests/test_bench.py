"""bench.py: every method writes the whole model's text, searches search, a stopped run goes on, figures are drawn."""
import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

import bench  # noqa: E402
from conftest import DEVICE, random_model  # noqa: E402
from cuda_graphs import GraphedLlama  # noqa: E402
from model import Config  # noqa: E402
from speculative import SettingsError, autoregressive  # noqa: E402

TINY = ["--device", DEVICE, "--limit", "1", "--repeat", "2", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def target():
    return bench.Target(bench.arguments(["--device", DEVICE, "--skip-layers", "14"]))


def test_every_method_writes_the_whole_models_greedy_text(target):
    names = ["clasp", "auto", "self-sd", "swift", "even", "random", "prompt-lookup"]
    prompt = target.encode(["The old king said to the old king"])
    expected = target.run(partial(autoregressive, width=target.settings["draft_length"] + 1), prompt, 60)[0].tokens
    for name, method in bench.methods_of(target, names, seed=0).items():
        stats, wall = target.run(method, prompt, 60)
        assert stats.tokens == expected or name in ("autoregressive", "auto"), name          # these have passes of one row
        assert 0 < stats.draft_seconds + stats.verify_seconds + stats.optimize_seconds <= wall or name == "autoregressive", name
        assert 0 < stats.seconds <= wall, name                   # how much less is the machine's affair; the table says it
        assert all(len(skipped) == 14 for _, skipped in stats.skip_sets) or name in ("prompt-lookup", "auto"), name
        target.run(method, prompt, 30, temperature=1.0)


def test_prompt_lookup_drafts_what_followed_before(target):
    stats, _ = target.run(partial(bench.prompt_lookup, target), [5, 6, 7, 8, 9] * 6, 40)
    assert stats.drafted > 0 and stats.skip_sets[0][1] == frozenset()


def test_prompt_lookup_finds_the_last_place_of_the_longest_match():
    chance, stats = random.Random(0), SimpleNamespace(tokens=[])
    prompt = [chance.randrange(4) for _ in range(9)]
    fixed = SimpleNamespace(fixed=lambda skip: lambda *_, drafter, **options: drafter)
    drafter = bench.prompt_lookup(fixed, None, prompt, 99, stats=stats)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=4), embed=SimpleNamespace(weight=torch.zeros(1)))
    for _ in range(100):
        text = prompt + stats.tokens
        places = [i + n for n in (3, 2, 1) for i in range(len(text) - n - 1, -1, -1) if text[i:i + n] == text[-n:]]
        assert drafter(model, None, text[-1], (), 4, None, None, ())[0] == (text[places[0]:places[0] + 4] if places else [])
        stats.tokens += [chance.randrange(4) for _ in range(chance.randint(1, 4))]


def better_than_at_random(search, startup):
    """The Bayesian part finds better sets on average than the random start, and the best one is kept."""
    start, later = search.scores[:startup], search.scores[startup:]
    assert sum(later) / len(later) > sum(start) / len(start)
    assert search.score == max(search.scores) >= max(start) and len(search.best) == search.budget


def test_self_sd_search_improves_on_its_random_start(target):
    better_than_at_random(bench.self_sd(target, seed=0, trials=150), 50)


def test_swift_search_improves_on_its_random_start_and_stops(target):
    swift = bench.Swift(target, seed=0, trials=120)
    for seed, prompt in enumerate(bench.PROMPTS["tale"] * 3):
        target.run(swift, target.encode([prompt]), 120, temperature=1.0, seed=seed)
    assert swift.left == 0 and len(swift.scores) == 120
    better_than_at_random(swift, 40)


@pytest.mark.parametrize("layers, budget", [(20, 17), (30, 15), (8, 1), (5, 4)])
def test_fixed_sets_have_their_size(layers, budget):
    shape = SimpleNamespace(layers=layers, settings={"skip_layers": budget}, fixed=lambda skip: frozenset(skip))
    for skip in list(bench.methods_of(shape, ["even", "random"], seed=0).values())[1:]:
        assert len(skip) == budget and skip <= set(range(layers))


def test_a_stopped_run_goes_on_and_gives_the_table(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    argv = [*TINY, "--methods", "clasp,even", "--temperatures", "0", "--out", str(out)]
    assert bench.main(argv) == 0
    table, lines = capsys.readouterr().out, out.read_text().splitlines()
    assert "| clasp |" in table and "Made by `python bench.py --device" in table and "--out run.jsonl`" in table
    assert (tmp_path / "run.md").read_text() + "\n" == table
    assert len(lines) == 1 + 7 * (1 + 2 * 3)                      # a header; for 7 prompts a reference and 2 x 3 runs
    assert bench.main(argv) == 0 and capsys.readouterr().out == table          # all there: nothing is run again
    out.write_text("\n".join(lines[:22])[:-9])                    # in the midst of a line, and of a race: that is run again, whole
    assert bench.main(argv) == 0
    assert sorted(map(key, out.read_text().splitlines()[1:])) == sorted(map(key, lines[1:] + lines[20:21]))
    capsys.readouterr()
    for other in (["--seed", "1"], ["--cuda-graphs"]):
        assert bench.main([*argv, *other]) == 2 and "another run" in capsys.readouterr().err
    out.write_text("a shopping list\nmilk")
    assert bench.main(argv) == 2 and "another run" in capsys.readouterr().err and out.read_text() == "a shopping list\nmilk"


def key(line):
    return str(json.loads(line)["key"])


def test_a_header_alone_blocks_no_other_run(tmp_path):
    """As a run leaves it that is refused before anything is measured."""
    out, headers = tmp_path / "run.jsonl", [{"key": ["header"], "seed": seed} for seed in (1, 2)]
    for header in headers:
        bench.Results(out, header)
        assert [json.loads(line) for line in out.read_text().splitlines()] == [header]
    bench.Results(out, headers[1])["one",] = {"key": ["one"]}
    with pytest.raises(SettingsError, match="another run"):
        bench.Results(out, headers[0])
    assert list(bench.Results(out, headers[1])) == [("header",), ("one",)] and len(out.read_text().splitlines()) == 2


def test_a_race_goes_a_token_of_each_in_turn(target):
    order = []

    def method(name, count):
        def tokens(model, prompt, most, *, stats, stop):
            stats.prefill_seconds = 1.0
            for i in range(count):
                order.append(name)
                yield i
        return tokens

    found = target.race({"long": method("long", 3), "short": method("short", 1), "none": method("none", 0)}, [1], 9)
    assert order == ["long", "short", "long", "long"] and list(found) == ["long", "short", "none"]
    assert all(-1 <= wall < 0 for _, wall in found.values())          # the prefill is taken off the seconds that passed


def test_spec_bench_questions_are_grouped_and_limited(tmp_path):
    questions = [{"question_id": i, "category": c, "turns": ["one", "two"]} for i, c in enumerate(["writing", "math", "rag"] * 10)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    read = bench.read_questions(bench.arguments(["--questions", str(tmp_path / "q.jsonl"), "--limit", "4"]))
    assert [group for _, group, _ in read].count("chat") == 4 and [group for _, group, _ in read].count("rag") == 4
    assert read[0][2] == ["one", "two"]
    with pytest.raises(SettingsError, match="--limit"):
        bench.read_questions(bench.arguments(["--limit", "0"]))


def test_a_synthetic_model_runs_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "llama3.2-1b", Config(500, 64, 96, 6, 4, 2, 16, 256, tie_word_embeddings=True))
    argv = [*TINY, "--synthetic", "llama3.2-1b", "--methods", "clasp", "--out", str(tmp_path / "run.jsonl")]
    assert bench.main([*argv, "--residual", "0.01"]) == 0
    table = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in table.splitlines()[0]
    target = bench.Target(bench.arguments([*argv, "--residual", "0"]))          # the middle layers add nothing
    stats, _ = target.run(target.clasp, [1, 2, 3], 40, skip_layers=2)
    assert stats.accepted == stats.drafted


def test_all_figures_are_drawn_with_their_numbers(tmp_path):
    assert bench.main([*TINY, "--max-new-tokens", "8", "--figures", str(tmp_path)]) == 0
    names = {"3a_sparse_persistence", "3b_markov", "3c_time", "4a_skipped_layers", "4b_interval", "4c_exit_threshold", "bound",
             "skipped_layers"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "csv")} | {"figures.md"}
    assert all(len(p.read_text().splitlines()) > 1 for p in tmp_path.glob("*.csv"))


def test_the_window_of_figure_3b_fits_small_models_and_graphs():
    model = random_model(layers=6)
    for model in (model, GraphedLlama(model)):
        target = SimpleNamespace(model=model, layers=6)
        (_, rows, _), = bench.markov(target, None, [SimpleNamespace(tokens=[1, 2, 3])])
        assert len(rows) == 7 and rows[0]["brute force"] == pytest.approx(1)
        assert all(row["brute force"] >= row["dynamic programme"] - 1e-6 and row["brute force"] >= row["random"] for row in rows)


def test_with_graphs_every_prompt_is_warmed_before_it_is_timed():
    """On a GPU what is not yet recorded is recorded then, which takes as long as many tokens do."""
    prompts = [bench.Prompt(str(i), 0, "chat", [5] * length, []) for i, length in enumerate((3, 300, 150))]
    graphed, timed = SimpleNamespace(model=GraphedLlama(random_model(context=512)), stop=(), encode=lambda texts: [1, 2, 3]), []

    def race(*work, **settings):
        before = graphed.model.captures
        found = bench.Target.race(graphed, *work, **settings)
        timed.append(graphed.model.captures - before)
        return found

    graphed.race, graphed.run = race, lambda method, *work: bench.Target.race(graphed, {"": method}, *work)
    methods = {"autoregressive": autoregressive, "clasp": partial(bench.clasp, skip_layers=3, draft_length=3)}
    bench.interleave(graphed, bench.arguments(["--cuda-graphs", "--max-new-tokens", "12", "--repeat", "1"]), methods, prompts, [0.0], {})
    assert timed == 6 * [0]


@pytest.mark.parametrize("argv, word", [
    (["--methods", "magic"], "unknown methods magic"), (["--temperatures", "hot"], "temperatures"), (["--questions", "/no"], "question.jsonl"),
    (["--model", "/no"], "no folder"), (["--synthetic", "gpt"], "invalid choice"), (["--skip-layers", "20"], "fewer than"),
    (["--skip-layers", "25"], "fewer than"), (["--repeat", "0"], "at least 1"), (["--out", "x.md"], ".jsonl"),
    (["--out", "/no/x.jsonl"], "no folder /no"), (["--out", ""], ".jsonl"),
    (["--synthetic", "llama3-8b", "--model", "x"], "not both")])
def test_mistakes_are_one_line(tmp_path, capsys, argv, word):
    assert bench.main([*TINY, "--out", str(tmp_path / "x.jsonl"), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and word in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("word, shown", [("/a/b c", "'b c'"), ("--model=/a/b", "--model=b"), ("owner/name", "owner/name"), ("~/b", "b"),
                                         ("results/x.jsonl", "results/x.jsonl"), ("../a/b/", "b"), ("0.5", "0.5")])
def test_the_command_that_made_a_file_shows_no_path_of_the_machine(word, shown):
    assert bench.command(["--seed", "1", word], None) == f"python bench.py --seed 1 {shown}"


def test_the_models_folder_is_shown_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "one").mkdir(parents=True)
    assert bench.command(["--model", "models/one"], "models/one") == "python bench.py --model one"
