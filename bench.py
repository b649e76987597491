"""Is it faster, and faster than what? The paper's table and figures, measured on your machine and model.

    pip install optuna matplotlib                        this program's own packages (search; figures)
    python bench.py --out bench.jsonl                    the table, on the bundled model and our own prompts
    python bench.py --questions question.jsonl --model FOLDER          on Spec-Bench's questions
    python bench.py --figures results/figures            the figures of the paper's sections 3 and 5, and two more
    python bench.py --speed steps.md                     what a draft token, a verify pass and a DP cost (pip install transformers)
    python bench.py --synthetic llama3-8b                random weights of that shape: true speed, no sense

Every method is a choice of what ``clasp`` skips or drafts, on the same loop. Each question is decoded by all in random
order, in one process, after a warm-up, several times. Results go to --out at once; a stopped run goes on from there.
"""
import csv
import itertools
import json
import random
import statistics
import sys
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm          # comes with huggingface-hub

from dp_skip import select_layers, select_layers_plain
from exact import exact_width, full_pass
from generate import BUNDLED, Parser, Text, choose_device, say, suggested_settings
from model import Config, KVCache, Llama, ModelError, find_folder, load_model
from packed import pack
from speculative import SettingsError, Stats, autoregressive, candidate_layer, clasp, clock, draft, optimize, pick, prefill

# Written for this project; none is in the bundled model's training text.
PROMPTS = {
    "chat": ["Write a short letter to a friend who has just moved to a small town by the sea.",
             "Explain to a child of seven why ships made of iron float.",
             "Give me five rules for a good neighbour, with one sentence of reason for each."],
    "translation": ["Translate German to English: Der alte Fischer flickte sein Netz, waehrend die Kinder Steine sammelten.",
                    "Translate German to English: Am naechsten Morgen lag der erste Schnee auf den Daechern der Stadt.",
                    "Translate German to English: Die Bruecke wurde vor zweihundert Jahren gebaut und steht noch heute."],
    "summarization": [
        "Summarize: The village mill had stood idle for thirty years when the council decided to repair its wheel. Carpenters "
        "from three valleys came to help, and the school collected coins for the new axle. In May the wheel turned again.",
        "Summarize: A storm closed the mountain road on Friday. Forty travellers spent the night in the church hall, where the "
        "fire brigade brought blankets and the baker brought soup. By noon on Saturday a plough had cleared one lane.",
        "Summarize: The library will stay open until nine on weekdays from October. Readers had asked for it for years. Two "
        "new librarians start in September, and the reading room gets forty lamps. The cafe closes at six as before."],
    "qa": ["Why does the moon show us always the same side?", "What is the difference between a violin and a viola?",
           "How do bees find their way back to the hive?"],
    "math": ["A baker sells 48 rolls in the morning and half as many in the afternoon, for 3 coins each. How many coins is that?",
             "Anna is twice as old as Ben. In six years their ages sum to 48. How old is Anna now? Think step by step.",
             "Three bags hold 7, 12 and 20 marbles. How many must be moved so that all hold the same? Think step by step."],
    "rag": ["Text: The lamp of the lighthouse burned whale oil until 1862, then paraffin, and since 1931 it is electric. "
            "Question: What did the lamp burn in 1900? Answer from the text:",
            "Text: The river Ome passes the towns of Lind and Moor and meets the sea at Dun. Salmon were brought back in 2004. "
            "Question: Through which towns does the Ome pass? Answer from the text:",
            "Text: Mira Tolland painted doors, 212 of them, most for farmers who paid in eggs and wool. Nine are in a museum. "
            "Question: How was she paid? Answer from the text:"],
    "tale": ["Once upon a time there was a clockmaker whose youngest daughter could hear what the clocks said at night.",
             "A poor fisherman pulled his net from the river and found in it a small iron box, which",
             "\"Three nights you must watch,\" said the dwarf, \"and on the third"]}
HELD_OUT = [                                # for Self-SD's search, which may not see what it is measured on
    "The giant was so tired that he sat down upon the church, and", "Nobody in the town would speak of the blue house, until",
    "How is paper made from wood?", "Summarize: The ferry will not run on Monday. A new engine arrived too late."]
