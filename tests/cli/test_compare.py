"""``bilevel compare``: the table, the files, and its exit code."""

import json
import re

import pytest

QUICK = ["--repeats", 1]


def test_compare_recommends_and_writes_files(invoke, tmp_path):
    picture, numbers = tmp_path / "methods.png", tmp_path / "methods.json"
    done = invoke(
        "compare", "quadratic", *QUICK, "--plot", picture, "--json", numbers, "--inner-steps", 100
    )
    assert done.exit_code == 0, done.output
    assert "random quadratic" in done.output
    assert re.search(r"^→ CG 1e-", done.output, flags=re.MULTILINE)
    assert re.search(r"^Use CG 1e-", done.output, flags=re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")
    read = json.loads(numbers.read_text("utf-8"))
    assert read["recommendation"].startswith("CG")
    assert read["reference"] == "dense"
    assert str(picture) in done.output


def test_methods_with_options(invoke):
    done = invoke(
        *("compare", "cournot", *QUICK, "--accuracy", 1e-2, "--tasks", 2, "--seed", 1),
        *("--method", "cg", "--method", "neumann:terms=40,rtol=1e-3"),
        *("--method", "implicit:linear_solver=gmres", "--reference", "estimate"),
    )
    assert done.exit_code == 0, done.output
    assert "2 tasks" in done.output
    assert "errors are estimated" in done.output
    assert "→ implicit:linear_solver=gmres" in done.output
    assert "StructureError" in done.output


def test_exit_code_tells_that_nothing_is_accurate_enough(invoke):
    done = invoke("compare", "ridge", *QUICK, "--inner-steps", 2, "--method", "cg:rtol=1e-2")
    assert done.exit_code == 1
    assert "No method has an error of at most 1e-03" in done.output
    done = invoke("compare", "ridge", *QUICK, "--budget", 1, "--method", "cg")
    assert done.exit_code == 1
    assert "within a cost of 1" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no problem 'nothing'; known: .*quadratic"),
        (["ridge", "--method", "x"], "there is no hypergradient method 'x'; known: .*cg"),
        (["ridge", "--method", "cg:rtol"], "`--method` is 'rtol'; write key=value"),
        (["ridge", "--method", "cg:steps=3"], "has no option 'steps'"),
        (["ridge", "--reference", "true"], "there is no reference 'true'; known: auto, dense"),
        (["ridge", "--accuracy", "0"], "`accuracy` is 0"),
    ],
)
def test_compare_tells_a_mistake_in_one_line(invoke, arguments, message):
    done = invoke("compare", *arguments)
    assert done.exit_code == 2
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1
