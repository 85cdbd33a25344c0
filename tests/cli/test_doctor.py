"""``bilevel doctor``."""

import re

import pytest


@pytest.mark.parametrize("options", [[], ["--tasks", 3], ["--dtype", "float32"]], ids=str)
def test_what_is_healthy_is_told_so(invoke, options):
    done = invoke("doctor", "logistic", *options)
    assert done.exit_code == 0, done.output
    assert "healthy" in done.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method-option", "max_steps=1"], "adjoint system not solved"),
        (["--method", "first-order"], "dependence"),
        (
            [
                "--inner-solver=gradient-descent",
                "--inner-option=lr=0.01",
                "--inner-option=max_steps=5",
            ],
            "inner problem not solved",
        ),
        (["--inner-solver=gradient-descent", "--inner-option=lr=100"], "learning rate"),
    ],
)
def test_what_is_wrong_is_told_with_exit_code_1(invoke, options, told):
    done = invoke("doctor", "logistic", *options)
    assert done.exit_code == 1
    assert told in done.output
    assert "→" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no problem 'nothing'"),
        (["ridge", "--method", "x"], "there is no hypergradient method 'x'"),
        (["ridge", "--inner-solver", "x"], "there is no inner solver 'x'"),
        (["ridge", "--inner-option", "lr=1"], "without `--inner-solver`"),
        (["ridge", "--dtype", "int8"], "there is no dtype 'int8'"),
        (["ridge", "--rtol", "2"], "`rtol` is 2.0"),
    ],
)
def test_a_mistake_is_told_in_one_line(invoke, arguments, message):
    done = invoke("doctor", *arguments)
    assert done.exit_code == 2
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1
