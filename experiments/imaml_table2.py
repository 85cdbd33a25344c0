"""Table 2 of the paper: few-shot accuracy on Omniglot, beside the baselines in one harness.

The paper's protocol, as far as it is known: the network of four strided convolutions, 600 test
tasks with as many query images per class as support images, batch norm on the statistics of all
query images (transductive), classes turned by multiples of 90°. Test characters are never trained
on: the released code draws training and test characters from two permutations, which share most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .accuracy_table import AccuracyTable, published_cells
from .cells import Entry
from .few_shot import LEARNERS
from .reproduction import Check, Options, percent

__all__ = ["ImamlTable2"]

_TWENTY = {"ways": 20, "inner_steps": 25, "queries": 5}
_TASKS: dict[str, dict[str, Any]] = {
    "5w1s": {"ways": 5, "shots": 1, "eval_queries": 1, "inner_steps": 16},
    "5w5s": {"ways": 5, "shots": 5, "eval_queries": 5, "inner_steps": 16},
    "20w1s": {**_TWENTY, "shots": 1, "eval_queries": 1},
    "20w5s": {**_TWENTY, "shots": 5, "eval_queries": 5},
}
_PUBLISHED = {
    "imaml": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "imaml-hessian-free": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
    "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "reptile": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
}
# What a faithful reproduction of the first row should reach.
_LOWEST = {"5w1s": 0.982, "5w5s": 0.994, "20w1s": 0.925, "20w5s": 0.98}


class ImamlTable2(AccuracyTable):
    """Omniglot; `quick` trains small networks for minutes, on glyphs where there is no Omniglot."""

    name = "imaml-table2"
    title = "iMAML, table 2: few-shot accuracy on Omniglot"
    source = "Rajeswaran et al. (2019), table 2"
    data = "omniglot"
    tasks = _TASKS
    learners = (
        *_PUBLISHED,
        "fomaml-regularized",
        "anil",
        "implicit-anil",
        "no-adaptation",
        "scratch",
    )
    published = published_cells(_PUBLISHED, _TASKS)

    def base(self, options: Options) -> dict[str, Any]:
        """20,000 meta-steps of 32 tasks; or 150 of 4, with half the channels."""
        if not options.quick:
            return {"data": "omniglot", "channels": 64, "tasks": 32, "steps": 20_000}
        data = "glyphs" if options.root is None else "omniglot"
        return {"data": data, "tasks": 4, "steps": 150, "eval_tasks": 200}

    def selected(self, options: Options) -> list[tuple[str, str, int]]:
        """Quick: one column, unless others are asked for."""
        cells = super().selected(options)
        if options.quick and not options.columns:
            return [cell for cell in cells if cell[1] == "5w1s"]
        return cells

    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """The trends; and, at full size, how near the published numbers are."""
        found: list[Check] = []
        for column, settings in self.tasks.items():
            have = {row: entries[row, column] for row in self.learners if (row, column) in entries}
            chance = 1 / settings["ways"]
            if "no-adaptation" in have:
                mean = have["no-adaptation"].mean
                found.append(
                    Check(
                        f"{column}: without adaptation, chance",
                        abs(mean - chance) < 0.05,
                        f"{percent(mean)} against {percent(chance)}",
                    )
                )
            if "scratch" in have:
                for row in ("imaml", "maml", "fomaml", "reptile"):
                    if row in have:
                        gain = have[row].mean - have["scratch"].mean
                        title = LEARNERS[row].title
                        claim = f"{column}: {title} is above training from scratch"
                        found.append(Check(claim, gain > 0, f"by {100 * gain:.1f} points"))
            if "imaml" in have and not options.quick:
                mean, lowest = have["imaml"].mean, _LOWEST[column]
                claim = f"{column}: iMAML reaches {100 * lowest:g}"
                found.append(Check(claim, mean >= lowest, percent(mean)))
        return found
