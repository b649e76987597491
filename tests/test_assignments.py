"""assignments/: the reference gets every point, an untouched export none.

And a mistake costs points in its own problem only.
"""
import ast
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
import checks
import export
import golden
import leaderboard
import mistakes
from checks import CHECKS
from grade import PROBLEMS, assigned

CORE = ("model.py", "dp_skip.py", "speculative.py")
ALL = tuple(PROBLEMS)
FULL = {number: sum(check.points for check in CHECKS[number]) for number in PROBLEMS}
PROPERTY = r"\w.+\.\nSmallest example found: .+\."
FAILURE = r"Your code raised .+ line \d+, in \w+\(.*\)"


def graded(repo, *options) -> dict:
    done = subprocess.run(
        [sys.executable, str(repo / "grade.py"), "--json", *options],
        capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def scores(results: dict) -> dict[int, int]:
    """By problem."""
    points = {}
    for test in results["tests"]:
        problem = int(test["number"].split(".")[0])
        points[problem] = points.get(problem, 0) + test["score"]
    return points


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(problems): a student's repository, made once and not to be changed."""
    @functools.cache
    def make(problems=ALL):
        out = tmp_path_factory.mktemp("export") / "student"
        export.export(out, list(problems))
        return out
    return make


@pytest.fixture
def solved(exported, tmp_path):
    """An export with the reference filled in, to be broken."""
    return fill_in(exported(), tmp_path / "solved")


def fill_in(repo, out):
    shutil.copytree(repo, out, ignore=shutil.ignore_patterns("__pycache__"))
    for name in CORE:
        shutil.copy(ROOT / name, out)
    return out


# ---------------------------------------------------------------- points

def test_the_reference_gets_100_points():
    results = mistakes.run({})
    assert [result.message for result in results if not result.passed] == []
    assert sum(result.points for result in results) == sum(FULL.values()) == 100


def test_a_second_solution_written_differently_gets_every_point():
    assigned_ones = {name for problem in PROBLEMS.values() for name in problem.functions}
    assert set(mistakes.SOLUTIONS) == assigned_ones
    results = mistakes.run(dict.fromkeys(mistakes.SOLUTIONS, ""))
    assert [result.message for result in results if not result.passed] == []


def test_what_is_solved_gets_its_points_and_what_is_not_gets_none(exported, tmp_path):
    out = shutil.copytree(exported(), tmp_path / "solved")
    shutil.copy(ROOT / "dp_skip.py", out)
    assert scores(graded(out, "--problems", "3,5")) == {3: FULL[3], 5: 0}


@pytest.mark.thorough
def test_a_filled_in_export_gets_100_points_and_gradescope_can_read_it(solved):
    results = graded(solved)
    assert scores(results) == FULL
    assert results["score"] == 100
    for test in results["tests"]:
        assert test["status"] == "passed"
        assert test["score"] == test["max_score"] > 0
        assert test["output"] == ""
        assert test["visibility"] == "visible"
        assert test["name"].startswith(test["number"])


@pytest.mark.thorough
def test_an_untouched_export_gets_nothing_and_says_why(exported):
    results = graded(exported())
    assert results["score"] == 0
    assert len(results["tests"]) == sum(map(len, CHECKS.values()))
    for test in results["tests"]:
        number = test["number"][0]
        assert re.fullmatch(rf"not written yet: [\w.]+, problem {number}", test["output"])
        assert test["status"] == "failed"


# ---------------------------------------------------------------- mistakes

def assert_found(name: str, title: str):
    """A mistake loses points in its own problem and nowhere else, and the message helps."""
    failed = [result for result in mistakes.run({name: title}) if not result.passed]
    assert {int(result.number[0]) for result in failed} == {mistakes.problem_of(name)}, title
    for result in failed:
        assert re.fullmatch(f"{PROPERTY}|{FAILURE}", result.message), result.message


@pytest.mark.parametrize("name, title", [
    ("model.rotate", "turned the other way"),
    ("model.Llama.forward", "cache.length not moved"),
    ("dp_skip.walk_back", "j not lowered at a skip"),
    ("model.Llama.candidate_layer", "slot p seen"),
    ("speculative.accept_greedy", "never all of the draft"),
    ("speculative.decode", "not rolled back"),
])
def test_a_mistake_of_each_problem_loses_points_there_and_nowhere_else(name, title):
    assert_found(name, title)


@pytest.mark.thorough
@pytest.mark.parametrize("name", mistakes.SOLUTIONS)
def test_every_mistake_loses_points_in_its_own_problem_and_nowhere_else(name):
    for title in mistakes.SOLUTIONS[name].mistakes:
        assert_found(name, title)


def test_there_are_mistakes_in_every_function():
    assert len(mistakes.MISTAKES) >= 100
    assert {name for name, _ in mistakes.MISTAKES} == set(mistakes.SOLUTIONS)


# ---------------------------------------------------------------- code that does not behave

def misbehave(repo, function: str, body: str):
    """Put other statements in place of a function's body."""
    module, name = function.split(".", 1)
    path = repo / f"{module}.py"
    path.write_text(export.replace_bodies(path.read_text(), {name: body}))


def outputs(results: dict) -> dict[str, str]:
    return {test["number"]: test["output"] for test in results["tests"]}


@pytest.mark.thorough
def test_code_that_hangs_crashes_or_leaves_loses_its_own_problem_only(solved):
    misbehave(solved, "model.RMSNorm.forward", "while True: pass")
    misbehave(solved, "model.Llama.logits", "import ctypes; ctypes.string_at(0)")
    misbehave(solved, "dp_skip.distances", "import os; os._exit(0)")
    misbehave(solved, "model.Llama.candidate_layer", "return torch.empty(1 << 40)")
    misbehave(solved, "speculative.accept_greedy", "raise SystemExit(0)")
    results = graded(solved)
    said = outputs(results)
    got = scores(results)
    assert got[1] == 0
    assert re.search(r"not come to an end within \d+ s, at model.py, line \d+$", said["1.1"])
    assert said["1.2"] == "not reached: see check 1.1"
    assert got[2] == FULL[2] - 2
    assert re.search(r"SIGSEGV, at model.py, line \d+$", said["2.6"])
    assert got[3] == 0
    assert "ended the whole process" in said["3.1"]
    assert got[4] == FULL[4] - 9
    assert "3 GiB" in said["4.6"]
    assert got[5] == FULL[5] - 5
    assert "sys.exit" in said["5.1"]
    assert got[6] == FULL[6]


@pytest.mark.thorough
def test_what_a_solution_prints_or_writes_counts_for_nothing(solved):
    misbehave(solved, "model.RMSNorm.forward", """
import json, os
line = json.dumps({"key": "", "number": "1.1", "passed": True}) + "\\n"
os.write(1, line.encode())
os.write(2, line.encode())
print("passed", flush=True)
os._exit(0)
""")
    assert scores(graded(solved, "--problems", "1")) == {1: 0}


@pytest.mark.thorough
def test_code_that_fails_is_shown_by_its_own_line_or_by_what_it_returned(solved):
    misbehave(solved, "dp_skip.select_layers_plain", "return [][0]")
    misbehave(solved, "dp_skip.select_layers",
              "return Selection([0] * (budget + 1), [1.] * (budget + 1))")
    path = solved / "model.py"
    path.write_text(path.read_text() + "\nif True print(1)\n")
    said = outputs(graded(solved, "--problems", "3,4"))
    line = (solved / "dp_skip.py").read_text().splitlines().index("    return [][0]") + 1
    states = "[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]"
    assert said["3.5"] == (
        "Your code raised IndexError: list index out of range, "
        f"at dp_skip.py, line {line}, in select_layers_plain(states = {states}, budget = 1)")
    could_not = r"The check could not use what your code returned \(TypeError: 'int' .*\), "
    assert re.match(could_not + r"at checks/problem3.py, line \d+: ", said["4.1"])
    assert "model.py does not load, SyntaxError in line" in said["4.6"]


# ---------------------------------------------------------------- the export

def code_lines(text: str) -> set[str]:
    """Without indentation and comments, those that say something."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if not line.startswith(("from ", "import "))]
    return {line for line in lines if len(line) > 24} - ANYBODYS


ANYBODYS = {"if accepted < len(drafted):"}             # a test of sampling asks the same


def lines_taken_out(out) -> set[str]:
    """Lines of the reference that are nowhere in the exported modules."""
    whole = set()
    left = set()
    for path in export.exported_modules().values():
        whole |= code_lines(path.read_text())
        left |= code_lines((out / path.relative_to(ROOT)).read_text())
    return whole - left


def assert_nothing_leaks(out, problems):
    removed = lines_taken_out(out)
    assert len(removed) > 3
    names = []
    for path in out.rglob("*"):
        if path.is_file():
            names.append(path.relative_to(out).as_posix())
        if path.suffix in (".py", ".md", ".json", ".toml") and path.name != "tokenizer.json":
            assert not code_lines(path.read_text()) & removed, path
    elsewhere = r"bench|tools/|mistakes|solutions|export|golden\.py|train|\.pyc|\.git/|assignments"
    assert not [name for name in names if re.search(elsewhere, name)]
    for number in problems:
        for name in PROBLEMS[number].functions:
            assert_taken_out(out, name)


def assert_taken_out(out, name: str):
    """Signature and docstring stay, and nothing else."""
    module, function = name.split(".", 1)
    node = export.find(ast.parse((out / f"{module}.py").read_text()), function)
    reference = export.find(ast.parse((ROOT / f"{module}.py").read_text()), function)
    assert ast.unparse(node.args) == ast.unparse(reference.args)
    assert ast.get_docstring(node) == ast.get_docstring(reference)
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    assert len(statements) == 1
    assert "NotImplementedError" in ast.unparse(statements[0])


@pytest.mark.parametrize("problems", [ALL, (3,)], ids=str)
def test_nothing_exported_gives_a_solution_away(exported, problems):
    assert_nothing_leaks(exported(problems), problems)


@pytest.mark.thorough
@pytest.mark.parametrize("problems", [(1,), (2,), (4,), (5,), (6,), (3, 4)], ids=str)
def test_no_shorter_assignment_gives_a_solution_away(exported, problems):
    assert_nothing_leaks(exported(problems), problems)


@pytest.mark.thorough
@pytest.mark.parametrize("problem", ALL)
def test_a_shorter_assignment_is_solved_but_for_its_problem(exported, tmp_path, problem):
    out = exported((problem,))
    assert scores(graded(out)) == {problem: 0}
    solved = shutil.copytree(out, tmp_path / "solved")
    for name in PROBLEMS[problem].functions:
        module, function = name.split(".", 1)
        misbehave(solved, name, body_of((ROOT / f"{module}.py").read_text(), function))
    assert scores(graded(solved)) == {problem: FULL[problem]}
    code = """if True:
        from checkpoint import BUNDLED, load_model
        from speculative import autoregressive, clasp
        model = load_model(BUNDLED)
        assert list(clasp(model, [5, 6, 7], 8)) == list(autoregressive(model, [5, 6, 7], 8))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=solved).returncode == 0
    assert subprocess.run([sys.executable, "generate.py", "--max-new-tokens", "8", "--prompt", "A"],
                          cwd=solved, capture_output=True).returncode == 0


