"""Fills pages with what the benchmarks found, so that no figure is typed by hand."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from bilevel.experiments import REPRODUCTIONS

DIRECTIVE = re.compile(
    r"\{\{ (?P<kind>value|source|picture|table|checks) (?P<name>[\w-]+)(?P<rest>[^}]*) \}\}"
)

_LONG = 30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what the benchmarks found: values and pictures, and all tables of the results page.

    ``{{ value NAME METRIC [KEY=TEXT ...] [as FORMAT] }}`` becomes one number of a results file,
    ``{{ source NAME }}`` its command, commit and machine, ``{{ picture NAME TEXT }}`` its picture
    with that text as description. Of a reproduction, ``{{ table NAME }}`` is its table beside the
    published numbers, and ``{{ checks NAME }}`` the claims that were checked.

    What `bilevel reproduce` has not yet written says "not measured".

    Raises:
        ValueError: A directive names no number, or several.
        FileNotFoundError: There is no such result, and no command that writes it.
    """
    markdown = DIRECTIVE.sub(lambda match: _filled(match, page), markdown)
    if page.file.src_uri != "results.md":
        return markdown
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        return markdown + "\nNo result has been recorded yet.\n"
    return markdown + "".join(_section(json.loads(path.read_text())) for path in files)


def on_post_build(config: Any, **_: Any) -> None:
    """Copy the pictures of the results page."""
    for picture in RESULTS.glob("*.png"):
        target = Path(config["site_dir"]) / "results" / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, target)


def _filled(match: re.Match[str], page: Any) -> str:
    kind, name, rest = match["kind"], match["name"], match["rest"].strip()
    path = RESULTS / f"{name}.json"
    if name in REPRODUCTIONS and not path.exists():
        return "not measured" if kind in ("value", "table") else ""
    if kind == "picture":
        if not path.with_suffix(".png").exists():
            raise FileNotFoundError(f"{page.file.src_uri}: there is no picture {name}.png")
        up = "../" * page.url.count("/")
        return f'<img src="{up}results/{name}.png" alt="{html.escape(rest)}">'
    result = json.loads(path.read_text())
    if kind == "source":
        return _source(result)
    if kind == "table":
        return _table(result["table"])
    if kind == "checks":
        return "\n".join(_check(one) for one in result["checks"])
    wanted, _, form = rest.partition(" as ")
    metric, *pairs = wanted.split(" ")
    settings = dict(pair.split("=", 1) for pair in pairs)
    rows = [
        row
        for row in result["rows"]
        if row["metric"] == metric
        and all(str(row["setting"].get(key)) == text for key, text in settings.items())
    ]
    if len(rows) != 1:
        raise ValueError(f"{page.file.src_uri}: {match[0]} stands for {len(rows)} numbers")
    return format(rows[0]["value"], form or ",.4g")


def _source(result: dict[str, Any]) -> str:
    seeds = f", seeds {', '.join(map(str, result['seeds']))}" if result["seeds"] else ""
    return (
        f"`{result['command']}`, commit {result['commit']}, {result['date']}, {result['machine']}, "
        f"device {result['device']}{seeds}."
    )


def _table(table: dict[str, Any]) -> str:
    lines = [table["head"], ["---"] + ["---:"] * (len(table["head"]) - 1)]
    for line in table["body"]:
        # A row of published numbers belongs to the row above it.
        published = line[0].startswith(" ")
        lines.append([f"*{cell.strip()}*" if published and cell else cell for cell in line])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _check(check: dict[str, Any]) -> str:
    mark = "yes" if check["ok"] else "**no**"
    return f"- {mark}: {check['claim']} ({check['found']})"


def _section(result: dict[str, Any]) -> str:
    settings = list(dict.fromkeys(key for row in result["rows"] for key in row["setting"]))
    lines = [f"\n## {result['name']}\n", _source(result) + "\n"]
    table = [
        "| " + " | ".join([*settings, "metric", "value", "reference"]) + " |",
        "|" + "---|" * (len(settings) + 3),
    ]
    for row in result["rows"]:
        cells = [str(row["setting"].get(key, "")) for key in settings]
        value = f"{row['value']:,.4g}" if isinstance(row["value"], float) else f"{row['value']:,}"
        if "ci95" in row:
            value += f" ± {row['ci95']:.2g}"
        reference = row.get("reference", {})
        known = f"{reference['value']} ({reference['source']})" if reference else ""
        table.append("| " + " | ".join([*cells, row["metric"], value, known]) + " |")
    if len(table) > _LONG:
        # Folded away: the picture says more.
        table = ['??? note "All numbers"', "", *(f"    {line}" for line in table), ""]
    lines += table
    if (RESULTS / f"{result['name']}.png").exists():
        picture = f"{result['name']}.png"
        lines.append(f'\n<img src="{picture}" alt="{result["name"]}: the table above, drawn">\n')
    return "\n".join(lines) + "\n"
