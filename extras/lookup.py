"""Prompt lookup: draft what followed the same words where they stood before.

No layer runs for such a draft, so it costs next to nothing, and it is right wherever a text repeats
itself: names, quotations, code, a summary of what the prompt says. It is the shortest example of a
drafter (see ``speculative.Drafter``): it knows nothing of the model, and is lossless all the same.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from speculative import DRAFT_LENGTH, Draft, Drafter, Text

LONGEST = 3                   # tokens that must have stood before, at most


class Lookup(Drafter):
    """Finds where the last 3, 2 or 1 tokens stood before, and proposes what followed there."""

    def __init__(self, draft_length: int = DRAFT_LENGTH):
        self.draft_length = draft_length

    def begin(self, text: Text, hidden: Tensor | None):
        self.ends = {}        # where a run of tokens last ended: {(a, b, c): index of what follows}
        self.indexed = 0      # tokens of the text whose runs are in ``ends``

    def propose(self, text: Text, most: int) -> Draft:
        found = self.find(text.tokens, min(most, self.draft_length))
        found = up_to_stop(found, text.stop)
        if text.temperature == 0:
            return Draft(found, [None] * len(found), source="lookup")
        return Draft(found, list(one_hot(found, text)), source="lookup")

    def find(self, tokens: list[int], count: int) -> list[int]:
        """What followed the longest run of last tokens that stood before; most recently, if often.

        Where the text ends, what was found goes on: after "la la" comes "la la la".
        """
        end = self.last_end(tokens)
        if end is None:
            return []
        copied = tokens[end:end + count]
        while len(copied) < count:
            copied.append(copied[len(copied) - (len(tokens) - end)])
        return copied

    def last_end(self, tokens: list[int]) -> int | None:
        """Where the longest run of last tokens ended before. Updates the index."""
        for end in range(self.indexed + 1, len(tokens)):         # nothing follows the last run yet
            for length in range(1, min(LONGEST, end) + 1):
                self.ends[tuple(tokens[end - length:end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            end = self.ends.get(tuple(tokens[-length:]))
            if end is not None:
                return end
        return None


def up_to_stop(tokens: list[int], stop) -> list[int]:
    """Tokens up to the first stop token, which is kept."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[:i + 1]
    return tokens


def one_hot(tokens: list[int], text: Text) -> Tensor:
    """The distributions of a draft that leaves nothing to chance: (k, vocabulary)."""
    ids = torch.tensor(tokens, dtype=torch.long, device=text.model.device)
    return F.one_hot(ids, text.model.config.vocab_size).float()
