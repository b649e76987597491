"""Write a student's repository: this project with the bodies of the assigned functions taken out.

    python assignments/export.py OUT
    python assignments/export.py OUT --problems 3,4      a shorter assignment, the rest solved

What is taken out is the list in grade.py, cut from the core's own source: signature and docstring stay. Helpers that
nothing calls any more and the handout does not name were a part of the solution and go too. What goes along is found as
well: generate.py and what it imports, the tests that need nothing else, the bundled checkpoint, the grader and the
handout. Nothing else of the project does, so neither bench.py nor tools/ nor history gives a solution away.
"""
import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from grade import PROBLEMS, numbers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# Problem 4 solved would give problem 3 away, being the same programme (not the reverse: it is meant to be derived from it).
# So while 3 is to be written and 4 is not assigned, the plain form stands in, and tests that want the fast one go.
TESTS = "test_dp_skip.py"
FAST_TESTS = ["test_fast_calls_each_layer_once_on_at_most_budget_rows"]

# What the core does past the paper the handout does not ask for: its functions may be written without it, and then its tests do not
# go along. They are found by these names in the bodies taken out. (Those on costs would also give the programme away.)
PAST_THE_PAPER = {"auto", "costs", "parts"}
PAST_TESTS = "test_auto.py"
COST_TESTS = ["survivors_by_sum", "test_costs_that_differ", "test_costs_must_be_one_a_layer_and_at_least_1"]
PACKED_TESTS = "test_packed.py"

# A file that gives problem 1 away by a faster way of writing it; decoding is right without it, and generate.py wants its name.
SLOW_PACKED = '''"""The project's own file makes products of few rows faster, and shows how a norm is written: this one changes nothing."""


def pack(model):
    return model
'''


class Missing(Exception):
    """The list in grade.py and the core's source do not fit together."""


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """A function by its dotted name inside a module. Raises Missing."""
    node = tree
    for part in name.split("."):
        inside = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if len(inside) != 1:
            raise Missing(f"{name}: found {len(inside)} times")
        node = inside[0]
    if not isinstance(node, ast.FunctionDef):
        raise Missing(f"{name} is not a function")
    return node


def replace_bodies(source: str, bodies: dict[str, str]) -> str:
    """Module source with the functions' bodies replaced by one statement each; docstrings and all else stay."""
    tree, lines = ast.parse(source), source.splitlines()
    functions = [(find(tree, name), statement) for name, statement in bodies.items()]
    for node, statement in sorted(functions, key=lambda pair: -pair[0].lineno):
        first = node.body[1] if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1 else node.body[0]
        start = node.body[0].end_lineno if first is not node.body[0] else header_end(node, lines)
        lines[start:node.end_lineno] = [" " * node.body[0].col_offset + statement]
    return "\n".join(lines) + "\n"


def header_end(node: ast.FunctionDef, lines: list[str]) -> int:
    """The line on which a signature ends, for a function without a docstring."""
    end = max([node.lineno] + [n.end_lineno for n in ast.walk(node.args) if hasattr(n, "end_lineno")]
              + ([node.returns.end_lineno] if node.returns else []))
    if node.body[0].lineno <= end or not lines[end - 1].split("#")[0].rstrip().endswith(":"):
        raise Missing(f"{node.name}: its body must begin on a line of its own, right after the signature")
    return end


def without(source: str, names: Iterable[str]) -> str:
    """Module source without some of its functions, and the blank lines after them."""
    for name in names:
        node, lines = find(ast.parse(source), name), source.splitlines(keepends=True)
        start = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
        source = "".join(lines[:start] + lines[node.end_lineno + 2:])
    return source


def without_helpers(sources: dict[str, str], users: Iterable[str], text: str) -> dict[str, str]:
    """Modules without the functions that neither they nor other sources, ``users``, nor the handout's text name."""
    while True:
        named = set(re.findall(r"\w+", text)).union(*map(names_in, [*sources.values(), *users]))
        gone = {module: [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name not in named]
                for module, source in sources.items()}
        if not any(gone.values()):
            return sources
        sources = {module: without(source, gone[module]) for module, source in sources.items()}


