"""Exact to the last bit: passes of the whole model that all have one shape.

Matrix kernels round differently for 1 row and for 5. So speculative decoding, which verifies k+1 rows where plain
decoding computes 1, does not quite write plain decoding's greedy text: in bfloat16 it parts at the first near tie.
Here every verify pass has the same number of rows and looks over whole blocks of the cache (``full_pass``), so a
row's bits depend on its token and the keys and values before it, not on how many of the rows beside it are drafted,
accepted or padding. Plain decoding in such passes, ``autoregressive(width=K + 1)``, is then equal bit for bit; it
starts from the same keys and values, since both put the prompt through in the same pieces.
"""
import weakref

import torch
from torch import Tensor

from model import BLOCK, KVCache, Llama, ModelError, rope_table

WIDTHS = weakref.WeakKeyDictionary()       # what exact_width found, by model


def as_row(model: Llama, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.embed.weight.device)


def full_pass(model: Llama, cache: KVCache, tokens: list[int], width: int | None) -> tuple[list[Tensor], Tensor]:
    """The whole model on tokens, in ``width`` rows: hidden states (1, width, dim) each, logits (tokens, vocabulary).

    The rows left over are padding, and all rows look over whole blocks of the cache, up to the first token's
    own, so that no shape depends on how many tokens there are. Without a width: as many rows as tokens, over
    the filled slots. Raises ModelError for logits that are NaN or infinite.
    """
    n, padding, slots = cache.length, [], None
    if width is not None:
        padding, slots = tokens[:1] * (width - len(tokens)), (n // BLOCK + 1) * BLOCK
    states = model(as_row(model, tokens + padding), cache, slots=slots)
    logits = model.logits(states[-1])[0, :len(tokens)]
    cache.length = n + len(tokens)
    if not logits.max().isfinite():                                   # NaN counts as the maximum
        narrow = logits.dtype != torch.float32
        raise ModelError("the model computes NaN or infinity: its weights are damaged"
                         + f", or {logits.dtype} is too narrow for it (then use float32)" * narrow)
    return states, logits


def exact_width(model: Llama, rows: int) -> int:
    """The fewest rows, from ``rows`` on, at which a row's bits do not depend on its place among them.

    A kernel may take the last rows differently from the first (MKL's for AVX2 take 7 as 6 + 1). So the machine
    is asked: the same row in every place must come out the same in every place, from a layer of each kind and the head, and
    from attention over many random caches. Often in 16 bits, which round most differences away.
    """
    known, key = WIDTHS.setdefault(model, {}), (rows, BLOCK, torch.get_num_threads())
    if key in known:
        return known[key]
    c, weight, random = model.config, model.embed.weight, torch.Generator().manual_seed(0)
    cos, sin = rope_table(c, 1, weight.device, weight.dtype)
    trials = 4 if weight.dtype == torch.float32 else 12

    kinds = {tuple(type(part) for part in layer.children()): layer for layer in model.layers}      # packed.py makes several

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(weight)

    def same_everywhere(width: int, slots: int) -> bool:
        kv, mask = some(2, 1, c.num_key_value_heads, slots, c.head_dim), weight.new_zeros(width, slots)
        row = some(c.hidden_size).repeat(1, width, 1)
        results = [model.logits(layer(row, cos, sin, mask, lambda k, v: kv))[0] for layer in kinds.values()]
        for _ in range(16):
            q = some(1, c.num_attention_heads, 1, c.head_dim).repeat(1, 1, width, 1)
            results.append(model.layers[0].attend(q, *kv, mask).transpose(0, 2))
        return all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in results)

    fits = (w for w in range(rows, rows + 8) if all(same_everywhere(w, (1 + i % 3) * BLOCK) for i in range(trials)))
    known[key] = next(fits, rows)                  # none: nothing helps on this machine, and --compare tells what comes of it
    return known[key]
