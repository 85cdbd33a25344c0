r"""Does the implicit gradient help here? Learners that differ in the hypergradient alone.

The theorem of iMAML asks for $H + \lambda I$ to be positive definite at the inner solution. On the
paper's network (ReLU, batch norm on the statistics of the batch) it often is not. Here the
curvature that training meets is recorded at every meta-step, and every 100 meta-steps two tasks are
looked at closely; see `bilevel.experiments.few_shot.probe`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from bilevel.run_folder import METRICS, PROBES, read_metrics

from .accuracy_table import AccuracyTable
from .cells import Cell, Entry
from .few_shot import LEARNERS
from .reproduction import Check, Options, Table, percent
from .results import Row

__all__ = ["ImamlMethods"]

_TASKS: dict[str, dict[str, Any]] = {
    "5w1s": {"ways": 5, "inner_steps": 16, "tasks": 8, "steps": 300},
    "20w1s": {
        "ways": 20,
        "inner_steps": 25,
        "queries": 5,
        "tasks": 4,
        "steps": 500,
        "eval_tasks": 300,
    },
}
_FIRST_ORDER = {"imaml-no-norm": "fomaml-no-norm"}
_CLOSE = 1e-2


class ImamlMethods(AccuracyTable):
    """Omniglot with half the channels; `quick` takes 60 meta-steps on glyphs or Omniglot."""

    name = "imaml-methods"
    title = "iMAML: does the implicit gradient help?"
    source = "no published table; Omniglot, 32 channels"
    data = "omniglot"
    tasks = _TASKS
    learners = (
        "fomaml-regularized",
        "fomaml-weaker",
        "imaml-released",
        "imaml-paper",
        "imaml",
        "imaml-weaker",
        "imaml-estimated",
        "imaml-damped",
        "imaml-gauss-newton",
        "imaml-learned",
        "imaml-layers",
        "imaml-scheduled",
        "imaml-smooth",
        "imaml-hessian-free",
        "fomaml-no-norm",
        "imaml-no-norm",
    )

    def base(self, options: Options) -> dict[str, Any]:
        """One shot, one λ for all that name none, a probe every 100 meta-steps."""
        common: dict[str, Any] = {"data": "omniglot", "channels": 32, "strength": 0.2}
        common |= {"shots": 1, "eval_queries": 1}
        if options.quick and options.root is None:
            common["data"] = "glyphs"
        if options.quick:
            return {**common, "steps": 60, "tasks": 4, "eval_tasks": 100, "probe_every": 20}
        return {**common, "probe_every": 100}

    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """Where the inner problem is solved, the implicit gradient meets finite differences."""
        found = []
        for (row, column), entry in entries.items():
            if row not in _FIRST_ORDER:
                continue
            gaps = [
                one["difference_error"]
                for cell in entry.cells
                for one in _probes(cell)
                if one.get("difference_error") is not None
            ]
            if gaps:
                middle = statistics.median(gaps)
                claim = f"{row} {column}: the implicit gradient meets central differences"
                found.append(
                    Check(claim, middle <= _CLOSE, f"median gap {middle:.1e} in {len(gaps)} looks")
                )
        return found

    def _rows(self, entries: Mapping[tuple[str, str], Entry]) -> Iterator[Row]:
        yield from super()._rows(entries)
        for (row, column), entry in entries.items():
            for name, value in _looks(entry).items():
                if value is not None:
                    yield Row({"learner": row, "task": column}, name, value)

    def _table(self, entries: Mapping[tuple[str, str], Entry], columns: tuple[str, ...]) -> Table:
        head = (
            "learner",
            "accuracy, %",
            "indefinite",
            "residual",
            "cosine",
            "solved",
            "error",
            "estimate",
            "differences",
        )
        body = []
        for column in columns:
            for row in self.rows:
                if (row, column) not in entries:
                    continue
                entry = entries[row, column]
                looks = _looks(entry)
                body.append(
                    (
                        f"{column} {LEARNERS[row].title}",
                        percent(entry.mean, entry.interval),
                        _text(looks["indefinite_share"], "{:.1%}"),
                        _text(looks["relative_residual"], "{:.2f}"),
                        _text(looks["cosine_with_first_order"], "{:.3f}"),
                        _text(looks["solved_share"], "{:.0%}"),
                        _text(looks["error"], "{:.3f}"),
                        _estimated(looks),
                        _text(looks["difference_error"], "{:.0e}"),
                    )
                )
        return Table(head, tuple(body))


def _looks(entry: Entry) -> dict[str, float | None]:
    """What training met, and the medians of what the probes found."""
    status: dict[str, int] = {}
    for cell in entry.cells:
        for name, count in cell.result["status"].items():
            status[name] = status.get(name, 0) + count
    probes = [one for cell in entry.cells for one in _probes(cell)]
    solved = [one for one in probes if one.get("exact_status") is not None]
    estimates = [one for cell in entry.cells for one in _estimates(cell)]
    known = [one for one in estimates if one is not None]

    def median(name: str, among: list[dict[str, Any]]) -> float | None:
        values = [one[name] for one in among if one.get(name) is not None]
        return statistics.median(values) if values else None

    total = sum(status.values())
    return {
        "indefinite_share": status.get("INDEFINITE", 0) / total if total else None,
        "relative_residual": median("relative_residual", probes),
        "curvature": median("curvature", probes),
        "cosine_with_first_order": median("cosine_with_first_order", probes),
        "error_estimate": statistics.median(known) if known else None,
        "estimated_share": len(known) / len(estimates) if estimates else None,
        "solved_share": len(solved) / len(probes) if probes else None,
        "cosine_with_exact": median("cosine_with_exact", solved),
        "error": median("error", solved),
        "difference_error": median("difference_error", solved),
    }


def _estimates(cell: Cell) -> list[float | None]:
    """What was estimated: at each meta-step where the learner asks for it, else in each look.

    None where there is no estimate: H + λI is indefinite, or the point too far from a solution.
    """
    if cell.settings["method"] != "cg":
        return []
    if cell.settings["method_options"].get("error_estimate"):
        return [one["error_estimate"] for one in read_metrics(cell.folder / METRICS)]
    return [one["error_estimate"] for one in _probes(cell)]


def _estimated(looks: Mapping[str, float | None]) -> str:
    """The estimate, and in what share of the cases there was one."""
    share = looks["estimated_share"]
    if share is None:
        return "–"
    if looks["error_estimate"] is None:
        return "never"
    return f"{looks['error_estimate']:.3f} in {share:.0%}"


def _probes(cell: Cell) -> list[dict[str, Any]]:
    path = cell.folder / PROBES
    return read_metrics(path) if path.is_file() else []


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
