"""Learning λ from a bad start, against fixed values of it.

On the glyphs that the library draws. The inner solver backtracks, so that one rate suits every λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.run_folder import METRICS, read_metrics

from .accuracy_table import AccuracyTable
from .cells import Entry
from .reproduction import Check, Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImamlStrength"]

_STRENGTHS = (0.02, 0.1, 0.5, 2.0, 10.0, 50.0)
_TASKS: dict[str, dict[str, Any]] = {f"{one:g}": {"strength": one} for one in _STRENGTHS}
_STARTS = ("0.02", "50")
# Rows, their looks in the picture, and what they are called there.
_ROWS = {
    "imaml": (2, "o-", "fixed"),
    "imaml-learned": (0, "s", "learned from there"),
    "imaml-unbounded": (1, "D", "learned, no bound"),
}


class ImamlStrength(AccuracyTable):
    """Fixed λ in the first row; in the others, λ learned from the two ends."""

    name = "imaml-strength"
    title = "iMAML: λ learned from a bad start"
    source = "no published table; 5-way 1-shot on glyphs, 300 meta-steps"
    data = "glyphs"
    defining = ("strength",)
    tasks = _TASKS
    learners = tuple(_ROWS)

    def base(self, options: Options) -> dict[str, Any]:
        """The usual run on glyphs; or fewer steps of fewer tasks."""
        common = {"data": "glyphs"}
        return {**common, "steps": 100, "tasks": 4, "eval_tasks": 200} if options.quick else common

    def selected(self, options: Options) -> list[tuple[str, str, int]]:
        """Learned from the two ends only."""
        return [
            cell for cell in super().selected(options) if cell[0] == "imaml" or cell[1] in _STARTS
        ]

    def draw(self, entries: Mapping[tuple[str, str], Entry]) -> Figure:
        """Accuracy against the λ that a run began with, fixed and learned."""
        from .pictures import COLORS, INK, axes_of, new_figure

        figure = new_figure(7.0, 4.2)
        axes = axes_of(figure, "λ at the first meta-step", "accuracy (%)")
        for row, (color, style, label) in _ROWS.items():
            found = {float(c): entry for (r, c), entry in entries.items() if r == row}
            if found:
                axes.errorbar(
                    list(found),
                    [100 * entry.mean for entry in found.values()],
                    yerr=[100 * entry.interval for entry in found.values()],
                    fmt=style,
                    color=COLORS[color],
                    capsize=3,
                    label=label,
                )
        axes.set_xscale("log")
        axes.legend(frameon=False)
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        return figure

    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """What is learned ends within a point of the best fixed λ."""
        fixed = {column: entry.mean for (row, column), entry in entries.items() if row == "imaml"}
        if not fixed:
            return []
        best = max(fixed, key=fixed.__getitem__)
        found = []
        for start in _STARTS:
            if ("imaml-learned", start) not in entries:
                continue
            entry = entries["imaml-learned", start]
            gap = fixed[best] - entry.mean
            last = [read_metrics(cell.folder / METRICS)[-1]["strength"] for cell in entry.cells]
            found.append(
                Check(
                    f"λ learned from {start}: within 1 point of the best fixed λ, {best}",
                    gap <= 0.01,
                    f"{100 * gap:+.2f} points below it; "
                    f"λ ends at {', '.join(f'{one:.3g}' for one in last)}",
                )
            )
        return found
