r"""Learning λ from a bad start, against fixed values of it, with no bound to stop at.

On the glyphs that the library draws, twice. The usual few-shot run leaves its inner problem far
from solved, and its network is not smooth, so that nothing promises that the implicit gradient in λ
means anything. In the other, a smooth network without batch norm, L-BFGS comes nearer to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bilevel.run_folder import WEIGHTS

from .accuracy_table import AccuracyTable
from .cells import Cell, Entry
from .few_shot import LEARNERS
from .few_shot.run import mean_strength
from .reproduction import Check, Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImamlStrength"]

_STRENGTHS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 50.0)
_TASKS: dict[str, dict[str, Any]] = {f"{one:g}": {"strength": one} for one in _STRENGTHS}
_STARTS = ("0.02", "50")
# The learner with λ fixed, and the one that learns it.
_PAIRS = {"imaml": "imaml-unbounded", "imaml-lbfgs": "imaml-lbfgs-unbounded"}


class ImamlStrength(AccuracyTable):
    """λ fixed, and λ learned from the two ends, for two networks and inner solvers."""

    name = "imaml-strength"
    title = "iMAML: λ learned from a bad start"
    source = "no published table; 5-way 1-shot on glyphs, 300 meta-steps"
    data = "glyphs"
    defining = ("strength",)
    tasks = _TASKS
    learners = tuple(row for pair in _PAIRS.items() for row in pair)

    def base(self, options: Options) -> dict[str, Any]:
        """The usual run on glyphs; or fewer steps of fewer tasks."""
        common = {"data": "glyphs"}
        return {**common, "steps": 100, "tasks": 4, "eval_tasks": 200} if options.quick else common

    def has(self, row: str, column: str) -> bool:
        """λ is learned from the two ends only."""
        return row in _PAIRS or column in _STARTS

    def draw(self, entries: Mapping[tuple[str, str], Entry]) -> Figure:
        """Accuracy against λ, fixed and where learning ended; a panel for each pair."""
        from .pictures import COLORS, INK, new_figure, tidy

        shown = [fixed for fixed in _PAIRS if any(row == fixed for row, _ in entries)]
        figure = new_figure(1.5 + 4.5 * max(1, len(shown)), 4.2)
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for axes, row in zip(panels, shown, strict=False):
            fixed = {float(c): one for (r, c), one in entries.items() if r == row}
            axes.errorbar(
                list(fixed),
                [100 * one.mean for one in fixed.values()],
                yerr=[100 * one.interval for one in fixed.values()],
                fmt="o-",
                color=COLORS[2],
                capsize=3,
                label="fixed",
            )
            for start, color in zip(_STARTS, (COLORS[0], COLORS[4]), strict=True):
                learned = entries.get((_PAIRS[row], start))
                if learned is not None:
                    axes.errorbar(
                        [last_strength(cell) for cell in learned.cells],
                        [100 * cell.accuracy[0] for cell in learned.cells],
                        yerr=[100 * cell.accuracy[1] for cell in learned.cells],
                        fmt="s",
                        color=color,
                        capsize=3,
                        label=f"learned from {start}",
                    )
            axes.set_xscale("log")
            axes.set_xlabel("λ at the end", color=INK)
            axes.set_ylabel("accuracy (%)", color=INK)
            axes.set_title(LEARNERS[row].title, fontsize=11)
            axes.legend(frameon=False)
            tidy(axes)
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        return figure

    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """What is learned ends within a point of the best fixed λ."""
        found = []
        for row, learned in _PAIRS.items():
            fixed = {column: one.mean for (r, column), one in entries.items() if r == row}
            if not fixed:
                continue
            best = max(fixed, key=fixed.__getitem__)
            for start in _STARTS:
                if (learned, start) not in entries:
                    continue
                entry = entries[learned, start]
                gap = fixed[best] - entry.mean
                ends = ", ".join(f"{last_strength(cell):.3g}" for cell in entry.cells)
                title, side = LEARNERS[row].title, "below" if gap > 0 else "above"
                claim = f"{title}: λ learned from {start} is within 1 point of the best fixed λ"
                text = f"{100 * abs(gap):.2f} points {side} that of {best}; λ ends at {ends}"
                found.append(Check(claim, gap <= 0.01, text))
        return found


def last_strength(cell: Cell) -> float:
    """The λ that was evaluated with, of the weights that were kept."""
    weights = torch.load(cell.folder / WEIGHTS, map_location="cpu", weights_only=True)
    return mean_strength(weights["log_strength"])
