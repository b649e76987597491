"""What eight bits cost: a model's logits and perplexity with weights as they are, and in int8.

    python tools/weights.py --model M [--text FILE]

Both compute in bfloat16 (or --dtype). The text is cut into pieces of TOKENS tokens, each of which
is read from its beginning; by default it is this project's LICENSE, which never changes.
"""
import sys
from pathlib import Path

import torch
from common import ROOT, run_tool
from torch import Tensor

from checkpoint import BUNDLED, Tokenizer, find_folder, load_model
from extras.packed import pack
from generate import Parser, choose_device, form_of_weights
from model import KVCache, Llama
from speculative import SettingsError, require

TOKENS = 256
PIECES = 12


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="PATH_OR_REPO", default=str(BUNDLED))
    parser.add_argument("--text", metavar="FILE", default=str(ROOT / "LICENSE"))
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N|mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser.parse_args()


def pieces_of(args, tokenizer: Tokenizer) -> list[list[int]]:
    try:
        tokens = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"cannot read --text: {error}") from None
    pieces = [tokens[i:i + TOKENS] for i in range(0, len(tokens) - TOKENS + 1, TOKENS)]
    require(pieces, f"the text has fewer than {TOKENS} tokens")
    return pieces[:PIECES]


@torch.inference_mode()
def all_logits(model: Llama, pieces: list[list[int]]) -> Tensor:
    """(pieces, TOKENS, vocabulary), float32, as decoding computes them: a few rows at a time."""
    found = []
    for piece in pieces:
        cache = KVCache(model, TOKENS)
        rows = torch.tensor([piece], device=model.device)
        steps = [model.logits(model(few, cache)[-1])[0].float().cpu() for few in rows.split(8, 1)]
        found.append(torch.cat(steps))
    return torch.stack(found)


def perplexity(logits: Tensor, pieces: list[list[int]]) -> float:
    """exp of the mean of -log p(token)."""
    targets = torch.tensor(pieces)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    return loss.exp().item()


def run():
    args = arguments()
    folder = find_folder(args.model)
    device, dtype = choose_device(args.device, args.dtype)
    pieces = pieces_of(args, Tokenizer(folder))
    found = []
    for weights in (None, "int8"):
        model = pack(load_model(folder, device, dtype, form_of_weights(weights, device, dtype)))
        found.append(all_logits(model, pieces))
    plain, eight = found
    before, after = (perplexity(logits, pieces) for logits in found)
    error = (eight - plain).abs().max() / plain.abs().max()
    agree = (eight.argmax(-1) == plain.argmax(-1)).double().mean()
    print(f"{folder.resolve().name}, {args.dtype}, {len(pieces)} pieces of {TOKENS} tokens:")
    print(f"perplexity {before:.3f}; in int8 {after:.3f} ({100 * (after / before - 1):+.2f} %)")
    print(f"logits: largest difference {100 * error:.1f} % of the largest logit; the likeliest "
          f"token is the same at {100 * agree:.1f} % of places")


if __name__ == "__main__":
    sys.exit(run_tool("weights.py", run))
