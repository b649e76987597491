"""Train the bundled fairy-tale model so that its layers can be skipped.

    python checkpoints/fairy-tales/train.py TEXT.txt.gz --out OUT      (the same OUT: resumes)

The recipe, in the order of the code below:

1. A byte-level BPE of 4,096 tokens is learnt from the text; 2 % of the text is held out.
2. Every example is <|begin_of_text|> and what follows the start of some paragraph.
3. *Stochastic depth*: the first two layers and the last always run, and of the others a random
   subset. In a large LLaMA many layers can be left out because each adds little; a small model
   has to be taught. The first third or so of the steps runs few of the middle layers (cheap, and
   their output projections start at zero, so they join as the identity); then a quarter of the
   batches run whole.
4. *Consistency*: in the last part of the steps each batch runs twice, whole on the text and
   skipped on the whole model's predictions, as a draft is later judged by how well it predicts
   the whole model. Examples are twice as long there, which is the context the model ends up with.
5. Muon for the matrices of the layers, AdamW for the rest; the rate falls linearly to 0 over the
   consistency part, so `--steps` may be changed on resuming before that part begins.

Every --save-every steps the state (to resume from) and the folder that `generate.py --model`
takes are written; large files beside their old version, whose place they then take. torch.compile
needs a C++ compiler.
"""

import argparse
import gzip
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import named_weights  # noqa: E402
from model import Config, Llama  # noqa: E402

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# LLaMA 3's pre-tokenisation: contractions, words, up to three digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=448,
    num_hidden_layers=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
ALWAYS = (0, 1, CONFIG.num_hidden_layers - 1)  # never skipped while training
MIDDLE = [i for i in range(CONFIG.num_hidden_layers) if i not in ALWAYS]
SETTINGS = {
    "skip_layers": 17,
    "draft_length": 3,
    "exit_threshold": 0.0,
    "opt_interval": 64,
}  # by measurement
TOKENS, LENGTH, FULL_LENGTH = 4096, 256, 512  # a batch; an example, and in part 4
HALF = [MIDDLE[round(i * (len(MIDDLE) - 1) / 9)] for i in range(10)]  # ten of the twenty, evenly
PHASE_IN, CONSISTENCY = 0.3, 0.7  # fractions of the steps


