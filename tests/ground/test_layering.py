"""Imports point one way: experiments use all, problems solvers and the core, solvers the core."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "bilevel": "bilevel",
    "bilevel.experiments": "experiments",
    "bilevel.problems": "problems",
    "bilevel.solvers": "solvers",
}
OWN_NAMES = ("experiments", "problems", "solvers")
# Only the command line knows the siblings, and it loads them by name at run time.
FORBIDDEN = {
    "bilevel": ("bilevel.experiments", "bilevel.problems", "bilevel.solvers"),
    "bilevel.experiments": ("bilevel.cli",),
    "bilevel.problems": ("bilevel.experiments",),
    "bilevel.solvers": ("bilevel.experiments", "bilevel.problems"),
}
MODULES = [
    pytest.param(name, path, id=path.relative_to(ROOT).as_posix())
    for name, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OTHERS = [
    pytest.param(path, id=path.relative_to(ROOT).as_posix())
    for folder in ("tests", "benchmarks", "docs", ".ci")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def inside(module: str, package: str) -> bool:
    """Whether ``module`` is ``package`` or lies in it."""
    return f"{module}.".startswith(f"{package}.")


def imports(source: str, package: str = "") -> set[str]:
    """Absolute names that ``source`` imports, wherever in it; ``package`` is where it lies."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            # `from bilevel import solvers` imports a module too.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def test_imports_are_found():
    source = "import a.b\ndef f():\n    from .. import solvers\n    from .c import d\n"
    assert imports(source, "bilevel.cli") == {
        "a.b",
        "bilevel",
        "bilevel.solvers",
        "bilevel.cli.c",
        "bilevel.cli.c.d",
    }


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_rooms_import_in_one_direction(name, path):
    folder = path.parent.relative_to(ROOT / FOLDERS[name])
    found = imports(path.read_text("utf-8"), ".".join([name, *folder.parts]))
    bad = {m for m in found for package in FORBIDDEN[name] if inside(m, package)}
    bad |= {m for m in found for folder in (*OWN_NAMES, "tests") if inside(m, folder)}
    assert not bad


@pytest.mark.parametrize("path", OTHERS)
def test_folders_are_imported_by_their_installed_names(path):
    found = imports(path.read_text("utf-8"))
    assert not {m for m in found for folder in OWN_NAMES if inside(m, folder)}
