"""``list``, ``check``, ``--version``, and the command line without its extra."""

import re
import sys

import pytest

import bilevel
from bilevel.cli import main
from bilevel.cli.siblings import parse_options, registries


def test_version(invoke):
    done = invoke("--version")
    assert (done.exit_code, done.output) == (0, f"bilevel {bilevel.__version__}\n")


def test_help_names_the_commands(invoke):
    done = invoke("--help")
    assert done.exit_code == 0
    assert all(name in done.output for name in ("train", "list", "check", "compare"))


def test_list_shows_all_that_is_registered(invoke):
    done = invoke("list")
    assert done.exit_code == 0
    for registry in registries():
        for name in registry:
            assert name in done.output
            assert registry[name].__name__ in done.output


OWN = """
from dataclasses import dataclass

from bilevel import ImplicitMethod
from bilevel.registry import METHODS
from bilevel.solvers import CG


@METHODS.register("mine")
@dataclass(frozen=True)
class Mine(ImplicitMethod):
    'A method of my own.'

    steps: int = 100

    def _linear_solver(self):
        return CG(self.steps, rtol=1e-10)
"""


@pytest.mark.usefixtures("as_it_was")
def test_a_file_registers_what_is_its_own(invoke, tmp_path):
    # Called as a module of the standard library is.
    path = tmp_path / "random.py"
    path.write_text(OWN)
    done = invoke("--import", path, "check", "ridge", "--method", "mine")
    assert done.exit_code == 0, done.output
    assert "A method of my own" in invoke("list").output


@pytest.mark.usefixtures("as_it_was")
def test_a_module_registers_what_is_its_own(invoke, tmp_path, monkeypatch):
    (tmp_path / "own_methods_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    done = invoke("--import", "own_methods_of_a_test", "check", "ridge", "--method", "mine")
    assert done.exit_code == 0, done.output


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py", "`--import` is 'nothing.py', and there is no such file"),
        ("no_such_module", "`--import` is 'no_such_module', and there is no such module"),
        ("no_package.part", "`--import` is 'no_package.part', and there is no such module"),
        (".relative", "`--import` is '.relative', and there is no such module"),
        ("", "`--import` is '', and there is no such module"),
    ],
)
def test_what_cannot_be_imported_is_named(invoke, name, message):
    done = invoke("--import", name, "list")
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.usefixtures("as_it_was")
def test_files_that_are_called_alike_and_their_neighbours(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        own = OWN.replace('"mine"', f"NAME_{folder}").replace("'A method of my own.'", "")
        names = f"from names_of_a_test_{folder} import *\n"
        (tmp_path / folder / "own.py").write_text(names + own)
        (tmp_path / folder / f"names_of_a_test_{folder}.py").write_text(
            f"NAME_{folder} = 'mine-{folder}'"
        )
    done = invoke("--import", "one/own.py", "--import", "two/own.py", "list")
    assert done.exit_code == 0, done.output
    assert "mine-one" in done.output
    assert "mine-two" in done.output


@pytest.mark.usefixtures("as_it_was")
def test_a_name_of_the_library_stays_its_own(invoke, tmp_path):
    path = tmp_path / "mine.py"
    # Not even a class of the same name takes it.
    path.write_text(OWN.replace('"mine"', '"cg"').replace("class Mine", "class ImplicitCG"))
    done = invoke("--import", path, "list")
    assert done.exit_code == 2
    assert "cg" in done.output


def test_options_become_what_they_say():
    texts = ["a=1", "b=1e-3", "c=true", "d=None", "e=Adam", "f = -2", "g=x=y"]
    assert parse_options(texts, "--option") == {
        "a": 1,
        "b": 1e-3,
        "c": True,
        "d": None,
        "e": "Adam",
        "f": -2,
        "g": "x=y",
    }


@pytest.mark.parametrize("options", [[], ["--tasks", 3], ["--dtype", "float32"]], ids=str)
def test_check_passes_what_is_right(invoke, options):
    done = invoke("check", "quadratic", *options)
    assert done.exit_code == 0, done.output
    assert "PASS" in done.output


def test_check_fails_what_is_wrong(invoke):
    done = invoke("check", "quadratic", "--method", "cg", "--method-option", "max_steps=1")
    assert done.exit_code == 1
    assert "FAIL" in done.output
    assert "adjoint system" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no problem 'nothing'; known: .*quadratic"),
        (["quadratic", "--method", "x"], "there is no hypergradient method 'x'; known: .*cg"),
        (["quadratic", "--dtype", "int8"], "there is no dtype 'int8'; known: float64, float32"),
    ],
)
def test_check_tells_a_mistake_in_one_line(invoke, arguments, message):
    done = invoke("check", *arguments)
    assert done.exit_code == 2
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "typer"])
def test_without_the_extra_one_line_says_what_to_install(missing, monkeypatch, capsys):
    # A module that is `None` in `sys.modules` cannot be imported.
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told == f"bilevel: the command line needs {missing}: pip install 'bilevel[cli]'\n"
