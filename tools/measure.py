"""Measure what README.md claims beside speed (bench.py): is the output the same, what does the DP cost and find.

    python tools/measure.py equal  [--model M] [--dtype D]  greedy text, logits and cache, bit for bit, 4 values of M
    python tools/measure.py dp     [--model M]        fast = plain at 20 positions; time of a DP in verify passes
    python tools/measure.py slice  [--model M]        DP, brute force and random sets on a 10-layer slice
    python tools/measure.py reject [--model M]        share of drafted tokens rejected against the distance d that the DP tells
    python tools/measure.py blocks [--model M]        layers skipped, or attention and MLP blocks worth as much time
    python tools/measure.py sweep  [--model M]        --skip-layers auto against every M x threshold x interval, by group
"""
import argparse
import itertools
import random
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import speculative  # noqa: E402
from auto import block_costs  # noqa: E402
from dp_skip import select_layers, select_layers_plain  # noqa: E402
from generate import BUNDLED, Text, choose_device, suggested_settings  # noqa: E402
from model import KVCache, ModelError, find_folder, load_model  # noqa: E402
from packed import pack  # noqa: E402
from speculative import (SettingsError, Stats, as_row, autoregressive, candidate_layer, clasp, clock, optimize,  # noqa: E402
                         prefill, require)

PROMPTS = [                    # written for this purpose; in no training text
    "Once upon a time there was a clockmaker whose youngest daughter could hear what the clocks said at night.",
    "The baker's boy had never seen the sea, but",
    "In a village under the glass mountain there lived a widow with seven goats and one",
    "\"If you open that door,\" said the raven, \"you will",
    "There was once a king who owned nothing but a broken crown and",
    "Long ago, when the moon still came down to drink from the wells,",
    "The fox looked at the lantern, and then at the miller, and said:",
    "A poor fisherman pulled his net from the river and found in it a small iron box, which",
    "Every evening the princess climbed the tower to feed",
    "The old witch had three keys, one of gold, one of silver and one of bone, and",
    "Two brothers set out to find the tree that bears the singing apples. The elder",
    "The giant was so tired that he sat down upon the church, and",
    "When the frost came, the sparrow went to the tailor and begged him for",
    "Nobody in the town would speak of the blue house, until one day a soldier",
    "\"Three nights you must watch,\" said the dwarf, \"and on the third",
    "The queen had promised her first child to the north wind, and now",
    "Beneath the roots of the oldest oak there was a stair, and the girl went down",
    "A donkey that had carried flour all its life resolved one morning to",
    "The youngest son was called a simpleton, because he always",
    "At the end of the world stands an inn where giants, ghosts and honest merchants"]


