"""assignments/: the reference gets every point, an untouched export none, and a mistake costs its own problem's points only."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

HERE = ROOT / "assignments"
sys.path.insert(0, str(HERE))
import export  # noqa: E402
import golden  # noqa: E402
import leaderboard  # noqa: E402
import mistakes  # noqa: E402
from checks import CHECKS, Wrong  # noqa: E402
from grade import PROBLEMS, assigned  # noqa: E402

CORE = ("model.py", "dp_skip.py", "speculative.py")
FULL = {number: sum(check.points for check in CHECKS[number]) for number in PROBLEMS}


def graded(repo, *options) -> dict:
    done = subprocess.run([sys.executable, str(repo / "grade.py"), "--json", *options], capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def scores(results: dict) -> dict[int, int]:
    return {number: sum(test["score"] for test in results["tests"] if test["number"].startswith(f"{number}."))
            for number in {int(test["number"][0]) for test in results["tests"]}}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(problems): a student's repository, made once for each choice of problems and not to be changed."""
    @functools.cache
    def make(problems=tuple(PROBLEMS)):
        out = tmp_path_factory.mktemp("export") / "student"
        export.export(out, list(problems))
        return out
    return make


@pytest.fixture
def solved(exported, tmp_path):
    """An export with the reference filled in, to be broken."""
    out = tmp_path / "solved"
    shutil.copytree(exported(), out, ignore=shutil.ignore_patterns("model.safetensors"))
    for name in CORE:
        shutil.copy(ROOT / name, out)
    return out


# ---------------------------------------------------------------- points

def test_the_reference_gets_every_point_and_gradescope_can_read_it(solved):
    results = graded(solved)
    assert scores(results) == FULL and results["score"] == sum(FULL.values()) == 100
    assert results["execution_time"] <= 90
    for test in results["tests"]:
        assert test["status"] == "passed" and test["score"] == test["max_score"] > 0 and test["output"] == ""
        assert test["visibility"] == "visible" and test["name"].startswith(test["number"])


def test_an_untouched_export_gets_nothing_and_says_why(exported):
    results = graded(exported())
    assert results["score"] == 0 and len(results["tests"]) == sum(map(len, CHECKS.values()))
    for test in results["tests"]:
        number = int(test["number"][0])
        assert re.fullmatch(rf"not written yet: [\w.]+, problem {number}", test["output"]) and test["status"] == "failed"


def test_a_second_solution_written_differently_gets_every_point():
    assert set(mistakes.SOLUTIONS) == {name for problem in PROBLEMS.values() for name in problem.functions}
    assert [r for r in mistakes.run({name: "" for name in mistakes.SOLUTIONS}) if not r.passed] == []


@pytest.mark.parametrize("name", mistakes.SOLUTIONS)
def test_a_mistake_loses_points_in_its_own_problem_and_nowhere_else(name):
    own = [mistake for function, mistake in mistakes.MISTAKES if function == name]
    for mistake in own:
        failed = [r for r in mistakes.run({name: mistake}) if not r.passed]
        assert {int(r.number[0]) for r in failed} == {mistakes.problem_of(name)}, mistake
        for r in failed:                               # a property and an example, or where the code failed on what
            assert re.fullmatch(r"\w.+\.\nSmallest example found: .+\.|Your code raised .+ line \d+, in \w+\(.*\)", r.message), r.message


def test_there_are_enough_mistakes():
    assert len(mistakes.MISTAKES) >= 25 and {mistakes.problem_of(name) for name, _ in mistakes.MISTAKES} == set(PROBLEMS)


# ---------------------------------------------------------------- code that does not behave

def misbehave(repo, function: str, statement: str):
    """Put a statement in place of a function's body."""
    module, name = function.split(".", 1)
    path = repo / f"{module}.py"
    path.write_text(export.replace_bodies(path.read_text(), {name: statement}))


def test_code_that_hangs_crashes_or_leaves_loses_its_own_problem_only(solved):
    misbehave(solved, "model.RMSNorm.forward", "while True: pass")
    misbehave(solved, "model.Llama.logits", "import ctypes; ctypes.string_at(0)")
    misbehave(solved, "dp_skip.distances", "import os; os._exit(0)")
    misbehave(solved, "speculative.candidate_layer", "return torch.empty(1 << 40)")
    misbehave(solved, "speculative.accept_greedy", "raise SystemExit(0)")
    results = graded(solved)
    said = {test["number"]: test["output"] for test in results["tests"]}
    got = scores(results)
    assert results["execution_time"] <= 90
    assert got[1] == 0 and re.search(r"did not come to an end within \d+ s, at model.py, line \d+$", said["1.1"]) and said["1.2"] == "not reached: see check 1.1"
    assert got[2] == FULL[2] - 2 and re.search(r"SIGSEGV, at model.py, line \d+$", said["2.5"])
    assert got[3] == 0 and "ended the whole process" in said["3.1"]
    assert got[4] == FULL[4] - 9 and "3 GiB" in said["4.6"]
    assert got[5] == FULL[5] - 5 and "sys.exit" in said["5.1"]
    assert got[6] == FULL[6]


