"""What is measured for the figures of the paper's §3 and §5. Results are rows for a CSV."""
import random
import statistics
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import fixed
from bench.methods import PLAIN, Method, auto, clasp, random_set
from bench.race import Plan, Prompt, interleave, run
from bench.steps import step_seconds
from bench.table import summary
from bench.target import Target
from dp_skip import Measure, distances, select_layers
from model import KVCache, Llama
from speculative import NO_DRAFT, Clasp, Draft, Text, prefill, require

PERSISTENCE_TOKENS = 128      # new tokens of a text, each with its own set
PERSISTENCE_PROMPTS = 4
FARTHEST = 64                 # tokens between two sets that are compared
CHANCE_DRAWS = 2000           # random sets: how similar by chance?
WINDOW = 10                   # layers whose 2^10 sets are all tried
WINDOW_PROMPTS = 6
ROWS = 64                     # of a pass through a layer, in trying all sets
SWEEP_PROMPTS = 4
ACCEPTANCE_PROMPTS = 20
ACCEPTANCE_SHARES = (2 / 15, 4 / 15, 6 / 15, 1 / 2, 7 / 10)            # of the layers, skipped
RANDOM_SETS = 5
ONE_TOKEN_INTERVAL = 8        # cycles between runs of the DP of one token, where that is best


# ---------------------------------------------------------------------------- sparse persistence

class SetAtEveryToken(Clasp):
    """Runs the DP at every token, and drafts nothing."""

    def __init__(self, model: Llama, skip_layers: int):
        super().__init__(model, skip_layers, opt_interval=1, opt_tokens=1)

    def propose(self, text: Text, most: int) -> Draft:
        return NO_DRAFT


def paper_share(layers: int) -> int:
    """The layers that the paper skips in §3.3: 44 of 80."""
    return layers * 44 // 80


def sets_of_texts(target: Target, prompts: list[Prompt]) -> list[list[frozenset[int]]]:
    """For each prompt, the set that the DP chooses at each new token."""
    method = Method(SetAtEveryToken(target.model, paper_share(target.layers)))
    texts = []
    context = target.model.config.max_position_embeddings
    for prompt in prompts[:PERSISTENCE_PROMPTS]:
        count = min(PERSISTENCE_TOKENS, context - len(prompt.tokens))
        stats, _ = run(target, method, prompt.tokens, count)
        texts.append([skip for _, skip in stats.skip_sets])
    require(all(len(sets) >= 2 for sets in texts),
            f"one of the first {len(texts)} answers is too short to compare sets of its tokens")
    return texts


def similarities(sets: list[frozenset[int]], distance: int) -> list[float]:
    """Jaccard similarities |A and B| / |A or B| of sets that lie ``distance`` tokens apart.

    Two empty sets are alike.
    """
    pairs = zip(sets, sets[distance:])
    return [1.0 if a == b else len(a & b) / len(a | b) for a, b in pairs]


def sparse_persistence(target: Target, texts: list[list[frozenset[int]]]) -> list[dict]:
    """Fig. 3a: how similar the sets of two tokens are, against the tokens between them."""
    budget = paper_share(target.layers)
    draws = random.Random(0)
    by_chance = [frozenset(draws.sample(range(target.layers), budget)) for _ in range(CHANCE_DRAWS)]
    chance = statistics.mean(similarities(by_chance, 1))
    longest = max(len(sets) for sets in texts)
    rows = []
    for distance in range(1, min(FARTHEST + 1, longest)):
        found = chain.from_iterable(similarities(sets, distance) for sets in texts)
        rows.append({
            "distance (tokens)": distance,
            "DP": statistics.mean(found),
            "random sets": chance,
        })
    return rows


def skipped_layers(layers: int, sets: list[frozenset[int]]) -> list[dict]:
    """Which layers are skipped (1) as a text unfolds."""
    rows = []
    for new_tokens, skip in enumerate(sets):
        flags = {f"layer {i}": int(i in skip) for i in range(layers)}
        rows.append({"new tokens": new_tokens} | flags)
    return rows


# ---------------------------------------------------------------------------- the Markov property

class WindowCosines(NamedTuple):
    """Cosines with the true state after a window of layers, by how many of them are skipped."""
    brute_force: list[float]  # of the best of all sets
    dp: list[float]           # of the DP's set
    mean: list[float]         # of all sets


def window_cosines(
    model: Llama,
    cache: KVCache,
    hidden: Tensor,
    first: int,
    size: int,
    measure: Measure = distances,
) -> WindowCosines:
    """§3.5, on layers first .. first + size - 1 of the last T tokens in the cache; all others run.

    hidden (L+1, T, hidden size): their states. The cache has room for ROWS * T rows.
    """
    layer = model.candidate_layer(cache, ROWS, tokens=hidden.shape[1])
    window = hidden[first:first + size + 1]
    selection = select_layers(
        lambda i, rows: layer(first + i, rows), window, size, measure=measure)

    states = window[:1]                                    # of all sets of the layers so far
    skipped = torch.zeros(1, dtype=torch.long)             # how many layers each leaves out
    for i in range(size):
        after = [layer(first + i, rows) for rows in states.split(ROWS)]
        states = torch.cat([*after, states])               # run the layer, or skip it
        skipped = torch.cat([skipped, skipped + 1])

    cosines = F.cosine_similarity(states.float(), window[-1:].float(), dim=-1).mean(-1).cpu()
    by_count = [cosines[skipped == count] for count in range(size + 1)]
    return WindowCosines(
        brute_force=[some.max().item() for some in by_count],
        dp=selection.cosines,
        mean=[some.mean().item() for some in by_count],
    )


