"""Road networks in the TNTP format of Transportation Networks for Research.

The format is that of https://github.com/bstabler/TransportationNetworks: metadata in angle
brackets, comments after ``~``, and one link, or a few trips, between semicolons.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import DataError
from .locate import data_root

if TYPE_CHECKING:
    from ..traffic.network import RoadNetwork

__all__ = ["read_tntp", "read_tntp_flow", "tntp"]

_MAX_BYTES = 1 << 28
_MAX_ZONES = 20_000  # a trip table takes 8 · zones² bytes: 3.2 GB
_MAX_COUNT = 10**7
_META = re.compile(r"<([^<>]*)>(.*)")
_ORIGIN = re.compile(r"origin\s*(\S*)\s*", re.IGNORECASE)
_FIELDS = ("capacity", "length", "free_flow_time", "b", "power", "speed", "toll")
_COLUMNS = 10  # from, to, the fields above, type
_KEYS = {
    "NUMBER OF ZONES",
    "NUMBER OF NODES",
    "NUMBER OF LINKS",
    "FIRST THRU NODE",
    "TOTAL OD FLOW",
    "TOLL FACTOR",
    "DISTANCE FACTOR",
}


def tntp(name: str, root: str | os.PathLike[str] | None = None) -> RoadNetwork:
    """Read a network by name, from the folder of that name.

    Args:
        name: Such as "SiouxFalls", "Anaheim" or "Braess-Example".
        root: Folder that holds ``transportation/<name>/`` or ``<name>/``, or the network's own
            folder; default: that of the environment variable ``BILEVEL_DATA``.

    Returns:
        The network, with coordinates where the folder has them.

    Raises:
        DataError: There is no such folder, or a file is malformed; file and line are named.
    """
    return read_tntp(_folder(name, root))


def read_tntp(
    path: str | os.PathLike[str],
    *,
    trips: str | os.PathLike[str] | None = None,
    nodes: str | os.PathLike[str] | None = None,
) -> RoadNetwork:
    """Read ``…_net.tntp``, ``…_trips.tntp`` and, if there, the coordinates of the nodes.

    A link's toll is the file's toll times the metadata's ``TOLL FACTOR``, plus its length times
    their ``DISTANCE FACTOR``. Without the former the file's toll is taken as it stands, without the
    latter the length adds nothing.

    Args:
        path: A folder with one ``…_net.tntp``, or that file.
        trips: The trip table; default: ``…_trips.tntp`` beside the other.
        nodes: Coordinates, ``.tntp`` or ``.geojson``; default: ``…_node.tntp`` or the only
            ``.geojson`` of points beside the other, if there is one; others are ignored.

    Raises:
        DataError: A file is missing, truncated or malformed; file and line are named.
    """
    from ..traffic.network import RoadNetwork

    net = _net_file(Path(path).expanduser())
    stem = net.name.removesuffix("_net.tntp")
    trip_file = net.with_name(f"{stem}_trips.tntp") if trips is None else Path(trips).expanduser()
    found = _read_net(net)
    demand, lines = _read_trips(trip_file, found.zones)
    if nodes is None:
        coordinates = _nodes_beside(net, stem, found.nodes)
    else:
        coordinates = _read_nodes(Path(nodes).expanduser(), found.nodes)
    try:
        return RoadNetwork.from_links(
            found.links,
            demand,
            nodes=found.nodes,
            first_through=found.first_through,
            name=stem,
            coordinates=coordinates,
        )
    except ValueError as error:
        # What no line alone is to blame for: trips that no route leads to, or no trip at all.
        text = str(error)
        pair = re.search(r"trips from (\d+) to (\d+)", text)
        line = lines.get((int(pair[1]), int(pair[2]))) if pair else None
        where = f"'{trip_file}'" + (f" line {line}" if line else "")
        raise DataError(f"{where}: {text}") from error


def read_tntp_flow(path: str | os.PathLike[str], network: RoadNetwork) -> tuple[Tensor, Tensor]:
    """Read a ``…_flow.tntp``: the best-known flows of a network.

    Lines that do not begin with a number are a header, before the first row only. All rows have as
    many columns as the first, and the last ends in a newline or ';': else it may be cut off.

    Args:
        path: The file, or the folder that holds one.
        network: The network whose links it lists, in any order.

    Returns:
        Flows and costs ``[links]``, float64, in the order of the network's links.

    Raises:
        DataError: The file is missing or malformed, or lists other links; the line is named.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):
        path = _only(path, "_flow.tntp")
    table = torch.full((2, network.links), float("nan"), dtype=torch.float64)
    text = _text(path)
    first: tuple[_Line, int] | None = None
    for line in _lines(path, text):
        words = [word.strip(":") for word in line.text.replace(";", " ").split()]
        words = [word for word in words if word]
        if first is None:
            if not words or not _is_number(words[0]):
                continue  # the header, in whatever words
            first = (line, len(words))
        if len(words) < 4:
            raise line.error(f"has {len(words)} columns of the 4: from, to, volume, cost")
        if len(words) != first[1]:
            raise line.error(
                f"has {len(words)} columns, but line {first[0].number_in_file} has {first[1]}; "
                "fetch the file again"
            )
        tail, head = line.node(words[0], network.nodes), line.node(words[1], network.nodes)
        if not network.graph.has_edge(tail, head):
            raise line.error(f"has the link {tail} → {head}, which the network lacks; pass its own")
        index = network.link(tail, head)
        if not bool(table[0, index].isnan()):
            raise line.error(f"has the link {tail} → {head} for the second time; remove one")
        table[0, index] = line.number(words[2], "the volume", above=0.0)
        table[1, index] = line.number(words[3], "the cost")
    missing = table[0].isnan()
    if bool(missing.any()):
        tail, head = network.ends[int(missing.nonzero()[0])]
        raise DataError(
            f"'{path}' ends without the link {tail} → {head} and {int(missing.sum()) - 1} others; "
            "fetch the file again"
        )
    if not text.endswith("\n") and not line.text.endswith(";"):
        raise line.error(
            "does not end in a newline, so its last number may be cut off; fetch the file again, "
            "or end the line"
        )
    return table[0], table[1]


