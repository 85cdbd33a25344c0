"""Check that a wheel holds every package, the type marker, and nothing else."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "bilevel": "bilevel",
    "bilevel/experiments": "experiments",
    "bilevel/problems": "problems",
    "bilevel/solvers": "solvers",
}


def expected() -> set[str]:
    """Names of the files that the four folders should put into the wheel."""
    names = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for target, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    return names | {"bilevel/py.typed"}


def main(wheel: str) -> int:
    """Report what is missing and what does not belong; return the exit status."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, foreign = expected() - found, found - expected()
    for label, names in (("missing from", missing), ("does not belong in", foreign)):
        for name in sorted(names):
            print(f"{label} the wheel: {name}", file=sys.stderr)
    if not missing | foreign:
        print(f"{Path(wheel).name}: {len(found)} files, all of them ours")
    return int(bool(missing | foreign))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
