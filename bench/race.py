"""Decoding by all methods in turn: whatever else the machine does then slows all alike.

``race`` decodes one prompt, a token of each method in turn. ``interleave`` races through all
prompts, several times, and keeps a line for each text. ``ask`` comes before it: it makes prompts of
questions, with the whole model's greedy answers, to which greedy texts are compared.
"""
import sys
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tqdm import tqdm  # comes with huggingface-hub

from bench.methods import Method, exact
from bench.prompts import HELD_OUT, Question
from bench.search import Swift
from bench.target import Target
from generate import say
from speculative import Stats, clock, require

WARM_UP = 16                  # tokens that each method decodes untimed: first passes are slow

# Of ``Stats``, what a line of results keeps.
KEPT = (
    "new_tokens", "prefill_seconds", "seconds", "draft_seconds", "verify_seconds",
    "optimize_seconds", "cycles", "drafted", "accepted", "optimizations",
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""
    max_new_tokens: int
    repeat: int
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0


class Prompt(NamedTuple):
    question: str             # its name
    turn: int
    group: str
    tokens: list[int]
    answer: list[int]         # the whole model's greedy one, in ``Target.passes``


def race(
    target: Target, methods: dict[str, Method], prompt: list[int], count: int, **settings
) -> dict[str, tuple[Stats, float]]:
    """Decode a prompt by all methods, a token of each in turn.

    Returns of each the statistics, and the seconds that passed outside, without the prefill.
    settings: see ``speculative.new_text``.
    """
    now = clock(target.model)
    stats = {name: Stats() for name in methods}
    wall = dict.fromkeys(methods, 0.0)
    running = {
        name: method.tokens(
            target.model, prompt, count, stats=stats[name], stop=target.stop, **settings)
        for name, method in methods.items()
    }
    while running:
        for name, tokens in list(running.items()):
            start = now()
            token = next(tokens, None)
            wall[name] += now() - start
            if token is None:
                del running[name]
    return {name: (stats[name], wall[name] - stats[name].prefill_seconds) for name in methods}


def run(
    target: Target, method: Method, prompt: list[int], count: int, **settings
) -> tuple[Stats, float]:
    """A race of one."""
    return race(target, {"": method}, prompt, count, **settings)[""]


def ask(target: Target, questions: list[Question], count: int, results: dict) -> list[Prompt]:
    """Every turn of every question, after the whole model's greedy answers to those before it.

    The answers are not timed. They are in ``results``, or are added there.
    """
    reference = exact(target, None)
    prompts = []
    for question in tqdm(questions, desc="greedy answers", leave=False, disable=None):
        conversation = []
        for turn, text in enumerate(question.turns):
            conversation.append(text)
            tokens = target.encode(conversation)
            if len(tokens) + count > target.model.config.max_position_embeddings:
                say(f"{question.name}, from turn {turn + 1} on: left out, it does not fit the "
                    "model's context")
                break
            key = (question.name, turn, 0.0, 0, "reference")
            if key not in results:
                stats, _ = run(target, reference, tokens, count)
                results[key] = {"key": list(key), "tokens": stats.tokens}
            answer = results[key]["tokens"]
            prompts.append(Prompt(question.name, turn, question.group, tokens, answer))
            ends = answer[-1] in target.stop           # a template has a sign of its own for that
            conversation.append(target.decode(answer[:-1] if ends else answer))
    require(len(prompts) >= 1, "there is no question that fits the model's context")
    return prompts


def interleave(
    target: Target, methods: dict, prompts: list[Prompt], plan: Plan, results: dict
) -> list[dict]:
    """Every prompt by every method, ``plan.repeat`` times at each temperature: a line for each.

    What ``results`` holds of one and the same race is not run again; what is new is added there.
    """
    warm_up(target, methods, prompts, plan.max_new_tokens)
    # A CUDA graph belongs to one cache: with graphs a race has one runner.
    teams = [[name] for name in methods] if target.has_graphs else [list(methods)]
    jobs = list(product(plan.temperatures, prompts, range(plan.repeat), teams))
    pause = 1 if sys.stderr.isatty() else 60               # seconds between lines of progress
    lines = []
    progress = tqdm(jobs, unit="race", smoothing=0, mininterval=pause)
    for temperature, prompt, repeat, team in progress:
        keys = {
            name: (prompt.question, prompt.turn, temperature, repeat, name) for name in team
        }
        if not are_of_one_race([results.get(key) for key in keys.values()]):
            runners = {name: methods[name] for name in team}
            found = race(target, runners, prompt.tokens, plan.max_new_tokens,
                         temperature=temperature, seed=plan.seed + repeat)
            for name, (stats, wall) in found.items():
                key = keys[name]
                results[key] = new_line(key, prompt, methods[name], stats, wall) | {"team": team}
        lines += [results[key] for key in keys.values()]
    return lines


def are_of_one_race(lines: list[dict | None]) -> bool:
    """A race writes a line for each of its team, over those of earlier ones."""
    return None not in lines and len({tuple(line.get("team", ())) for line in lines}) == 1


def warm_up(target: Target, methods: dict, prompts: list[Prompt], count: int):
    """Decode untimed. With graphs, every prompt, the longest first, so that all are recorded."""
    if target.has_graphs:
        for prompt in sorted(prompts, key=lambda prompt: len(prompt.tokens), reverse=True):
            for method in methods.values():
                if not isinstance(method.drafter, Swift):  # whose search would go on
                    run(target, method, prompt.tokens, count)
    for method in methods.values():
        run(target, method, target.encode(HELD_OUT[:1]), WARM_UP)


def new_line(key: tuple, prompt: Prompt, method: Method, stats: Stats, wall: float) -> dict:
    """What is kept of one text."""
    line = {
        "key": list(key),
        "group": prompt.group,
        "identical": stats.tokens == prompt.answer,
        "wall": wall,
    }
    line |= {name: getattr(stats, name) for name in KEPT}
    if isinstance(method.drafter, Swift):
        line["scores"] = method.drafter.search.scores[:]
    return line
