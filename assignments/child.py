"""The process in which checks run on a student's functions: grade.py starts it.

Nothing but the checks' reports leaves it, through a private copy of standard output: the real one,
and standard error, lead nowhere. A check that does not end, or a crash, ends the process.
"""
import contextlib
import faulthandler
import json
import linecache
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import checks
import torch
from checks.common import show, use_golden, watched
from taken import CORE, assemble_all, install

try:
    import resource
except ImportError:                                    # Windows: the limit on waiting remains
    resource = None

SECONDS = 10                  # of computing, for a check: the reference takes 1 at most
WAITING = 60                  # of anything else, as sleep
MEMORY = 3 << 30              # bytes beyond what Python and torch have mapped before any solution
FILE_SIZE = 1 << 20           # bytes that may be written into one file
LONGEST = 4000                # characters of a message
SHOWN = 80                    # characters of an argument in a message


# ---------------------------------------------------------------------------- limits

def limit():
    """Bound this process. What a platform does not know is left out."""
    if resource is None:
        return
    bounds = {"RLIMIT_FSIZE": FILE_SIZE, "RLIMIT_CORE": 0}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        bounds["RLIMIT_AS"] = pages * resource.getpagesize() + MEMORY
    for name, bound in bounds.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (bound, bound))


def set_alarm(faults):
    """SECONDS of computing from now on, or WAITING of anything, and the process ends.

    Where it was then, or when it crashed, faulthandler writes down.
    """
    faulthandler.dump_traceback_later(WAITING, exit=True, file=faults)
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + SECONDS
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


# ---------------------------------------------------------------------------- what went wrong

def explain(error: BaseException, repo: str) -> str:
    """What went wrong other than by a check's word: a sentence with its place in the solution."""
    stack = list(traceback.walk_tb(error.__traceback__))
    inside = [place for place in stack if in_solution(place[0].f_code.co_filename, repo)]
    said = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and inside:
        if said.startswith("not taken"):
            return said
        return f"not written yet: {said or inside[-1][0].f_code.co_name}"
    if not inside:
        return could_not_use(error, said, stack)
    frame, line = inside[-1]
    caller, _ = stack[stack.index(inside[0]) - 1]
    at = f", at {Path(frame.f_code.co_filename).name}, line {line}{given(inside[0][0], caller)}"
    if isinstance(error, MemoryError) or "allocate memory" in said:
        return f"Your code asked for more than the {MEMORY >> 30} GiB of memory allowed here{at}"
    if isinstance(error, SystemExit):
        return f"Your code called sys.exit{at}"
    if isinstance(error, RecursionError):
        return f"Your code calls itself without end{at}"
    name = type(error).__name__
    return f"Your code raised {name}: {said}{at}" if said else f"Your code raised {name}{at}"


def in_solution(path: str, repo: str | Path) -> bool:
    """Is this a file of the student's?"""
    return Path(path).parent == Path(repo) and Path(path).name.split(".")[0] in (*CORE, "entry")


def could_not_use(error: BaseException, said: str, stack: list[tuple[FrameType, int]]) -> str:
    """It failed in the check, on what the solution returned."""
    places = [(Path(frame.f_code.co_filename), line) for frame, line in stack]
    ours = [place for place in places if place[0].parent in (HERE / "checks", HERE)]
    path, line = ours[-1]
    code = linecache.getline(str(path), line).strip()
    return (f"The check could not use what your code returned ({type(error).__name__}: {said}), at "
            f"{path.relative_to(HERE)}, line {line}: {code}")


def given(frame: FrameType, caller: FrameType) -> str:
    """The arguments of the student's function that the check called: the example that failed.

    They are those that ``watched`` gave it, if that called it: the function may have put others in
    their place since.
    """
    code = frame.f_code
    if code.co_name == "<module>":
        return ""
    names = code.co_varnames[:code.co_argcount]
    arguments = {name: frame.f_locals.get(name) for name in names}
    if caller.f_code.co_filename == watched.__code__.co_filename:
        arguments |= dict(caller.f_locals.get("given", ()))
    shown = []
    for name, value in arguments.items():
        is_tensor = hasattr(value, "shape")
        if is_tensor or isinstance(value, int | float | list | tuple | set | frozenset):
            shown.append(f"{name} = {shortened(value)}")
    return f", in {code.co_name}({', '.join(shown)})"


def shortened(value) -> str:
    text = show(value)
    if len(text) <= SHOWN:
        return text
    if hasattr(value, "shape"):
        return f"shape {tuple(value.shape)}"
    return f"{text[:SHOWN]} ..."


# ---------------------------------------------------------------------------- running

def private_channel():
    """What standard output was. From now on that, and standard error, lead nowhere."""
    channel = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return channel


def load(job: dict) -> str:
    """Put the student's functions into the core; why that fails, or ""."""
    repo = Path(job["repo"])
    try:
        install(assemble_all(job["core"], repo), repo, watched)
    except BaseException as error:
        return explain(error, job["repo"])
    return ""


def message_of(check, repo: str) -> str:
    """Run a check: what it says, "" if nothing."""
    try:
        with torch.inference_mode():
            check.run()
    except checks.PropertyError as error:
        return str(error)
    except BaseException as error:                     # sys.exit and KeyboardInterrupt too
        return explain(error, repo)
    return ""


def main():
    job = json.load(sys.stdin)
    channel = private_channel()
    faults = open(job["faults"], "w")
    faulthandler.enable(faults)
    if hasattr(signal, "SIGXCPU"):
        faulthandler.register(signal.SIGXCPU, faults, all_threads=False, chain=True)
    torch.set_num_threads(1)                           # models are small: threads would only wait
    use_golden(job["golden"])
    limit()
    set_alarm(faults)
    trouble = load(job)

    def say(**line):
        channel.write(json.dumps({"key": job["key"], **line}) + "\n")
        channel.flush()

    known = {check.number: check for of_problem in checks.CHECKS.values() for check in of_problem}
    for number in job["checks"]:
        say(number=number)
        set_alarm(faults)
        message = (trouble or message_of(known[number], job["repo"]))[:LONGEST]
        say(number=number, passed=not message, message=message)


if __name__ == "__main__":
    main()
