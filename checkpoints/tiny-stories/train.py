"""Train the bundled story model: worth its depth as a whole, and yet a good draft of itself.

    python checkpoints/tiny-stories/train.py STORIES.txt.gz --out OUT

The same OUT again resumes. STORIES is plain text with a line <|endoftext|> after each story. The
recipe, in the order of the code:

1. A byte-level BPE of 4,096 tokens is learnt from the text. One story in 50 is held out.
2. An example is a row of 513 tokens: whole stories in a row, the last one cut. A story begins with
   <|begin_of_text|> and ends with <|end_of_text|>, so the model learns to stop by itself.
3. Every batch runs through the *whole* model and is learnt as usual. Nothing is dropped there: the
   layers have to earn their place together.
4. In one batch of four, and in all of the last quarter, a part of the rows also runs through a
   *draft*, a few of the layers, which learns to predict what the whole model predicts
   (Kullback-Leibler divergence). It works as in decoding: it looks at the whole model's keys and
   values of all tokens but the last few. Drafts in every batch from the start slow the whole model.
5. Which layers draft is chosen as in decoding too: by CLaSp's DP, from the states of the token
   before. At first only a random subset is allowed, so that many layers learn to draft; in the last
   quarter all are, as in decoding.
6. Muon for the matrices of the layers, AdamW for the rest. The rate falls linearly to 0 over the
   last part of the steps. With more `--steps` on resuming it rises again, and falls again.
7. Weights from the ends of several falls, averaged, are better than each: `--average` makes them.
8. practise.py goes on from there: the model learns to repeat itself less.

Every --save-every steps the state (to resume from) and the folder that `generate.py --model` takes
are written, large files beside their old version, whose place they then take. torch.compile needs a
C++ compiler.
"""
import argparse
import gzip
import itertools
import json
import math
import os
import pickle
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import named_weights  # noqa: E402
from dp_skip import select_layers  # noqa: E402
from model import Config, Llama, rope_table  # noqa: E402

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
# LLaMA 3's pre-tokenisation: contractions, words, up to three digits, punctuation, white space.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONFIG = Config(
    vocab_size=4096, hidden_size=192, intermediate_size=384, num_hidden_layers=20,
    num_attention_heads=3, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
    rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True)
LAYERS = CONFIG.num_hidden_layers
KEPT = 4                                         # layers that draft by default
SETTINGS = {"skip_layers": LAYERS - KEPT, "draft_length": 4, "exit_threshold": 0.0,
            "opt_interval": 128, "opt_tokens": 4}

LENGTH = CONFIG.max_position_embeddings          # tokens a row
ROWS = 8                                         # rows a batch
DRAFTS = 4                                       # rows of them that are drafted as well,
WINDOW = 256                                     # so many of their tokens,
SELDOM = 4                                       # in every so many-th batch at first
OWN = 5                                          # most tokens of which a draft sees its own keys
WARM_UP = 100                                    # steps
DECAY = 0.45                                     # the last part of the steps, where the rate falls,
DRAFTING = 0.25                                  # and where every batch is drafted as well


# ---------------------------------------------------------------------------- text

