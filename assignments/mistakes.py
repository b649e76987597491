"""What the grader is tested with: a second solution of every problem, and mistakes in it.

    python assignments/mistakes.py         the table: mistake, problem, what the grader says

The solutions and their mistakes are in solutions/. Exit status 1 if one is not found in its own
problem, or is found elsewhere.
"""
import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from checks import CHECKS, PropertyError, problem5
from checks.common import watched
from child import explain
from grade import PROBLEMS, Result
from solutions import SOLUTIONS
from solutions.common import FOLDER

FEW_DRAWS = 50                # of problem 5, where the sampling rule is not what is broken
MISTAKES = [(name, title) for name in SOLUTIONS for title in SOLUTIONS[name].mistakes]


@contextlib.contextmanager
def planted(chosen: dict[str, str]):
    """Put solutions in the core functions' places: {function: title of a mistake, or ""}."""
    functions = {}
    for name, title in chosen.items():
        solution = SOLUTIONS[name]
        functions[name] = watched(solution.broken(title) if title else solution.function)
    with exchanged(functions):
        yield


@contextlib.contextmanager
def exchanged(functions: dict[str, Callable]):
    """Put functions in the core's places."""
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch(name, function))
            if name == "model.attention":              # a layer has another name for it
                attend = staticmethod(function)
                stack.enter_context(mock.patch("model.DecoderLayer.attend", attend))
        yield


def problem_of(name: str) -> int:
    return next(number for number, problem in PROBLEMS.items() if name in problem.functions)


def run(chosen: dict[str, str], problems: Iterable[int] = PROBLEMS) -> list[Result]:
    """Every check of these problems, in this process, on the core with these functions exchanged.
    """
    draws = problem5.DRAWS if "speculative.accept_sampled" in chosen else FEW_DRAWS
    results = []
    with planted(chosen), mock.patch.object(problem5, "DRAWS", draws), torch.inference_mode():
        for number in problems:
            for check in CHECKS[number]:
                message = message_of(check)
                passed = not message
                results.append(Result(check.number, check.title, check.points, passed, message))
    return results


def message_of(check) -> str:
    try:
        check.run()
    except PropertyError as error:
        return str(error)
    except Exception as error:
        outside = error.__traceback__.tb_next                  # without this frame
        return explain(error.with_traceback(outside), str(FOLDER))
    return ""


def row(*cells: str) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    found = 0
    print(row("mistake", "in", "loses", "says"))
    print("|---|---|---|---|")
    for name, title in MISTAKES:
        failed = [result for result in run({name: title}) if not result.passed]
        problems = {result.number[0] for result in failed}
        found += problems == {str(problem_of(name))}
        loses = ", ".join(result.number for result in failed) or "-"
        says = failed[0].message if failed else "nothing: not found"
        print(row(title, f"`{name}`", loses, says), flush=True)
    print(f"\n{found} of {len(MISTAKES)} found in the problem where they are, and nowhere else")
    return int(found < len(MISTAKES))


if __name__ == "__main__":
    sys.exit(main())
