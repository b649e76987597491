"""Grade a solution: points for each problem and, for what is wrong, the property that broke.

    python grade.py                      every assigned problem
    python grade.py --problems 3,4       only these
    python grade.py --json               Gradescope's results.json, on standard output
    python grade.py --leaderboard        also measure entry.py on the bundled model
    python grade.py FOLDER               grade another folder by this copy of the checks

Only the bodies of the assigned functions, and new functions, are taken from the folder, if they do
nothing that a solution has no need of (taken.py). They are put into the core as it was handed out,
in a process of their own (child.py) with limits on time and memory. That reports each check's start
and end. A check that hangs or crashes is lost, and the next runs in a new process.

For marks, run the project's copy with --problems and --seed: then cases are made anew from the
reference, and nothing in the student's folder says what is right, or what was assigned.
"""
import argparse
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from checks import CHECKS
from child import SECONDS, WAITING, in_solution
from taken import CORE, assemble_all

HERE = Path(__file__).resolve().parent
TOTAL_SECONDS = 400           # for all problems
LEADERBOARD_SECONDS = 300
REFERENCE = HERE / "golden.py"                         # makes its numbers: not handed out


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


# ---------------------------------------------------------------------------- running the checks

class ForgedError(Exception):
    """What came from a process is not what the checks report."""


def grade_all(problems: list[int], repo: Path, core: dict[str, str], golden: dict) -> list[Result]:
    results = []
    end = time.monotonic() + TOTAL_SECONDS
    for problem in problems:
        try:
            results += grade(problem, repo, core, golden, end)
        except ForgedError as error:
            results += [result_of(check, False, str(error)) for check in CHECKS[problem]]
    return results


def grade(
    problem: int, repo: Path, core: dict[str, str], golden: dict, end: float
) -> list[Result]:
    """Every check of a problem, by a process; after one that it does not survive, by another."""
    results = []
    to_run = list(CHECKS[problem])
    while to_run:
        job = {"checks": [check.number for check in to_run], "core": core, "golden": golden}
        lines, how = run_child(job, repo, end - time.monotonic())
        ended = read_report(lines, job["checks"])
        results += [result_of(check, *said) for check, said in zip(to_run, ended)]
        to_run = to_run[len(ended):]
        if to_run:
            results.append(result_of(to_run.pop(0), False, f"In this check your code {how}"))
    return results


def result_of(check, passed: bool, message: str) -> Result:
    return Result(check.number, check.title, check.points, passed, message)


def read_report(lines: list[dict], numbers: list[str]) -> list[tuple[bool, str]]:
    """Of each check that came to its end: passed, and the message.

    A process reports the start and the end of each check, in order and once. Raises ForgedError for
    anything else.
    """
    ended = []
    for i, line in enumerate(lines):
        at_end = i % 2 == 1
        fields = {"number", "passed", "message"} if at_end else {"number"}
        if i // 2 >= len(numbers) or set(line) != fields or line["number"] != numbers[i // 2]:
            raise ForgedError("The process that ran the checks did not report them one after the "
                              "other: nothing that it said counts")
        if at_end:
            ended.append((line["passed"] is True and line["message"] == "", line["message"]))
    return ended


def run_child(job: dict, repo: Path, seconds: float) -> tuple[list[dict], str]:
    """The lines that the checks reported, and how their process ended."""
    with tempfile.TemporaryDirectory() as folder:
        faults = Path(folder, "faults")
        job = job | {"repo": str(repo), "faults": str(faults)}
        lines, status = communicate("child.py", job, seconds, folder)
        text = faults.read_text(errors="replace") if faults.exists() else ""
        return lines, how_it_ended(status, text) + place_of_fault(text, repo)


def communicate(
    program: str, job: dict, seconds: float, folder: str
) -> tuple[list[dict], int | None]:
    """Have a program do a job: its lines, and its exit status, None if it had to be stopped.

    A line counts if it has the job's key. Raises ForgedError if one has not.
    """
    key = secrets.token_hex()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / program)],
        cwd=folder, env=environment, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        said, _ = process.communicate(json.dumps(job | {"key": key}), timeout=max(seconds, 1))
        status = process.returncode
    except subprocess.TimeoutExpired:
        kill(process)
        said, _ = process.communicate()
        status = None
    finally:
        kill(process)
    return with_key(said, key), status


def with_key(said: str, key: str) -> list[dict]:
    """The lines of a report. Raises ForgedError for one without the key."""
    try:
        lines = [json.loads(text) for text in said.splitlines()]
        keys = [line.pop("key") for line in lines]
    except (ValueError, KeyError, AttributeError, TypeError):
        keys = [None]
    if set(keys) - {key}:
        raise ForgedError("Something else than the checks wrote into their report: nothing in it "
                          "counts")
    return lines


def how_it_ended(status: int | None, faults: str) -> str:
    if status is None:
        return f"was stopped: {TOTAL_SECONDS} s for all problems were used up"
    if status < 0 and signal.Signals(-status).name == "SIGXCPU":
        return f"did not come to an end within {SECONDS} s"
    if faults.startswith("Timeout"):
        return f"did not come to an end within {WAITING} s"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return "ended the whole process"


