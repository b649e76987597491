"""How a solution and its mistakes are declared."""
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

SOLUTIONS: dict[str, "Solution"] = {}    # by the name of the function: module.function


class Solution:
    """A function in a core function's place, and edits that break it."""

    def __init__(self, name: str, function: Callable):
        self.name = name
        self.function = function
        self.mistakes: dict[str, tuple[tuple[str, str], ...]] = {}

    def mistake(self, title: str, *edits: tuple[str, str]):
        """Edits are pairs: text that stands once in the solution, and what is put there."""
        self.mistakes[title] = edits

    def broken(self, title: str) -> Callable:
        """The function with a mistake. Raises ValueError if an edit does not fit."""
        source = textwrap.dedent(inspect.getsource(self.function))
        source = source[source.index("def "):]             # without its decorator
        for old, new in self.mistakes[title]:
            if source.count(old) != 1:
                raise ValueError(f"{title}: {old!r} stands {source.count(old)} times")
            source = source.replace(old, new)
        names = dict(self.function.__globals__)
        exec(compile(source, str(FOLDER / f"{self.name}.py"), "exec"), names)
        return names[self.function.__name__]


def solves(name: str):
    """Declare the solution of a function: module.function or module.Class.method."""
    def declare(function: Callable) -> Solution:
        SOLUTIONS[name] = Solution(name, function)
        return SOLUTIONS[name]
    return declare
