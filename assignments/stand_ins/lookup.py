"""In the project this file drafts by looking words up, and shows how a drafter is made.

Here it drafts nothing.
"""
from speculative import DRAFT_LENGTH, Drafter

MOST = DRAFT_LENGTH


class Lookup(Drafter):
    def __init__(self, draft_length=MOST):
        pass