def kill(process: subprocess.Popen):
    """With whatever processes it may have started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    process.kill()
    process.wait()


def place_of_fault(faults: str, repo: Path) -> str:
    """Where the solution was when it crashed or time was up, if faulthandler could tell."""
    for file, line in re.findall(r'File "(.+)", line (\d+) in', faults):     # innermost first
        if in_solution(file, repo):
            return f", at {Path(file).name}, line {line}"
    return ""


def leaderboard(repo: Path, golden: dict) -> dict:
    """{"line": ..., "values": {name: number}}, without values if nothing was measured."""
    job = {"repo": str(repo), "golden": golden}
    with tempfile.TemporaryDirectory() as folder:
        try:
            lines, _ = communicate("leaderboard.py", job, LEADERBOARD_SECONDS, folder)
        except ForgedError as error:
            return {"line": str(error), "values": {}}
    if not lines:
        lines = [{"line": "nothing measured: entry.py ended the process, or took more than "
                          f"{LEADERBOARD_SECONDS} s", "values": {}}]
    return lines[0]


def skeletons(problems: list[int]) -> dict[str, str]:
    """The core as it was handed out: in a student's repository a copy, else made anew."""
    folder = HERE / "checks" / "core"
    if folder.exists():
        return {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in CORE}
    from export import stripped
    sources = stripped(problems).sources
    return {name: sources[name] for name in CORE}


# ---------------------------------------------------------------------------- printing

def as_gradescope(
    results: list[Result], seconds: float, notes: list[str], board: dict | None
) -> dict:
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
    report["output"] = "\n".join(said_besides(notes, board))
    if board and board["values"]:
        report["leaderboard"] = [
            {"name": name, "value": value, "order": "desc"}
            for name, value in board["values"].items()]
    return report


def said_besides(notes: list[str], board: dict | None) -> list[str]:
    lines = [f"Not taken: {note}" for note in notes]
    return [*lines, f"Leaderboard: {board['line']}"] if board else lines


def as_text(results: list[Result], notes: list[str], board: dict | None) -> str:
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
    lines += said_besides(notes, board)
    return "\n".join(lines).lstrip()


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
        problems = json.loads(path.read_text(encoding="utf-8"))["problems"]
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


def handed_in(repo: Path) -> Path:
    """The folder itself, or the one in it that holds the core, if archives were packed so."""
    inside = list(repo.glob("*/")) if repo.is_dir() else []
    holding = [path for path in inside if holds_core(path)]
    return holding[0] if len(holding) == 1 and not holds_core(repo) else repo


def holds_core(folder: Path) -> bool:
    return any((folder / f"{name}.py").exists() for name in CORE)


def arguments() -> argparse.Namespace:
    here = HERE if (HERE / "model.py").exists() else HERE.parent
    parser = argparse.ArgumentParser(description="Grade a solution of the CLaSp assignment.")
    parser.add_argument("repo", nargs="?", type=Path, default=here,
                        help="the folder to grade; default: the one this file is in")
    parser.add_argument("--problems", type=numbers, metavar="N,N",
                        help="default: by the folder's assignment.json")
    parser.add_argument("--seed", type=int, metavar="N",
                        help="make the cases anew, from the reference: for marks")
    parser.add_argument("--json", action="store_true", help="print Gradescope's results.json")
    parser.add_argument("--leaderboard", action="store_true",
                        help="also measure entry.py on the bundled model")
    args = parser.parse_args()
    args.repo = handed_in(args.repo.resolve())
    if args.seed is not None and not 1 <= args.seed < 1 << 50:       # 0 is the file's, handed out
        parser.error("--seed must lie between 1 and 2^50 - 1")
    if args.seed is not None and not REFERENCE.exists():
        parser.error("--seed needs the reference, which is not handed out")
    if not args.json and not holds_core(args.repo):
        parser.error(f"{args.repo} holds none of {', '.join(f'{name}.py' for name in CORE)}")
    try:
        args.problems = args.problems or assigned(args.repo)
    except ValueError as error:
        parser.error(str(error))
    return args


def golden_numbers(seed: int | None) -> dict:
    """The file's, or others from the reference, in a process that knows no student's code."""
    if seed is None:
        return json.loads((HERE / "checks" / "golden.json").read_text(encoding="utf-8"))
    command = [sys.executable, str(REFERENCE), "--seed", str(seed)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> int:
    start = time.monotonic()
    args = arguments()
    core = skeletons(args.problems)
    golden = golden_numbers(args.seed)
    notes = [note for taken in assemble_all(core, args.repo).values() for note in taken.notes]
    results = grade_all(args.problems, args.repo, core, golden)
    seconds = time.monotonic() - start
    board = leaderboard(args.repo, golden) if args.leaderboard else None
    if args.json:
        print(json.dumps(as_gradescope(results, seconds, notes, board), indent=2))
    else:
        sys.stdout.reconfigure(errors="backslashreplace")  # for what students' errors say, and ✓
        print(as_text(results, notes, board))
    return 0


if __name__ == "__main__":
    sys.exit(main())