GROUP = {"translation": "translation", "summarization": "summarization", "qa": "qa", "math_reasoning": "math", "rag": "rag"}
SHAPES = {name: Config(128256, hidden, inner, layers, heads, 8, head_dim, 8192, tie_word_embeddings=tied)
          for name, hidden, inner, layers, heads, head_dim, tied in (
              ("llama3.2-1b", 2048, 8192, 16, 32, 64, True), ("llama3.2-3b", 3072, 8192, 28, 24, 128, True),
              ("llama3-8b", 4096, 14336, 32, 32, 128, False), ("llama3-70b", 8192, 28672, 80, 64, 128, False))}


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
        if args.synthetic:
            self.model, self.text, self.stop = synthetic(SHAPES[args.synthetic], args.residual, device, dtype), None, ()
            self.name = f"{args.synthetic} with RANDOM WEIGHTS (residual {args.residual}; the text is noise)"
            self.settings = suggested_settings(None)
        else:
            folder = find_folder(args.model)
            self.text, self.model, self.settings = Text(folder), load_model(folder, device, dtype), suggested_settings(folder)
            self.name, self.stop = folder.resolve().name, self.text.stop
        self.bytes = sum(w.nbytes for w in self.model.parameters()) - (0 if self.model.head is None else self.model.embed.weight.nbytes)
        pack(self.model)                                                # bytes: of weights read for one token
        self.layers = len(self.model.layers)
        self.settings |= {name: getattr(args, name) for name in self.settings if getattr(args, name) is not None}
        if self.settings["skip_layers"] is None:
            self.settings["skip_layers"] = self.layers // 2
        self.chat = self.text and (self.text.config.get("chat_template") or (self.text.folder / "chat_template.jinja").exists())
        cpu = f"{torch.get_num_threads()} threads of a CPU with {torch.backends.cpu.get_cpu_capability()}"
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        self.where = f"{machine}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"

    def encode(self, turns: list[str]) -> list[int]:
        if self.text is None:                                  # no tokenizer: a word is a token
            return [zlib.crc32(word.encode()) % self.model.config.vocab_size for word in " ".join(turns).split()]
        return self.text.encode(turns, bool(self.chat))

    def decode(self, tokens: list[int]) -> str:
        return self.text.tokenizer.decode(tokens) if self.text else " ".join(map(str, tokens))

    def run(self, method, prompt: list[int], count: int, temperature=0.0, seed=0, **settings) -> tuple[Stats, float]:
        """Decode; returns the statistics and the seconds that passed outside, prefill apart."""
        stats, now = Stats(), clock(self.model)
        start = now()
        for _ in method(self, prompt, count, stats, temperature=temperature, seed=seed, stop=self.stop, **settings):
            pass
        return stats, now() - start - stats.prefill_seconds


# ------------------------ methods, called as method(target, prompt, count, stats, temperature=, seed=, stop=); they yield tokens

def plain(target, prompt, count, stats, **common):
    return autoregressive(target.model, prompt, count, stats=stats, **common)


def same_width(target, prompt, count, stats, **common):
    """What greedy CLaSp must equal, to the last bit."""
    return plain(target, prompt, count, stats, width=target.settings["draft_length"] + 1, **common)


def paper(target, prompt, count, stats, **common):
    return clasp(target.model, prompt, count, stats=stats, **target.settings | common)


def choice(skip):
    """As ``optimize`` returns it, but the same set whatever the budget."""
    return SimpleNamespace(skip_sets=defaultdict(lambda: frozenset(skip)))


def fixed(skip):
    """One set of layers for everything."""
    return lambda *args, **common: paper(*args, optimizer=lambda *_: choice(skip), **common | {"opt_interval": 10**9})


def evenly(layers: int, budget: int) -> frozenset[int]:
    return frozenset(int((i + 0.5) * layers / budget) for i in range(budget))


class Search:
    """Sets of ``budget`` layers, tried at random first, then by optuna's Bayesian sampler (TPE). ``best`` so far."""

    def __init__(self, layers: int, budget: int, seed: int, startup: int):
        import optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.layers, self.budget = layers, budget
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(
            n_startup_trials=startup, multivariate=True, seed=seed))
        self.best, self.score, self.scores = frozenset(random.Random(seed).sample(range(layers), budget)), -1.0, []

    def step(self, score):
        """Try one more set; ``score(skip)`` is to be maximised. A set is the layers of the highest values."""
        trial = self.study.ask()
        values = [trial.suggest_float(f"layer {i}", 0, 1) for i in range(self.layers)]
        skip = frozenset(sorted(range(self.layers), key=values.__getitem__)[self.layers - self.budget:])
        self.scores.append(score(skip))
        self.study.tell(trial, self.scores[-1])
        if self.scores[-1] > self.score:
            self.best, self.score = skip, self.scores[-1]


@torch.inference_mode()
def agreement(model: Llama, tokens: torch.Tensor, last: int, skip) -> float:
    """Share of the last tokens of each text (batch, length) that the model without ``skip`` predicts."""
    predicted = model.logits(model(tokens[:, :-1], skip=skip)[-1][:, -last:]).argmax(-1)
    return (predicted == tokens[:, -last:]).float().mean().item()


