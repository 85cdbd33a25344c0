"""Fills pages with what the benchmarks found, so that no figure is typed by hand."""

import html
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from tables import table

DIRECTIVE = re.compile(
    r"\{\{ (?P<kind>value|source|picture|table|checks|results?) (?P<name>[\w-]+)"
    r"(?P<rest>[^}]*) \}\}"
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

# Rows of a table that is folded, and of one that is left to its file.
_LONG, _TOO_LONG = 30, 200


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what the benchmarks found.

    ``{{ value NAME METRIC [KEY=TEXT ...] [as FORMAT] }}`` becomes one number of a results file,
    ``{{ source NAME }}`` its command, commit and machine, ``{{ picture NAME TEXT }}`` its picture
    with that text as description. Of a reproduction, ``{{ table NAME }}`` is its table beside the
    published numbers, and ``{{ checks NAME }}`` the claims that were checked.
    ``{{ result NAME TITLE }}`` is a section with all numbers of a file, ``{{ results all }}`` a
    table of all files.

    Raises:
        ValueError: A directive names no number, or several.
        FileNotFoundError: There is no such result.
    """
    return DIRECTIVE.sub(lambda match: _filled(match, page), markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Keep tables of results out of the search."""
    if not page.file.src_uri.startswith("results/"):
        return content
    return content.replace("<table>", "<table data-search-exclude>")


def on_post_build(config: Any, **_: Any) -> None:
    """Copy the pictures and the files.

    Raises:
        ValueError: A results file stands on no page, or on two.
    """
    target = Path(config["site_dir"]) / "results"
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".png", ".json"):
            shutil.copyfile(path, target / path.name)
    pages = "".join(p.read_text("utf-8") for p in (Path(config["docs_dir"]) / "results").glob("*"))
    for path in RESULTS.glob("*.json"):
        shown = pages.count(f"{{{{ result {path.stem} ")
        if shown != 1:
            raise ValueError(f"{path.name} stands {shown} times on the pages of docs/results")


def _filled(match: re.Match[str], page: Any) -> str:
    kind, name, rest = match["kind"], match["name"], match["rest"].strip()
    if kind == "results":
        return _overview()
    path = RESULTS / f"{name}.json"
    if kind == "picture":
        if not path.with_suffix(".png").exists():
            raise FileNotFoundError(f"{page.file.src_uri}: there is no picture {name}.png")
        up = "../" * page.url.count("/")
        return _picture(f"{up}results/{name}.png", rest)
    result = json.loads(path.read_text())
    if kind == "source":
        return _source(result)
    if kind == "result":
        return _section(result, rest, page)
    if kind == "table":
        return _beside_published(result["table"])
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


def _beside_published(given: dict[str, Any]) -> str:
    rows = []
    for line in given["body"]:
        # A row of published numbers belongs to the row above it.
        published = line[0].startswith(" ")
        rows.append([f"*{cell.strip()}*" if published and cell else cell for cell in line])
    return table(given["head"], rows, right=given["head"][1:])


def _check(check: dict[str, Any]) -> str:
    mark = "yes" if check["ok"] else "**no**"
    return f"- {mark}: {check['claim']} ({check['found']})"


def _picture(path: str, alt: str) -> str:
    """A picture that opens in its full size."""
    return f'<a href="{path}"><img src="{path}" alt="{html.escape(alt)}"></a>'


def _overview() -> str:
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        one = json.loads(path.read_text())
        link = f'<a href="{path.name}">{path.stem}</a>'
        facts = [f"{len(one['rows']):,}", one["date"], one["commit"], f"`{one['command']}`"]
        rows.append([link, *facts])
    head = ["File", "Numbers", "Measured on", "Commit", "Command"]
    return table(head, rows, right=["Numbers"])


def _section(result: dict[str, Any], title: str, page: Any) -> str:
    name, rows = result["name"], result["rows"]
    up = "../" * page.url.count("/")
    data = f'All {len(rows):,} numbers: <a href="{up}results/{name}.json">{name}.json</a>.'
    lines = [f"## {title}\n", _source(result) + "\n", data + "\n"]
    picture = RESULTS / f"{name}.png"
    if picture.exists():
        alt = f"{title}: the numbers of {name}.json, drawn"
        lines.append(_picture(f"{up}results/{name}.png", alt) + "\n")
    if len(rows) <= _TOO_LONG:
        lines.append(_numbers(rows))
    return "\n".join(lines)


def _numbers(rows: list[dict[str, Any]]) -> str:
    settings = list(dict.fromkeys(key for row in rows for key in row["setting"]))
    found = {key: {str(row["setting"].get(key, "")) for row in rows} for key in settings}
    # What never changes is said once, and leaves room for what does.
    same = [f"{key} {values.pop()}" for key, values in found.items() if len(values) == 1]
    settings = [key for key, values in found.items() if values]
    head = [*settings, "metric", "value", "reference"]
    body = []
    for row in rows:
        cells = [str(row["setting"].get(key, "")) for key in settings]
        value = f"{row['value']:,.4g}" if isinstance(row["value"], float) else f"{row['value']:,}"
        if "ci95" in row:
            value += f" ± {row['ci95']:.2g}"
        reference = row.get("reference", {})
        known = f"{reference['value']} ({reference['source']})" if reference else ""
        body.append([*cells, row["metric"], value, known])
    if not any(line[-1] for line in body):
        head, body = head[:-1], [line[:-1] for line in body]
    written = f"In all rows: {', '.join(same)}.\n\n" if same else ""
    written += table(head, body, right=["value"])
    if len(body) > _LONG:
        # Folded away: the picture says more.
        return '??? note "The numbers"\n\n' + textwrap.indent(written, "    ") + "\n"
    return written
