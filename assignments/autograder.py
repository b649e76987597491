"""Write the archive that Gradescope makes an autograder of: setup.sh, run_autograder, the grader.

    python assignments/autograder.py OUT.zip
    python assignments/autograder.py OUT.zip --problems 3,4

Students hand in model.py, dp_skip.py and speculative.py, those that they wrote in, and entry.py for
the leaderboard. Their functions are put into a fresh export, which the archive holds. The reference
is in it too, and makes the cases anew for each submission.
"""
import sys
import zipfile
from pathlib import Path

from export import ExportError, new_parser, stripped
from taken import CORE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRADER = ("grade.py", "child.py", "taken.py", "golden.py", "leaderboard.py")


def files(problems: list[int]) -> dict[str, str | Path]:
    """What the archive holds: by name in it, a text or a file."""
    found = {"problems": ",".join(map(str, problems)) + "\n"}
    sources = stripped(problems).sources
    for name in CORE:
        found[f"assignments/checks/core/{name}.py"] = sources[name]
    paths = [ROOT / f"{name}.py" for name in (*CORE, "checkpoint")]
    paths += [ROOT / "requirements.txt"]
    paths += [HERE / name for name in GRADER]
    paths += [path for path in (HERE / "checks").glob("*.*") if path.is_file()]
    weights = [path for path in (ROOT / "checkpoints").rglob("*") if path.is_file()]
    paths += [path for path in weights if path.suffix not in (".py", ".pyc")]
    found |= {path.relative_to(ROOT).as_posix(): path for path in paths}
    return found | {path.name: path for path in (HERE / "gradescope").iterdir()}


def write(out: Path, contents: dict[str, str | Path]):
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(contents.items()):
            if isinstance(content, Path):
                archive.write(content, name)           # with its mode: run_autograder is run
            else:
                archive.writestr(name, content)


def main() -> int:
    parser = new_parser("Write Gradescope's autograder.", "a file that does not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    try:
        write(args.out, files(args.problems))
    except (ExportError, OSError) as error:
        print(f"autograder.py: cannot write {args.out}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: problems {', '.join(map(str, args.problems))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
