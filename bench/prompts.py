"""The questions that are asked: our own, or those of Spec-Bench.

Our own lie in prompts.json, by group of tasks. They were written for this project; none is in the
bundled model's training text. Those "held out" are to choose fixed sets on, to warm up, and for
tools/, never for measuring.
"""
import json
from pathlib import Path
from typing import NamedTuple

from speculative import SettingsError, require

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
HELD_OUT = PROMPTS.pop("held out")

# Our group for each category of Spec-Bench (Xia et al. 2024); all others are "chat".
GROUPS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "math",
    "rag": "rag",
}


class Question(NamedTuple):
    name: str
    group: str
    turns: list[str]          # of a conversation: what the user says


def read_questions(path: Path | None = None, limit: int | None = None) -> list[Question]:
    """Spec-Bench's question.jsonl, or our own prompts; at most ``limit`` of each group."""
    require(limit is None or limit >= 1, "--limit must be at least 1")
    questions = our_prompts() if path is None else read_spec_bench(path)
    require(len(questions) >= 1, f"{path} holds no questions")
    if limit is None:
        return questions
    by_group = {}
    for question in questions:
        by_group.setdefault(question.group, []).append(question)
    chosen = []
    for members in by_group.values():
        step = max(1, len(members) // limit)              # every so many-th of the group
        chosen += members[::step][:limit]
    return chosen


def our_prompts() -> list[Question]:
    return [
        Question(f"{group} {i}", group, [text])
        for group, texts in PROMPTS.items()
        for i, text in enumerate(texts)
    ]


def held_out() -> list[Question]:
    """Those that are never measured."""
    return [Question(f"held out {i}", "held out", [text]) for i, text in enumerate(HELD_OUT)]


def read_spec_bench(path: Path) -> list[Question]:
    questions = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                entry = json.loads(line)
                name = f"{entry['question_id']}, line {number}"
                group = GROUPS.get(entry["category"], "chat")
                questions.append(Question(name, group, texts(entry["turns"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path}: not Spec-Bench's question.jsonl ({error!r})") from None
    return questions


def texts(turns) -> list[str]:
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise TypeError("turns must be a list of texts")
    "".join(turns).encode()                            # fails for half a surrogate pair
    return turns
