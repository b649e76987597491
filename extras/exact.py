"""Exact to the last bit: how wide a pass of the whole model must be.

Matrix kernels round differently for 1 row and for 5. So speculative decoding, which verifies k+1 rows
where plain decoding computes 1, does not quite write plain decoding's greedy text: in bfloat16 it
parts at the first near tie. In ``speculative.full_pass`` with a ``width``, every pass has the same
number of rows and looks over whole blocks of the cache. A row's bits then depend on its token and the
keys and values before it, not on how many of the rows beside it are drafted, accepted or padding.
Plain decoding in such passes is equal bit for bit; it starts from the same keys and values, since
both put the prompt through in the same pieces.

What is left is to find a width at which a row's bits do not depend on its *place* among the rows.
"""
import weakref

import torch
from torch import Tensor

from model import BLOCK, Llama, rope_table

# What exact_width found, by model and then by (rows, slots in a block, threads).
KNOWN_WIDTHS = weakref.WeakKeyDictionary()
TRIED = 8                     # widths that are tried before giving up
ATTENTION_TRIALS = 16         # random queries for each of the trials below
TRIALS = 4                    # random rows and caches in float32
TRIALS_16_BITS = 12           # more, since 16 bits round most differences away


def exact_width(model: Llama, rows: int) -> int:
    """The fewest rows, from ``rows`` on, at which a row's bits do not depend on its place among them.

    A kernel may take the last rows differently from the first: MKL's for AVX2 take 7 as 6 + 1. So
    the machine is asked. If no width fits, ``rows`` is returned, and --compare tells what comes of it.
    """
    known = KNOWN_WIDTHS.setdefault(model, {})
    key = (rows, BLOCK, torch.get_num_threads())
    if key not in known:
        fitting = (width for width in range(rows, rows + TRIED) if is_even(model, width))
        known[key] = next(fitting, rows)
    return known[key]


@torch.inference_mode()
def is_even(model: Llama, width: int) -> bool:
    """Do equal rows come out equal, in every place, of all that a pass of the model computes?"""
    random = torch.Generator().manual_seed(0)
    in_float32 = model.embed.weight.dtype == torch.float32
    for trial in range(TRIALS if in_float32 else TRIALS_16_BITS):
        slots = (1 + trial % 3) * BLOCK
        for rows in results_of_equal_rows(model, width, slots, random):
            if not torch.equal(rows, rows[:1].expand_as(rows)):
                return False
    return True


def results_of_equal_rows(model: Llama, width: int, slots: int, random: torch.Generator):
    """One random row, ``width`` times: what a layer of each kind and the head, then attention, make of it.

    Yields tensors (width, ...). All rows see the same random keys and values.
    """
    c = model.config
    weight = model.embed.weight

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(weight)

    cos, sin = rope_table(c, 1, weight.device, weight.dtype)
    keys, values = some(2, 1, c.num_key_value_heads, slots, c.head_dim)
    mask = weight.new_zeros(width, slots)
    row = some(c.hidden_size).repeat(1, width, 1)
    for layer in layers_of_each_kind(model):
        state = layer(row, cos, sin, mask, lambda k, v: (keys, values))
        yield model.logits(state)[0]
    for _ in range(ATTENTION_TRIALS):
        q = some(1, c.num_attention_heads, 1, c.head_dim).repeat(1, 1, width, 1)
        yield model.layers[0].attend(q, keys, values, mask).transpose(0, 2)


def layers_of_each_kind(model: Llama) -> list:
    """One layer for each combination of modules: packed.py exchanges them by their weights."""
    kinds = {tuple(type(part) for part in layer.children()): layer for layer in model.layers}
    return list(kinds.values())
