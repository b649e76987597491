"""The checks of the six problems, a file each. A check is a function that raises or returns.

None of them holds a solution. They compare with numbers made once by the reference (golden.json),
with cases small enough to be worked out by hand, or with what must hold of any solution. Where a
function builds on an earlier problem, the check puts a simple double in that one's place
(doubles.py), so that a mistake costs points in its own problem only.
"""
from checks import problem1, problem2, problem3, problem4, problem5, problem6  # noqa: F401
from checks.common import CHECKS, PropertyError  # noqa: F401
