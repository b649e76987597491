"""assignments/: the reference gets every point, an untouched export none.

And a mistake costs points in its own problem only.
"""
import ast
import builtins
import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import IN_ASCII, ROOT

HERE = ROOT / "assignments"
sys.path.insert(0, str(HERE))
import autograder
import checks
import export
import golden
import grade
import leaderboard
import mistakes
import taken
from checks import CHECKS
from grade import PROBLEMS, assigned

import dp_skip
import model
import speculative

ENTRY = functools.partial(leaderboard.load_entry, HERE / "entry.py")
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


def test_an_export_is_the_same_whatever_the_machines_encoding(exported, tmp_path):
    out = tmp_path / "student"
    subprocess.run([sys.executable, "assignments/export.py", out],
                   cwd=ROOT, env=IN_ASCII, check=True)
    for path in exported().rglob("*.*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (out / path.relative_to(exported())).read_bytes() == path.read_bytes()


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


def test_a_solution_of_100_points_decodes(short_leaderboard, monkeypatch):
    """As the whole model would, or the leaderboard refuses it; with several tokens for the DP."""
    with mistakes.planted(dict.fromkeys(mistakes.SOLUTIONS, "")):
        for name in ("distances", "select_layers"):              # which are imported by name
            monkeypatch.setattr(speculative, name, getattr(dp_skip, name))
        board = leaderboard.measure(ENTRY)
    assert board["values"]["tau"] > 1


@pytest.mark.parametrize("part", sorted(export.KEPT_BACK))
def test_what_is_kept_back_says_so_in_one_line(exported, part):
    """generate.py shows a SettingsError as such."""
    command = [sys.executable, "-c", f"import {part}"]
    done = subprocess.run(command, cwd=exported(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("speculative.SettingsError: --weights and ")


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


def unwritten(*_, **__):
    raise NotImplementedError


@pytest.mark.parametrize("number", ALL)
def test_a_problem_gets_its_points_while_no_other_is_written(number):
    others = [name for other in PROBLEMS if other != number for name in PROBLEMS[other].functions]
    with mistakes.exchanged(dict.fromkeys(others, unwritten)):
        results = mistakes.run({}, [number])
    assert [result.message for result in results if not result.passed] == []


def test_the_final_norm_in_forward_costs_one_check_while_no_norm_is_written():
    with mistakes.exchanged({"model.RMSNorm.forward": unwritten}):
        results = mistakes.run({"model.Llama.forward": "the final norm in forward"}, [2])
    assert [result.number for result in results if not result.passed] == ["2.1"]


@pytest.mark.parametrize("name, title, numbers", [
    ("dp_skip.select_layers_plain", "states in float32", ["3.7"]),
    ("dp_skip.select_layers", "states in float32", ["4.5"]),
    ("model.Llama.forward", "cos and sin of different positions", ["2.4"]),
    ("model.Llama.candidate_layer", "cos and sin of different positions", ["4.9", "4.10"]),
])
def test_one_slip_costs_one_check_and_that_of_several_tokens(name, title, numbers):
    failed = [result for result in mistakes.run({name: title}) if not result.passed]
    assert [result.number for result in failed] == numbers


def test_doubles_have_what_the_docstrings_of_the_core_promise():
    cache = checks.doubles.marked_cache(3)
    assert isinstance(cache, model.KVCache)
    assert cache.slots.shape[:3] == (2, 4, 1) and len(cache.keys) == len(cache.values) == 4
    assert cache.tokens >= 40 and cache.scratch >= 4
    assert vars(checks.problem1.empty_cache()).keys() >= {"slots", "keys", "values", "tokens"}
    x = torch.zeros(1, 2, 8)
    calls = []
    layer = checks.doubles.marked_model(calls).layers[1]
    angles = checks.doubles.marked_angles(2)
    blocks = layer.mlp_block(layer.attention_block(x, *angles))
    assert blocks.equal(layer(x, *angles))
    for double in (checks.problem3.manhattan, checks.problem3.of_the_last_token):
        assert [*inspect.signature(double).parameters] == ["candidates", "state"]
    layer, states = checks.problem3.toy(2, 0)
    layer(1, candidates=states)
    assert calls[0].positions == calls[1].positions == calls[0].from_sin == [0.0, 1.0]


@pytest.mark.parametrize("title", ["candidates as a batch", "candidates without a batch"])
def test_candidates_of_a_wrong_shape_are_told_so(title):
    for result in mistakes.run({"model.Llama.candidate_layer": title}, [4]):
        assert result.passed or "shape" in result.message
        assert "could not use" not in result.message


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
    ("speculative.decode", "settings not checked"),
    ("speculative.decode", "seconds never kept"),
    ("model.Llama.forward", "a batch's first text only"),
    ("model.Llama.forward", "tokens changed"),
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
def test_code_that_hangs_crashes_or_leaves_loses_its_checks_only(solved):
    """An endless loop costs the check that it is in, and the next runs in a new process."""
    misbehave(solved, "model.RMSNorm.forward", "while True: pass")
    misbehave(solved, "model.Llama.logits", "return torch.ones(2).as_strided((9,), (1 << 60,))")
    misbehave(solved, "dp_skip.distances", "while True: pass")
    misbehave(solved, "model.Llama.candidate_layer", "return torch.empty(1 << 40)")
    misbehave(solved, "speculative.checked_draft", "import time; time.sleep(1e9)")
    results = graded(solved)
    said = outputs(results)
    got = scores(results)
    late = r"did not come to an end within {} s, at {}.py, line \d+$"
    assert got[1] == FULL[1] - 3 - 1
    assert re.search(late.format(10, "model"), said["1.1"])
    assert re.search(late.format(10, "model"), said["1.9"])
    assert got[2] == FULL[2] - 2
    assert got[3] == FULL[3] - 2
    assert re.search(late.format(10, "dp_skip"), said["3.1"])
    assert got[4] == FULL[4] - 9
    assert "3 GiB" in said["4.7"]
    assert got[5] == FULL[5]
    assert got[6] == FULL[6] - 2
    assert re.search(late.format(60, "speculative"), said["6.3"])


@pytest.mark.parametrize("status, faults, how", [
    (-11, "Fatal Python error: Segmentation fault", "was killed by SIGSEGV"),
    (-24, "Fatal Python error", "did not come to an end within 10 s"),
    (1, "Timeout (0:01:00)!", "did not come to an end within 60 s"),
    (0, "", "ended the whole process"),
    (None, "", "was stopped: 400 s for all problems were used up"),
])
def test_how_a_process_ended_is_said(status, faults, how):
    assert grade.how_it_ended(status, faults) == how


# ---------------------------------------------------------------- cheats

FRAMES_WALKED = """
import json, os, sys
frame = sys._getframe()
while frame.f_code.co_name != "main":
    frame = frame.f_back
known = frame.f_locals
numbers = known["job"]["checks"]
for number in numbers[numbers.index(known["number"]):]:
    if number != known["number"]:
        known["say"](number=number)
    known["say"](number=number, passed=True, message="")
os._exit(0)
"""
CHECKS_REPLACED = """
import checks
for problem, of_it in checks.CHECKS.items():
    checks.CHECKS[problem] = [check._replace(run=lambda: None) for check in of_it]
"""
CHECKS_FOUND = """
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict) and "CHECKS" in thing:
        thing["equal"] = thing["close"] = lambda *_: None
"""
COMPARED_BY_ITSELF = """
class Right(int):
    def __ne__(self, other):
        return False
return Right(1), Right(1)
"""
ANY_RESULT_IS_CLOSE = """
torch.isclose = torch.eq = lambda *_, **__: torch.tensor(True)
return torch.zeros(1)
"""
ATTRIBUTES_WALKED = """
for kind in ().__class__.__base__.__subclasses__():
    if kind.__name__ == "PropertyError":
        kind.__init__.__globals__["equal"] = lambda *_: None
"""
ANSWERS_READ = """
numbers = torch.load("checks/golden.json", weights_only=False)
return numbers["layer"]
"""
CHEATS = {
    "frames": FRAMES_WALKED,
    "checks replaced": CHECKS_REPLACED,
    "objects searched": CHECKS_FOUND,
    "compares itself": COMPARED_BY_ITSELF,
    "torch exchanged": ANY_RESULT_IS_CLOSE,
    "attributes walked": ATTRIBUTES_WALKED,
    "answers read": ANSWERS_READ,
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gets_nothing_at_the_end_of_a_file_or_in_a_function(exported, tmp_path, name):
    out = shutil.copytree(exported(), tmp_path / "cheat")
    path = out / "model.py"
    for problem in PROBLEMS.values():
        for function in problem.functions:
            misbehave(out, function, CHEATS[name])
    if "return" not in CHEATS[name]:
        path.write_text(path.read_text() + CHEATS[name])
    results = for_marks(out, ALL if name in ("frames", "checks replaced") else (1,))
    assert results["score"] == 0
    assert "is not allowed" in results["output"]


def for_marks(repo, problems, *options, seed=("--seed", "3")) -> dict:
    """By the project's copy of the grader, on cases made anew, which takes its time."""
    names = ",".join(map(str, problems))
    done = subprocess.run(
        [sys.executable, str(HERE / "grade.py"), str(repo), "--json", "--problems", names,
         *seed, *options], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


REFUSED = [                   # statements, and what is said of them
    ("import os", "the module os"),
    ("import sys as torch", "the module sys"),
    ("from torch import sys", "torch.sys"),
    ("from torch.utils import data", "the module torch.utils"),
    ("import checks.common", "the module checks.common"),
    ("from unittest import mock", "the module unittest"),
    ("torch.sys.exit", ".sys"),
    ("t = torch; t.os._exit(0)", "._exit"),
    ("sys.modules['checks']", ".modules"),
    ("open('results', 'w')", "the name open"),
    ("__import__('os')", "the name __import__"),
    ("getattr(torch, 'o' + 's')", "the name getattr"),
    ("eval('1')", "the name eval"),
    ("exec('1')", "the name exec"),
    ("type('Right', (int,), {})", "the name type"),
    ("x = type", "the name type"),
    ("type(torch).__dict__", ".__dict__"),
    ("vars(torch)", "the name vars"),
    ("globals()", "the name globals"),
    ("attention.__globals__", ".__globals__"),
    ("(x for x in ()).gi_frame.f_back", ".f_back"),
    ("'{0.__globals__}'.format(attention)", ".format"),
    ("f'{attention.__globals__}'", ".__globals__"),
    ("torch.load('x')", ".load"),
    ("torch.save(1, 'x')", ".save"),
    ("torch.ops.aten", ".ops"),
    ("torch.library.Library", ".library"),
    ("torch.from_file('x')", ".from_file"),
    ("torch.CompilationUnit('def f(): return torch.from_file(1)')", ".CompilationUnit"),
    ("torch.PyTorchFileWriter('x')", ".PyTorchFileWriter"),
    ("torch.import_ir_module_from_buffer(1)", ".import_ir_module_from_buffer"),
    ("torch.set_num_threads(9)", ".set_num_threads"),
    ("torch.Tensor.tolist = print", "an assignment to .tolist"),
    ("import speculative\nspeculative.distribution = print", "an assignment to .distribution"),
    ("for torch.isclose in (print,): pass", "an assignment to .isclose"),
    ("from functools import update_wrapper", "functools.update_wrapper"),
    ("from collections.abc import ABCMeta", "collections.abc.ABCMeta"),
    ("global attention\nattention = print", "global"),
    ("class A: pass", "a class"),
    ("match x:\n    case Config(__dict__=y): pass", "a class pattern"),
    ("import itertools\nitertools.product = print", "an assignment to .product"),
    ("import collections\ndef f(self): self.values = print", "an assignment to .values"),
    ("x = 1\nx.calls = []", "an assignment to .calls"),
    ("try: 1\nfinally: pass", "finally"),
    ("import torch.nn.functional as F\nF.np.f2py", ".np"),
    ("torch.sparse_coo_tensor", ".sparse_coo_tensor"),
    ("torch.get_device_module('cpu')", ".get_device_module"),
    ("x.tunable.mp", ".mp"),
    ("try: 1\nexcept: pass", "an except without the name of one error"),
    ("try: 1\nexcept Exception: pass", "an except without the name of one error"),
    ("from model import *", "import *"),
]


@functools.cache
def names() -> taken.Names:
    return taken.names_of(grade.skeletons(ALL))


@pytest.mark.parametrize("statements, what", REFUSED)
def test_code_that_reaches_for_the_grader_is_refused(statements, what):
    assert f"uses {what}, which is not allowed" in taken.refusal(ast.parse(statements), names())


def test_what_solutions_are_written_with_is_allowed():
    solutions = list((HERE / "solutions").glob("problem*.py"))
    for path in [*solutions, *[ROOT / name for name in CORE]]:
        assert taken.refusal(ast.Module(functions_in(path), []), names()) == ""


PLAIN = int | float | complex | str | bytes | torch.Tensor


def test_nothing_that_code_may_import_leads_to_other_modules_or_to_the_interpreter():
    """Whatever attributes and elements it goes through."""
    places = [importlib.import_module(name) for name in sorted(taken.MODULES)]
    places += [getattr(builtins, name) for name in taken.BUILTINS]
    places += [(), [], {}, set(), lambda: 0, (x for x in ()), torch.Tensor]
    reached = {id(place): place for place in places}
    while places:
        for value in parts_of(places.pop()):
            if id(value) not in reached and not isinstance(value, PLAIN):
                reached[id(value)] = value
                places.append(value)
    modules = {value.__name__ for value in reached.values() if isinstance(value, ModuleType)}
    others = {name for name in modules if not name.startswith("torch.distributions")}
    assert others - taken.MODULES == {
        "torch.cpu", "torch.functional", "torch.linalg", "torch.nn.attention", "torch.random",
        "torch.special"}
    for value in (open, eval, exec, compile, getattr, setattr, vars, globals, type, __import__,
                  Exception, BaseException, torch.CompilationUnit, torch.PyTorchFileWriter,
                  torch.from_file):
        assert id(value) not in reached
    metaclasses = [value for value in reached.values() if isinstance(value, type)
                   and issubclass(value, type)]
    assert metaclasses == []


def parts_of(place) -> list:
    """What code that is taken could get at from here."""
    parts = [*place.keys(), *place.values()] if isinstance(place, dict) else []
    parts = [*place] if isinstance(place, list | tuple | set | frozenset) else parts
    for name in filter(taken.is_attribute_allowed, dir(place)):
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            parts.append(getattr(place, name))
    return parts


def functions_in(path) -> list[ast.FunctionDef]:
    """Those that are assigned, without what only declares them."""
    tree = ast.parse(path.read_text())
    assigned_ones = {name.split(".")[-1] for one in PROBLEMS.values() for name in one.functions}
    return [node for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name in assigned_ones]


def test_functions_and_values_of_a_students_own_are_taken_and_nothing_else_runs(tmp_path):
    path = tmp_path / "dp_skip.py"
    core = grade.skeletons([3])
    path.write_text(core["dp_skip"].replace(
        'raise NotImplementedError("dp_skip.walk_back, problem 3")', "return helper(budget)") + """
import math
import os
HALF = 0.5
TWICE = helper(2)
def helper(x: os.PathLike, y: "Any" = None) -> Optional[float]: return x + HALF
def cosines(candidates, state): return 1 / 0
class Selection:
    def more(self): pass
raise SystemExit(1)
""")
    tree, notes = taken.assemble(core["dp_skip"], path, taken.names_of(core))
    module = {"__watched__": checks.common.watched, "__name__": "dp_skip"}
    exec(compile(tree, "dp_skip.py", "exec"), module)
    assert module["walk_back"](None, 1, 2) == 2.5
    assert module["math"] is __import__("math")
    assert "os" not in module and "TWICE" not in module
    said = "\n".join(notes)
    for what in ("cosines is not assigned", "the module os", "TWICE", "Selection.more is new"):
        assert what in said
    assert len(notes) == 4


def test_a_method_may_call_that_of_its_superclass(solved):
    begin = body_of((ROOT / "speculative.py").read_text(), "Clasp.begin")
    misbehave(solved, "speculative.Clasp.begin", f"super().begin(text, hidden)\n{begin}")
    assert scores(graded(solved, "--problems", "6")) == {6: FULL[6]}


def test_a_function_that_needs_what_is_not_taken_costs_only_itself(tmp_path):
    """Defaults, decorators and annotations of values are looked up when a module loads."""
    path = tmp_path / "dp_skip.py"
    core = grade.skeletons([3])
    path.write_text(core["dp_skip"] + """
from functools import wraps
from typing import Final
NEG_INF = float("-inf")
EPS: Final = 1e-6
def fill(x, value=NEG_INF): return value
def later(x, *, value=NEG_INF): return value
@wraps
def helper(): return 1
def fine(x=EPS, key=lambda y: y + EPS, all=[i for i in range(3)]): return key(x)
""")
    tree, notes = taken.assemble(core["dp_skip"], path, taken.names_of(core))
    module = {"__watched__": checks.common.watched, "__name__": "dp_skip"}
    exec(compile(tree, "dp_skip.py", "exec"), module)
    assert module["fine"]() == 2e-6
    for name in ("fill", "later", "helper"):
        assert any(f"{name}: line" in note and "which is not taken" in note for note in notes)
        with pytest.raises(NotImplementedError, match="not taken"):
            module[name]()


def test_the_line_that_a_function_is_not_written_may_be_left_behind_its_body(tmp_path):
    path = tmp_path / "dp_skip.py"
    core = grade.skeletons([3])
    said = 'raise NotImplementedError("dp_skip.walk_back, problem 3")'
    path.write_text(core["dp_skip"].replace(said, f"return layers\n    {said}"))
    tree, _ = taken.assemble(core["dp_skip"], path, taken.names_of(core))
    module = {"__watched__": checks.common.watched, "__name__": "dp_skip"}
    exec(compile(tree, "dp_skip.py", "exec"), module)
    assert module["walk_back"](None, 5, 0) == 5


def test_fields_of_the_cores_objects_may_be_used():
    """Also where a module has the same name, as torch.distributions."""
    fields = taken.names_of(grade.skeletons([6])).fields
    assert "distributions" in fields
    assert all(taken.is_attribute_allowed(name) for name in fields if not name.startswith("_"))


def test_a_file_may_begin_with_a_byte_order_mark_or_name_its_coding(tmp_path):
    path = tmp_path / "model.py"
    for data in (b"\xef\xbb\xbfx = 1", b"# -*- coding: latin-1 -*-\nx = '\xe9'"):
        path.write_bytes(data)
        tree, trouble = taken.parsed(path)
        assert tree.body and not trouble


def test_a_file_that_is_none_or_too_deep_is_said_to_be(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("if x:\n    y\n" + "elif x:\n    y\n" * 3000)
    assert "does not load, RecursionError" in taken.parsed(path)[1]
    path.unlink()
    os.mkfifo(path)
    assert taken.parsed(path)[1] == "model.py is not a file"


@pytest.mark.thorough
def test_errors_that_no_terminal_can_show_are_shown(solved):
    misbehave(solved, "dp_skip.distances", "raise ValueError('\\ud800')")
    done = subprocess.run([sys.executable, str(solved / "grade.py"), "--problems", "3"],
                          capture_output=True, text=True, cwd=solved)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert r"ValueError: \ud800" in done.stdout


@pytest.mark.thorough
def test_a_file_that_is_missing_damaged_or_a_link_costs_its_functions_only(solved):
    (solved / "dp_skip.py").write_text("def (:")
    (solved / "speculative.py").unlink()
    os.replace(solved / "model.py", solved / "other.py")
    (solved / "model.py").symlink_to(ROOT / "model.py")
    results = for_marks(solved, (1, 3, 5))
    assert results["score"] == 0
    said = outputs(results)
    assert said["1.1"] == "not taken: model.py is a link, or too large"
    assert "dp_skip.py does not load, SyntaxError in line 1" in said["3.1"]
    assert said["5.1"] == "not taken: there is no speculative.py"


def line(number, **said) -> dict:
    return {"number": number, **said}


PASSED = {"passed": True, "message": ""}


@pytest.mark.parametrize("lines", [
    [line("3.1"), line("3.1", **PASSED), line("3.1"), line("3.1", **PASSED)],
    [line("3.2"), line("3.2", **PASSED)],
    [line("3.1", **PASSED)],
    [line("3.1"), line("3.2", **PASSED)],
    [line("3.1"), line("3.1", passed=True)],
    [line("3.1"), line("3.1", **PASSED), line("3.2"), line("3.2", **PASSED), line("3.3")],
])
def test_a_report_in_another_order_or_twice_is_refused(lines):
    with pytest.raises(grade.ForgedError):
        grade.read_report(lines, ["3.1", "3.2"])


def test_a_report_that_ends_early_has_no_points_for_the_rest():
    lines = [line("3.1"), line("3.1", **PASSED), line("3.2")]
    assert grade.read_report(lines, ["3.1", "3.2"]) == [(True, "")]


@pytest.mark.parametrize("said", ['{"number": "3.1"}', "[]", "no JSON", '{"key": "other"}'])
def test_a_report_with_a_line_of_another_hand_is_refused(said):
    with pytest.raises(grade.ForgedError):
        grade.with_key('{"key": "k", "number": "3.1"}\n' + said, "k")


@contextlib.contextmanager
def other_cases(seed: int):
    """The checks on cases of this seed."""
    try:
        yield json.loads(json.dumps(golden.make(seed)))
    finally:
        golden.use_golden({})


@pytest.mark.thorough
def test_the_reference_gets_100_points_on_cases_made_anew():
    for seed in range(1, 13):
        with other_cases(seed):
            results = mistakes.run({})
        assert [result.message for result in results if not result.passed] == []


@pytest.mark.parametrize("name, number", [
    ("model.RMSNorm.forward", "1.1"),
    ("model.rope_table", "1.2"),
    ("model.rotate", "1.3"),
    ("model.attention", "1.5"),
    ("dp_skip.distances", "3.1"),
    ("speculative.accept_greedy", "5.1"),
])
def test_answers_written_down_pass_at_home_and_not_for_marks(name, number):
    """A table of what the file's cases want, in the function's place."""
    answers = {}
    module, *path = name.split(".")
    function = functools.reduce(getattr, path, importlib.import_module(module))

    def asked(args) -> str:
        found = []
        for arg in args:
            found += [arg.weight, arg.eps] if isinstance(arg, model.RMSNorm) else [arg]
        return str([(x.dtype, x.tolist()) if isinstance(x, torch.Tensor) else x for x in found])

    def note(*args, **settings):
        answers[asked(args)] = function(*args, **settings)
        return answers[asked(args)]

    def answer(*args, **settings):
        return answers[asked(args)]

    def is_passed(replacement) -> bool:
        with mistakes.exchanged({name: replacement}):
            results = mistakes.run({}, [int(number[0])])
        return {result.number: result.passed for result in results}[number]

    assert is_passed(note)
    assert is_passed(answer)
    with other_cases(3):
        assert not is_passed(answer)


def test_another_seed_makes_other_cases_on_which_the_file_is_no_answer_sheet():
    kept = json.loads(golden.FILE.read_text())
    with other_cases(3) as made:
        assert made.keys() == kept.keys()
        assert all(made[name] != kept[name] for name in made)
    assert not {text["text"] for text in made["texts"]} & {text["text"] for text in kept["texts"]}


@pytest.mark.thorough
def test_code_that_fails_is_shown_by_its_own_line_or_by_what_it_returned(solved):
    misbehave(solved, "dp_skip.select_layers_plain", "budget = 7; return [][0]")
    misbehave(solved, "dp_skip.select_layers",
              "return Selection([0] * (budget + 1), [1.] * (budget + 1))")
    path = solved / "model.py"
    path.write_text(path.read_text() + "\nif True print(1)\n")
    said = outputs(graded(solved, "--problems", "3,4"))
    lines = (solved / "dp_skip.py").read_text().splitlines()
    line = 1 + next(i for i, line in enumerate(lines) if "[][0]" in line)
    states = "[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]"
    assert said["3.6"] == (
        "Your code raised IndexError: list index out of range, "
        f"at dp_skip.py, line {line}, in select_layers_plain(states = {states}, budget = 1)")
    could_not = r"The check could not use what your code returned \(TypeError: 'int' .*\), "
    assert re.match(could_not + r"at checks/problem3.py, line \d+: ", said["4.1"])
    assert "model.py does not load, SyntaxError in line" in said["4.7"]


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
    elsewhere = (r"bench|tools/|mistakes|solutions|export|golden\.py|train|\.pyc|\.git/|assignments"
                 r"|autograder|gradescope")
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
    solved = solve(out, tmp_path / "solved", problem)
    assert scores(graded(solved)) == {problem: FULL[problem]}
    code = """if True:
        from checkpoint import BUNDLED, load_model
        from speculative import autoregressive, clasp
        model = load_model(BUNDLED)
        assert list(clasp(model, [5, 6, 7], 8)) == list(autoregressive(model, [5, 6, 7], 8))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=solved).returncode == 0
    assert subprocess.run([sys.executable, "generate.py", "--max-new-tokens", "8", "--prompt", "A"],
                          cwd=solved, capture_output=True).returncode == 0


def solve(repo: Path, out: Path, problem: int) -> Path:
    """A copy with the functions of one problem written as in the reference."""
    shutil.copytree(repo, out)
    for name in PROBLEMS[problem].functions:
        module, function = name.split(".", 1)
        misbehave(out, name, body_of((ROOT / f"{module}.py").read_text(), function))
    return out


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
def test_the_exported_tests_pass_on_a_filled_in_export(exported, tmp_path):
    assert_tests_pass(fill_in(exported(), tmp_path / "solved"), tmp_path, ".")


@pytest.mark.thorough
def test_those_of_the_dp_and_the_page_pass_on_a_shorter_export(exported, tmp_path):
    solved = solve(exported((3,)), tmp_path / "solved", 3)
    assert_tests_pass(solved, tmp_path, "test_dp_skip.py", "test_trace.py")


@pytest.mark.thorough
def test_those_of_the_dp_and_the_page_pass_on_a_second_solution(exported, tmp_path):
    solved = solve(exported((4,)), tmp_path / "solved", 4)
    other = (HERE / "solutions" / "problem4.py").read_text()
    misbehave(solved, "dp_skip.select_layers",
              "import dp_skip\n" + body_of(other, "select_layers"))
    assert_tests_pass(solved, tmp_path, "test_dp_skip.py", "test_trace.py")


def assert_tests_pass(solved: Path, tmp_path: Path, *files: str):
    """These of the copy's own tests; and that it can write the page of a run."""
    names = {path.name for path in (solved / "tests").glob("*.py")}
    assert {"conftest.py", "test_dp_skip.py", "test_speculative.py", "test_model.py"} <= names
    assert not names & {"test_bench.py", "test_assignments.py", "test_cuda_graphs.py"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         *[f"tests/{file}" for file in files]],
        cwd=solved, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    page = tmp_path / "run.html"
    done = subprocess.run(
        [sys.executable, "generate.py", "--max-new-tokens", "20", "--skip-layers", "12",
         "--trace", page],
        cwd=solved, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and page.exists(), done.stderr


def names_wanted_of(module: str, paths) -> set[str]:
    trees = [ast.parse(path.read_text()) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == module for alias in node.names}


def test_what_stands_in_for_a_file_has_what_others_want_of_it(exported):
    cases = [
        (1, "packed", {"choose_form", "choose_threads", "pack"}),
        (6, "auto", {"Auto"}),
        (6, "lookup", {"Lookup", "MOST"}),
    ]
    for problem, module, names in cases:
        out = exported((problem,))
        stand_in = (out / "extras" / f"{module}.py").read_text()
        assert stand_in == (HERE / "stand_ins" / f"{module}.py").read_text()
        assert names_wanted_of(f"extras.{module}", [out / "generate.py"]) == names
        programs = [*out.glob("*.py"), *(out / "extras").glob("*.py")]
        for name in names_wanted_of(f"extras.{module}", programs):
            assert re.search(rf"^(def |class )?{name}\b", stand_in, re.MULTILINE), name
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


def test_the_report_comes_on_a_terminal_without_its_characters_too(solved):
    misbehave(solved, "dp_skip.walk_back", "raise ValueError('\\udcff é')")
    done = subprocess.run(
        [sys.executable, "grade.py", "--problems", "3"], cwd=solved, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr
    assert r"\u2717 3.2" in done.stdout and "Total: 12 of" in done.stdout


def test_the_seed_of_the_cases_that_are_handed_out_is_no_seed_for_marks(tmp_path):
    (tmp_path / "model.py").touch()
    done = subprocess.run([sys.executable, str(HERE / "grade.py"), str(tmp_path), "--seed", "0"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--seed must lie between 1" in done.stderr


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


# ---------------------------------------------------------------- handing in

@pytest.fixture(scope="session")
def autograder_source(tmp_path_factory):
    """What Gradescope unpacks."""
    out = tmp_path_factory.mktemp("autograder")
    autograder.write(out / "autograder.zip", autograder.files([3, 5]))
    with zipfile.ZipFile(out / "autograder.zip") as archive:
        archive.extractall(out / "source")
    return out / "source"


@pytest.fixture
def gradescope(autograder_source, tmp_path):
    """gradescope(): what its machine writes of the files in ``submission``."""
    (tmp_path / "source").symlink_to(autograder_source)
    (tmp_path / "submission").mkdir()

    def run(python=sys.executable):
        environment = os.environ | {"AUTOGRADER": str(tmp_path), "PYTHON": python, "SEED": "3"}
        subprocess.run(["bash", autograder_source / "run_autograder"], env=environment,
                       check=True, capture_output=True)
        return json.loads((tmp_path / "results" / "results.json").read_text())
    return run


def test_the_archive_has_no_more_than_it_needs_and_a_core_without_solutions(autograder_source):
    names = {path.name for path in autograder_source.iterdir()}
    assert names == {"assignments", "checkpoints", "model.py", "dp_skip.py", "speculative.py",
                     "checkpoint.py", "requirements.txt", "problems", "setup.sh", "run_autograder"}
    core = autograder_source / "assignments" / "checks" / "core"
    for number in (3, 5):
        for name in PROBLEMS[number].functions:
            module, function = name.split(".", 1)
            node = export.find(ast.parse((core / f"{module}.py").read_text()), function)
            assert taken.is_unwritten(node)


@pytest.mark.thorough
def test_what_is_handed_in_is_graded_by_gradescope(gradescope, tmp_path):
    folder = tmp_path / "submission" / "homework"              # packed with its folder
    folder.mkdir()
    shutil.copy(ROOT / "speculative.py", folder)
    results = gradescope()
    assert scores(results) == {3: 0, 5: FULL[5]}
    assert "there is no dp_skip.py" in results["output"]
    assert outputs(results)["3.1"] == "not taken: there is no dp_skip.py"


@pytest.mark.thorough
def test_where_all_is_missing_gradescope_gets_0_and_the_reason(gradescope):
    results = gradescope()
    assert results["score"] == 0
    for name in CORE:
        assert f"there is no {name}" in results["output"]


def test_where_the_grader_fails_gradescope_gets_0_and_the_reason(gradescope):
    results = gradescope(python="/no/such/python")
    assert results["score"] == 0
    assert "The grader itself failed" in results["output"]


@pytest.mark.parametrize("text", ["x = " + "(" * 500, "x = " + "1 + " * 5000 + "1", "\0", "\udcff"])
def test_a_file_that_python_cannot_take_is_said_to_be_so(tmp_path, text):
    path = tmp_path / "model.py"
    path.write_bytes(text.encode(errors="surrogateescape"))
    tree, trouble = taken.parsed(path)
    assert tree.body == []
    assert trouble.startswith("model.py does not load, ")


# ---------------------------------------------------------------- the leaderboard

@pytest.fixture
def short_leaderboard(monkeypatch):
    monkeypatch.setattr(leaderboard, "TOKENS", 8)
    monkeypatch.setattr(leaderboard, "ROUNDS", 1)


def an_entry(drafter=None, **settings):
    """What loads it."""
    return lambda: SimpleNamespace(SETTINGS=settings, DRAFTER=drafter)


def test_the_leaderboard_measures_the_settings(short_leaderboard):
    board = leaderboard.measure(ENTRY)
    assert re.match(r"speedup \d+\.\d\dx, tau \d", board["line"])
    assert board["values"]["tau"] >= 1


def test_the_leaderboard_measures_a_drafter_made_for_each_text(short_leaderboard):
    models = []

    def make(model):
        models.append(model)
        return speculative.Drafter()

    assert leaderboard.measure(an_entry(make))["values"]["tau"] == 1         # it never drafts
    assert len(models) == 2 * golden.TEXTS                     # to warm up, and timed
    assert len(set(map(id, models))) == 1


REMEMBERS = """
from speculative import Draft, Drafter
SETTINGS = {}
class Remembers(Drafter):
    texts = {}
    def begin(self, text, hidden):
        self.prompt = len(text.tokens)
        self.text = self.texts.setdefault(tuple(text.tokens), [])
    def propose(self, text, most):
        written = text.tokens[self.prompt:]
        self.text[:] = max(self.text, written, key=len)
        tokens = self.text[len(written):len(written) + most]
        return Draft(tokens, [None] * len(tokens))
def DRAFTER(model):
    return Remembers()
"""


def test_no_drafter_can_remember_a_text_from_one_round_to_the_next(short_leaderboard, tmp_path):
    path = tmp_path / "entry.py"
    path.write_text(REMEMBERS)
    board = leaderboard.measure(lambda: leaderboard.load_entry(path))
    assert board["values"]["tau"] == 1
    loaded = leaderboard.load_entry(path)
    assert leaderboard.measure(lambda: loaded)["values"]["tau"] > 2


def test_the_leaderboard_refuses_another_text(short_leaderboard, monkeypatch):
    def accept_all(drafted, logits):
        return len(drafted), int(logits[-1].argmax())

    monkeypatch.setattr("speculative.accept_greedy", accept_all)
    with pytest.raises(checks.PropertyError, match="whole model's own"):
        leaderboard.measure(an_entry())


def test_the_leaderboard_takes_the_documented_settings_and_no_others(short_leaderboard):
    with pytest.raises(leaderboard.EntryError, match="are some of skip_layers.+ got model"):
        leaderboard.measure(an_entry(model="another"))


@pytest.mark.parametrize("text, said", [
    (None, "there is no entry.py"),
    ("SETTINGS = {", "entry.py does not load, SyntaxError in line 1: "),
    ("x = 1\nreturn x", "entry.py does not load, SyntaxError in line 2: "),
    ("DRAFTER = None", "entry.py has no SETTINGS"),
    ("SETTINGS = {}", "entry.py has no DRAFTER"),
    ("SETTINGS = []\nDRAFTER = None", "SETTINGS in entry.py are a dict, .+ got a list"),
])
def test_what_is_no_entry_is_said_to_be_so_in_one_line(tmp_path, text, said):
    path = tmp_path / "entry.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(leaderboard.EntryError, match=said) as raised:
        leaderboard.measure(lambda: leaderboard.load_entry(path))
    assert "\n" not in str(raised.value)


def test_the_leaderboard_counts_by_itself(short_leaderboard):
    """What a drafter writes into the statistics is not looked at."""
    class Boasting(speculative.Drafter):
        def observe(self, text, outcome):
            text.stats.cycles = 1

    assert leaderboard.measure(an_entry(lambda model: Boasting()))["values"]["tau"] == 1


@pytest.mark.thorough
@pytest.mark.parametrize("text, said", [
    ("DRAFTER = None\nSETTINGS = {'top_p': 1}", "SETTINGS in entry.py are some of"),
    ("DRAFTER = None\nSETTINGS = {'skip_layers': 99}", "entry.py: the skipped layers must be"),
    ("DRAFTER = None\nSETTINGS = {'skip_layers': '16'}", "SETTINGS in entry.py are numbers"),
    ("DRAFTER = None\nSETTINGS = {'skip_layers': 16.0}", "whole ones but for exit_threshold"),
    ("raise SystemExit", "sys.exit, at entry.py, line 1"),
    ("1 / 0", "ZeroDivisionError: division by zero, at entry.py, line 1"),
    ("import os; os._exit(0)", "nothing measured"),
    ("import os; os.write(3, b'{}')", ""),
])
def test_a_leaderboard_that_cannot_be_says_why_and_costs_no_points(solved, text, said):
    (solved / "entry.py").write_text(text)
    results = for_marks(solved, (5,), "--leaderboard", seed=())
    assert results["score"] == FULL[5]
    assert said in results["output"]
    assert "leaderboard" not in results
