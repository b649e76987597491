"""The command line: a prompt in, text out, decoded by CLaSp, with statistics and a comparison.

    python generate.py --prompt "Once upon a time" --temperature 0 --compare

Text goes to standard output; the prompt's echo, statistics and progress go to standard error. What
a user can get wrong ends in one line there and exit status 2.

This file knows arguments (``arguments``), what follows from them (``Decoder``: which drafter, how
wide a pass) and printing. Where no ``--drafter`` is named it is speculative.Clasp if its settings
are typed, and else extras.auto.Auto, which looks words up too, and decides itself.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # Ctrl-C while PyTorch loads: just end

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from checkpoint import (
    BUNDLED,
    Tokenizer,
    are_of_layers,
    find_folder,
    load_model,
    read_headers,
    short_name,
    suggested_settings,
)
from extras.auto import Auto
from extras.chat import Conversation, talk
from extras.exact import exact_passes
from extras.lookup import MOST, Lookup
from extras.memory import Plan, is_out_of_memory, require_fits
from extras.packed import choose_form, choose_threads, pack
from extras.parallel import (
    added_in_order,
    all_reduced,
    as_one_of_several,
    join_layers,
    my_place,
)
from extras.shares import Share, require_shareable
from extras.trace import Traced, page, record
from extras.worth import SHAPE
from model import KVCache, Llama, ModelError
from speculative import (
    DRAFT_LENGTH,
    EXIT_THRESHOLD,
    OPT_INTERVAL,
    OPT_TOKENS,
    Clasp,
    Drafter,
    SettingsError,
    Stats,
    autoregressive,
    decode,
    full_pass,
    require,
)

PROMPT = "Once upon a time, there was a lonely robot who"
DIM, NORMAL = "\033[2m", "\033[0m"                    # of a terminal
# How --show-drafts shows a token, by its source: colour, and marks around a run of such tokens.
SHOWN = {
    "layers": ("\033[32m", "[", "]"),
    "lookup": ("\033[36m", "{", "}"),
    "": ("\033[1;35m", "", ""),                        # the whole model's own
}
WARM_UP = 8                   # tokens decoded before a comparison: first passes are slow


# ---------------------------------------------------------------------------- arguments

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as for every other error, in place of the usage."""
        raise SettingsError(f"{message} (see --help)")


def layers_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Write text with CLaSp: LLaMA drafts with some layers, checks with all.",
        allow_abbrev=False)
    add_text_arguments(parser)
    add_clasp_arguments(parser)
    add_output_arguments(parser)
    return parser.parse_args(argv)


def add_text_arguments(parser: Parser):
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help=f"default: {PROMPT!r}")
    prompt.add_argument("--prompt-file", metavar="FILE",
                        help="read the prompt from a file, - for standard input")
    add("--model", metavar="PATH_OR_REPO", default=str(BUNDLED),
        help="a folder with config.json, *.safetensors and tokenizer.json, or a Hugging Face repo "
             "id; default: the bundled model")
    add("--method", choices=["clasp", "autoregressive"], default="clasp")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.5, metavar="T",
        help="0 is greedy; default: %(default)s")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens that reach P together; default: 1")
    add("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    add("--chat", action="store_true",
        help="wrap the prompt in the model's own chat template; without a prompt: a conversation, "
             "a message a line")