def self_sd(target: Target, seed: int, trials: int = 240) -> Search:
    """Self-SD (Zhang et al. 2024): one set for all, found beforehand on held-out text, here the model's own. There
    attention and MLP blocks are searched for the time they save; here, to compare at the same M, whole layers for the
    greedy tokens they get right."""
    prompts = [target.encode([text]) for text in HELD_OUT]
    length = max(map(len, prompts)) + 64
    texts = [[*p, *autoregressive(target.model, p, length - len(p))] for p in prompts]
    tokens, search = torch.tensor(texts, device=target.model.embed.weight.device), Search(
        target.layers, target.settings["skip_layers"], seed, trials // 3)
    for _ in tqdm(range(trials), desc="Self-SD searches", leave=False, disable=None):
        search.step(lambda skip: agreement(target.model, tokens, 64, skip))
    return search


class Swift:
    """SWIFT (Xia et al. 2025): the set is searched for while decoding, on the text so far, then frozen. One set is tried
    in each of the first ``steps`` cycles, on the last 64 tokens; the search goes on from text to text."""

    def __init__(self, target: Target, seed: int, steps: int = 200):
        self.search, self.left = Search(target.layers, target.settings["skip_layers"], seed, steps // 3), steps

    def __call__(self, target, prompt, count, stats, **common):
        def optimizer(model, *_):
            text = [*prompt, *stats.tokens][-64:]
            if self.left and stats.new_tokens >= 16:
                self.left -= 1
                tokens = torch.tensor([text], device=model.embed.weight.device)
                self.search.step(lambda skip: agreement(model, tokens, min(32, len(text) - 2), skip))
            return choice(self.search.best)

        return paper(target, prompt, count, stats, optimizer=optimizer, **common | {"opt_interval": 1 if self.left else 10**9})


def prompt_lookup(target, prompt, count, stats, *, temperature, **common):
    """Drafts what followed the last 3, 2 or 1 tokens where they stood before; nothing is skipped, nothing computed."""
    def drafter(model, cache, token, skip, length, go_on, choose, stop):
        text, found = [*prompt, *stats.tokens], []
        for n in (3, 2, 1):
            ends = (i + n for i in range(len(text) - n - 1, -1, -1) if text[i:i + n] == text[-n:])
            if (end := next(ends, None)) is not None:
                found = text[end:end + length]
                break
        found = found[:next((i + 1 for i, t in enumerate(found) if t in stop), len(found))]
        certain = F.one_hot(torch.tensor(found, dtype=torch.long, device=model.embed.weight.device), model.config.vocab_size)
        return found, list(certain.float()) if temperature else [None] * len(found)

    return fixed(())(target, prompt, count, stats, temperature=temperature, drafter=drafter, **common)


def methods_of(target: Target, names: list[str], seed: int) -> dict:
    layers, budget = target.layers, target.settings["skip_layers"]
    make = {"autoregressive": lambda: plain, "clasp": lambda: paper, "swift": lambda: Swift(target, seed),
            "self-sd": lambda: fixed(self_sd(target, seed).best), "even": lambda: fixed(evenly(layers, budget)),
            "random": lambda: fixed(random.Random(seed).sample(range(layers), budget)), "prompt-lookup": lambda: prompt_lookup}
    if unknown := set(names) - set(make):
        raise SettingsError(f"unknown methods {', '.join(sorted(unknown))}: choose from {', '.join(make)}")
    return {name: make[name]() for name in dict.fromkeys(["autoregressive", *names])}


# ---------------------------------------------------------------------------- the table

def read_questions(args) -> list[tuple[str, str, list[str]]]:
    """(id, group, turns): Spec-Bench's file, or our own prompts; at most --limit of each group."""
    questions = [(f"{group} {i}", group, [text]) for group, texts in PROMPTS.items() for i, text in enumerate(texts)]
    if args.questions:
        try:
            lines = [json.loads(line) for line in Path(args.questions).read_text(encoding="utf-8").splitlines()]
            questions = [(str(q["question_id"]), GROUP.get(q["category"], "chat"), list(q["turns"])) for q in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{args.questions}: not Spec-Bench's question.jsonl ({error!r})") from None
    groups = defaultdict(list)
    for question in questions:
        groups[question[1]].append(question)
    return [q for all in groups.values() for q in (all[::max(1, len(all) // args.limit)][:args.limit] if args.limit else all)]


NUMBERS = ("new_tokens", "cycles", "drafted", "accepted", "optimizations", "prefill_seconds", "seconds", "draft_seconds",
           "verify_seconds", "optimize_seconds")


def measure(target: Target, args, questions, path: Path) -> list[dict]:
    """Every question by every method, ``repeat`` times at each temperature; one JSON line each, appended to path."""
    header = {"model": target.name, "where": target.where, "settings": target.settings, "seed": args.seed,
              "max_new_tokens": args.max_new_tokens}
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if lines and lines[0] != header:
        raise SettingsError(f"{path} holds another run ({lines[0]['model']}, {lines[0]['where']}): move it away or use another --out")
    done = {tuple(line["key"]): line for line in lines[1:]}
    methods = methods_of(target, args.methods, args.seed)
    swift = methods.get("swift")
    for line in lines if swift else ():                                 # take its search up where it was
        swift.search.best, swift.search.score, swift.left = line.get("swift", (swift.search.best, swift.search.score, swift.left))
    too_long = 0
    with open(path, "a") as file:
        def write(line):
            print(json.dumps(line), file=file, flush=True)
            done[tuple(line["key"])] = line

        if not lines:
            print(json.dumps(header), file=file, flush=True)
        for method in methods.values():                                 # first passes are slow
            target.run(method, target.encode([HELD_OUT[0]]), 16)
        total = len(args.temperatures) * sum(len(turns) for _, _, turns in questions) * args.repeat * len(methods)
        with tqdm(total=total, unit="run", smoothing=0, mininterval=1 if sys.stderr.isatty() else 60) as progress:
            for temperature, (name, group, turns) in itertools.product(args.temperatures, questions):
                messages = []
                for turn, text in enumerate(turns):
                    messages.append(text)
                    prompt = target.encode(messages)
                    if len(prompt) + args.max_new_tokens > target.model.config.max_position_embeddings:
                        too_long += 1
                        progress.update((len(turns) - turn) * args.repeat * len(methods))
                        break
                    key = (name, turn, 0.0, 0, "reference")              # the whole model's greedy answer, untimed
                    if key not in done:
                        write({"key": key, "tokens": target.run(same_width, prompt, args.max_new_tokens)[0].tokens})
                    answer = done[key]["tokens"]
                    for repeat in range(args.repeat):
                        for method in random.Random(f"{name} {turn} {repeat}").sample(list(methods), len(methods)):
                            key = (name, turn, temperature, repeat, method)
                            if key not in done:
                                stats, wall = target.run(methods[method], prompt, args.max_new_tokens, temperature, args.seed + repeat)
                                line = {"key": key, "group": group, "wall": wall} | {n: getattr(stats, n) for n in NUMBERS}
                                line["identical"] = stats.tokens == answer
                                if method == "swift":
                                    line["swift"] = sorted(swift.search.best), swift.search.score, swift.left
                                write(line)
                            progress.update()
                    messages.append(target.decode(answer))
    if too_long:
        say(f"{too_long} prompts with their answers do not fit the model's context: left out")
    return [line for line in done.values() if line["key"][-1] != "reference"]


def sums(lines) -> SimpleNamespace:
    """Totals of some runs, and what follows from them: tau, acceptance, the terms of the cost model."""
    s = SimpleNamespace(**{name: sum(line[name] for line in lines) for name in NUMBERS + ("wall",)})
    s.tau, s.accepted_share = s.new_tokens / s.cycles, s.accepted / max(1, s.drafted)
    s.verify = (s.verify_seconds or s.seconds) / s.cycles               # seconds of a pass
    s.g, s.c = s.drafted / s.cycles, (s.draft_seconds / max(1, s.drafted)) / s.verify
    s.bound = s.tau / (1 + s.g * s.c)
    return s


def speedups(lines, temperature, method, group=None) -> list[float]:
    """One for each question: medians of its repetitions, method against plain decoding."""
    pace = defaultdict(list)
    for line in lines:
        if line["key"][2] == temperature and line["key"][-1] in (method, "autoregressive") and group in (None, line.get("group")):
            pace[tuple(line["key"][:2]), line["key"][-1]].append(line["seconds"] / line["new_tokens"])
    return [statistics.median(pace[q, "autoregressive"]) / statistics.median(times)
            for (q, name), times in pace.items() if name == method and (q, "autoregressive") in pace]


def write_csv(path: Path, rows: list[dict]):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def table(target: Target, lines: list[dict], args) -> str:
    """The paper's Table 1 in Markdown: a row a method, a column a group of tasks; where CLaSp's time goes; and all as CSV."""
    groups, rows = list(dict.fromkeys(line["group"] for line in lines)), []
    out = [f"# {target.name}\n\n{target.where}. {target.layers} layers, CLaSp's settings {target.settings}. {args.max_new_tokens} new "
           f"tokens at most; {len({tuple(line['key'][:2]) for line in lines})} prompts x {args.repeat}, interleaved. A prompt's speedup is "
           "the ratio of medians, a group's the median over prompts, with quartiles over all. In a group: tau / speedup. Identical: "
           "greedy tokens equal to plain decoding's in passes of CLaSp's width."]
    for temperature in args.temperatures:
        out.append(f"\n## Temperature {temperature:g}\n\n| method | {' | '.join(groups)} | tau | accepted | tokens/s | speedup "
                   f"| identical |\n|{'---|' * (len(groups) + 6)}")
        for name in dict.fromkeys(["autoregressive", *args.methods]):
            cells = []
            for group in [*groups, None]:
                mine = [line for line in lines if line["key"][2] == temperature and line["key"][-1] == name and group in (None, line["group"])]
                s, ratios = sums(mine), speedups(lines, temperature, name, group)
                low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                rows.append({"temperature": temperature, "method": name, "group": group or "overall", "tau": s.tau, "accepted": s.accepted_share,
                             "tokens_per_second": statistics.median(line["new_tokens"] / line["seconds"] for line in mine), "speedup": middle,
                             "lower_quartile": low, "upper_quartile": high, "runs": len(mine), "identical": sum(line["identical"] for line in mine)})
                cells.append(f"{s.tau:.2f} / {middle:.2f}")
            r = rows[-1]
            cells[-1] = (f"{r['tau']:.2f} | {100 * r['accepted']:.0f} % | {r['tokens_per_second']:.1f} | **{middle:.2f}x** ({low:.2f} to {high:.2f})"
                         f" | {str(r['identical']) + ' of ' + str(r['runs']) if temperature == 0 else '-'}")
            out.append(f"| {name} | {' | '.join(cells)} |")
            if name == "clasp":
                took = ", ".join(f"{part} {getattr(s, part + '_seconds') / s.wall:.1%}" for part in ("draft", "verify", "optimize"))
                step = sums([line for line in lines if line["key"][2] == temperature and line["key"][-1] == "autoregressive"])
                time = (f"\nCLaSp's time: {took}, rest {1 - s.seconds / s.wall:.1%}. A verify pass takes {s.verify / step.verify:.2f} plain "
                        f"steps; c = {s.c:.3f}, g = {s.g:.2f}: bound tau / (1 + g c) = {s.bound:.2f}, measured {middle / s.bound:.2f} of it.")
        out += [time] if "clasp" in args.methods else []
    write_csv(args.out.with_suffix(".csv"), rows)
    return "\n".join(out) + "\n"


# ---------------------------------------------------------------------------- the figures

def save(folder: Path, name: str, target: Target, rows: list[dict], draw):
    """rows as NAME.csv, and what ``draw(axes)`` makes of them as NAME.png."""
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")                                        # needs no screen
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", rows)
    pyplot.rcParams.update({"font.size": 14, "figure.figsize": (8.5, 5.2), "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = pyplot.subplots()
    draw(axes)
    figure.text(0.01, 0.01, f"{target.name}; {target.where}", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(folder / f"{name}.png", dpi=110)
    pyplot.close(figure)
    say(f"  {folder / name}.png, .csv")


def column(rows, name):
    return [row[name] for row in rows]


def curves(rows, x, styles, **labels):
    def draw(axes):
        for name, style in styles.items():
            axes.plot(column(rows, x), column(rows, name), style, label=name)
        axes.set(xlabel=x, **labels)
        axes.legend()
    return draw


@torch.inference_mode()
def persistence(target: Target, args, prompts):
    """Fig. 3a: how alike the sets chosen at two tokens are, against the tokens between them (Jaccard similarity)."""
    budget, alike = target.layers * 44 // 80, defaultdict(list)          # the paper's M
    for prompt in prompts[:4]:
        text, sets = [*prompt, *target.run(plain, prompt, 96)[0].tokens], []
        cache = KVCache(target.model, len(text))
        prefill(target.model, cache, prompt)
        for token in text[len(prompt):]:
            sets.append(optimize(target.model, cache, prefill(target.model, cache, [token]), budget).skip_sets[budget])
        for distance in range(1, 65):
            alike[distance] += [len(a & b) / len(a | b) for a, b in zip(sets, sets[distance:]) if a | b]
    generator = random.Random(0)
    pairs = [[set(generator.sample(range(target.layers), budget)) for _ in range(2)] for _ in range(2000)]
    chance = statistics.mean(len(a & b) / len(a | b) for a, b in pairs)
    rows = [{"distance (tokens)": d, "dynamic programme": statistics.mean(values), "random sets": chance} for d, values in alike.items()]
    save(args.figures, "3a_sparse_persistence", target, rows, curves(
        rows, "distance (tokens)", {"dynamic programme": "C0", "random sets": "k--"}, ylabel="Jaccard similarity", ylim=(0, 1.02),
        title=f"Sets chosen at two tokens ({budget} of {target.layers} layers skipped)"))


@torch.inference_mode()
def markov(target: Target, args, prompts, size: int = 10):
    """Fig. 3b: on a window of layers, all others run: cosine of the programme's set, the best of all sets, their mean."""
    first, found = (target.layers - size) // 2, defaultdict(lambda: defaultdict(list))
    for prompt in prompts[:6]:
        cache = KVCache(target.model, len(prompt), 64)
        hidden = prefill(target.model, cache, prompt)
        layer, part = candidate_layer(target.model, cache, 64), hidden[first:first + size + 1]
        by_dp = select_layers(lambda i, rows: layer(first + i, rows), part, size)
        states, skipped = part[:1], torch.zeros(1, dtype=torch.long)
        for i in range(size):                                   # every set: each layer runs on all, and is left out of all
            states = torch.cat([*(layer(first + i, rows) for rows in states.split(64)), states])
            skipped = torch.cat((skipped, skipped + 1))
        cosines = F.cosine_similarity(states.float(), part[-1:].float()).cpu()
        for m in range(size + 1):
            every = cosines[skipped == m]
            found[m]["dynamic programme"].append(by_dp.cosines[m])
            found[m]["brute force"].append(every.max().item())
            found[m]["random"].append(every.mean().item())
    x = f"layers skipped of {first} to {first + size - 1}"
    rows = [{x: m} | {name: statistics.mean(values) for name, values in at.items()} for m, at in found.items()]
    save(args.figures, "3b_markov", target, rows, curves(
        rows, x, {"brute force": "k--", "dynamic programme": "C0o-", "random": "C3s-"}, ylabel="cosine with the true state after them",
        title="One survivor a cell is nearly as good as trying all sets"))


@torch.inference_mode()
def steps(target: Target, prompt: list[int], repeat: int) -> dict[str, float]:
    """Seconds of each kind of work after a prompt, medians of ``repeat`` interleaved runs."""
    model, m, k, layers = target.model, target.settings["skip_layers"], target.settings["draft_length"], target.layers
    now, width, n, half = clock(model), exact_width(model, k + 1), len(prompt), layers // 2
    cache = KVCache(model, n + 8, max(width, 8))
    hidden = prefill(model, cache, prompt)
    one, greedy = partial(select_layers, smallest=m), partial(pick, temperature=0, top_p=1, rng=None)
    skip, state = optimize(model, cache, hidden, m, one).skip_sets[0], hidden[None, -1:]
    work = {"plain step": lambda: full_pass(model, cache, [0], None)[1].argmax().item(),
            "verify pass": lambda: full_pass(model, cache, [0] * (k + 1), width)[1].argmax(-1).tolist(),
            "8 rows": lambda: full_pass(model, cache, [0] * 8, None)[1].argmax(-1).tolist(),
            "head": lambda: model.logits(state).argmax().item(),
            "draft token": lambda: draft(model, cache, 0, skip, 1, bool, greedy, ()),
            "DP": lambda: optimize(model, cache, hidden, m, one),
            f"DP, M = {half}": lambda: optimize(model, cache, hidden, half, partial(select_layers, smallest=half)),
            "DP, every M": lambda: optimize(model, cache, hidden, m),
            "DP, cell by cell": lambda: optimize(model, cache, hidden, m, select_layers_plain)}
    times = defaultdict(list)
    for _ in range(repeat + 2):
        for name, do in work.items():
            cache.length = n
            start = now()
            do()
            times[name].append(now() - start)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


@torch.inference_mode()
def speed(target: Target, args, prompt: list[int]) -> str:
    """What each step costs beside a plain one, and a plain one beside reading its weights and beside transformers."""
    model, now, count = target.model, clock(target.model), 48
    t = steps(target, prompt, max(args.repeat, 9))
    ours, theirs, reads, other, big = [], [], [], None, torch.zeros(2 ** 26, device=model.embed.weight.device)
    if target.text:
        from transformers import AutoModelForCausalLM
        like = model.embed.weight
        other = AutoModelForCausalLM.from_pretrained(target.text.folder, dtype=like.dtype).to(like.device)
    for _ in range(max(args.repeat, 5) + 1):
        start = now()
        big.sum()
        reads.append(big.nbytes / (now() - start))
        if other:
            start = now()
            list(autoregressive(model, prompt[:4], count))
            ours.append(now() - start)
            start = now()
            other.generate(torch.tensor([prompt[:4]], device=like.device), max_new_tokens=count, min_new_tokens=count, do_sample=False)
            theirs.append(now() - start)
    step, share = t["plain step"], (t["plain step"] - t["head"]) * (1 - target.settings["skip_layers"] / target.layers) + t["head"]
    rows = [(name, f"{1e3 * taken:.2f} ms", f"{taken / step:.2f}", f"{taken / t['verify pass']:.2f}") for name, taken in t.items()]
    out = [f"# Steps: {target.name}\n\n{target.where}; settings {target.settings}; after {len(prompt)} tokens; medians of interleaved runs.\n",
           "| | time | plain steps | verify passes |\n|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows),
           f"\nA plain step reads {target.bytes / 1e6:.0f} MB at {target.bytes / step / 1e9:.1f} GB/s; the best of {len(reads)} sums over 268 MB "
           f"read {max(reads) / 1e9:.1f} GB/s: {target.bytes / step / max(reads):.2f} of it. A draft token costs {t['draft token'] / share:.2f} of its "
           "share of the layers and the head."]
    if other:
        out.append(f"\nPlain decoding is {statistics.median(t / o for t, o in zip(theirs[1:], ours[1:])):.2f}x as fast as "
                   f"transformers' generate ({count} tokens after 4, {len(ours) - 1} pairs).")
    return "\n".join(out) + "\n"


@torch.inference_mode()
def breakdown(target: Target, args, prompts):
    """Fig. 3c: shares of the time, and one run of the programme, packed and cell by cell, in verify passes."""
    runs = [target.run(paper, prompt, args.max_new_tokens) for prompt in prompts[:6] for _ in range(3)]
    wall = sum(wall for _, wall in runs)
    rows = [{"what": part, "value": sum(getattr(stats, f"{part}_seconds") for stats, _ in runs) / wall, "unit": "share of decoding"}
            for part in ("draft", "verify", "optimize")]
    rows.append({"what": "rest", "value": 1 - sum(column(rows, "value")), "unit": "share of decoding"})
    times = steps(target, prompts[0], 9)
    rows += [{"what": name, "value": times[key] / times["verify pass"], "unit": "verify passes"} for name, key in (
        ("verify pass", "verify pass"), ("programme, packed rows", "DP"), ("programme, cell by cell", "DP, cell by cell"))]

    def draw(axes):
        bars = axes.barh([f"{row['what']}\n({row['unit']})" for row in rows][::-1], column(rows, "value")[::-1], color=["C4"] * 3 + ["C0"] * 4)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(xlabel="share of decoding (blue); verify passes (purple)", title="Where the time goes", xscale="symlog")
        axes.tick_params(axis="y", labelsize=9)
    save(args.figures, "3c_time", target, rows, draw)


def sweep(target: Target, args, prompts, name: str, setting: str, label: str, values) -> list[dict]:
    """Speedup and tau for each value of one setting, all interleaved: greedy, 4 prompts x --repeat."""
    lines, methods = [], {"autoregressive": (plain, {})} | {v: (paper, {setting: v}) for v in values}
    jobs = list(itertools.product(range(min(4, len(prompts))), range(args.repeat)))
    for i, repeat in tqdm(jobs, desc=setting, leave=False, disable=None):
        for method in random.Random(f"{i} {repeat}").sample(list(methods), len(methods)):
            stats, wall = target.run(methods[method][0], prompts[i], args.max_new_tokens, **methods[method][1])
            lines.append({"key": (i, 0, 0, repeat, method), "wall": wall} | {n: getattr(stats, n) for n in NUMBERS})
    rows = []
    for value in values:
        s = sums([line for line in lines if line["key"][-1] == value])
        low, middle, high = statistics.quantiles(speedups(lines, 0, value), n=4)
        rows.append({setting: value, "speedup": middle, "lower_quartile": low, "upper_quartile": high, "tau": s.tau,
                     "accepted": s.accepted_share, "c": s.c, "g": s.g, "bound": s.bound, "optimize_share": s.optimize_seconds / s.seconds})

    def draw(axes):
        axes.plot(values, column(rows, "speedup"), "C0o-", label="speedup")
        axes.fill_between(values, column(rows, "lower_quartile"), column(rows, "upper_quartile"), alpha=0.2)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xlabel=label, ylabel="speedup over plain decoding", title=f"Speedup and tau against the {label}")
        if setting == "opt_interval":
            axes.set_xscale("log", base=2)
        other = axes.twinx()
        other.plot(values, column(rows, "tau"), "C1s--", label="tau")
        other.set_ylabel("tau (tokens per verify pass)")
        axes.legend(handles=[axes.lines[0], *other.lines])
    save(args.figures, name, target, rows, draw)
    return rows


def sweeps(target: Target, args, prompts):
    """Figs. 4a to 4c, and for every setting of 4a the speedup measured beside the cost model's bound."""
    some = sorted({round(target.layers * x) for x in (.1, .2, .3, .4, .5, .6, .7, .8, .9, .95)} | {target.settings["skip_layers"]})
    by_m = sweep(target, args, prompts, "4a_skipped_layers", "skip_layers", "number of skipped layers M", some)
    sweep(target, args, prompts, "4b_interval", "opt_interval", "optimisation interval (cycles)", [2 ** i for i in range(8)])
    sweep(target, args, prompts, "4c_exit_threshold", "exit_threshold", "draft-exit threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])

    rows = sorted(({"bound, tau / (1 + g c)": r["bound"], "0.9 of it": 0.9 * r["bound"], "measured": r["speedup"], "M": r["skip_layers"]}
                   for r in by_m), key=lambda row: row["0.9 of it"])
    save(args.figures, "bound", target, rows, curves(
        rows, "bound, tau / (1 + g c)", {"bound, tau / (1 + g c)": "k--", "0.9 of it": "k:", "measured": "C0o"}, ylabel="speedup",
        title="Measured speedup and the cost model's bound, for each M"))


def heat_map(target: Target, args, prompts):
    """Which layers are skipped as one text unfolds."""
    budget, names = target.layers * 44 // 80, [f"layer {i}" for i in range(target.layers)]
    stats, _ = target.run(paper, prompts[0], max(args.max_new_tokens, 200), opt_interval=4, skip_layers=budget)
    rows = [{"new tokens": at} | {name: int(i in skip) for i, name in enumerate(names)} for at, skip in stats.skip_sets]

    def draw(axes):
        edges = [*column(rows, "new tokens"), stats.new_tokens], range(target.layers + 1)
        axes.pcolormesh(*edges, [column(rows, name) for name in names], cmap="Greys", vmax=1.6)
        axes.set(xlabel="new tokens", ylabel="layer", title=f"The {budget} layers skipped (grey) as a text unfolds")
    save(args.figures, "skipped_layers", target, rows, draw)


# ---------------------------------------------------------------------------- the command line

def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def arguments(argv: list[str] | None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default, metavar, kind, text in (
            ("model", str(BUNDLED), "PATH_OR_REPO", str, "default: the bundled model"),
            ("residual", 0.1, "F", float, "synthetic: scale of what the middle layers add; less: more is accepted; default: %(default)s"),
            ("questions", None, "FILE", str, "Spec-Bench's question.jsonl; default: our own prompts"),
            ("limit", None, "N", int, "questions of each group; default: all"),
            ("methods", "clasp,self-sd,swift,even,random,prompt-lookup", "A,B,..", lambda text: text.split(","), "default: %(default)s"),
            ("temperatures", "0,1", "T,..", numbers, "default: %(default)s"),
            ("max-new-tokens", 128, "N", int, "default: %(default)s"),
            ("repeat", 3, "N", int, "runs of everything that is timed; default: %(default)s"),
            ("skip-layers", None, "M", int, "default for this and the next three: what the model suggests, as in generate.py"),
            ("draft-length", None, "K", int, None), ("exit-threshold", None, "X", float, None), ("opt-interval", None, "N", int, None),
            ("device", None, "cpu|cuda|cuda:N|mps", str, None), ("seed", 0, "S", int, None),
            ("out", "bench.jsonl", "FILE", Path, "results, one a line; the table goes beside it as .md and .csv; default: %(default)s"),
            ("speed", None, "FILE", Path, "time the steps instead (plain, verify, draft, DP; transformers), into a Markdown file"),
            ("figures", None, "DIR", Path, "draw the figures into DIR instead of the table")):
        parser.add_argument(f"--{name}", default=default, metavar=metavar, type=kind, help=text)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--synthetic", choices=list(SHAPES), help="random weights of this shape instead of a model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        questions, target = read_questions(args), Target(args)
        say(f"{target.name}; {target.where}; {target.settings}")
        if args.speed:
            text = speed(target, args, target.encode([questions[-1][2][0]]))
            args.speed.write_text(text, encoding="utf-8")
            print(text)
        elif args.figures:
            prompts = [target.encode(turns[:1]) for _, _, turns in questions]
            random.Random(args.seed).shuffle(prompts)
            for figure in (persistence, markov, breakdown, sweeps, heat_map):
                figure(target, args, prompts)
        else:
            text = table(target, measure(target, args, questions, args.out), args)
            args.out.with_suffix(".md").write_text(text, encoding="utf-8")
            print(text)
        return 0
    except (ModelError, SettingsError, ImportError) as error:
        say("bench.py: " + " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        say("\nbench.py: stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
