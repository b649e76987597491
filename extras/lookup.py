"""Prompt lookup: draft what followed the same words where they stood before.

No layer runs for such a draft, so it costs next to nothing, and it is right wherever a text repeats
itself: names, quotations, code, a summary of what the prompt says. It is an example of a drafter
(see ``speculative.Drafter``) that knows nothing of the model, and is lossless all the same.

How likely it is right follows from how many words are the same: with m tokens that match, the next
one is right with chance a(m), the one after it with a(m+1), and so on, since each right token makes
the match longer. The chances are learned as they come, by logistic regression: all together,

    a(m) = sigmoid(s + s_m)

where s tells how much this text and model repeat themselves, and s_m what a longer match is worth.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from speculative import Draft, Drafter, Outcome, Text, require_draft_length

LONGEST = 8                   # tokens that are compared, at most
MOST = 15                     # tokens of a draft, at most, if nothing else is said
WORTH = 0.1                   # a token is drafted if it is right with this chance: a row's price
# a(1) .. a(8) to begin with, as measured on sampled answers. They may be low: what they should have
# been is learned without a draft.
PRIOR = (0.12, 0.35, 0.45, 0.5, 0.6, 0.65, 0.7, 0.85)
RATE = 0.2                    # of learning s
RATE_OF_EACH = 0.1            # of learning each s_m


class Guess(NamedTuple):
    """What may come next, and how many tokens before it are the same as where it was found."""
    tokens: list[int]
    match: int


class Lookup(Drafter):
    """Finds where the last 8 tokens stood before, or fewer, and proposes what followed there."""

    def __init__(self, draft_length: int = MOST):
        """draft_length: most tokens of a draft."""
        require_draft_length(draft_length)
        self.draft_length = draft_length
        # Both are kept from text to text.
        self.shift = 0.0                                             # s
        self.shifts = [math.log(p / (1 - p)) for p in PRIOR]         # s_1 .. s_8

    def begin(self, text: Text, hidden: Tensor | None):
        self.index = Index()
        self.guess = Guess([], 0)

    def propose(self, text: Text, most: int) -> Draft:
        self.look(text, most)
        all_right = 1.0
        length = 0
        for chance in self.chances():
            all_right *= chance
            if all_right < WORTH:
                break
            length += 1
        return self.draft(text, length)

    def look(self, text: Text, most: int):
        """Make a guess of at most so many tokens."""
        self.guess = self.index.guess(text.tokens, min(most, self.draft_length))

    def chances(self) -> list[float]:
        """That each token of the guess is right, if those before it are."""
        match = self.guess.match
        return [self.chance(match + i) for i in range(len(self.guess.tokens))]

    def chance(self, match: int) -> float:
        """a(match)"""
        return 1 / (1 + math.exp(-self.shift - self.shifts[min(match, LONGEST) - 1]))

    def draft(self, text: Text, length: int) -> Draft:
        """The first tokens of the guess."""
        tokens = up_to_stop(self.guess.tokens[:length], text.stop)
        if text.temperature == 0:
            return Draft(tokens, [None] * len(tokens), source="lookup")
        return Draft(tokens, list(one_hot(tokens, text)), source="lookup")

    def observe(self, text: Text, outcome: Outcome):
        """Learn from the tokens that were written, whether they were drafted or not."""
        written = text.tokens[-(outcome.accepted + 1):]
        for i, (guessed, token) in enumerate(zip(self.guess.tokens, written)):
            self.learn(self.guess.match + i, guessed == token)
            if guessed != token:
                break

    def learn(self, match: int, right: bool):
        """A step of logistic regression: how far off the chance was, to both of its parts."""
        off = right - self.chance(match)
        self.shift += RATE * off
        self.shifts[min(match, LONGEST) - 1] += RATE_OF_EACH * off


class Index:
    """Where runs of up to LONGEST tokens ended in a text, the last time. It grows with the text."""

    def __init__(self):
        self.ends = {}        # {(a, b, c): index of what follows a b c}
        self.indexed = 0      # tokens of the text whose runs are in ``ends``

    def guess(self, tokens: list[int], most: int) -> Guess:
        """What followed the longest run of last tokens that stood before.

        Where the text ends, what was found goes on: after "la la" comes "la la la".
        """
        end, match = self.last_end(tokens)
        if match == 0:
            return Guess([], 0)
        copied = tokens[end:end + most]
        while len(copied) < most:
            copied.append(copied[len(copied) - (len(tokens) - end)])
        return Guess(copied, match)

    def last_end(self, tokens: list[int]) -> tuple[int, int]:
        """Where the longest run of last tokens ended before, and how long it is; 0 for none."""
        for end in range(self.indexed + 1, len(tokens)):         # nothing follows the last run yet
            for length in range(1, min(LONGEST, end) + 1):
                self.ends[tuple(tokens[end - length:end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            end = self.ends.get(tuple(tokens[-length:]))
            if end is not None:
                return end, length
        return 0, 0


def up_to_stop(tokens: list[int], stop) -> list[int]:
    """What comes up to the first stop token, and that."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[:i + 1]
    return tokens


def one_hot(tokens: list[int], text: Text) -> Tensor:
    """The distributions of a draft that leaves nothing to chance: (k, vocabulary)."""
    ids = torch.tensor(tokens, dtype=torch.long, device=text.model.device)
    q = torch.zeros(len(tokens), text.model.config.vocab_size, device=text.model.device)
    return q.scatter_(1, ids[:, None], 1.0)