def middle_window(layers: int) -> tuple[int, int]:
    """First layer and size of the window of the figure."""
    return max(0, layers - WINDOW) // 2, min(WINDOW, layers)


def markov(target: Target, prompts: list[Prompt]) -> list[dict]:
    """Fig. 3b: the DP's set, the best of all sets and their mean; means over prompts."""
    first, size = middle_window(target.layers)
    found = []
    for prompt in prompts[:WINDOW_PROMPTS]:
        cache = KVCache(target.model, len(prompt.tokens), ROWS)
        hidden = prefill(target.model, cache, prompt.tokens)[:, -1:]
        found.append(window_cosines(target.model, cache, hidden, first, size))
    means = torch.tensor(found).mean(0)                    # (3, size + 1)
    names = ("brute force", "DP", "random")
    return [
        {f"layers skipped of {first} to {first + size - 1}": count} | dict(zip(names, cosines))
        for count, cosines in enumerate(means.T.tolist())
    ]


# ---------------------------------------------------------------------------- which set?

def acceptance(target: Target, prompts: list[Prompt], others: list[Prompt]) -> list[dict]:
    """The share of drafted tokens accepted, for each number M of layers skipped.

    Of the DP over one token and over as many as ``Clasp`` takes, and of fixed sets chosen on other
    prompts.
    """
    length = target.draft_length
    texts = written(target, prompts, length)
    other_texts = written(target, others, length)
    budgets = sorted({max(1, round(share * target.layers)) for share in ACCEPTANCE_SHARES})
    rows = []
    for budget in budgets:
        by_block = partial(fixed.first_tokens_right, other_texts)
        block = max(fixed.blocks(target.layers, budget), key=by_block)
        sets = {
            "best fixed set": fixed.best_fixed_set(other_texts, budget),
            "most frequent": fixed.most_frequent(other_texts, budget),
            "best block": block,
        }
        by_chance = [
            fixed.share_accepted(texts, frozenset(random_set(target.layers, budget, seed)))
            for seed in range(RANDOM_SETS)
        ]
        rows.append({
            "M": budget,
            "DP, 1 token": fixed.share_accepted_by_dp(texts, budget, 1, ONE_TOKEN_INTERVAL),
            "DP": fixed.share_accepted_by_dp(
                texts, budget, target.settings["opt_tokens"], target.settings["opt_interval"]),
            **{name: fixed.share_accepted(texts, skip) for name, skip in sets.items()},
            "random": statistics.mean(by_chance),
            **{f"the {name}": " ".join(map(str, sorted(skip))) for name, skip in sets.items()},
        })
    return rows


def written(target: Target, prompts: list[Prompt], length: int) -> list[fixed.Written]:
    """The prompts with their answers, as far as these are long enough for two drafts."""
    opt_tokens = target.settings["opt_tokens"]
    texts = [
        fixed.Written(target.model, prompt.tokens, prompt.answer, length, opt_tokens)
        for prompt in prompts if len(prompt.answer) > 2 * length + 2
    ]
    require(len(texts) >= 1, f"no answer is longer than two drafts of {length} tokens")
    return texts


# ---------------------------------------------------------------------------- where the time goes

def breakdown(target: Target, prompts: list[Prompt], plan: Plan) -> list[dict]:
    """Fig. 3c: shares of CLaSp's time; and the DP, packed and cell by cell, in verify passes."""
    methods = {PLAIN: Method(None), "clasp": clasp(target)}
    found = summary(interleave(target, methods, prompts, plan, {}), "clasp")
    rows = [
        {"what": f"{part} (share of decoding)", "value": getattr(found, part)}
        for part in ("rest", "optimize", "verify", "draft")
    ]
    seconds = step_seconds(target, prompts[0].tokens, repeat=9)
    for name in ("DP of one token, cell by cell", "DP of one token", "DP", "verify pass"):
        rows.append({"what": f"{name} (passes)", "value": seconds[name] / seconds["verify pass"]})
    return rows


# ---------------------------------------------------------------------------- sweeps

def sweep_values(target: Target) -> dict[str, list]:
    """Of each setting of CLaSp, the values that are tried."""
    twentieths = (2, 4, 6, 8, 10, 12, 14, 16, 18, 19)
    budgets = {target.layers * share // 20 for share in twentieths}
    return {
        "skip_layers": sorted(budgets | {target.settings["skip_layers"]}),
        "opt_interval": [1, 2, 4, 8, 16, 32, 64, 128],
        "exit_threshold": [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9],
    }


def sweep(target: Target, prompts: list[Prompt], plan: Plan, setting: str) -> list[dict]:
    """Figs. 4a to 4c: speedup and tau for each value of one setting, all interleaved with auto."""
    values = sweep_values(target)[setting]
    methods = {value: clasp(target, **{setting: value}) for value in values}
    methods |= {PLAIN: Method(None), "auto": auto(target)}
    lines = interleave(target, methods, prompts[:SWEEP_PROMPTS], plan, {})
    speedup_of_auto = summary(lines, "auto").speedup
    rows = []
    for value in values:
        found = asdict(summary(lines, value))
        rows.append({setting: value, "speedup of auto": speedup_of_auto} | found)
    return rows


def bounds(rows: list[dict]) -> list[dict]:
    """Of the rows of a sweep over skip_layers: the cost model's bound, and what was measured."""
    return [
        {
            "bound, tau / (1 + g c)": row["bound"],
            "0.9 of it": 0.9 * row["bound"],
            "measured": row["speedup"],
            "M": row["skip_layers"],
        }
        for row in sorted(rows, key=lambda row: row["bound"])
    ]
