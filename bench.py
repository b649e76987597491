"""Is it faster, and faster than what? The paper's table and figures, measured on your machine and model.

    pip install optuna matplotlib                        this program's own packages (search; figures)
    python bench.py                                      the table, on the bundled model and our own prompts
    python bench.py --figures results/figures            the figures of the paper's sections 3 and 5, and two more
    python bench.py --speed steps.md                     the cost of a draft token, a verify pass, a DP (pip install transformers)

Every method is a choice of what ``clasp`` skips or drafts, on the same loop. Each question is decoded by all at once, a
token of each in turn, after a warm-up, several times. Results go to --out at once; a stopped run goes on from there.
"""
import csv
import itertools
import json
import random
import re
import shlex
import statistics
import sys
import zlib
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm          # comes with huggingface-hub

from auto import Auto
from cuda_graphs import GraphedLlama
from dp_skip import Selection, select_layers, select_layers_plain
from exact import exact_width, full_pass
from generate import BUNDLED, Parser, Text, choose_device, say, suggested_settings
from model import Config, KVCache, Llama, ModelError, find_folder, load_model
from packed import bytes_read, pack
from speculative import (SettingsError, Stats, autoregressive, candidate_layer, clasp, clock, draft, optimize, pick, prefill,
                         require)

# Written for this project; none is in the bundled model's training text. Held out: for Self-SD's search, not for measuring.
PROMPTS = {group: [" ".join(text.split()) for text in texts.split("|")] for group, texts in {
    "chat": """Write a short letter to a friend who has just moved to a small town by the sea. | Explain to a child of seven
        why ships made of iron float. | Give me five rules for a good neighbour, with one sentence of reason for each.""",
    "translation": """Translate German to English: Der alte Fischer flickte sein Netz, waehrend die Kinder Steine sammelten. |
        Translate German to English: Am naechsten Morgen lag der erste Schnee auf den Daechern der Stadt. | Translate German
        to English: Die Bruecke wurde vor zweihundert Jahren gebaut und steht noch heute.""",
    "summarization": """Summarize: The village mill had stood idle for thirty years when the council decided to repair its
        wheel. Carpenters from three valleys came to help, and the school collected coins for the new axle. In May the wheel
        turned again. | Summarize: A storm closed the mountain road on Friday. Forty travellers spent the night in the church
        hall, where the fire brigade brought blankets and the baker brought soup. By noon on Saturday a plough had cleared one
        lane. | Summarize: The library will stay open until nine on weekdays from October. Readers had asked for it for years.
        Two new librarians start in September, and the reading room gets forty lamps. The cafe closes at six as before.""",
    "qa": """Why does the moon show us always the same side? | What is the difference between a violin and a viola? | How do
        bees find their way back to the hive?""",
    "math": """A baker sells 48 rolls in the morning and half as many in the afternoon, for 3 coins each. How many coins is
        that? | Anna is twice as old as Ben. In six years their ages sum to 48. How old is Anna now? Think step by step. |
        Three bags hold 7, 12 and 20 marbles. How many must be moved so that all hold the same? Think step by step.""",
    "rag": """Text: The lamp of the lighthouse burned whale oil until 1862, then paraffin, and since 1931 it is electric.
        Question: What did the lamp burn in 1900? Answer from the text: | Text: The river Ome passes the towns of Lind and
        Moor and meets the sea at Dun. Salmon were brought back in 2004. Question: Through which towns does the Ome pass?
        Answer from the text: | Text: Mira Tolland painted doors, 212 of them, most for farmers who paid in eggs and wool.
        Nine are in a museum. Question: How was she paid? Answer from the text:""",
    "tale": """Once upon a time there was a clockmaker whose youngest daughter could hear what the clocks said at night. | A
        poor fisherman pulled his net from the river and found in it a small iron box, which | "Three nights you must watch,"
        said the dwarf, "and on the third""",
    "held out": """The giant was so tired that he sat down upon the church, and | Nobody in the town would speak of the blue
        house, until | How is paper made from wood? | Summarize: The ferry will not run on Monday. A new engine is late."""}.items()}
HELD_OUT = PROMPTS.pop("held out")
Prompt = namedtuple("Prompt", "question turn group tokens answer")      # answer: the whole model's greedy one
GROUP = {"translation": "translation", "summarization": "summarization", "qa": "qa", "math_reasoning": "math", "rag": "rag"}
SHAPES = {"llama3.2-1b": Config(128256, 2048, 8192, 16, 32, 8, 64, 8192, tie_word_embeddings=True),
          "llama3.2-3b": Config(128256, 3072, 8192, 28, 24, 8, 128, 8192, tie_word_embeddings=True),
          "llama3-8b": Config(128256, 4096, 14336, 32, 32, 8, 128, 8192),
          "llama3-70b": Config(128256, 8192, 28672, 80, 64, 8, 128, 8192)}


