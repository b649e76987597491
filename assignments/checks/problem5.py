"""Checks of problem 5: the prefix on one-hot logits; sampling by counting outcomes.

A check by counting draws many times with fixed seeds, and holds what comes out against
probabilities worked out by hand. It allows five standard deviations, so the right rule passes for
any way of using the generator, and a rule that is wrong by a few per cent does not.
"""
from collections import Counter

import torch

from checks.common import PropertyError, check, equal, is_int, parts, random, show

DRAWS = 1500
NAMES = "number accepted, next token"             # of what both functions return


# ---------------------------------------------------------------------------- greedy

def judged(drafted: list[int], choices: list[int] = (4, 2, 0, 1), ties: list[int] | None = None):
    """What accept_greedy makes of a draft when the whole model would write these.

    ties: of each row, another token whose logit is as large.
    """
    from speculative import accept_greedy
    choices = list(choices[:len(drafted) + 1])
    example = f"drafted {drafted}, the whole model's choices {choices}"
    logits = torch.eye(5)[choices]
    if ties is not None:
        ties = ties[:len(choices)]
        example += f", other tokens with logits as large {ties}"
        logits += torch.eye(5)[ties]
    got = accept_greedy(drafted, logits)
    return parts(got, "accept_greedy", NAMES, example), example


PREFIXES = [                  # drafted, accepted, the whole model's own token after them
    ([], 0, 4),
    ([4], 1, 2),
    ([3], 0, 4),
    ([4, 2], 2, 0),
    ([4, 3], 1, 2),
    ([3, 2], 0, 4),
    ([4, 3, 0], 1, 2),
    ([4, 2, 0], 3, 1),
    ([3, 2, 0], 0, 4),
    ([4, 2, 1], 2, 0),
]


def random_prefixes():
    """Drafts with their first mistake at a place chosen beforehand; and what is accepted."""
    for count in range(6):
        draws = random(2, 6, seed=31 + count).mul(100).int()
        choices = (draws[0] % 5).tolist()
        drafted = choices[:count] + [(choices[count] + 1) % 5] + (draws[1] % 5).tolist()
        drafted = drafted[:5]
        yield drafted, choices, min(count, 5)


@check(3, "Greedy: the accepted prefix")
def prefix():
    for drafted, expected, _ in PREFIXES:
        (accepted, _), example = judged(drafted)
        is_int(accepted, "The number accepted", example)
        equal(accepted, expected,
              "The longest prefix of the draft that the whole model would have written itself is "
              "accepted; nothing after its first disagreement", f"{example}: accepted")
    for drafted, choices, expected in random_prefixes():
        (accepted, _), example = judged(drafted, choices)
        equal(accepted, expected,
              "The longest prefix of the draft that the whole model would have written itself is "
              "accepted", f"{example}: accepted")
    for drafted, expected in (([3], (0, 1)), ([1], (1, 2)), ([4], (0, 1))):
        got, example = judged(drafted, [1, 2], ties=[3, 4])
        equal(tuple(got), expected,
              "Of equal logits the first counts, as argmax has it and plain decoding writes",
              f"{example}: {NAMES}")
    ties_among_many()


def ties_among_many(size: int = 1000):
    """Some ways to sort have equals in any order, but only among many."""
    from speculative import accept_greedy
    for case in range(8):
        draws = random(4, seed=38 + case).mul(1e4).int().abs() % size
        largest = sorted(draws.tolist())
        logits = random(2, size, seed=46 + case)
        logits[:, largest] = 9.0
        got = accept_greedy(largest[:1], logits)
        equal(tuple(got), (1, largest[0]),
              "Of equal logits the first counts, as argmax has it and plain decoding writes",
              f"drafted {largest[:1]}, 2 rows of {size} logits, the largest those of tokens "
              f"{show(largest)}: {NAMES}")


@check(2, "Greedy: the token after it")
def own():
    for drafted, _, expected in PREFIXES:
        (_, token), example = judged(drafted)
        is_int(token, "The next token", example)
        equal(token, expected,
              "After the accepted tokens comes the whole model's own choice at that row: a "
              "correction, or after a draft accepted whole the bonus token",
              f"{example}: its own token")
    for drafted, choices, accepted in random_prefixes():
        (_, token), example = judged(drafted, choices)
        equal(token, choices[accepted],
              "After the accepted tokens comes the whole model's own choice at that row",
              f"{example}: its own token")


