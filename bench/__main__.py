"""The paper's table and figures, measured on your machine and model.

    pip install optuna matplotlib             the searches of Self-SD and SWIFT; the figures
    python -m bench                           the table: bundled model, our own prompts
    python -m bench --figures results/figures the figures of the paper's §3 and §5, and two more
    python -m bench --speed steps.md          what each step costs (pip install transformers)

Each question is decoded by all methods at once, a token of each in turn, after a warm-up, several
times. Results of the table go to --out at once; a stopped run goes on from there.
"""
import argparse
import os
import random
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import figures, steps
from bench.experiments import ACCEPTANCE_PROMPTS
from bench.methods import NAMES, new_methods, require_known
from bench.prompts import Question, held_out, read_questions
from bench.race import Plan, ask, interleave
from bench.results import Results, header_of
from bench.table import table, write_csv
from bench.target import Target, add_model_arguments, load_target
from generate import Parser, say
from model import ModelError
from speculative import SettingsError, require, require_sampling

METHODS = "clasp,auto,best-fixed,self-sd,swift,even,random,prompt-lookup"
STEP_REPEATS = 9              # at least: steps are short
RIVAL_REPEATS = 5
MADE_BY = "Made by `"          # starts the last line of a page


# ---------------------------------------------------------------------------- arguments

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m bench",
        description=__doc__.splitlines()[0],
        allow_abbrev=False)
    add_model_arguments(parser)
    add_measuring_arguments(parser)
    add_output_arguments(parser)
    return parser.parse_args(argv)


def add_measuring_arguments(parser: Parser):
    add = parser.add_argument
    add("--questions", type=Path, metavar="FILE",
        help="Spec-Bench's question.jsonl; default: our own prompts")
    add("--limit", type=int, metavar="N", help="questions of each group; default: all")
    add("--repeat", type=int, default=3, metavar="N",
        help="runs of everything timed; default: %(default)s")
    add("--methods", type=words, default=METHODS, metavar="A,B,...",
        help=f"rows of the table, of {', '.join(NAMES)}; default: all")
    add("--temperatures", type=numbers, default="0,1", metavar="T,...",
        help="0 is greedy; default: %(default)s")
    add("--max-new-tokens", type=int, default=128, metavar="N",
        help="for each question; default: %(default)s")
    add("--seed", type=int, default=0, metavar="S",
        help="of samples, searches and the random set; default: %(default)s")


def add_output_arguments(parser: Parser):
    add = parser.add_argument
    add("--out", type=Path, default="bench.jsonl", metavar="FILE",
        help="results, one a line; the table goes beside it as .md and .csv; default: %(default)s")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--speed", type=Path, metavar="FILE",
        help="time the steps instead (plain, verify, draft, DP; transformers), into this Markdown "
             "file")
    instead.add_argument(
        "--figures", type=Path, metavar="FOLDER",
        help="draw the figures into this folder instead of the table")


def words(text: str) -> list[str]:
    return re.findall("[^ ,]+", text)


def numbers(text: str) -> list[float]:
    """Each once."""
    return list(dict.fromkeys(float(number) for number in text.split(",")))


def require_sensible(args: argparse.Namespace):
    require(args.repeat >= 1, "--repeat must be at least 1")
    require_known(args.methods)
    for temperature in args.temperatures:
        for seed in (args.seed, args.seed + args.repeat):  # each race has a seed of its own
            require_sampling(temperature, seed=seed)
    for package in packages_needed(args):
        require(find_spec(package), f"this needs another package: pip install {package}")
    file = args.speed or args.out
    require(file.parent.is_dir(), f"there is no folder {file.parent}")
    if not (args.speed or args.figures):
        require(args.out.suffix == ".jsonl",
                "--out must end in .jsonl: the table goes beside it as .md and .csv")
    require(not file.is_dir(), f"{file} is a folder")
    page = page_of(args)
    require(not page.exists() or is_ours(page),
            f"{page} is no page that python -m bench made: it would be overwritten")
    table = args.out.with_suffix(".csv")
    require(args.speed or args.figures or page.exists() or not table.exists(),
            f"{table} has no page that python -m bench made: it would be overwritten")
    require(not args.figures or page.exists() or not any(args.figures.glob("*.png")),
            f"{args.figures} has pictures and no page that python -m bench made: they might be "
            "overwritten")


