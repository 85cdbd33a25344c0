"""Check that no page of the built site loads anything from elsewhere."""

import re
import sys
from pathlib import Path

# Elements that a browser fetches by itself; a link that a reader follows is welcome.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*?\ssrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))"""
    r"""[^>]*?\shref=["']?(?:https?:)?//[^"'\s>]+""",
    re.IGNORECASE,
)


def main(site: str) -> int:
    """List every external resource; return the exit status."""
    pages = sorted(Path(site).rglob("*.html"))
    found = [f"{page}: {hit}" for page in pages for hit in LOADED.findall(page.read_text("utf-8"))]
    for line in found:
        print(line, file=sys.stderr)
    if not pages:
        print(f"{site} holds no page", file=sys.stderr)
    elif not found:
        print(f"{site}: {len(pages)} pages, nothing loaded from elsewhere")
    return int(bool(found) or not pages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