# Where the files are


def _folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    try:
        base = data_root(root)
    except OSError as error:  # such as a name that is too long
        raise DataError(f"`root` cannot be read ({error.strerror}); pass another") from error
    if not name or Path(name).name != name or name in (".", ".."):
        raise DataError(f"`name` is {_show(name)}; give a plain folder name such as 'SiouxFalls'")
    for place in (base / "transportation" / name, base / name):
        if os.path.isdir(place):
            return place
    if (base.name == name or os.path.isfile(base / f"{name}_net.tntp")) and any(
        base.glob("*_net.tntp")
    ):
        return base
    parts = [base / "transportation", base]
    known = sorted({one.parent.name for part in parts for one in part.glob("*/*_net.tntp")})
    raise DataError(
        f"`root` = '{base}' holds neither transportation/{_short(name)}/ nor {_short(name)}/; "
        "networks there: "
        f"{', '.join(known) or 'none'}"
    )


def _net_file(path: Path) -> Path:
    # Unlike Path.is_dir and Path.exists, these take a name that is too long for one of no file.
    if os.path.isdir(path):
        return _only(path, "_net.tntp")
    if not os.path.exists(path):
        raise DataError(
            f"'{_short(str(path))}' does not exist; point `path` at a folder with a …_net.tntp"
        )
    if not path.name.endswith("_net.tntp"):
        raise DataError(f"'{path}' is not named …_net.tntp; pass that file, or its folder")
    return path


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise DataError(
            f"'{folder}' holds {len(found)} files named …{suffix}; name the one that you mean"
        )
    return found[0]


def _nodes_beside(net: Path, stem: str, nodes: int) -> dict[int, tuple[float, float]] | None:
    table = net.with_name(f"{stem}_node.tntp")
    if os.path.exists(table):
        return _read_nodes(table, nodes)
    # One without points is of something else, such as the links.
    found = [(path, _geojson(path)) for path in sorted(net.parent.glob("*.geojson"))]
    found = [(path, points) for path, points in found if points]
    return _complete(*found[0], nodes) if len(found) == 1 else None


# Lines and numbers


