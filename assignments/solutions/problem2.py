"""Problem 2 once more."""
import math

import torch

import model
from solutions.common import solves


@solves("model.Llama.forward")
def forward(self, tokens, cache=None, skip=(), slots=None):
    rows = tokens.shape[1]
    x = self.embed(tokens)
    start = cache.length if cache else 0
    end = slots or start + rows
    if cache:
        cos = cache.cos[start:start + rows]
        sin = cache.sin[start:start + rows]
    else:
        cos, sin = model.rope_table(self.config, rows, x.device, x.dtype)
    mask = model.causal_mask(start, rows, end, x)
    states = [x]
    for i, layer in enumerate(self.layers):
        def store(k, v, i=i):
            return cache.put(i, start, end, k, v)

        left_out = i in skip
        if not left_out:
            x = layer(x, cos, sin, mask, store if cache else None)
        states.append(x)
    if cache:
        cache.length = start + rows
    return states


forward.mistake(
    "more slots than it was told, where rows lie past them",
    ("    mask = model.causal_mask",
     "    end = max(end, start + rows)\n    mask = model.causal_mask"))
forward.mistake(
    "a mask with axes of a batch and of heads",
    ("x = layer(x, cos, sin, mask,", "x = layer(x, cos, sin, mask[None, None],"))
forward.mistake(
    "no mask behind a single token",
    ("model.causal_mask(start, rows, end, x)",
     "model.causal_mask(start, rows, end, x) if start != 1 or slots else None"))
forward.mistake(
    "skipped layers counted from 1",
    ("i in skip", "i + 1 in skip"))
forward.mistake(
    "no state for a skipped layer",
    ("    states.append(x)", "    if not left_out:\n            states.append(x)"))
forward.mistake(
    "length moved to the last slot read",
    ("cache.length = start + rows", "cache.length = end"))
forward.mistake(
    "values cached as keys",
    ("cache.put(i, start, end, k, v)", "cache.put(i, start, end, v, k)"))
forward.mistake(
    "no state for a skipped layer where there is a cache",
    ("    states.append(x)", "    if not (left_out and cache):\n            states.append(x)"))
forward.mistake(
    "positions from 0 with a cache",
    ("cache.cos[start:start + rows]", "cache.cos[:rows]"),
    ("cache.sin[start:start + rows]", "cache.sin[:rows]"))
forward.mistake(
    "positions counted back from the last slot read",
    ("cache.cos[start:start + rows]", "cache.cos[end - rows:end]"),
    ("cache.sin[start:start + rows]", "cache.sin[end - rows:end]"))
forward.mistake(
    "cos and sin of different positions",
    ("cache.sin[start:start + rows]", "cache.sin[:rows]"))
forward.mistake(
    "cache.length moved on in every layer",
    ("    left_out =", "    if cache:\n            cache.length += rows\n        left_out ="),
    ("cache.length = start + rows", "pass"))
forward.mistake(
    "angles in float32, whatever the states are in",
    ("rows, x.device, x.dtype)", "rows)"))
forward.mistake(
    "angles in float32 beside a cache",
    ("cache.cos[start:start + rows]", "cache.cos[start:start + rows].float()"),
    ("cache.sin[start:start + rows]", "cache.sin[start:start + rows].float()"))
forward.mistake(
    "a mask in float32",
    ("model.causal_mask(start, rows, end, x)", "model.causal_mask(start, rows, end, x.float())"))
forward.mistake(
    "no mask from slot 0 on, however many slots are read",
    ("model.causal_mask(start, rows, end, x)",
     "model.causal_mask(start, rows, end, x) if start or rows == 1 else None"))
forward.mistake(
    "cache.length not moved where all layers are skipped",
    ("    if cache:\n        cache.length = start + rows\n",
     "    if cache and len(skip) < len(self.layers):\n        cache.length = start + rows\n"))
forward.mistake(
    "a row does not see itself",
    ("causal_mask(start,", "causal_mask(start - 1,"))
forward.mistake(
    "new rows see each other",
    ("rows, end, x)", "rows, end, x)[-1:].repeat(rows, 1)"))
forward.mistake(
    "cache.length not moved",
    ("cache.length = start + rows", "pass"))
forward.mistake(
    "slots past a row not masked",
    ("end, x)", "end, x).clamp(min=-math.inf if slots is None else 0)"))
forward.mistake(
    "a skipped layer run for its cache",
    ("        states.append(x)",
     "        elif cache:\n            layer(x, cos, sin, mask, store)\n        states.append(x)"))
forward.mistake(
    "a batch's first text only",
    ("x = self.embed(tokens)", "x = self.embed(tokens[:1])"))
forward.mistake(
    "the final norm in forward",
    ("    return states", "    states[-1] = self.norm(states[-1])\n    return states"))
forward.mistake(
    "tokens changed",
    ("    return states", "    tokens += 1\n    return states"))
forward.mistake(
    "one skip too many",
    ("i in skip", "i in skip or i - 1 in skip"))


@solves("model.causal_mask")
def causal_mask(start, rows, slots, x):
    slot = torch.arange(slots, device=x.device)
    row = start + torch.arange(rows, device=x.device)[:, None]
    hidden = slot > row
    return x.new_zeros(rows, slots).masked_fill(hidden, -math.inf)


causal_mask.mistake(
    "no row may lie past the slots",
    ("return x.new_zeros(rows, slots).masked_fill(hidden, -math.inf)",
     "mask = x.new_full((rows, slots), -math.inf)\n"
     "    mask[:, :start] = 0\n"
     "    mask[:, start:start + rows] = x.new_full((rows, rows), -math.inf).triu(1)\n"
     "    return mask"))
causal_mask.mistake(
    "a row does not see itself",
    ("slot > row", "slot >= row"))
causal_mask.mistake(
    "start ignored",
    ("start + torch", "torch"))
causal_mask.mistake(
    "1 for seen, 0 for not",
    ("x.new_zeros(rows, slots)", "x.new_ones(rows, slots)"),
    ("-math.inf", "0"))
causal_mask.mistake(
    "always float32",
    ("x.new_zeros(rows, slots)", "torch.zeros(rows, slots)"))


@solves("model.Llama.logits")
def logits(self, state):
    state = self.norm(state)
    return state @ self.embed.weight.T if self.head is None else self.head(state)


logits.mistake(
    "no final norm",
    ("self.norm(state)", "state"))
logits.mistake(
    "in float32",
    ("state = self.norm(state)", "state = self.norm(state).float()"))
logits.mistake(
    "of three axes only",
    ("state @ self.embed.weight.T", "torch.einsum('brh,vh->brv', state, self.embed.weight)"))
logits.mistake(
    "by the head's weight",
    ("self.head(state)", "state @ self.head.weight.T"))
logits.mistake(
    "tied head forgotten",
    ("state @ self.embed.weight.T if self.head is None else self.head(state)", "self.head(state)"))
