"""In the project this file chooses CLaSp's settings as it decodes, and shows how a drafter is made.

Here it leaves them at their defaults.
"""
from speculative import DRAFT_LENGTH, Clasp


class Auto(Clasp):
    def __init__(self, model, draft_length=DRAFT_LENGTH, costs=None, clasp=None):
        super().__init__(model, draft_length=min(draft_length, DRAFT_LENGTH))
