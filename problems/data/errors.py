"""The error of files that cannot be read as the data set they should be."""

from __future__ import annotations

from bilevel.errors import BilevelError

__all__ = ["DataError"]


class DataError(BilevelError, ValueError):
    """A data file is missing, broken or hostile; the message names it, the finding and the cure."""
