"""A part of the project that would show how a problem is solved. This copy does without."""
from speculative import SettingsError

raise SettingsError("--weights and --cuda-graphs are not a part of this copy of the project")
