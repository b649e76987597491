"""Grade a solution: points for each problem and, for what is wrong, the property that broke and a small example.

    python grade.py                      every assigned problem
    python grade.py --problems 3,4       only these
    python grade.py --json               in the format of Gradescope's results.json, on standard output
    python grade.py --leaderboard        also measure the decoder on the bundled model (the open questions)
    python grade.py FOLDER               grade another folder by this copy of the checks

Each problem runs in a process of its own with limits on time, memory and file size, so code that hangs, crashes or
exits loses that problem and no other. The process reports to a file that the student's code is not told of: what it
prints counts for nothing. That guards against accidents; it is no sandbox for hostile code. For marks that matter,
run your own copy of this file and of ``checks/`` over the student's folder, in a container.
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
except ImportError:                                            # Windows: the time limit remains
    resource = None

HERE = Path(__file__).resolve().parent
SECONDS = 13                  # for a problem, at least: the reference takes 2 to 4
TOTAL_SECONDS = 82            # for all six; time that one leaves unused may be taken by those after it, which a busy machine needs
LEADERBOARD_SECONDS = 120
MEMORY = 3 << 30              # bytes beyond what Python and torch have mapped before any solution is loaded
FILE_SIZE = 64 << 20          # bytes that a solution may write into one file


class Problem(NamedTuple):
    title: str
    functions: list[str]      # to be written by the student: module.function or module.Class.method


# The one list of what is assigned: export.py removes these bodies.
PROBLEMS = {
    1: Problem("RMSNorm, RoPE and cached grouped-query attention",
               ["model.RMSNorm.forward", "model.rope_table", "model.rotate", "model.KVCache.put", "model.attention",
                "model.DecoderLayer.attention_block", "model.DecoderLayer.mlp_block"]),
    2: Problem("A decoder that skips layers", ["model.Llama.forward", "model.Llama.logits"]),
    3: Problem("The dynamic programme, cell by cell",
               ["dp_skip.distances", "dp_skip.walk_back", "dp_skip.select_layers_plain"]),
    4: Problem("The dynamic programme, sequence-parallel", ["dp_skip.select_layers", "speculative.candidate_layer"]),
    5: Problem("Acceptance", ["speculative.accept_greedy", "speculative.accept_sampled"]),
    6: Problem("The whole loop", ["speculative.draft", "speculative.clasp"]),
}


class Result(NamedTuple):
    number: str               # "3.2": problem and check
    title: str
    points: int
    passed: bool
    message: str              # empty if passed


# ---------------------------------------------------------------------------- in the child

def limit(cpu_seconds: int):
    """Bound this process. What a platform does not know is left out: the parent's clock is there everywhere."""
    if resource is None:
        return
    bounds = {"RLIMIT_CPU": cpu_seconds + 5, "RLIMIT_FSIZE": FILE_SIZE, "RLIMIT_CORE": 0}
    if Path("/proc/self/statm").exists():
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        bounds["RLIMIT_AS"] = mapped + MEMORY
    for name, bound in bounds.items():
        try:
            resource.setrlimit(getattr(resource, name), (bound, bound))
        except (AttributeError, ValueError, OSError):
            pass


def explain(error: BaseException, repo: str) -> str:
    """What went wrong other than by a check's word, in one sentence with the place in the student's own file."""
    stack = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in stack if in_solution(frame.f_code.co_filename, repo)]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and own:
        return f"not written yet: {said or own[-1][0].f_code.co_name}"
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or '?').name} does not load, SyntaxError in line {error.lineno}: {error.msg}"
    if not own:
        frame, line = next(place for place in reversed(stack) if Path(place[0].f_code.co_filename).parent in (HERE / "checks", HERE))
        path = Path(frame.f_code.co_filename)
        return (f"The check could not use what your code returned ({type(error).__name__}: {said}), at "
                f"{path.relative_to(HERE)}, line {line}: {linecache.getline(str(path), line).strip()}")
    at = f", at {Path(own[-1][0].f_code.co_filename).name}, line {own[-1][1]}{given(own[0][0])}"
    if isinstance(error, MemoryError) or "allocate memory" in said:
        return f"Your code asked for more than the {MEMORY >> 30} GiB of memory allowed here{at}"
    if isinstance(error, SystemExit):
        return f"Your code called sys.exit{at}"
    if isinstance(error, RecursionError):
        return f"Your code calls itself without end{at}"
    return f"Your code raised {type(error).__name__}{': ' * bool(said)}{said}{at}"


