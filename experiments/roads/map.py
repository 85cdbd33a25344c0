"""A map of a road network: links as bent arrows, so that both directions are seen, in colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib as mpl
import networkx as nx
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.patches import FancyArrowPatch

from bilevel.problems.traffic import RoadNetwork

from ..pictures import INK, new_figure

__all__ = ["Panel", "draw_map"]

_MANY = 60


@dataclass(frozen=True)
class Panel:
    """One map.

    Attributes:
        title: Above it.
        values: What colors the links, ``[links]``.
        label: Of the color bar.
        top: Where the colors end; default: the largest value, unless few are far above the others.
        middle: The value of the color in the middle, such as 1 for flow over capacity; None: there
            is none, and colors go from faint to strong.
    """

    title: str
    values: Sequence[float]
    label: str
    top: float | None = None
    middle: float | None = None


def draw_map(network: RoadNetwork, panels: Sequence[Panel], path: Path | BinaryIO) -> None:
    """Draw maps of one network side by side, as PNG; panels of one label share their colors."""
    places = _places(network)
    wide, high = _extent(places)
    height = min(7.0, max(3.0, 4.6 * high / wide))
    figure = new_figure(4.8 * len(panels), height + 1.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    tops = {
        label: max(p.top or _top(p.values) for p in panels if p.label == label)
        for label in {p.label for p in panels}
    }
    for one, panel in zip(axes, panels, strict=True):
        _draw(one, network, places, panel, tops[panel.label])
        colors = ScalarMappable(_scale(panel, tops[panel.label]), _colors(panel))
        beyond = "max" if max(panel.values) > tops[panel.label] else "neither"
        bar = figure.colorbar(
            colors, ax=one, extend=beyond, orientation="horizontal", shrink=0.8, pad=0.02
        )
        bar.set_label(panel.label, color=INK)
        bar.outline.set_visible(False)
    figure.savefig(path, format="png")


def _scale(panel: Panel, top: float) -> Normalize:
    if panel.middle is None:
        return Normalize(0.0, top)
    return TwoSlopeNorm(panel.middle, 0.0, max(top, 2.0 * panel.middle))


def _top(values: Sequence[float]) -> float:
    """The largest value; where it is far above nearly all others, a value that shows those."""
    most = max(max(values), 1e-12)
    positive = [value for value in values if value > 1e-6 * most]
    usual = float(np.quantile(positive, 0.95)) if positive else most
    return most if most < 2.5 * usual else 1.2 * usual


def _draw(
    axes: Any,
    network: RoadNetwork,
    places: Mapping[int, tuple[float, float]],
    panel: Panel,
    top: float,
) -> None:
    wide, high = _extent(places)
    many = network.nodes > _MANY
    colors, scale = _colors(panel), _scale(panel, top)
    ends = network.ends
    order = sorted(range(network.links), key=lambda a: panel.values[a])
    for a in order:
        tail, head = ends[a]
        value = panel.values[a]
        share = min(1.0, value / top)
        axes.add_patch(
            FancyArrowPatch(
                places[tail],
                places[head],
                arrowstyle="-" if many else "-|>",
                mutation_scale=9,
                connectionstyle=f"arc3,rad={0.02 if many else 0.13}",
                color=colors(scale(value)),
                lw=(0.5 if many else 1.0) + (1.8 if many else 3.0) * share,
                shrinkA=0.0 if many else 7.0,
                shrinkB=0.0 if many else 7.0,
                zorder=2 + share,
            )
        )
    xs, ys = zip(*places.values(), strict=True)
    if many:
        axes.plot(xs, ys, ".", ms=1.5, color="#64748b", zorder=1)
    else:
        axes.plot(xs, ys, "o", ms=13, color="white", mec="#475569", mew=0.8, zorder=4)
        for node, (x, y) in places.items():
            axes.text(x, y, str(node), ha="center", va="center", fontsize=7, color=INK, zorder=5)
    for limits, values, size in ((axes.set_xlim, xs, wide), (axes.set_ylim, ys, high)):
        middle = (min(values) + max(values)) / 2
        limits(middle - 0.57 * size, middle + 0.57 * size)
    axes.set_title(panel.title, color=INK, fontsize=11)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _colors(panel: Panel) -> Any:
    """From calm to alarming where there is a middle; else from faint to strong."""
    if panel.middle is not None:
        return mpl.colormaps["turbo"]
    # Without its palest end, which is lost on white.
    return ListedColormap(mpl.colormaps["YlGnBu"](np.linspace(0.2, 1.0, 256)))


def _places(network: RoadNetwork) -> dict[int, tuple[float, float]]:
    """Where the nodes are; a degree of longitude is as long there as it is at their latitude."""
    known = network.coordinates
    if known is not None and all(node in known for node in network.graph):
        points = {node: known[node] for node in network.graph}
        ys = [y for _, y in points.values()]
        degrees = all(abs(x) <= 180 and abs(y) <= 90 for x, y in points.values())
        small = max(ys) - min(ys) < 5
        if degrees and small and network.nodes > _MANY // 4:
            narrow = math.cos(math.radians(sum(ys) / len(ys)))
            return {node: (narrow * x, y) for node, (x, y) in points.items()}
        return points
    drawn = nx.kamada_kawai_layout(network.graph.to_undirected())
    return {node: (float(x), float(y)) for node, (x, y) in drawn.items()}


def _extent(places: Mapping[int, tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*places.values(), strict=True)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    # Nodes on one line need room for the links that bend between them.
    least = max(0.25 * max(wide, high), 1e-9)
    return max(wide, least), max(high, least)
