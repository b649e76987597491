"""Problem 4 once more."""
import math

import torch

import dp_skip
from solutions.common import solves


@solves("dp_skip.select_layers")
def select_layers(layer, states, budget, smallest=0):
    layers = dp_skip.layer_count(states, budget, smallest)
    column = {0: states[0]}                            # survivors, by j
    choice = {}
    for i in range(1, layers + 1):
        before = column
        column = {0: states[i], i: states[0]}
        choice[i, 0] = False
        choice[i, i] = True
        cells = [j for j in range(1, i) if smallest - layers + i <= j <= budget]
        if not cells:
            continue
        ran = layer(i - 1, torch.stack([before[j] for j in cells]))
        for j, run in zip(cells, ran):
            pair = torch.stack((run, before[j - 1]))
            a, b = dp_skip.distances(pair, states[i]).tolist()
            choice[i, j] = not a <= b
            column[j] = pair[int(choice[i, j])]
    budgets = range(smallest, budget + 1)
    finals = torch.stack([column[m] for m in budgets])
    sets = [dp_skip.walk_back(lambda i, j: choice[i, j], layers, m) for m in budgets]
    return dp_skip.Selection(sets, dp_skip.cosines(finals, states[-1]))


select_layers.mistake(
    "states in float32",
    ("    choice = {}\n", "    choice = {}\n    states = states.float()\n"))
select_layers.mistake(
    "min in place of max",
    ("not a <= b", "b > a"))
select_layers.mistake(
    "a tie skips",
    ("not a <= b", "b <= a"))
select_layers.mistake(
    "NaN run",
    ("not a <= b", "b < a"))
select_layers.mistake(
    "the true state packed as well",
    ("torch.stack([before[j] for j in cells]))",
     "torch.stack([before[j] for j in (0, *cells)]))[1:]"))
select_layers.mistake(
    "a call for each row",
    ("layer(i - 1, torch.stack([before[j] for j in cells]))",
     "[layer(i - 1, before[j][None])[0] for j in cells]"))
select_layers.mistake(
    "layers shifted by one",
    ("layer(i - 1,", "layer(min(i, layers - 1),"))
select_layers.mistake(
    "skipping does not raise j",
    ("before[j - 1]", "before[j]"))
select_layers.mistake(
    "no budget of 0",
    ("    choice = {}\n", "    assert budget\n    choice = {}\n"))
select_layers.mistake(
    "smallest ignored but for the lists",
    ("smallest - layers + i <= j <= budget", "j <= budget"))


@solves("model.Llama.candidate_layer")
def candidate_layer(self, cache, rows):
    n = cache.length
    p = n - 1
    true = n - 1                                       # slots of true states that are seen
    first = n                                          # slot of candidate 0

    def layer(i, candidates):
        m = len(candidates)
        height = m
        mask = torch.full((height, first + m), -math.inf)
        mask[:, :true] = 0
        for r in range(m):
            mask[r, first + r] = 0
        cos = cache.cos[p].expand(m, -1)
        sin = cache.sin[p].expand(m, -1)

        def store(k, v):
            return cache.put(i, first, first + m, k, v)

        return self.layers[i](candidates[None], cos, sin, mask, store)[0]

    return layer


candidate_layer.mistake(
    "candidates as a batch",
    ("candidates[None], cos, sin, mask, store)[0]",
     "candidates[:, None], cos[:1], sin[:1], mask[:1, :first + 1], store)[:, 0]"))
candidate_layer.mistake(
    "candidates without a batch",
    ("candidates[None], cos, sin, mask, store)[0]", "candidates, cos, sin, mask, store)"))
candidate_layer.mistake(
    "cos and sin of different positions",
    ("cache.sin[p]", "cache.sin[p + 1]"))
candidate_layer.mistake(
    "candidates see each other",
    ("mask[r, first + r] = 0", "mask[r, first:first + r + 1] = 0"))
candidate_layer.mistake(
    "slot p seen",
    ("true = n - 1", "true = n"))
candidate_layer.mistake(
    "true keys and values overwritten",
    ("first = n", "first = n - 1"))
candidate_layer.mistake(
    "position counted from the slot",
    ("cache.cos[p].expand(m, -1)", "cache.cos[n:n + m]"),
    ("cache.sin[p].expand(m, -1)", "cache.sin[n:n + m]"))
candidate_layer.mistake(
    "own keys not seen",
    ("mask[r, first + r] = 0", "pass"))
candidate_layer.mistake(
    "mask for the announced rows only",
    ("height = m", "height = rows"))
candidate_layer.mistake(
    "position of the next token",
    ("p = n - 1", "p = n"))
candidate_layer.mistake(
    "cache.length moved",
    ("return cache.put(", "cache.length += m\n            return cache.put("))
