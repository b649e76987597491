"""Let the story model practise on its own stories, so that it repeats itself less.

    python checkpoints/tiny-stories/practise.py STORIES.txt.gz --start FOLDER --out OUT

train.py teaches the model to go on with what others wrote. Going on with what it wrote itself, it
falls into loops: once a sentence stands there twice, a third time is the likeliest of all. Here it
meets its own text. The recipe, in the order of the code:

1. Half of the rows of a batch are stories, learnt as in train.py. The model has written the other
   half itself, at a low temperature, each story from the opening of a real one.
2. In its own rows a token that completes four in a row that stood in this story before is made less
   likely: unlikelihood (Welleck et al. 2019, arXiv 1908.04319), -log(1 - p(token)).
3. Everywhere else in these rows the model stays near what it was: KL(before || now).
4. Drafts learn as in train.py, on some rows of either kind, so that they keep up with the model.
5. Practice goes too far: the model avoids what stories do repeat. So the weights that are written
   are a mean of those before and after it.

FOLDER is what train.py wrote, from the same STORIES; OUT is such a folder, too.
"""
import argparse
import copy
import random
import sys
import time
from pathlib import Path

import torch
import train
from torch import Tensor
from train import (
    Passes,
    amount,
    batches,
    between,
    device,
    draft_loss,
    held_out,
    positive,
    refuse,
    require_sound,
)

from checkpoint import load_model
from extras.attention import folded
from model import Llama, rope_table

OWN_ROWS = 4                                     # rows of a batch that the model has written,
STORY_ROWS = 4                                   # and rows of stories,
DRAFTED = (0, 1, 4, 5)                           # and those of both that are drafted as well
WRITTEN = 24                                     # own rows that are written at a time
OPENING = 16                                     # most tokens of a real story that begin an own one
WARM_UP = 30                                     # steps
DECAY = 0.6                                      # the last part of the steps, where the rate falls
BEGIN, END = 0, 1                                # token ids, see train.write_folder


# ---------------------------------------------------------------------------- the model's own text

class Writer:
    """A copy of the model that reads one token of many rows at a time."""

    def __init__(self, model: Llama, rows: int):
        self.model = copy.deepcopy(model)
        for layer in self.model.layers:
            layer.attend = folded
        c = model.config
        slots = torch.zeros(2, c.num_hidden_layers, rows, c.num_key_value_heads, train.LENGTH,
                            c.head_dim, device=model.device)
        self.keys, self.values = slots
        self.cos, self.sin = rope_table(c, train.LENGTH, model.device)
        self.length = 0

    def read(self, tokens: list[int]) -> Tensor:
        """The next token of every row -> logits (rows, vocabulary)."""
        here = slice(self.length, self.length + 1)
        self.length += 1
        x = self.model.embed(torch.tensor(tokens, device=self.keys.device)[:, None])
        for i, layer in enumerate(self.model.layers):
            def store(k, v):
                self.keys[i][:, :, here] = k
                self.values[i][:, :, here] = v
                return self.keys[i][:, :, :self.length], self.values[i][:, :, :self.length]

            x = layer(x, self.cos[here], self.sin[here], None, store)
        return self.model.logits(x[:, 0])


@torch.no_grad()
def write(model: Llama, stories: list[list[int]], rows: int, temperature: float,
          rng: random.Random) -> list[list[int]]:
    """Rows of LENGTH + 1 tokens: the model's stories, each behind the opening of a real one."""
    torch.manual_seed(rng.randrange(2**32))
    writer = Writer(model, rows)
    text = [[END] for _ in range(rows)]
    given = [[] for _ in range(rows)]            # what is left of an opening
    drawn = [END] * rows                         # the first that counts follows an opening
    for _ in range(train.LENGTH + 1):
        for row in range(rows):
            if text[row][-1] == END:
                given[row] = rng.choice(stories)[:rng.randint(2, OPENING)]
            text[row].append(given[row].pop(0) if given[row] else drawn[row])
        if writer.length < train.LENGTH:
            logits = writer.read([row[-1] for row in text])
            p = (logits / temperature).softmax(-1)
            require_sound({"p": p.sum()})
            drawn = torch.multinomial(p, 1)[:, 0].tolist()
    return [row[1:] for row in text]


def repetitions(row: list[int], length: int) -> list[bool]:
    """Of each token: does it complete so many in a row that stood in its story before?"""
    found = []
    story, seen = [], set()
    for token in row:
        if token == BEGIN:
            story, seen = [], set()
        story.append(token)
        last = tuple(story[-length:])
        found.append(last in seen)
        if len(last) == length:
            seen.add(last)
    return found


# ---------------------------------------------------------------------------- losses