def page_of(args: argparse.Namespace) -> Path:
    """The Markdown file that is written."""
    if args.speed:
        return args.speed
    if args.figures:
        return args.figures / "figures.md"
    return args.out.with_suffix(".md")


def is_ours(page: Path) -> bool:
    last_line = page.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return last_line.startswith(MADE_BY)


def packages_needed(args: argparse.Namespace) -> list[str]:
    """Beside those of requirements.txt."""
    if args.speed:
        return []
    if args.figures:
        return ["matplotlib"]
    return ["optuna"] if {"self-sd", "swift"} & set(args.methods) else []


def command(argv: list[str], model: str | None) -> str:
    """The command line that made a file, as it may be published.

    Paths from elsewhere are shown by name only, and so is the model's folder.
    """
    shown = []
    for word in argv:
        option, value = re.fullmatch(r"(--[a-z-]+=)?(.*)", word, re.DOTALL).groups("")
        is_model = value == model and Path(value).is_dir()
        if is_model or value.startswith(("/", "~", ".")):
            value = Path(value).resolve().name
        shown.append(option + value)
    return shlex.join(["python", "-m", "bench", *shown])


# ---------------------------------------------------------------------------- what is made

def make_table(target: Target, args, questions: list[Question]) -> str:
    results = Results(args.out, header_of(target, args, questions))
    methods = new_methods(args.methods, target, args.seed)
    if "swift" in methods:                                 # take its search up where it was
        scores = max((line.get("scores", []) for line in results.values()), key=len)
        methods["swift"].drafter.search.resume(scores)
    prompts = ask(target, questions, args.max_new_tokens, results)
    plan = Plan(args.max_new_tokens, args.repeat, tuple(args.temperatures), args.seed)
    lines = interleave(target, methods, prompts, plan, results)
    text, rows = table(target, plan, lines)
    write_csv(args.out.with_suffix(".csv"), rows)
    return text


def make_figures(target: Target, args, questions: list[Question]) -> Iterator[str]:
    """The page with one figure, as soon as it is drawn, then with two, and so on."""
    args.figures.mkdir(parents=True, exist_ok=True)
    shuffled = random.Random(args.seed).sample(questions, len(questions))
    measured = first_turns(shuffled[:ACCEPTANCE_PROMPTS])
    others = first_turns(shuffled[ACCEPTANCE_PROMPTS:2 * ACCEPTANCE_PROMPTS]) + held_out()
    prompts = ask(target, measured, args.max_new_tokens, {})
    other_prompts = ask(target, others, args.max_new_tokens, {})
    plan = Plan(args.max_new_tokens, args.repeat, seed=args.seed)
    names = []
    for figure in figures.new_figures(target, prompts, other_prompts, plan):
        figures.save(figure, args.figures, f"{target.name}; {target.where}")
        say(f"  {args.figures / figure.name}.png, .csv")
        names.append(figure.name)
        yield figures.page(target, names)


def first_turns(questions: list[Question]) -> list[Question]:
    return [question._replace(turns=question.turns[:1]) for question in questions]


def make_steps(target: Target, args, questions: list[Question]) -> str:
    prompt = target.encode(questions[-1].turns[:1])
    require(prompt, "the prompt is empty")
    seconds = steps.step_seconds(target, prompt, max(args.repeat, STEP_REPEATS))
    rivals = steps.rival_seconds(target, prompt[:steps.START], max(args.repeat, RIVAL_REPEATS))
    rate = steps.read_rate(target.model.device, RIVAL_REPEATS)
    return steps.report(target, len(prompt), seconds, rate, rivals)


@torch.inference_mode()
def run(argv: list[str]):
    args = arguments(argv)
    require_sensible(args)
    questions = read_questions(args.questions, args.limit)
    target = load_target(args)
    say(f"{target.name}; {target.where}; {target.settings}")
    if args.speed:
        pages = [make_steps(target, args, questions)]
    elif args.figures:
        pages = make_figures(target, args, questions)
    else:
        pages = [make_table(target, args, questions)]
    for text in pages:
        text += f"\n{MADE_BY}{command(argv, args.model)}`.\n"
        page_of(args).write_text(text, encoding="utf-8")
    print(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for a user's mistake, said in one line; 130 after Ctrl-C."""
    if sys.stderr is None:                               # closed; bars of progress want one
        sys.stderr = open(os.devnull, "w")
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except (ModelError, SettingsError, ImportError, OSError) as error:
        say("bench: " + " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        say("\nbench: stopped; the same command goes on with its table from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
