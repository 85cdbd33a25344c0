"""One outer step in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flat import Outer
from .result import Hypergradient

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """One outer step in numbers; means over usable tasks.

    Attributes:
        step: Number of the step, from 0.
        outer_value: Mean of f.
        inner_residual: Mean of ‖∂_z G‖.
        linear_residual: Mean relative residual of the adjoint system; None without one.
        gradient_norm: Norm of the hypergradient over all leaves.
        tasks: Number of tasks.
        failed: Number of tasks left out of the mean.
        status: Number of tasks by status name.
        seconds: Wall-clock time of the step.
        metrics: Mean of each of the problem's metrics.
        curvature: Smallest and largest Rayleigh quotient that the adjoint solves of all usable
            tasks met; None where none was.
        error_estimate: Median over usable tasks of the estimated relative error; inf where half of
            them have no estimate, None where the method was not asked.
    """

    step: int
    outer_value: float
    inner_residual: float
    linear_residual: float | None
    gradient_norm: float
    tasks: int
    failed: int
    status: dict[str, int]
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    curvature: tuple[float, float] | None = None
    error_estimate: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, step: int, result: Hypergradient, seconds: float) -> Record:
        """The record of one result; the device is asked once."""
        usable = [i for i, status in enumerate(result.status) if status.usable]
        linear = result.diagnostics.linear
        columns = {
            "outer_value": result.outer_value,
            "inner_residual": result.diagnostics.inner.residual,
            **({} if linear is None else {"linear_residual": linear.residual}),
            **{f"metrics.{key}": value for key, value in result.metrics.items()},
        }
        device = result.outer_value.device
        table = torch.stack([_column(one, device) for one in columns.values()])
        numbers = list(table[:, usable].mean(1))
        square = torch.stack(
            [g.double().square().sum().to(device) for g in Outer.of(result.gradient).leaves]
        )
        numbers.append(square.sum().sqrt())
        curvature = None if linear is None else linear.curvature
        if curvature is not None:
            low, high = curvature[usable].detach().double().to(device).unbind(-1)
            inf = float("inf")
            numbers += [low.nan_to_num(inf, inf, -inf).amin(), high.nan_to_num(-inf, inf).amax()]
        error = result.diagnostics.error_estimate
        if error is not None:
            numbers.append(_column(error[usable], device).median())
        values = torch.stack(numbers).tolist()
        found = dict(zip(columns, values, strict=False))
        median = None if error is None else values.pop()
        ends = values[len(columns) + 1 :]
        counts: dict[str, int] = {}
        for status in result.status:
            counts[status.name] = counts.get(status.name, 0) + 1
        return cls(
            step=step,
            outer_value=found["outer_value"],
            inner_residual=found["inner_residual"],
            linear_residual=found.get("linear_residual"),
            gradient_norm=values[len(columns)],
            tasks=len(result.status),
            failed=len(result.diagnostics.failed),
            status=counts,
            seconds=seconds,
            metrics={key: found[f"metrics.{key}"] for key in result.metrics},
            curvature=(ends[0], ends[1]) if ends and ends[0] <= ends[1] else None,
            error_estimate=median,
        )


def _column(values: Tensor, device: torch.device) -> Tensor:
    return values.detach().double().to(device)
