"""The file that keeps what was measured, from which a stopped run goes on."""
import json
import zlib
from pathlib import Path

from bench.methods import UNPADDED
from bench.prompts import Question
from bench.target import Target
from speculative import require

HEADER = ("header",)          # the key of the first line: which run the file belongs to


class Results(dict):
    """Lines by key. A new one is appended to a JSONL file at once.

    A line is a dictionary with its own "key", a list. The first is the header.
    """

    def __init__(self, path: Path, header: dict):
        """Opens the file, or makes it. Raises SettingsError if it holds another run, or no run.

        A last line that was cut short is dropped. So is a header with nothing behind it: nothing
        was measured yet.
        """
        header = {"key": list(HEADER)} | header
        content = path.read_bytes() if path.exists() else b""
        complete = content[:content.rfind(b"\n") + 1]
        super().__init__(parsed(complete))
        has_begun = content and list(self) != [HEADER]
        require(not has_begun or self.get(HEADER) == header,
                f"{path} holds another run: move it away or use another --out")
        self.file = open(path, "a", buffering=1)          # a line goes out when it ends
        self.file.truncate(len(complete) if has_begun else 0)
        if not has_begun:
            self[HEADER] = header

    def __setitem__(self, key: tuple, line: dict):
        super().__setitem__(key, line)
        print(json.dumps(line), file=self.file)


def parsed(content: bytes) -> dict[tuple, dict]:
    """Lines by key; none if this is no file of results."""
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        return {tuple(line["key"]): line for line in lines}
    except (ValueError, KeyError, TypeError):
        return {}


def with_answers(question: Question) -> list[str]:
    """A question's turns, and between them something that stands for the answers."""
    conversation = [part for turn in question.turns for part in (turn, "answer")]
    return conversation[:-1]


def header_of(target: Target, args, questions: list[Question]) -> dict:
    """What a stopped run must have in common with the one that goes on with it.

    Methods, repetitions and temperatures may be added to: but not with SWIFT among them, whose
    search goes on from text to text.
    """
    order = [list(args.methods), args.repeat, list(args.temperatures)]
    asked = [(*question, target.encode(with_answers(question))) for question in questions]
    return {
        "model": target.name,
        "weights": target.fingerprint,
        "where": target.where,
        "settings": target.settings,
        "auto": target.auto_means,
        "cuda_graphs": target.has_graphs,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "questions": zlib.crc32(repr((asked, sorted(target.stop))).encode()),
        "unpadded": list(UNPADDED),
        "order": order if "swift" in args.methods else None,
    }
