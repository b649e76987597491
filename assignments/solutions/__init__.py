"""A second solution of every problem, with the mistakes that students make in it.

Each assigned function is written here once more, differently from the core. The whole of them must
get every point, since the grader asks for no particular way of writing. A mistake is an edit of
such a solution: some of its text, and what stands there instead. With it the solution must lose
points in its own problem and in no other. None of this goes into a student's repository.
"""
from solutions import problem1, problem2, problem3, problem4, problem5, problem6  # noqa: F401
from solutions.common import SOLUTIONS, Solution  # noqa: F401
