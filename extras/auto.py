"""Look words up, skip layers, or draft nothing: whatever is fastest at this place of this text.

Each cycle asks what a draft is worth, in tokens expected per unit of time (worth.py):

    look words up    likely right where the text repeats itself, and free       (lookup.py)
    skip layers      right about as often anywhere, for a share of a step's time (skipping.py)
    nothing          one token in the time of a plain step

and takes the best. So a model whose layers cannot be spared, as those of most small ones, still
gains where its text repeats itself, and loses nothing elsewhere.

Nothing here looks at what the draft is compared with before that is done, so the output stays the
whole model's. But measured times decide, and another run may decide otherwise. Under sampling a new
Auto with fixed ``costs`` gives the same text again by the same seed.
"""
from torch import Tensor

from extras.lookup import MOST, Lookup
from extras.skipping import Settled, Skipping
from extras.worth import Costs, best_choice
from model import Llama
from speculative import Clasp, Draft, Drafter, Outcome, Text


class Auto(Drafter):
    """Decides each cycle who drafts, and how far.

    One object may go from text to text, and keeps what it has learned.
    """

    def __init__(
        self,
        model: Llama,
        draft_length: int = MOST,
        costs: dict[str, float] | None = None,
        clasp: Clasp | None = None,
    ):
        """draft_length: most tokens of a draft. costs: fixed, see ``Costs``; None: measured.

        clasp: with settings that are known to suit the model; None: they are found on the way.
        """
        self.costs = Costs(model, costs)
        self.lookup = Lookup(draft_length)
        if clasp is None:
            self.skipping = Skipping(model, self.costs, draft_length)
        else:
            self.skipping = Settled(model, clasp, self.costs)
            self.scratch = clasp.scratch

    def begin(self, text: Text, hidden: Tensor | None):
        self.costs.pad_to(text.pass_width(1) or 1)
        self.lookup.begin(text, hidden)
        self.skipping.begin(text, hidden)

    def propose(self, text: Text, most: int) -> Draft:
        self.lookup.look(text, most)
        chances = self.lookup.chances()
        pass_times = self.costs.pass_times(len(chances))
        plain = 1 / pass_times[0]
        found = best_choice(chances, 0.0, pass_times)
        if self.skipping.beats(max(found.rate, plain)):
            return self.skipping.propose(text, most)
        return self.lookup.draft(text, found.length if found.rate > plain else 0)

    def observe(self, text: Text, outcome: Outcome):
        self.costs.note_pass(len(outcome.draft.tokens) + 1, outcome.seconds["verify"])
        self.lookup.observe(text, outcome)
        self.skipping.observe(text, outcome)
