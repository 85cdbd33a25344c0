"""Gives names to what the theme leaves without one, for those who have the page read to them."""

from typing import Any

NAMELESS = '<div class="md-search" data-md-component="search" role="dialog">'


def on_post_page(output: str, **_: Any) -> str:
    """Name the search.

    Raises:
        ValueError: The theme has changed.
    """
    if NAMELESS not in output:
        raise ValueError("the theme's search has another form; see docs/hooks/accessible.py")
    return output.replace(NAMELESS, NAMELESS[:-1] + ' aria-label="Search">')


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """The page for what is not found has a search, too."""
    return on_post_page(output) if template_name == "404.html" else output
