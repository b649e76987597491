"""How the figures are drawn: of each a name, the rows that go into its CSV, and a function of axes.

``new_figures`` measures and declares them one after the other, ``save`` writes one down.
"""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import experiments
from bench.race import Plan, Prompt
from bench.table import write_csv
from bench.target import Target

PROMPTS = 6                   # for all but the acceptance of sets, which takes all
STYLE = {"font.size": 14, "figure.figsize": (8.5, 5.2), "axes.grid": True, "grid.alpha": 0.3}


class Figure(NamedTuple):
    name: str
    rows: list[dict]
    draw: Callable            # draw(axes)


def new_figures(
    target: Target, prompts: list[Prompt], others: list[Prompt], plan: Plan
) -> Iterator[Figure]:
    """All figures, each as soon as it is measured. others: to choose fixed sets on."""
    yield acceptance_figure(experiments.acceptance(target, prompts, others))
    prompts = prompts[:PROMPTS]
    texts = experiments.sets_of_texts(target, prompts)
    yield persistence_figure(target, experiments.sparse_persistence(target, texts))
    yield skipped_layers_figure(experiments.skipped_layers(target.layers, texts[0]))
    yield markov_figure(experiments.markov(target, prompts))
    yield time_figure(experiments.breakdown(target, prompts, plan))
    rows = experiments.sweep(target, prompts, plan, "skip_layers")
    yield sweep_figure("4a_skipped_layers", rows, "number of skipped layers M")
    yield bound_figure(experiments.bounds(rows))
    rows = experiments.sweep(target, prompts, plan, "opt_interval")
    yield sweep_figure("4b_interval", rows, "optimization interval (cycles)", scale="log")
    rows = experiments.sweep(target, prompts, plan, "exit_threshold")
    yield sweep_figure("4c_exit_threshold", rows, "draft-exit threshold")


def save(figure: Figure, folder: Path, footnote: str):
    """NAME.png and NAME.csv."""
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")                           # needs no screen
    pyplot.rcParams.update(STYLE)
    picture, axes = pyplot.subplots()
    figure.draw(axes)
    picture.text(0.01, 0.01, footnote, fontsize=8)
    picture.tight_layout(rect=(0, 0.03, 1, 1))
    picture.savefig(folder / f"{figure.name}.png", dpi=110)
    pyplot.close(picture)
    write_csv(folder / f"{figure.name}.csv", figure.rows)


def page(target: Target, names: list[str]) -> str:
    """All figures on a page in Markdown."""
    head = f"# Figures: {target.name}\n\n{target.where}; settings {target.settings}.\n"
    return "\n".join([head, *(f"![{name}]({name}.png)" for name in names)]) + "\n"


# ---------------------------------------------------------------------------- one by one

def curves(rows: list[dict], styles: dict[str, str], **labels) -> Callable:
    """draw(axes): the columns that ``styles`` names against the first column."""
    x = next(iter(rows[0]))

    def draw(axes):
        for name, style in styles.items():
            label = name.replace("_", " ")
            axes.plot([row[x] for row in rows], [row[name] for row in rows], style, label=label)
        axes.set(**{"xlabel": x} | labels)
        axes.legend(fontsize=11, framealpha=0.4)

    return draw


def persistence_figure(target: Target, rows: list[dict]) -> Figure:
    budget = experiments.paper_share(target.layers)
    draw = curves(
        rows, {"DP": "C0", "random sets": "k--"}, ylabel="Jaccard similarity", ylim=(0, 1.02),
        title=f"Sets chosen at two tokens ({budget} of {target.layers} layers skipped)")
    return Figure("3a_sparse_persistence", rows, draw)


def skipped_layers_figure(rows: list[dict]) -> Figure:
    names = [name for name in rows[0] if name.startswith("layer ")]
    image = [[row[name] for row in rows] for name in names]            # (layers, tokens)
    budget = sum(rows[0][name] for name in names)

    def draw(axes):
        axes.imshow(image, cmap="Greys", vmax=1.6, aspect="auto", origin="lower")
        axes.set(xlabel="new tokens", ylabel="layer",
                 title=f"The {budget} layers skipped (grey) as a text unfolds")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return Figure("skipped_layers", rows, draw)


def markov_figure(rows: list[dict]) -> Figure:
    draw = curves(
        rows, {"brute force": "k--", "DP": "C0o-", "random": "C3s-"},
        ylabel="cosine with the true state after them",
        title="One survivor a cell is nearly as good as trying all sets")
    return Figure("3b_markov", rows, draw)


def time_figure(rows: list[dict]) -> Figure:
    names = [row["what"].replace(" (", "\n(") for row in rows]
    values = [row["value"] for row in rows]

    def draw(axes):
        bars = axes.barh(names, values)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(xlabel="share of decoding; verify passes", xscale="symlog",
                 xlim=(0, 2 * max(values)), title="Where the time goes")

    return Figure("3c_time", rows, draw)


def acceptance_figure(rows: list[dict]) -> Figure:
    styles = {
        "DP": "C0o-",
        "DP, 1 token": "C0s:",
        "best fixed set": "k^-",
        "most frequent": "C1v--",
        "best block": "C2d--",
        "random": "C3x:",
    }
    draw = curves(
        rows, styles, xlabel="number of skipped layers M",
        ylabel="share of drafted tokens accepted",
        title="Which layers to skip: chosen in context, or once for all")
    return Figure("acceptance", rows, draw)


def sweep_figure(name: str, rows: list[dict], label: str, scale: str = "linear") -> Figure:
    styles = {
        "tau": "C1s--",
        "speedup of auto": "C2",
        "speedup": "C0o-",
        "upper_quartile": "C0:",
        "lower_quartile": "C0:",
    }
    draw = curves(
        rows, styles, xlabel=label, xscale=scale, title=f"Speedup and tau against the {label}",
        ylabel="speedup over plain decoding;\ntau (tokens per verify pass)")
    return Figure(name, rows, draw)


def bound_figure(rows: list[dict]) -> Figure:
    bound = next(iter(rows[0]))
    draw = curves(
        rows, {bound: "k--", "0.9 of it": "k:", "measured": "C0o"}, ylabel="speedup",
        title="Measured speedup and the cost model's bound, for each M")
    return Figure("bound", rows, draw)
