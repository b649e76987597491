"""Grade a solution: points for each problem and, for what is wrong, the property that broke.

    python grade.py                      every assigned problem
    python grade.py --problems 3,4       only these
    python grade.py --json               Gradescope's results.json, on standard output
    python grade.py --leaderboard        also measure entry.py on the bundled model
    python grade.py FOLDER               grade another folder by this copy of the checks

Each problem runs in a process of its own with limits on time, memory and file size. So code that
hangs, crashes or exits loses that problem and no other. The process reports to a file that the
student's code is not told of: what it prints counts for nothing. That guards against accidents; it
is no sandbox for hostile code. For marks that matter, run your own copy of this file and of
``checks/`` over the student's folder, in a container.
"""
import argparse
import faulthandler
import json
import linecache
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NamedTuple

try:
    import resource
except ImportError:                                    # Windows: the time limit remains
    resource = None

HERE = Path(__file__).resolve().parent
SECONDS = 13                  # for a problem, at least: the reference takes 2 to 4
TOTAL_SECONDS = 82            # for all six; what one leaves unused may be taken by those after it
LEADERBOARD_SECONDS = 120
MEMORY = 3 << 30              # bytes beyond what Python and torch have mapped before any solution
FILE_SIZE = 64 << 20          # bytes that a solution may write into one file
SHOWN = 80                    # characters of an argument in a message


class Problem(NamedTuple):
    title: str
    functions: list[str]      # to be written by the student: module.function, module.Class.method


# The one list of what is assigned: export.py removes these bodies.
PROBLEMS = {
    1: Problem("RMSNorm, RoPE and cached grouped-query attention", [
        "model.RMSNorm.forward",
        "model.rope_table",
        "model.rotate",
        "model.KVCache.put",
        "model.attention",
        "model.DecoderLayer.attention_block",
        "model.DecoderLayer.mlp_block",
    ]),
    2: Problem("A decoder that skips layers", [
        "model.Llama.forward",
        "model.Llama.logits",
        "model.causal_mask",
    ]),
    3: Problem("The DP, cell by cell", [
        "dp_skip.distances",
        "dp_skip.walk_back",
        "dp_skip.select_layers_plain",
    ]),
    4: Problem("The DP, sequence-parallel", [
        "dp_skip.select_layers",
        "model.Llama.candidate_layer",
    ]),
    5: Problem("Acceptance", [
        "speculative.accept_greedy",
        "speculative.accept_sampled",
    ]),
    6: Problem("The loop and the drafter", [
        "speculative.draft_by_skipping",
        "speculative.checked_draft",
        "speculative.decode",
        "speculative.SkippingDrafter.propose",
        "speculative.Clasp.begin",
        "speculative.Clasp.observe",
        "speculative.Clasp.choose_layers",
    ]),
}


class Result(NamedTuple):
    number: str               # "3.2": problem and check
    title: str
    points: int
    passed: bool
    message: str              # empty if passed


# ---------------------------------------------------------------------------- in the child

def limit(cpu_seconds: int):
    """Bound this process. What a platform does not know is left out: the parent's clock remains."""
    if resource is None:
        return
    bounds = {"RLIMIT_CPU": cpu_seconds + 5, "RLIMIT_FSIZE": FILE_SIZE, "RLIMIT_CORE": 0}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        bounds["RLIMIT_AS"] = pages * resource.getpagesize() + MEMORY
    for name, bound in bounds.items():
        try:
            resource.setrlimit(getattr(resource, name), (bound, bound))
        except (AttributeError, ValueError, OSError):
            pass


def explain(error: BaseException, repo: str) -> str:
    """What went wrong other than by a check's word: a sentence with its place in the solution."""
    stack = list(traceback.walk_tb(error.__traceback__))
    inside = [place for place in stack if in_solution(place[0].f_code.co_filename, repo)]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and inside:
        return f"not written yet: {said or inside[-1][0].f_code.co_name}"
    if isinstance(error, SyntaxError):
        file = Path(error.filename or "?").name
        return f"{file} does not load, SyntaxError in line {error.lineno}: {error.msg}"
    if not inside:
        return could_not_use(error, said, stack)
    frame, line = inside[-1]
    at = f", at {Path(frame.f_code.co_filename).name}, line {line}{given(inside[0][0])}"
    if isinstance(error, MemoryError) or "allocate memory" in said:
        return f"Your code asked for more than the {MEMORY >> 30} GiB of memory allowed here{at}"
    if isinstance(error, SystemExit):
        return f"Your code called sys.exit{at}"
    if isinstance(error, RecursionError):
        return f"Your code calls itself without end{at}"
    name = type(error).__name__
    return f"Your code raised {name}: {said}{at}" if said else f"Your code raised {name}{at}"


def in_solution(path: str, repo: str | Path) -> bool:
    """Is this file the student's? In a student's repository the grader's own lie beside them."""
    grader = (HERE / "grade.py", HERE / "leaderboard.py")
    return Path(path).parent == Path(repo) and Path(path) not in grader