def unlikelihood(logs: Tensor, tokens: Tensor, repeated: Tensor) -> Tensor:
    """The sum of -log(1 - p(token)) over the tokens that repeat, by the number of all tokens.

    logs (rows, LENGTH, vocabulary): log probabilities; tokens, repeated (rows, LENGTH).
    """
    taken = logs.gather(-1, tokens[..., None])[..., 0].exp()
    taken = taken.clamp(max=0.9999)              # what is surer than that is let be
    return -(torch.log1p(-taken) * repeated).mean()


def change(logs: Tensor, before: Tensor, repeated: Tensor) -> Tensor:
    """The sum of KL(before || now) over the tokens that do not repeat, by the number of all."""
    divergence = (before.exp() * (before - logs)).sum(-1)
    return (divergence * ~repeated).mean()


def losses(passes: Passes, before: Passes, batch: Tensor, length: int,
           rng: random.Random) -> dict[str, Tensor]:
    """Of a batch (OWN_ROWS + STORY_ROWS, LENGTH + 1), the model's own rows first.

    length: of a repetition.
    """
    model = passes.model
    tokens, following = batch[:, :-1], batch[:, 1:]
    repeated = torch.tensor([repetitions(row, length) for row in batch[:OWN_ROWS].tolist()],
                            device=batch.device)[:, 1:]
    states, caches = passes.whole(tokens)
    logits = model.logits(states[-1])
    logs = logits[:OWN_ROWS].float().log_softmax(-1)
    with torch.no_grad():
        states_before, _ = before.whole(tokens[:OWN_ROWS])
        logs_before = before.model.logits(states_before[-1]).float().log_softmax(-1)
    return {
        "text": passes.cross_entropy(logits[OWN_ROWS:], following[OWN_ROWS:]),
        "repeating": unlikelihood(logs, following[:OWN_ROWS], repeated),
        "change": change(logs, logs_before, repeated),
        "draft": draft_loss(passes, tokens, states, caches, DRAFTED, True, rng)}


# ---------------------------------------------------------------------------- running

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stories", type=Path, help="the text that train.py was given")
    add("--start", type=Path, required=True, help="folder of the model, as train.py writes it")
    add("--out", type=Path, required=True, help="folder for the model that has practised")
    add("--steps", type=positive, default=130)
    add("--share", type=between(0, 1), default=0.5,
        help="of the weights after practice in the mean")
    add("--repeated", type=positive, default=4, help="tokens in a row that are a repetition")
    add("--repeating", type=amount, default=5.0, help="weight of the unlikelihood")
    add("--change", type=amount, default=0.2, help="weight of the divergence from the model before")
    add("--draft", type=amount, default=1.5, help="weight of the drafts' divergence")
    add("--rate", type=amount, default=2e-4, help="peak learning rate")
    add("--temperature", type=between(1e-6, 1e6), default=0.45, help="of the model's own text")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load(folder: Path, tokenizer, device: str) -> Llama:
    """The model of a folder, whose tokens must be those of the text."""
    try:
        learnt = type(tokenizer).from_file(str(folder / "tokenizer.json"))
        model = load_model(folder, device)
    except Exception as error:                   # tokenizers has no narrower one
        refuse(f"cannot load --start {folder}: {error}")
    if learnt.to_str() != tokenizer.to_str() or model.config != train.CONFIG:
        refuse(f"{folder} is not a model that train.py made of this text")
    return model


def main():
    args = arguments()
    stories = train.read_stories(args.stories)
    if args.out.resolve() == args.start.resolve():
        refuse("--out must be another folder than --start")
    train.make_folder(args.out)
    tokenizer = train.learn_tokenizer(stories)
    learnt, unseen = train.encode(stories, tokenizer)
    model = load(args.start, tokenizer, args.device)
    before = Passes(copy.deepcopy(model))
    passes = Passes(model.requires_grad_())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    source = batches(learnt, STORY_ROWS)
    own = []
    started = time.time()
    for step in range(args.steps):
        rng = random.Random(step)
        if len(own) < OWN_ROWS:
            own = write(model, learnt, WRITTEN, args.temperature, rng)
        batch = torch.cat((torch.tensor(own[:OWN_ROWS]), next(source))).to(args.device)
        own = own[OWN_ROWS:]
        train.set_rate([optimizer], args.rate, step, args.steps, WARM_UP, DECAY)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            parts = losses(passes, before, batch, args.repeated, rng)
        loss = (parts["text"] + args.repeating * parts["repeating"]
                + args.change * parts["change"] + args.draft * parts["draft"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            pace = (time.time() - started) / (step + 1)
            print(f"step {step}/{args.steps}  {train.listed(parts)}  {pace:.2f} s/step",
                  file=sys.stderr, flush=True)
    with torch.no_grad():
        for weight, old in zip(model.parameters(), before.model.parameters()):
            weight.copy_(old.lerp(weight, args.share))
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        scores = held_out(passes, unseen)
    print(f"held-out {train.listed(scores)}")
    require_sound(scores)
    train.write_folder(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
