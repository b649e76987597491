"""Checks of problem 2. The layers are marked ones (doubles.py): nothing of problem 1 is used."""
from unittest import mock

import torch

from checks.common import check, close, equal
from checks.doubles import Matrix, Scale, marked_cache, marked_model, marked_rope, stands_at


def forward(tokens, skip=(), cache=None, slots=None):
    """The student's forward over marked layers: hidden states, and what the layers were given."""
    calls = []
    llama = marked_model(calls)
    settings = {"slots": slots} if slots else {}
    with marked_rope():
        states = llama(torch.tensor([tokens]), cache, skip, **settings)
    equal([call.layer for call in calls], [i for i in range(4) if i not in skip],
          "Just the layers whose index (from 0) is not in skip run, in order",
          f"{case(len(tokens), skip)}, layers run")
    return states, calls


def case(rows: int, skip) -> str:
    tokens = "1 token" if rows == 1 else f"{rows} tokens"
    return f"4 layers, {tokens}, skip = {set(skip) or '{}'}"


@check(3, "Hidden states, and the layers left out")
def states():
    for skip in ((), {0}, {3}, {1}, {1, 2}, frozenset({0, 1, 2, 3})):
        got, _ = forward([1, 2], skip)
        example = case(2, skip)
        equal(len(got), 5,
              "forward returns h_0 .. h_L, a state for the embedding and one after each layer, run "
              "or skipped", f"{example}, number of states")
        for i, state in enumerate(got):
            added = float(sum(2 ** layer for layer in range(i) if layer not in skip))
            close(state[0, :, 0], [100 + added, 200 + added],
                  "h_0 is the embedding, h_i the state after layer i, and a skipped layer's state "
                  "is the one before it",
                  f"{example}, each layer i adding 2^i, h_{i}", ("row",))
    texts = torch.tensor([[1, 2], [3, 4]])
    with marked_rope():
        got = marked_model([])(texts)
    for i, state in enumerate(got):
        close(state[..., 0], texts * 100.0 + 2 ** i - 1,
              "Every text of a batch goes through the layers",
              f"4 layers, tokens {texts.tolist()}, each layer i adding 2^i, h_{i}",
              ("batch", "row"))


@check(1, "Without a cache")
def no_cache():
    for rows in (1, 3):
        tokens = [1, 2, 3][:rows]
        _, calls = forward(tokens)
        example = f"tokens {tokens}, no cache, layer 0"
        stands_at(calls[0], [float(r) for r in range(rows)],
                  "Without a cache row r stands at position r", example)
        equal(calls[0].sees, [new_marks(r) for r in range(rows)],
              "Without a cache row r sees rows 0 to r", f"{example}, rows seen, by their marks")
    calls = []
    with marked_rope():
        marked_model(calls).bfloat16()(torch.tensor([[1, 2]]))
    equal(calls[0].dtype, torch.bfloat16,
          "Without a cache the angles come in the dtype of the states",
          "a model in bfloat16, no cache, dtype of cos")


def new_marks(row: int, added: float = 0.0) -> list[float]:
    """Of tokens 1, 2, ... up to a row's, after layers that added so much."""
    return [100.0 * (r + 1) + added for r in range(row + 1)]


def old_marks(start: int) -> list[float]:
    return [float(slot) for slot in range(start)]


@check(1, "The causal mask")
def mask():
    from model import causal_mask
    shut = -torch.inf
    for start, rows, slots, expected in (
        (0, 2, 2, [[0.0, shut], [0.0, 0.0]]),
        (2, 2, 4, [[0.0, 0.0, 0.0, shut], [0.0, 0.0, 0.0, 0.0]]),
        (1, 1, 4, [[0.0, 0.0, shut, shut]]),
        (2, 3, 4, [[0.0, 0.0, 0.0, shut], [0.0] * 4, [0.0] * 4]),
    ):
        example = f"causal_mask(start {start}, rows {rows}, slots {slots}, x in bfloat16)"
        got = causal_mask(start, rows, slots, torch.zeros(1, dtype=torch.bfloat16))
        close(got, expected,
              "The causal mask is 0 at the slots up to a row's own, start + r, and -inf behind",
              example, ("row", "slot"))
        equal(got.dtype, torch.bfloat16, "A mask has the dtype of x", f"{example}, dtype")


@check(2, "Continuing a cache")
def with_cache():
    for start, rows in ((0, 1), (0, 2), (1, 2), (3, 1), (3, 2)):
        cache = marked_cache(start)
        tokens = [1, 2][:rows]
        got, calls = forward(tokens, {2}, cache)
        example = f"cache.length {start}, tokens {tokens}"
        equal(len(got), 5,
              "forward returns h_0 .. h_L, a state for the embedding and one after each layer, run "
              "or skipped", f"{example}, layer 2 skipped: number of states")
        close(got[3], got[2],
              "A skipped layer's state is the one before it",
              f"{example}, layer 2 skipped: the state after it", ("batch", "row", "dimension"))
        equal(cache.length, start + rows,
              "forward moves cache.length on by the rows it was given, once",
              f"{example}, cache.length")
        for call in calls:
            continues(call, cache, start, rows, f"{example}, layer {call.layer}")
        equal(sorted(cache.marks(2)), list(range(start)),
              "A skipped layer writes nothing into the cache",
              f"{example}, layer 2 skipped: its slots")
    cache = marked_cache(1)
    forward([1], {0, 1, 2, 3}, cache)
    equal(cache.length, 2,
          "forward moves cache.length on by the rows it was given, whatever is skipped",
          "cache.length 1, 1 token, all layers skipped: cache.length")
    calls = []
    with marked_rope():
        marked_model(calls).bfloat16()(torch.tensor([[1, 2]]), marked_cache(1, torch.bfloat16))
    example = "model and cache in bfloat16, cache.length 1, 2 tokens"
    equal(calls[0].dtype, torch.bfloat16,
          "The angles are the cache's: they have its dtype", f"{example}: dtype of cos")
    equal(calls[0].mask_dtype, torch.bfloat16,
          "A mask has the dtype of the states", f"{example}: dtype of the mask")


