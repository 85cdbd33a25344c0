"""Every method on every problem, as `bilevel compare` runs them: error and cost.

    python benchmarks/line_up.py [--out benchmarks/results]

The small instance that each registered problem makes, 50 steps of gradient descent on the inner
problem, a choice of all registered methods; errors are true, against dense float64 algebra. Counts
are the same on every machine, and times are not among them. Writes JSON, and a picture for each
problem.
"""

from __future__ import annotations

import sys

from arguments import arguments

from bilevel import compare
from bilevel.experiments.results import Row, write_results
from bilevel.registry import PROBLEMS
from bilevel.solvers import GradientDescent

STEPS = 50


def main() -> None:
    """Compare, print, write."""
    args = arguments(__doc__, None)
    rows = []
    for name in PROBLEMS:
        example = PROBLEMS[name].example()
        found = compare(
            example.problem,
            example.outer,
            example.task,
            inner_solver=GradientDescent(lr=2 / (example.lipschitz + example.mu), max_steps=STEPS),
            repeats=1,
        )
        print(f"{name}: {example.note}\n\n{found}\n")
        found.plot(args.out / f"line-up-{name}.png")
        for one in found.results:
            setting = {"problem": name, "method": one.name, "call": one.method}
            if one.status is None or one.error is None:
                rows.append(Row({**setting, "reason": one.note.split(":")[0]}, "refused", 1))
                continue
            rows += [
                Row({**setting, "status": one.status.name}, "error", float(f"{one.error:.2e}")),
                Row(setting, "cosine", round(one.cosine or 0.0, 6)),
                *(Row(setting, key, count) for key, count in one.counts.items()),
            ]
    path = write_results(args.out, "line-up", sys.argv, rows, seeds=[0])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
