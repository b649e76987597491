"""The command line: a prompt in, text out, decoded by CLaSp, with statistics and a comparison on request.

    python generate.py --prompt "Once upon a time" --compare

Text goes to standard output; the prompt's echo, statistics and progress go to standard error. What a user
can get wrong ends in one line on standard error and exit status 2. This file knows text: arguments,
tokenizers, chat templates, printing. Decoding is in speculative.py.
"""
import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model import Llama, ModelError, find_folder, load_model, read_json
from speculative import (DRAFT_LENGTH, EXIT_THRESHOLD, OPT_INTERVAL, SKIP_SHARE, SettingsError, Stats, autoregressive,
                         clasp)

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "fairy-tales"
DRAFTED, VERIFIED, PLAIN = "\033[32m", "\033[1;35m", "\033[0m"     # green; bold magenta; back to normal


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as for every other error, in place of the usage."""
        raise SettingsError(f"{message} (see --help)")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Write text with CLaSp: LLaMA drafts with some layers skipped, checks with all.",
                    allow_abbrev=False)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", default="Once upon a time", help="default: %(default)r")
    text.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    parser.add_argument("--model", metavar="PATH_OR_REPO", default=str(BUNDLED),
                        help="a folder with config.json, *.safetensors and tokenizer.json, or a Hugging Face repo id; "
                             "default: the bundled fairy-tale model")
    parser.add_argument("--method", choices=["clasp", "autoregressive"], default="clasp")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the likeliest tokens that reach P together; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--skip-layers", type=int, metavar="M", help=f"layers the draft leaves out; default: {SKIP_SHARE:.0%} of them".replace("%", "%%"))
    parser.add_argument("--draft-length", type=int, metavar="K", default=DRAFT_LENGTH, help="most tokens drafted at once; default: %(default)s")
    parser.add_argument("--draft-exit-threshold", type=float, metavar="X", default=EXIT_THRESHOLD,
                        help="stop drafting when the draft's top probability is lower; default: %(default)s")
    parser.add_argument("--opt-interval", type=int, metavar="N", default=OPT_INTERVAL, help="cycles between two choices of the skipped layers; default: %(default)s")
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N|mps", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's own chat template")
    parser.add_argument("--compare", action="store_true", help="also decode autoregressively: both speeds, same tokens?")
    parser.add_argument("--show-drafts", action="store_true", help="colour each token by who wrote it")
    parser.add_argument("--show-skips", action="store_true", help="print the layers skipped after each optimisation")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- text and tokens

class Text:
    """A model folder's tokenizer, chat template and stop tokens."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                             # the library raises bare Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: missing or unreadable ({error})") from None
        self.folder, self.config = folder, read_json(folder / "tokenizer_config.json")
        self.special = {name: token["content"] if isinstance(token, dict) else token
                        for name, token in self.config.items() if name.endswith("_token") and token}
        self.stop = set()
        for file in ("generation_config.json", "config.json"):     # the first that names any: an id or a list
            ids = read_json(folder / file).get("eos_token_id")
            if ids is not None:
                self.stop = {ids} if isinstance(ids, int) else set(ids)
                break

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Token ids; begin-of-text comes from the template, or as the tokenizer's files say."""
        if chat:
            return self.tokenizer.encode(self.render(prompt), add_special_tokens=False).ids
        add_begin = self.config.get("add_bos_token")           # if unset, tokenizer.json's own rule holds
        ids = self.tokenizer.encode(prompt, add_special_tokens=add_begin is not False).ids
        begin = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        return [begin, *ids] if add_begin and begin is not None and ids[:1] != [begin] else ids

    def render(self, prompt: str) -> str:
        """The prompt as one user message in the model's own Jinja template, run in jinja2's sandbox."""
        import jinja2.sandbox
        path, template = self.folder / "chat_template.jinja", self.config.get("chat_template")
        if path.exists():
            template = path.read_text(encoding="utf-8")
        if isinstance(template, list):                         # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not template:
            raise ModelError(f"{self.folder} has no chat template: leave out --chat")

        def refuse(message):
            raise jinja2.TemplateError(message)

        def strftime_now(pattern):
            from datetime import datetime
            return datetime.now().strftime(pattern)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
        try:
            return environment.from_string(template).render(
                messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **self.special)
        except jinja2.TemplateError as error:
            raise ModelError(f"{self.folder}: the chat template failed: {error}") from None

    def stream(self, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """The text that each token completes, "" while a character is still in pieces."""
        from tokenizers.decoders import DecodeStream
        stream = DecodeStream(prompt, skip_special_tokens=True)
        for token in tokens:
            yield stream.step(self.tokenizer, token) or ""


def read_prompt(args) -> str:
    if args.prompt_file is None:
        return args.prompt
    try:
        return sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the prompt from {args.prompt_file}: {error}") from None


# ---------------------------------------------------------------------------- running

def choose_device(name: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device is None or device.type not in counts:
        raise SettingsError(f"unknown device {name!r}: use cpu, cuda, cuda:N or mps")
    if (device.index or 0) >= counts[device.type]:
        raise SettingsError(f"there is no device {name} here ({counts[device.type]} of type {device.type} found)")
    return device, getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def decoder(args, model: Llama, stop: set[int]) -> Callable[..., Iterator[int]]:
    """decode(method, prompt, max_new_tokens, stats) with everything else taken from the arguments."""
    def decode(method: str, prompt: list[int], max_new_tokens: int, stats: Stats) -> Iterator[int]:
        common = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed, stop=stop, stats=stats)
        if method == "autoregressive":
            return autoregressive(model, prompt, max_new_tokens, **common)
        return clasp(model, prompt, max_new_tokens, skip_layers=args.skip_layers, draft_length=args.draft_length,
                     exit_threshold=args.draft_exit_threshold, opt_interval=args.opt_interval, **common)
    return decode


def show(pieces: Iterator[str], stats: Stats, colour: bool):
    """Print text as it comes; with ``colour``, tokens of the draft and of the verifier apart."""
    for piece in pieces:
        if colour and piece:
            piece = (DRAFTED if stats.from_draft[-1] else VERIFIED) + piece + PLAIN
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def report(args, stats: Stats, layers: int):
    s = stats
    say(f"{args.method}: {s.new_tokens} tokens in {s.seconds:.2f} s, {s.tokens_per_second:.1f} tokens/s "
        f"(prompt: {s.prefill_seconds:.2f} s)")
    if args.method == "clasp" and s.cycles:
        share = {name: f"{100 * seconds / s.seconds:.0f} %" for name, seconds in (
            ("draft", s.draft_seconds), ("verify", s.verify_seconds), ("optimise", s.optimize_seconds))}
        skipped = len(s.skip_sets[-1][1]) if s.skip_sets else 0
        say(f"  {s.tau:.2f} tokens per pass of the whole model (tau); {s.accepted} of {s.drafted} drafted tokens accepted "
            f"({100 * s.acceptance_rate:.0f} %), with {skipped} of {layers} layers skipped")
        say(f"  time: " + ", ".join(f"{name} {part}" for name, part in share.items())
            + f"; {s.cycles} cycles, {s.optimizations} optimisations")
    if args.show_drafts and not args.json:
        say(f"  {DRAFTED}drafted and accepted{PLAIN}, {VERIFIED}written by the verifier{PLAIN}")
    if args.show_skips:
        say("  layers skipped (░) and run (█), first to last, from the n-th new token on:")
        for at, skipped in s.skip_sets:
            say(f"  {at:5d} " + "".join("░" if i in skipped else "█" for i in range(layers)))


def say(line: str):
    print(line, file=sys.stderr, flush=True)


def run(args) -> int:
    prompt_text = read_prompt(args)
    device, dtype = choose_device(args.device, args.dtype)
    folder = find_folder(args.model)
    text = Text(folder)
    prompt = text.encode(prompt_text, args.chat)
    if not prompt or not prompt_text.strip():
        raise SettingsError("the prompt is empty")
    model = load_model(folder, device, dtype)
    layers = model.config.num_hidden_layers
    decode, stats, tokens = decoder(args, model, text.stop), Stats(), []
    if args.compare:                                           # first passes are slow and would be unfair
        for method in ("clasp", "autoregressive"):
            list(decode(method, prompt, min(8, args.max_new_tokens), Stats()))

    def keep(source):
        for token in source:
            tokens.append(token)
            yield token

    pieces = text.stream(prompt, keep(decode(args.method, prompt, args.max_new_tokens, stats)))
    status = 0
    try:
        if args.json:
            written = "".join(pieces)
        else:
            if sys.stderr.isatty() and not args.chat:          # so that a terminal shows the text whole
                print(f"\033[2m{prompt_text}{PLAIN}", end="", file=sys.stderr, flush=True)
            show(pieces, stats, args.show_drafts)
    except KeyboardInterrupt:
        if args.json:
            raise
        print(PLAIN if args.show_drafts else "")
        status = 130
    report(args, stats, layers)

    plain = None
    if args.compare and status == 0:
        plain_stats = Stats()
        plain_tokens = list(decode("autoregressive", prompt, args.max_new_tokens, plain_stats))
        speedup, identical = stats.tokens_per_second / plain_stats.tokens_per_second, plain_tokens == tokens
        plain = {"autoregressive": {"tokens": plain_tokens, "seconds": plain_stats.seconds,
                                    "tokens_per_second": plain_stats.tokens_per_second},
                 "speedup": speedup, "identical": identical}
        say(f"autoregressive: {plain_stats.new_tokens} tokens in {plain_stats.seconds:.2f} s, "
            f"{plain_stats.tokens_per_second:.1f} tokens/s")
        first = next((i for i, (a, b) in enumerate(zip(tokens, plain_tokens)) if a != b), min(len(tokens), len(plain_tokens)))
        verdict = ("yes" if identical else f"no, from new token {first} on" if args.temperature == 0
                   else "no; samples need not be, they only share their distribution (--temperature 0 compares)")
        say(f"speedup {speedup:.2f}x; identical: {verdict}")
    if args.json:
        names = ("new_tokens", "seconds", "prefill_seconds", "tokens_per_second", "cycles", "tau", "drafted", "accepted",
                 "acceptance_rate", "optimizations", "draft_seconds", "verify_seconds", "optimize_seconds")
        print(json.dumps({
            "text": written, "tokens": tokens, "prompt_tokens": prompt, "method": args.method, "model": args.model,
            "device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "stats": {name: getattr(stats, name) for name in names}
            | {"skipped_layers": sorted(stats.skip_sets[-1][1]) if stats.skip_sets else []}, **(plain or {})}))
    return status


def main(argv: list[str] | None = None) -> int:
    try:
        return run(arguments(argv))
    except (ModelError, SettingsError) as error:
        say(f"generate.py: {error}")
        return 2
    except torch.OutOfMemoryError:
        say("generate.py: out of GPU memory: lower --max-new-tokens, shorten the prompt, or use --dtype bfloat16")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                                    # the reader has gone: say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
