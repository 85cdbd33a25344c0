"""Run tutorials, and keep what they print and draw: ``python docs/hooks/record.py [NAME ...]``."""

import contextlib
import os
import shutil
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
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        printed = list(tutorial.run())
        for picture in tutorial.pictures:
            shutil.copyfile(picture, path.parent / picture)
    tutorial.write_record(printed)


def main(names: list[str]) -> int:
    """Record the tutorials of these names, or all; return the exit status."""
    os.environ["MPLBACKEND"] = "agg"
    warnings.simplefilter("error")
    for path in scripts():
        if names and path.stem not in names:
            continue
        start = time.perf_counter()
        record(path)
        print(f"{path.stem}: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
