"""Turns every script of the documentation into a page, with what it printed and drew."""

from typing import Any

from mkdocs.structure.files import File, Files
from script import DOCS, Tutorial, scripts

_RUN = """

---

*This page is a script: [download it]({name}). The tests run it{where}, and compare what it prints
with what stands here.*
"""
_WHERE = " wherever the environment variable `BILEVEL_DATA` names the folder of its real data"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each script; the script itself is there to be downloaded.

    Raises:
        ValueError: A script changed after it was recorded.
    """
    for path in scripts():
        tutorial = Tutorial(path)
        end = _RUN.format(name=path.name, where=_WHERE if tutorial.needs_data else "")
        page = path.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=tutorial.markdown() + end))
    return files
