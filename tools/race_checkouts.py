"""Is this checkout as fast as another one, say, of the commit before?

    git worktree add ../before HEAD~1
    python tools/race_checkouts.py ../before --rounds 15 -- --model MODEL --draft-length 3

Runs ``generate.py --temperature 0 --compare --json`` of both in turn, a process each, and prints
the median of this one's speed over the other's, round by round: of speculative decoding, and of
plain decoding. What stands after ``--`` is handed on to both. Use it on a quiet machine, and look
at the quartiles.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, run_tool

from speculative import SettingsError, require

DRAFTED = "speculative decoding"
PLAIN = "plain decoding"


def speeds(checkout: Path, options: list[str]) -> dict[str, float]:
    """Tokens a second of CLaSp and of plain decoding, in a process of its own."""
    command = [sys.executable, str(checkout / "generate.py"), "--temperature", "0", "--compare",
               "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    last_line = done.stderr.strip().rpartition("\n")[2]
    require(done.returncode == 0, f"{checkout}: {last_line}")
    try:
        answer = json.loads(done.stdout)
        require(answer["method"] == "clasp", "--method autoregressive leaves nothing to compare")
        return {
            DRAFTED: answer["stats"]["tokens_per_second"],
            PLAIN: answer["autoregressive"]["tokens_per_second"],
        }
    except (json.JSONDecodeError, KeyError):
        raise SettingsError(
            f"{checkout}: with these options nothing is compared: {' '.join(options)}") from None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s OTHER [--rounds N] [-- OPTIONS]")
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=15)
    own, handed_on = sys.argv[1:], []
    if "--" in own:
        handed_on = own[own.index("--") + 1:]
        own = own[:own.index("--")]
    args = parser.parse_args(own)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    ratios = {DRAFTED: [], PLAIN: []}
    for round_number in range(args.rounds):
        checkouts = {"own": ROOT, "other": args.other}
        order = reversed(checkouts) if round_number % 2 else checkouts    # who is first may matter
        found = {which: speeds(checkouts[which], handed_on) for which in order}
        for name, values in ratios.items():
            values.append(found["own"][name] / found["other"][name])
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"{name}: {median:.3f} of the other's speed (quartiles {low:.3f} to {high:.3f}, "
              f"{len(values)} rounds)")


if __name__ == "__main__":
    sys.exit(run_tool("race_checkouts.py", main))
