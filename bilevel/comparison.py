"""What `compare` found: a table, a recommendation, numbers, and a picture."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from .status import Status

__all__ = ["Comparison", "MethodResult"]

TRUSTED = 0.1
"""The share of the accuracy by which a reference may be off without being told."""
_WIDTH = 100


@dataclass(frozen=True)
class MethodResult:
    """One method of a `Comparison`.

    Attributes:
        name: Its name in the comparison.
        method: Its ``repr``.
        inner_solver: That of the inner solver it was run with.
        error: ‖gradient − reference‖ / ‖reference‖; None where it is not known.
        cosine: Cosine between the two.
        seconds: Median wall-clock time of one hypergradient; None where the method failed.
        counts: Inner ``gradients``, Hessian ``products`` and objective ``values`` of one
            hypergradient, summed over tasks.
        memory: Peak of the tensor bytes that it held; None where it was not measured.
        status: The worst status of all tasks; None where the method raised an error.
        note: The error that it raised, or what it warned of.
    """

    name: str
    method: str
    inner_solver: str
    error: float | None = None
    cosine: float | None = None
    seconds: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    memory: int | None = None
    status: Status | None = None
    note: str = ""

    @property
    def cost(self) -> int:
        """Gradients plus products."""
        return self.counts.get("gradients", 0) + self.counts.get("products", 0)

    @property
    def usable(self) -> bool:
        """It returned a hypergradient of every task."""
        return self.status is not None and self.status.usable


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; ``str()`` of it is a table with a recommendation below.

    Attributes:
        problem: The problem's ``repr``, or the name of its class where it has none.
        tasks: Number of tasks.
        n: Length of the inner variable of a task, the largest.
        dtype: Of the inner variable.
        accuracy: The relative error allowed.
        budget: The most gradients plus products allowed; None: any number.
        max_seconds: The longest time allowed; None: any.
        reference: What errors are taken against: ``"dense"``, ``"estimate"``, or ``"none"`` where
            neither could be computed.
        reference_error: How far the reference may be off itself, relative.
        results: One for each method, the cheapest first and those that failed last.
        advice: The recommendation in words, with a cure where nothing is accurate enough.
    """

    problem: str
    tasks: int
    n: int
    dtype: torch.dtype
    accuracy: float
    budget: float | None
    max_seconds: float | None
    reference: Literal["dense", "estimate", "none"]
    reference_error: float
    results: tuple[MethodResult, ...]
    advice: str = ""

    @property
    def affordable(self) -> tuple[MethodResult, ...]:
        """The usable methods within the budget, the cheapest first."""
        return tuple(
            one
            for one in self.results
            if one.usable
            and (self.budget is None or one.cost <= self.budget)
            and (self.max_seconds is None or (one.seconds or 0.0) <= self.max_seconds)
        )

    @property
    def ok(self) -> bool:
        """A method within the budget is accurate enough."""
        return any(self.accurate(one) for one in self.affordable)

    @property
    def recommendation(self) -> MethodResult | None:
        """The cheapest affordable method that is accurate enough; else the most accurate one.

        None where no method is affordable, or no error is known.
        """
        known = [one for one in self.affordable if one.error is not None]
        accurate = [one for one in known if self.accurate(one)]
        if accurate:
            return accurate[0]
        return min(known, key=lambda one: one.error or 0.0, default=None)

    @property
    def front(self) -> tuple[MethodResult, ...]:
        """The methods than which none is both cheaper and more accurate, the cheapest first."""
        best, out = math.inf, []
        for one in self.results:
            if one.usable and one.error is not None and one.error < best:
                best = one.error
                out.append(one)
        return tuple(out)

    def accurate(self, result: MethodResult) -> bool:
        """Whether the error of a method is known and allowed."""
        return result.error is not None and result.error <= self.accuracy

    def __str__(self) -> str:
        plural = "s" * (self.tasks != 1)
        where = {
            "dense": "true, against dense float64 algebra at the solved inner problem",
            "estimate": "estimated, against Newton's method in the inner variable",
            "none": "unknown: no reference could be computed",
        }[self.reference]
        if self.reference_error > TRUSTED * self.accuracy:
            where += f", itself off by {self.reference_error:.0e}"
        summed = " (costs are summed)" if self.tasks > 1 else ""
        lines = [
            f"{self.problem}: {self.tasks} task{plural}{summed}, n = {self.n}, {self.dtype}",
            f"errors are {where}",
            "",
            *self._table(),
            "",
            *textwrap.wrap(self.advice, _WIDTH),
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        head = ("method", "error", "cosine", "cost", "gradients", "products", "values", "time")
        ran = [one for one in self.results if one.status is not None]
        rows = [_cells(one) for one in ran]
        titles = (*head, "memory", "status")
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        width = max(len(one.name) for one in self.results)
        widths[0] = max(widths[0], width)

        def line(mark: str, cells: Sequence[str]) -> str:
            first, *middle, last = (
                cell.ljust(w) if i in (0, len(widths) - 1) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([f"{mark} {first}", *middle, last]).rstrip()

        lines = [line(" ", titles), "  " + "-" * (sum(widths) + 2 * len(widths) - 2)]
        chosen = self.recommendation
        for one, cells in zip(ran, rows, strict=True):
            enough = self.accurate(one) and one.usable
            mark = " " if not enough else "→" if one is chosen else "✓"
            lines.append(line(mark, cells))
        noted = [one for one in self.results if one.note]
        for i, one in enumerate(noted):
            if i == 0 and one.status is not None:
                lines.append("")
            start = f"  {one.name.ljust(widths[0])}  "
            lines += textwrap.wrap(
                one.note, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start)
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, such as JSON takes."""
        chosen = self.recommendation
        return {
            "problem": self.problem,
            "tasks": self.tasks,
            "n": self.n,
            "dtype": str(self.dtype).removeprefix("torch."),
            "accuracy": self.accuracy,
            "budget": self.budget,
            "max_seconds": self.max_seconds,
            "reference": self.reference,
            "reference_error": self.reference_error,
            "ok": self.ok,
            "recommendation": None if chosen is None else chosen.name,
            "advice": self.advice,
            "results": [
                {
                    **{f.name: getattr(one, f.name) for f in fields(one)},
                    "counts": dict(one.counts),
                    "cost": one.cost,
                    "status": None if one.status is None else one.status.name,
                }
                for one in self.results
            ],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error against cost and against memory, and save the picture; needs matplotlib.

        Args:
            path: Where to; the ending, such as ``.png`` or ``.svg``, decides the format.

        Raises:
            ValueError: No error is known, so that there is nothing to draw.
        """
        from .pareto import draw

        draw(self).savefig(path)


def _cells(one: MethodResult) -> tuple[str, ...]:
    return (
        one.name,
        "–" if one.error is None else f"{one.error:.1e}",
        "–" if one.cosine is None else f"{one.cosine:.6f}",
        str(one.cost),
        *(str(one.counts[key]) for key in ("gradients", "products", "values")),
        duration(one.seconds),
        size(one.memory),
        "" if one.status is None else one.status.name,
    )


def duration(seconds: float | None) -> str:
    """Seconds as a text."""
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:.1f} ms"


def size(count: int | None) -> str:
    """Bytes as a text."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
