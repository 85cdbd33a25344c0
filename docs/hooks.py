"""What happens to pages when the site is built.

Equations become MathML, so that no page needs a script for them; the results page is filled from
the files that the benchmarks wrote, so that no figure is typed by hand.
"""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the tables of `benchmarks/results/*.json` to the results page."""
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


def _section(result: dict[str, Any]) -> str:
    settings = list(dict.fromkeys(key for row in result["rows"] for key in row["setting"]))
    lines = [
        f"\n## {result['name']}\n",
        f"`{result['command']}`, commit {result['commit']}, {result['date']}, {result['machine']}, "
        f"device {result['device']}, seeds {', '.join(map(str, result['seeds']))}.\n",
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
        lines.append("| " + " | ".join([*cells, row["metric"], value, known]) + " |")
    if (RESULTS / f"{result['name']}.png").exists():
        picture = f"{result['name']}.png"
        lines.append(f'\n<img src="{picture}" alt="{result["name"]}: the table above, drawn">\n')
    return "\n".join(lines) + "\n"


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page.

    Raises:
        ValueError: An equation has a command that is not understood.
    """

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"]).replace(r"\arg\min", r"\argmin")
        result = convert(latex, display="block" if match["tag"] == "div" else "inline")
        if re.search(r"\\[a-zA-Z]", result):
            raise ValueError(f"latex2mathml does not know a command in the equation {latex!r}")
        return result

    return EQUATION.sub(mathml, content)