# ---------------------------------------------------------------------------- sampling

def case(drafted, q, p) -> str:
    return f"drafted {drafted}, q {q}, p {p}"


def count(drafted, q, p) -> Counter:
    """How often each (accepted, token) came out of so many draws."""
    from speculative import accept_sampled
    rng = torch.Generator().manual_seed(0)
    q_rows = [torch.tensor(row) for row in q]
    p_rows = torch.tensor(p)
    outcomes = Counter()
    for _ in range(DRAWS):
        fresh = [row.clone() for row in q_rows]
        got = accept_sampled(list(drafted), fresh, p_rows.clone(), rng)
        accepted, token = parts(got, "accept_sampled", NAMES, case(drafted, q, p))
        outcomes[int(accepted), int(token)] += 1
    return outcomes


def likely(outcomes: Counter, expected: dict, sentence: str, example: str):
    """Every outcome as often as its probability says, up to five standard deviations."""
    draws = sum(outcomes.values())
    for outcome in sorted(expected.keys() | outcomes.keys()):
        probability = expected.get(outcome, 0.0)
        share = outcomes[outcome] / draws
        deviation = (probability * (1 - probability) / draws) ** 0.5
        if abs(share - probability) > 5 * deviation + 1e-9:
            raise PropertyError(
                sentence,
                f"{example} {show(outcome)}: expected probability {probability:.3f}, got "
                f"{share:.3f} of {draws} draws")


ACCEPT = [                    # drafted, q and p by row, P(accepted = 0, 1, ...)
    ([0], [[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [0, 1]),
    ([0], [[0.2, 0.8]], [[0.6, 0.4], [0.5, 0.5]], [0, 1]),
    ([0], [[0.8, 0.2]], [[0.4, 0.6], [0.5, 0.5]], [0.5, 0.5]),
    ([1], [[0.2, 0.8]], [[1.0, 0.0], [0.5, 0.5]], [1, 0]),
    ([0, 1], [[0.8, 0.2], [0.1, 0.9]], [[0.4, 0.6], [0.7, 0.3], [0.5, 0.5]],
     [0.5, 0.3333333, 0.1666667]),
    ([0, 1], [[0.8, 0.2], [0.1, 0.9]], [[0.2, 0.8], [0.1, 0.9], [0.5, 0.5]], [0.75, 0, 0.25]),
]


def random_pair():
    """A draft of one token, of two."""
    a, b = random(2, seed=41).sigmoid().tolist()
    at_most_all = min(1.0, b / a)
    return [0], [[a, 1 - a]], [[b, 1 - b], [0.5, 0.5]], [1 - at_most_all, at_most_all]


@check(4, "Sampling: how often a token is accepted")
def acceptance():
    for drafted, q, p, expected in [*ACCEPT, random_pair()]:
        lengths = Counter()
        for (accepted, _), times in count(drafted, q, p).items():
            lengths[accepted] += times
        likely(lengths, dict(enumerate(expected)),
               "Drafted token d at row i is accepted with probability min(1, p[i](d) / q[i](d)), "
               "and none after the first rejected one",
               f"{case(drafted, q, p)}, number accepted")


RESIDUAL = [                  # drafted, q, p, accepted, {token: probability given that many}
    ([0], [[0.8, 0.2, 0.0]], [[0.4, 0.3, 0.3], [0.2, 0.2, 0.6]], 0, {1: 0.25, 2: 0.75}),
    ([2], [[0.3, 0.2, 0.5]], [[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], 0, {0: 0.4, 1: 0.6}),
    ([0], [[0.9, 0.1, 0.0]], [[0.1, 0.1, 0.8], [0.2, 0.2, 0.6]], 0, {2: 1.0}),
    ([0, 1], [[0.5, 0.5, 0.0], [0.1, 0.8, 0.1]],
     [[0.5, 0.25, 0.25], [0.4, 0.2, 0.4], [1.0, 0.0, 0.0]], 1, {0: 0.5, 2: 0.5}),
    ([0, 1], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]],
     [[0.4, 0.1, 0.5], [0.5, 0.2, 0.3], [1.0, 0.0, 0.0]], 0, {2: 1.0}),
]


@check(3, "Sampling: the token in place of a rejected one")
def residual():
    for drafted, q, p, accepted, expected in RESIDUAL:
        tokens = Counter()
        for (so_many, token), times in count(drafted, q, p).items():
            if so_many == accepted:
                tokens[token] += times
        if not tokens:
            raise PropertyError(
                "A drafted token with p < q is sometimes rejected",
                f"{case(drafted, q, p)}: {accepted} accepted in none of {DRAWS} draws")
        likely(tokens, expected,
               "In place of the rejected token at row i one is drawn from max(p[i] - q[i], 0), "
               "normalised", f"{case(drafted, q, p)}, {accepted} accepted, next token")
    of_many()


def of_many(size: int = 2000, moved: float = 0.002):
    """A residual that is one token among many."""
    from speculative import accept_sampled
    q = torch.full((size,), (1 - moved) / (size - 1))
    p = q.clone()
    q[0], p[0] = moved, 0.0
    p[1] += moved
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        got = accept_sampled([0], [q.clone()], torch.stack((p, p)), rng)
        equal(tuple(map(int, got)), (0, 1),
              "Where p has no more than q nothing is drawn, however many such tokens there are",
              f"{size} tokens, of which only token 1 has p > q, drafted [0] with p 0: {NAMES}")


BONUS = [                     # drafted, q, p, {(accepted, token): probability}, if all are accepted
    ([], [], [[0.2, 0.8]], {(0, 0): 0.2, (0, 1): 0.8}),
    ([0], [[0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]], {(1, 0): 0.1, (1, 1): 0.9}),
    ([0, 1], [[0.5, 0.5]] * 2, [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]], {(2, 0): 0.9, (2, 1): 0.1}),
    ([0], [[0.8, 0.2]], [[0.4, 0.6], [0.5, 0.5]], {(1, 0): 0.5, (1, 1): 0.5}),
]


