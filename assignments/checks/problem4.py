"""Checks of problem 4: the same DP in L calls, and the layer that its rows go through."""
import torch

from checks.common import PropertyError, check, close, equal, show
from checks.doubles import marked_cache, marked_model, stands_at
from checks.problem3 import (
    Counted,
    doubles,
    named,
    overflow,
    refuses,
    same_cosines,
    same_sets,
    selected,
    several_tokens,
    ties,
    toy,
)

# ---------------------------------------------------------------------------- select_layers


@check(3, "The sets it chooses")
def sets():
    same_sets("select_layers")


@check(1, "States of several tokens, and another measure")
def states_of_tokens():
    several_tokens("select_layers")


@check(2, "The cosines that belong to the sets")
def cosines():
    same_cosines("select_layers")


@check(1, "Ties, overflow, and budgets that cannot be")
def tie():
    ties("select_layers")
    overflow("select_layers")
    refuses("select_layers", (1, 2), (1, -1))


@check(3, "One call for each layer")
def calls():
    from dp_skip import select_layers
    for layers, budget in ((1, 1), (2, 1), (3, 1), (3, 3), (6, 2)):
        layer, states = toy(layers, 0)
        counted = Counted(layer)
        with doubles():
            select_layers(counted, states, budget)
        equal(counted.calls, [(i, (min(i, budget), 4)) for i in range(1, layers)],
              "Each layer is called once, on all candidates j >= 1 packed as rows, M at most "
              "(j = 0 is the true state and needs no call; before layer 0 there is no other)",
              f"L = {layers}, M = {budget}, calls (layer, shape of the rows)")
        counted.in_their_dtype(states)


@check(1, "One budget only")
def smallest():
    from dp_skip import select_layers
    for layers, budget, least in (
        (2, 0, 0), (2, 1, 1), (3, 2, 1), (3, 2, 2), (6, 4, 4), (6, 4, 2), (4, 4, 4),
    ):
        example = named(layers, budget, rest=f", smallest = {least}")
        layer, states = toy(layers, 0)
        counted = Counted(layer)
        with doubles():
            every = selected(select_layers, layer, states, budget, example)
            some = selected(select_layers, counted, states, budget, example, least)
        equal(some.skip_sets, every.skip_sets[least:],
              "smallest changes which sets are found, and not what they are", f"{example}, choices")
        close(torch.tensor(some.cosines), every.cosines[least:],
              "smallest changes which cosines are found, and not what they are", example, ("set",))
        rows = sum(shape[0] for _, shape in counted.calls)
        equal(rows, cells_needed(layers, budget, least),
              "With smallest only cells with j >= smallest - (L - i) are computed: from the others "
              "too few layers follow", f"{example}, rows run in all")


def cells_needed(layers: int, budget: int, least: int) -> int:
    """Cells that have a choice and can lead to a budget of ``least`` or more."""
    count = 0
    for i in range(2, layers + 1):
        for j in range(1, min(i - 1, budget) + 1):
            if j + (layers - i) >= least:
                count += 1
    return count


# ---------------------------------------------------------------------------- candidate_layer

CASES = ((1, 1, 1), (3, 1, 1), (1, 2, 2), (3, 2, 2), (3, 3, 2))    # see ``candidates``
OF_TOKENS = ((2, 1, 1, 2), (5, 2, 2, 2), (5, 3, 2, 3), (3, 2, 2, 1))       # the same, and T


def candidates(length: int, count: int, given: int, tokens: int | None = None, layers=(1,)):
    """What candidate_layer gives marked layers for ``given`` of the ``count`` announced.

    ``length`` tokens are cached. tokens: that a candidate is states of, (m, T, 8); None: (m, 8).
    Returns the layers' calls and the cache.
    """
    calls = []
    cache = marked_cache(length)
    of_tokens = [] if tokens is None else [tokens]
    layer = marked_model(calls).candidate_layer(cache, count, *of_tokens)
    x = torch.zeros(given, *of_tokens, 8)
    marks = x[..., 0]
    marks += 100.0 + torch.arange(marks.numel()).view_as(marks)
    for i in layers:
        got = layer(i, x)
        close(got, x + 2.0 ** i,
              "layer(i, candidates) is decoder layer i on them, and gives what has their shape",
              f"{case(length, given, tokens)}, layer {i} adding 2^{i}")
    equal([call.layer for call in calls], list(layers),
          "layer(i, candidates) runs decoder layer i, once for all candidates",
          f"{case(length, given, tokens)}, layers asked for {list(layers)}: layers run")
    return calls, cache


