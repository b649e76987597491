"""Write a student's repository: this project with the bodies of the assigned functions taken out.

    python assignments/export.py OUT
    python assignments/export.py OUT --problems 3,4      a shorter assignment, the rest solved

What is taken out is the list in grade.py, cut from the core's own source: signature and docstring
stay. Helpers that nothing calls any more and the handout does not name were a part of the solution
and go too. What goes along is found as well: generate.py and what it imports, the tests that need
nothing else, the bundled checkpoint, the grader and the handout. Nothing else of the project does,
so neither bench/ nor tools/ nor history gives a solution away.

Read ``export`` first.
"""
import argparse
import ast
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from grade import PROBLEMS, numbers
from taken import CORE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS = ROOT / "tests"

# Only options of generate.py want these. cuda_graphs would give attention and problem 4 away;
# int8 is a form of packed.py's, which is not there.
KEPT_BACK = {"extras.cuda_graphs", "extras.int8"}

# Files that show how an assigned problem is solved, but which generate.py cannot do without: the
# problem that they give away, and what goes in their place. Decoding is right with it, and slower.
STAND_INS = {
    "extras.packed": (1, HERE / "stand_ins" / "packed.py"),
    "extras.attention": (1, HERE / "stand_ins" / "attention.py"),
    "extras.auto": (6, HERE / "stand_ins" / "auto.py"),
    "extras.lookup": (6, HERE / "stand_ins" / "lookup.py"),
}

# Problem 4 solved would give problem 3 away, being the same DP. (Not the reverse: it is meant to be
# derived from it.) While 3 is to be written and 4 is not assigned, the plain form does its work.
SLOW_SELECT = """
sets, cosines = select_layers_plain(layer, states, budget, measure)
return Selection(sets[smallest:], cosines[smallest:])
"""

# What of the tests stays behind, by file: a test that wants the fast form, a third writing of the
# DP, and who asks for the DP's tables, which are read from a DP that is written as ours. What calls
# them goes with them.
FAST_TEST = "test_fast_calls_each_layer_once_on_at_most_budget_rows"
WITHHELD = {
    "test_dp_skip.py": {"survivors"},
    "test_trace.py": {"table_path", "browse", "plain_in_its_place", "skipping_measured_first"},
}

# Tests of programs, which they run and do not import; and of how our own code is laid out.
TESTS_OF_OURS = ("test_tools", "test_structure")

IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")
IGNORED_PROGRAMS = shutil.ignore_patterns("__pycache__", "*.py")       # such as train.py


class ExportError(Exception):
    """The list in grade.py, the core's source and its tests do not fit together."""


class Stripped(NamedTuple):
    """An assignment as it is handed out, but for the files that are copied."""
    sources: dict[str, str]   # by module
    tests: dict[str, str]     # by file
    handout: str


def export(out: Path, problems: list[int]):
    """Write the student's repository into ``out``, a new or empty folder.

    Raises ExportError before anything is written.
    """
    modules = exported_modules()
    sources, tests, text = stripped(problems)
    for name, source in sources.items():
        write(out / modules[name].relative_to(ROOT), source)
    for name, source in tests.items():
        write(out / "tests" / name, source)
    shutil.copytree(TESTS / "golden", out / "tests" / "golden", ignore=IGNORED_PROGRAMS)
    shutil.copytree(ROOT / "checkpoints", out / "checkpoints", ignore=IGNORED_PROGRAMS)
    shutil.copytree(HERE / "checks", out / "checks", ignore=IGNORED)
    for name in CORE:                                  # what the grader puts the functions into
        write(out / "checks" / "core" / f"{name}.py", sources[name])
    for name in KEPT_BACK:
        place = project_modules()[name].relative_to(ROOT)
        shutil.copy(HERE / "stand_ins" / "kept_back.py", out / place)
    for name in ("LICENSE", "requirements.txt", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, out)
    for name in ("trace.html", "trace.css"):                             # trace.py's page
        shutil.copy(ROOT / "extras" / name, out / "extras")
    for name in ("grade.py", "child.py", "taken.py", "leaderboard.py", "entry.py"):
        shutil.copy(HERE / name, out)
    write(out / "README.md", text)
    write(out / "assignment.json", json.dumps({"problems": problems}) + "\n")


