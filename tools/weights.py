"""What eight bits cost: a model's logits and perplexity with weights as they are, and in int8.

    python tools/weights.py --model M [--text FILE] [--pieces N]

Both compute in bfloat16 (or --dtype). The text is cut into pieces of TOKENS tokens, each of which
is read from its beginning; by default it is this project's LICENSE, which never changes. A few
thousand tokens cannot tell 0.5 % from 1, so the change has its standard error, over pieces. Both
models are in memory at once.
"""
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from common import ROOT, run_tool
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from checkpoint import BUNDLED, Tokenizer, find_folder, load_model, read_config, short_name
from extras.packed import pack
from generate import Parser, choose_device, form_of_weights
from model import KVCache, Llama
from speculative import (
    SettingsError,
    refuse_overflow,
    require,
    require_finite,
    require_readable,
)

TOKENS = 256


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="PATH_OR_REPO", default=str(BUNDLED))
    parser.add_argument("--text", metavar="FILE", default=str(ROOT / "LICENSE"))
    parser.add_argument("--pieces", type=int, default=12, metavar="N", help="at most; default 12")
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N|mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser.parse_args()


def pieces_of(args, tokenizer: Tokenizer) -> list[list[int]]:
    try:
        tokens = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"cannot read --text: {error}") from None
    pieces = [tokens[i:i + TOKENS] for i in range(0, len(tokens) - TOKENS + 1, TOKENS)]
    require(args.pieces >= 2, "--pieces must be at least 2")
    require(len(pieces) >= 2, f"the text has fewer than {2 * TOKENS} tokens")
    return pieces[:args.pieces]


class Difference(NamedTuple):
    """Of one piece's logits, in eight bits, from what they are without."""
    before: float             # mean of -log p(token)
    after: float
    largest: float            # of a logit
    size: float               # the largest logit
    agree: float              # share of places with the same likeliest token


@torch.inference_mode()
def logits_of(model: Llama, piece: list[int]) -> Tensor:
    """(TOKENS, vocabulary), float32, as decoding computes them: a few rows at a time.

    Raises ModelError if they are not finite, or keys and values too large for the dtype.
    """
    cache = KVCache(model, TOKENS)
    rows = torch.tensor([piece], device=model.device)
    steps = [model.logits(model(few, cache)[-1])[0] for few in rows.split(8, 1)]
    logits = torch.cat(steps)
    require_finite(logits)
    refuse_overflow(cache.has_overflowed(0, cache.length), logits.dtype)
    return logits.float().cpu()


def difference(plain: Tensor, eight: Tensor, piece: list[int]) -> Difference:
    targets = torch.tensor(piece[1:])
    before, after = (cross_entropy(logits[:-1], targets).item() for logits in (plain, eight))
    agree = (eight.argmax(-1) == plain.argmax(-1)).double().mean()
    return Difference(before, after, (eight - plain).abs().max().item(), plain.abs().max().item(),
                      agree.item())


def perplexity(loss: float) -> float:
    """exp(loss); infinity past the largest float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def run():
    args = arguments()
    folder = find_folder(args.model)
    device, dtype = choose_device(args.device, args.dtype)
    pieces = pieces_of(args, Tokenizer(folder))
    config = read_config(folder)
    for piece in pieces:
        require_readable(config, piece)
    models = [pack(load_model(folder, device, dtype, form_of_weights(weights, device, dtype)))
              for weights in (None, "int8")]
    found = []
    for piece in tqdm(pieces, leave=False, delay=2, disable=None):
        found.append(difference(*(logits_of(model, piece) for model in models), piece))
    before, after = fmean(d.before for d in found), fmean(d.after for d in found)
    uncertain = stdev(d.after - d.before for d in found) / len(found) ** 0.5
    largest = max(d.largest for d in found) / max(d.size for d in found)
    print(f"{short_name(args.model)}, {args.dtype}, {len(pieces)} pieces of {TOKENS} tokens:")
    print(f"perplexity {perplexity(before):.3f}; in int8 {perplexity(after):.3f} "
          f"({100 * (perplexity(after - before) - 1):+.2f} %, standard error "
          f"{100 * uncertain:.2f})")
    print(f"logits: largest difference {100 * largest:.1f} % of the largest logit; the likeliest "
          f"token is the same at {100 * fmean(d.agree for d in found):.1f} % of places")


if __name__ == "__main__":
    sys.exit(run_tool("weights.py", run))
