"""The leaderboard's line: speed and tau of entry.py on the bundled model, against plain decoding.

Greedy, a few prompts, both methods in turn in one process and one thread, so that a busy machine
slows both. The text must be the one that the reference writes, so only speed can be won. tau does
not depend on the machine.

Model, loop, prompts and counts are those of the project that this file lies in: from another's
folder comes entry.py alone. grade.py starts this in a process of its own.
"""
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "model.py").exists() else HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
from checks.common import PropertyError, golden, use_golden
from child import explain, private_channel
from taken import parsed

import speculative
from checkpoint import BUNDLED, SUGGESTIBLE, load_model

TOKENS = 64                   # of each text
ROUNDS = 3                    # that are timed, after one that warms up


class EntryError(Exception):
    """An entry.py that cannot be measured, said in one line."""


def measure(load: Callable) -> dict:
    """{"line": text for people, "values": {name: number}}.

    load(): the entry. Each round loads it anew, so that none remembers a text that it has written.
    Raises PropertyError if a text is not the whole model's own, EntryError for what is no entry.
    """
    model = load_model(BUNDLED)
    seconds = Counter()
    counts = Counter()
    for timed in [False] + [True] * ROUNDS:
        entry = load()
        require_entry(entry)
        for text in golden()["texts"]:
            plain, _ = run(plain_decoding, model, text, "plain decoding")
            entered, counted = run(entry_decoding(entry), model, text, "entry.py")
            if timed:
                seconds.update(plain=plain, entry=entered)
                counts.update(counted)
    speedup = seconds["plain"] / seconds["entry"]
    tau = counts["tokens"] / counts["passes"]
    speed = counts["tokens"] / seconds["entry"]
    accepted = counts["tokens"] - counts["passes"]     # a pass writes one token of its own
    line = (f"speedup {speedup:.2f}x, tau {tau:.2f}, {accepted} of {counts['drafted']} "
            f"drafted tokens accepted, {speed:.0f} tokens/s; {len(golden()['texts'])} texts of "
            f"{TOKENS} tokens, all the whole model's own")
    return {"line": line, "values": {"speedup": round(speedup, 2), "tau": round(tau, 2)}}


def require_entry(entry):
    for name in ("SETTINGS", "DRAFTER"):
        if not hasattr(entry, name):
            raise EntryError(f"entry.py has no {name}")
    if not isinstance(entry.SETTINGS, dict):
        kind = type(entry.SETTINGS).__name__
        raise EntryError(f"SETTINGS in entry.py are a dict, as they were handed out: got a {kind}")
    unknown = sorted(entry.SETTINGS.keys() - SUGGESTIBLE.keys(), key=str)
    if unknown:
        raise EntryError(f"SETTINGS in entry.py are some of {', '.join(SUGGESTIBLE)}: got "
                         f"{', '.join(map(str, unknown))}")
    for name, value in entry.SETTINGS.items():
        is_half = name == "skip_layers" and value is None
        is_number = isinstance(value, SUGGESTIBLE[name]) and not isinstance(value, bool)
        if not (is_half or is_number):
            raise EntryError("SETTINGS in entry.py are numbers, whole ones but for exit_threshold: "
                             f"got {value!r} for {name}")


def plain_decoding(model, prompt: list[int]):
    return speculative.autoregressive(model, prompt, TOKENS)


def entry_decoding(entry):
    """By entry.py's drafter."""
    def decoding(model, prompt: list[int]):
        if entry.DRAFTER is None:
            drafter = speculative.Clasp(model, **entry.SETTINGS)
        else:
            drafter = entry.DRAFTER(model)
        return speculative.decode(model, prompt, TOKENS, drafter)
    return decoding


def run(decoding, model, text: dict, name: str) -> tuple[float, Counter]:
    """Write a text: its seconds, and what was counted outside of the loop, for a drafter sees that.

    ``passes`` of the whole model after the prefill, ``drafted`` tokens and ``tokens`` written.
    """
    counts = Counter()
    full_pass = speculative.full_pass
    checked_draft = speculative.checked_draft

    def counted_pass(*args):
        counts["passes"] += 1
        return full_pass(*args)

    def counted_draft(*args):
        draft = checked_draft(*args)
        counts["drafted"] += len(draft.tokens)
        return draft

    with (mock.patch.object(speculative, "full_pass", counted_pass),
          mock.patch.object(speculative, "checked_draft", counted_draft)):
        start = time.perf_counter()
        tokens = list(decoding(model, list(text["prompt"])))
        seconds = time.perf_counter() - start
    compare(name, text, tokens)
    counts["tokens"] = len(tokens)
    return seconds, counts


def compare(name: str, text: dict, tokens: list[int]):
    expected = text["tokens"][:TOKENS]
    if tokens == expected:
        return
    equal = [a == b for a, b in zip(tokens, expected)]
    at = [*equal, False].index(False)
    raise PropertyError(
        f"The greedy text of {name} is the whole model's own",
        f"prompt {text['text']!r}, new token {at}: expected {expected[at:at + 1]}, got "
        f"{tokens[at:at + 1]}")


def load_entry(path: Path):
    """Raises EntryError if there is none, or if it is no Python."""
    _, trouble = parsed(path)
    if trouble:
        raise EntryError(trouble)
    spec = importlib.util.spec_from_file_location("entry", path)
    entry = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(entry)
    except SyntaxError as error:                       # that only compiling finds
        raise EntryError(f"entry.py does not load, SyntaxError in line {error.lineno}: "
                         f"{error.msg}") from None
    return entry


def main():
    job = json.load(sys.stdin)
    channel = private_channel()
    torch.set_num_threads(1)
    use_golden(job["golden"])
    try:
        said = measure(partial(load_entry, Path(job["repo"], "entry.py")))
    except (EntryError, PropertyError) as error:
        said = {"line": str(error), "values": {}}
    except speculative.SettingsError as error:
        said = {"line": f"entry.py: {error}", "values": {}}
    except BaseException as error:
        said = {"line": explain(error, job["repo"]), "values": {}}
    channel.write(json.dumps({"key": job["key"], **said}))
    channel.close()


if __name__ == "__main__":
    main()
