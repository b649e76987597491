"""The checks of the six problems, a file each. A check is a function that raises ``Wrong`` or returns.

None of them holds a solution: they compare with numbers made once by the reference (golden.json), with cases small
enough to be worked out by hand, or with what must hold of any solution. Where a function builds on an earlier problem,
the check puts a simple double in that one's place, so that a mistake costs its own problem's points only.
"""
from checks import problem1, problem2, problem3, problem4, problem5, problem6  # noqa: F401
from checks.common import CHECKS, Wrong  # noqa: F401
