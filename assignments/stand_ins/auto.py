"""In the project this file decides each cycle who drafts, and shows how a drafter is made.

Here layers are always skipped, as the model suggests, or else with the default settings.
"""
from speculative import DRAFT_LENGTH, Clasp, require_draft_length


class Auto(Clasp):
    def __init__(self, model, draft_length=DRAFT_LENGTH, costs=None, clasp=None):
        require_draft_length(draft_length)
        if clasp is None:
            super().__init__(model, draft_length=min(draft_length, DRAFT_LENGTH))
        else:
            super().__init__(model, clasp.budget, clasp.draft_length, clasp.exit_threshold,
                             clasp.opt_interval, clasp.opt_tokens)
