"""What the checks share: how one is declared, and how a failure is said."""
import functools
import inspect
import json
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHORT = 12                    # numbers in a tensor up to which an example shows them


class PropertyError(Exception):
    """A property that does not hold: one sentence, and the smallest example found."""

    def __init__(self, sentence: str, example: str):
        super().__init__(f"{sentence}.\nSmallest example found: {example}.")


class Check(NamedTuple):
    number: str               # "3.2"
    title: str
    points: int
    run: Callable[[], None]


CHECKS: dict[int, list[Check]] = {}      # by problem


def check(points: int, title: str):
    """Declare a check. The name of its module ends in the number of its problem."""
    def declare(run):
        problem = int(run.__module__[-1])
        checks = CHECKS.setdefault(problem, [])
        number = f"{problem}.{len(checks) + 1}"
        checks.append(Check(number, title, points, run))
        return run
    return declare


GOLDEN = Path(__file__).parent / "golden.json"
NUMBERS = {}                             # in use


def golden() -> dict:
    """Numbers made by the reference: see golden.py of the project's assignments."""
    if not NUMBERS:
        use_golden(json.loads(GOLDEN.read_text()))
    return NUMBERS


def use_golden(numbers: dict):
    """Exchange them: for marks they are made anew, from another seed."""
    NUMBERS.clear()
    NUMBERS.update(numbers)


# ---------------------------------------------------------------------------- the functions graded

def watched(function: Callable) -> Callable:
    """A student's function that may not change what it was given."""
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def watch(*args, **settings):
        given = list(zip(names, args)) + list(settings.items())
        before = [copied(value) for _, value in given]
        result = function(*args, **settings)
        for (name, value), old in zip(given, before):
            if old is not None and not is_same(value, old):
                raise PropertyError(
                    f"{function.__qualname__} leaves its arguments as they are",
                    f"{name} was {show(old)}, and is {show(value)} afterwards")
        return result
    return watch


def copied(value):
    """Of arguments that could be changed by mistake; None for others."""
    if isinstance(value, Tensor):
        return value.clone()
    return copy(value) if isinstance(value, list | set) else None


def is_same(value, before) -> bool:
    if isinstance(value, set):
        return value == before
    if not isinstance(value, Tensor):
        return len(value) == len(before) and all(a is b for a, b in zip(value, before))
    if value.shape != before.shape or value.dtype != before.dtype:
        return False
    return bool(torch.isclose(value, before, rtol=0, atol=0, equal_nan=True).all())


# ---------------------------------------------------------------------------- inputs

def random(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Other numbers for every seed that the golden ones are of."""
    seed += 1000 * golden()["seed"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def config(**changes):
    """A LLaMA that is worked out by hand: 4 heads of 2 dimensions share 2 key-value heads."""
    from model import Config
    fields = {
        "vocab_size": 5,
        "hidden_size": 8,
        "intermediate_size": 3,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 64,
    }
    return Config(**fields | changes)


# ---------------------------------------------------------------------------- comparing

def show(value) -> str:
    """A value in an example: numbers short, tensors as lists, sets in order."""
    if isinstance(value, Tensor):
        if value.numel() > SHORT:
            return f"shape {tuple(value.shape)}"
        return show(value.tolist())
    if isinstance(value, float):
        return f"{value + 0:.6g}"                      # + 0: no -0
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(show(v) for v in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(v)}" for name, v in value.items())
    if isinstance(value, tuple):
        return "(" + ", ".join(show(v) for v in value) + ")"
    return repr(value)


def parts(got, function: str, names: str, example: str):
    """What a function returned, if it is as many values as there are ``names``."""
    count = names.count(",") + 1
    if not isinstance(got, tuple | list) or len(got) != count:
        raise PropertyError(f"{function} returns ({names})", f"{example}: got {show(got)}")
    return got


def equal(got, expected, sentence: str, example: str):
    """Anything that is compared whole. True is not taken for 1."""
    if got != expected or isinstance(got, bool) != isinstance(expected, bool):
        differ(show(got), show(expected), sentence, example)


def is_int(got, what: str, example: str):
    """A tensor and a float compare as equal to an int, and are of no use as token or as slice."""
    if type(got) is not int:
        kind = type(got).__name__
        raise PropertyError(f"{what} is an int", f"{example}: got a {kind}, {show(got)}")


def differ(got: str, expected: str, sentence: str, example: str):
    raise PropertyError(sentence, f"{example}: expected {expected}, got {got}")


def close(
    got,
    expected,
    sentence: str,
    example: str,
    axes: tuple[str | None, ...] = (),
    tolerance: float = 1e-4,
):
    """A tensor against another, or a list: says the first place, in index order, where they differ.

    axes: names of the axes for the example. None: an axis that is not mentioned.
    """
    expected = torch.as_tensor(expected)
    shape = f"shape {tuple(expected.shape)}"
    if not isinstance(got, Tensor):
        differ(show(got), f"a tensor of {shape}", sentence, example)
    if got.shape != expected.shape:
        differ(str(tuple(got.shape)), shape, sentence, example)
    got = got.to(torch.float64)
    expected = expected.to(torch.float64)
    differs = ~torch.isclose(got, expected, rtol=tolerance, atol=tolerance)
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        names = axes or [f"axis {i}" for i in range(len(index))]
        place = ", ".join(f"{name} {i}" for name, i in zip(names, index) if name)
        where = f"{example}, at {place}" if place else example
        differ(show(got[index].item()), show(expected[index].item()), sentence, where)
