"""Checks of problem 5: the prefix on one-hot logits, and sampling by counting outcomes against probabilities by hand.

A check by counting draws a couple of thousand times with fixed seeds and allows five standard deviations, so the right
rule passes for any way of using the generator, and a rule that is wrong by a few per cent does not.
"""
import collections

import torch

from checks.common import Wrong, check, equal, parts, show

DRAWS = 1500
NAMES = "number accepted, next token"             # of what both functions return


def judged(drafted):
    """What accept_greedy makes of a draft when the whole model would write 4, 2, 0, 1; and the case in words."""
    from speculative import accept_greedy
    choices = [4, 2, 0, 1][:len(drafted) + 1]
    example = f"drafted {drafted}, the whole model's choices {choices}"
    return parts(accept_greedy(drafted, torch.eye(5)[choices]), "accept_greedy", NAMES, example), example


@check(3, "Greedy: the accepted prefix")
def prefix():
    for drafted, expected in (([], 0), ([4], 1), ([3], 0), ([4, 2], 2), ([4, 3], 1), ([3, 2], 0), ([4, 3, 0], 1), ([4, 2, 0], 3),
                              ([4, 2, 1], 2)):
        got, example = judged(drafted)
        equal(got[0], expected, "The longest prefix of the draft that the whole model would have written itself is accepted; nothing "
              "after its first disagreement", f"{example}: accepted")


@check(2, "Greedy: the token after it")
def own():
    for drafted, expected in (([], 4), ([3], 4), ([4], 2), ([4, 3], 2), ([4, 2], 0), ([3, 2, 0], 4), ([4, 2, 0], 1)):
        got, example = judged(drafted)
        equal(got[1], expected, "After the accepted tokens comes the whole model's own choice at that row: a correction, or after a "
              "draft accepted whole the bonus token", f"{example}: its own token")


def count(drafted, q, p) -> collections.Counter:
    from speculative import accept_sampled
    rng, q, p = torch.Generator().manual_seed(0), [torch.tensor(row) for row in q], torch.tensor(p)
    outcomes = collections.Counter()
    for _ in range(DRAWS):
        got = accept_sampled(list(drafted), [row.clone() for row in q], p.clone(), rng)
        accepted, token = parts(got, "accept_sampled", NAMES, f"drafted {drafted}, q {show(q)}, p {show(p)}")
        outcomes[int(accepted), int(token)] += 1
    return outcomes


def likely(outcomes: collections.Counter, expected: dict, sentence: str, example: str):
    """Every outcome as often as its probability says, up to five standard deviations."""
    for outcome in sorted(expected.keys() | outcomes.keys()):
        probability, share = expected.get(outcome, 0.), outcomes[outcome] / sum(outcomes.values())
        if abs(share - probability) > 5 * (probability * (1 - probability) / DRAWS) ** 0.5 + 1e-9:
            raise Wrong(sentence, f"{example}, outcome {show(outcome)}: expected probability {probability:.3f}, got {share:.3f} of {DRAWS} draws")


# drafted, q and p by row, P(accepted = 0, 1, ...): by hand from min(1, p / q)
ACCEPT = (
    ([0], [[.5, .5]], [[.5, .5], [.5, .5]], [0, 1]),
    ([0], [[.2, .8]], [[.6, .4], [.5, .5]], [0, 1]),
    ([0], [[.8, .2]], [[.4, .6], [.5, .5]], [.5, .5]),
    ([1], [[.2, .8]], [[1., 0.], [.5, .5]], [1, 0]),
    ([0, 1], [[.8, .2], [.1, .9]], [[.4, .6], [.7, .3], [.5, .5]], [.5, .3333333, .1666667]),
    ([0, 1], [[.8, .2], [.1, .9]], [[.2, .8], [.1, .9], [.5, .5]], [.75, 0, .25]))


@check(4, "Sampling: how often a token is accepted")
def acceptance():
    for drafted, q, p, expected in ACCEPT:
        lengths = collections.Counter()
        for (accepted, _), times in count(drafted, q, p).items():
            lengths[accepted] += times
        likely(lengths, dict(enumerate(expected)), "Drafted token d at row i is accepted with probability min(1, p[i](d) / q[i](d)), "
               "and none after the first rejected one", f"drafted {drafted}, q {q}, p {p}, number accepted")


# drafted, q, p, accepted, {token: probability given that many accepted}: by hand from max(p - q, 0), normalised
RESIDUAL = (
    ([0], [[.8, .2, 0.]], [[.4, .3, .3], [.2, .2, .6]], 0, {1: .25, 2: .75}),
    ([2], [[.3, .2, .5]], [[.5, .5, 0.], [.2, .2, .6]], 0, {0: .4, 1: .6}),
    ([0], [[.9, .1, 0.]], [[.1, .1, .8], [.2, .2, .6]], 0, {2: 1.}),
    ([0, 1], [[.5, .5, 0.], [.1, .8, .1]], [[.5, .25, .25], [.4, .2, .4], [1., 0., 0.]], 1, {0: .5, 2: .5}),
    ([0, 1], [[.8, .1, .1], [.1, .8, .1]], [[.4, .1, .5], [.5, .2, .3], [1., 0., 0.]], 0, {2: 1.}))


@check(3, "Sampling: the token in place of a rejected one")
def residual():
    for drafted, q, p, accepted, expected in RESIDUAL:
        outcomes = count(drafted, q, p)
        own = collections.Counter({token: times for (a, token), times in outcomes.items() if a == accepted})
        if not own:
            raise Wrong("A drafted token with p < q is sometimes rejected", f"drafted {drafted}, q {q}, p {p}: {accepted} accepted in "
                        f"none of {DRAWS} draws")
        for token in sorted(expected.keys() | own.keys()):
            probability, total = expected.get(token, 0.), sum(own.values())
            if abs(own[token] / total - probability) > 5 * (probability * (1 - probability) / total) ** 0.5 + 1e-9:
                raise Wrong("In place of the rejected token at row i one is drawn from max(p[i] - q[i], 0), normalised",
                            f"drafted {drafted}, q {q}, p {p}, {accepted} accepted, next token {token}: expected probability "
                            f"{probability:.3f}, got {own[token] / total:.3f}")


@check(2, "Sampling: the bonus token, and no draft at all")
def bonus():
    for drafted, q, p, expected in (
            ([], [], [[.2, .8]], {(0, 0): .2, (0, 1): .8}),
            ([0], [[.5, .5]], [[.5, .5], [.1, .9]], {(1, 0): .1, (1, 1): .9}),
            ([0, 1], [[.5, .5], [.5, .5]], [[.5, .5], [.5, .5], [.9, .1]], {(2, 0): .9, (2, 1): .1})):
        likely(count(drafted, q, p), expected, "After a draft accepted whole one more token is drawn from p's last row, as it is",
               f"drafted {drafted}, q {q}, p {p}, (accepted, token)")


@check(1, "Sampling: whose dice")
def dice():
    from speculative import accept_sampled
    p, q = torch.full((3, 8), 1 / 8), [torch.tensor([.5] + [1 / 14] * 7)] * 2
    got = []
    for other in (1, 2):
        torch.manual_seed(other)
        rng = torch.Generator().manual_seed(0)
        got.append([parts(accept_sampled([0, 0], q, p, rng), "accept_sampled", NAMES, "drafted [0, 0]") for _ in range(20)])
    for i, (a, b) in enumerate(zip(*got)):
        equal(tuple(map(int, b)), tuple(map(int, a)), "All chance comes from rng, so that a seed gives the same text again",
              f"the same rng twice and another torch.manual_seed, drafted [0, 0], call {i}: (accepted, token)")
