"""Run tutorials, and keep what they print and draw: ``python docs/hooks/record.py [NAME ...]``."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from script import Tutorial, scripts


def record(path: Path) -> None:
    """Run one script in a folder of its own, and write its record.

    Raises:
        FileNotFoundError: It wrote no picture under a name that its text shows.
    """
    tutorial = Tutorial(path)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = list(tutorial.run())
        for picture in tutorial.pictures:
            shutil.copyfile(picture, path.parent / picture)
        os.chdir(path.parent)
    tutorial.write_record(printed)


def main(names: list[str]) -> int:
    """Record the tutorials of these names, or all, each in a process of its own.

    Raises:
        ValueError: There is no such tutorial.
    """
    known = {path.stem: path for path in scripts()}
    if unknown := set(names) - known.keys():
        raise ValueError(f"there is no {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if len(names) != 1:
        each = [[sys.executable, __file__, name] for name in names or known]
        return max(subprocess.run(command, check=False).returncode for command in each)
    os.environ["MPLBACKEND"] = "agg"
    warnings.simplefilter("error")
    start = time.perf_counter()
    record(known[names[0]])
    print(f"{names[0]}: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
