"""Keeps pages and the search index light: every reader is sent both."""

import json
import re
from pathlib import Path
from typing import Any

# Inside <pre> every blank counts.
PART = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL)
BLANK = re.compile(r"\s*\n\s*|[ \t]{2,}")

CODE = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")
# Of an entry of the reference its name and what it is are found; of a card, all but what the
# reference says too.
LISTS = re.compile(r"(?:<p>)?(?:Parameters|Attributes|Methods|Raises|Returns|Yields|Example):")
REPEATED = re.compile(r"^catalogue/.*#(?:arguments|one-hypergradient|on-every-problem|every-meth)")


# What explains comes before what mentions.
BOOST = {"concepts": 4.0, "catalogue": 2.0, "explanations/peers": 0.3, "tutorials/coming": 0.3}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Order the answers of the search."""
    for start, boost in BOOST.items():
        if page.file.src_uri.startswith(start):
            page.meta.setdefault("search", {})["boost"] = boost
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Leave out what mkdocstrings indents by."""
    parts = PART.split(content)
    parts[::2] = [BLANK.sub(lambda m: "\n" if "\n" in m[0] else " ", part) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config: Any, **_: Any) -> None:
    """Leave code, lists of arguments and what stands elsewhere out of the search index."""
    path = Path(config["site_dir"]) / "search" / "search_index.json"
    index = json.loads(path.read_text("utf-8"))
    docs = [entry for entry in index["docs"] if not REPEATED.match(entry["location"])]
    for entry in docs:
        text = CODE.sub(" ", entry["text"])
        if entry["location"].startswith("api/"):
            text = LISTS.split(text)[0]
        entry["text"] = " ".join(TAG.sub(" ", text).split())
    index["docs"] = docs
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), "utf-8")