def continues(call, cache, start: int, rows: int, example: str):
    """Was a layer given the right positions, slots and mask?"""
    stands_at(call, [float(start + r) for r in range(rows)],
              "Row r stands at position cache.length + r", example)
    added = call.x[0, 0, 0].item() - 100
    for r in range(rows):
        equal(sorted(call.sees[r]), sorted(old_marks(start) + new_marks(r, added)),
              "Row r sees all valid slots, and the new rows up to itself",
              f"{example}, row {r}, marks of the slots seen (old slots are marked by their number)")
    slots = cache.marks(call.layer).items()
    written = sorted(slot for slot, mark in slots if mark >= 100 or slot >= start)
    equal(written, list(range(start, start + rows)),
          "The rows take the slots from cache.length on", f"{example}, slots written")


@check(1, "More slots than are filled")
def wider():
    for start, rows in ((0, 1), (0, 2), (2, 1), (2, 2)):
        cache = marked_cache(start)
        tokens = [1, 2][:rows]
        _, calls = forward(tokens, (), cache, slots=8)
        example = f"slots = 8, cache.length {start}, tokens {tokens}, layer 0"
        equal(cache.length, start + rows,
              "cache.length moves on by the rows given, however many slots are read",
              f"{example}, cache.length")
        equal(cache.ends[0], 8,
              "Attention reads as many slots as it is told to", f"{example}, slots read")
        for r in range(rows):
            equal(sorted(calls[0].sees[r]), sorted(old_marks(start) + new_marks(r)),
                  "Slots past a row are masked, filled or not",
                  f"{example}, row {r}, marks of the slots seen")
        equal(calls[0].mask_shape, (rows, 8),
              "A layer's mask is (rows, slots), without further axes", f"{example}, shape of mask")
    positions_by_the_cache()
    rows_past_the_slots()


def positions_by_the_cache():
    """Where rows stand without ``slots`` is the last check's; here, that these change nothing."""
    _, few = forward([1, 2], (), marked_cache(2), slots=4)
    _, many = forward([1, 2], (), marked_cache(2), slots=8)
    equal((many[0].positions, many[0].from_sin), (few[0].positions, few[0].from_sin),
          "Row r stands at position cache.length + r, however many slots are read",
          "cache.length 2, tokens [1, 2], layer 0, slots = 8 where the other has slots = 4: "
          "positions, by cos and by sin")


def rows_past_the_slots():
    def double(start, rows, slots, x):
        return torch.zeros(rows, slots)

    cache = marked_cache(2)
    with mock.patch("model.causal_mask", double):
        forward([1, 2, 3], (), cache, slots=4)
    example = "slots = 4, cache.length 2, tokens [1, 2, 3], layer 0"
    equal(cache.ends[0], 4,
          "Attention reads as many slots as it is told to, though rows lie past them",
          f"{example}, slots read")
    equal(cache.length, 5,
          "cache.length moves on by the rows given, past the slots that are read, too",
          f"{example}, cache.length")
    equal([cache.marks(0)[slot] for slot in (2, 3, 4)], [100.0, 200.0, 300.0],
          "The rows take the slots from cache.length on, past those that are read, too",
          f"{example}, marks in slots 2, 3, 4")


@check(2, "Final norm and head")
def logits():
    for tied in (False, True):
        llama = marked_model([], tie_word_embeddings=tied)
        llama.norm = Scale(3.0)
        if not tied:
            llama.head.weight.data = torch.zeros(5, 8)
            llama.head.weight.data[2, 1] = 7.0
            llama.head = Matrix(llama.head)
        state = torch.zeros(1, 2, 8)
        state[0, 1, :2] = torch.tensor([1.0, 2.0])
        expected = torch.zeros(1, 2, 5)
        expected[0, 1] = torch.tensor([0.0, 300, 600, 900, 1200] if tied else [0.0, 0, 42, 0, 0])
        close(llama.logits(state), expected,
              "Logits are the head's product with the normed state; with tied embeddings the "
              "embedding is the head",
              f"{'tied' if tied else 'untied'}, a norm that triples, state (1, 2, 8) with "
              "(1, 2, 0 ...) in row 1", ("batch", "row", "token"))
        close(llama.logits(state[0, 1]), expected[0, 1],
              "logits takes a state of any number of axes", "state (8,)", ("token",))
        equal(llama.bfloat16().logits(state.bfloat16()).dtype, torch.bfloat16,
              "Logits have the dtype of the model", "model and state in bfloat16: dtype")
