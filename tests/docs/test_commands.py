"""Every command that is shown exists, and takes the options that it is shown with."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *```(.*)\n(?:.*\n)*?^ *```$", flags=re.MULTILINE)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def fences(page):
    """Pairs of language and lines."""
    for block in FENCE.finditer(page.read_text("utf-8")):
        yield block[1], block[0].splitlines()[1:-1]


def commands():
    for page in PAGES:
        for language, lines in fences(page):
            if language.split(" ")[0] in ("console", "sh"):
                for line in lines:
                    text = re.split(r"\s#\s", line.strip().removeprefix("$ "))[0].strip()
                    if text.startswith(("bilevel ", "python benchmarks/", "make ")):
                        where = page.relative_to(ROOT).as_posix()
                        yield pytest.param(text, id=f"{where}: {text}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_is_run_or_marked(page):
    """Python is run, commands are parsed, the rest is text; other libraries' Python has a title."""
    python = "python" if page.stem != "coming_from" else r'python( title=".+")?'
    known = re.compile(python + r'|text( title=".+")?|console|sh|bibtex|toml|yaml')
    for language, lines in fences(page):
        assert known.fullmatch(language), (language, lines[:2])


@pytest.mark.parametrize("text", list(commands()))
def test_command_exists(text, capsys):
    words = shlex.split(text)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text("utf-8")
        shared = (ROOT / "benchmarks" / "arguments.py").read_text("utf-8")
        for word in words[2:]:
            if word.startswith("--"):
                assert f'"{word}"' in source + shared
    else:
        import typer

        from bilevel.cli.app import app

        command = typer.main.get_command(app)
        arguments = words[1:]
        context = command.make_context("bilevel", arguments)
        while hasattr(command, "resolve_command"):
            rest = [*context._protected_args, *context.args]
            name, command, arguments = command.resolve_command(context, rest)
            context = command.make_context(name, arguments, parent=context)
