"""What the tools that measure a model share: prompts, options, loading, and errors in one line."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

from checkpoint import BUNDLED, Tokenizer, find_folder, load_model, suggested_settings
from extras.packed import pack
from generate import Parser, choose_device
from model import Llama, ModelError
from speculative import DRAFT_LENGTH, SettingsError, require


class Setup(NamedTuple):
    """A model, ready to be measured, and what was asked for."""
    args: argparse.Namespace
    model: Llama
    tokenizer: Tokenizer

    @property
    def draft_length(self) -> int:
        """As typed, else what the model suggests, else the default."""
        suggested = suggested_settings(self.tokenizer.folder)
        return self.args.draft_length or suggested.get("draft_length", DRAFT_LENGTH)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, chat=False)


def new_parser(description: str, choices: list[str]) -> Parser:
    """With the arguments that all tools take."""
    parser = Parser(description=description)
    parser.add_argument("what", choices=choices)
    parser.add_argument("--model", default=str(BUNDLED))
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--draft-length", type=int)
    return parser


def require_positive(*numbers: int):
    require(min(numbers) >= 1, "numbers of prompts, tokens, repetitions, positions: at least 1")


def load(args: argparse.Namespace) -> Setup:
    folder = find_folder(args.model)
    device, dtype = choose_device(args.device, args.dtype)
    tokenizer = Tokenizer(folder)
    model = pack(load_model(folder, device, dtype))
    print(f"{args.what}: {args.model}, {device}, {dtype}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads", file=sys.stderr)
    return Setup(args, model, tokenizer)


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
