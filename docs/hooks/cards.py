"""Makes a page of everything that is registered, from its docstrings, its example and its results.

The docstring of the module is the card: what the thing computes, and who published it. The class
docstring explains the arguments. The piece of code is run when the site is built, so that the page
shows what it prints; errors and costs come from ``benchmarks/results/line-up.json``.
"""

import contextlib
import inspect
import io
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files
from tables import table

import bilevel.problems
import bilevel.solvers
from bilevel import Structure
from bilevel.registry import (
    INNER_SOLVERS,
    LINEAR_SOLVERS,
    METHODS,
    PRECONDITIONERS,
    PROBLEMS,
    Registry,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

KINDS = {
    "methods": (METHODS, "Hypergradient methods", "concepts/hypergradients.md"),
    "inner-solvers": (INNER_SOLVERS, "Inner solvers", "concepts/inner-solvers.md"),
    "linear-solvers": (LINEAR_SOLVERS, "Linear solvers", "concepts/linear-solvers.md"),
    "preconditioners": (
        PRECONDITIONERS,
        "Preconditioners",
        "concepts/linear-solvers.md#preconditioners",
    ),
    "problems": (PROBLEMS, "Problems", "concepts/problems.md"),
}

STRUCTURES = {
    Structure.GENERAL: "any regular matrix",
    Structure.SYMMETRIC: "symmetric",
    Structure.POSITIVE_DEFINITE: "symmetric positive definite",
}

# Where a class is not shown by ``Class()``, on ridge regression, with the example's inner solver.
EXAMPLES = {
    "BacktrackingDescent": {"call": "BacktrackingDescent(lr=1.0, max_steps=200)"},
    "ClosedForm": {
        "call": "ClosedForm(solution)",
        "before": """
            def solution(outer, batch):
                rows, targets = batch
                hessian = rows.T @ rows / len(rows) + outer.exp().diag()
                return torch.linalg.solve(hessian, rows.T @ targets / len(rows))
            """,
    },
    "FirstOrder": {"problem": "FewShot"},
    "GradientDescent": {"call": "GradientDescent(lr=1 / example.lipschitz, max_steps=200)"},
    "Implicit": {"call": "Implicit(CG())"},
    "ProximalGradient": {"call": "ProximalGradient(lr=0.3, max_steps=400)"},
    "SecantPreconditioner": {"solver": "LBFGS()"},
    "TorchOptimizer": {"call": "TorchOptimizer(torch.optim.Adam, lr=0.05, max_steps=400)"},
}

NUMBERS = ("Error", "Gradients", "Products")

HYPERGRADIENT = """
result = hypergradient(
    example.problem,
    example.outer,
    example.task,
    inner_solver={solver},
    method={method},
)
print(result)
"""


def on_config(config: Any, **_: Any) -> Any:
    """Put the pages into the navigation, below the page that names them all."""
    catalogue = next(one["Catalogue"] for one in config.nav if "Catalogue" in one)
    catalogue += [
        {title: [{registry[n].__name__: f"catalogue/{folder}/{n}.md"} for n in registry]}
        for folder, (registry, title, _) in KINDS.items()
    ]
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages."""
    line_up = json.loads((RESULTS / "line-up.json").read_text())
    files.append(File.generated(config, "catalogue/index.md", content=_index()))
    for folder, (registry, _, guide) in KINDS.items():
        for name in registry:
            page = f"catalogue/{folder}/{name}.md"
            content = _page(folder, registry, name, guide, line_up)
            files.append(File.generated(config, page, content=content))
    return files


def _index() -> str:
    parts = [
        "# Catalogue\n\nAll that is registered. A name goes into the command line "
        "(`bilevel check ridge --method cg`), a class into a program; choose one of each kind, and "
        "every other choice stays as it is."
    ]
    for folder, (registry, title, guide) in KINDS.items():
        parts.append(f"## {title}\n\nHow to choose: [the guide](../{guide}).")
        rows = [
            [f"`{n}`", f"[`{registry[n].__name__}`]({folder}/{n}.md)", registry.summary(n)]
            for n in registry
        ]
        parts.append(table(["Name", "Class", "What it is"], rows))
    return "\n\n".join(parts) + "\n"


def _page(
    folder: str, registry: Registry[Any], name: str, guide: str, line_up: dict[str, Any]
) -> str:
    cls = registry[name]
    module = sys.modules[cls.__module__]
    lead, _, card = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    facts = _facts(folder, name, cls, guide)
    parts = [
        f"# {cls.__name__}",
        registry.summary(name),
        table(facts[0], facts[1:]),
        "## What it computes" if folder != "problems" else "## The problem",
        lead,
        card,
        _arguments(cls),
        "## One hypergradient",
        _example(folder, cls),
    ]
    if folder == "methods":
        parts.append(_method_results(cls, line_up))
    if folder == "problems":
        parts.append(_problem_results(name, line_up))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(folder: str, name: str, cls: type[Any], guide: str) -> list[tuple[str, str]]:
    package = "problems" if folder == "problems" else "solvers"
    facts = [
        ("Name", f"`{name}`"),
        ("Import", f"`from bilevel.{package} import {cls.__name__}`"),
        ("Reference", f"[`{cls.__name__}`][bilevel.{package}.{cls.__name__}]"),
        ("Guide", f"[{KINDS[folder][1]}](../../{guide})"),
    ]
    if folder == "linear-solvers":
        needs = cls.needs if isinstance(cls.needs, Structure) else cls().needs
        facts.append(("Asks of the matrix", STRUCTURES[needs]))
    if folder == "inner-solvers":
        can = "yes" if cls.differentiable else "no: implicit methods only"
        facts.append(("Can be unrolled", can))
    if folder == "problems":
        example = cls.example()
        known = "by formula" if example.gradient is not None else "by dense algebra"
        facts += [
            ("Inner Jacobian", STRUCTURES[example.problem.structure]),
            ("Its example", f"{example.note}; condition number at most {example.condition:.0f}"),
            ("Hypergradient known", known),
        ]
    return facts


def _arguments(cls: type[Any]) -> str:
    """What stands in the class docstring after its first line, arguments as a list."""
    parameters = inspect.signature(cls).parameters
    described: dict[str, str] = {}
    prose = []
    for one in cls.__mro__:
        if not (one.__module__.startswith("bilevel") and one.__doc__):
            continue
        for section in griffe.Docstring(inspect.cleandoc(one.__doc__), parser="google").parse():
            if section.kind is griffe.DocstringSectionKind.parameters:
                for argument in section.value:
                    described.setdefault(argument.name, argument.description)
            elif section.kind is griffe.DocstringSectionKind.text and one is cls:
                prose.append(section.value)
    rest = "\n\n".join(prose).partition("\n\n")[2]
    lines = []
    for name, parameter in parameters.items():
        if name in described:
            default = parameter.default
            shown = "" if default is inspect.Parameter.empty else f" (default `{default!r}`)"
            text = " ".join(described[name].split())
            lines.append(f"- `{name}`{shown if '<factory>' not in shown else ''}: {text}")
    heading = ["## Arguments", "\n".join(lines)] if lines else []
    return "\n\n".join([*([rest] if rest else []), *heading])


def _example(folder: str, cls: type[Any]) -> str:
    """A piece of code, and what it prints."""
    shown = EXAMPLES.get(cls.__name__, {})
    call = shown.get("call", f"{cls.__name__}()")
    problem = shown.get("problem", cls.__name__ if folder == "problems" else "Ridge")
    structure = getattr(bilevel.problems, problem).example().problem.structure
    general = not structure.satisfies(Structure.SYMMETRIC)
    method = {
        "methods": call,
        "linear-solvers": f"Implicit({call})",
        "preconditioners": f"ImplicitCG(preconditioner={call})",
    }.get(folder, "Implicit(GMRES())" if general else "ImplicitCG()")
    solver = call if folder == "inner-solvers" else shown.get("solver", "example.inner_solver")
    before = textwrap.dedent(shown.get("before", ""))
    body = before + HYPERGRADIENT.format(method=method, solver=solver)
    words = re.findall(r"\w+", f"{method} {solver}")
    used = sorted(set(words) & set(bilevel.solvers.__all__), key=str.lower)
    imports = ["import torch"] if "torch." in body else []
    imports += [
        "from bilevel import hypergradient",
        f"from bilevel.problems import {problem}",
        f"from bilevel.solvers import {', '.join(used)}",
    ]
    code = "\n".join(imports) + f"\n\nexample = {problem}.example()\n" + body
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, f"<card of {cls.__name__}>", "exec"), {"__name__": "__main__"})
    return f'```python\n{code.strip()}\n```\n\n```text title="Output"\n{printed.getvalue()}```'


def _method_results(cls: type[Any], line_up: dict[str, Any]) -> str:
    rows = [row for row in line_up["rows"] if row["setting"]["call"].startswith(cls.__name__ + "(")]
    head = ["Problem", "Settings", "Error", "Gradients", "Products", "Status"]
    lines, last = [], ""
    for row in _merged(rows):
        problem = row["problem"]
        shown = f"[{problem}](../problems/{problem}.md)" if problem != last else ""
        lines.append([shown, f"`{row['call']}`", *_cells(row)])
        last = problem
    return _section("On every problem", head, lines)


def _problem_results(name: str, line_up: dict[str, Any]) -> str:
    rows = [row for row in line_up["rows"] if row["setting"]["problem"] == name]
    head = ["Settings", "Error", "Gradients", "Products", "Status"]
    lines = [[f"`{row['call']}`", *_cells(row)] for row in _merged(rows)]
    alt = f"Relative error of each method on {name}, against its cost and against its memory."
    picture = f"\n\n{{{{ picture line-up-{name} {alt} }}}}"
    return _section("Every method on it", head, lines) + picture


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict for each problem and method, with all its metrics."""
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        setting = row["setting"]
        one = out.setdefault((setting["problem"], setting["call"]), {})
        one.update(setting)
        one[row["metric"]] = row["value"]
    return list(out.values())


def _cells(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return ["refused", "", "", row["reason"]]
    return [f"{row['error']:.1e}", str(row["gradients"]), str(row["products"]), row["status"]]


def _section(title: str, head: list[str], rows: list[list[str]]) -> str:
    return "\n\n".join(
        [
            f"## {title}",
            "After 50 steps of gradient descent on the inner problem, whose error is part of the "
            "error here: relative, and true, against dense float64 algebra at the solved inner "
            "problem. `BUDGET`: the steps were all taken, and no tolerance was asked for.",
            table(head, rows, right=["Error", "Gradients", "Products"])
            if rows
            else "Not measured.",
            "{{ source line-up }}",
        ]
    )