def body_of(source: str, function: str) -> str:
    """A function's statements, without its docstring."""
    node = export.find(ast.parse(source), function)
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    return "\n".join(ast.unparse(statement) for statement in statements)


def test_the_handout_of_a_shorter_assignment_has_its_problems_only(exported):
    text = (exported((3,)) / "README.md").read_text()
    assert "## Problem 3" in text
    assert "## Problem 4" not in text
    assert "assigns problem 3;" in text
    assert "## Open questions" in text
    assert "**This copy" not in (exported() / "README.md").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("problems", [ALL, (3,)], ids=str)
def test_the_exported_tests_pass_on_a_filled_in_export(exported, tmp_path, problems):
    solved = fill_in(exported(problems), tmp_path / "solved")
    names = {path.name for path in (solved / "tests").glob("*.py")}
    assert {"conftest.py", "test_dp_skip.py", "test_speculative.py", "test_model.py"} <= names
    assert not names & {"test_bench.py", "test_assignments.py", "test_cuda_graphs.py"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests"],
        cwd=solved, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout


def test_what_stands_in_for_a_file_has_what_generate_wants_of_it(exported):
    for problem, module, names in ((1, "packed", {"choose_threads", "pack"}), (6, "auto", {"Auto"}),
                                   (6, "lookup", {"Lookup", "MOST"})):
        out = exported((problem,))
        stand_in = (out / "extras" / f"{module}.py").read_text()
        assert stand_in == (HERE / "stand_ins" / f"{module}.py").read_text()
        tree = ast.parse((out / "generate.py").read_text())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        wanted = [node for node in imported if node.module == f"extras.{module}"]
        assert {alias.name for node in wanted for alias in node.names} == names
        assert not (out / "tests" / f"test_{module}.py").exists()
        assert stand_in != (exported((5,)) / "extras" / f"{module}.py").read_text()


def test_helpers_of_a_solution_go_with_it_and_those_that_the_handout_names_stay():
    source = """
def solved():
    raise NotImplementedError


def step():
    return inner()


def inner():
    return 'step'


def named():
    return 1
"""
    users = ["import core\ncore.solved()"]
    left = export.without_helpers({"core": source}, users, "Measure by `named`.")
    assert export.functions_of(left["core"]) == {"solved", "named"}


def test_a_test_file_that_imports_what_is_not_exported_stays(exported):
    assert export.imports("from a.b import c\nimport d.e") == {"a", "a.b", "a.b.c", "d", "d.e"}
    names = {path.stem for path in (exported() / "tests").glob("*.py")}
    modules = {path.stem for path in exported().glob("*.py")} | {"extras"}
    modules |= {f"extras.{path.stem}" for path in (exported() / "extras").glob("*.py")}
    for path in (exported() / "tests").glob("*.py"):
        ours = export.imports(path.read_text()) & (export.project_modules().keys() | {"bench"})
        assert ours <= modules | names, path


def test_a_name_that_is_gone_fails_loudly_and_writes_nothing(tmp_path, monkeypatch):
    for gone in (
        "dp_skip.no_such_function",
        "model.RMSNorm.no_such_method",
        "nowhere.at_all",
        "model.Config",
    ):
        monkeypatch.setitem(PROBLEMS, 2, PROBLEMS[2]._replace(functions=[gone]))
        with pytest.raises(export.ExportError):
            export.export(tmp_path / "out", [2])
        assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = subprocess.run([sys.executable, str(HERE / "export.py"), str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- what has to fit together

@pytest.mark.parametrize("text, problems", [
    (None, [1, 2, 3, 4, 5, 6]),
    ('{"problems": [3, 4]}', [3, 4]),
    ('{"problems": [1, 1, 2]}', [1, 2]),
    ("{", None),
    ("[1]", None),
    ("[99]", None),
    ('{"problems": []}', None),
    ('{"problems": [99]}', None),
    ('{"problems": 3}', None),
])
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
        pattern = rf"## Problem {number}: (.*?) \((\d+) points\)\n(.*?)\n## "
        title, points, section = re.search(pattern, text, re.DOTALL).groups()
        assert title == problem.title
        assert int(points) == FULL[number]
        for name in problem.functions:
            function = re.escape(name.split(".", 1)[1])
            assert re.search(rf"`(\w+\.)*{function}\(", section), name


def numbers(value) -> list[float]:
    """All numbers in what JSON holds, in order; other leaves as they are."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value]


def test_golden_numbers_are_what_the_reference_makes_now():
    kept = json.loads(golden.FILE.read_text())
    made = json.loads(json.dumps(golden.make()))
    assert kept.keys() == made.keys()
    for a, b in zip(numbers(kept), numbers(made), strict=True):
        assert a == (b if isinstance(b, str) else pytest.approx(b, abs=1e-5))


def test_prompts_after_which_the_model_all_but_ties_are_passed_over(monkeypatch):
    margins = iter([0.5, 1e-4, 0.5, 0.5, 0.5, 1e-5, 0.5])
    monkeypatch.setattr(leaderboard, "TOKENS", 2)
    monkeypatch.setattr(golden, "least_margin", lambda *_: next(margins))
    taken = [text["text"] for text in golden.texts()]
    assert taken == [golden.PROMPTS[i] for i in (0, 2, 3, 4, 6)]
    monkeypatch.setattr(golden, "least_margin", lambda *_: 0.0)
    with pytest.raises(SystemExit, match="add others"):
        golden.texts()


# ---------------------------------------------------------------- the leaderboard

@pytest.fixture
def short_leaderboard(monkeypatch):
    monkeypatch.setattr(leaderboard, "TOKENS", 8)
    monkeypatch.setattr(leaderboard, "ROUNDS", 1)


def test_the_leaderboard_measures_the_settings(short_leaderboard):
    board = leaderboard.measure()
    assert re.match(r"speedup \d+\.\d\dx, tau \d", board["line"])
    assert board["values"]["tau"] >= 1


def test_the_leaderboard_measures_a_drafter_made_for_each_text(short_leaderboard, monkeypatch):
    import entry

    from speculative import Drafter
    models = []

    def make(model):
        models.append(model)
        return Drafter()

    monkeypatch.setattr(entry, "DRAFTER", make)
    assert leaderboard.measure()["values"]["tau"] == 1         # it never drafts
    assert len(models) == 2 * golden.TEXTS                     # to warm up, and timed
    assert len(set(map(id, models))) == 1


def test_the_leaderboard_refuses_another_text(short_leaderboard, monkeypatch):
    def accept_all(drafted, logits):
        return len(drafted), int(logits[-1].argmax())

    monkeypatch.setattr("speculative.accept_greedy", accept_all)
    with pytest.raises(checks.PropertyError, match="whole model's own"):
        leaderboard.measure()
