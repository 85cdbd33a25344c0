"""Tables of Markdown, as the hooks write them."""

from collections.abc import Container, Sequence

__all__ = ["table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[str] = ()) -> str:
    """A table; the columns whose head is in ``right`` hold numbers."""
    rule = ["---:" if cell in right else "---" for cell in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])
