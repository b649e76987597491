"""The command line: a prompt in, text out, decoded by CLaSp, with statistics and a comparison on request.

    python generate.py --prompt "Once upon a time" --compare

Text goes to standard output; the prompt's echo, statistics and progress go to standard error. What a user can get wrong
ends in one line there and exit status 2. This file knows arguments, tokenizers, chat templates, printing.
"""
import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from auto import Auto, block_costs, read_costs
from exact import full_pass
from model import KVCache, Llama, ModelError, find_folder, load_model, read_json
from packed import pack
from speculative import DRAFT_LENGTH, EXIT_THRESHOLD, OPT_INTERVAL, SettingsError, Stats, autoregressive, clasp, require

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "fairy-tales"
DRAFTED, VERIFIED, PLAIN = "\033[32m", "\033[1;35m", "\033[0m"     # green; bold magenta; back to normal


def layers_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as for every other error, in place of the usage."""
        raise SettingsError(f"{message} (see --help)")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Write text with CLaSp: LLaMA drafts with some layers, checks with all.", allow_abbrev=False)
    add, text = parser.add_argument, parser.add_mutually_exclusive_group()
    by_model = "default: what the model's generation_config.json suggests, else"
    text.add_argument("--prompt", metavar="TEXT", default="Once upon a time, in a great forest, there lived an old witch",
                      help="default: %(default)r")
    text.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    add("--model", metavar="PATH_OR_REPO", default=str(BUNDLED), help="a folder with config.json, *.safetensors and "
        "tokenizer.json, or a Hugging Face repo id; default: the bundled fairy-tale model")
    add("--method", choices=["clasp", "autoregressive"], default="clasp")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy; default: %(default)s")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that reach P together; default: 1")
    add("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    add("--skip-layers", type=layers_or_auto, metavar="M|auto", help="layers the draft leaves out; auto: however many give the "
        f"most tokens per second, if any, and threshold and interval too; {by_model} auto, or half if one of those is given")
    add("--skip-unit", choices=["layer", "block"], default="layer",
        help="leave out layers, or attention and MLP blocks that take as much time as M layers; default: %(default)s")
    add("--costs", metavar="measured|shape|FILE", help="times auto goes by; FILE: a JSON object of numbers draft (with nothing "
        "skipped), plain, verify, optimize; default: measured if greedy, else fixed by shape, so that a seed fixes the text")
    add("--draft-length", type=int, metavar="K", help=f"most tokens drafted at once; {by_model} {DRAFT_LENGTH}")
    add("--draft-exit-threshold", type=float, metavar="X",
        help=f"stop drafting when the draft's top probability is lower; {by_model} {EXIT_THRESHOLD}")
    add("--opt-interval", type=int, metavar="N", help=f"cycles between choices of the layers; {by_model} {OPT_INTERVAL}")
    add("--exact", action=argparse.BooleanOptionalAction, default=None, help="all passes in one shape: greedy text is plain "
        "decoding's to the last bit; --no-exact saves the padding; default: yes, but with auto in 16 bits only")
    add("--device", metavar="cpu|cuda|cuda:N|mps", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--cuda-graphs", action="store_true", help="replay layers from CUDA graphs; needs an NVIDIA GPU; slow while it records")
    add("--chat", action="store_true", help="wrap the prompt in the model's own chat template")
    add("--compare", action="store_true", help="also decode autoregressively: both speeds, same tokens?")
    add("--show-drafts", action="store_true", help="colour each token by who wrote it")
    add("--show-skips", action="store_true", help="print the layers skipped after each optimisation")
    add("--json", action="store_true", help="one JSON object on standard output instead of text")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- text and tokens

class Text:
    """A model folder's tokenizer, chat template and stop tokens."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.tokenizer.no_truncation()                     # some files carry training's settings
            self.tokenizer.no_padding()
        except Exception as error:                             # the library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: missing or unreadable ({error})") from None
        self.folder, self.config = folder, read_json(folder / "tokenizer_config.json")
        named = {name: self.config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.special = {name: str(token.get("content") if isinstance(token, dict) else token)
                        for name, token in named.items() if token}
        self.stop = set()
        for file in ("generation_config.json", "config.json"):     # the first that names any: an id or a list
            ids = read_json(folder / file).get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(isinstance(i, int) for i in ids):
                    raise ModelError(f"{folder / file}: eos_token_id is neither a token id nor a list of them")
                self.stop = set(ids)
                break

    def encode(self, prompt: str | list[str], chat: bool) -> list[int]:
        """Token ids of a text, or of a talk's turns; begin-of-text comes from the template, or as the tokenizer's files say."""
        turns = [prompt] if isinstance(prompt, str) else prompt
        if chat:
            return self.tokenizer.encode(self.render(turns), add_special_tokens=False).ids
        add_begin = self.config.get("add_bos_token")           # if unset, tokenizer.json's own rule holds
        ids = self.tokenizer.encode(" ".join(turns), add_special_tokens=add_begin is not False).ids
        begin = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        return [begin, *ids] if add_begin and begin is not None and ids[:1] != [begin] else ids

    def render(self, turns: list[str]) -> str:
        """User's and model's messages in turn, in the model's own Jinja template, run in jinja2's sandbox."""
        import jinja2.sandbox
        path, template = self.folder / "chat_template.jinja", self.config.get("chat_template")

        def refuse(message):
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        try:
            if path.exists():
                template = path.read_text(encoding="utf-8")
            if isinstance(template, list):                     # several, by name
                template = {t["name"]: t["template"] for t in template}.get("default")
            if template:
                messages = [{"role": role, "content": turn} for role, turn in zip(itertools.cycle(("user", "assistant")), turns)]
                return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:                             # a template is a program, and may fail as one
            raise ModelError(f"{self.folder}: the chat template failed: {error}") from None
        raise ModelError(f"{self.folder} has no chat template: leave out --chat")

    def stream(self, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """The text that each token adds, "" while a character is still in pieces.

        A token's text depends on those before it, so a few of them are decoded with it and taken off again.
        (tokenizers' DecodeStream raises on some byte sequences.)
        """
        def decode(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        ids, start, shown = list(prompt), max(0, len(prompt) - 5), len(prompt)
        for token in tokens:
            ids.append(token)
            before, now = decode(ids[start:shown]), decode(ids[start:])
            if len(now) > len(before) and not now.endswith("\ufffd"):       # U+FFFD: half a character
                start, shown = shown, len(ids)
                yield now[len(before):]
            else:
                yield ""


def read_prompt(args) -> str:
    try:
        prompt = args.prompt
        if args.prompt_file is not None:
            prompt = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
        prompt.encode()                                        # bytes that were no UTF-8 fail here
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"cannot read the prompt: {error}") from None
    require(prompt.strip(), "the prompt is empty")
    return prompt


# ---------------------------------------------------------------------------- running

def choose_device(name: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    require(device is not None and device.type in counts, f"unknown device {name!r}: use cpu, cuda, cuda:N or mps")
    found = counts[device.type]
    require((device.index or 0) < found, f"there is no device {name} here ({found} of type {device.type} found)")
    return device, getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def suggested_settings(folder: Path | None) -> dict:
    """clasp's four settings: from "clasp" in the model's generation_config.json, where it has them, else the defaults."""
    settings = {"skip_layers": None, "draft_length": DRAFT_LENGTH, "exit_threshold": EXIT_THRESHOLD, "opt_interval": OPT_INTERVAL}
    suggested = read_json(folder / "generation_config.json").get("clasp", {}) if folder else {}
    if not (isinstance(suggested, dict) and suggested.keys() <= settings.keys()
            and all(isinstance(value, int | float if name == "exit_threshold" else int) for name, value in suggested.items())):
        raise ModelError(f"{folder / 'generation_config.json'}: clasp may give {', '.join(settings)} a (whole) number, no more")
    return settings | suggested


def decoder(args, folder: Path, model: Llama, stop: set[int]) -> Callable[..., Iterator[int]]:
    """decode(method, prompt, max_new_tokens, stats, cache), with everything else as the command line and the model say."""
    common = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed, stop=stop)
    given = {"skip_layers": args.skip_layers, "draft_length": args.draft_length,
             "exit_threshold": args.draft_exit_threshold, "opt_interval": args.opt_interval}
    settings = suggested_settings(folder) | {name: value for name, value in given.items() if value is not None}
    untouched = settings == suggested_settings(None) | {"draft_length": settings["draft_length"]}       # else by hand
    if untouched and args.draft_exit_threshold is args.opt_interval is None and len(model.layers) > 1:
        settings["skip_layers"] = "auto"
    auto, costs = settings["skip_layers"] == "auto", read_costs(args.costs or ("shape" if args.temperature else "measured"))
    if args.skip_unit == "block" and model.block_costs is None:
        model.block_costs = block_costs(model, auto and costs is None)
    settings["exact"] = not (auto and model.embed.weight.dtype == torch.float32) if args.exact is None else args.exact
    if auto:
        require(args.draft_exit_threshold is None and args.opt_interval is None,
                "--skip-layers auto chooses the exit threshold and the interval too: leave them out")
        settings = {"draft_length": settings["draft_length"], "exact": settings["exact"], "auto": Auto(model, costs)}
    require(auto or not args.costs, "--costs is for --skip-layers auto")

    def decode(method: str, prompt: list[int], max_new_tokens: int, stats: Stats, cache=None) -> Iterator[int]:
        more = {"clasp": settings, "autoregressive": {}, "same width": {"width": settings["draft_length"] + 1}}[method]
        run = clasp if method == "clasp" else autoregressive
        return run(model, prompt, max_new_tokens, stats=stats, cache=cache, **common, **more)
    return decode


def show(pieces: Iterator[str], stats: Stats, colour: bool):
    """Print text as it comes; with ``colour``, tokens of the draft and of the verifier apart."""
    for piece in pieces:
        if colour and piece:
            piece = (DRAFTED if stats.from_draft[-1] else VERIFIED) + piece + PLAIN
        print(piece, end="", flush=True)
    print(flush=True)


def say(line: str, end="\n"):
    print(line, file=sys.stderr, end=end, flush=True)


def report(args, s: Stats, parts: int):
    """Statistics in a few lines on standard error."""
    say(f"{args.method}: {s.new_tokens} tokens in {s.seconds:.2f} s, {s.tokens_per_second:.1f} tokens/s "
        f"(prompt: {s.prefill_seconds:.2f} s)")
    if args.method == "clasp" and s.cycles:
        shares = ", ".join(f"{name} {100 * seconds / s.seconds:.0f} %" for name, seconds in (
            ("draft", s.draft_seconds), ("verify", s.verify_seconds), ("optimise", s.optimize_seconds)))
        drafts = (f"{s.accepted} of {s.drafted} drafted tokens accepted ({100 * s.acceptance_rate:.0f} %), with "
                  f"{len(s.skip_sets[-1][1])} of {parts} {args.skip_unit}s skipped") if s.drafted else "no drafts"
        say(f"  {s.tau:.2f} tokens per pass of the whole model (tau); {drafts}")
        say(f"  time: {shares}; {s.cycles} cycles, {s.optimizations} optimisations")
    if args.show_drafts and not args.json:
        say(f"  {DRAFTED}drafted and accepted{PLAIN}, {VERIFIED}written by the verifier{PLAIN}")
    if args.show_skips:
        say(f"  {args.skip_unit}s run (█) and skipped (░), first to last, from the n-th new token on:")
        for at, skipped in s.skip_sets:
            say(f"  {at:5d} " + "".join("░" if i in skipped else "█" for i in range(parts)))


def compare(args, model: Llama, decode: Callable[..., Iterator[int]], prompt: list[int], stats: Stats) -> dict:
    """Decode plainly, one row a pass, and report it beside ``stats``; returns what --json says of it.

    Greedy tokens that differ are looked into: how close the choice was where they part, and whether they are
    those of plain decoding in passes as wide as clasp's, as they must be (with --exact).
    """
    plain, cache = Stats(), KVCache(model, len(prompt) + args.max_new_tokens)
    list(decode("autoregressive", prompt, args.max_new_tokens, plain, cache))
    speedup, identical = stats.tokens_per_second / plain.tokens_per_second, stats.tokens == plain.tokens
    verdict, difference = "yes" if identical else "no", {}
    if not identical and args.temperature > 0:
        verdict = "no (samples share their distribution, not their tokens; --temperature 0 compares tokens)"
    elif not identical:
        at = next(i for i, (a, b) in enumerate(zip(stats.tokens, plain.tokens)) if a != b)
        cache.length = len(prompt) + at - 1                    # what plain decoding had there, so the same logits
        with torch.inference_mode():
            _, logits = full_pass(model, cache, [[*prompt, *plain.tokens][cache.length]], None)
        top = logits[0].float().topk(2).values
        same = list(decode("same width", prompt, args.max_new_tokens, Stats())) == stats.tokens
        difference = {"difference": {"new_token": at, "logit_gap": (top[0] - top[1]).item(), "identical_at_same_width": same}}
        verdict = (f"no, from new token {at} on, where the two likeliest tokens' logits lay {top[0] - top[1]:.2g} apart; "
                   f"identical to plain decoding in passes of the same width: {'yes, so rounding chose' if same else 'no'}")
    say(f"autoregressive: {plain.new_tokens} tokens in {plain.seconds:.2f} s, {plain.tokens_per_second:.1f} tokens/s")
    say(f"speedup {speedup:.2f}x; identical: {verdict}")
    plainly = {name: getattr(plain, name) for name in ("tokens", "seconds", "tokens_per_second")}
    return {"autoregressive": plainly, "speedup": speedup, "identical": identical, **difference}


def as_json(args, model: Llama, prompt: list[int], text: str, stats: Stats, comparison: dict) -> str:
    names = ("new_tokens", "seconds", "prefill_seconds", "tokens_per_second", "cycles", "tau", "drafted", "accepted",
             "acceptance_rate", "optimizations", "draft_seconds", "verify_seconds", "optimize_seconds")
    weight, last = model.embed.weight, stats.skip_sets[-1][1] if stats.skip_sets else ()
    return json.dumps({
        "text": text, "tokens": stats.tokens, "prompt_tokens": prompt, "method": args.method, "model": args.model,
        "device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch."),
        "stats": {name: getattr(stats, name) for name in names} | {"skipped_layers": sorted(last)}, **comparison})


def run(args) -> int:
    prompt_text = read_prompt(args)
    device, dtype = choose_device(args.device, args.dtype)
    require(device.type == "cuda" or not args.cuda_graphs, f"--cuda-graphs needs an NVIDIA GPU, and the device is {device}")
    require(args.skip_unit == "layer" or not args.cuda_graphs, "--cuda-graphs skips whole layers, no blocks")
    folder = find_folder(args.model)
    text = Text(folder)
    prompt = text.encode(prompt_text, args.chat)
    model = pack(load_model(folder, device, dtype))
    if args.cuda_graphs:
        from cuda_graphs import GraphedLlama
        model = GraphedLlama(model)
    decode, stats, comparison, written = decoder(args, folder, model, text.stop), Stats(), {}, ""
    if args.compare:                                           # first passes are slow and would be unfair
        warm = decoder(args, folder, model, text.stop)         # apart: auto shall learn nothing of the text before
        for method in ("clasp", "autoregressive"):
            list(warm(method, prompt, args.max_new_tokens if args.cuda_graphs else min(8, args.max_new_tokens), Stats()))

    pieces, status = text.stream(prompt, decode(args.method, prompt, args.max_new_tokens, stats)), 0
    try:
        if args.json:
            for piece in pieces:
                written += piece
        else:
            first = next(pieces, "")                           # whatever is refused, is refused before any output
            if sys.stderr.isatty() and not args.chat:          # so that a terminal shows the text whole
                say(f"\033[2m{prompt_text}{PLAIN}", end="")
            show(itertools.chain((first,), pieces), stats, args.show_drafts)
    except KeyboardInterrupt:                                  # the text so far stays
        say("\ninterrupted")
        status = 130
    report(args, stats, len(model.parts))
    if args.compare and not status:
        comparison = compare(args, model, decode, prompt, stats)
    if args.json:
        print(as_json(args, model, prompt, written, stats, comparison))
    return status


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for a user's mistake, said in one line; 130 after Ctrl-C."""
    try:
        return run(arguments(argv))
    except (ModelError, SettingsError) as error:
        say("generate.py: " + " ".join(str(error).split()))
        return 2
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        say("generate.py: out of memory: lower --max-new-tokens, shorten the prompt, or use --dtype bfloat16")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                                    # the reader has gone: say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                   # a terminal without UTF-8 is no reason to stop
    sys.exit(main())
