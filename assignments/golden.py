"""Make checks/golden.json: the reference's numbers, for checks that cannot be worked out by hand.

    python assignments/golden.py

Inputs come from seeds, so only results are kept. Cases where rounding could decide (two candidates all but equally
close) are refused here, not met by a student. A test holds the file against what this makes now.
"""
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import dp_skip  # noqa: E402
import leaderboard  # noqa: E402
from checks import problem1, problem3  # noqa: E402
from checks.common import config  # noqa: E402
from generate import BUNDLED  # noqa: E402
from model import load_model, rope_table  # noqa: E402
from speculative import autoregressive  # noqa: E402

MARGIN = 1e-3                 # least difference between the distances of two candidates that a golden case may turn on


def rounded(x):
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 6)


def rope() -> dict:
    out, scaling = {}, dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)
    for name, changes in (("rope_scaling None", {}), ("rope_scaling of LLaMA 3.1", dict(rope_scaling=scaling))):
        cos, sin = rope_table(config(head_dim=4, rope_theta=100., **changes), 4)
        out[name] = {"cos": rounded(cos.tolist()), "sin": rounded(sin.tolist())}
    cos, _ = rope_table(config(head_dim=4, rope_theta=100.), 302)
    return out | {"cos of 301": rounded(cos[301:].tolist())}


def clear(select, layer, states, budget) -> bool:
    """No choice of the programme was a near tie: the same sets whichever of two close candidates is favoured."""
    margins, measure = [], dp_skip.distances

    def watched(rows, target):
        result = measure(rows, target)
        margins.append((result[0] - result[-1]).abs().item() or 1.)        # equal to the last bit: a tie in earnest
        return result

    dp_skip.distances = watched
    try:
        select(layer, states, budget)
    finally:
        dp_skip.distances = measure
    return min(margins[:-1] or [1.]) > MARGIN                 # the last call is on the finals of all budgets


def dp() -> list[dict]:
    out = []
    for layers, budget, seed in problem3.CASES:
        layer, states = problem3.toy(layers, seed)
        plain = dp_skip.select_layers_plain
        if not clear(plain, layer, states, budget):
            continue
        with problem3.doubles():
            if not clear(plain, layer, states, budget):
                continue
            cells = plain(layer, states, budget).skip_sets
        out.append({"case": [layers, budget, seed], "skip_sets": [sorted(s) for s in plain(layer, states, budget).skip_sets],
                    "cells": [sorted(map(list, s)) for s in cells]})
    return out


def dp_consistent() -> list[dict]:
    out = []
    for layers, budget in ((1, 1), (3, 2), (5, 5)):
        with problem3.doubles():
            cosines = dp_skip.select_layers_plain(*problem3.consistent_toy(layers, 0), budget).cosines
        out.append({"case": [layers, budget], "manhattan": rounded(cosines)})
    return out


def texts() -> list[list[int]]:
    """The bundled model's greedy texts for the leaderboard; none may turn on a near tie of two tokens."""
    model, out = load_model(BUNDLED), []
    for prompt in leaderboard.prompts():
        tokens = list(autoregressive(model, prompt, leaderboard.TOKENS))
        logits = model.logits(model(torch.tensor([prompt + tokens[:-1]]))[-1])[0, len(prompt) - 1:]
        top = logits.topk(2).values
        if (top[:, 0] - top[:, 1]).min() < MARGIN:
            raise SystemExit(f"golden.py: a near tie after {prompt}: take another prompt")
        out.append(tokens)
    return out


def make() -> dict:
    with torch.inference_mode():
        layer, *given = problem1.whole_layer()
        return {"rope": rope(), "layer": rounded(layer(*given).tolist()), "dp": dp(), "dp consistent": dp_consistent(),
                "texts": texts()}


if __name__ == "__main__":
    text = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in make().items())
    (HERE / "checks" / "golden.json").write_text("{\n" + text + "\n}\n")