@dataclass(frozen=True)
class _Line:
    path: Path
    number_in_file: int
    text: str

    def error(self, finding: str) -> DataError:
        return DataError(f"'{self.path}' line {self.number_in_file} {finding}")

    def number(self, word: str, what: str, *, above: float = -math.inf) -> float:
        if not _is_number(word):
            raise self.error(f"has {_show(word)} for {what}, which is no number; mend it")
        value = float(word)
        if not math.isfinite(value):
            raise self.error(f"has {_show(word)} for {what}, which is not finite; mend it")
        if value < above:
            raise self.error(f"has {_show(word)} for {what}, which is negative; mend it")
        return value

    def node(self, word: str, most: int, what: str = "node") -> int:
        if not _is_whole(word):
            raise self.error(f"has {_show(word)} for a {what}, which is no whole number; mend it")
        if not 1 <= int(word) <= most:
            raise self.error(
                f"has the {what} {int(word)}, but there are {most}; mend it, or the metadata"
            )
        return int(word)


_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.ASCII)


def _is_number(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None


def _is_whole(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 9


def _show(word: str) -> str:
    return repr(word[:40] + "…" if len(word) > 40 else word)


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:80]}…{name[-80:]}"


def _text(path: Path) -> str:
    """What the file holds, without a byte-order mark."""
    where = f"'{_short(str(path))}'"
    try:
        # Looked at before it is opened: a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{where} is a device, a pipe or a folder; name a plain file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{where} does not exist; check the path, or fetch the file") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{where} cannot be read ({why}); fetch the file again") from error
    if len(data) > _MAX_BYTES:
        raise DataError(f"{where} holds more than {_MAX_BYTES >> 20} MiB; is it the right one?")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise DataError(
            f"{where} line {line} has NUL bytes, as UTF-16 has; save the file as UTF-8, or fetch "
            "it again"
        )
    return data.decode("utf-8-sig", errors="replace")


def _lines(path: Path, text: str | None = None) -> Iterator[_Line]:
    """Lines without comments, numbered from 1; blank ones are left out."""
    text = _text(path) if text is None else text
    for number, line in enumerate(text.split("\n"), start=1):
        plain = line.split("~")[0] if not line.lstrip().startswith("<") else line
        if plain.strip():
            yield _Line(path, number, plain.strip())


@dataclass(frozen=True)
class _Metadata:
    path: Path
    values: dict[str, tuple[str, _Line]]

    def count(self, key: str, most: int = _MAX_COUNT) -> int:
        if key not in self.values:
            raise DataError(
                f"'{self.path}' has no metadata <{key}>; add the line, or fetch it again"
            )
        word, line = self.values[key]
        if not _is_whole(word) or int(word) == 0:
            raise line.error(f"has {_show(word)} for <{key}>; give a whole number from 1 to {most}")
        if int(word) > most:
            raise line.error(f"has {int(word)} for <{key}>, above the {most} that can be; mend it")
        return int(word)

    def number(self, key: str) -> float | None:
        if key not in self.values:
            return None
        word, line = self.values[key]
        return line.number(word, f"<{key}>")


def _sections(path: Path) -> tuple[_Metadata, list[_Line]]:
    """The metadata by name, and the lines after them."""
    metadata: dict[str, tuple[str, _Line]] = {}
    body: list[_Line] = []
    for line in _lines(path):
        match = _META.match(line.text)
        if match and not body:
            key = match[1].strip().upper()
            if key in metadata and key in _KEYS:
                raise line.error(
                    f"has <{key}>, as line {metadata[key][1].number_in_file} has; remove one of "
                    "the two"
                )
            metadata[key] = (match[2].split("~")[0].strip(), line)
        else:
            body.append(line)
    if not metadata and not body:
        raise DataError(f"'{path}' is empty; fetch the file again")
    if "END OF METADATA" not in metadata:
        raise DataError(f"'{path}' has no line <END OF METADATA>; is it a TNTP file, and whole?")
    return _Metadata(path, metadata), body


# The files


@dataclass(frozen=True)
class _Net:
    zones: int
    nodes: int
    first_through: int
    links: list[tuple[int, int, dict[str, float]]]


