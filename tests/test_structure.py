"""The house: who may import whom, and how long a function of the core may be."""
import ast

import pytest
from conftest import ROOT

CORE = ["model", "dp_skip", "speculative", "checkpoint", "generate"]
OUTSIDE = {"extras", "bench", "tools", "assignments"}
MAY_IMPORT = {
    "model": set(),
    "dp_skip": set(),
    "speculative": {"dp_skip", "model"},
    "checkpoint": {"model"},
    "generate": {"model", "speculative", "checkpoint", "extras"},
}
LONGEST_FUNCTION = 45
LONGEST_LOOP = 30


def parsed(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path) -> set[str]:
    """The first part of every module's name that a file imports."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def functions(path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]


def lines(node) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("module", CORE)
def test_imports_of_the_core_run_one_way(module):
    of_this_project = imported(ROOT / f"{module}.py") & (OUTSIDE | set(CORE))
    assert of_this_project <= MAY_IMPORT[module]


def test_extras_need_the_core_alone():
    for path in (ROOT / "extras").glob("*.py"):
        assert not imported(path) & (OUTSIDE - {"extras"} | {"generate", "checkpoint"}), path.name


def test_the_dp_knows_tensors_and_nothing_of_this_project():
    assert imported(ROOT / "dp_skip.py") == {"collections", "typing", "torch"}


@pytest.mark.parametrize("module", CORE)
def test_a_function_of_the_core_fits_a_screen(module):
    for function in functions(ROOT / f"{module}.py"):
        assert lines(function) <= LONGEST_FUNCTION, function.name


def test_the_loop_fits_thirty_lines_and_branches_on_no_drafter():
    loop = next(f for f in functions(ROOT / "speculative.py") if f.name == "decode")
    body = loop.body[1:]                                   # without the docstring
    assert body[-1].end_lineno - body[0].lineno + 1 <= LONGEST_LOOP
    conditions = [ast.unparse(node.test) for node in ast.walk(loop) if isinstance(node, ast.If)]
    assert conditions == ["text.is_finished"]