def add_clasp_arguments(parser: Parser):
    add = parser.add_argument
    by_model = "default: what the model's generation_config.json suggests, else"
    add("--drafter", choices=["auto", "layers", "lookup"],
        help="who drafts: layers: the model without some (CLaSp); lookup: what followed the same "
             "words earlier in the text; auto: whichever pays at each place, with all settings "
             "chosen; default: layers if you give one of their settings, else auto")
    add("--skip-layers", type=layers_or_auto, metavar="M|auto",
        help=f"layers the draft leaves out; {by_model} half of them; auto: same as --drafter auto")
    add("--draft-length", type=int, metavar="K",
        help=f"most tokens drafted at once; {by_model} {DRAFT_LENGTH}; for lookup and auto {MOST}")
    add("--draft-exit-threshold", type=float, metavar="X",
        help="stop drafting when the draft's top probability is lower; "
             f"{by_model} {EXIT_THRESHOLD}")
    add("--opt-interval", type=int, metavar="N",
        help=f"cycles between choices of the layers; {by_model} {OPT_INTERVAL}")
    add("--opt-tokens", type=int, metavar="T",
        help="choose the layers by the states of the last T tokens; 1: as in the paper; "
             f"{by_model} {OPT_TOKENS}")
    add("--exact", action=argparse.BooleanOptionalAction, default=None,
        help="passes that round alike: greedy text is that of plain decoding in such passes, to "
             "the last bit; --no-exact saves padding where they need it; default: yes with "
             "--drafter layers when greedy")
    add("--device", metavar="cpu|cuda|cuda:N|mps", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: float32 on the CPU, bfloat16 elsewhere and with --weights")
    add("--weights", choices=["int8"],
        help="keep weights in eight bits: half the memory of 16, nearly the same model")
    add("--cuda-graphs", action="store_true",
        help="replay layers from CUDA graphs; needs an NVIDIA GPU; slow while it records")


def add_output_arguments(parser: Parser):
    add = parser.add_argument
    add("--compare", action="store_true",
        help="also decode autoregressively: both speeds, same tokens?")
    add("--show-drafts", action="store_true", help="colour each token by who wrote it")
    add("--show-skips", action="store_true",
        help="print the layers skipped after each optimisation")
    add("--trace", metavar="FILE.html",
        help="write a page that shows the run: drafts, times, layers and the DP's tables")
    add("--json", action="store_true",
        help="one JSON object on standard output instead of text")


def read_prompt(args: argparse.Namespace) -> str:
    reads_stdin = args.prompt_file == "-"
    require(not reads_stdin or sys.stdin is not None,
            "cannot read the prompt: standard input is closed")
    try:
        if args.prompt_file is None:
            prompt = PROMPT if args.prompt is None else args.prompt
            prompt.encode()                            # fails if the shell gave no UTF-8
        elif reads_stdin:
            prompt = as_text(sys.stdin.buffer.read())
        else:
            prompt = as_text(Path(args.prompt_file).read_bytes())
    except (OSError, ValueError) as error:             # ValueError: no UTF-8, or NUL in a name
        raise SettingsError(f"cannot read the prompt: {error}") from None
    require(prompt.strip(), "the prompt is empty")
    return prompt


def as_text(data: bytes) -> str:
    """UTF-8, without a byte order mark; line ends stay as they are."""
    return data.decode("utf-8-sig")


def choose_device(
    name: str | None, dtype: str | None, weights: str | None = None
) -> tuple[torch.device, torch.dtype]:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    place = my_place()
    if name == "cuda" and not place.is_alone:
        name = f"cuda:{place.local_rank}"
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    require(device is not None and device.type in counts,
            f"unknown device {name!r}: use cpu, cuda, cuda:N or mps")
    found = counts[device.type]
    require((device.index or 0) < found,
            f"there is no device {name} here ({found} of type {device.type} found)")
    wide = device.type == "cpu" and weights is None
    return device, getattr(torch, dtype or ("float32" if wide else "bfloat16"))


def form_of_weights(weights: str | None, device: torch.device, dtype: torch.dtype) -> Callable:
    """What ``load_model`` is to make of each matrix."""
    if weights == "int8":
        from extras.int8 import in_int8
        return in_int8
    return choose_form(device, dtype)


def require_memory(args: argparse.Namespace, folder: Path, device, dtype, prompt: list[int]):
    """Refuse what processes cannot share or the device cannot hold, before gigabytes are read."""
    place = my_place()
    config, stored = read_headers(folder)
    require_shareable(config, place.count)
    new_tokens = max(args.max_new_tokens, 1)            # fewer are refused later
    tokens = min(len(prompt) + new_tokens, config.max_position_embeddings)
    widest = max(tensor.weight_bytes for tensor in stored.values() if len(tensor.shape) == 2)
    plan = Plan(config, device, dtype, tokens, args.weights, place.count, widest)
    require_fits(plan, len(prompt), place.local_count if device.type == "cpu" else 1)


def prepare_model(args: argparse.Namespace, folder: Path, device, dtype) -> Llama:
    place = my_place()
    form = form_of_weights(args.weights, device, dtype)
    model = load_model(folder, device, dtype, form, Share(place.rank, place.count))
    if not place.is_alone:
        join_layers(model, all_reduced if args.exact is False else added_in_order)
    model = pack(model)
    choose_threads(model)
    if args.cuda_graphs:
        from extras.cuda_graphs import GraphedLlama
        model = GraphedLlama(model)
    return model


# ---------------------------------------------------------------------------- decoding

@dataclass
class Decoder:
    """Decodes as the command line says; where that is silent, as the model's folder suggests."""
    args: argparse.Namespace
    folder: Path
    model: Llama
    stop: set[int]

    def __post_init__(self):
        self.drafter = self.new_drafter()              # refuses what is out of range

    @cached_property
    def typed(self) -> dict:
        """The settings of CLaSp that were typed."""
        args = self.args
        settings = {
            "skip_layers": args.skip_layers if args.skip_layers != "auto" else None,
            "draft_length": args.draft_length,
            "exit_threshold": args.draft_exit_threshold,
            "opt_interval": args.opt_interval,
            "opt_tokens": args.opt_tokens,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @cached_property
    def settings(self) -> dict:
        """Those typed, over those that the model suggests."""
        return suggested_settings(self.folder) | self.typed

    @property
    def drafts_by(self) -> str:
        """Who drafts: "layers", "lookup" or "auto"."""
        asked_for = "auto" if self.args.skip_layers == "auto" else self.args.drafter
        return asked_for or ("layers" if are_of_layers(self.typed) else "auto")

    @property
    def draft_length(self) -> int:
        if self.drafts_by == "layers":
            return self.settings.get("draft_length", DRAFT_LENGTH)
        return self.typed.get("draft_length", MOST)

    def new_drafter(self) -> Drafter:
        args = self.args
        require(args.skip_layers != "auto" or args.drafter in (None, "auto"),
                f"--skip-layers auto does not go with --drafter {args.drafter}")
        if self.drafts_by == "layers":
            return Clasp(self.model, **self.settings)
        require(not are_of_layers(self.typed),
                f"the drafter is {self.drafts_by}: of the settings of --drafter layers it takes "
                "only --draft-length, so leave the others out")
        if self.drafts_by == "lookup":
            return Lookup(self.draft_length)
        # When sampling, costs by the model's shape, not by the clock: a seed then fixes the text.
        costs = SHAPE if args.temperature > 0 else None
        return Auto(self.model, self.draft_length, costs, self.suggested_clasp())

    def suggested_clasp(self) -> Clasp | None:
        """With the settings that the model suggests for its layers, if it does."""
        suggested = suggested_settings(self.folder)
        if not are_of_layers(suggested):
            return None
        longest = min(suggested.get("draft_length", DRAFT_LENGTH), self.draft_length)
        return Clasp(self.model, **suggested | {"draft_length": longest})

    @property
    def wants_exact(self) -> bool:
        if self.args.exact is not None:
            return self.args.exact
        return self.drafts_by == "layers" and self.args.temperature == 0

    @property
    def is_exact(self) -> bool:
        return self.passes != {}

    @cached_property
    def passes(self) -> dict[str, int]:
        """How wide passes are, see ``speculative.new_text``; {}: as their tokens need.

        Where the draft's length varies, wide ones would cost more than they bring.
        """
        if not self.wants_exact:
            return {}
        most = self.draft_length
        if self.drafts_by != "layers":
            most = min(most, DRAFT_LENGTH)
        return exact_passes(self.model, most + 1)

    def write(self, prompt: list[int], stats: Stats) -> Iterator[int]:
        """Tokens by the method that was asked for."""
        if self.args.method == "autoregressive":
            return self.plain(prompt, stats)
        return decode(self.model, prompt, self.args.max_new_tokens, self.drafter,
                      stats=stats, **self.passes, **self.sampling)

    def plain(self, prompt: list[int], stats: Stats, **settings) -> Iterator[int]:
        return autoregressive(self.model, prompt, self.args.max_new_tokens, stats=stats, **settings,
                              **self.sampling)

    @property
    def sampling(self) -> dict:
        args = self.args
        return {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
            "stop": self.stop,
        }

    def warm_up(self, prompt: list[int]):
        """Both methods, untimed: first passes are slow and would be unfair."""
        tokens = self.args.max_new_tokens
        if not self.args.cuda_graphs:                  # else all graphs are to be recorded
            tokens = min(WARM_UP, tokens)
        settings = self.sampling | self.passes
        list(decode(self.model, prompt, tokens, self.new_drafter(), **settings))
        list(autoregressive(self.model, prompt, tokens, **self.sampling))


# ---------------------------------------------------------------------------- printing

def say(line: str, end="\n"):
    """To standard error. If that is closed or full, the text itself goes on."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, end=end, flush=True)
        except OSError:
            silence(sys.stderr)


def show(pieces: Iterator[str], stats: Stats, by_source: bool):
    """Print text as it comes; with ``by_source``, each token by who wrote it."""
    if by_source:
        pieces = marked(pieces, stats)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def marked(pieces: Iterator[str], stats: Stats) -> Iterator[str]:
    """The pieces in colour, and drafts between marks, so that no colour is needed to see them."""
    colour, opened, closed = SHOWN[""]
    source = ""
    for piece in pieces:
        if not piece:
            continue
        mark = ""
        if stats.sources[-1] != source:
            source = stats.sources[-1]
            mark = closed
            colour, opened, closed = SHOWN.get(source, SHOWN["layers"])     # a new drafter's
            mark += opened
        yield mark + colour + piece + NORMAL
    yield closed


def write_text(args, prompt_text: str, pieces: Iterator[str], stats: Stats) -> tuple[str, bool]:
    """Print the text; with --json gather and return it instead. And: did Ctrl-C end it?"""
    gathered = []
    try:
        if args.json:
            for piece in pieces:
                gathered.append(piece)
        else:
            first = next(pieces, "")                   # refusals come here, before any output
            on_terminal = sys.stderr is not None and sys.stderr.isatty()
            if on_terminal and not args.chat:          # it then shows prompt and text together
                say(f"{DIM}{prompt_text}{NORMAL}", end="")
            show(itertools.chain((first,), pieces), stats, args.show_drafts)
    except KeyboardInterrupt:                          # the text so far stays
        say("\ninterrupted")
        return "".join(gathered), True
    return "".join(gathered), False


def report(args: argparse.Namespace, stats: Stats, layers: int):
    """Statistics in a few lines on standard error."""
    say(f"{args.method}: {stats.new_tokens} tokens in {stats.seconds:.2f} s, "
        f"{stats.tokens_per_second:.1f} tokens/s (prompt: {stats.prefill_seconds:.2f} s)")
    if args.method == "clasp" and stats.cycles:
        report_clasp(stats, layers)
    if args.show_drafts and not args.json:
        layers_colour, lookup_colour, own_colour = (colour for colour, _, _ in SHOWN.values())
        say(f"  {layers_colour}[drafted by some layers]{NORMAL}, "
            f"{lookup_colour}{{looked up}}{NORMAL}, both accepted; "
            f"{own_colour}the whole model's own{NORMAL}")
    if args.show_skips and not stats.skip_sets:
        say("  no layers were chosen")
    elif args.show_skips:
        say("  layers run (█) and skipped (░), first to last, from the n-th new token on:")
        for new_tokens, skipped in stats.skip_sets:
            strip = "".join("░" if i in skipped else "█" for i in range(layers))
            say(f"  {new_tokens:5d} {strip}")


def report_clasp(stats: Stats, layers: int):
    drafts = "no drafts"
    if stats.drafted:
        drafts = (f"{stats.accepted} of {stats.drafted} drafted tokens accepted "
                  f"({100 * stats.acceptance_rate:.0f} %)")
        looked_up = stats.sources.count("lookup")
        if looked_up:
            drafts += f", {looked_up} of them looked up"
        if "layers" in stats.sources:
            sizes = [len(skip) for _, skip in stats.skip_sets]
            least, most = min(sizes), max(sizes)
            skipped = f"{least}" if least == most else f"{least} to {most}"
            drafts += f", with {skipped} of {layers} layers skipped"
    say(f"  {stats.tau:.2f} tokens per pass of the whole model (tau); {drafts}")
    parts = [
        ("draft", stats.draft_seconds),
        ("verify", stats.verify_seconds),
        ("optimise", stats.optimize_seconds),
    ]
    shares = ", ".join(f"{name} {100 * part / stats.seconds:.0f} %" for name, part in parts)
    say(f"  time: {shares}; {stats.cycles} cycles, {stats.optimizations} optimisations")


def as_json(decoder: "Decoder", prompt: list[int], text: str, stats: Stats) -> dict:
    args = decoder.args
    weight = decoder.model.embed.weight
    names = [
        "new_tokens", "seconds", "prefill_seconds", "tokens_per_second", "cycles", "tau", "drafted",
        "accepted", "acceptance_rate", "optimizations", "draft_seconds", "verify_seconds",
        "optimize_seconds",
    ]
    last_set = stats.skip_sets[-1][1] if stats.skip_sets else ()
    return {
        "text": text,
        "tokens": stats.tokens,
        "prompt_tokens": prompt,
        "method": args.method,
        "model": args.model,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "exact": args.method == "clasp" and decoder.is_exact,
        "stats": {
            **{name: getattr(stats, name) for name in names},
            "skipped_layers": sorted(last_set),
        },
    }


def require_trace(args: argparse.Namespace):
    """Refuse --trace where it cannot be, before anything is decoded."""
    if args.trace is None:
        return
    require(args.method == "clasp", "--trace shows drafts, and --method autoregressive has none")
    path = Path(args.trace)
    require(path.suffix == ".html", f"--trace writes a page: {args.trace!r} should end in .html")
    require(path.parent.is_dir() and os.access(path.parent, os.W_OK),
            f"cannot write --trace {args.trace}: no such folder, or it is not writable")
    require(path.is_file() or not path.exists(), f"--trace {args.trace} is there and is no file")


def write_trace(decoder: "Decoder", tokenizer: Tokenizer, plain_ends: list[float]):
    args = decoder.args
    weight = decoder.model.embed.weight
    about = (f"{short_name(args.model)}, drafter {decoder.drafts_by}, "
             f"temperature {args.temperature}, "
             f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}")
    found = record(decoder.drafter, tokenizer, plain_ends, about)
    if my_place().rank == 0:
        write_whole(Path(args.trace), page(found))
    say(f"the run is shown in {args.trace}: open it in a browser")


def write_whole(path: Path, text: str):
    """All of it, or what was there before stays."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")        # nobody else's
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise SettingsError(f"cannot write --trace {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):                          # that it could not be made is said above
            beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- comparing

def compare(decoder: Decoder, prompt: list[int], stats: Stats, ends: list[float]) -> dict:
    """Decode plainly, one row a pass, and report it beside ``stats``; returns what --json says.

    Greedy tokens that differ are looked into, see ``explain_difference``.
    ends: to be filled with the seconds until each token was there.
    """
    plain = Stats()
    cache = KVCache(decoder.model, len(prompt) + decoder.args.max_new_tokens)
    for _ in decoder.plain(prompt, plain, cache=cache):
        ends.append(plain.seconds)
    speedup = stats.tokens_per_second / plain.tokens_per_second
    identical = stats.tokens == plain.tokens
    verdict = "yes"
    explanation = {}
    if not identical and decoder.args.temperature > 0:
        verdict = ("no (samples share their distribution, not their tokens; --temperature 0 "
                   "compares tokens)")
    elif not identical:
        difference = explain_difference(decoder, prompt, stats.tokens, plain.tokens, cache)
        same = difference["identical_at_same_width"]
        verdict = (f"no, from new token {difference['new_token']} on, where the two likeliest "
                   f"tokens' logits lay {difference['logit_gap']:.2g} apart; ")
        if same is None:
            verdict += "its passes were of many widths, which round differently (see --exact)"
        else:
            verdict += ("identical to plain decoding in passes of the same width: "
                        f"{'yes, so rounding chose' if same else 'no'}")
        explanation = {"difference": difference}
    say(f"autoregressive: {plain.new_tokens} tokens in {plain.seconds:.2f} s, "
        f"{plain.tokens_per_second:.1f} tokens/s")
    say(f"speedup {speedup:.2f}x; identical: {verdict}")
    names = ("tokens", "seconds", "tokens_per_second")
    return {
        "autoregressive": {name: getattr(plain, name) for name in names},
        "speedup": speedup,
        "identical": identical,
        **explanation,
    }


@torch.inference_mode()
def explain_difference(
    decoder: Decoder, prompt: list[int], tokens: list[int], plain: list[int], cache: KVCache
) -> dict:
    """Where two greedy texts part, how close the choice was there, and whether rounding made it.

    If so the tokens are those of plain decoding in passes as wide as CLaSp's; this is not known if
    those had no one width. cache: plain decoding's.
    """
    pairs = enumerate(zip(tokens, plain))
    at = next(i for i, (a, b) in pairs if a != b)
    cache.length = len(prompt) + at - 1                # what plain decoding had there
    text = [*prompt, *plain]
    _, logits = full_pass(decoder.model, cache, text[cache.length:cache.length + 1], None)
    first, second = logits[0].float().topk(2).values.tolist()
    same = None
    if decoder.is_exact:
        same = list(decoder.plain(prompt, Stats(), **decoder.passes)) == tokens
    return {"new_token": at, "logit_gap": first - second, "identical_at_same_width": same}


# ---------------------------------------------------------------------------- running

def run(args: argparse.Namespace) -> int:
    require(sys.stdout is not None, "standard output is closed")
    if args.chat and args.prompt is None and args.prompt_file is None:
        return converse(args)
    return write(args)


def prepare(args: argparse.Namespace, text: str) -> tuple[Decoder, Tokenizer, list[int]]:
    """Decoder, tokenizer, and the text's tokens. Most is refused before the weights are read."""
    device, dtype = choose_device(args.device, args.dtype, args.weights)
    require(device.type == "cuda" or not args.cuda_graphs,
            f"--cuda-graphs needs an NVIDIA GPU, and the device is {device}")
    require(my_place().is_alone or not (args.cuda_graphs or device.type == "mps"),
            "--cuda-graphs and --device mps are for one process: leave them out under torchrun")
    folder = find_folder(args.model)
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(text, args.chat)
    require_memory(args, folder, device, dtype, prompt)
    decoder = Decoder(args, folder, prepare_model(args, folder, device, dtype), tokenizer.stop)
    return decoder, tokenizer, prompt


def say_if_not_exact(decoder: Decoder):
    if decoder.args.method == "clasp" and decoder.wants_exact and not decoder.is_exact:
        say("not exact: kernels here round differently by a row's place, whatever the pass's width")


def converse(args: argparse.Namespace) -> int:
    """Talk, see extras/chat.py."""
    for option in ("compare", "show_drafts", "show_skips", "trace"):
        require(not getattr(args, option),
                f"--{option.replace('_', '-')} is for one text: give --chat a --prompt too")
    require(sys.stdin is not None, "standard input is closed")
    decoder, tokenizer, _ = prepare(args, "Hello")
    drafter = decoder.drafter if args.method == "clasp" else None
    conversation = Conversation(decoder.model, tokenizer, drafter, args.max_new_tokens,
                                decoder.passes, **decoder.sampling)
    say_if_not_exact(decoder)
    talk(conversation, args.json, say)
    return 0


def write(args: argparse.Namespace) -> int:
    """Write one text."""
    prompt_text = read_prompt(args)
    require_trace(args)
    decoder, tokenizer, prompt = prepare(args, prompt_text)
    if args.compare:
        decoder.warm_up(prompt)
    if args.trace:
        decoder.drafter = Traced(decoder.drafter)
    stats = Stats()
    plain_ends = []
    pieces = tokenizer.stream(prompt, decoder.write(prompt, stats))
    text, interrupted = write_text(args, prompt_text, pieces, stats)
    report(args, stats, len(decoder.model.layers))
    say_if_not_exact(decoder)
    comparison = {}
    if args.compare and not interrupted:
        try:
            comparison = compare(decoder, prompt, stats, plain_ends)
        except KeyboardInterrupt:                      # the text is there all the same
            say("interrupted")
            interrupted = True
    if args.json:
        print(json.dumps(as_json(decoder, prompt, text, stats) | comparison), flush=True)
    if args.trace and stats.tokens:
        write_trace(decoder, tokenizer, plain_ends)
    return 130 if interrupted else 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status.

    0; 2 for a user's mistake, said in one line; 130 after Ctrl-C; 141 if nobody reads the output.
    """
    try:
        return run(arguments(argv))
    except (ModelError, SettingsError) as error:
        say("generate.py: " + " ".join(str(error).split()))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        say("generate.py: out of memory: lower --max-new-tokens, shorten the prompt, or use "
            "--dtype bfloat16 or --weights int8")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                            # the reader has gone: say nothing more
        silence(sys.stdout)
        return 141
    except OSError as error:
        silence(sys.stdout)
        say(f"generate.py: cannot write the output: {error.strerror or error}")
        return 2


def silence(stream):
    """What Python still wants to write there when it ends goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")       # some terminals have no UTF-8
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")            # refused in one line, then
    sys.exit(main() if my_place().is_alone else as_one_of_several(main))
