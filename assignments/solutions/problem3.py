"""Problem 3 once more."""
import torch

import dp_skip
from solutions.common import solves


@solves("dp_skip.distances")
def distances(candidates, state):
    rows = candidates.double()
    target = state.double()
    target = target / target.norm(dim=-1, keepdim=True)
    length = rows.norm(dim=-1, keepdim=True)
    apart = rows / length - target
    square = apart.pow(2).sum(-1).reshape(len(rows), -1)         # (m, T)
    return square.mean(-1).sqrt().float()


distances.mistake(
    "no distance where it overflowed",
    ("sqrt().float()", "sqrt().float().nan_to_num()"))
distances.mistake(
    "from a float32 cosine",
    ("return square.mean(-1).sqrt().float()",
     "cosine = torch.cosine_similarity(rows.float(), target.float()[None], dim=-1)\n"
     "    return (2 - 2 * cosine).clamp(min=0).sqrt()"))
distances.mistake(
    "each number of several tokens a direction of its own",
    ("length = rows.norm(dim=-1, keepdim=True)", "length = rows.norm(dim=1, keepdim=True)"),
    ("target = target / target.norm(dim=-1, keepdim=True)",
     "target = target / target.norm(dim=0 if target.dim() > 1 else -1, keepdim=True)"))
distances.mistake(
    "the sum over the tokens",
    ("square.mean(-1)", "square.sum(-1)"))
distances.mistake(
    "the mean of the tokens' distances",
    ("square.mean(-1).sqrt()", "square.sqrt().mean(-1)"))
distances.mistake(
    "the cosine itself",
    ("return square.mean(-1).sqrt().float()",
     "return (rows / length @ target).float()"))
distances.mistake(
    "1 - cosine",
    ("return square.mean(-1).sqrt().float()",
     "return (1 - rows / length @ target).float()"))
distances.mistake(
    "short rows not made longer",
    ("length = rows.norm(dim=-1, keepdim=True)",
     "length = rows.norm(dim=-1, keepdim=True).clamp(min=1)"))
distances.mistake(
    "short true states not made longer",
    ("target / target.norm(dim=-1, keepdim=True)",
     "target / target.norm(dim=-1, keepdim=True).clamp(min=1)"))
distances.mistake(
    "lengths not divided out",
    ("rows / length", "rows"))
distances.mistake(
    "the true state's length not divided out",
    ("    target = target / target.norm(dim=-1, keepdim=True)\n", ""))
distances.mistake(
    "rows normalised in bfloat16",
    ("rows / length - target",
     "(candidates / candidates.norm(dim=-1, keepdim=True)).double() - target"))
distances.mistake(
    "the true state normalised in bfloat16",
    ("    target = target / target.norm(dim=-1, keepdim=True)\n",
     "    target = (state / state.norm(dim=-1, keepdim=True)).double()\n"))
distances.mistake(
    "bfloat16 kept",
    ("rows = candidates.double()", "rows = candidates\n    dtype = rows.dtype"),
    ("state.double()", "state"),
    (".float()", ".to(dtype)"))


@solves("dp_skip.walk_back")
def walk_back(skipped, layers, budget):
    def path(i, j):
        if i == 0:
            return []
        if skipped(i, j):
            return [*path(i - 1, j - 1), i - 1]
        return path(i - 1, j)

    return frozenset(path(layers, budget))


walk_back.mistake(
    "layers counted from 1",
    (", i - 1]", ", i]"))
walk_back.mistake(
    "j not lowered at a skip",
    ("path(i - 1, j - 1)", "path(i - 1, j)"))
walk_back.mistake(
    "walked from the first layer",
    ("return frozenset(path(layers, budget))",
     "chosen = []\n"
     "    for i in range(1, layers + 1):\n"
     "        j = len(chosen)\n"
     "        if j < budget and skipped(i, j + 1):\n"
     "            chosen.append(i - 1)\n"
     "    return frozenset(chosen)"))


