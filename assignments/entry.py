"""Your entry for the leaderboard: settings, and if you like a drafter of your own.

    python grade.py --leaderboard

See the open questions in README.md.
"""

# Of CLaSp, as ``speculative.clasp`` takes them. skip_layers None: half of them.
SETTINGS = {
    "skip_layers": None,
    "draft_length": 4,
    "exit_threshold": 0.0,
    "opt_interval": 16,
}

# Question C: a function that makes a ``speculative.Drafter`` for a model, or None: CLaSp's, by
# SETTINGS. It is called anew for each text, as DRAFTER(model); SETTINGS are then not used. The
# texts are written several times, and this file is loaded anew each time.
DRAFTER = None
