"""The package list of pyproject.toml is complete, and every package can be imported."""

import importlib
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
FOLDERS = {
    "bilevel": "bilevel",
    "bilevel.experiments": "experiments",
    "bilevel.problems": "problems",
    "bilevel.solvers": "solvers",
}


def folders_with_code() -> set[str]:
    """Import names of the folders in the four rooms that hold a Python file."""
    return {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def test_the_list_names_every_folder_with_code():
    assert sorted(SETTINGS["packages"]) == sorted(folders_with_code())


def test_folders_map_to_import_names():
    assert SETTINGS["package-dir"] == FOLDERS


@pytest.mark.parametrize("package", SETTINGS["packages"])
def test_every_package_is_a_regular_one(package):
    # Without an `__init__.py` the import would succeed all the same, as a namespace package.
    name = next(name for name in sorted(FOLDERS, reverse=True) if f"{package}.".startswith(name))
    parts = package.removeprefix(name).strip(".").split(".")
    assert ROOT.joinpath(FOLDERS[name], *parts, "__init__.py").is_file()


@pytest.mark.parametrize("package", SETTINGS["packages"])
def test_every_package_imports(package):
    assert importlib.import_module(package).__file__ is not None


def test_types_are_shipped():
    import bilevel

    assert Path(bilevel.__file__).with_name("py.typed").is_file()
