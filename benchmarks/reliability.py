"""Is there a hypergradient that is wrong, and does not say so?

    python benchmarks/reliability.py [--out benchmarks/results]

Runs the cases of `tests/test_never_silent.py`, each of which has something wrong with it: an inner
solver that stops early, an indefinite or singular Hessian, noise, a lost dependence, NaN. Each
hypergradient is compared with its float64 truth: it is right, or something says that it is not.
Limits are cases in which nothing of one hypergradient shows the error; `check_hypergradient` does.
Writes a table and JSON.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from arguments import arguments

from bilevel.experiments.results import Row, write_results

sys.path.append(str(Path(__file__).parents[1]))

HOW = {
    "exact": "right",
    "status": "flagged by the status",
    "raised": "refused with an error",
    "warning": "warned of",
    "residual": "its reported residual says so",
    "estimate": "its error estimate says so",
    "SILENT": "silent",
}


def main() -> None:
    """Judge, print, write."""
    args = arguments(__doc__, None)
    from tests.adversarial import judge
    from tests.test_never_silent import FLAGGED, LIMITS

    found = Counter(judge(case).how for case in FLAGGED)
    rows = [Row({"cases": "all"}, "cases", len(FLAGGED))]
    rows += [Row({"cases": text}, "cases", found[how]) for how, text in HOW.items()]
    rows.append(Row({"cases": "limits, found by a check"}, "cases", len(LIMITS)))
    for row in rows:
        print(f"{row.setting['cases']:<32}{row.value:>5}")
    path = write_results(args.out, "reliability", sys.argv, rows, seeds=[0])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
