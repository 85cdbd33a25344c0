"""Adds the source code to the site, and to every entry of the reference a link to its lines."""

import contextlib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parents[2]
FOLDERS = ("bilevel", "solvers", "problems", "experiments")
HEADING = re.compile(r'<(?P<tag>h\d) id="(?P<name>bilevel\.[\w.]+)" class="doc doc-heading">')

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - bilevel</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}assets/source.css">
</head>
<body>
<header><a href="{up}">bilevel</a> / <h1>{name}</h1></header>
<main tabindex="0">{code}</main>
</body>
</html>
"""


def on_post_build(config: Any, **_: Any) -> None:
    """Write a page for every module: plain, since it is only read from a link to its line."""
    site = Path(config["site_dir"])
    formatter = HtmlFormatter(linespans="line")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            target = site / "source" / f"{name.removesuffix('.py')}.html"
            target.parent.mkdir(parents=True, exist_ok=True)
            code = highlight(path.read_text("utf-8"), PythonLexer(), formatter)
            up = "../" * len(target.relative_to(site).parent.parts)
            target.write_text(PAGE.format(name=name, up=up, code=code), "utf-8")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    rules = (ROOT / "docs" / "assets" / "source.css").read_text("utf-8")
    css = f"{rules}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (site / "assets" / "source.css").write_text(css, "utf-8")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Link the headings of the reference to the lines that they document."""
    up = "../" * page.url.count("/")

    def linked(match: re.Match[str]) -> str:
        place = _place(match["name"])
        if place is None:
            return match[0]
        path, line = place
        return (
            f'{match[0]}<a class="source" href="{up}source/{path}.html#line-{line}" '
            f'aria-label="Source of {match["name"]}">source</a>'
        )

    return HEADING.sub(linked, content)


def _located(name: str) -> Any:
    """The thing of that name; a module goes before a function that hides it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            thing: Any = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                thing = inspect.getattr_static(thing, part, None)
            return thing
    return None


def _place(name: str) -> tuple[str, int] | None:
    """The page of a thing's source, and its first line; None where it is no class or function."""
    thing = _located(name)
    if isinstance(thing, property):
        thing = thing.fget
    thing = inspect.unwrap(getattr(thing, "__func__", thing))
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return None
    _, *parts = thing.__module__.split(".")
    if not parts or parts[0] not in FOLDERS:
        parts = ["bilevel", *parts]
    path = "/".join(parts)
    if (ROOT / path).is_dir():
        path += "/__init__"
    return path, inspect.getsourcelines(thing)[1]