def in_solution(path: str, repo: str | Path) -> bool:
    """Is this file the student's? In a student's repository the grader's own lie beside them."""
    return Path(path).parent == Path(repo) and Path(path) not in (HERE / "grade.py", HERE / "leaderboard.py")


def given(frame: FrameType) -> str:
    """The arguments of the student's function that the check called: the example on which it failed."""
    from checks.common import show
    code, values = frame.f_code, frame.f_locals
    if code.co_name == "<module>":
        return ""
    shown = []
    for name in code.co_varnames[:code.co_argcount]:
        value = values.get(name)
        if hasattr(value, "shape") or isinstance(value, (int, float, list, tuple, set, frozenset)):
            text = show(value)
            shown.append(f"{name} = {text if len(text) <= 80 else f'shape {tuple(value.shape)}' if hasattr(value, 'shape') else text[:80] + ' ...'}")
    return f", in {code.co_name}({', '.join(shown)})"


def child():
    """Run the checks of one problem; a line of JSON for the start and the end of each."""
    job = json.load(sys.stdin)
    faults = open(job["faults"], "w")                          # where the code is when it crashes, or when time is nearly up
    faulthandler.enable(faults)
    faulthandler.dump_traceback_later(job["seconds"] - 0.5, file=faults)
    import torch

    import leaderboard                                         # these are the grader's own, whatever the solution's folder holds
    from checks import CHECKS, Wrong
    if job["problem"]:
        torch.set_num_threads(1)                               # the leaderboard may use what the machine has
    out = open(job["results"], "w")
    limit(job["seconds"] * torch.get_num_threads())
    sys.path.insert(0, job["repo"])
    sys.dont_write_bytecode = True

    def say(**line):
        out.write(json.dumps({"key": job["key"], **line}) + "\n")
        out.flush()

    if job["problem"] == 0:
        try:
            say(number="0.1", passed=True, message=leaderboard.measure())
        except BaseException as error:
            say(number="0.1", passed=False, message=str(error) if isinstance(error, Wrong) else explain(error, job["repo"]))
        return
    for check in CHECKS[job["problem"]]:
        say(number=check.number)
        message = ""
        try:
            with torch.inference_mode():
                check.run()
        except Wrong as wrong:
            message = str(wrong)
        except BaseException as error:                         # sys.exit and KeyboardInterrupt too
            message = explain(error, job["repo"])
        say(number=check.number, passed=not message, message=message)


# ---------------------------------------------------------------------------- in the parent

