"""Figures of the open questions, as Markdown tables: for those who mark them.

    python assignments/measure.py        questions A, B and C on the bundled model, 3 minutes

The leaderboard's prompts, loop and counts. Methods take turns, so that a busy machine slows all.
"""
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import leaderboard
from checks.common import golden
from entry import SETTINGS

from checkpoint import BUNDLED, load_model
from extras.auto import Auto
from extras.lookup import Lookup
from speculative import Clasp, Stats, decode

ROUNDS = 2
INTERVALS = (1, 2, 4, 8, 16, 32, 64, 128)
DISTANCES = (1, 2, 4, 8, 16, 32)
PAPER = SETTINGS | {"opt_tokens": 1}                   # the DP of one token, as in the paper


def measured(model, entries: dict) -> dict:
    """For each entry (settings, or a function that makes a drafter): its counts, with seconds."""
    counts = defaultdict(Counter)
    for is_timed in [False] + [True] * ROUNDS:
        for text in golden()["texts"]:
            plain, _ = leaderboard.run(leaderboard.plain_decoding, model, text, "plain decoding")
            for name, entry in entries.items():
                seconds, counted = leaderboard.run(decoding(entry), model, text, str(name))
                if is_timed:
                    counts[name].update(counted, seconds=seconds, plain=plain)
    return counts


def decoding(entry):
    if isinstance(entry, dict):
        return leaderboard.entry_decoding(SimpleNamespace(SETTINGS=entry, DRAFTER=None))
    return leaderboard.entry_decoding(SimpleNamespace(SETTINGS={}, DRAFTER=entry))


def tau(count: Counter) -> float:
    return count["tokens"] / count["passes"]


def speedup(count: Counter) -> float:
    return count["plain"] / count["seconds"]


def how_much(model):
    layers = len(model.layers)
    counts = measured(model, {m: PAPER | {"skip_layers": m} for m in range(layers)})
    print("| M | tau | speedup | bound tau / (1 + g c) |\n|---|---|---|---|")
    for m, count in counts.items():
        drafted = count["drafted"] / count["passes"]
        bound = tau(count) / (1 + drafted * (layers - m) / layers)
        print(f"| {m} | {tau(count):.2f} | {speedup(count):.2f} | {bound:.2f} |")


def when(model):
    similar = defaultdict(list)
    shares = {}
    for interval in INTERVALS:
        stats = [sampled(model, text, interval) for text in golden()["texts"]]
        spent = sum(one.optimize_seconds for one in stats)
        shares[interval] = spent / sum(one.seconds for one in stats)
        if interval == 1:
            for one in stats:
                note_similarity(one.skip_sets, similar)
    print("\n| distance in tokens | mean Jaccard similarity |\n|---|---|")
    for distance, values in similar.items():
        print(f"| {distance} | {sum(values) / len(values):.2f} |")
    counts = measured(model, {n: PAPER | {"opt_interval": n} for n in INTERVALS})
    print("\n| N | tau | speedup | share of time in the DP |\n|---|---|---|---|")
    for n, count in counts.items():
        print(f"| {n} | {tau(count):.2f} | {speedup(count):.2f} | {shares[n]:.0%} |")


def sampled(model, text: dict, interval: int) -> Stats:
    stats = Stats()
    drafter = Clasp(model, **PAPER | {"opt_interval": interval})
    list(decode(model, text["prompt"], leaderboard.TOKENS, drafter, stats=stats))
    return stats


def note_similarity(sets: list[tuple[int, frozenset]], similar: dict):
    """|a & b| / |a | b| of each set and the first one chosen at least so many tokens later."""
    for distance in DISTANCES:
        for at, chosen in sets:
            later = [other for n, other in sets if n >= at + distance]
            if later:
                similar[distance].append(len(chosen & later[0]) / len(chosen | later[0]))


def drafters(model):
    entries = {
        "entry.py as handed out": SETTINGS,
        "the last words again (extras/lookup.py)": lambda model: Lookup(),
        "layers or words, whichever pays (extras/auto.py)": Auto,
    }
    print("\n| drafter | tau | speedup |\n|---|---|---|")
    for name, count in measured(model, entries).items():
        print(f"| {name} | {tau(count):.2f} | {speedup(count):.2f} |")


def main():
    torch.set_num_threads(1)
    model = load_model(BUNDLED)
    how_much(model)
    when(model)
    drafters(model)


if __name__ == "__main__":
    main()
