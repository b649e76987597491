"""Make checks/golden.json: the reference's numbers, for what cannot be worked out by hand.

    python assignments/golden.py             the file
    python assignments/golden.py --seed 7    other cases, on standard output: for marks

Inputs come from seeds, so only results are kept. Cases where rounding could decide (two candidates
all but equally close) are left out, so that no student meets them. So are prompts of the
leaderboard after which the bundled model all but ties: after another model takes its place, one run
of this makes everything anew. A test holds the file against what this makes now.
"""
import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import leaderboard
from checks import problem1, problem3
from checks.common import golden, use_golden

import dp_skip
from checkpoint import BUNDLED, Tokenizer, load_model
from model import attention, rope_table, rotate
from speculative import autoregressive

FILE = HERE / "checks" / "golden.json"
MARGIN = 1e-3                 # least difference, of distances or of logits, that a case may turn on
TEXTS = 5                     # of the leaderboard
PROMPTS = [                   # of which the first that fit are taken
    "Once upon a time, there was a brave little mouse who",
    "The king had three daughters, and one day",
    "A little cat had",
    "When Tom came to the park",
    "There was a fisherman who",
    "Once there lived a woman who had two sons.",
    "The little girl went into the garden and",
    "One day, a wolf said to the fox,",
    "Lily was walking home when",
    "In the middle of the night, the princess",
]
CONTINUED = 12                # tokens sampled after one of these, for other seeds than 0
CONSISTENT = [(1, 1), (3, 2), (6, 2), (5, 5)]                  # layers, budget


def rounded(x):
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 6)


def make(seed: int = 0) -> dict:
    """The numbers of a seed, by which the checks go from now on."""
    use_golden({"seed": seed})
    with torch.inference_mode():
        made = {
            "seed": seed,
            "rope": rope(),
            "layer": whole_layer(),
            **parts(),
            **{name: dp_cases(kind) for name, kind in problem3.KINDS.items()},
            **{f"{name}, consistent": consistent_cases(kind.tokens)
               for name, kind in problem3.KINDS.items() if not (kind.measure or kind.change)},
            "texts": texts(),
        }
    use_golden(made)
    return made


# ---------------------------------------------------------------------------- problem 1

def rope() -> dict:
    tables = {}
    for name, scaling in problem1.SCALINGS.items():
        cos, sin = rope_table(problem1.table_config(scaling), 4)
        tables[name] = {"cos": rounded(cos.tolist()), "sin": rounded(sin.tolist())}
    cos, _ = rope_table(problem1.table_config(), 302)
    tables["cos of 301"] = rounded(cos[301:].tolist())
    return tables


def whole_layer() -> list:
    layer, x, cos, sin = problem1.whole_layer()
    return rounded(layer(x, cos, sin).tolist())


def parts() -> dict:
    """Functions one by one, on random inputs."""
    norm, x = problem1.random_norm()
    layer, rows = problem1.random_mlp()
    tensors = {
        "norm": norm(x),
        "rotated": rotate(*problem1.random_rotation()),
        "attended": attention(*problem1.random_attention()),
        "mlp": layer.mlp_block(rows),
        "distances": dp_skip.distances(*problem3.random_rows()),
    }
    found = {name: rounded(tensor.tolist()) for name, tensor in tensors.items()}
    found["paths"] = [sorted(dp_skip.walk_back(*case)) for case in problem3.random_tables()]
    return found


# ---------------------------------------------------------------------------- problems 3 and 4

def dp_cases(kind: problem3.Kind) -> list[dict]:
    """Of each case where no choice turns on rounding, the DP's sets: by the paper's measure, and
    ("cells") by the measure that stands in for it in problem 3's checks of the DP's cells.

    If the kind of case has a measure of its own, both go by that.
    """
    kept = []
    for (layers, budget), seed in product(problem3.SHAPES, range(kind.seeds)):
        layer, states = kind.toy(layers, seed)
        sets = clear_selection(layer, states, budget, kind)
        with problem3.doubles():
            cells = clear_selection(layer, states, budget, kind)
        if sets and cells:
            kept.append({
                "case": [layers, budget, seed],
                "skip_sets": [sorted(s) for s in sets],
                "cells": [sorted(map(list, s)) for s in cells],
            })
    return kept


def clear_selection(
    layer, states, budget: int, kind: problem3.Kind
) -> list[frozenset] | None:
    """The DP's sets, if no choice was a near tie."""
    margins = []
    measure = kind.measure or dp_skip.distances

    def watched(rows, target):
        result = measure(rows, target)
        apart = (result[0] - result[-1]).abs().item()
        margins.append(apart or 1.0)                   # equal to the last bit: a tie in earnest
        return result

    sets = dp_skip.select_layers_plain(layer, states, budget, watched).skip_sets
    return sets if min(margins, default=1.0) > MARGIN * kind.distance else None


def consistent_cases(tokens: int | None) -> list[dict]:
    kept = []
    for layers, budget in CONSISTENT:
        layer, states = problem3.consistent_toy(layers, 0, tokens)
        with problem3.doubles():
            cosines = dp_skip.select_layers_plain(layer, states, budget).cosines
        kept.append({"case": [layers, budget], "manhattan": rounded(cosines)})
    return kept


# ---------------------------------------------------------------------------- the leaderboard

def texts() -> list[dict]:
    """The bundled model's greedy texts, none of which turns on a near tie of two tokens."""
    model = load_model(BUNDLED)
    tokenizer = Tokenizer(BUNDLED)
    kept = []
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        if golden()["seed"]:                           # a prompt that nobody can have seen
            seed = golden()["seed"] + i
            ids += autoregressive(model, ids, CONTINUED, temperature=1.0, seed=seed)
            prompt = tokenizer.decode(ids)
        tokens = list(autoregressive(model, ids, leaderboard.TOKENS))
        if least_margin(model, ids, tokens) >= MARGIN:
            kept.append({"text": prompt, "prompt": ids, "tokens": tokens})
        if len(kept) == TEXTS:
            return kept
    raise SystemExit(f"golden.py: near ties after all but {len(kept)} of PROMPTS: add others")


def least_margin(model, prompt: list[int], tokens: list[int]) -> float:
    """Between the logits of the two likeliest tokens, at any token of a text."""
    states = model(torch.tensor([prompt + tokens[:-1]]))
    logits = model.logits(states[-1])[0, len(prompt) - 1:]
    first, second = logits.topk(2).values.unbind(-1)
    return (first - second).min().item()


def main():
    parser = argparse.ArgumentParser(description="Make the reference's numbers.")
    parser.add_argument("--seed", type=int, metavar="N", help="others, on standard output")
    seed = parser.parse_args().seed
    torch.set_num_threads(1)                           # four gradings at once are no race
    if seed is not None:
        print(json.dumps(make(seed)))
        return
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in make().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