def stripped(problems: list[int]) -> Stripped:
    """Modules without what is assigned, the tests that go along, and the handout."""
    modules = exported_modules()
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules.items()}
    for module, bodies in new_bodies(problems).items():
        if module not in sources:
            raise ExportError(f"{module} is not among the exported modules")
        sources[module] = replace_bodies(sources[module], bodies)
    for module, path in stand_ins(problems).items():
        if module not in sources:
            raise ExportError(f"{module} is not among the exported modules")
        sources[module] = path.read_text(encoding="utf-8")
    text = handout(problems)
    tests = exported_tests(modules.keys() - stand_ins(problems).keys(), problems)
    return Stripped(without_helpers(sources, tests.values(), text), tests, text)


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------- what is taken out

def new_bodies(problems: list[int]) -> dict[str, dict[str, str]]:
    """For each module, the functions that get another body and what that is."""
    bodies = {}
    for problem in problems:
        for name in PROBLEMS[problem].functions:
            module, function = name.split(".", 1)
            statement = f'raise NotImplementedError("{name}, problem {problem}")'
            bodies.setdefault(module, {})[function] = statement
    if is_select_slow(problems):
        bodies["dp_skip"]["select_layers"] = SLOW_SELECT
    return bodies


def is_select_slow(problems: list[int]) -> bool:
    return 3 in problems and 4 not in problems


def stand_ins(problems: list[int]) -> dict[str, Path]:
    """The modules that get another file, and which."""
    return {module: path for module, (problem, path) in STAND_INS.items() if problem in problems}


def replace_bodies(source: str, bodies: dict[str, str]) -> str:
    """Module source with the functions' bodies replaced; docstrings and all else stay."""
    tree = ast.parse(source)
    lines = source.splitlines()
    functions = [(find(tree, name), body) for name, body in bodies.items()]
    last_first = sorted(functions, key=lambda pair: -pair[0].lineno)
    for node, body in last_first:
        start = body_start(node, lines)
        indent = " " * node.body[0].col_offset
        lines[start:node.end_lineno] = textwrap.indent(body.strip(), indent).splitlines()
    return "\n".join(lines) + "\n"


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """A function by its dotted name inside a module. Raises ExportError."""
    node = tree
    for part in name.split("."):
        definitions = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found = [n for n in definitions if n.name == part]
        if len(found) != 1:
            raise ExportError(f"{name}: found {len(found)} times")
        node = found[0]
    if not isinstance(node, ast.FunctionDef):
        raise ExportError(f"{name} is not a function")
    return node


def body_start(node: ast.FunctionDef, lines: list[str]) -> int:
    """How many lines come before what is to be replaced: signature and docstring stay."""
    has_docstring = ast.get_docstring(node, clean=False) is not None
    if has_docstring and len(node.body) > 1:
        return node.body[0].end_lineno
    parts = [part for part in ast.walk(node.args) if hasattr(part, "end_lineno")]
    if node.returns:
        parts.append(node.returns)
    end = max([node.lineno, *[part.end_lineno for part in parts]])
    while end < node.body[0].lineno and not is_header_end(lines[end - 1]):
        end += 1                                       # ") -> Tensor:" on a line of its own
    if node.body[0].lineno <= end:
        raise ExportError(f"{node.name}: its body must begin on a line of its own")
    return end


def is_header_end(line: str) -> bool:
    return line.split("#")[0].rstrip().endswith(":")


def without_helpers(
    sources: dict[str, str], users: Iterable[str], text: str
) -> dict[str, str]:
    """Modules without the functions that nobody names.

    Neither the modules, nor ``users`` (other sources), nor the handout's text.
    """
    sources = dict(sources)
    by_others = set(re.findall(r"\w+", text))
    for source in users:
        by_others |= names_in(source)
    while True:
        named = by_others.union(*[names_in(source) for source in sources.values()])
        unused = {module: functions_of(source) - named for module, source in sources.items()}
        if not any(unused.values()):
            return sources
        for module, names in unused.items():
            sources[module] = without(sources[module], names)


