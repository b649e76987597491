"""--speed: what each step of a cycle costs beside a plain step, and a plain step beside others.

``step_seconds`` and ``rival_seconds`` measure, ``report`` writes it down.
"""
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch

from bench.target import Target
from dp_skip import select_layers, select_layers_plain
from model import Llama
from speculative import (
    FixedSet,
    Text,
    autoregressive,
    clock,
    full_pass,
    new_text,
    optimize,
)

WARM_UP = 2                   # untimed runs of each piece of work
FEW_ROWS = 8                  # of a pass that shows what more rows cost
GENERATED = 48                # tokens of a text, beside transformers
START = 4                     # tokens of its prompt


def timed(model: Llama, work: dict[str, Callable], repeat: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, ``repeat`` times, all in turn, after a warm-up."""
    now = clock(model)
    seconds = defaultdict(list)
    for _ in range(WARM_UP + repeat):
        for name, do in work.items():
            start = now()
            do()
            seconds[name].append(now() - start)
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def step_seconds(target: Target, prompt: list[int], repeat: int) -> dict[str, float]:
    """Seconds of each kind of work after a prompt: medians."""
    model = target.model
    budget = target.settings["skip_layers"]
    rows = target.draft_length + 1
    pending = prompt[-1]
    tokens = target.settings["opt_tokens"]
    text, hidden = new_text(model, [*prompt, pending], FEW_ROWS, width=target.width,
                            scratch=tokens * target.layers)
    choose = partial(optimize, model, text.cache, hidden[:, -1])
    skip = choose(budget).skip_sets[budget]
    drafter = FixedSet(skip, 1, target.settings["exit_threshold"])
    half = target.layers // 2

    def choose_one(budget: int, tokens: int = 1):
        """As decoding does: for one number of layers to skip."""
        select = partial(select_layers, smallest=budget)
        optimize(model, text.cache, hidden[:, -tokens:], budget, select)

    work = {
        "plain step": partial(full_step, text, 1),
        "verify pass": partial(full_step, text, rows, target.width),
        f"{FEW_ROWS} rows": partial(full_step, text, FEW_ROWS),
        "head": lambda: model.logits(hidden[-1:, -1:]).argmax().item(),
        "draft token": partial(draft_step, text, drafter),
        "DP": partial(choose_one, budget, tokens),
        "DP of one token": partial(choose_one, budget),
        f"DP of one token, M = {half}": partial(choose_one, half),
        "DP of one token, every M": partial(choose, budget),
        "DP of one token, cell by cell": partial(choose, budget, select_layers_plain),
    }
    taken = timed(model, work, repeat)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def full_step(text: Text, rows: int, width: int | None = None):
    """A pass of the whole model on so many tokens, and its choices on the host."""
    tokens = text.tokens[-1:] * rows
    _, logits = full_pass(text.model, text.cache, tokens, width)
    logits.argmax(-1).tolist()
    text.roll_back()


def draft_step(text: Text, drafter: FixedSet):
    drafter.propose(text, 1)
    text.roll_back()


def rival_seconds(target: Target, start: list[int], repeat: int) -> dict[str, list[float]]:
    """"read": a sum over a large tensor; "ours" and "theirs": a text, here and by transformers.

    Random weights have no folder that transformers could read.
    """
    large = large_tensor(target)
    work = {"read": large.sum}
    if target.tokenizer:
        ours = partial(autoregressive, target.model, start, GENERATED)
        work["ours"] = lambda: list(ours())
        work["theirs"] = generate_of_transformers(target, start)
    return timed(target.model, work, repeat)


def large_tensor(target: Target) -> torch.Tensor:
    """Far larger than any cache of the device."""
    size = 2 ** 26 if target.model.device.type == "cpu" else 2 ** 28
    return torch.zeros(size, device=target.model.device)


def generate_of_transformers(target: Target, start: list[int]) -> Callable:
    from transformers import AutoModelForCausalLM
    folder = target.tokenizer.folder
    dtype = target.model.embed.weight.dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(target.model.device)
    ids = torch.tensor([start], device=target.model.device)
    return partial(model.generate, ids, max_new_tokens=GENERATED, min_new_tokens=GENERATED,
                   do_sample=False)


# ---------------------------------------------------------------------------- formatting

def report(
    target: Target, tokens: int, steps: dict[str, float], rivals: dict[str, list[float]]
) -> str:
    """A page in Markdown. tokens: of the prompt before the steps."""
    plain = steps["plain step"]
    verify = steps["verify pass"]
    page = [
        f"# Steps: {target.name}\n",
        f"{target.where}; settings {target.settings}; after {tokens} tokens; medians of "
        "interleaved runs.\n",
        "| | time | plain steps | verify passes |",
        "|---|---|---|---|",
    ]
    for name, seconds in steps.items():
        page.append(f"| {name} | {1e3 * seconds:.2f} ms | {seconds / plain:.2f} "
                    f"| {seconds / verify:.2f} |")
    page += ["", reading(target, steps, rivals["read"])]
    if "theirs" in rivals:
        pairs = list(zip(rivals["theirs"], rivals["ours"]))
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        page += ["", f"Plain decoding is {ratio:.2f}x as fast as transformers' generate "
                     f"({GENERATED} tokens after {START}, {len(pairs)} pairs)."]
    return "\n".join(page) + "\n"


def reading(target: Target, steps: dict[str, float], sums: list[float]) -> str:
    """How near a plain step comes to what memory can give, and a draft token to its share."""
    plain = steps["plain step"]
    head = steps["head"]
    rate = target.bytes_read / plain / 1e9
    large = large_tensor(target).nbytes
    best = large / min(sums) / 1e9
    run = 1 - target.settings["skip_layers"] / target.layers
    share = (plain - head) * run + head                   # what a draft token should take
    return (f"A plain step reads {target.bytes_read / 1e6:.0f} MB at {rate:.1f} GB/s, sums over "
            f"{large / 1e6:.0f} MB read at best {best:.1f} GB/s: {rate / best:.2f} of it. A draft "
            f"token costs {steps['draft token'] / share:.2f} of its share of the layers and the "
            "head.")