@torch.inference_mode()
def equal(args, model, encode):
    """Greedy text, every logit row of the whole model and the cache, bit for bit, against plain decoding K+1 rows wide."""
    prompts = [encode(" ".join(p.split()[:words])) for words in (99, 4, 8) for p in PROMPTS][:args.prompts]
    layers, count, k = len(model.layers), args.max_new_tokens, args.draft_length
    rows_seen, full_pass, width = {}, speculative.full_pass, speculative.exact_width(model, k + 1)

    def recorded(model, cache, tokens, width):
        n, (states, logits) = cache.length, full_pass(model, cache, tokens, width)
        rows_seen.update((n + i, row) for i, row in enumerate(logits))
        return states, logits

    def run(method, prompt, **settings):
        rows_seen.clear()
        cache = KVCache(model, len(prompt) + count, width)
        tokens, length = list(method(model, prompt, count, cache=cache, **settings)), len(prompt) + count - 1
        return tokens, [rows_seen[i] for i in range(len(prompt) - 1, length)] + [
            x[:, :, :length] for x in cache.keys + cache.values]

    speculative.full_pass = recorded
    runs = parted = bits = numbers = parted_one_row = 0
    for i, prompt in enumerate(prompts):
        expected, expected_numbers = run(autoregressive, prompt, width=k + 1)
        one_row = list(autoregressive(model, prompt, count))
        for skip in (0, layers // 4, layers // 2, layers - 3):
            tokens, got = run(clasp, prompt, skip_layers=skip, draft_length=k)
            runs += 1
            parted += tokens != expected
            parted_one_row += tokens != one_row
            numbers += sum(x.numel() for x in got)
            bits += sum((bits_of(x) ^ bits_of(y)).count_nonzero().item() for x, y in zip(got, expected_numbers))
        print(f"\r{i + 1}/{len(prompts)} prompts, {parted} of {runs} runs differ, {bits} of {numbers:.3g} numbers",
              end="", file=sys.stderr, flush=True)
    speculative.full_pass = full_pass
    print(f"\n{model.embed.weight.dtype}: {runs} runs of {count} greedy tokens, K {k}: {parted} differ from plain decoding "
          f"{width} rows wide; {bits} of {numbers:.3g} logits, keys and values differ in a "
          f"bit; {parted_one_row} texts differ from plain decoding one row wide", flush=True)


def bits_of(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@torch.inference_mode()
def dp(args, model, encode):
    budget, now = len(model.layers) // 2, clock(model)
    tokens = [token for prompt in PROMPTS for token in encode(prompt)]
    sets = worst = 0
    for position in [0, *random.Random(0).sample(range(1, min(len(tokens), 300)), 19)]:
        cache = KVCache(model, position + 20)
        hidden = prefill(model, cache, tokens[:position + 1])
        if position % 2:                                       # write past the position and roll back
            model(as_row(model, tokens[:7]), cache)
            cache.length -= 7
        before = [k[:, :, :cache.length].clone() for k in cache.keys + cache.values]
        fast, plain = optimize(model, cache, hidden, budget), optimize(model, cache, hidden, budget, select_layers_plain)
        assert all(torch.equal(b, k[:, :, :cache.length]) for b, k in zip(before, cache.keys + cache.values)), "cache changed"
        sets += sum(a == b for a, b in zip(fast.skip_sets, plain.skip_sets))
        worst = max(worst, *(abs(a - b) for a, b in zip(fast.cosines, plain.cosines)))
    print(f"fast and plain DP, 20 positions x {budget + 1} budgets: {sets} sets equal, "
          f"largest difference of cosines {worst:.1e}; cache untouched")
    draft_length, cache = args.draft_length, KVCache(model, 300)
    hidden, rows = prefill(model, cache, tokens[:200]), as_row(model, tokens[200:201 + draft_length])
    work = {"step": lambda: model.logits(model(rows[:, :1], cache)[-1]).argmax(-1).tolist(),
            "verify": lambda: model.logits(model(rows, cache)[-1]).argmax(-1).tolist(),
            "dp": lambda: optimize(model, cache, hidden, budget, partial(select_layers, smallest=budget))}       # as decoding does
    timed = {name: [] for name in work}
    for _ in range(30):
        for name, do in work.items():
            start = now()
            do()
            timed[name].append(1000 * (now() - start))
            cache.length = 200
    step, verify, one = (statistics.median(times[5:]) for times in timed.values())
    print(f"medians of 25, interleaved, 200 tokens cached: plain step {step:.2f} ms, verify pass of {draft_length + 1} rows "
          f"{verify:.2f} ms ({verify / step:.2f} steps), DP of budget {budget} {one:.2f} ms = {one / verify:.2f} verify passes")


@torch.inference_mode()
def slice_(args, model, encode):
    """Layers 10 .. 19 searched, the others always run, as the paper does for its Fig. 3b."""
    first, size, tokens = 10, 10, encode(" ".join(PROMPTS[:6]))
    cosine = {name: [[] for _ in range(size + 1)] for name in ("dp", "best", "random")}
    for position in args.positions:
        cache = KVCache(model, position + 64)
        hidden = prefill(model, cache, tokens[:position])
        layer, part = candidate_layer(model, cache, size), hidden[first:first + size + 1]
        selection = select_layers(lambda i, rows: layer(first + i, rows), part, size)
        for budget in range(size + 1):
            found = []
            for skipped in itertools.combinations(range(size), budget):
                x = part[:1]
                for i in range(size):
                    x = x if i in skipped else layer(first + i, x)
                found.append(F.cosine_similarity(x, part[-1:]).item())
            cosine["dp"][budget].append(selection.cosines[budget])
            cosine["best"][budget].append(max(found))
            cosine["random"][budget].append(sum(found) / len(found))
    print(f"cosine with the true state after layer {first + size}, mean of {len(args.positions)} tokens")
    print("| layers skipped of 10 | DP | brute force | mean of all sets |\n|---|---|---|---|")
    for budget in range(size + 1):
        print(f"| {budget} | " + " | ".join(f"{statistics.mean(cosine[name][budget]):.4f}" for name in cosine) + " |")


@torch.inference_mode()
def reject(args, model, encode):
    """One token drafted at each place of greedy text, after true keys and values; the set from up to 16 tokens before."""
    layers, count = len(model.layers), args.max_new_tokens
    budgets = sorted({max(1, round(layers * share)) for share in (.05, .1, .2, .3, .4, .5, .6, .7, .8, .85, .9)})
    far, wrong = {m: [] for m in budgets}, {m: [] for m in budgets}
    for prompt in map(encode, PROMPTS[:args.prompts]):
        cache = KVCache(model, len(prompt) + count)
        text = [*prompt, *autoregressive(model, prompt, count, cache=cache)]
        true, hidden = cache.slots.clone(), torch.stack([state[0] for state in model(as_row(model, text))])
        for start in range(len(prompt), len(text) - 17, 40):
            cache.length = start
            selection = optimize(model, cache, hidden[:, start - 1], max(budgets))
            cache.slots.copy_(true)
            for m, at in itertools.product(budgets, range(start, start + 16)):
                cache.length = at
                drafted = model.logits(model(as_row(model, text[at:at + 1]), cache, selection.skip_sets[m])[-1]).argmax().item()
                cache.slots[..., at, :] = true[..., at, :]
                wrong[m].append(drafted != text[at + 1])
                far[m].append(max(0.0, 2 - 2 * selection.cosines[m]) ** 0.5)
    print("| M | d | rejected | rejected / d |\n|---|---|---|---|")
    for m in budgets:
        d, share = statistics.mean(far[m]), statistics.mean(wrong[m])
        print(f"| {m} | {d:.2f} | {share:.2f} | {share / d:.2f} |")


def blocks(args, model, encode):
    """Greedy; acceptance rate and tau when whole layers are left out and when blocks that take as much time are."""
    costs, layers, k = block_costs(model), len(model.layers), args.draft_length
    print(f"attention to MLP: {costs[0]} to {costs[1]}; {args.prompts} prompts x {args.max_new_tokens} tokens, K {k}\n\n"
          "| M | layers: accepted | tau | blocks: accepted | tau | attention blocks left out | MLP blocks |\n|---|---|---|---|---|---|---|")
    for m in sorted({round(layers * share) for share in (.1, .2, .3, .4, .5, .6, .7, .8, .85, .9)}):
        cells = []
        for model.block_costs in (None, costs):
            all = [Stats() for _ in range(args.prompts)]
            for prompt, stats in zip(PROMPTS, all):
                list(clasp(model, encode(prompt), args.max_new_tokens, skip_layers=m, draft_length=k, stats=stats))
            new, cycles, drafted, accepted = (sum(getattr(s, n) for s in all) for n in ("new_tokens", "cycles", "drafted", "accepted"))
            cells += [f"{accepted / drafted:.3f}", f"{new / cycles:.2f}"]
        sets = [skipped for stats in all for _, skipped in stats.skip_sets]
        cells += [f"{statistics.mean(sum(i % 2 == kind for i in s) for s in sets):.1f}" for kind in (0, 1)]
        print(f"| {m} | {' | '.join(cells)} |", flush=True)


def sweep(args, model, encode):
    """The fastest fixed setting of each group of tasks by a full sweep, then that and ``auto`` interleaved, --repeat times."""
    import bench
    given = {f"--{name.replace('_', '-')}": vars(args)[name] for name in ("model", "device", "dtype", "draft_length")}
    target = bench.Target(bench.arguments([str(word) for pair in given.items() if pair[1] for word in pair]))
    options = bench.arguments(["--max-new-tokens", str(args.max_new_tokens), "--repeat", "1"])
    prompts, layers = bench.ask(target, options, bench.read_questions(options), {}), target.layers
    fresh = [prompt for prompt in prompts if not prompt.question.endswith("0")]          # not those that auto was tried on
    grid = {f"M {m}, threshold {x}, interval {n}": partial(target.clasp, skip_layers=m, exit_threshold=x, opt_interval=n)
            for m in args.skip_layers or [round(layers * share) for share in (.5, .7, .8, .85, .9)]
            for x in (0.0, 0.2, 0.4) for n in (16, 64)}
    plain = {"autoregressive": autoregressive}
    for temperature in args.temperatures:
        seen = bench.interleave(target, options, plain | grid, prompts, [temperature], {})
        groups = list(dict.fromkeys(prompt.group for prompt in prompts))
        best = {group: max(grid, key=lambda name: bench.summary(seen, name, temperature, group).speedup) for group in [*groups, None]}
        methods = plain | {name: grid[name] for name in dict.fromkeys(best.values())} | {"clasp": target.clasp, "auto": target.auto()}
        options.repeat = args.repeat
        lines = bench.interleave(target, options, methods, fresh, [temperature], {})
        print(f"\ntemperature {temperature:g}\n\n| group | best of {len(grid)} fixed settings | its speedup | the model's settings "
              "| auto | auto / best |\n|---|---|---|---|---|---|")
        for group, name in best.items():
            fixed, own, auto = (bench.summary(lines, method, temperature, group).speedup for method in (name, "clasp", "auto"))
            print(f"| {group or 'overall'} | {name} | {fixed:.2f}x | {own:.2f}x | {auto:.2f}x | {auto / fixed:.3f} |", flush=True)
        options.repeat = 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["equal", "dp", "slice", "reject", "blocks", "sweep"])
    parser.add_argument("--model", default=str(BUNDLED))
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--draft-length", type=int)
    parser.add_argument("--skip-layers", type=int, nargs="+")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--positions", type=int, nargs="+", default=[20, 40, 60, 80])
    args = parser.parse_args()
    require(min(args.prompts, args.max_new_tokens, args.repeat, *args.positions) >= 1, "--prompts, --max-new-tokens, --repeat "
            "and --positions must be at least 1")
    folder = find_folder(args.model)
    args.draft_length = args.draft_length or suggested_settings(folder)["draft_length"]
    text, (device, dtype) = Text(folder), choose_device(args.device, args.dtype)
    model = None if args.what == "sweep" else pack(load_model(folder, device, dtype))          # a sweep loads its own
    print(f"{args.what}: {args.model}, {device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads",
          file=sys.stderr)
    what = {"equal": equal, "dp": dp, "slice": slice_, "reject": reject, "blocks": blocks, "sweep": sweep}[args.what]
    what(args, model, lambda prompt: text.encode(prompt, chat=False))


if __name__ == "__main__":
    try:
        main()
    except (ModelError, SettingsError, OSError) as error:
        print("measure.py: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