def read_stories(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        refuse(f"cannot read {path}: {error}")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    if len(stories) < 2:
        refuse(f"{path}: fewer than two stories; a line <|endoftext|> ends each")
    return stories


def learn_tokenizer(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(stories, trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    return tokenizer


def encode(stories: list[str], tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each story with its begin and end: those to train on, and those held out."""
    end = tokenizer.token_to_id(END)
    encoded = [encoding.ids + [end] for encoding in tokenizer.encode_batch(stories)]
    train = [ids for i, ids in enumerate(encoded) if i % 50]
    return train, encoded[::50]


def batches(stories: list[list[int]], rows: int, seed: int = 0):
    """Batches (rows, LENGTH + 1) without end. A row begins with a story; its last one is cut."""
    batch, row = [], []
    for epoch in itertools.count(seed):
        for story in random.Random(epoch).sample(stories, len(stories)):
            row = row + story
            if len(row) > LENGTH:
                batch.append(row[:LENGTH + 1])
                row = []
            if len(batch) == rows:
                yield torch.tensor(batch)
                batch = []


# ---------------------------------------------------------------------------- the whole model

def attend(q, k, v, mask):
    """What model.attention computes, from products and softmax.

    PyTorch's own kernel is three times slower on a CPU in bfloat16. The causal case goes by
    quarters of the rows, so that little is computed only to be masked.
    """
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    q = q * q.shape[-1] ** -0.5
    if mask is not None:
        return (q @ k.mT + mask).float().softmax(-1).to(v.dtype) @ v
    size = q.shape[2] // 4
    parts = []
    for start in range(0, q.shape[2], size):
        end = start + size
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        rows = torch.arange(start, end, device=q.device)[:, None]
        later = torch.arange(end, device=q.device) > rows
        scores = scores.masked_fill(later, -torch.inf)
        parts.append(scores.float().softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(parts, 2)


def record(layer, x, cos, sin):
    """A layer on whole rows: its output, keys and values."""
    kept = []

    def store(k, v):
        kept.extend((k, v))
        return k, v

    x = layer(x, cos, sin, None, store)
    return x, kept[0], kept[1]


class Passes:
    """A model's passes in training: the whole one, and drafts that see its keys and values."""

    def __init__(self, model: Llama):
        self.model = model
        device = model.embed.weight.device
        self.cos, self.sin = rope_table(CONFIG, LENGTH, device)
        self.record = torch.compile(record, dynamic=False)
        self.follow = torch.compile(follow, dynamic=False)
        self.cross_entropy = torch.compile(cross_entropy)
        self.divergence = torch.compile(divergence)
        for layer in model.layers:
            layer.attend = attend

    def whole(self, tokens):
        """tokens (rows, LENGTH) -> states h_0 .. h_L, and of each layer (keys, values) by row."""
        states = [self.model.embed(tokens)]
        caches = []
        for layer in self.model.layers:
            x, k, v = self.record(layer, states[-1], self.cos, self.sin)
            states.append(x)
            caches.append((k.split(1), v.split(1)))
        return states, caches

    def draft(self, tokens, row: int, position: int, own: int, kept, caches):
        """One row's WINDOW tokens after a position through layers ``kept``: (1, WINDOW, hidden)."""
        window = slice(position + 1, position + 1 + WINDOW)
        mask = draft_mask(position, own).to(tokens.device)
        x = self.model.embed(tokens[row:row + 1, window])
        for i in kept:
            keys, values = caches[i]
            x = self.follow(self.model.layers[i], x, self.cos[window], self.sin[window], mask,
                            keys[row], values[row])
        return x

    @torch.no_grad()
    def choose(self, row: int, position: int, allowed: list[int], keep: int, states, caches):
        """The ``keep`` of the ``allowed`` layers that CLaSp's DP runs for one token."""
        hidden = torch.stack([states[0][row, position]] +
                             [states[i + 1][row, position] for i in allowed]).float()
        mask = torch.full((LAYERS, position + LAYERS), -torch.inf, device=hidden.device)
        mask[:, :position] = 0
        mask[:, position:].fill_diagonal_(0)                 # a candidate sees itself, and no other
        here = slice(position, position + 1)

        def layer(i: int, rows):
            keys, values = caches[allowed[i]]

            def store(k, v):
                return (torch.cat((keys[row][:, :, :position].float(), k), 2),
                        torch.cat((values[row][:, :, :position].float(), v), 2))

            seen = mask[:len(rows), :position + len(rows)]
            return self.model.layers[allowed[i]](
                rows[None], self.cos[here], self.sin[here], seen, store)[0]

        budget = len(allowed) - keep
        skipped = select_layers(layer, hidden, budget, smallest=budget).skip_sets[-1]
        return [index for i, index in enumerate(allowed) if i not in skipped]


# ---------------------------------------------------------------------------- drafts

def follow(layer, x, cos, sin, mask, keys, values):
    """A layer of a draft: it sees the whole model's keys and values, and behind them its own."""
    return layer(x, cos, sin, mask,
                 lambda k, v: (torch.cat((keys, k), 2), torch.cat((values, v), 2)))


def draft_mask(position: int, own: int) -> torch.Tensor:
    """(WINDOW, LENGTH + WINDOW): what a drafted token sees of the whole model's keys and its own.

    Of the last ``own`` tokens it sees its own, as the draft's step number ``own`` does in decoding.
    """
    place = torch.arange(WINDOW)[:, None] + position + 1
    last = (place - own).clamp(min=position)           # the last seen through the whole model
    slot = torch.arange(LENGTH)
    own_slot = torch.arange(WINDOW) + position + 1
    seen = torch.cat((slot <= last, (own_slot > last) & (own_slot <= place)), 1)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def draw_draft(rng: random.Random, late: bool) -> dict:
    """What a row's draft is like: where it starts, how many layers it has, and out of which.

    At first any subset of the layers may be allowed, so that many learn to draft. Late it is as in
    decoding: all are allowed, and most drafts have as many as the default keeps.
    """
    if late:
        allowed = list(range(LAYERS))
        keep = KEPT if rng.random() < 0.7 else rng.randint(3, LAYERS // 2)
    else:
        keep = rng.randint(3, 6) if rng.random() < 0.8 else rng.randint(7, LAYERS // 2)
        allowed = sorted(rng.sample(range(LAYERS), rng.randint(keep, LAYERS)))
    return {"position": rng.randrange(4, LENGTH - WINDOW), "own": rng.randint(1, OWN),
            "allowed": allowed, "keep": keep}


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def divergence(logits, teacher):
    """Mean KL(whole || draft) over the tokens."""
    return F.kl_div(logits.float().log_softmax(-1).flatten(0, 1),
                    teacher.float().log_softmax(-1).flatten(0, 1),
                    log_target=True, reduction="batchmean")


def draft_loss(passes: Passes, tokens, states, caches, rows, late: bool, rng: random.Random):
    """The divergence of drafts of these rows from the whole model, whose pass gave the states."""
    model = passes.model
    drafts, targets = [], []
    for row in rows:
        draw = draw_draft(rng, late)
        start = draw["position"]
        with torch.autocast(tokens.device.type, enabled=False):
            kept = passes.choose(row, start, draw["allowed"], draw["keep"], states, caches)
        drafts.append(passes.draft(tokens, row, start, draw["own"], kept, caches))
        targets.append(states[-1][row:row + 1, start + 1:start + 1 + WINDOW].detach())
    with torch.no_grad():
        teacher = model.logits(torch.cat(targets))
    return passes.divergence(model.logits(torch.cat(drafts)), teacher)


def losses(passes: Passes, batch, drafting: bool, late: bool, rng: random.Random):
    """The whole model's loss on the text, and its drafts' divergence from it (None: no drafts)."""
    model = passes.model
    tokens = batch[:, :-1]
    states, caches = passes.whole(tokens)
    loss = passes.cross_entropy(model.logits(states[-1]), batch[:, 1:])
    if not drafting:
        return loss, None
    return loss, draft_loss(passes, tokens, states, caches, range(DRAFTS), late, rng)


# ---------------------------------------------------------------------------- what comes of it

@torch.no_grad()
def held_out(passes: Passes, stories: list[list[int]], count: int = 4) -> dict[str, float]:
    """Losses on stories held out: the whole model's, and drafts' with half the layers and with 4.

    ``even`` is the loss with every other layer skipped from the first token on, which is no draft:
    it never sees the whole model's keys and values. ``agree``: how often a draft's most likely
    token is the whole model's. ``sets``: how many different sets the DP chose for that.
    """
    model = passes.model
    rng = random.Random(0)
    sums = {"whole": 0.0, "even": 0.0, "half": 0.0, "few": 0.0, "agree half": 0.0, "agree few": 0.0}
    chosen = set()
    for batch in itertools.islice(batches(stories, ROWS), count):
        batch = batch.to(model.embed.weight.device)
        tokens = batch[:, :-1]
        states, caches = passes.whole(tokens)
        sums["whole"] += cross_entropy(model.logits(states[-1]), batch[:, 1:]).item()
        x = states[0]
        for layer in model.layers[::2]:
            x = passes.record(layer, x, passes.cos, passes.sin)[0]
        sums["even"] += cross_entropy(model.logits(x), batch[:, 1:]).item()
        for row in range(ROWS):
            start = rng.randrange(4, LENGTH - WINDOW)
            window = slice(start + 1, start + 1 + WINDOW)
            best = model.logits(states[-1][row:row + 1, window]).argmax(-1)
            for name, keep in (("half", LAYERS // 2), ("few", 4)):
                with torch.autocast(tokens.device.type, enabled=False):
                    kept = passes.choose(row, start, list(range(LAYERS)), keep, states, caches)
                logits = model.logits(passes.draft(tokens, row, start, 2, kept, caches))
                text = batch[row:row + 1, start + 2:start + 2 + WINDOW]
                sums[name] += cross_entropy(logits, text).item() / ROWS
                sums["agree " + name] += (logits.argmax(-1) == best).float().mean().item() / ROWS
            chosen.add(tuple(kept))
    return {name: value / count for name, value in sums.items()} | {"sets": float(len(chosen))}


def write_folder(model: Llama, tokenizer: Tokenizer, out: Path):
    """The Hugging Face folder, in bfloat16."""
    weights = {name: view.to("cpu", torch.bfloat16).contiguous()
               for name, view in named_weights(model).items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors.new", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.new", out / "model.safetensors")
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    files = {
        "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                        **vars(CONFIG), "hidden_act": "silu", "attention_bias": False,
                        "mlp_bias": False, **ids,
                        "dtype": "bfloat16"},
        "generation_config.json": ids | {"clasp": SETTINGS},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN,
                                  "eos_token": END}}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))


# ---------------------------------------------------------------------------- running

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stories", type=Path, help="text, a line <|endoftext|> after each story; may be gzipped")
    add("--out", type=Path, required=True, help="folder for the model and the state to resume from")
    add("--steps", type=positive, default=3500)
    add("--rate", type=amount, default=5e-3, help="peak learning rate")
    add("--weight-decay", type=amount, default=0.1, help="of the layers' matrices")
    add("--draft-weight", type=amount, default=1.5,
        help="of the drafts' divergence in the last part; 1 before it")
    add("--save-every", type=positive, default=100)
    add("--average", nargs="+", metavar="STATE=SHARE", type=state_and_share,
        help="do not train: write the folder of the mean of these states, as old.pt=0.4 new.pt=0.6")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must lie between {low:g} and {high:g}")
        return float(text)

    return number


amount = between(0, 1e6)


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except Exception as error:                   # each device has its own
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {reason}") from None
    return text


def state_and_share(text: str) -> tuple[Path, float]:
    path, _, share = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text}: a share is missing, as in {text}=0.5")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no file {path}")
    if not 0 < float(share) <= 1e6:
        raise argparse.ArgumentTypeError(f"{text}: a share must be above 0, and 10^6 at most")
    return Path(path), float(share)


def new_model(device: str) -> Llama:
    """Layers begin as the identity: what they add to the stream is zero at first."""
    torch.manual_seed(0)
    model = Llama(CONFIG).to(device)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02)
        if name.endswith(("o.weight", "down.weight")):
            torch.nn.init.zeros_(weight)
    return model


def make_optimizers(model: Llama, args) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.weight_decay,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)]


