"""Turns every script of the documentation into a page, with what it printed and drew."""

from typing import Any

from mkdocs.structure.files import File, Files
from script import DOCS, Tutorial, scripts

_RUN = """

---

*This page is a script: [download it]({name}). The tests run it, and compare what it prints with
what stands here.{data}*
"""
_DATA = " It reads real data from the folder that `BILEVEL_DATA` names."


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each script; the script itself is there to be downloaded.

    Raises:
        ValueError: A script changed after it was recorded.
    """
    for path in scripts():
        tutorial = Tutorial(path)
        end = _RUN.format(name=path.name, data=_DATA if tutorial.needs_data else "")
        page = path.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=tutorial.markdown() + end))
    return files
