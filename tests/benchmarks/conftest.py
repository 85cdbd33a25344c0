"""Scripts of ``benchmarks/``, loaded as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """Load a script by its name; what it imports from its own folder is forgotten afterwards."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            sys.modules.pop(name)
    monkeypatch.undo()