@solves("dp_skip.select_layers_plain")
def select_layers_plain(layer, states, budget, measure=None):
    layers = dp_skip.layer_count(states, budget)
    measure = measure or dp_skip.distances
    column = {0: states[0]}                            # survivors, by j
    choice = {}
    for i in range(1, layers + 1):
        before = column
        column = {}
        for j in range(min(i, budget) + 1):
            if j == i:
                choice[i, j] = True
                column[j] = states[0]
                continue
            if j == 0:
                choice[i, j] = False
                column[j] = states[i]
                continue
            ran = layer(i - 1, before[j][None])[0]
            pair = torch.stack((ran, before[j - 1]))
            a, b = measure(pair, states[i]).tolist()
            choice[i, j] = not a <= b
            column[j] = pair[int(choice[i, j])]
    finals = torch.stack([column[m] for m in range(budget + 1)])
    cosines = dp_skip.cosines(finals, states[-1])
    sets = []
    for m in range(budget + 1):
        sets.append(dp_skip.walk_back(lambda i, j: choice[i, j], layers, m))
    return dp_skip.Selection(sets, cosines)


select_layers_plain.mistake(
    "a hundred-thousandth taken for a tie",
    ("not a <= b", "not a <= b + 1e-5"))
select_layers_plain.mistake(
    "cosines with the state after the last budget",
    ("dp_skip.cosines(finals, states[-1])",
     "dp_skip.cosines(finals, states[min(layers, budget + 1)])"))
select_layers_plain.mistake(
    "states in float32",
    ("    column = {0", "    states = states.float()\n    column = {0"))
select_layers_plain.mistake(
    "compared by the cosine itself",
    ("measure = measure or dp_skip.distances",
     "measure = measure or (lambda rows, state: "
     "(1 - torch.cosine_similarity(rows, state, dim=-1)).reshape(len(rows), -1).mean(1))"))
select_layers_plain.mistake(
    "compared by what cosines makes",
    ("a, b = measure(pair, states[i]).tolist()",
     "a, b = [-c for c in dp_skip.cosines(pair, states[i])]"
     " if measure is dp_skip.distances else measure(pair, states[i]).tolist()"))
select_layers_plain.mistake(
    "distances made cosines before they are compared",
    ("a, b = measure(pair, states[i]).tolist()",
     "a, b = (-(1 - measure(pair, states[i]) ** 2 / 2)).tolist()"))
select_layers_plain.mistake(
    "close enough taken for a tie",
    ("not a <= b", "not a <= b + 1e-3"))
select_layers_plain.mistake(
    "cosines in the states' own dtype",
    ("cosines = dp_skip.cosines(finals, states[-1])",
     "cosines = torch.cosine_similarity(finals, states[-1], dim=-1).reshape(budget + 1, -1)"
     ".mean(1).tolist()"))
select_layers_plain.mistake(
    "the state asked for NaN, not the distance",
    ("not a <= b", "bool(ran.isnan().any()) or b < a"))
select_layers_plain.mistake(
    "another measure ignored",
    ("measure(pair", "dp_skip.distances(pair"))
select_layers_plain.mistake(
    "of several tokens the last",
    ("    column = {0",
     "    states = states if states.dim() == 2 else states[:, -1]\n    column = {0"))
select_layers_plain.mistake(
    "several tokens as one long state",
    ("    column = {0", "    states = states.flatten(1)\n    column = {0"))
select_layers_plain.mistake(
    "min in place of max",
    ("not a <= b", "b > a"))
select_layers_plain.mistake(
    "a tie skips",
    ("not a <= b", "b <= a"))
select_layers_plain.mistake(
    "NaN run",
    ("not a <= b", "b < a"))
select_layers_plain.mistake(
    "g(i, 0) run, not the true state",
    ("column[j] = states[i]", "column[j] = layer(i - 1, before[j][None])[0]"))
select_layers_plain.mistake(
    "compared with h_(i-1)",
    ("pair, states[i]", "pair, states[i - 1]"))
select_layers_plain.mistake(
    "compared with h_L",
    ("pair, states[i]", "pair, states[-1]"))
select_layers_plain.mistake(
    "skipping does not raise j",
    ("before[j - 1]", "before[j]"))
select_layers_plain.mistake(
    "no set for m = 0",
    ("Selection(sets,", "Selection(sets[1:],"))
select_layers_plain.mistake(
    "no budget of 0",
    ("    column = {0", "    assert budget\n    column = {0"))
select_layers_plain.mistake(
    "cosines with h_0",
    ("cosines(finals, states[-1])", "cosines(finals, states[0])"))
