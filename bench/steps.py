"""--speed: what each step of a cycle costs beside a plain step, and a plain step beside others.

``step_seconds`` and ``rival_seconds`` measure, ``report`` writes it down.
"""
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch

from bench.target import Target
from dp_skip import select_layers, select_layers_plain
from model import Config, Llama
from speculative import (
    FixedSet,
    Text,
    autoregressive,
    clock,
    full_pass,
    measure_of,
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
    text, hidden = new_text(model, [*prompt, pending], max(rows, FEW_ROWS), width=target.width,
                            scratch=tokens * target.layers)
    choose = partial(optimize, model, text.cache, hidden[:, -1])
    skip = choose(budget).skip_sets[budget]
    drafter = FixedSet(skip, 1, target.settings["exit_threshold"])
    half = target.layers // 2

    def choose_one(budget: int, tokens: int = 1):
        """As decoding does: for one number of layers to skip."""
        select = partial(select_layers, smallest=budget, measure=measure_of(tokens))
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
    """A text, by plain decoding here ("ours") and by transformers ("theirs").

    Random weights have no folder that transformers could read.
    """
    if target.tokenizer is None:
        return {}
    ours = partial(autoregressive, target.model, start, GENERATED)
    work = {
        "ours": lambda: list(ours()),
        "theirs": generate_of_transformers(target, start),
    }
    return timed(target.model, work, repeat)


def read_rate(device: torch.device, repeat: int) -> float:
    """Bytes a second at which a sum reads a tensor far larger than any cache, at best.

    Of random numbers, since memory may be cleverer about zeros. A GPU is asked for its own time.
    """
    numbers = 2 ** 26
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        numbers = min(2 ** 31, free // 8)                # 8 GiB, or half of what is free
    large = torch.rand(numbers, device=device)
    seconds = [seconds_of(large.sum, device) for _ in range(WARM_UP + repeat)]
    return large.nbytes / min(seconds[WARM_UP:])


def seconds_of(work: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def generate_of_transformers(target: Target, start: list[int]) -> Callable:
    from transformers import AutoModelForCausalLM
    folder = target.tokenizer.folder
    dtype = target.model.embed.weight.dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(target.model.device)
    ids = torch.tensor([start], device=target.model.device)
    return partial(model.generate, ids, max_new_tokens=GENERATED, min_new_tokens=GENERATED,
                   do_sample=False)


def generate_by(config: Config, device: torch.device, dtype: torch.dtype) -> Callable:
    """transformers' greedy generate(prompt, count) with random weights and a static cache.

    On a GPU that decodes by a compiled forward.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    with device:
        model = LlamaForCausalLM(LlamaConfig(**vars(config))).to(dtype).eval()

    def generate(prompt: list[int], count: int):
        ids = torch.tensor([prompt], device=device)
        return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                              cache_implementation="static")

    return generate


# ---------------------------------------------------------------------------- formatting

def report(
    target: Target, tokens: int, steps: dict[str, float], rate: float,
    rivals: dict[str, list[float]]
) -> str:
    """A page in Markdown. tokens: of the prompt before the steps. rate: see ``read_rate``."""
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
    page += ["", reading(target, steps, rate)]
    if rivals:
        pairs = list(zip(rivals["theirs"], rivals["ours"]))
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        page += ["", f"Plain decoding is {ratio:.2f}x as fast as transformers' generate "
                     f"({GENERATED} tokens after {min(START, tokens)}, {len(pairs)} pairs)."]
    return "\n".join(page) + "\n"


def reading(target: Target, steps: dict[str, float], best: float) -> str:
    """How near a plain step comes to what memory can give, and a draft token to its share."""
    rate = target.bytes_read / steps["plain step"]
    return (f"A plain step reads {target.bytes_read / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s, a sum "
            f"over random numbers reads at best {best / 1e9:.1f} GB/s: {rate / best:.2f} of it. A "
            f"draft token costs {draft_share(target, steps):.2f} of its share of the layers and "
            "the head.")


def draft_share(target: Target, steps: dict[str, float]) -> float:
    """What a draft token costs, in what the layers that it runs and the head cost a plain step."""
    run = 1 - target.settings["skip_layers"] / target.layers
    layers = steps["plain step"] - steps["head"]
    return steps["draft token"] / (layers * run + steps["head"])
