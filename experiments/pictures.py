"""The look that all pictures share."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

__all__ = ["COLORS", "axes_of", "new_figure", "tidy"]

COLORS = ("#d97706", "#15803d", "#2563eb", "#7c3aed", "#be123c", "#64748b", "#0e7490", "#a16207")
INK = "#1e293b"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def axes_of(figure: Figure, x: str, y: str) -> Any:
    """The only axes of a figure, with their labels."""
    axes = figure.subplots()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    tidy(axes)
    return axes


def tidy(axes: Any) -> None:
    """Light lines behind the data, and no box around it."""
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