def could_not_use(error: BaseException, said: str, stack: list[tuple[FrameType, int]]) -> str:
    """It failed in the check, on what the solution returned."""
    places = [(Path(frame.f_code.co_filename), line) for frame, line in stack]
    path, line = [place for place in places if place[0].parent in (HERE / "checks", HERE)][-1]
    code = linecache.getline(str(path), line).strip()
    return (f"The check could not use what your code returned ({type(error).__name__}: {said}), at "
            f"{path.relative_to(HERE)}, line {line}: {code}")


def given(frame: FrameType) -> str:
    """The arguments of the student's function that the check called: the example that failed."""
    code = frame.f_code
    if code.co_name == "<module>":
        return ""
    shown = []
    for name in code.co_varnames[:code.co_argcount]:
        value = frame.f_locals.get(name)
        is_tensor = hasattr(value, "shape")
        if is_tensor or isinstance(value, int | float | list | tuple | set | frozenset):
            shown.append(f"{name} = {shortened(value)}")
    return f", in {code.co_name}({', '.join(shown)})"


def shortened(value) -> str:
    from checks.common import show
    text = show(value)
    if len(text) <= SHOWN:
        return text
    if hasattr(value, "shape"):
        return f"shape {tuple(value.shape)}"
    return f"{text[:SHOWN]} ..."


def child():
    """Run the checks of one problem; a line of JSON for the start and the end of each."""
    job = json.load(sys.stdin)
    faults = open(job["faults"], "w")                  # where the code is when it crashes ...
    faulthandler.enable(faults)
    faulthandler.dump_traceback_later(job["seconds"] - 0.5, file=faults)   # ... or time is up
    import checks
    import leaderboard
    import torch

    # So far all modules are the grader's own, whatever the solution's folder holds.
    torch.set_num_threads(1)                           # models are small: threads would only wait
    results = open(job["results"], "w")
    limit(job["seconds"])
    sys.path.insert(0, job["repo"])
    sys.dont_write_bytecode = True

    def say(**line):
        results.write(json.dumps({"key": job["key"], **line}) + "\n")
        results.flush()

    if job["problem"] == 0:
        try:
            say(number="0.1", passed=True, message=leaderboard.measure())
        except checks.PropertyError as error:
            say(number="0.1", passed=False, message=str(error))
        except BaseException as error:
            say(number="0.1", passed=False, message=explain(error, job["repo"]))
        return
    for check in checks.CHECKS[job["problem"]]:
        say(number=check.number)
        message = ""
        try:
            with torch.inference_mode():
                check.run()
        except checks.PropertyError as error:
            message = str(error)
        except BaseException as error:                 # sys.exit and KeyboardInterrupt too
            message = explain(error, job["repo"])
        say(number=check.number, passed=not message, message=message)


# ---------------------------------------------------------------------------- in the parent

def run_child(problem: int, repo: Path, seconds: int) -> tuple[dict[str, dict], str]:
    """The lines a child wrote, the last for each check, and how it ended if not well."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "problem": problem,
            "repo": str(repo),
            "seconds": seconds,
            "key": secrets.token_hex(),
            "results": str(Path(folder, "results")),
            "faults": str(Path(folder, "faults")),
        }
        how = wait_for_child(job)
        lines = read_lines(Path(job["results"]), job["key"])
        return lines, how + place_of_fault(Path(job["faults"]), repo)


def wait_for_child(job: dict) -> str:
    """Start it, wait, and say how it ended."""
    how = "ended the whole process"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "grade.py"), "--child"],
        cwd=job["repo"], env=environment, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.communicate(json.dumps(job), timeout=job["seconds"])
        if process.returncode < 0:
            how = f"was killed by {signal.Signals(-process.returncode).name}"
    except subprocess.TimeoutExpired:
        how = f"did not come to an end within {job['seconds']} s"
    finally:
        end(process)
    return how


def end(process: subprocess.Popen):
    """With whatever processes it may have started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    process.kill()
    process.wait()


def read_lines(path: Path, key: str) -> dict[str, dict]:
    """The last line for each check, of those that carry the key."""
    lines = {}
    if not path.exists():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if line.pop("key") == key:
                lines[line["number"]] = line
        except (ValueError, TypeError, KeyError, AttributeError):
            pass                                       # not ours
    return lines


def place_of_fault(path: Path, repo: Path) -> str:
    """Where the solution was when it crashed or time was up, if faulthandler could tell."""
    if not path.exists():
        return ""
    text = path.read_text(errors="replace")
    for file, line in re.findall(r'File "(.+)", line (\d+) in', text):     # innermost first
        if in_solution(file, repo):
            return f", at {Path(file).name}, line {line}"
    return ""


def grade_all(problems: list[int], repo: Path) -> list[Result]:
    """The problems one after the other, within the limits on time."""
    import checks  # noqa: F401            torch's slow first import is the machine's time
    results = []
    end_of_all = time.monotonic() + TOTAL_SECONDS
    for i, problem in enumerate(problems):
        to_come = len(problems) - i
        spare = end_of_all - time.monotonic() - SECONDS * to_come
        extra = round(min(max(spare, 0), SECONDS))
        results += grade(problem, repo, SECONDS + extra)
    return results


