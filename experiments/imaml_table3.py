"""Table 3 of the paper: mini-ImageNet, 5-way 1-shot.

The usual network: four blocks of 32 channels with max-pooling. The published differences between
learners lie inside their intervals, so that no order is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .accuracy_table import AccuracyTable, published_cells
from .cells import Entry
from .reproduction import Check, Options, percent

__all__ = ["ImamlTable3"]

_TASKS: dict[str, dict[str, Any]] = {
    "5w1s": {"ways": 5, "shots": 1, "eval_queries": 1, "inner_steps": 10},
}
_PUBLISHED = {
    "imaml": ((48.96, 1.84),),
    "imaml-hessian-free": ((49.30, 1.88),),
    "maml": ((48.70, 1.84),),
    "fomaml": ((48.07, 1.75),),
    "reptile": ((49.97, 0.32),),
}
_CHANCE = 0.2
_ABOVE_CHANCE = 0.1
_REACH = 0.02


class ImamlTable3(AccuracyTable):
    """Mini-ImageNet; `quick` takes a few hundred meta-steps with iMAML, which beats chance."""

    name = "imaml-table3"
    title = "iMAML, table 3: 5-way 1-shot accuracy on mini-ImageNet"
    source = "Rajeswaran et al. (2019), table 3"
    data = "mini-imagenet"
    tasks = _TASKS
    learners = (*_PUBLISHED, "fomaml-regularized", "anil", "no-adaptation", "scratch")
    published = published_cells(_PUBLISHED, _TASKS)

    def base(self, options: Options) -> dict[str, Any]:
        """60,000 meta-steps of 4 tasks at λ = 0.5, as is usual; or 400 of 2.

        A few steps learn more at a strong pull: at a weak one the network, not yet trained, is sure
        of what it learned from five images.
        """
        common = {"data": "mini-imagenet", "network": "pool", "channels": 32}
        if options.quick:
            few = {"tasks": 2, "steps": 400, "queries": 5, "eval_tasks": 400}
            return {**common, **few, "strength": 2.0}
        return {**common, "tasks": 4, "steps": 60_000, "queries": 15, "lr": 1e-3, "strength": 0.5}

    def selected(self, options: Options) -> list[tuple[str, str, int]]:
        """Quick: iMAML, unless others are asked for."""
        cells = super().selected(options)
        if options.quick and not options.rows:
            return [cell for cell in cells if cell[0] == "imaml"]
        return cells

    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """Above chance; and, at full size, within 2 points of the published number."""
        found = []
        for (row, column), entry in entries.items():
            if row not in _PUBLISHED:
                continue
            if options.quick:
                least = _CHANCE + _ABOVE_CHANCE
                claim = f"{row} {column}: 10 points above chance"
                found.append(Check(claim, entry.mean >= least, percent(entry.mean)))
            else:
                value = self.published[row, column][0]
                claim = f"{row} {column}: at most 2 points below {percent(value)}"
                found.append(Check(claim, entry.mean >= value - _REACH, percent(entry.mean)))
        return found