@check(2, "Sampling: the bonus token, and no draft at all")
def bonus():
    for drafted, q, p, expected in BONUS:
        outcomes = count(drafted, q, p)
        whole = Counter({(accepted, token): times for (accepted, token), times in outcomes.items()
                         if accepted == len(drafted)})
        likely(whole or outcomes, expected,
               "After a draft accepted whole one more token is drawn from p's last row, as it is",
               f"{case(drafted, q, p)}, of the draws that accepted all: (accepted, token)")


CERTAIN = [                   # drafted, q, p: whole draft accepted, rejected, and no draft
    ([0], [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
    ([0], [[1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]),
    ([], [], [[0.0, 1.0]]),
]


@check(1, "Sampling: ints, and whose random numbers")
def dice():
    from speculative import accept_sampled
    for drafted, q, p in CERTAIN:
        example = case(drafted, q, p)
        got = accept_sampled(
            list(drafted), list(torch.tensor(q)), torch.tensor(p), torch.Generator())
        accepted, token = parts(got, "accept_sampled", NAMES, example)
        is_int(accepted, "The number accepted", example)
        is_int(token, "The next token", example)
    for drafted in ([0, 0], []):
        first = twenty_draws(drafted, global_seed=1)
        second = twenty_draws(drafted, global_seed=2)
        for i, (a, b) in enumerate(zip(first, second)):
            equal(b, a,
                  "All chance comes from rng, so that a seed gives the same text again",
                  f"the same rng twice and another torch.manual_seed, drafted {drafted}, "
                  f"call {i}: (accepted, token)")


def twenty_draws(drafted: list[int], global_seed: int) -> list[tuple[int, int]]:
    """From a generator that starts the same each time."""
    from speculative import accept_sampled
    torch.manual_seed(global_seed)
    rng = torch.Generator().manual_seed(0)
    p = torch.full((len(drafted) + 1, 8), 1 / 8)
    q = [torch.tensor([0.5] + [1 / 14] * 7)] * len(drafted)
    outcomes = []
    for _ in range(20):
        got = accept_sampled(list(drafted), q, p, rng)
        accepted, token = parts(got, "accept_sampled", NAMES, f"drafted {drafted}")
        outcomes.append((int(accepted), int(token)))
    return outcomes
