"""Exact to the last bit: how wide a pass of the whole model must be.

Matrix kernels round differently for 1 row and for 5. So speculative decoding, which verifies k+1
rows where plain decoding computes 1, does not quite write plain decoding's greedy text: in bfloat16
it parts at the first near tie. In ``speculative.full_pass`` with a ``width``, every pass has the
same number of rows and looks over whole blocks of the cache. A row's bits then depend on its token
and the keys and values before it, not on how many of the rows beside it are drafted, accepted or
padding. Plain decoding in such passes is equal bit for bit; it starts from the same keys and
values, since both put the prompt through in the same pieces.

What is left is to find a width at which a row's bits do not depend on its *place* among the rows.
"""
import weakref

import torch
from torch import Tensor

from extras.parallel import all_agree
from model import BLOCK, KVCache, Llama, rope_table
from speculative import full_pass, prefill

# What exact_width found, by model and then by (rows, slots in a block, threads).
KNOWN_WIDTHS = weakref.WeakKeyDictionary()
LONG = (1024, 4096)           # slots from which on attention has another form (attention.py)
VECTOR = 8                    # numbers that a kernel takes at once
TRIED = 8                     # widths that are tried before giving up
ATTENTION_TRIALS = 16         # random queries for each of the trials below
TRIALS = 6                    # random rows and caches in float32
TRIALS_16_BITS = 12           # more, since 16 bits round most differences away


def exact_width(model: Llama, rows: int) -> int | None:
    """The fewest rows, from ``rows`` on, at which a row's bits do not depend on its place.

    A kernel may take the last rows differently from the first: MKL's for AVX2 take 7 as 6 + 1. So
    the machine is asked. None: no width fits, as with some odd sizes.

    Kernels read heads in vectors, and take what is left over otherwise, for some rows: too rarely
    for trials to see. So heads of other sizes than multiples of a vector's have no width.
    """
    if model.config.head_dim % VECTOR:
        return None
    known = KNOWN_WIDTHS.setdefault(model, {})
    key = (rows, BLOCK, torch.get_num_threads())
    if key not in known:
        widths = range(rows, rows + TRIED)
        fitting = (w for w in widths if is_even(model, w) and passes_agree(model, w))
        known[key] = next(fitting, None)
    return known[key]


@torch.inference_mode()
def is_even(model: Llama, width: int) -> bool:
    """Do equal rows come out equal, in every place, of all that a pass of the model computes?

    Processes that share a model add up as often, and see only their own heads' attention. So each
    computes a whole trial, and then all judge it together.
    """
    in_float32 = model.embed.weight.dtype == torch.float32
    sizes = [BLOCK, 2 * BLOCK, 3 * BLOCK]
    sizes += [slots for slots in LONG if slots <= model.config.max_position_embeddings]
    for trial in range(TRIALS if in_float32 else TRIALS_16_BITS):
        slots = sizes[trial % len(sizes)]
        random = torch.Generator().manual_seed(trial)
        results = list(results_of_equal_rows(model, width, slots, random))
        if not all_agree(all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in results)):
            return False
    return True


@torch.inference_mode()
def passes_agree(model: Llama, width: int) -> bool:
    """Does a pass of ``width`` tokens give them the logits that each has in a pass by itself?

    They lie in one block of the cache, as those of every pass do.
    """
    random = torch.Generator().manual_seed(0)
    count = min(width, BLOCK - 1)
    tokens = torch.randint(model.config.vocab_size, (count + 1,), generator=random).tolist()
    cache = KVCache(model, BLOCK + width, width)
    prefill(model, cache, tokens[:1])
    _, together = full_pass(model, cache, tokens[1:], width)
    together = together.clone()          # with CUDA graphs the next pass takes its place
    for place in (count - 1, count // 2, 0):         # the last first: a pass overwrites later slots
        cache.length = 1 + place
        _, alone = full_pass(model, cache, tokens[1 + place:2 + place], width)
        # In float16 a random token may overflow: NaN is to equal NaN.
        if not torch.equal(alone[0].nan_to_num(), together[place].nan_to_num()):
            return False
    return True


def results_of_equal_rows(model: Llama, width: int, slots: int, random: torch.Generator):
    """What a layer of each kind, the head and attention make of one random row, ``width`` times.

    Yields tensors (width, ...). All rows see the same random keys and values. The row comes first:
    processes that share a model have the same one, and heads of their own.
    """
    c = model.config
    weight = model.embed.weight

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(weight)

    cos, sin = rope_table(c, 1, weight.device, weight.dtype)
    row = some(c.hidden_size).repeat(1, width, 1)
    keys, values = some(2, 1, c.num_key_value_heads, slots, c.head_dim)
    mask = weight.new_zeros(width, slots)
    for layer in layers_of_each_kind(model):
        state = layer(row, cos, sin, mask, lambda k, v: (keys, values))
        yield model.logits(state)[0]
    for _ in range(ATTENTION_TRIALS):
        q = some(1, c.num_attention_heads, 1, c.head_dim).repeat(1, 1, width, 1)
        yield model.layers[0].attend(q, keys, values, mask).transpose(0, 2)


def layers_of_each_kind(model: Llama) -> list:
    """One layer for each combination of modules: packed.py exchanges them by their weights.

    Where processes share a model, one: another rank's may be of other kinds, and all must add up as
    often. (``passes_agree`` sees all.)
    """
    if model.clock:
        return [model.layers[0]]
    kinds = {tuple(type(part) for part in layer.children()): layer for layer in model.layers}
    return list(kinds.values())
