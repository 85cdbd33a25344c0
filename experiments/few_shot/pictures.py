"""The picture of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["learning_curve"]

_BLUE, _GREEN, _ORANGE, _GREY, _INK = "#2563eb", "#15803d", "#d97706", "#64748b", "#1e293b"
_LINES = (("-", _GREEN), ("--", _ORANGE), (":", _GREY))


def learning_curve(
    title: str,
    steps: Sequence[int],
    accuracy: Sequence[float],
    loss: Sequence[float],
    held_out: Mapping[str, tuple[float, float]],
) -> Figure:
    """Accuracy and loss against the step, raw and smoothed.

    Args:
        title: Title of the figure.
        steps: Number of each step, from 1.
        accuracy: Query accuracy of each step in percent.
        loss: Outer value of each step.
        held_out: Mean and interval in percent by name, drawn as horizontal lines with a band.

    Returns:
        The figure; ``savefig`` writes it.
    """
    figure = Figure(figsize=(9.0, 6.4), dpi=150, layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    for axes, values, name in (
        (upper, accuracy, "query accuracy (%)"),
        (lower, loss, "query loss"),
    ):
        axes.plot(steps, values, color=_BLUE, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=_BLUE, linewidth=2.0, label="training tasks")
        axes.set_ylabel(name, color=_INK)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#94a3b8")
        axes.tick_params(colors="#475569")
    for (name, (mean, interval)), (style, color) in zip(held_out.items(), _LINES, strict=False):
        label = f"held-out classes, {name}: {mean:.1f} ± {interval:.1f} %"
        upper.axhspan(mean - interval, mean + interval, color=color, alpha=0.15, linewidth=0)
        upper.axhline(mean, color=color, linestyle=style, linewidth=1.4, label=label)
    upper.set_ylim(0, 101)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("meta-step", color=_INK)
    lower.set_xlim(0, max(2, steps[-1]))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    return figure


def _smooth(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Centred moving mean; narrower at the ends."""
    width = max(1, len(values) // 20)
    data = np.asarray(values, dtype=np.float64)
    total = np.concatenate([[0.0], data.cumsum()])
    position = np.arange(len(data))
    reach = np.minimum(np.minimum(position, position[::-1]), width)
    smooth: np.ndarray[tuple[int], np.dtype[np.float64]] = (
        total[position + reach + 1] - total[position - reach]
    ) / (2 * reach + 1)
    return smooth