def run_child(problem: int, repo: Path, seconds: int) -> tuple[dict[str, dict], str]:
    """The lines a child wrote, the last for each check, and how it ended if not well."""
    key, how = secrets.token_hex(8), ""
    with tempfile.TemporaryDirectory() as folder:
        results, faults = Path(folder) / "results", Path(folder) / "faults"
        job = {"problem": problem, "repo": str(repo), "results": str(results), "faults": str(faults), "key": key, "seconds": seconds}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "grade.py"), "--child"], cwd=repo, stdin=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            process.communicate(json.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            how = f"did not come to an end within {seconds} s"
        finally:                                               # with whatever processes it may have started
            if hasattr(os, "killpg"):
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            process.kill()
            process.wait()
        if not how and process.returncode < 0:
            how = f"was killed by {signal.Signals(-process.returncode).name}"
        lines = {}
        for text in results.read_text(errors="replace").splitlines() if results.exists() else ():
            try:
                line = json.loads(text)
                if line.pop("key") == key:
                    lines[line["number"]] = line
            except (ValueError, TypeError, KeyError, AttributeError):
                pass                                           # not ours
        places = re.findall(r'File "(.+)", line (\d+) in', faults.read_text(errors="replace") if faults.exists() else "")
        at = next((f", at {Path(path).name}, line {line}" for path, line in places if in_solution(path, repo)), "")     # innermost first
    return lines, (how or "ended the whole process") + at


def grade_all(problems: list[int], repo: Path) -> list[Result]:
    """The problems one after the other, within the limits on time."""
    import checks  # noqa: F401                                  torch's first, slow import is the machine's time, not a solution's
    results, end = [], time.monotonic() + TOTAL_SECONDS
    for i, problem in enumerate(problems):
        spare = end - time.monotonic() - SECONDS * (len(problems) - i)
        results += grade(problem, repo, SECONDS + round(min(max(spare, 0), SECONDS)))
    return results


def grade(problem: int, repo: Path, seconds: int) -> list[Result]:
    """Every check of a problem: the child's word where it gave one, else what became of the child."""
    from checks import CHECKS
    lines, how = run_child(problem, repo, seconds)
    results, fatal = [], None
    for check in CHECKS[problem]:
        line = lines.get(check.number, {})
        passed = line.get("passed") is True
        message = line.get("message") or ""
        if "passed" not in line:
            message = f"not reached: see check {fatal}" if fatal else f"In this check your code {how}"
            fatal = fatal or check.number
        results.append(Result(check.number, check.title, check.points, passed, message))
    return results


def as_gradescope(results: list[Result], seconds: float, board: dict | None) -> dict:
    """The results.json that Gradescope's autograder reads."""
    tests = [{"number": r.number, "name": f"{r.number} {r.title}", "score": r.points if r.passed else 0, "max_score": r.points,
              "status": "passed" if r.passed else "failed", "output": r.message, "output_format": "text",
              "visibility": "visible"} for r in results]
    out = {"score": sum(test["score"] for test in tests), "execution_time": round(seconds), "visibility": "visible",
           "stdout_visibility": "hidden", "tests": tests}
    if board is not None:
        out["output"] = board["message"] if isinstance(board["message"], str) else board["message"]["line"]
        if board["passed"]:
            out["leaderboard"] = [{"name": name, "value": value, "order": "desc"}
                                  for name, value in board["message"]["values"].items()]
    return out


def as_text(results: list[Result], board: dict | None) -> str:
    lines = []
    for problem in dict.fromkeys(int(r.number.split(".")[0]) for r in results):
        own = [r for r in results if r.number.startswith(f"{problem}.")]
        lines.append(f"\n{problem}. {PROBLEMS[problem].title}: {points(own)}")
        for r in own:
            lines.append(f"  {'✓' if r.passed else '✗'} {r.number} {r.title}: {r.points if r.passed else 0} of {r.points}")
            lines += [f"        {line}" for line in r.message.splitlines()]
    lines.append(f"\nTotal: {points(results)}")
    if board is not None:
        lines.append("Leaderboard: " + (board["message"]["line"] if board["passed"] else board["message"]))
    return "\n".join(lines)


def points(results: list[Result]) -> str:
    return f"{sum(r.points for r in results if r.passed)} of {sum(r.points for r in results)} points"


def assigned(repo: Path) -> list[int]:
    """The problems that export.py wrote into assignment.json; all, if there is none (in the project itself).

    It is the student's file: for marks, --problems says what was assigned. Raises ValueError if it names no problems.
    """
    path = repo / "assignment.json"
    try:
        return numbers(",".join(map(str, json.loads(path.read_text())["problems"]))) if path.exists() else list(PROBLEMS)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not name the assigned problems: give them by --problems") from None


def numbers(text: str) -> list[int]:
    chosen = sorted({int(part) for part in text.split(",")})
    if not chosen or not set(chosen) <= set(PROBLEMS):
        raise ValueError
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="Grade a solution of the CLaSp assignment.")
    parser.add_argument("repo", nargs="?", type=Path, default=HERE if (HERE / "model.py").exists() else HERE.parent,
                        help="the folder to grade; default: the one this file is in")
    parser.add_argument("--problems", type=numbers, metavar="N,N", help="default: by the folder's assignment.json")
    parser.add_argument("--json", action="store_true", help="print Gradescope's results.json")
    parser.add_argument("--leaderboard", action="store_true", help="also measure the decoder on the bundled model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return 0
    start, repo, board = time.monotonic(), args.repo.resolve(), None
    if not (repo / "model.py").exists():
        parser.error(f"{repo} holds no model.py: not a folder to grade")
    try:
        problems = args.problems or assigned(repo)
    except ValueError as error:
        parser.error(str(error))
    results = grade_all(problems, repo)
    seconds = time.monotonic() - start
    if args.leaderboard:
        lines, how = run_child(0, repo, LEADERBOARD_SECONDS)
        board = lines.get("0.1", {"passed": False, "message": f"nothing measured: your code {how}"})
    if args.json:
        print(json.dumps(as_gradescope(results, seconds, board), indent=2))
    else:
        print(as_text(results, board).lstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