def synthetic(config: Config, residual: float, device, dtype) -> Llama:
    """Random weights of a shape. ``residual`` scales what all layers but the first and last two add to the stream: the
    smaller it is, the less it matters which of them are skipped, so it sets the draft's acceptance."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.fill_(1) if weight.ndim == 1 else weight.normal_(std=weight.shape[1] ** -0.5)
    for layer in model.layers[2:-2]:
        layer.o.weight.mul_(residual)
        layer.down.weight.mul_(residual)
    return model


class Target:
    """The model that is measured: how it turns questions into tokens, and the settings CLaSp uses on it."""

    def __init__(self, args):
        device, dtype = choose_device(args.device, args.dtype)
        folder = None if args.synthetic else find_folder(args.model or str(BUNDLED))
        if args.synthetic:
            self.model, self.text, self.stop = synthetic(SHAPES[args.synthetic], args.residual, device, dtype), None, ()
            self.name = f"{args.synthetic} with RANDOM WEIGHTS (residual {args.residual}; the text is noise)"
        else:
            self.model, self.text, self.name = load_model(folder, device, dtype), Text(folder), folder.resolve().name
            self.chat = bool(self.text.config.get("chat_template") or (folder / "chat_template.jinja").exists())
            self.stop = self.text.stop
        self.bytes, self.weights = bytes_read(pack(self.model)), self.model.embed.weight[::97].double().sum().item()
        self.model = GraphedLlama(self.model) if args.cuda_graphs else self.model
        self.layers, suggested = len(self.model.layers), suggested_settings(folder)
        self.settings = {"skip_layers": self.layers // 2} | {
            name: source[name] for source in (suggested, vars(args)) for name in suggested if source[name] is not None}
        require(0 <= self.settings["skip_layers"] < self.layers, f"skip at least 0 and fewer than all {self.layers} layers")
        self.clasp = partial(clasp, **self.settings)
        cpu = f"{torch.get_num_threads()} threads of a CPU with {torch.backends.cpu.get_cpu_capability()}"
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        self.where = f"{machine}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"

    def encode(self, turns: list[str]) -> list[int]:
        if self.text is None:                                  # no tokenizer: a word is a token
            return [zlib.crc32(word.encode()) % self.model.config.vocab_size for word in " ".join(turns).split()]
        return self.text.encode(turns, self.chat)

    def race(self, methods: dict, prompt: list[int], count: int, **settings) -> dict[object, tuple[Stats, float]]:
        """Decode by all methods, a token of each in turn, so that whatever else the machine does slows all alike; returns
        of each the statistics and the seconds that passed outside, prefill apart."""
        now, stats, wall = clock(self.model), {name: Stats() for name in methods}, dict.fromkeys(methods, 0.0)
        runs = {name: method(self.model, prompt, count, stats=stats[name], stop=self.stop, **settings)
                for name, method in methods.items()}
        while runs:
            for name, run in list(runs.items()):
                start = now()
                if next(run, None) is None:
                    del runs[name]
                wall[name] += now() - start
        return {name: (stats[name], wall[name] - stats[name].prefill_seconds) for name in methods}

    def run(self, method, prompt: list[int], count: int, **settings) -> tuple[Stats, float]:
        return self.race({"": method}, prompt, count, **settings)[""]

    def fixed(self, skip):
        """A method with one set of layers for everything."""
        return partial(self.clasp, optimizer=lambda *_: Selection([frozenset(skip)], []), opt_interval=10**9)

    def auto(self):
        """CLaSp that decides itself how much to skip; what it learns, it keeps from text to text."""
        return partial(clasp, draft_length=self.settings["draft_length"], exact=False, auto=Auto(self.model))


# --------------------------- methods, all called as clasp is: method(model, prompt, count, stats=, temperature=, seed=, stop=)

class Search:
    """Sets of M layers, tried at random first, then by optuna's Bayesian sampler (TPE). ``best`` so far, by ``score``."""

    def __init__(self, target, seed: int, trials: int):
        import optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.target, self.budget, self.left = target, target.settings["skip_layers"], trials
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(
            n_startup_trials=trials // 3, multivariate=True, seed=seed))
        self.best, self.score, self.scores = random.Random(seed).sample(range(target.layers), self.budget), -1.0, []

    def step(self, texts: list[list[int]], last: int):
        """Try one more set, the layers of the highest values: what share of the texts' ``last`` tokens does it predict?"""
        trial, model, layers = self.study.ask(), self.target.model, range(self.target.layers)
        values = [trial.suggest_float(f"layer {i}", 0, 1) for i in layers]
        skip = sorted(layers, key=values.__getitem__)[len(layers) - self.budget:]
        tokens = torch.tensor(texts, device=model.embed.weight.device)
        predicted = model.logits(model(tokens[:, :-1], skip=skip)[-1][:, -last:]).argmax(-1)
        self.scores.append((predicted == tokens[:, -last:]).float().mean().item())
        self.study.tell(trial, self.scores[-1])
        self.best, self.score = max((self.best, self.score), (skip, self.scores[-1]), key=lambda found: found[1])
        self.left -= 1


def self_sd(target, seed: int, trials: int = 240) -> Search:
    """Self-SD (Zhang et al. 2024): one set for all, found beforehand on held-out text, here the model's own. There attention and
    MLP blocks are searched for the time saved; here, to compare at the same M, whole layers for the greedy tokens got right."""
    prompts, search = [target.encode([text]) for text in HELD_OUT], Search(target, seed, trials)
    length = max(map(len, prompts)) + 64
    texts = [[*p, *autoregressive(target.model, p, length - len(p))] for p in prompts]
    for _ in tqdm(range(trials), desc="Self-SD searches", leave=False, disable=None):
        search.step(texts, 64)
    return search


class Swift(Search):
    """SWIFT (Xia et al. 2025): the set is searched for while decoding, on the text so far, then frozen. One set is tried
    in each of the first ``trials`` cycles, on the last 64 tokens; the search goes on from text to text."""

    def __call__(self, model, prompt, count, *, stats, **common):
        def optimizer(*_):
            text = [*prompt, *stats.tokens][-64:]
            if self.left and stats.new_tokens >= 16:
                self.step([text], min(32, len(text) - 2))
            return Selection([frozenset(self.best)], [])

        return self.target.clasp(model, prompt, count, stats=stats, optimizer=optimizer, **common,
                                 opt_interval=1 if self.left else 10**9)


def prompt_lookup(target, model, prompt, count, *, stats, temperature=0.0, **common):
    """Drafts what followed the last 3, 2 or 1 tokens where they stood before; nothing is skipped, nothing computed."""
    ends, known = {}, 0                                        # of all such tokens, where they last ended; of those before

    def drafter(model, cache, token, skip, length, go_on, choose, stop):
        nonlocal known
        text = [*prompt, *stats.tokens]
        ends.update({tuple(text[end - n:end]): end for end in range(known, len(text)) for n in (1, 2, 3) if n <= end})
        known, end = len(text), next((ends[last] for n in (3, 2, 1) if (last := tuple(text[-n:])) in ends), len(text))
        found = text[end:end + length]
        found = found[:next((i + 1 for i, t in enumerate(found) if t in stop), len(found))]
        certain = torch.tensor(found, dtype=torch.long, device=model.embed.weight.device)
        return found, list(F.one_hot(certain, model.config.vocab_size).float()) if temperature else [None] * len(found)

    return target.fixed(())(model, prompt, count, stats=stats, temperature=temperature, drafter=drafter, **common)


def methods_of(target, names: list[str], seed: int) -> dict:
    """The methods of these names, and plain decoding first; what must be searched beforehand is."""
    layers, budget = target.layers, target.settings["skip_layers"]
    make = {"autoregressive": lambda: autoregressive, "clasp": lambda: target.clasp, "auto": lambda: target.auto(),
            "swift": lambda: Swift(target, seed, 200),
            "self-sd": lambda: target.fixed(self_sd(target, seed).best), "prompt-lookup": lambda: partial(prompt_lookup, target),
            "even": lambda: target.fixed([int((i + 0.5) * layers / budget) for i in range(budget)]),
            "random": lambda: target.fixed(random.Random(seed).sample(range(layers), budget))}
    unknown = sorted(set(names) - set(make))
    require(not unknown, f"unknown methods {', '.join(unknown)}: choose from {', '.join(make)}")
    return {name: make[name]() for name in dict.fromkeys(["autoregressive", *names])}


def read_questions(args) -> list[tuple[str, str, list[str]]]:
    """(id, group, turns): Spec-Bench's file, or our own prompts; at most --limit of each group."""
    questions = [(f"{group} {i}", group, [text]) for group, texts in PROMPTS.items() for i, text in enumerate(texts)]
    if args.questions:
        try:
            questions = [(f"{q['question_id']}, line {i}", GROUP.get(q["category"], "chat"), ["" + turn for turn in [] + q["turns"]])
                         for i, q in enumerate(map(json.loads, args.questions.read_text(encoding="utf-8").splitlines()), 1)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{args.questions}: not Spec-Bench's question.jsonl ({error!r})") from None
    require(args.limit != 0 and min(args.limit or 1, args.repeat, len(questions)) >= 1, "questions, --limit, --repeat: at least 1")
    groups = {group: [question for question in questions if question[1] == group] for _, group, _ in questions}
    return [q for all in groups.values() for q in (all[::max(1, len(all) // args.limit)][:args.limit] if args.limit else all)]


class Results(dict):
    """Lines by key. A new one is appended to a JSONL file at once, from which a stopped run takes what it has done."""

    def __init__(self, path: Path, header: dict):
        text = path.read_bytes() if path.exists() else b""
        whole = text[:text.rfind(b"\n") + 1]                            # a last line that was cut short is made again
        try:
            super().__init__((tuple(line["key"]), line) for line in map(json.loads, whole.splitlines()))
        except (ValueError, KeyError, TypeError):
            self.clear()
        begun = text and list(self) != [("header",)]                    # else nothing was measured yet
        require(not begun or self.get(("header",)) == header, f"{path} holds another run: move it away or use another --out")
        self.file = open(path, "a", buffering=1)                        # a line goes out when it ends
        self.file.truncate(len(whole) if begun else 0)
        if not begun:
            self["header",] = header

    def __setitem__(self, key, line):
        super().__setitem__(key, line)
        print(json.dumps(line), file=self.file)


def ask(target, args, questions, results: dict) -> list[Prompt]:
    """Every turn of every question, after the whole model's greedy answers, untimed, to those before it."""
    prompts, whole = [], partial(autoregressive, width=target.settings["draft_length"] + 1)
    for name, group, turns in tqdm(questions, desc="greedy answers", leave=False, disable=None):
        talk = []
        for turn, text in enumerate(turns):
            tokens, key = target.encode([*talk, text]), (name, turn, 0.0, 0, "reference")
            if len(tokens) + args.max_new_tokens > target.model.config.max_position_embeddings:
                say(f"{name}, from turn {turn + 1} on: left out, it does not fit the model's context")
                break
            if key not in results:
                results[key] = {"key": key, "tokens": target.run(whole, tokens, args.max_new_tokens)[0].tokens}
            prompts.append(Prompt(name, turn, group, tokens, results[key]["tokens"]))
            talk += [text, target.text.tokenizer.decode(prompts[-1].answer) if target.text else str(prompts[-1].answer)]
    require(prompts, "there is no question that fits the model's context")
    return prompts


def interleave(target, args, methods: dict, prompts: list[Prompt], temperatures, results: dict) -> list[dict]:
    """Every prompt by every method, token by token in turn (graphs: one after the other), --repeat times: a line each."""
    texts = sorted((p.tokens for p in prompts), key=len, reverse=True) if args.cuda_graphs else []      # graphs are captured
    warm = [(method, text, args.max_new_tokens) for text in texts for method in methods.values() if not isinstance(method, Swift)]
    for method, *work in warm + [(method, target.encode(HELD_OUT[:1]), 16) for method in methods.values()]:
        target.run(method, *work)                                       # first passes are slow
    together = [[name] for name in methods] if args.cuda_graphs else [list(methods)]            # a graph belongs to one cache
    jobs, lines = list(itertools.product(temperatures, prompts, range(args.repeat), together)), []
    for temperature, prompt, repeat, names in tqdm(jobs, unit="race", smoothing=0, mininterval=1 if sys.stderr.isatty() else 60):
        keys = {name: (prompt.question, prompt.turn, temperature, repeat, name) for name in names}
        options = dict(temperature=temperature, seed=args.seed + repeat)
        race = {} if all(key in results for key in keys.values()) else {name: methods[name] for name in names}
        for name, (stats, wall) in target.race(race, prompt.tokens, args.max_new_tokens, **options).items():
            line = {"key": keys[name], "group": prompt.group, "identical": stats.tokens == prompt.answer, "wall": wall,
                    "new_tokens": stats.new_tokens} | {n: x for n, x in vars(stats).items() if isinstance(x, int | float)}
            if name == "swift":
                line["search"] = methods[name].best, methods[name].score, methods[name].left
            results[keys[name]] = line
        lines += [results[key] for key in keys.values()]
    return lines


def summary(lines: list[dict], method: str, temperature: float = 0.0, group: str | None = None) -> SimpleNamespace:
    """What a method's runs come to: sums; tau; the cost model's g, c and bound; seconds of a pass; and the speedup, for each
    prompt plain decoding's seconds a token (medians over its repetitions) to the method's: the quartiles over prompts."""
    lines = [line for line in lines if line["key"][2] == temperature and group in (None, line["group"])]
    mine, paces = [line for line in lines if line["key"][-1] == method], defaultdict(list)
    for line in lines:
        question, turn, *_, name = line["key"]
        paces[question, turn, name].append(line["seconds"] / line["new_tokens"])
    ratios = [statistics.median(paces[question, turn, "autoregressive"]) / statistics.median(pace)
              for (question, turn, name), pace in paces.items() if name == method]
    s = SimpleNamespace(runs=len(mine), **{name: sum(line[name] for line in mine) for name, value in mine[0].items()
                                           if isinstance(value, int | float)})
    s.lower_quartile, s.speedup, s.upper_quartile = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    s.tokens_per_second = statistics.median(line["new_tokens"] / line["seconds"] for line in mine)
    s.tau, s.g, s.accepted_share = s.new_tokens / s.cycles, s.drafted / s.cycles, s.accepted / max(1, s.drafted)
    s.pass_seconds = (s.verify_seconds or s.seconds) / s.cycles
    s.c = s.draft_seconds / max(1, s.drafted) / s.pass_seconds
    s.bound, s.rest = s.tau / (1 + s.g * s.c), 1 - s.seconds / s.wall
    s.draft, s.verify, s.optimize = s.draft_seconds / s.wall, s.verify_seconds / s.wall, s.optimize_seconds / s.wall
    return s


def write_csv(path: Path, rows: list[dict]):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])


def table(target, args, questions) -> str:
    """The paper's Table 1 in Markdown: a row a method, a column a group of tasks; where CLaSp's time goes; and all as CSV."""
    require(args.out.suffix == ".jsonl", "--out must end in .jsonl: the table goes beside it as .md and .csv")
    methods = methods_of(target, args.methods, args.seed)
    results = Results(args.out, {"key": ["header"], "model": target.name, "where": target.where, "settings": target.settings,
        "options": [args.seed, args.max_new_tokens, args.cuda_graphs, target.weights, zlib.crc32(repr(questions).encode())]})
    searches = [line["search"] for line in results.values() if "search" in line]
    if searches and "swift" in methods:                                 # take its search up where it was
        methods["swift"].best, methods["swift"].score, methods["swift"].left = searches[-1]
    prompts = ask(target, args, questions, results)
    lines = interleave(target, args, methods, prompts, args.temperatures, results)
    groups, rows = [*dict.fromkeys(prompt.group for prompt in prompts), None], []
    out = [f"# {target.name}\n\n{target.where}. {target.layers} layers, CLaSp's settings {target.settings}. At most "
           f"{args.max_new_tokens} new tokens; {len(prompts)} prompts x {args.repeat}, interleaved. A prompt's speedup is the "
           "ratio of medians, a group's the median over prompts, with quartiles over all. In a group: tau / speedup. Identical: "
           "greedy tokens equal to plain decoding's in passes of CLaSp's width."]
    for temperature in args.temperatures:
        out.append(f"\n## Temperature {temperature:g}\n\n| method | {' | '.join(groups[:-1])} | tau | accepted | tokens/s "
                   f"| speedup | identical |\n|{'---|' * (len(groups) + 5)}")
        found = {name: [summary(lines, name, temperature, group) for group in groups] for name in methods}
        for name, cells in found.items():
            rows += [{"temperature": temperature, "method": name, "group": group or "overall", **vars(s)}
                     for group, s in zip(groups, cells)]
            s = cells[-1]
            same = f"{s.identical} of {s.runs}" if temperature == 0 else "-"
            out.append(f"| {name} | {' | '.join(f'{cell.tau:.2f} / {cell.speedup:.2f}' for cell in cells[:-1])} | {s.tau:.2f} "
                       f"| {s.accepted_share:.0%} | {s.tokens_per_second:.1f} | **{s.speedup:.2f}x** ({s.lower_quartile:.2f} to "
                       f"{s.upper_quartile:.2f}) | {same} |")
        if "clasp" in found:
            s, step = found["clasp"][-1], found["autoregressive"][-1]
            out.append(f"\nCLaSp's time: draft {s.draft:.1%}, verify {s.verify:.1%}, optimize {s.optimize:.1%}, rest {s.rest:.1%}"
                       f". A verify pass takes {s.pass_seconds / step.pass_seconds:.2f} plain steps; c = {s.c:.3f}, g = "
                       f"{s.g:.2f}: bound tau / (1 + g c) = {s.bound:.2f}, measured {s.speedup / s.bound:.2f} of it.")
    write_csv(args.out.with_suffix(".csv"), rows)
    return "\n".join(out) + "\n"


def timed(model: Llama, work: dict, repeat: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, ``repeat`` times, in turn, after two times for warmth."""
    now, times = clock(model), defaultdict(list)
    for _ in range(repeat + 2):
        for name, do in work.items():
            start = now()
            do()
            times[name].append(now() - start)
    return {name: taken[2:] for name, taken in times.items()}


def steps(target, prompt: list[int], repeat: int) -> dict[str, float]:
    """Seconds of each kind of work after a prompt, medians of ``repeat`` interleaved runs."""
    model, m, k, half = target.model, target.settings["skip_layers"], target.settings["draft_length"], target.layers // 2
    width, greedy = exact_width(model, k + 1), partial(pick, temperature=0, top_p=1, rng=None)
    cache = KVCache(model, len(prompt) + 8, max(width, 8))
    hidden = prefill(model, cache, prompt)
    skip = (dp := partial(optimize, model, cache, hidden))(m).skip_sets[m]

    def rows(count, width=None):
        full_pass(model, cache, [0] * count, width)[1].argmax(-1).tolist()
        cache.length = len(prompt)

    times = timed(model, {
        "plain step": lambda: rows(1), "verify pass": lambda: rows(k + 1, width), "8 rows": lambda: rows(8),
        "head": lambda: model.logits(hidden[None, -1:]).argmax().item(),
        "draft token": lambda: draft(model, cache, 0, skip, 1, bool, greedy, ()),
        "DP": lambda: dp(m, partial(select_layers, smallest=m)),
        f"DP, M = {half}": lambda: dp(half, partial(select_layers, smallest=half)),
        "DP, every M": lambda: dp(m), "DP, cell by cell": lambda: dp(m, select_layers_plain)}, repeat)
    return {name: statistics.median(taken) for name, taken in times.items()}


def speed(target, args, questions) -> str:
    """What each step costs beside a plain one, and a plain one beside reading its weights and beside transformers."""
    model, prompt, count, weight = target.model, target.encode(questions[-1][2][:1]), 48, target.model.embed.weight
    t, big = steps(target, prompt, max(args.repeat, 9)), torch.zeros(2 ** (26 if weight.is_cpu else 28), device=weight.device)
    work = {"read": big.sum}
    if target.text:
        from transformers import AutoModelForCausalLM
        other, start = AutoModelForCausalLM.from_pretrained(target.text.folder, dtype=weight.dtype).to(weight.device), prompt[:4]
        ids = torch.tensor([start], device=weight.device)
        work |= {"ours": lambda: list(autoregressive(model, start, count)),
                 "theirs": lambda: other.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)}
    pairs = timed(model, work, max(args.repeat, 5))
    step, rate, best = t["plain step"], target.bytes / t["plain step"] / 1e9, big.nbytes / min(pairs["read"]) / 1e9
    share = (step - t["head"]) * (1 - target.settings["skip_layers"] / target.layers) + t["head"]
    out = [f"# Steps: {target.name}\n\n{target.where}; settings {target.settings}; after {len(prompt)} tokens; medians of "
           "interleaved runs.\n\n| | time | plain steps | verify passes |\n|---|---|---|---|",
           *(f"| {name} | {1e3 * s:.2f} ms | {s / step:.2f} | {s / t['verify pass']:.2f} |" for name, s in t.items()),
           f"\nA plain step reads {target.bytes / 1e6:.0f} MB at {rate:.1f} GB/s, sums over {big.nbytes / 1e6:.0f} MB read at best "
           f"{best:.1f} GB/s: {rate / best:.2f} of it. A draft token costs {t['draft token'] / share:.2f} of its share of the layers "
           "and the head."]
    if target.text:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(pairs["theirs"], pairs["ours"]))
        out.append(f"\nPlain decoding is {ratio:.2f}x as fast as transformers' generate ({count} tokens after 4, "
                   f"{len(pairs['ours'])} pairs).")
    return "\n".join(out) + "\n"


# -------------------------------------------------- the figures, declared: each a name, rows for a CSV, and draw(axes)

def curves(rows: list[dict], x: str, styles: dict[str, str], **labels):
    """draw(axes): the columns named in ``styles`` against the column ``x``."""
    def draw(axes):
        for name, style in styles.items():
            axes.plot([row[x] for row in rows], [row[name] for row in rows], style, label=name.replace("_", " "))
        axes.set(**{"xlabel": x} | labels)
        axes.legend(fontsize=11, framealpha=0.4)
    return draw


def persistence(target, args, prompts):
    """Fig. 3a: Jaccard similarity of the sets chosen at two tokens against their distance; and the sets as one text unfolds."""
    def alike(sets, distance):
        return [len(a & b) / len(a | b) for (_, a), (_, b) in zip(sets, sets[distance:])]

    budget, draws, x = target.layers * 44 // 80, random.Random(0), "distance (tokens)"
    every = dict(drafter=lambda *_: ([], []), opt_interval=1, skip_layers=budget)             # nothing drafted: a set a token
    runs = [target.run(target.clasp, prompt.tokens, 128, **every)[0].skip_sets for prompt in prompts[:4]]
    chance = alike([(0, frozenset(draws.sample(range(target.layers), budget))) for _ in range(2000)], 1)
    rows = [{x: d, "dynamic programme": statistics.mean(itertools.chain.from_iterable(alike(sets, d) for sets in runs)),
             "random sets": statistics.mean(chance)} for d in range(1, min(65, max(map(len, runs))))]
    yield "3a_sparse_persistence", rows, curves(
        rows, x, {"dynamic programme": "C0", "random sets": "k--"}, ylabel="Jaccard similarity", ylim=(0, 1.02),
        title=f"Sets chosen at two tokens ({budget} of {target.layers} layers skipped)")
    names = [f"layer {i}" for i in range(target.layers)]
    skipped = [{"new tokens": at} | {name: int(i in skip) for i, name in enumerate(names)} for at, skip in runs[0]]

    def draw(axes):
        axes.imshow([[row[name] for row in skipped] for name in names], cmap="Greys", vmax=1.6, aspect="auto", origin="lower")
        axes.set(xlabel="new tokens", ylabel="layer", title=f"The {budget} layers skipped (grey) as a text unfolds")
    yield "skipped_layers", skipped, draw


def markov(target, args, prompts):
    """Fig. 3b: on a window of layers, all others run: cosine of the best of all sets, the programme's set, all sets' mean."""
    first, found, styles = max(0, target.layers - 10) // 2, [], {"brute force": "k--", "dynamic programme": "C0o-", "random": "C3s-"}
    for prompt in prompts[:6]:
        cache = KVCache(target.model, len(prompt.tokens), 64)
        hidden = prefill(target.model, cache, prompt.tokens)
        size, layer, part = min(10, target.layers), candidate_layer(target.model, cache, 64), hidden[first:first + 11]
        by_dp = select_layers(lambda i, rows: layer(first + i, rows), part, size)
        states, skipped = part[:1], torch.zeros(1, dtype=torch.long)
        for i in range(size):                                   # every set: each layer runs on all, and is left out of all
            states = torch.cat([*(layer(first + i, rows) for rows in states.split(64)), states])
            skipped = torch.cat((skipped, skipped + 1))
        cosines = F.cosine_similarity(states.float(), part[-1:].float()).cpu()
        every = [cosines[skipped == m] for m in range(size + 1)]
        found.append([[c.max().item() for c in every], by_dp.cosines, [c.mean().item() for c in every]])
    x = f"layers skipped of {first} to {first + size - 1}"
    rows = [{x: m} | dict(zip(styles, cosines)) for m, cosines in enumerate(torch.tensor(found).mean(0).T.tolist())]
    yield "3b_markov", rows, curves(rows, x, styles, ylabel="cosine with the true state after them",
                                    title="One survivor a cell is nearly as good as trying all sets")


def breakdown(target, args, prompts):
    """Fig. 3c: shares of the time, and one run of the programme, packed and cell by cell, in verify passes."""
    s = summary(interleave(target, args, {"autoregressive": autoregressive, "clasp": target.clasp}, prompts, [0.0], {}), "clasp")
    times = steps(target, prompts[0].tokens, 9)
    values = [(vars(s)[part], f"{part}\n(share of decoding)") for part in ("rest", "optimize", "verify", "draft")]
    values += [(times[name] / times["verify pass"], f"{name}\n(passes)") for name in ("DP, cell by cell", "DP", "verify pass")]
    rows = [{"what": what.replace("\n", " "), "value": value} for value, what in values]

    def draw(axes):
        axes.bar_label(axes.barh([what for _, what in values], [value for value, _ in values]), fmt="%.2f", padding=3)
        axes.set(xlabel="share of decoding; verify passes", title="Where the time goes", xscale="symlog")
    yield "3c_time", rows, draw


def sweeps(target, args, prompts):
    """Figs. 4a to 4c: speedup and tau for each value of one setting, all interleaved; for 4a beside the cost model's bound."""
    shares, x = (2, 4, 6, 8, 10, 12, 14, 16, 18, 19), "bound, tau / (1 + g c)"
    styles = {"tau": "C1s--", "speedup of auto": "C2", "speedup": "C0o-", "upper_quartile": "C0:", "lower_quartile": "C0:"}
    for name, setting, label, values, scale in (
            ("4a_skipped_layers", "skip_layers", "number of skipped layers M",
             sorted({target.layers * share // 20 for share in shares} | {target.settings["skip_layers"]}), "linear"),
            ("4b_interval", "opt_interval", "optimisation interval (cycles)", [2 ** i for i in range(8)], "log"),
            ("4c_exit_threshold", "exit_threshold", "draft-exit threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9], "linear")):
        methods = {value: partial(target.clasp, **{setting: value}) for value in values}
        methods |= {"autoregressive": autoregressive, "auto": target.auto()}
        lines = interleave(target, args, methods, prompts[:4], [0.0], {})
        auto = summary(lines, "auto").speedup
        rows = [{setting: value, "speedup of auto": auto, **vars(summary(lines, value))} for value in values]
        yield name, rows, curves(rows, setting, styles, xlabel=label, xscale=scale, title=f"Speedup and tau against the {label}",
                                 ylabel="speedup over plain decoding;\ntau (tokens per verify pass)")
        if setting == "skip_layers":
            bounds = [{x: row["bound"], "0.9 of it": 0.9 * row["bound"], "measured": row["speedup"], "M": row[setting]}
                      for row in sorted(rows, key=lambda row: row["bound"])]
            yield "bound", bounds, curves(bounds, x, {x: "k--", "0.9 of it": "k:", "measured": "C0o"}, ylabel="speedup",
                                          title="Measured speedup and the cost model's bound, for each M")


def figures(target, args, questions) -> str:
    """Every figure as NAME.png, with its rows as NAME.csv, in --figures; returns a page that shows them."""
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")                                        # needs no screen
    pyplot.rcParams.update({"font.size": 14, "figure.figsize": (8.5, 5.2), "axes.grid": True, "grid.alpha": 0.3})
    args.figures.mkdir(parents=True, exist_ok=True)
    some = [(name, group, turns[:1]) for name, group, turns in random.Random(args.seed).sample(questions, len(questions))]
    prompts, out = ask(target, args, some[:6], {}), [f"# Figures: {target.name}\n\n{target.where}; settings {target.settings}.\n"]
    for make in (persistence, markov, breakdown, sweeps):
        for name, rows, draw in make(target, args, prompts):
            figure, axes = pyplot.subplots()
            draw(axes)
            figure.text(0.01, 0.01, f"{target.name}; {target.where}", fontsize=8)
            figure.tight_layout(rect=(0, 0.03, 1, 1))
            figure.savefig(args.figures / f"{name}.png", dpi=110)
            pyplot.close(figure)
            write_csv(args.figures / f"{name}.csv", rows)
            out.append(f"![{name}]({name}.png)")
            say(f"  {args.figures / name}.png, .csv")
    return "\n".join(out) + "\n"


def arguments(argv: list[str] | None):
    """Of each option: name, type or choices, default, what it is."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, kind, default, text in (
            ("model", str, None, "a folder or a Hugging Face repo id; default: the bundled model"),
            ("synthetic", list(SHAPES), None, "random weights of this shape instead of a model"),
            ("residual", float, 0.03, "synthetic: scale of what the middle layers add; 0.03: tau 4 at M 14, K 7; less: more"),
            ("questions", Path, None, "Spec-Bench's question.jsonl; default: our own prompts"),
            ("limit", int, None, "questions of each group; default: all"), ("repeat", int, 3, "runs of everything timed"),
            ("methods", lambda text: re.findall("[^ ,]+", text), "clasp,auto,self-sd,swift,even,random,prompt-lookup", "rows"),
            ("temperatures", lambda text: [*map(float, text.split(","))], "0,1", "0 is greedy"),
            ("max-new-tokens", int, 128, "for each question"), ("seed", int, 0, "of samples, searches and the random set"),
            ("device", str, None, "cpu, cuda, cuda:N or mps"),
            ("dtype", ["float32", "bfloat16", "float16"], None, "default: float32 on the CPU, bfloat16 elsewhere"),
            ("skip-layers", int, None, "default for this and the next three: what the model suggests, else the paper's half"),
            ("draft-length", int, None, None), ("exit-threshold", float, None, None), ("opt-interval", int, None, None),
            ("out", Path, "bench.jsonl", "results, one a line; the table goes beside it as .md and .csv"),
            ("speed", Path, None, "time the steps instead (plain, verify, draft, DP; transformers), into this Markdown file"),
            ("figures", Path, None, "draw the figures into this folder instead of the table")):
        parser.add_argument(f"--{name}", default=default, help=text if default is None else f"{text}; default: {default}",
                            **{"choices" if isinstance(kind, list) else "type": kind})
    parser.add_argument("--cuda-graphs", action="store_true", help="decode through cuda_graphs.py (a CPU records nothing)")
    return parser.parse_args(argv)


def command(argv: list[str], model: str | None) -> str:
    """The command line that made a file, with the model's folder, and paths from elsewhere, by name only."""
    words = [re.fullmatch(r"(--[a-z-]+=)?(.*)", word, re.DOTALL).groups("") for word in argv]
    short = [Path(value).resolve().name if value.startswith(("/", "~", ".")) or value == model and Path(value).is_dir() else value
             for _, value in words]
    return shlex.join(["python", "bench.py", *(option + value for (option, _), value in zip(words, short))])


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for a user's mistake, said in one line; 130 after Ctrl-C."""
    try:
        args = arguments(argv)
        require(not (args.synthetic and args.model), "--synthetic or --model, not both")
        require((args.speed or args.out).parent.is_dir(), f"there is no folder {(args.speed or args.out).parent}")
        questions, target = read_questions(args), Target(args)
        say(f"{target.name}; {target.where}; {target.settings}")
        make, path = ((speed, args.speed) if args.speed else (figures, args.figures / "figures.md") if args.figures
                      else (table, args.out.parent / f"{args.out.stem}.md"))
        text = make(target, args, questions) + f"\nMade by `{command(sys.argv[1:] if argv is None else argv, args.model)}`.\n"
        path.write_text(text, encoding="utf-8")
        print(text)
        return 0
    except (ModelError, SettingsError, ImportError, OSError) as error:
        say("bench.py: " + " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        say("\nbench.py: stopped; the same command goes on with its table from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
