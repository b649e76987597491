"""Exact to the last bit: how wide a pass of the whole model must be.

Matrix kernels round differently for 1 row and for 5. So speculative decoding, which verifies k+1
rows where plain decoding computes 1, does not quite write plain decoding's greedy text: in bfloat16
it parts at the first near tie. In ``speculative.full_pass`` with a ``width``, every pass has the
same number of rows and looks over whole blocks of the cache. A row's bits then depend on its token
and the keys and values before it, not on how many of the rows beside it are drafted, accepted or
padding. Plain decoding in such passes is equal bit for bit; it starts from the same keys and
values, since both put the prompt through in the same pieces.

What is left is to find a width at which a row's bits do not depend on its *place* among the rows
(``exact_width``). Some kernels go further: theirs do not depend on the number of rows either, down
to some number, often 1 (``narrowest``). Then passes need no padding below it, and being exact costs
next to nothing.
"""
import sys
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from extras.packed import MATRICES
from extras.parallel import all_agree
from model import BLOCK, KVCache, Llama, rope_table, whole_blocks
from speculative import full_pass, prefill

# What was found, by model and then by (what, rows, slots in a block, threads, kind of product).
KNOWN = weakref.WeakKeyDictionary()
LONG = (1024, 4096)           # slots from which on attention has another form (attention.py)
VECTOR = 8                    # numbers that a kernel takes at once
TRIED = 8                     # widths that are tried before giving up
ATTENTION_TRIALS = 16         # random queries for each of the trials below
OUTPUTS = 2048                # of a matrix made for the trials, at most
TRIALS = 7                    # random rows and caches in float32: of each size one, at least
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

    def find() -> int | None:
        widths = range(rows, rows + TRIED)
        return next((w for w in widths if is_even(model, w) and passes_agree(model, w)), None)

    return remembered(model, "width", rows, find)


def exact_passes(model: Llama, rows: int) -> dict[str, int]:
    """How wide passes of up to so many tokens must be, as ``speculative.new_text`` is told it.

    Nothing if no width fits.
    """
    width = exact_width(model, rows)
    return {} if width is None else {"width": width, "narrowest": narrowest(model, width)}


def narrowest(model: Llama, width: int) -> int:
    """The fewest rows from which on, up to ``width``, every row has the bits that it has there.

    width: what ``exact_width`` found. On a GPU it is the answer too: there a few rows cost as much
    as one, and each shape would want a CUDA graph of its own.
    """
    if model.device.type != "cpu":
        return width
    return remembered(model, "narrowest", width, lambda: find_narrowest(model, width))


def remembered(model: Llama, what: str, rows: int, find: Callable):
    """What was found before for this model, on so many threads; else what is found now."""
    known = KNOWN.setdefault(model, {})
    product = model.embed.weight.dtype, type(model.layers[0].down)       # it may be packed since
    key = (what, rows, BLOCK, torch.get_num_threads(), product)
    if key not in known:
        known[key] = find()
    return known[key]


@torch.inference_mode()
def is_even(model: Llama, width: int) -> bool:
    """Do equal rows come out equal, in every place, of all that a pass of the model computes?"""
    matrices = cancelling_matrices(model)
    for slots, seed in trials(model):
        results = list(results_of_equal_rows(model, matrices, width, slots, seed))
        if not are_rows_of(results, [rows[:1] for rows in results]):
            return False
    return True


@torch.inference_mode()
def find_narrowest(model: Llama, width: int) -> int:
    """See ``narrowest``: by the trials of ``is_even``, and a pass of one token and padding.

    It shows a progress bar, on a terminal, from 2 s: wide passes have many widths below theirs.
    """
    from tqdm import tqdm  # comes with huggingface-hub
    least = 1
    matrices = cancelling_matrices(model)
    hidden = None if sys.stderr else True              # None: shown on a terminal
    what = "how wide exact passes must be"
    for slots, seed in tqdm(trials(model), what, leave=False, delay=2, disable=hidden):

        def results(rows: int) -> Iterable[Tensor]:
            return results_of_equal_rows(model, matrices, rows, slots, seed)

        expected = [row[:1] for row in results(width)]
        for rows in reversed(range(least, width)):
            if not are_rows_of(results(rows), expected):
                least = rows + 1
                break
    cache = KVCache(model, BLOCK, width)

    def logits(rows: int) -> Tensor:
        cache.length = 0
        return full_pass(model, cache, [0], rows)[1].nan_to_num()

    expected = [logits(width)]
    for rows in reversed(range(least, width)):
        if not are_rows_of([logits(rows)], expected):
            return rows + 1
    return least