def functions_of(source: str) -> set[str]:
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def names_in(source: str) -> set[str]:
    """What a module's code names; comments and docstrings do not count, nor does a definition."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
    return names


def without(source: str, names: Iterable[str]) -> str:
    """Module source without some of its functions, and the blank lines after them."""
    for name in sorted(names):
        node = find(ast.parse(source), name)
        lines = source.splitlines(keepends=True)
        start = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
        end = node.end_lineno
        while end < len(lines) and not lines[end].strip():
            end += 1
        source = "".join(lines[:start - 1] + lines[end:])
    return source.rstrip("\n") + "\n"


# ---------------------------------------------------------------------------- what goes along

def exported_modules() -> dict[str, Path]:
    """generate.py and the modules of this project that it imports, directly or not."""
    known = project_modules()
    found = {}
    wanted = {"generate"}
    while wanted:
        name = wanted.pop()
        found[name] = known[name]
        imported = imports(known[name].read_text(encoding="utf-8"))
        wanted |= imported & known.keys() - found.keys() - KEPT_BACK
    return found


def project_modules() -> dict[str, Path]:
    """The core's and the extras', by the names under which they are imported."""
    modules = {path.stem: path for path in ROOT.glob("*.py")}
    for path in (ROOT / "extras").glob("*.py"):
        name = "extras" if path.stem == "__init__" else f"extras.{path.stem}"
        modules[name] = path
    return modules


def imports(source: str) -> set[str]:
    """Dotted names of what a source imports: for ``from a.b import c``, a, a.b and a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    packages = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
    return names | packages


def exported_tests(modules: Iterable[str], problems: list[int]) -> dict[str, str]:
    """Files of tests/ that import nothing of the project but these modules, and each other."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(TESTS.glob("*.py"))}
    elsewhere = project_modules().keys() - set(modules)
    elsewhere |= {path.name for path in ROOT.iterdir() if path.is_dir()} - {"extras"}
    for folder in (ROOT / "tools", HERE, *(ROOT / "checkpoints").iterdir()):
        elsewhere |= {path.stem for path in folder.glob("*.py")}
    for name in TESTS_OF_OURS:
        del sources[name]
    while True:
        left_out = [name for name, source in sources.items() if imports(source) & elsewhere]
        if not left_out:
            break
        for name in left_out:
            del sources[name]
            elsewhere.add(name)
    tests = {f"{name}.py": source for name, source in sources.items()}
    withheld = withheld_names(problems)
    for name in tests.keys() & withheld.keys():
        tests[name] = without(tests[name], withheld_tests(tests[name], withheld[name]))
    return tests


def withheld_names(problems: list[int]) -> dict[str, set[str]]:
    """By test file, what would give an assigned problem away, or needs it written as ours is."""
    names = WITHHELD if 3 in problems or 4 in problems else {}
    if is_select_slow(problems):
        names = names | {"test_dp_skip.py": names["test_dp_skip.py"] | {FAST_TEST}}
    return names


def withheld_tests(source: str, withheld: set[str]) -> set[str]:
    """These functions of a test file, and those that call them."""
    callers = {name for name in functions_of(source)
               if names_in(ast.unparse(find(ast.parse(source), name))) & withheld}
    return withheld | callers


def handout(problems: list[int]) -> str:
    """The handout, without the sections of problems that are not assigned."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for problem in PROBLEMS.keys() - set(problems):
        section = rf"## Problem {problem}\b.*?(?=\n## )\n"
        text, found = re.subn(section, "", text, flags=re.DOTALL)
        if found != 1:
            raise ExportError(f"the handout has {found} sections on problem {problem}")
    if len(problems) < len(PROBLEMS):
        chosen = ", ".join(map(str, problems))
        noun = "problem" if len(problems) == 1 else "problems"
        note = f"**This copy assigns {noun} {chosen}; the others are solved.**"
        text = text.replace("\n## ", f"\n{note}\n\n## ", 1)
    return text


# ---------------------------------------------------------------------------- running

def new_parser(description: str, out: str) -> argparse.ArgumentParser:
    """For what is to be written of some problems. out: what that argument is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help=out)
    parser.add_argument("--problems", type=numbers, default=list(PROBLEMS), metavar="N,N",
                        help="default: all six")
    return parser


def main() -> int:
    parser = new_parser("Write a student's repository.",
                        "a folder that does not exist yet, or is empty")
    args = parser.parse_args()
    out = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} exists and is not an empty folder")
    try:
        export(out, args.problems)
    except ExportError as error:
        print(f"export.py: {error}: grade.py's list of problems and the source have drifted apart",
              file=sys.stderr)
        return 2
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)         # it was empty
        print(f"export.py: cannot write {out}: {error}", file=sys.stderr)
        return 2
    count = sum(len(PROBLEMS[problem].functions) for problem in args.problems)
    print(f"{out}: {count} functions to write in {len(args.problems)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
