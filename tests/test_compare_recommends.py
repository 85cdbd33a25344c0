"""What `compare` recommends without a dense reference is right by the dense reference.

On every registered problem (without ``-m slow``: on four) a line-up of methods on a modest and a
tight inner solver is compared with errors that are only estimated. The recommendation is right if
it is truly accurate enough and costs at most 10 % more than the cheapest method that is; where none
is, if it is within 10 % of the smallest error.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import bilevel.problems  # noqa: F401
from bilevel import compare
from bilevel.registry import PROBLEMS
from bilevel.solvers import (
    CG,
    GMRES,
    Dense,
    FirstOrder,
    GradientDescent,
    Implicit,
    NeumannSeries,
    Unrolled,
)

ACCURACIES = (1e-1, 1e-3, 1e-5)
MARGIN = 1.1
WRONG_ALLOWED = 2


def line_up(example):
    """Methods × settings × inner solvers; the modest one leaves an inner error of about 0.05."""
    scale, lr = 1 / example.lipschitz, 2 / (example.lipschitz + example.mu)
    rate = (example.condition - 1) / (example.condition + 1)
    solvers = {
        kind: GradientDescent(lr=lr, max_steps=max(2, math.ceil(math.log(left) / math.log(rate))))
        for kind, left in (("modest", 0.05), ("tight", 1e-7))
    }
    methods = {
        "CG 1e-2": Implicit(CG(rtol=1e-2)),
        "CG 1e-5": Implicit(CG(rtol=1e-5)),
        "CG 1e-10": Implicit(CG(rtol=1e-10)),
        "CG 1e-5, corrected": Implicit(CG(rtol=1e-5), correct=True),
        "GMRES 1e-2": Implicit(GMRES(rtol=1e-2)),
        "GMRES 1e-5": Implicit(GMRES(rtol=1e-5)),
        "GMRES 1e-5, corrected": Implicit(GMRES(rtol=1e-5), correct=True),
        "Neumann, short": NeumannSeries(terms=5, scale=scale),
        "Neumann, long": NeumannSeries(terms=60, scale=scale),
        "unrolled": Unrolled(),
        "unrolled, last 5": Unrolled(truncate=5),
        "first-order": FirstOrder(),
        "dense": Implicit(Dense()),
    }
    return {
        f"{name} ({kind})": (method, solver)
        for name, method in methods.items()
        for kind, solver in solvers.items()
    }


def judge(found, truth, accuracy):
    """Whether the recommendation is right, and a line that tells it."""
    found = replace(found, accuracy=accuracy)
    errors = {one.name: one.error for one in truth.results if one.usable}
    costs = {one.name: one.cost for one in truth.results if one.usable}
    chosen = found.recommendation
    good = [costs[one] for one, error in errors.items() if error <= accuracy]
    if good:
        best = min(good)
        right = found.ok and errors[chosen.name] <= accuracy and chosen.cost <= MARGIN * best
    else:
        best = min(errors.values())
        right = not found.ok and errors[chosen.name] <= MARGIN * best
    line = (
        f"{accuracy:.0e}  {found.problem[:30]:30}  {'right' if right else 'WRONG'}  "
        f"{chosen.name:30}  cost {chosen.cost:4d}  best {best:<8.3g}  "
        f"error {errors[chosen.name]:.1e}, estimated {chosen.error:.1e}"
    )
    return right, line


SOME = ("quadratic", "ridge", "logistic", "cournot")


@pytest.mark.parametrize(
    ("names", "tasks", "allowed"),
    [
        pytest.param(SOME, None, 0, id="some"),
        pytest.param(None, None, WRONG_ALLOWED, id="all", marks=pytest.mark.slow),
        pytest.param(None, 2, WRONG_ALLOWED, id="all-stacked", marks=pytest.mark.slow),
    ],
)
def test_recommendation_is_right_without_a_dense_reference(names, tasks, allowed):
    pairs = []
    for name in names or PROBLEMS:
        example = PROBLEMS[name].example(tasks=tasks)
        found, truth = (
            compare(
                example.problem,
                example.outer,
                example.task,
                methods=line_up(example),
                inner_solver=example.inner_solver,
                accuracy=min(ACCURACIES),
                reference=reference,
                repeats=1,
                memory=False,
            )
            for reference in ("estimate", "dense")
        )
        assert (found.reference, truth.reference) == ("estimate", "dense")
        pairs.append((found, truth))
    assert len(pairs) >= (4 if names else 10)
    judged = {a: [judge(found, truth, a) for found, truth in pairs] for a in ACCURACIES}
    table = "\n".join(line for lines in judged.values() for _, line in lines)
    print(f"\n{table}")
    for lines in judged.values():
        assert sum(not right for right, _ in lines) <= allowed, f"\n{table}"