def test_what_a_solution_prints_or_writes_counts_for_nothing(solved):
    misbehave(solved, "model.RMSNorm.forward", "import os, json; [os.write(fd, (json.dumps(dict("
              "key='', number='1.1', passed=True)) + '\\n').encode()) for fd in (1, 2)]; print('passed', flush=True); os._exit(0)")
    assert scores(graded(solved, "--problems", "1")) == {1: 0}


def test_code_that_fails_is_shown_by_its_own_line_or_by_what_it_returned(solved):
    misbehave(solved, "dp_skip.select_layers_plain", "return [][0]")
    misbehave(solved, "dp_skip.select_layers", "return Selection([0] * (budget + 1), [1.] * (budget + 1))")
    path = solved / "speculative.py"
    path.write_text(path.read_text() + "\nif True print(1)\n")
    said = {test["number"]: test["output"] for test in graded(solved, "--problems", "3,4")["tests"]}
    line = (solved / "dp_skip.py").read_text().splitlines().index("    return [][0]") + 1
    assert said["3.5"] == ("Your code raised IndexError: list index out of range, "
                           f"at dp_skip.py, line {line}, in select_layers_plain(states = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], budget = 1)")
    assert re.match(r"The check could not use what your code returned \(TypeError: 'int' .*\), at checks/problem3.py, line \d+: ", said["4.1"])
    assert "speculative.py does not load, SyntaxError in line" in said["4.6"]


# ---------------------------------------------------------------- the export

def lines_taken_out(out) -> set[str]:
    """Lines of the reference that are nowhere in the exported core."""
    whole, rest = ({line for name in export.modules() for line in code_lines((folder / f"{name}.py").read_text())} for folder in (ROOT, out))
    return whole - rest


def code_lines(text: str) -> set[str]:
    """Without indentation and comments, those long enough to say something."""
    return {line for line in (line.split("  #")[0].strip() for line in text.splitlines()) if len(line) > 24}


@pytest.mark.parametrize("problems", [tuple(PROBLEMS), *((number,) for number in PROBLEMS), (3, 4)], ids=str)
def test_nothing_exported_gives_a_solution_away(exported, problems):
    out = exported(problems)
    removed = lines_taken_out(out)
    files = [path for path in out.rglob("*") if path.is_file()]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".md", ".json") and path.name != "tokenizer.json"}
    for path, text in texts.items():
        leaked = code_lines(text) & removed
        assert not leaked, (path, leaked)
    names = {path.relative_to(out).as_posix() for path in files}
    assert not [name for name in names if re.search(r"bench|tools/|mistakes|export|golden\.py|train\.py|\.pyc|\.git/|assignments", name)]
    for name in (name for number in problems for name in PROBLEMS[number].functions):
        module, function = name.split(".", 1)
        node = export.find(export.ast.parse(texts[out / f"{module}.py"]), function)
        reference = export.find(export.ast.parse((ROOT / f"{module}.py").read_text()), function)
        assert export.ast.unparse(node.args) == export.ast.unparse(reference.args) and "NotImplementedError" in export.ast.unparse(node.body[-1])
        assert export.ast.get_docstring(node) == export.ast.get_docstring(reference)