def _read_net(path: Path) -> _Net:
    metadata, body = _sections(path)
    zones, nodes = metadata.count("NUMBER OF ZONES", _MAX_ZONES), metadata.count("NUMBER OF NODES")
    count = metadata.count("NUMBER OF LINKS")
    first = metadata.count("FIRST THRU NODE") if "FIRST THRU NODE" in metadata.values else 1
    for key, value, most, name in (
        ("NUMBER OF ZONES", zones, nodes, "nodes"),
        ("FIRST THRU NODE", first, nodes + 1, "nodes + 1"),
    ):
        if value > most:
            raise metadata.values[key][1].error(
                f"has {value} for <{key}>, above the {most} {name}; mend the metadata"
            )
    factors = (metadata.number("TOLL FACTOR"), metadata.number("DISTANCE FACTOR"))
    links: list[tuple[int, int, dict[str, float]]] = []
    seen: dict[tuple[int, int], int] = {}
    for line in body:
        words = line.text.replace(";", " ").split()
        if not words:
            continue
        if len(words) < 7:
            raise line.error(
                f"has {len(words)} columns; a link has at least 7: from, to, capacity, length, "
                "free flow time, b, power"
            )
        if ";" not in line.text:
            raise line.error("does not end in ';', so it may be cut off; fetch the file again")
        if len(words) > _COLUMNS or line.text.partition(";")[2].strip(" \t;"):
            raise line.error(
                f"has {len(words)} columns where a link has at most {_COLUMNS}, all before the "
                "';'; give each link a line"
            )
        tail, head = line.node(words[0], nodes), line.node(words[1], nodes)
        if (tail, head) in seen:
            raise line.error(
                f"has the link {tail} → {head}, as line {seen[tail, head]} has; remove one of the "
                "two"
            )
        if tail == head:
            raise line.error(f"has a link from {tail} to itself; remove it")
        seen[tail, head] = line.number_in_file
        links.append((tail, head, _link(line, words, factors)))
    if len(links) != count:
        last = body[-1].number_in_file if body else 0
        raise DataError(
            f"'{path}' line {last} is the last, after {len(links)} links, but <NUMBER OF LINKS> is "
            f"{count}; fetch the file again, or mend the metadata"
        )
    return _Net(zones, nodes, first, links)


def _link(
    line: _Line, words: list[str], factors: tuple[float | None, float | None]
) -> dict[str, float]:
    names = {key: key.replace("_", " ") for key in _FIELDS}
    values = {
        key: line.number(word, f"the {names[key]}", above=-math.inf if key == "speed" else 0.0)
        for key, word in zip(_FIELDS, words[2:9], strict=False)
    }
    values.setdefault("toll", 0.0)
    values.pop("speed", None)
    if values["capacity"] == 0:
        raise line.error("has the capacity 0, by which the flow is divided; mend it")
    if 0 < values["power"] < 1:
        raise line.error(
            f"has the power {values['power']:g}, between 0 and 1, where times have no slope at "
            "flow 0; mend it"
        )
    per_toll, per_length = factors
    toll = values["toll"] * (1.0 if per_toll is None else per_toll)
    values["toll"] = toll + values["length"] * (per_length or 0.0)
    return values


def _read_trips(path: Path, zones: int) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """The trips, and the line of each pair that has some."""
    metadata, body = _sections(path)
    announced = metadata.count("NUMBER OF ZONES", _MAX_ZONES)
    if announced != zones:
        raise metadata.values["NUMBER OF ZONES"][1].error(
            f"announces {announced} zones, but the network has {zones}; pair the right two files"
        )
    demand = torch.zeros(zones, zones, dtype=torch.float64)
    lines: dict[tuple[int, int], int] = {}
    origin: int | None = None
    origins: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    last = None
    for line in body:
        last = line
        text = line.text
        match = _ORIGIN.match(text)
        if match:
            origin = line.node(match[1], zones, "zone")
            if origin in origins:
                raise line.error(f"begins the origin {origin}, as line {origins[origin]} did")
            origins[origin] = line.number_in_file
            text = text[match.end() :]
        *entries, rest = text.split(";")
        if rest.strip():
            raise line.error(
                f"ends in {_show(rest.strip())} without ';', so it may be cut off; fetch the file "
                "again"
            )
        for entry in filter(str.strip, entries):
            if origin is None:
                raise line.error("has trips before the first 'Origin'; add that line")
            head, colon, trips = entry.partition(":")
            if not colon:
                raise line.error(f"has the entry {_show(entry.strip())}, not 'destination : trips'")
            pair = (origin, line.node(head.strip(), zones, "zone"))
            if pair in seen:
                raise line.error(f"has trips {pair[0]} → {pair[1]} for the second time; remove one")
            seen.add(pair)
            number = line.number(trips.strip(), f"trips {pair[0]} → {pair[1]}", above=0.0)
            demand[pair[0] - 1, pair[1] - 1] = number
            lines[pair] = line.number_in_file
    _check_total(metadata, demand, last)
    # Trips within a zone use no link.
    return demand.fill_diagonal_(0.0), lines


