"""`import bilevel` is quick and needs no extra."""

import os
import statistics
import subprocess
import sys

EXTRAS = ("matplotlib", "mkdocs", "PIL", "rich", "tensorboard", "typer")
PACKAGES = ("bilevel", "bilevel.solvers", "bilevel.problems")


def run(code: str) -> str:
    """Standard output of ``code``, run by a fresh interpreter."""
    # Byte code is kept, as for a user.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_little_longer_than_torch():
    # Processor time, since what else the machine is doing is no property of the library.
    code = (
        "import time, torch; start = time.process_time();"
        "import bilevel; print(time.process_time() - start)"
    )
    run(code)  # writes the byte code
    seconds = [float(run(code)) for _ in range(3)]
    assert statistics.median(seconds) < 0.2, seconds


def test_import_loads_no_extra():
    loaded = run(f"import {', '.join(PACKAGES)}, sys; print(*sys.modules)").split()
    assert set(PACKAGES) <= set(loaded)
    assert not set(EXTRAS) & set(loaded)


def test_import_works_without_the_extras():
    # A module that is `None` in `sys.modules` cannot be imported.
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
    assert run(f"{block}; import {', '.join(PACKAGES)}") == ""


def test_import_of_the_core_loads_no_sibling():
    loaded = run("import bilevel, sys; print(*sys.modules)").split()
    assert not {"bilevel.solvers", "bilevel.problems"} & set(loaded)
