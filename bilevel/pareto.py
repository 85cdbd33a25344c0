"""The picture of a `Comparison`: error against cost, and against memory. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from .comparison import Comparison, MethodResult, size

__all__ = ["draw"]

_BLUE, _GREEN, _GREY, _INK = "#2563eb", "#15803d", "#94a3b8", "#1e293b"
_FLOOR = 1e-16
_GAP = 7.0


@dataclass(frozen=True)
class _Panel:
    """One panel: what it shows to the right."""

    title: str
    unit: str
    value: Callable[[MethodResult], float | None]


_PANELS = (
    _Panel("error against cost", "gradients + products", lambda one: one.cost),
    _Panel("error against memory", "peak of the tensors held", lambda one: one.memory),
)


def draw(comparison: Comparison) -> Figure:
    """Draw a comparison; methods are named where they stand.

    Args:
        comparison: The comparison.

    Returns:
        The figure; ``savefig`` writes it.

    Raises:
        ValueError: No error is known, so that there is nothing to draw.
    """
    known = [one for one in comparison.results if one.usable and one.error is not None]
    if not known:
        raise ValueError("the comparison knows no error of any method, so there is nothing to draw")
    panels = [p for p in _PANELS if any(p.value(one) is not None for one in known)]
    figure = Figure(
        figsize=(6.6 * len(panels), 5.4), dpi=150, layout="constrained", facecolor="white"
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    name = comparison.problem
    name = name if len(name) <= 70 else f"{name[:69]}…"
    figure.suptitle(name, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    chosen = comparison.recommendation
    points = [
        _draw_panel(one, panel, known, comparison, chosen)
        for one, panel in zip(axes, panels, strict=True)
    ]
    word = "estimated" if comparison.reference == "estimate" else "relative"
    axes[0].set_ylabel(f"{word} error", color=_INK)
    canvas.draw()  # fixes the layout, in which the labels are placed
    figure.set_layout_engine("none")
    for one, where in zip(axes, points, strict=True):
        _label(one, canvas, where, chosen)
    return figure


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    known: Sequence[MethodResult],
    comparison: Comparison,
    chosen: MethodResult | None,
) -> list[tuple[MethodResult, float, float]]:
    """Points, front and limits of one panel; returns where the points are."""
    points = []
    for one in known:
        x = panel.value(one)
        if x is not None and one.error is not None:
            points.append((one, max(float(x), 1.0), max(one.error, _FLOOR)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    front: list[tuple[float, float]] = []
    for _, x, y in sorted(points, key=lambda p: (p[1], p[2])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    xs, ys = [p[1] for p in points], [p[2] for p in points]
    wide = max(max(xs) / min(xs), 2.0)
    left, right = min(xs) / wide**0.22, max(xs) * wide**0.30
    high = max(*ys, comparison.accuracy)
    tall = max(high / min(ys), 10.0)
    low, high = min(ys) / tall**0.08, high * tall**0.10
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    # Left of the front nothing is known to exist; right of it, its last point is still the best.
    corners = [(front[0][0], high)]
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((right, front[-1][1]))
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    axes.plot(xs, ys, color=_BLUE, linewidth=1.6, alpha=0.55, zorder=2)
    axes.axhspan(low, comparison.accuracy, color=_GREEN, alpha=0.06, linewidth=0, zorder=0)
    axes.axhline(comparison.accuracy, color=_GREEN, linestyle="--", linewidth=1.0, zorder=1)
    axes.annotate(
        "accurate enough",
        (right, comparison.accuracy),
        (-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=_GREEN,
    )
    for one, x, y in points:
        best = (x, y) in front
        axes.plot(x, y, "o", color=_BLUE if best else _GREY, markersize=6, zorder=3)
        if one is chosen:
            axes.plot(x, y, "o", color="none", markeredgecolor=_GREEN, markersize=13, zorder=4)
            axes.lines[-1].set_markeredgewidth(1.8)
    axes.set_title(panel.title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(panel.unit, color=_INK)
    if panel.unit.startswith("peak"):
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: size(round(x)).replace(".0 ", " "))
        )
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_major_locator(LogLocator(subs=_ticks(right / left)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(which="both", colors="#475569")
    return points


def _ticks(ratio: float) -> tuple[float, ...]:
    """The leading digits to show on an axis that spans such a ratio."""
    if ratio < 8:
        return (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    return (1.0, 2.0, 5.0) if ratio < 200 else (1.0,)


def _label(
    axes: Axes,
    canvas: FigureCanvasAgg,
    points: Sequence[tuple[MethodResult, float, float]],
    chosen: MethodResult | None,
) -> None:
    """Write each name next to its point: at the nearest place where it covers nothing."""
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    centers = [axes.transData.transform((x, y)) for _, x, y in points]
    reach = [(9 if one is chosen else 5) * scale for one, _, _ in points]
    taken = [
        Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r)
        for (x, y), r in zip(centers, reach, strict=True)
    ]
    lines = [box for line in axes.lines for box in _segments(line, scale)]
    renderer = canvas.get_renderer()
    # The chosen one first, since it gets the best place.
    order = sorted(range(len(points)), key=lambda i: (points[i][0] is not chosen, i))
    for i in order:
        one, x, y = points[i]
        text = axes.annotate(
            one.name,
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=_INK,
            fontweight="bold" if one is chosen else "normal",
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#cbd5e1", "linewidth": 0.8, "shrinkB": 3},
        )
        extent = Text.get_window_extent(text, renderer)  # of the text without its arrow
        width, height = extent.width / scale, extent.height / scale
        others = [box for j, box in enumerate(taken) if j != i]
        gap = _GAP + (3 if one is chosen else 0)
        places = [
            (
                dx,
                dy,
                Bbox.from_bounds(
                    centers[i][0] + dx * scale,
                    centers[i][1] + dy * scale,
                    extent.width,
                    extent.height,
                ),
            )
            for dx, dy in _places(width, height, gap)
        ]
        free = [
            place
            for place in places
            if frame.contains(place[2].x0, place[2].y0)
            and frame.contains(place[2].x1, place[2].y1)
            and not any(place[2].overlaps(other) for other in others)
        ]
        clear = [p for p in free if not any(p[2].overlaps(line) for line in lines)]
        dx, dy, box = (clear or free or places)[0]
        text.set_position((dx, dy))
        if max(abs(dx + width / 2) - width / 2, abs(dy + height / 2) - height / 2) <= gap + height:
            assert text.arrow_patch is not None
            text.arrow_patch.set_visible(False)
        taken.append(box)


def _segments(line: Line2D, scale: float) -> list[Bbox]:
    """Thin boxes around the pieces of a line that is made of steps."""
    if line.get_marker() != "None":
        return []
    path = line.get_transform().transform_path(line.get_path())
    corners = np.asarray(path.vertices, dtype=np.float64)
    return [
        Bbox.from_extents(*np.minimum(a, b) - scale, *np.maximum(a, b) + scale)
        for a, b in pairwise(corners)
    ]


def _places(width: float, height: float, gap: float) -> list[tuple[float, float]]:
    """Offsets of a label's lower left corner from its point, in points, the nearest first."""
    out = []
    for far in range(12):
        shift = 0.5 * far * (height + 2)
        right, left, middle = gap, -gap - width, -width / 2
        for dy in (shift - height / 2, -shift - height / 2):
            out += [(right, dy), (left, dy)]
        out += [(middle, gap + shift), (middle, -gap - height - shift)]
    return out