def test_a_shorter_assignment_is_solved_but_for_its_problems(exported, tmp_path):
    out = exported((3,))
    assert scores(graded(out)) == {3: 0}
    solved = shutil.copytree(out, tmp_path / "solved")
    reference = (ROOT / "dp_skip.py").read_text()
    for name in PROBLEMS[3].functions:
        node = export.find(export.ast.parse(reference), name.split(".")[1])
        lines = reference.splitlines()[node.body[1].lineno - 1:node.end_lineno]
        misbehave(solved, name, "\n".join(lines).lstrip())
    assert scores(graded(solved)) == {3: FULL[3]}
    code = """if True:                                  # select_layers, which would give it away, goes by the plain form
        from pathlib import Path
        from model import load_model
        from speculative import autoregressive, clasp
        model = load_model(Path("checkpoints/fairy-tales"))
        assert list(clasp(model, [5, 6, 7], 8)) == list(autoregressive(model, [5, 6, 7], 8))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=solved).returncode == 0
    text = (out / "README.md").read_text()
    assert "## Problem 3" in text and "## Problem 4" not in text and "assigns problem 3" in text and "## Open questions" in text


def test_the_tests_that_go_along_need_nothing_that_does_not(exported):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only", "tests"], cwd=exported(), capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert done.returncode == 0, done.stdout
    assert (exported() / "tests" / "test_dp_skip.py").exists() and not (exported() / "tests" / "test_bench.py").exists()


def test_what_is_past_the_paper_is_tested_only_where_it_is_all_solved(exported):
    """A clasp need know no auto, a programme no costs, and forward no blocks."""
    for number in PROBLEMS:
        with_costs = "def test_costs" in (exported((number,)) / "tests" / "test_dp_skip.py").read_text()
        assert ((exported((number,)) / "tests" / "test_auto.py").exists(), with_costs) == (number in (1, 5), number not in (3, 4))
    for path in (exported() / "tests").glob("*.py"):
        assert not re.search(r"\bauto\b|\bAuto\b|test_costs|--skip-unit", path.read_text()), path


def test_helpers_of_a_solution_go_with_it_and_those_that_the_handout_names_stay():
    sources = {"core": "def solved():\n    raise NotImplementedError\n\n\ndef step():\n    return inner()\n\n\n"
                       "def inner():\n    return 'step'\n\n\ndef named():\n    return 1\n"}
    left = export.without_helpers(sources, ["import core\ncore.solved()"], "Measure by `named`.")
    assert export.names_in(left["core"]) == {"NotImplementedError"} and re.findall(r"def (\w+)", left["core"]) == ["solved", "named"]


def test_a_name_that_is_gone_fails_loudly_and_writes_nothing(tmp_path, monkeypatch):
    for gone in ("dp_skip.no_such_function", "model.RMSNorm.no_such_method", "nowhere.at_all", "model.Config"):
        monkeypatch.setitem(PROBLEMS, 2, PROBLEMS[2]._replace(functions=[gone]))
        with pytest.raises(export.Missing):
            export.export(tmp_path / "out", [2])
        assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = subprocess.run([sys.executable, str(HERE / "export.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "not an empty folder" in done.stderr and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- what has to fit together

@pytest.mark.parametrize("text, problems", [
    ('{"problems": [3, 4]}', [3, 4]), ('{"problems": [1, 1, 2]}', [1, 2]), (None, [1, 2, 3, 4, 5, 6])] + [
    (text, None) for text in ("{", "[1]", "[99]", '{"problems": []}', '{"problems": [99]}', '{"problems": 3}')])
def test_a_students_file_may_name_problems_but_not_twice_and_nothing_else(tmp_path, text, problems):
    if text is not None:
        (tmp_path / "assignment.json").write_text(text)
    if problems:
        assert assigned(tmp_path) == problems
    else:
        with pytest.raises(ValueError, match="give them by --problems"):
            assigned(tmp_path)


def test_the_handout_names_every_function_and_the_points():
    text = (HERE / "README.md").read_text()
    for number, problem in PROBLEMS.items():
        section = re.search(rf"## Problem {number}: (.*?) \((\d+) points\)\n(.*?)\n## ", text, re.DOTALL)
        assert section[1].lower().startswith(problem.title.split(",")[0].lower()[:20]) and int(section[2]) == FULL[number]
        assert all(re.search(rf"`(\w+\.)*{re.escape(name.split('.', 1)[1])}\(", section[3]) for name in problem.functions)


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return numbers(list(value.values()))
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]


def test_golden_numbers_are_what_the_reference_makes_now():
    kept, made = json.loads((HERE / "checks" / "golden.json").read_text()), json.loads(json.dumps(golden.make()))
    assert kept.keys() == made.keys() and numbers(kept) == pytest.approx(numbers(made), abs=1e-5)


def test_the_leaderboard_measures_and_refuses_another_text(monkeypatch):
    monkeypatch.setattr(leaderboard, "TOKENS", 8)
    monkeypatch.setattr(leaderboard, "ROUNDS", 1)
    board = leaderboard.measure()
    assert re.match(r"speedup \d+\.\d\dx, tau \d", board["line"]) and board["values"]["tau"] >= 1
    monkeypatch.setattr("speculative.accept_greedy", lambda drafted, logits: (len(drafted), int(logits[-1].argmax())))
    with pytest.raises(Wrong, match="whole model's own"):
        leaderboard.measure()