def case(length: int, given: int, tokens: int | None = None) -> str:
    marks = " and ".join(str(100 + r) for r in range(given * (tokens or 1)))
    if tokens:
        return f"cache.length {length}, {given} candidates of {tokens} tokens, rows marked {marks}"
    return f"cache.length {length}, candidates marked {marks}"


@check(3, "What a candidate sees")
def sees():
    for length, count, given in CASES:
        calls, _ = candidates(length, count, given)
        for r in range(given):
            example = (f"{case(length, given)}, p = {length - 1}, old slots marked by their "
                       f"number: marks of the slots that candidate {r} sees")
            got = sorted(calls[0].sees[r])
            its_mark = 100.0 + r
            others = [mark for mark in got if mark >= 100 and mark != its_mark]
            if others:
                raise PropertyError(
                    "A candidate must not see another: each stands for the same token in another "
                    "draft model", f"{example}: it sees candidate {others[0] - 100:g}")
            equal(got, [*map(float, range(length - 1)), its_mark],
                  "A candidate sees the true keys and values of the positions before p, not those "
                  "at p, and its own", example)
        equal(calls[0].mask_shape, (given, length + given),
              "A layer's mask is (rows, slots), without further axes",
              f"{case(length, given)}: shape of mask")
    keeps_dtype()


@check(3, "The cache's valid part")
def valid_part():
    for length, count, given in CASES:
        _, cache = candidates(length, count, given, layers=(1, 2))
        example = case(length, given)
        equal(cache.length, length,
              "candidate_layer leaves cache.length as it was", f"{example}: cache.length after")
        for i in (1, 2):
            for slot in range(length):
                equal(cache.marks(i)[slot], float(slot),
                      "The DP must not overwrite the true keys and values: candidates write behind "
                      "the valid slots", f"{example}: mark in slot {slot} of layer {i}")
            equal(set(cache.ends), {length + given},
                  "A candidate reads the valid slots and those of the candidates given, no more",
                  f"{example}: slots read")
            behind = sorted(cache.marks(i))[length:]
            equal(behind, list(range(length, length + given)),
                  "Candidates use the slots from cache.length on, one each",
                  f"{example}: slots written behind the valid ones, in layer {i}")


def keeps_dtype():
    for shape in ((2, 8), (2, 2, 8)):
        calls = []
        cache = marked_cache(3, torch.bfloat16)
        layer = marked_model(calls).bfloat16().candidate_layer(cache, *shape[:-1])
        layer(1, torch.full(shape, 100.0, dtype=torch.bfloat16))
        example = f"model, cache and candidates {shape} in bfloat16"
        for what, dtype in (
            ("x", calls[0].x.dtype), ("cos", calls[0].dtype), ("the mask", calls[0].mask_dtype),
        ):
            equal(dtype, torch.bfloat16,
                  "What a layer is given has the dtype of the cache", f"{example}: dtype of {what}")


@check(2, "The candidates' position")
def position():
    for length, count, given in CASES:
        calls, _ = candidates(length, count, given)
        stands_at(calls[0], [float(length - 1)] * given,
                  "All candidates stand at the position of the last cached token, "
                  "p = cache.length - 1, wherever their slots are", case(length, given))


@check(1, "Candidates of several tokens, and none at all")
def candidates_of_tokens():
    for tokens in (1, 2):
        layer = marked_model([]).candidate_layer(marked_cache(5), 0, tokens)
        if not callable(layer):
            raise PropertyError(
                "candidate_layer returns a function layer(i, candidates)",
                f"no candidates, as M = 0 has it, of {tokens} tokens: got {show(layer)}")
    for length, count, given, tokens in OF_TOKENS:
        calls, cache = candidates(length, count, given, tokens)
        example = case(length, given, tokens)
        places = [length - tokens + t for _ in range(given) for t in range(tokens)]
        stands_at(calls[0], [float(place) for place in places],
                  "Of T tokens, the last in the cache, each row stands at its own token's position",
                  example)
        for r, place in enumerate(places):
            equal(sorted(calls[0].sees[r]), [*map(float, range(place)), 100.0 + r],
                  "Each row of T tokens sees the slots before its own token's position, and its "
                  "own", f"{example}: marks of the slots that row {r} sees")
        marks = cache.marks(1)
        equal([marks[slot] for slot in range(length)], [float(slot) for slot in range(length)],
              "The DP must not overwrite the true keys and values",
              f"{example}: marks of the valid slots")
        equal(cache.length, length,
              "candidate_layer leaves cache.length as it was", f"{example}: cache.length after")
