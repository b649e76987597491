"""The leaderboard's line: speed and tau of entry.py's settings on the bundled model, against plain decoding.

Greedy, a few prompts, both methods in turn in one process, so that a busy machine slows both. The text must be the
one that the reference writes (checks/golden.json), so only speed can be won. tau does not depend on the machine.
"""
import time
from pathlib import Path

from checks.common import Wrong, golden

PROMPTS = ("Once upon a time, in a great forest, there lived an old witch", "The king had three daughters, and the youngest",
           "A poor miller had", "When the prince came to the castle", "There was once a fisherman who")
TOKENS, ROUNDS = 64, 3


def prompts() -> list[list[int]]:
    from generate import BUNDLED, Text
    text = Text(BUNDLED)
    return [text.encode(prompt, chat=False) for prompt in PROMPTS]


def measure() -> dict:
    """{"line": text for people, "values": {name: number}}. Raises Wrong if the text is not the whole model's own."""
    import entry
    from generate import BUNDLED
    from model import load_model
    from speculative import Stats, autoregressive, clasp
    model, settings = load_model(BUNDLED), entry.SETTINGS | ({"optimizer": entry.OPTIMIZER} if entry.OPTIMIZER else {})
    seconds, count = {"clasp": 0., "plain decoding": 0.}, {"new_tokens": 0, "cycles": 0, "drafted": 0, "accepted": 0}
    for round_ in range(ROUNDS + 1):
        for text, prompt, expected in zip(PROMPTS, prompts(), golden()["texts"]):
            expected = expected[:TOKENS]
            for name in seconds:
                stats, start = Stats(), time.perf_counter()
                got = list(clasp(model, prompt, TOKENS, stats=stats, **settings) if name == "clasp"
                           else autoregressive(model, prompt, TOKENS, stats=stats))
                if round_ > 0:                                 # the first warms up
                    seconds[name] += time.perf_counter() - start
                    for field in count if name == "clasp" else ():
                        count[field] += getattr(stats, field)
                if got != expected:
                    at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)))
                    raise Wrong(f"The greedy text of {name} is the whole model's own", f"prompt {text!r}, new token {at}: "
                                f"expected {expected[at:at + 1]}, got {got[at:at + 1]}")
    speedup, tau = seconds["plain decoding"] / seconds["clasp"], count["new_tokens"] / count["cycles"]
    line = (f"speedup {speedup:.2f}x, tau {tau:.2f}, {count['accepted']} of {count['drafted']} drafted tokens accepted, "
            f"{count['new_tokens'] / seconds['clasp']:.0f} tokens/s; {len(PROMPTS)} texts of {TOKENS} tokens, all the whole model's own")
    return {"line": line, "values": {"speedup": round(speedup, 2), "tau": round(tau, 2)}}
