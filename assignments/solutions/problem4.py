"""Problem 4 once more."""
import math

import torch

import dp_skip
from solutions.common import solves


@solves("dp_skip.select_layers")
def select_layers(layer, states, budget, smallest=0, measure=None):
    layers = dp_skip.layer_count(states, budget, smallest)
    measure = measure or dp_skip.distances
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
            a, b = measure(pair, states[i]).tolist()
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
    "smallest not checked",
    ("layer_count(states, budget, smallest)", "layer_count(states, budget)"))
select_layers.mistake(
    "cosines made of the measure",
    ("dp_skip.cosines(finals, states[-1])", "(1 - measure(finals, states[-1]) ** 2 / 2).tolist()"))
select_layers.mistake(
    "compared by the cosine itself",
    ("measure = measure or dp_skip.distances",
     "measure = measure or (lambda rows, state: "
     "(1 - torch.cosine_similarity(rows, state, dim=-1)).reshape(len(rows), -1).mean(1))"))
select_layers.mistake(
    "compared by what cosines makes",
    ("a, b = measure(pair, states[i]).tolist()",
     "a, b = [-c for c in dp_skip.cosines(pair, states[i])]"
     " if measure is dp_skip.distances else measure(pair, states[i]).tolist()"))
select_layers.mistake(
    "close enough taken for a tie",
    ("not a <= b", "not a <= b + 1e-3"))
select_layers.mistake(
    "cosines in the states' own dtype",
    ("dp_skip.cosines(finals, states[-1])",
     "torch.cosine_similarity(finals, states[-1], dim=-1).reshape(len(finals), -1)"
     ".mean(1).tolist()"))
select_layers.mistake(
    "the state asked for NaN, not the distance",
    ("not a <= b", "bool(run.isnan().any()) or b < a"))
select_layers.mistake(
    "all candidates left out where one overflowed",
    ("not a <= b", "not (a <= b and ran.isfinite().all())"))
select_layers.mistake(
    "the axis of a single token squeezed away",
    ("pair[int(choice[i, j])]", "pair[int(choice[i, j])].squeeze()"))
select_layers.mistake(
    "a hundred-thousandth taken for a tie",
    ("not a <= b", "not a <= b + 1e-5"))
select_layers.mistake(
    "cosines with the last state that was computed",
    ("dp_skip.cosines(finals, states[-1])",
     "dp_skip.cosines(finals, states[min(layers, budget + 1)])"))
select_layers.mistake(
    "another measure ignored",
    ("measure(pair", "dp_skip.distances(pair"))
select_layers.mistake(
    "of several tokens the last",
    ("    choice = {}\n",
     "    choice = {}\n    states = states if states.dim() == 2 else states[:, -1]\n"))
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
def candidate_layer(self, cache, count, tokens=1):
    n = cache.length
    first = n                                          # slot of row 0

    def layer(i, candidates):
        rows = candidates.reshape(-1, candidates.shape[-1])
        m = len(rows)
        height = m
        mask = torch.full((height, first + m), -math.inf, dtype=cache.slots.dtype)
        places = []
        for r in range(m):
            p = n - tokens + r % tokens
            true = p                                   # slots of true states that are seen
            mask[r, :true] = 0
            mask[r, first + r] = 0
            places.append(p)
        cos = cache.cos[places]
        sin = cache.sin[places]

        def store(k, v):
            return cache.put(i, first, first + m, k, v)

        return self.layers[i](rows[None], cos, sin, mask, store)[0].reshape(candidates.shape)

    return layer


candidate_layer.mistake(
    "a mask with axes of a batch and of heads",
    ("cos, sin, mask, store)", "cos, sin, mask[None, None], store)"))
candidate_layer.mistake(
    "a mask in float32",
    (", dtype=cache.slots.dtype", ""))
candidate_layer.mistake(
    "candidates in float32",
    ("rows = candidates.reshape", "rows = candidates.float().reshape"))
candidate_layer.mistake(
    "the axis of a single token forgotten",
    ("candidates.reshape(-1, candidates.shape[-1])",
     "candidates if tokens == 1 else candidates.reshape(-1, candidates.shape[-1])"))
candidate_layer.mistake(
    "no candidates not thought of",
    ("    first = n  ", "    torch.stack([cache.cos[n - 1]] * count)\n    first = n  "))
candidate_layer.mistake(
    "the slots of all announced rows read",
    ("height, first + m)", "height, first + count * tokens)"),
    ("cache.put(i, first, first + m, k, v)", "cache.put(i, first, first + count * tokens, k, v)"))
candidate_layer.mistake(
    "values cached as keys",
    ("cache.put(i, first, first + m, k, v)", "cache.put(i, first, first + m, v, k)"))
candidate_layer.mistake(
    "candidates as a batch",
    ("rows[None], cos, sin, mask, store)[0]",
     "rows[:, None], cos[:1], sin[:1], mask[:1, :first + 1], store)[:, 0]"))
candidate_layer.mistake(
    "candidates without a batch",
    ("rows[None], cos, sin, mask, store)[0]", "rows, cos, sin, mask, store)"))
candidate_layer.mistake(
    "cos and sin of different positions",
    ("cache.sin[places]", "cache.sin[[p + 1 for p in places]]"))
candidate_layer.mistake(
    "candidates see each other",
    ("mask[r, first + r] = 0", "mask[r, first:first + r + 1] = 0"))
candidate_layer.mistake(
    "slot p seen",
    ("true = p", "true = p + 1"))
candidate_layer.mistake(
    "true keys and values overwritten",
    ("first = n", "first = n - 1"))
candidate_layer.mistake(
    "position counted from the slot",
    ("places.append(p)", "places.append(n + r)"))
candidate_layer.mistake(
    "own keys not seen",
    ("mask[r, first + r] = 0", "pass"))
candidate_layer.mistake(
    "mask for the announced rows only",
    ("height = m", "height = count * tokens"))
candidate_layer.mistake(
    "position of the next token",
    ("places.append(p)", "places.append(p + 1)"))
candidate_layer.mistake(
    "cache.length moved",
    ("return cache.put(", "cache.length += m\n            return cache.put("))
candidate_layer.mistake(
    "several tokens all at the last one's position",
    ("n - tokens + r % tokens", "n - 1"))
candidate_layer.mistake(
    "several tokens from last to first",
    ("n - tokens + r % tokens", "n - 1 - r % tokens"))
candidate_layer.mistake(
    "rows of several tokens taken token by token",
    ("r % tokens", "r // (m // tokens)"))
candidate_layer.mistake(
    "the true states of the other tokens not seen",
    ("true = p", "true = n - tokens"))
candidate_layer.mistake(
    "a candidate's own rows seen, of earlier tokens",
    ("mask[r, first + r] = 0", "mask[r, first + r - r % tokens:first + r + 1] = 0"))
candidate_layer.mistake(
    "the rows of several tokens as they went through the layer",
    (".reshape(candidates.shape)", ""))