def learn_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def encode(text: str, tokenizer: Tokenizer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Split into "train" and "held-out": all tokens (N,) and where paragraphs start (P,)."""
    paragraphs = [p + "\n\n" for p in text.split("\n\n") if p.strip()]
    parts = {"train": [], "held-out": []}
    for i, encoding in enumerate(tokenizer.encode_batch(paragraphs, add_special_tokens=False)):
        parts["held-out" if i // 40 % 50 == 0 else "train"].append(
            encoding.ids
        )  # runs of 40 paragraphs
    result = {}
    for name, lists in parts.items():
        starts = torch.tensor([0] + [len(ids) for ids in lists]).cumsum(0)[:-1]
        tokens = torch.tensor([i for ids in lists for i in ids])
        result[name] = tokens, starts[starts < len(tokens) - FULL_LENGTH]
    return result


def batch(data, length: int, generator: torch.Generator) -> torch.Tensor:
    """(TOKENS / length, length + 1) tokens: BEGIN, then the text from a paragraph's start."""
    tokens, starts = data
    start = starts[torch.randint(len(starts), (TOKENS // length, 1), generator=generator)]
    x = tokens[start - 1 + torch.arange(length + 1)]
    x[:, 0] = 0  # BEGIN is the tokenizer's first token
    return x


def draw_skip(progress: float, rng: random.Random) -> list[int]:
    """A random set of middle layers to leave out, by the phase of training."""
    if progress < PHASE_IN:
        kept = rng.randint(1, 6)
    elif progress < CONSISTENCY:
        kept = len(MIDDLE) if rng.random() < 0.25 else rng.randint(1, 12)
    else:
        kept = rng.randint(1, 4)  # what decoding will use
    return rng.sample(MIDDLE, len(MIDDLE) - kept)


def predict(model, tokens, skip=()):
    return model.logits(model(tokens, skip=skip)[-1])


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def divergence(logits, teacher):
    """Mean KL(whole || skipped) over the tokens."""
    return F.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1),
        teacher.float().log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )


@torch.no_grad()
def held_out(model, data, autocast) -> dict[str, float]:
    """Loss of the whole model; with half of the layers skipped; with all but 5.

    And how often the most likely token is the whole model's, with all but 5 skipped.
    """
    generator, rng, sums = torch.Generator().manual_seed(0), random.Random(0), torch.zeros(4)
    for _ in range(8):
        x = batch(data, FULL_LENGTH, generator).to(next(model.parameters()).device)
        with autocast():
            whole, half, few = (
                predict(model, x[:, :-1], skip)
                for skip in ((), HALF, rng.sample(MIDDLE, len(MIDDLE) - 2))
            )
        sums += torch.tensor(
            [cross_entropy(y, x[:, 1:]) for y in (whole, half, few)]
            + [(whole.argmax(-1) == few.argmax(-1)).float().mean()]
        )
    return dict(zip(("whole", "half", "five", "agree"), (sums / 8).tolist()))


def write_folder(model, tokenizer, out: Path):
    """The Hugging Face folder, in bfloat16."""
    weights = {
        name: view.to("cpu", torch.bfloat16).contiguous()
        for name, view in named_weights(model).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors.new", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.new", out / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(CONFIG),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1, "clasp": SETTINGS}, indent=2) + "\n"
    )
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END},
            indent=2,
        )
        + "\n"
    )
    tokenizer.save(str(out / "tokenizer.json"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "text", type=Path, help="plain text, a blank line between paragraphs; may be gzipped"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model and the state to resume from"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    raw = args.text.read_bytes()
    text = (gzip.decompress(raw) if args.text.suffix == ".gz" else raw).decode()
    tokenizer = learn_tokenizer(text)
    data = encode(text, tokenizer)
    print({name: f"{len(tokens):,} tokens" for name, (tokens, _) in data.items()}, file=sys.stderr)

    torch.manual_seed(0)
    model = Llama(CONFIG).to(args.device)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
        if name.endswith(("o.weight", "down.weight")):
            torch.nn.init.zeros_(p)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    state_file, first = args.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]
    for layer in model.layers:
        layer.compile(dynamic=False)
    loss_of, divergence_of = torch.compile(cross_entropy), torch.compile(divergence)

    def autocast():
        return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)

    started, shown = time.time(), 0.0
    for step in range(first, args.steps):
        progress = step / args.steps
        rate = args.rate * min((step + 1) / 100, 1.0, (1 - progress) / (1 - CONSISTENCY))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        length = LENGTH if progress < CONSISTENCY else FULL_LENGTH
        x = batch(data["train"], length, torch.Generator().manual_seed(step)).to(args.device)
        skip = draw_skip(progress, random.Random(step))
        with autocast():
            if progress < CONSISTENCY:
                loss = loss_of(predict(model, x[:, :-1], skip), x[:, 1:])
            else:
                whole = predict(model, x[:, :-1])
                loss = loss_of(whole, x[:, 1:])
                loss = loss + divergence_of(predict(model, x[:, :-1], skip), whole.detach())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shown = loss.item() if step == first else 0.98 * shown + 0.02 * loss.item()
        if step % 20 == 0:
            done = step + 1 - first
            left = (time.time() - started) / done * (args.steps - step - 1)
            print(
                f"step {step}/{args.steps}  loss {shown:.3f}  rate {rate:.1e}  "
                f"{done * TOKENS / (time.time() - started):,.0f} tokens/s  "
                f"{left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            scores = held_out(model, data["held-out"], autocast)
            print(
                f"step {step + 1}: held-out "
                + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()),
                flush=True,
            )
            write_folder(model, tokenizer, args.out)
            torch.save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                },
                args.out / "state.new",
            )
            os.replace(args.out / "state.new", state_file)


if __name__ == "__main__":
    main()
