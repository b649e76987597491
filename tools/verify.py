"""Verify on a model what README.md claims beside speed.

    python tools/verify.py equal [--model M] [--dtype D]  greedy text, logits and cache, by the bit
    python tools/verify.py dp    [--model M]              two readings of the DP; its time in passes
    python tools/verify.py slice [--model M]              DP, brute force, random sets on 10 layers

``equal`` also takes --cuda-graphs, and --synthetic SHAPE for random weights.
"""
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from common import Setup, load, new_parser, require_positive, run_tool  # and the path
from torch import Tensor

import speculative
from bench.experiments import ROWS, window_cosines
from bench.prompts import HELD_OUT
from bench.steps import timed
from dp_skip import distances, relative_distances, select_layers, select_layers_plain
from extras.exact import exact_passes
from model import KVCache
from speculative import as_row, autoregressive, clasp, optimize, prefill, require, require_readable

DP_TOKENS = (1, 4, 16)        # the DP is checked over the states of so many tokens
LAST_PLACE = 300              # of those where it is
PAST_PLACE = 20               # slots behind it

NOT_ASKED = ("skip_layers", "exit_threshold", "opt_interval", "opt_tokens")

# ---------------------------------------------------------------------------- equal

@torch.inference_mode()
def equal(setup: Setup):
    """CLaSp against plain decoding in passes that round alike, for up to four numbers M."""
    model = setup.model
    layers = len(model.layers)
    budgets = sorted({0, layers // 4, layers // 2, max(0, layers - 3)})
    count = setup.args.max_new_tokens
    k = setup.draft_length
    passes = exact_passes(model, k + 1)
    require(passes, "no number of rows is exact on this machine")
    width = passes["width"]
    prompts = several_lengths(setup)
    runs = parted = parted_one_row = bits = numbers = 0
    for i, prompt in enumerate(prompts):
        plain = partial(autoregressive, model, prompt, count, **passes)
        expected, expected_numbers = recorded(setup, plain, prompt, width)
        one_row = list(autoregressive(model, prompt, count))
        for skip in budgets:
            method = partial(clasp, model, prompt, count, skip_layers=skip, draft_length=k,
                             **passes)
            tokens, found_numbers = recorded(setup, method, prompt, width)
            runs += 1
            parted += tokens != expected
            parted_one_row += tokens != one_row
            for found, right in zip(found_numbers, expected_numbers):
                numbers += found.numel()
                bits += (bits_of(found) ^ bits_of(right)).count_nonzero().item()
        print(f"\r{i + 1}/{len(prompts)} prompts, {parted} of {runs} runs differ, {bits} of "
              f"{numbers:.3g} numbers", end="", file=sys.stderr, flush=True)
    rows = f"{passes['narrowest']} to {width} rows"
    print(f"\n{model.embed.weight.dtype}: {runs} runs of {count} greedy tokens, K {k}, passes of "
          f"{rows}: {parted} differ from plain decoding in such passes; {bits} of {numbers:.3g} "
          f"logits, keys and values differ in a bit; {parted_one_row} texts differ from plain "
          "decoding one row wide, over the filled slots", flush=True)


def several_lengths(setup: Setup) -> list[list[int]]:
    """Prompts: the openings whole, and then their first words."""
    texts = []
    for words in (99, 4, 8):
        texts += [" ".join(text.split()[:words]) for text in HELD_OUT]
    return [setup.encode(text) for text in texts[:setup.args.prompts]]


def recorded(setup: Setup, method, prompt: list[int], width: int) -> tuple[list[int], list[Tensor]]:
    """The tokens of a method, and all numbers behind them: logits at each place, keys, values."""
    count = setup.args.max_new_tokens
    cache = KVCache(setup.model, len(prompt) + count, width)
    with recorded_rows() as rows:
        tokens = list(method(cache=cache))
    end = len(prompt) + count - 1
    logits = [rows[place] for place in range(len(prompt) - 1, end)]
    return tokens, logits + [x[:, :, :end] for x in cache.keys + cache.values]


@contextmanager
def recorded_rows() -> Iterator[dict[int, Tensor]]:
    """Within a ``with`` block, the logits of every pass of the whole model, by place in the text.

    A rejected draft's rows are overwritten by those of the next pass.
    """
    rows = {}
    full_pass = speculative.full_pass

    def recording(model, cache, tokens, width):
        start = cache.length
        states, logits = full_pass(model, cache, tokens, width)
        rows.update((start + i, row) for i, row in enumerate(logits.clone()))     # graphs reuse it
        return states, logits

    speculative.full_pass = recording
    try:
        yield rows
    finally:
        speculative.full_pass = full_pass


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


# ---------------------------------------------------------------------------- dp

@torch.inference_mode()
def dp(setup: Setup):
    text = [token for opening in HELD_OUT for token in setup.encode(opening)][:LAST_PLACE]
    require_readable(setup.model.config, text, PAST_PLACE)
    compare_readings(setup, text)
    time_dp(setup, text)


def compare_readings(setup: Setup, text: list[int]):
    """The DP cell by cell and packed, at 20 places; neither may change the cache."""
    for tokens in DP_TOKENS:
        compare_readings_over(setup, text, tokens)


def compare_readings_over(setup: Setup, text: list[int], tokens: int):
    model = setup.model
    layers = len(model.layers)
    budget = layers
    places = random.Random(0).sample(range(1, len(text)), 19)
    equal_sets = 0
    difference = 0.0
    for place in [0, *places]:
        cache = KVCache(model, place + PAST_PLACE, layers * tokens)
        hidden = prefill(model, cache, text[:place + 1])[:, -tokens:]
        if place % 2:                                      # write past the place and roll back
            model(as_row(model, text[:7]), cache)
            cache.length -= 7
        before = valid_part(cache)
        packed = optimize(model, cache, hidden, budget)
        plain = optimize(model, cache, hidden, budget, select_layers_plain)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, valid_part(cache)))
        require(unchanged, f"the DP changed the cache, at place {place}")
        equal_sets += sum(a == b for a, b in zip(packed.skip_sets, plain.skip_sets))
        differences = [abs(a - b) for a, b in zip(packed.cosines, plain.cosines)]
        difference = max(difference, *differences)
    print(f"fast and plain DP over {tokens} tokens, 20 positions x {budget + 1} budgets: "
          f"{equal_sets} sets equal, largest difference of cosines {difference:.1e}; "
          "cache untouched")