def grade(problem: int, repo: Path, seconds: int) -> list[Result]:
    """Every check of a problem: the child's word where it gave one, else what became of it."""
    from checks import CHECKS
    lines, how = run_child(problem, repo, seconds)
    results = []
    fatal = None
    for check in CHECKS[problem]:
        line = lines.get(check.number, {})
        message = line.get("message") or ""
        if "passed" not in line and fatal is None:
            fatal = check.number
            message = f"In this check your code {how}"
        elif "passed" not in line:
            message = f"not reached: see check {fatal}"
        passed = line.get("passed") is True
        results.append(Result(check.number, check.title, check.points, passed, message))
    return results


# ---------------------------------------------------------------------------- printing

def as_gradescope(results: list[Result], seconds: float, board: dict | None) -> dict:
    """The results.json that Gradescope's autograder reads."""
    tests = []
    for result in results:
        tests.append({
            "number": result.number,
            "name": f"{result.number} {result.title}",
            "score": result.points if result.passed else 0,
            "max_score": result.points,
            "status": "passed" if result.passed else "failed",
            "output": result.message,
            "output_format": "text",
            "visibility": "visible",
        })
    report = {
        "score": sum(test["score"] for test in tests),
        "execution_time": round(seconds),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }
    if board is not None:
        report["output"] = board_line(board)
        if board["passed"]:
            values = board["message"]["values"].items()
            report["leaderboard"] = [
                {"name": name, "value": value, "order": "desc"} for name, value in values]
    return report


def as_text(results: list[Result], board: dict | None) -> str:
    lines = []
    for problem in PROBLEMS:
        of_it = [result for result in results if result.number.startswith(f"{problem}.")]
        if not of_it:
            continue
        lines.append(f"\n{problem}. {PROBLEMS[problem].title}: {points(of_it)}")
        for result in of_it:
            mark = "✓" if result.passed else "✗"
            score = result.points if result.passed else 0
            lines.append(f"  {mark} {result.number} {result.title}: {score} of {result.points}")
            lines += [f"        {line}" for line in result.message.splitlines()]
    lines.append(f"\nTotal: {points(results)}")
    if board is not None:
        lines.append("Leaderboard: " + board_line(board))
    return "\n".join(lines).lstrip()


def board_line(board: dict) -> str:
    return board["message"]["line"] if board["passed"] else board["message"]


def points(results: list[Result]) -> str:
    score = sum(result.points for result in results if result.passed)
    return f"{score} of {sum(result.points for result in results)} points"


# ---------------------------------------------------------------------------- arguments

def assigned(repo: Path) -> list[int]:
    """The problems that export.py wrote into assignment.json; all, if there is none.

    It is the student's file: for marks, --problems says what was assigned. Raises ValueError if it
    names no problems.
    """
    path = repo / "assignment.json"
    if not path.exists():
        return list(PROBLEMS)
    try:
        problems = json.loads(path.read_text())["problems"]
        return numbers(",".join(map(str, problems)))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not name the assigned problems: give them by "
                         "--problems") from None


def numbers(text: str) -> list[int]:
    """Raises ValueError for what is no list of problems."""
    chosen = sorted({int(part) for part in text.split(",")})
    if not set(chosen) <= set(PROBLEMS):
        raise ValueError
    return chosen


def arguments() -> argparse.Namespace:
    here = HERE if (HERE / "model.py").exists() else HERE.parent
    parser = argparse.ArgumentParser(description="Grade a solution of the CLaSp assignment.")
    parser.add_argument("repo", nargs="?", type=Path, default=here,
                        help="the folder to grade; default: the one this file is in")
    parser.add_argument("--problems", type=numbers, metavar="N,N",
                        help="default: by the folder's assignment.json")
    parser.add_argument("--json", action="store_true", help="print Gradescope's results.json")
    parser.add_argument("--leaderboard", action="store_true",
                        help="also measure entry.py on the bundled model")
    args = parser.parse_args()
    args.repo = args.repo.resolve()
    if not (args.repo / "model.py").exists():
        parser.error(f"{args.repo} holds no model.py: not a folder to grade")
    try:
        args.problems = args.problems or assigned(args.repo)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    if "--child" in sys.argv[1:]:
        child()
        return 0
    start = time.monotonic()
    args = arguments()
    results = grade_all(args.problems, args.repo)
    seconds = time.monotonic() - start
    board = None
    if args.leaderboard:
        lines, how = run_child(0, args.repo, LEADERBOARD_SECONDS)
        missing = {"passed": False, "message": f"nothing measured: your code {how}"}
        board = lines.get("0.1", missing)
    if args.json:
        print(json.dumps(as_gradescope(results, seconds, board), indent=2))
    else:
        print(as_text(results, board))
    return 0


if __name__ == "__main__":
    sys.exit(main())
