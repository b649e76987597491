"""In the project this file chooses CLaSp's settings as it decodes, and shows how a drafter is made.

Here it leaves them at their defaults.
"""
from speculative import DRAFT_LENGTH, Clasp, require

SHAPE = None


class Auto(Clasp):
    def __init__(self, model, draft_length=DRAFT_LENGTH, costs=None):
        require(len(model.layers) > 1, "auto needs a model of at least two layers")
        super().__init__(model, draft_length=draft_length)