def valid_part(cache: KVCache) -> list[Tensor]:
    return [x[:, :, :cache.length].clone() for x in cache.keys + cache.values]


def time_dp(setup: Setup, text: list[int]):
    model = setup.model
    budget = len(model.layers) // 2
    start = 200
    rows = setup.draft_length + 1
    cache = KVCache(model, start + rows, budget)
    hidden = prefill(model, cache, text[:start])[:, -1]

    def full_pass(count: int):
        tokens = as_row(model, text[:count])           # any: their time does not depend on it
        model.logits(model(tokens, cache)[-1]).argmax(-1).tolist()
        cache.length = start

    work = {
        "step": partial(full_pass, 1),
        "verify": partial(full_pass, rows),
        "dp": partial(optimize, model, cache, hidden, budget,
                      partial(select_layers, smallest=budget)),        # as decoding does
    }
    taken = timed(model, work, 25)
    step, verify, one_dp = (1e3 * statistics.median(seconds) for seconds in taken.values())
    print(f"medians of 25, interleaved, {start} tokens cached: plain step {step:.2f} ms, verify "
          f"pass of {rows} rows {verify:.2f} ms ({verify / step:.2f} steps), DP of budget {budget} "
          f"{one_dp:.2f} ms = {one_dp / verify:.2f} verify passes")


# ---------------------------------------------------------------------------- slice

@torch.inference_mode()
def slice_(setup: Setup):
    """Layers 10 .. 19 searched, the others always run, as the paper does for its Fig. 3b."""
    tokens = setup.encode(" ".join(HELD_OUT))
    places = setup.args.positions
    require(max(DP_TOKENS) <= min(places) and max(places) <= len(tokens),
            f"--positions of slice lie between {max(DP_TOKENS)} and {len(tokens)}, the text's end")
    for count in DP_TOKENS:
        slice_over(setup, tokens, count)


def slice_over(setup: Setup, tokens: list[int], count: int):
    """By the states of so many tokens: cosines are means over them."""
    first = 10
    size = 10
    model = setup.model
    require(len(model.layers) >= first + size,
            f"slice needs a model of at least {first + size} layers")
    found = []
    for position in setup.args.positions:
        cache = KVCache(model, position, ROWS * count)
        hidden = prefill(model, cache, tokens[:position])[:, -count:]
        measure = distances if count == 1 else relative_distances
        found.append(window_cosines(model, cache, hidden, first, size, measure))
    print(f"cosine with the true state after layer {first + size}, over {count} tokens each, mean "
          f"of {len(found)} places")
    print("| layers skipped of 10 | DP | brute force | mean of all sets |\n|---|---|---|---|")
    for skipped in range(size + 1):
        columns = [
            [cosines.dp[skipped] for cosines in found],
            [cosines.brute_force[skipped] for cosines in found],
            [cosines.mean[skipped] for cosines in found],
        ]
        cells = " | ".join(f"{statistics.mean(column):.4f}" for column in columns)
        print(f"| {skipped} | {cells} |")


# ---------------------------------------------------------------------------- which

CHECKS = {"equal": equal, "dp": dp, "slice": slice_}


def main():
    parser = new_parser(__doc__.splitlines()[0], list(CHECKS))
    parser.add_argument("--positions", type=int, nargs="+", default=[20, 40, 60, 80])
    args = parser.parse_args()
    for option in NOT_ASKED:
        require(getattr(args, option) is None,
                f"--{option.replace('_', '-')} does not go with verify.py, which tries its own")
    require_positive(args.prompts, args.max_new_tokens, *args.positions)
    CHECKS[args.what](load(args))


if __name__ == "__main__":
    sys.exit(run_tool("verify.py", main))