def _check_total(metadata: _Metadata, demand: Tensor, last: _Line | None) -> None:
    total = metadata.number("TOTAL OD FLOW")
    found = float(demand.sum())
    if last is None:
        raise DataError(f"'{metadata.path}' holds no trip; fetch the file again")
    # The table rounds its entries, so that their sum may be off a little.
    if total is not None and abs(total - found) > 1e-3 * max(abs(total), 1.0):
        raise last.error(
            f"is the last, after {found:g} trips, but <TOTAL OD FLOW> is {total:g}; fetch the file "
            "again, or mend the metadata"
        )


def _read_nodes(path: Path, nodes: int) -> dict[int, tuple[float, float]]:
    found = _geojson(path) if path.suffix in (".geojson", ".json") else _node_table(path, nodes)
    return _complete(path, found, nodes)


def _complete(
    path: Path, found: dict[int, tuple[float, float]], nodes: int
) -> dict[int, tuple[float, float]]:
    missing = [node for node in range(1, nodes + 1) if node not in found]
    if missing:
        raise DataError(
            f"'{path}' has no coordinates of node {missing[0]} and {len(missing) - 1} others; "
            "pass `nodes` another file, or complete it"
        )
    return found


def _node_table(path: Path, nodes: int) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for line in _lines(path):
        words = line.text.replace(";", " ").split()
        if not words or not (found or words[0][0] in "0123456789"):
            continue  # the header
        if len(words) < 3:
            raise line.error(f"has {len(words)} columns of the 3: node, x, y")
        node = line.node(words[0], nodes)
        if node in found:
            raise line.error(f"has the node {node} for the second time; remove one")
        found[node] = (line.number(words[1], "x"), line.number(words[2], "y"))
    return found


def _geojson(path: Path) -> dict[int, tuple[float, float]]:
    """The points by number of node; none where the file is of something else."""
    try:
        tree = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"'{path}' line {error.lineno} is no JSON ({error.msg}); mend it"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a tree
        raise DataError(f"'{path}' cannot be read ({error}); fetch the file again") from error
    found: dict[int, tuple[float, float]] = {}
    features = tree.get("features") if isinstance(tree, dict) else None
    for number, feature in enumerate(features if isinstance(features, list) else [], start=1):
        where = f"'{path}' feature {number}"
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        if not isinstance(geometry, dict) or geometry.get("type") != "Point":
            continue
        properties = feature.get("properties")
        given = properties.get("id") if isinstance(properties, dict) else None
        node = _id(given)
        if node is None:
            raise DataError(
                f"{where} has the id {_brief(given)}, which is no number of a node; mend it, or "
                "pass `nodes` another file"
            )
        if node in found:
            raise DataError(f"{where} has the node {node} for the second time; remove one")
        place = geometry.get("coordinates")
        if not isinstance(place, list) or len(place) < 2 or not all(map(_is_finite, place[:2])):
            raise DataError(
                f"{where} has the coordinates {_brief(place)}, which are no two finite numbers; "
                "mend them"
            )
        found[node] = (float(place[0]), float(place[1]))
    return found


def _id(given: Any) -> int | None:
    """The number of a node, which some programs write as 1.0 or "1"."""
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if isinstance(given, str) and _is_whole(given):
        given = int(given)
    whole = isinstance(given, int) and not isinstance(given, bool)
    return given if whole and 1 <= given < 10**9 else None


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _brief(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "[[…"
    return text if len(text) <= 40 else text[:40] + "…"
