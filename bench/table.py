"""The paper's Table 1: what the lines of ``race.interleave`` come to, in Markdown and as CSV."""
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.methods import PLAIN, UNPADDED
from bench.race import KEPT, Plan
from bench.target import Target


@dataclass
class Summary:
    """What the runs of one method come to."""
    runs: int
    identical: int            # texts equal to plain decoding's greedy one
    wall: float               # seconds that passed outside, without the prefill
    new_tokens: int
    prefill_seconds: float
    seconds: float            # of decoding: the next three together
    draft_seconds: float
    verify_seconds: float
    optimize_seconds: float
    cycles: int
    drafted: int
    accepted: int
    optimizations: int
    # Over prompts: plain decoding's seconds for a token, divided by the method's.
    lower_quartile: float
    speedup: float
    upper_quartile: float
    tokens_per_second: float  # median over texts
    tau: float                # acceptance length: tokens per pass of the whole model
    g: float                  # drafted tokens per pass
    accepted_share: float
    pass_seconds: float       # of a pass of the whole model
    c: float                  # a draft token's time in passes
    bound: float              # the cost model's speedup: tau / (1 + g c)
    rest: float               # shares of ``wall``; the rest is the loop itself
    draft: float
    verify: float
    optimize: float


def quartiles(values: list[float]) -> list[float]:
    """Three, of one value or more; never outside of them."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def summary(
    lines: list[dict], method: str, temperature: float = 0.0, group: str | None = None
) -> Summary:
    """Of one method at one temperature, in one group of tasks or in all."""
    lines = [
        line for line in lines
        if line["key"][2] == temperature and group in (None, line["group"])
    ]
    runs = [line for line in lines if line["key"][-1] == method]
    total = {name: sum(line[name] for line in runs) for name in ("identical", "wall", *KEPT)}
    ratios = speedups(lines, method)
    lower, middle, upper = quartiles(ratios)
    tau = total["new_tokens"] / total["cycles"]
    g = total["drafted"] / total["cycles"]
    pass_seconds = total["verify_seconds"] / total["cycles"]
    c = 0.0                                            # where nothing was drafted
    if total["drafted"]:
        c = total["draft_seconds"] / total["drafted"] / pass_seconds
    wall = total["wall"]
    return Summary(
        **total,
        runs=len(runs),
        lower_quartile=lower,
        speedup=middle,
        upper_quartile=upper,
        tokens_per_second=statistics.median(
            line["new_tokens"] / line["seconds"] for line in runs),
        tau=tau,
        g=g,
        accepted_share=total["accepted"] / max(1, total["drafted"]),
        pass_seconds=pass_seconds,
        c=c,
        bound=tau / (1 + g * c),
        rest=1 - total["seconds"] / wall,
        draft=total["draft_seconds"] / wall,
        verify=total["verify_seconds"] / wall,
        optimize=total["optimize_seconds"] / wall,
    )


def speedups(lines: list[dict], method: str) -> list[float]:
    """For each prompt: plain decoding's seconds for a token, divided by the method's.

    Both are medians over the repetitions.
    """
    paces = defaultdict(list)
    for line in lines:
        question, turn, _, _, name = line["key"]
        paces[question, turn, name].append(line["seconds"] / line["new_tokens"])
    medians = {key: statistics.median(pace) for key, pace in paces.items()}
    return [
        medians[question, turn, PLAIN] / median
        for (question, turn, name), median in medians.items()
        if name == method
    ]


# ---------------------------------------------------------------------------- formatting

def table(target: Target, plan: Plan, lines: list[dict]) -> tuple[str, list[dict]]:
    """The table in Markdown, and the rows of the CSV beside it."""
    methods = list(dict.fromkeys(line["key"][-1] for line in lines))
    groups = list(dict.fromkeys(line["group"] for line in lines))
    page = [title(target, plan, lines)]
    rows = []
    for temperature in plan.temperatures:
        found = {name: by_group(lines, name, temperature, groups) for name in methods}
        page += section(found, temperature, groups)
        rows += csv_rows(found, temperature)
    return "\n".join(page) + "\n", rows


def by_group(
    lines: list[dict], method: str, temperature: float, groups: list[str]
) -> dict[str | None, Summary]:
    """Summaries of a method by group; overall: None."""
    return {group: summary(lines, method, temperature, group) for group in [*groups, None]}


def title(target: Target, plan: Plan, lines: list[dict]) -> str:
    prompts = {tuple(line["key"][:2]) for line in lines}  # question and turn
    return (
        f"# {target.name}\n\n{target.where}. {target.layers} layers, CLaSp's settings "
        f"{target.settings}; {target.auto_means}. At most {plan.max_new_tokens} new tokens; "
        f"{len(prompts)} prompts x {plan.repeat}, interleaved. A prompt's speedup is the ratio of "
        "medians, a group's the median over prompts, with quartiles over all. In a group: tau / "
        "speedup. "
        f"{what_identical_means(target)}"
    )


def what_identical_means(target: Target) -> str:
    if target.width is None:
        return ("Identical: greedy tokens equal to plain decoding's, up to rounding ties: no "
                "number of rows is exact on this machine.")
    return ("Identical: greedy tokens equal to plain decoding's in passes of CLaSp's width. Plain "
            f"decoding, {' and '.join(UNPADDED)} run without padding: their text is compared up to "
            "rounding ties.")


def section(found: dict, temperature: float, groups: list[str]) -> Iterator[str]:
    """The lines of one temperature. found: summaries by method, then by group (None: overall)."""
    columns = [
        "method", *groups, "tau", "accepted", "tokens/s", "speedup", "identical",
    ]
    yield f"\n## Temperature {temperature:g}\n"
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name, summaries in found.items():
        overall = summaries[None]
        cells = [
            f"{summaries[group].tau:.2f} / {summaries[group].speedup:.2f}" for group in groups
        ]
        cells += [
            f"{overall.tau:.2f}",
            f"{overall.accepted_share:.0%}",
            f"{overall.tokens_per_second:.1f}",
            f"**{overall.speedup:.2f}x** ({overall.lower_quartile:.2f} to "
            f"{overall.upper_quartile:.2f})",
            f"{overall.identical} of {overall.runs}" if temperature == 0 else "-",
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    if "clasp" in found:
        yield "\n" + where_time_goes(found["clasp"][None], found[PLAIN][None])


def where_time_goes(clasp: Summary, plain: Summary) -> str:
    return (
        f"CLaSp's time: draft {clasp.draft:.1%}, verify {clasp.verify:.1%}, optimize "
        f"{clasp.optimize:.1%}, rest {clasp.rest:.1%}. A verify pass takes "
        f"{clasp.pass_seconds / plain.pass_seconds:.2f} plain steps; c = {clasp.c:.3f}, g = "
        f"{clasp.g:.2f}: bound tau / (1 + g c) = {clasp.bound:.2f}, measured "
        f"{clasp.speedup / clasp.bound:.2f} of it."
    )


def csv_rows(found: dict, temperature: float) -> list[dict]:
    return [
        {"temperature": temperature, "method": name, "group": group or "overall", **asdict(s)}
        for name, summaries in found.items()
        for group, s in summaries.items()
    ]


def write_csv(path: Path, rows: list[dict]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
