"""A graph of levels as text, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .brief import brief
from .level import Level
from .level_graph import routes

if TYPE_CHECKING:
    from .multilevel import MultiLevelProblem

__all__ = ["draw_levels", "levels_as_text"]

_STAIR = 0.5
_ROUTES, _MOST = 20, 1000
_INK, _FILL, _LINE = "#1d2733", "#e6f0fa", "#2a6fbb"


def levels_as_text(problem: MultiLevelProblem) -> str:
    """A line for each level, from the top down, and a line for each route of its derivatives."""
    rows = [("generation", "level", "given", "solved by", "differentiated by")]
    for depth, names in enumerate(problem.generations):
        for name in names:
            level = problem.level(name)
            above = ", ".join(problem.graph.predecessors(name)) or "—"
            rows.append((str(depth), name, above, _solver(level), _method(level)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines = [line.rstrip() for line in lines]
    leaves = [name for name, degree in problem.graph.out_degree() if degree == 0]
    ways = [way for leaf in leaves for way in routes(problem.graph, leaf, _MOST)]
    more = [f"  … and {len(ways) - _ROUTES} more"] * (len(ways) > _ROUTES)
    shown = [f"  {' → '.join(way)}" for way in ways[:_ROUTES]]
    return "\n".join([*lines, "", "routes", *shown, *more])


def draw_levels(problem: MultiLevelProblem, path: Path) -> None:
    """The levels as boxes, one generation a row; edges lead from a variable to where it enters.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture of the levels needs matplotlib; install bilevel[cli], or call draw() "
            "without a path for the text"
        ) from error
    generations = problem.generations
    widest = max(len(names) for names in generations)
    across = widest + _STAIR * (len(generations) - 1)
    figure = Figure(figsize=(2.9 * across + 0.4, 1.35 * len(generations) + 0.2), dpi=160)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    places: dict[str, tuple[float, float]] = {}
    for row, names in enumerate(generations):
        for i, name in enumerate(names):
            # A staircase: an edge past a generation runs below it, beside all boxes.
            places[name] = (i + _STAIR * row, -float(row))
    boxes = {}
    for name, (x, y) in places.items():
        level = problem.level(name)
        lines = [_solver(level), _method(level)] if level.is_solved else ["given"]
        label = "\n".join([f"$\\bf{{{_mathtext(name)}}}$", *lines])
        box = {"boxstyle": "round,pad=0.5", "fc": _FILL, "ec": _LINE, "lw": 1.2}
        boxes[name] = axes.text(
            x, y, label, ha="center", va="center", fontsize=8.5, color=_INK, bbox=box, zorder=3
        )
    axes.set_xlim(-0.55, across - 0.45)
    axes.set_ylim(-len(generations) + 0.45, 0.55)
    canvas.draw()  # the boxes' sizes, at which edges end, are known from now on
    for i, (source, target) in enumerate(problem.graph.edges):
        line: dict[str, Any] = {"color": _LINE, "lw": 1.3}
        if places[source][1] - places[target][1] < 1.5:
            joins = {"patchA": boxes[source].get_bbox_patch(), "shrinkA": 2.0}
            joins |= {"patchB": boxes[target].get_bbox_patch(), "shrinkB": 2.0}
            arrow: dict[str, Any] = {"arrowstyle": "-|>", **line, **joins}
            axes.annotate("", places[target], places[source], arrowprops=arrow, zorder=2)
            continue
        # Down beside the boxes of the generations between, and in from the left.
        (left, low), (right, _) = axes.transData.inverted().transform(
            boxes[source].get_window_extent()
        )
        end, _ = axes.transData.inverted().transform(boxes[target].get_window_extent())[0]
        x, y = left + 0.1 * (right - left), places[target][1] + 0.07 * (i % 3 - 1)
        axes.plot([x, x], [low - 0.06, y], **line, zorder=1)
        arrow = {"arrowstyle": "-|>", **line, "shrinkA": 0.0, "shrinkB": 7.0}
        axes.annotate("", (end, y), (x, y), arrowprops=arrow, zorder=1)
    figure.savefig(path)


def _solver(level: Level) -> str:
    if level.schedule is not None:
        return f"scheduled: {brief(level.schedule)}"
    return "given" if level.solver is None else brief(level.solver)


def _method(level: Level) -> str:
    return "—" if level.method is None else brief(level.method)


def _mathtext(name: str) -> str:
    """Letters that mathtext takes for itself, guarded."""
    name = name.replace("\\", "∖")
    return "".join("\\" + c if c in "_%&#$^{}" else "\\ " if c == " " else c for c in name)
