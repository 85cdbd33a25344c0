"""Road networks by the names that a user types."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bilevel.problems.data import DataError
from bilevel.problems.data.tntp import tntp
from bilevel.problems.traffic import RoadNetwork

__all__ = ["links_of", "network_of"]

_BUILT = {"braess": RoadNetwork.braess, "hearn-ramana": RoadNetwork.hearn_ramana}
_FILES = {"sioux-falls": "SiouxFalls", "anaheim": "Anaheim"}


def network_of(name: str, root: str | os.PathLike[str] | None = None) -> RoadNetwork:
    """A network by name, or from TNTP files.

    Args:
        name: braess or hearn-ramana, which are made here; sioux-falls or anaheim, or the name of
            another TNTP network, under ``root``; or the path of a folder or of a ``_net.tntp``.
        root: Folder with the data sets; default: that of the environment variable ``BILEVEL_DATA``.

    Raises:
        DataError: There are no such files, or they are malformed.
    """
    if name in _BUILT:
        return _BUILT[name]()
    if name in _FILES:
        return tntp(_FILES[name], root)
    if os.sep in name or name.endswith(".tntp") or Path(name).exists():
        return RoadNetwork.from_tntp(name)
    try:
        return tntp(name, root)
    except DataError as error:
        known = ", ".join([*_BUILT, *_FILES])
        raise DataError(
            f"`network` is '{name}', which is none of {known}, no path, and {error}"
        ) from error


def links_of(text: str, network: RoadNetwork) -> list[tuple[int, int]] | None:
    """Links from a text such as ``3-4,5-7``; None for ``all``.

    Raises:
        ValueError: The text is not of this form, or there is no such link.
    """
    if text.strip() == "all":
        return None
    links = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        if match is None:
            raise ValueError(
                f"`links` is '{text}'; write all, or links by their ends, such as 3-4,5-7"
            )
        links.append((int(match[1]), int(match[2])))
    network.numbered(links)  # says which link there is not
    return links
