"""What extras/auto.py rests on, and how well it does; see results/auto.md.

    python tools/study_auto.py reject [--model M]   share of drafted tokens that are rejected,
                                                    against the distance d that the DP tells
    python tools/study_auto.py sweep  [--model M]   auto against every fixed setting
                                                    M x threshold x interval, by group of tasks
"""
import itertools
import statistics
import sys
from collections import defaultdict
from dataclasses import replace

import torch
from common import Setup, load, new_parser, require_positive, run_tool  # and the path

from bench import methods
from bench.methods import PLAIN, Method
from bench.prompts import HELD_OUT, read_questions
from bench.race import Plan, ask, interleave
from bench.table import summary
from bench.target import load_target
from extras.skipping import distance_of
from model import KVCache
from speculative import as_row, autoregressive, optimize, require

# ---------------------------------------------------------------------------- reject

SHARES = (.05, .1, .2, .3, .4, .5, .6, .7, .8, .85, .9)    # of all layers that are skipped
SPACING = 40                  # tokens between runs of the DP
DRAFTED = 16                  # places, after each, at which a token is drafted


@torch.inference_mode()
def reject(args):
    """One token drafted at each place of greedy text, after true keys and values.

    The set is chosen up to 16 tokens before.
    """
    setup = load(args)
    layers = len(setup.model.layers)
    budgets = sorted({max(1, round(layers * share)) for share in SHARES})
    distances = defaultdict(list)
    rejected = defaultdict(list)
    for opening in HELD_OUT[:args.prompts]:
        for budget, distance, is_wrong in drafted_tokens(setup, opening, budgets):
            distances[budget].append(distance)
            rejected[budget].append(is_wrong)
    require(distances, f"the texts are too short: no {DRAFTED} tokens follow a run of the DP")
    print("| M | d | rejected | rejected / d |\n|---|---|---|---|")
    for budget in budgets:
        d = statistics.mean(distances[budget])
        share = statistics.mean(rejected[budget])
        print(f"| {budget} | {d:.2f} | {share:.2f} | {share / d:.2f} |")


def drafted_tokens(setup: Setup, opening: str, budgets: list[int]):
    """Yields (budget, d of its set, was the token rejected?)."""
    model = setup.model
    prompt = setup.encode(opening)
    count = setup.args.max_new_tokens
    cache = KVCache(model, len(prompt) + count)
    text = [*prompt, *autoregressive(model, prompt, count, cache=cache)]
    true = cache.slots.clone()
    hidden = torch.stack([state[0] for state in model(as_row(model, text))])   # (L+1, tokens, ..)
    for start in range(len(prompt), len(text) - DRAFTED - 1, SPACING):
        cache.length = start
        selection = optimize(model, cache, hidden[:, start - 1], max(budgets))
        cache.slots.copy_(true)
        for budget, place in itertools.product(budgets, range(start, start + DRAFTED)):
            skip = selection.skip_sets[budget]
            cache.length = place
            states = model(as_row(model, text[place:place + 1]), cache, skip)
            drafted = model.logits(states[-1]).argmax().item()
            cache.slots[..., place, :] = true[..., place, :]
            yield budget, distance_of(selection.cosines[budget]), drafted != text[place + 1]


# ---------------------------------------------------------------------------- sweep

SWEPT_SHARES = (.5, .7, .8, .85, .9)
THRESHOLDS = (0.0, 0.2, 0.4)
INTERVALS = (16, 64)


@torch.inference_mode()
def sweep(args):
    """The fastest fixed setting of each group, once; then that and auto, --repeat times."""
    target = load_target(args)
    budgets = args.budgets or swept_budgets(target.layers)
    once = Plan(args.max_new_tokens, repeat=1)
    prompts = ask(target, read_questions(limit=args.prompts), args.max_new_tokens, {})
    fresh = [prompt for prompt in prompts if not is_tried_on(prompt.question)]
    require(fresh, "no prompt is left beside each group's first, on which auto was tried")
    groups = [*dict.fromkeys(prompt.group for prompt in fresh), None]
    grid = {
        f"M {budget}, threshold {threshold}, interval {interval}": methods.clasp(
            target, skip_layers=budget, exit_threshold=threshold, opt_interval=interval)
        for budget in budgets for threshold in THRESHOLDS for interval in INTERVALS
    }
    plain = {PLAIN: Method(None)}
    for temperature in args.temperatures:
        plan = replace(once, temperatures=(temperature,))
        lines = interleave(target, plain | grid, prompts, plan, {})
        best = {group: fastest(lines, list(grid), temperature, group) for group in groups}
        rivals = {name: grid[name] for name in dict.fromkeys(best.values())}
        rivals |= {"clasp": methods.clasp(target), "auto": methods.auto(target)}
        plan = replace(plan, repeat=args.repeat)
        lines = interleave(target, plain | rivals, fresh, plan, {})
        print_comparison(lines, best, len(grid), temperature)


def swept_budgets(layers: int) -> list[int]:
    """Numbers of layers to skip, of a model with so many: not all of them."""
    return sorted({min(round(layers * share), layers - 1) for share in SWEPT_SHARES})


def is_tried_on(question: str) -> bool:
    """The first prompt of each group served to choose auto's constants."""
    return question.endswith("0")


def fastest(lines: list[dict], names: list[str], temperature: float, group: str | None) -> str:
    speedups = {name: summary(lines, name, temperature, group).speedup for name in names}
    return max(speedups, key=speedups.get)


def print_comparison(lines: list[dict], best: dict, settings: int, temperature: float):
    print(f"\ntemperature {temperature:g}\n\n| group | best of {settings} fixed settings | its "
          "speedup | the model's settings | auto | auto / best |\n|---|---|---|---|---|---|")
    for group, name in best.items():
        fixed, suggested, auto = (
            summary(lines, method, temperature, group).speedup for method in (name, "clasp", "auto")
        )
        print(f"| {group or 'overall'} | {name} | {fixed:.2f}x | {suggested:.2f}x | {auto:.2f}x "
              f"| {auto / fixed:.3f} |", flush=True)


# ---------------------------------------------------------------------------- which

STUDIES = {"reject": reject, "sweep": sweep}


def main():
    parser = new_parser(__doc__.splitlines()[0], list(STUDIES))
    parser.add_argument("--budgets", type=int, nargs="+", metavar="M",
                        help="sweep: numbers of layers to skip; default: 50 to 90 %% of them")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    require_positive(args.prompts, args.max_new_tokens, args.repeat)
    STUDIES[args.what](args)


if __name__ == "__main__":
    sys.exit(run_tool("study_auto.py", main))