def require_sound(scores: dict[str, float]):
    """Before anything is written over: what has diverged is worth less."""
    if not all(map(math.isfinite, scores.values())):
        refuse("the model has diverged: nothing was written; try a lower --rate")


def set_rate(optimizers, peak: float, step: int, steps: int, warm_up: int, decay: float) -> float:
    """The learning rate at a step: it rises at first, and falls to 0 over the last part of all."""
    rate = peak * min((step + 1) / warm_up, 1.0, (1 - step / steps) / decay)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def listed(values: dict) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())


def average(model: Llama, pairs: list[tuple[Path, float]], tokenizer: Tokenizer):
    """Fill the model with the mean of saved states, weighted by their shares."""
    paths, shares = zip(*pairs)
    states = [read_state(path, tokenizer, "cpu")["model"] for path in paths]
    mean = {name: sum(share * state[name] for share, state in zip(shares, states)) / sum(shares)
            for name in states[0]}
    model.load_state_dict(mean)


def save(model: Llama, tokenizer: Tokenizer, optimizers, step: int, path: Path):
    state = {"step": step, "model": model.state_dict(), "tokenizer": tokenizer.to_str(),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def read_state(path: Path, tokenizer: Tokenizer, device: str) -> dict:
    """What ``save`` wrote. Of another text's tokens the weights would make no sense."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        learnt = dict(state)["tokenizer"]
        Llama(CONFIG).load_state_dict(state["model"])
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
            pickle.UnpicklingError):
        refuse(f"{path} is not a state that this script saved")
    if learnt != tokenizer.to_str():
        refuse(f"{path} was trained on another text, whose tokens are others; take that text, or "
               "another folder for --out")
    return state


def load(model: Llama, tokenizer: Tokenizer, optimizers, path: Path, args) -> int:
    """Fill model and optimizers from a saved state, if any; return the step to go on with."""
    if not path.exists():
        return 0
    state = read_state(path, tokenizer, args.device)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    for group in optimizers[0].param_groups:
        group["weight_decay"] = args.weight_decay                 # may be changed on resuming
    return state["step"]


def make_folder(out: Path):
    """Find out before hours of training whether files can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        refuse(f"cannot write to --out: {error}")


def refuse(why: str):
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    sys.exit(2)


def main():
    args = arguments()
    stories = read_stories(args.stories)
    make_folder(args.out)
    tokenizer = learn_tokenizer(stories)
    train, test = encode(stories, tokenizer)
    print(f"{len(train)} stories of {sum(map(len, train)):,} tokens, {len(test)} held out",
          file=sys.stderr, flush=True)

    model = new_model(args.device)
    if args.average:
        average(model, args.average, tokenizer)
        write_folder(model, tokenizer, args.out)
        return
    optimizers = make_optimizers(model, args)
    first = load(model, tokenizer, optimizers, args.out / "state.pt", args)
    if first >= args.steps:
        refuse(f"there is nothing to do: {args.out / 'state.pt'} is at step {first}")
    passes = Passes(model)
    source = itertools.islice(batches(train, ROWS), first, None)
    started = time.time()
    shown = {}
    for step in range(first, args.steps):
        left = 1 - step / args.steps
        rate = set_rate(optimizers, args.rate, step, args.steps, WARM_UP, DECAY)
        batch = next(source).to(args.device)
        late = left < DRAFTING
        drafting = late or step % SELDOM == 0
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            loss, apart = losses(passes, batch, drafting, late, random.Random(step))
        weight = args.draft_weight if late else 1.0
        (loss + weight * apart if drafting else loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for name, value in (("loss", loss), ("draft", apart)):
            if value is not None:
                shown[name] = 0.95 * shown.get(name, value.item()) + 0.05 * value.item()
        if step % 20 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            minutes = pace * (args.steps - step - 1) / 60
            print(f"step {step}/{args.steps}  {listed(shown)}  rate {rate:.1e}  {pace:.2f} s/step"
                  f"  {minutes:.0f} min left", file=sys.stderr, flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            with torch.autocast(batch.device.type, dtype=torch.bfloat16):
                scores = held_out(passes, test)
            print(f"step {step + 1}: held-out {listed(scores)}", flush=True)
            require_sound(scores)
            write_folder(model, tokenizer, args.out)
            save(model, tokenizer, optimizers, step + 1, args.out / "state.pt")


if __name__ == "__main__":
    main()
