"""What the tools that measure a model share: prompts, options, loading, and errors in one line."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.target import Target, add_model_arguments, load_target
from generate import Parser
from model import Llama, ModelError
from speculative import SettingsError, require


class Setup(NamedTuple):
    """A model, ready to be measured, and what was asked for."""
    args: argparse.Namespace
    target: Target

    @property
    def model(self) -> Llama:
        return self.target.model

    @property
    def draft_length(self) -> int:
        return self.target.draft_length

    def encode(self, prompt: str) -> list[int]:
        """As plain text, also for a model that chats."""
        if self.target.tokenizer is None:
            return self.target.encode([prompt])
        return self.target.tokenizer.encode(prompt, chat=False)


def new_parser(description: str, choices: list[str]) -> Parser:
    """With the arguments that all tools take."""
    parser = Parser(description=description)
    parser.add_argument("what", choices=choices)
    add_model_arguments(parser)
    parser.add_argument("--prompts", type=int, default=20, metavar="N",
                        help="as many as there are, at most (a sweep: of each group); default: "
                             "%(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default: %(default)s")
    return parser


def require_positive(*numbers: int):
    require(min(numbers) >= 1, "numbers of prompts, tokens, repetitions, positions: at least 1")


def load(args: argparse.Namespace) -> Setup:
    target = load_target(args)
    print(f"{args.what}: {target.name}, {target.where}", file=sys.stderr)
    return Setup(args, target)


def run_tool(name: str, run: Callable[[], None]) -> int:
    """The exit status: 0; 2 for a user's mistake, said in one line; 130 after Ctrl-C."""
    try:
        run()
        return 0
    except (ModelError, SettingsError, OSError) as error:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