def names_in(source: str) -> set[str]:
    """What a module's code names; comments and docstrings do not count, nor does a definition."""
    return {name for node in ast.walk(ast.parse(source)) for field in ("id", "attr", "name")
            if isinstance(name := getattr(node, field, None), str) and not isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def modules() -> list[str]:
    """generate.py and the files of this project that it imports, directly or not.

    cuda_graphs.py stays away: it would give attention and problem 4 away, and nothing but its flag wants it.
    """
    found, wanted = [], ["generate"]
    while wanted:
        name = wanted.pop()
        if name not in [*found, "cuda_graphs"] and (ROOT / f"{name}.py").exists():
            found.append(name)
            wanted += imports((ROOT / f"{name}.py").read_text())
    return sorted(found)


def past_the_paper(changed: dict[str, dict[str, str]]) -> set[str]:
    """Which of PAST_THE_PAPER the functions that get another body have to do with."""
    trees = {module: ast.parse((ROOT / f"{module}.py").read_text()) for module in changed}
    return PAST_THE_PAPER & {name for module, functions in changed.items() for function in functions
                             for name in names_in(ast.unparse(find(trees[module], function).body))}


def tests(exported: list[str]) -> list[Path]:
    """The test files that import nothing of the project but what is exported."""
    elsewhere = {path.stem for folder in (ROOT, ROOT / "tools", HERE) for path in folder.glob("*.py")} - set(exported)
    return [path for path in sorted((ROOT / "tests").glob("*.py")) if not imports(path.read_text()) & elsewhere]


def handout(problems: list[int]) -> str:
    """The handout, without the sections of problems that are not assigned."""
    text = (HERE / "README.md").read_text()
    for problem in set(PROBLEMS) - set(problems):
        text, found = re.subn(rf"## Problem {problem}\b.*?(?=\n## )\n", "", text, flags=re.DOTALL)
        if found != 1:
            raise Missing(f"the handout has {found} sections on problem {problem}")
    if len(problems) < len(PROBLEMS):
        chosen = ", ".join(map(str, problems))
        text = text.replace("\n## ", f"\n**This copy assigns problem{'s' * (len(problems) > 1)} {chosen}; the others are solved.**\n\n## ", 1)
    return text


def bodies(problems: list[int]) -> dict[str, dict[str, str]]:
    """For each module, the functions that get another body and what that is."""
    out = {}
    for problem in problems:
        for name in PROBLEMS[problem].functions:
            module, function = name.split(".", 1)
            out.setdefault(module, {})[function] = f'raise NotImplementedError("{name}, problem {problem}")'
    if needs_stand_in(problems):
        out["dp_skip"]["select_layers"] = stand_in((ROOT / "dp_skip.py").read_text())
    return out


def stand_in(source: str) -> str:
    """A body for select_layers: the plain form's result, given the arguments that both forms have."""
    fast, plain = ([argument.arg for argument in find(ast.parse(source), name).args.args] for name in ("select_layers", "select_layers_plain"))
    handed_on = ", ".join(f"{name}={name}" for name in fast if name in plain)
    return f"return Selection(*(every_budget[smallest:] for every_budget in select_layers_plain({handed_on})))"


def needs_stand_in(problems: list[int]) -> bool:
    return 3 in problems and 4 not in problems


def export(out: Path, problems: list[int]):
    """Write the student's repository into ``out``, a new or empty folder. Raises Missing before anything is written."""
    exported, changed = modules(), bodies(problems)
    sources = {name: (ROOT / f"{name}.py").read_text() for name in exported}
    for module, functions in changed.items():
        if module not in sources:
            raise Missing(f"{module}.py is not among the exported files")
        sources[module] = replace_bodies(sources[module], functions)
    if 1 in problems:
        find(ast.parse(sources.get("packed", "")), "pack")
        sources["packed"] = SLOW_PACKED
    past = past_the_paper(changed)
    left = [PAST_TESTS] * bool(past) + [PACKED_TESTS] * (1 in problems)          # tests that do not go along
    text, checked = handout(problems), {path: path.read_text() for path in tests(exported) if path.name not in left}
    sources = without_helpers(sources, checked.values(), text)
    withheld = FAST_TESTS * needs_stand_in(problems) + COST_TESTS * ("costs" in past)

    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "train.py", "make.py")
    (out / "tests").mkdir(parents=True)
    for name, source in sources.items():
        (out / f"{name}.py").write_text(source)
    for path, source in checked.items():
        (out / "tests" / path.name).write_text(without(source, withheld) if path.name == TESTS else source)
    shutil.copytree(ROOT / "tests" / "golden", out / "tests" / "golden", ignore=ignore)
    shutil.copytree(ROOT / "checkpoints", out / "checkpoints", ignore=ignore)
    shutil.copytree(HERE / "checks", out / "checks", ignore=ignore)
    for path in (ROOT / "LICENSE", ROOT / "requirements.txt", ROOT / ".gitignore", HERE / "grade.py", HERE / "leaderboard.py",
                 HERE / "entry.py"):
        shutil.copy(path, out)
    (out / "README.md").write_text(text)
    (out / "assignment.json").write_text(json.dumps({"problems": problems}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a student's repository.")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--problems", type=numbers, default=list(PROBLEMS), metavar="N,N", help="default: all six")
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not an empty folder")
    try:
        export(args.out, args.problems)
    except Missing as error:
        print(f"export.py: {error}: grade.py's list of problems and the source have drifted apart", file=sys.stderr)
        return 2
    except OSError as error:
        shutil.rmtree(args.out, ignore_errors=True)                     # it was empty
        print(f"export.py: cannot write {args.out}: {error}", file=sys.stderr)
        return 2
    count = sum(len(PROBLEMS[problem].functions) for problem in args.problems)
    print(f"{args.out}: {count} functions to write in {len(args.problems)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