def trials(model: Llama) -> list[tuple[int, int]]:
    """Slots of the cache, and a seed for what is random, of each trial."""
    in_float32 = model.embed.weight.dtype == torch.float32
    sizes = [BLOCK, 2 * BLOCK, 3 * BLOCK]
    most = whole_blocks(model.config.max_position_embeddings)
    long = [slots + more for slots in LONG for more in (0, BLOCK)]    # kernels may change behind it
    sizes += [slots for slots in long if slots <= most]
    count = TRIALS if in_float32 else TRIALS_16_BITS
    return [(sizes[seed % len(sizes)], seed) for seed in range(count)]


def are_rows_of(results: Iterable[Tensor], expected: list[Tensor]) -> bool:
    """Is every row of each result the one expected?

    Processes that share a model add up as often, and see only their own heads' attention. So each
    computes all results, and then all judge them together.
    """
    pairs = zip(list(results), expected)
    return all_agree(all(torch.equal(rows, row.expand_as(rows)) for rows, row in pairs))


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


def results_of_equal_rows(
    model: Llama, matrices: list[tuple[nn.Module, int]], width: int, slots: int, seed: int
):
    """What a layer of each kind, the head and attention make of one random row, ``width`` times.

    Of a layer its keys and values too: where it adds little to the row, rounding may hide it.
    Yields tensors (width, ...). All rows see the same random keys and values. The row comes first:
    processes that share a model have the same one, and heads of their own.

    matrices: those of ``cancelling_matrices``, of which a row of theirs is asked too.
    """
    c = model.config
    weight = model.embed.weight
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(weight)

    cos, sin = rope_table(c, 1, weight.device, weight.dtype)
    row = some(c.hidden_size).repeat(1, width, 1)
    keys, values = some(2, 1, c.num_key_value_heads, slots, c.head_dim)
    mask = weight.new_zeros(width, slots)
    made = []

    def store(k: Tensor, v: Tensor):
        made[:] = k, v                                     # (1, kv_heads, width, head_dim) each
        return keys, values

    for layer in layers_of_each_kind(model):
        state = layer(row, cos, sin, mask, store)
        yield from (new[0].transpose(0, 1) for new in made)
        yield state[0]
        yield model.logits(state)[0]
    seen = [(keys, values), cancelling(keys, values)]
    for _ in range(ATTENTION_TRIALS):
        q = some(1, c.num_attention_heads, 1, c.head_dim).repeat(1, 1, width, 1)
        for k, v in seen:
            yield model.layers[0].attend(q, k, v, mask).transpose(0, 2)
    for matrix, columns in matrices:
        half = some(columns // 2)
        row = torch.cat((half, half, half.new_zeros(columns % 2)))
        yield matrix(row.repeat(1, width, 1))[0]


def cancelling_matrices(model: Llama) -> list[tuple[nn.Module, int]]:
    """One matrix of each kind and shape that the model has, and its number of columns.

    Its second half is minus the first. So of a row whose second half is the first again it makes 0
    but for what rounding leaves: see ``cancelling``.
    """
    c = model.config
    shapes = [*c.layer_shapes, (c.vocab_size, c.hidden_size)]
    kinds = set()
    for layer in layers_of_each_kind(model):
        matrices = [*(getattr(layer, name) for name in MATRICES), model.head or model.embed]
        kinds |= {(kind_of(matrix), shape) for matrix, shape in zip(matrices, shapes)}
    random = torch.Generator().manual_seed(0)
    found = []
    for kind, (rows, columns) in sorted(kinds, key=str):
        half = torch.randn(min(rows, OUTPUTS), columns // 2, generator=random)
        weight = torch.cat((half, -half, half.new_zeros(len(half), columns % 2)), dim=1)
        found.append((kind(weight.to(model.embed.weight)), columns))
    return found


def kind_of(matrix: nn.Module) -> Callable[[Tensor], nn.Module]:
    """What makes such a matrix of its weights."""
    matrix = getattr(matrix, "linear", matrix)         # of a shared model: before it is added up
    return plain_linear if isinstance(matrix, nn.Linear | nn.Embedding) else type(matrix)


def plain_linear(weight: Tensor) -> nn.Module:
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def cancelling(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys whose second half is the first again, and values whose second half is minus the first.

    Attention to them is 0 but for what rounding leaves. So all its bits tell in which order it was
    added up, where of another sum 16 bits show that once in a hundred queries.
    """
    first_k, first_v = (x[:, :, :x.shape[2] // 2] for x in (keys, values))
    return torch.cat((first_k, first_k), dim=2), torch.cat((first_v, -first_v), dim=2)


def layers_of_each_kind(model: Llama) -> list:
    """One layer for each combination of modules: packed.py exchanges them by their weights.

    Where processes share a model, one: another rank's may be of other kinds, and all must add up as
    often. (``passes_agree`` sees all.)
    """
    if model.clock:
        return [model.layers[0]]
    kinds = {tuple(type(part) for part in layer.children()): layer for layer in model.layers}
    return list(kinds.values())
