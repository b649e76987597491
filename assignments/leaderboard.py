"""The leaderboard's line: speed and tau of entry.py on the bundled model, against plain decoding.

Greedy, a few prompts, both methods in turn in one process, so that a busy machine slows both. The
text must be the one that the reference writes (checks/golden.json), so only speed can be won. tau
does not depend on the machine.
"""
import time
from collections import Counter

from checks.common import PropertyError, golden

TOKENS = 64                   # of each text
ROUNDS = 3                    # that are timed, after one that warms up
COUNTED = ("new_tokens", "cycles", "drafted", "accepted")


def measure() -> dict:
    """{"line": text for people, "values": {name: number}}.

    Raises PropertyError if a text is not the whole model's own.
    """
    from checkpoint import BUNDLED, load_model
    model = load_model(BUNDLED)
    seconds = Counter()
    counts = Counter()
    for timed in [False] + [True] * ROUNDS:
        for text in golden()["texts"]:
            for decoder in (plain_decoding, entry_decoding):
                start = time.perf_counter()
                stats = decoder(model, text)
                if not timed:
                    continue
                seconds[decoder] += time.perf_counter() - start
                if decoder is entry_decoding:
                    counts.update({name: getattr(stats, name) for name in COUNTED})
    speedup = seconds[plain_decoding] / seconds[entry_decoding]
    tau = counts["new_tokens"] / counts["cycles"]
    speed = counts["new_tokens"] / seconds[entry_decoding]
    line = (f"speedup {speedup:.2f}x, tau {tau:.2f}, {counts['accepted']} of {counts['drafted']} "
            f"drafted tokens accepted, {speed:.0f} tokens/s; {len(golden()['texts'])} texts of "
            f"{TOKENS} tokens, all the whole model's own")
    return {"line": line, "values": {"speedup": round(speedup, 2), "tau": round(tau, 2)}}


def plain_decoding(model, text: dict):
    from speculative import Stats, autoregressive
    stats = Stats()
    tokens = list(autoregressive(model, text["prompt"], TOKENS, stats=stats))
    compare("plain decoding", text, tokens)
    return stats


def entry_decoding(model, text: dict):
    """By entry.py's drafter."""
    import entry

    from speculative import Clasp, Stats, decode
    if entry.DRAFTER is None:
        drafter = Clasp(model, **entry.SETTINGS)
    else:
        drafter = entry.DRAFTER(model)
    stats = Stats()
    tokens = list(decode(model, text["prompt"], TOKENS, drafter, stats=stats))
    compare("entry.py", text, tokens)
    return stats


def compare(name: str, text: dict, tokens: list[int]):
    expected = text["tokens"][:TOKENS]
    if tokens == expected:
        return
    equal = [a == b for a, b in zip(tokens, expected)]
    at = [*equal, False].index(False)
    raise PropertyError(
        f"The greedy text of {name} is the whole model's own",
        f"prompt {text['text']!r}, new token {at}: expected {expected[at:at + 1]}, got "
        f"{tokens[at:at + 1]}")
