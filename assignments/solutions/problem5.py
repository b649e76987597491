"""Problem 5 once more."""
import torch

from solutions.common import solves


@solves("speculative.accept_greedy")
def accept_greedy(drafted, logits):
    choices = [int(row.argmax()) for row in logits]
    agree = [a == b for a, b in zip(drafted, choices)]
    accepted = [*agree, False].index(False)
    return accepted, choices[accepted]


accept_greedy.mistake(
    "all agreeing tokens counted, not the prefix",
    ("[*agree, False].index(False)", "sum(agree)"))
accept_greedy.mistake(
    "of equal logits the last",
    ("int(row.argmax())", "len(row) - 1 - int(row.flip(0).argmax())"))
accept_greedy.mistake(
    "of equal logits whichever a sort has first",
    ("int(row.argmax())", "int(row.argsort(descending=True)[0])"))
accept_greedy.mistake(
    "a drafted token that ties accepted",
    ("[a == b for a, b in zip(drafted, choices)]",
     "[bool(row[a] == row.max()) for a, row in zip(drafted, logits)]"))
accept_greedy.mistake(
    "own token from the last row",
    ("choices[accepted]", "choices[-1]"))
accept_greedy.mistake(
    "own token from the row after",
    ("choices[accepted]", "choices[min(accepted + 1, len(drafted))]"))
accept_greedy.mistake(
    "never all of the draft",
    ("[*agree, False].index(False)",
     "min([*agree, False].index(False), max(len(drafted) - 1, 0))"))
accept_greedy.mistake(
    "own token left a tensor",
    ("choices[accepted]", "logits[accepted].argmax()"))
accept_greedy.mistake(
    "number accepted left a tensor",
    ("return accepted,", "return torch.tensor(accepted),"))


@solves("speculative.accept_sampled")
def accept_sampled(drafted, q, p, rng):
    def draw(weights):
        """By inverting the distribution function."""
        total = weights.sum()
        u = torch.rand((), generator=rng) * total
        return int((weights.cumsum(0) > u).float().argmax())

    accepted = 0
    for i, d in enumerate(drafted):
        ratio = p[i][d] / q[i][d]
        if torch.rand((), generator=rng) < ratio:
            accepted += 1
        else:
            break
    i = accepted
    if i == len(drafted):
        return accepted, draw(p[i])
    left = (p[i] - q[i]).clamp(min=0)
    return accepted, draw(left)


accept_sampled.mistake(
    "a residual that is nowhere 0",
    ("clamp(min=0)", "clamp(min=1e-6)"))
accept_sampled.mistake(
    "accepted when p < q",
    ("p[i][d] / q[i][d]", "q[i][d] / p[i][d]"))
accept_sampled.mistake(
    "accepted with probability p",
    ("p[i][d] / q[i][d]", "p[i][d]"))
accept_sampled.mistake(
    "accepted when p >= q only",
    ("p[i][d] / q[i][d]", "(p[i][d] >= q[i][d]).float()"))
accept_sampled.mistake(
    "goes on after a rejection",
    ("break", "pass"))
accept_sampled.mistake(
    "residual not normalised",
    ("total = weights.sum()", "total = 1"))
accept_sampled.mistake(
    "residual from the wrong row",
    ("left =", "i = min(i + 1, len(drafted) - 1)\n    left ="))
accept_sampled.mistake(
    "no residual: drawn from p",
    ("(p[i] - q[i]).clamp(min=0)", "p[i]"))
accept_sampled.mistake(
    "|p - q| as residual",
    (".clamp(min=0)", ".abs()"))
accept_sampled.mistake(
    "q - p as residual",
    ("(p[i] - q[i])", "(q[i] - p[i])"))
accept_sampled.mistake(
    "bonus token from the draft",
    ("draw(p[i])", "draw(q[-1] if q else p[i])"))
accept_sampled.mistake(
    "bonus token by the number that accepted the last one",
    ("def draw(weights):", "u = None\n\n    def draw(weights, u=None):"),
    ("u = torch.rand((), generator=rng) * total",
     "u = (torch.rand((), generator=rng) if u is None else u) * total"),
    ("    if torch.rand((), generator=rng) < ratio:",
     "    u = torch.rand((), generator=rng)\n        if u < ratio:"),
    ("draw(p[i])", "draw(p[i], u)"))
accept_sampled.mistake(
    "bonus token from p's row before",
    ("draw(p[i])", "draw(p[max(i - 1, 0)])"))
accept_sampled.mistake(
    "always accepted",
    ("< ratio", "< 1"))
accept_sampled.mistake(
    "p's rows shifted by one",
    ("accepted = 0\n", "accepted = 0\n    p = p.roll(1, dims=0)\n"))
accept_sampled.mistake(
    "random numbers of its own",
    ("accepted = 0\n", "accepted = 0\n    rng = None\n"))
accept_sampled.mistake(
    "random numbers of its own where nothing is drafted",
    ("accepted = 0\n", "accepted = 0\n    rng = rng if drafted else None\n"))
accept_sampled.mistake(
    "greedy token in place of the rejected one",
    ("draw(left)", "int(p[i].argmax())"))
accept_sampled.mistake(
    "token in place of the rejected one left a tensor",
    ("draw(left)", "torch.multinomial(left, 1, generator=rng)"))
accept_sampled.mistake(
    "bonus token left a tensor",
    ("draw(p[i])", "torch.multinomial(p[i], 1, generator=rng)[0]"))
accept_sampled.mistake(
    "number accepted as a float",
    ("accepted = 0\n", "accepted = 0.0\n"),
    ("i = accepted\n", "i = int(accepted)\n"))
