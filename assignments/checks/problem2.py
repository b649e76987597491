"""Checks of problem 2. The layers are marked ones (common.py), so nothing of problem 1 is used."""
import torch

from checks.common import MarkedCache, Scale, check, close, equal, marked_model, marked_rope


def forward(tokens, skip=(), cache=None, slots=None):
    """The hidden states of the student's forward over marked layers, and what the layers were given."""
    calls = []
    llama = marked_model(calls)
    with marked_rope():
        states = llama(torch.tensor([tokens]), cache, skip, **({"slots": slots} if slots else {}))
    equal([call.layer for call in calls], [i for i in range(4) if i not in skip], "Just the layers whose index (from 0) is not in skip run, "
          "in order", f"4 layers, {len(tokens)} token{'s' * (len(tokens) > 1)}, skip = {set(skip) or '{}'}, layers run")
    return states, calls


@check(3, "Hidden states, and the layers left out")
def states():
    for skip in ((), {0}, {3}, {1}, {1, 2}, frozenset({0, 1, 2, 3})):
        got, _ = forward([1, 2], skip)
        example = f"4 layers, 2 tokens, skip = {set(skip) or '{}'}"
        equal(len(got), 5, "forward returns h_0 .. h_L, a state for the embedding and one after each layer, run or skipped",
              f"{example}, number of states")
        for i, state in enumerate(got):
            added = float(sum(2 ** layer for layer in range(i) if layer not in skip))
            close(state[0, :, 0], [100 + added, 200 + added], "h_0 is the embedding, h_i the state after layer i, and a skipped "
                  "layer's state is the one before it", f"{example}, each layer i adding 2^i, h_{i}", ("row",))


@check(1, "Without a cache")
def no_cache():
    for rows in (1, 3):
        _, calls = forward([1, 2, 3][:rows])
        example = f"tokens {[1, 2, 3][:rows]}, no cache, layer 0"
        equal(calls[0].positions, [float(r) for r in range(rows)], "Without a cache row r stands at position r", f"{example}, positions")
        equal(calls[0].sees, [[100.0 * (s + 1) for s in range(r + 1)] for r in range(rows)],
              "Without a cache row r sees rows 0 to r", f"{example}, rows seen, by their marks")


@check(3, "Continuing a cache")
def with_cache():
    for start, rows in ((0, 1), (0, 2), (3, 1), (3, 2)):
        cache = MarkedCache(start)
        _, calls = forward([1, 2][:rows], {2}, cache)
        example = f"cache.length {start}, tokens {[1, 2][:rows]}"
        equal(cache.length, start + rows, "forward moves cache.length on by the rows it was given, once", f"{example}, cache.length")
        for call in calls:
            where = f"{example}, layer {call.layer}"
            equal(call.positions, [float(start + r) for r in range(rows)], "Row r stands at position cache.length + r",
                  f"{where}, positions")
            for r in range(rows):
                equal(sorted(call.sees[r]), sorted([float(s) for s in range(start)] + [100. * (s + 1) + call.x[0, 0, 0].item() - 100
                      for s in range(r + 1)]), "Row r sees all valid slots, and the new rows up to itself",
                      f"{where}, row {r}, marks of the slots seen (old slots are marked by their number)")
            written = {slot: mark for slot, mark in cache.slots[call.layer].items() if mark >= 100 or slot >= start}
            equal(sorted(written), list(range(start, start + rows)), "The rows take the slots from cache.length on", f"{where}, slots written")
        equal(sorted(cache.slots[2]), list(range(start)), "A skipped layer writes nothing into the cache",
              f"{example}, layer 2 skipped: its slots")


@check(1, "More slots than are filled")
def wider():
    for start, rows in ((0, 1), (2, 1), (2, 2)):
        cache, seen = MarkedCache(start), []
        put = cache.put
        cache.put = lambda layer, slot, end, k, v: seen.append(end) or put(layer, slot, end, k, v)
        _, calls = forward([1, 2][:rows], (), cache, slots=8)
        example = f"slots = 8, cache.length {start}, tokens {[1, 2][:rows]}, layer 0"
        equal(seen[0], 8, "Attention reads as many slots as it is told to", f"{example}, slots read")
        for r in range(rows):
            equal(sorted(calls[0].sees[r]), sorted([float(s) for s in range(start)] + [100. * (s + 1) for s in range(r + 1)]),
                  "Slots past a row are masked, filled or not", f"{example}, row {r}, marks of the slots seen")


@check(2, "Final norm and head")
def logits():
    for tied in (False, True):
        llama = marked_model([], tie_word_embeddings=tied)
        llama.norm = Scale(3.)
        if not tied:
            llama.head.weight.data = torch.zeros(5, 8)
            llama.head.weight.data[2, 1] = 7.
        state = torch.zeros(1, 2, 8)
        state[0, 1, 0], state[0, 1, 1] = 1., 2.
        expected = torch.zeros(1, 2, 5)
        expected[0, 1] = torch.tensor([0., 300, 600, 900, 1200] if tied else [0., 0, 42, 0, 0])
        close(llama.logits(state), expected, "Logits are the head's product with the normed state; with tied embeddings the "
              "embedding is the head", f"{'tied' if tied else 'untied'}, a norm that triples, state (1, 2, 8) "
              "with (1, 2, 0 ...) in row 1", ("batch", "row", "token"))
