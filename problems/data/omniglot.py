"""Omniglot: 1623 handwritten characters from 50 alphabets, drawn 20 times each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350 (2015). The official archives come from
https://github.com/brendenlake/omniglot, folder ``python``.

Archives are read in memory and never unpacked to disk. Every size is checked before anything of
that size is read or decoded.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from .array_cache import cache_folder, load_arrays, save_arrays
from .errors import DataError
from .images import ImageClasses
from .locate import data_root

__all__ = ["omniglot", "omniglot_split"]

_VERSION = 1  # raise it when the same sources shall give other images
_PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each
_DRAWINGS = 20
_SIDE = 105

_MAX_ARCHIVE = 64 << 20
_MAX_MEMBERS = 50_000
_MAX_FILE = 64 << 10
_MAX_TOTAL = 64 << 20

# What the readers raise on altered bytes. RuntimeError: encrypted, or another compression;
# ValueError: names that are no UTF-8, offsets outside the file.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    struct.error,
    zlib.error,
)
_BROKEN_PNG = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)

_DRAWING = re.compile(r"([^/]+)/(character\d\d)/(\d{4}_\d\d)\.png")
_CURE = "fetch it again from https://github.com/brendenlake/omniglot"


def omniglot(
    root: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    size: int = 28,
) -> ImageClasses:
    """All 1623 characters, sorted by name.

    The images are decoded once and kept in the cache. A cache that cannot be written gives a
    warning; one that is corrupt is built again.

    Args:
        root: Folder that holds, itself or in a folder ``omniglot`` or ``omniglot-py``,
            images_background and images_evaluation: the official zip files, or unpacked. Default:
            the folder that the environment variable ``BILEVEL_DATA`` names.
        cache: Folder for the decoded images; default: ``bilevel`` in the user's cache folder.
        size: Height and width in pixels, at most the original 105.

    Returns:
        Images ``[1623, 20, 1, size, size]`` uint8, paper 255 and ink 0, with names such as
        "Greek/character01".

    Raises:
        DataError: The files are missing, broken or not those of Omniglot.
        ImportError: Images must be decoded and pillow is not installed.
        ValueError: `size` is out of range.
    """
    if not 1 <= size <= _SIDE:
        raise ValueError(f"`size` is {size}; it must lie between 1 and {_SIDE}")
    sources = _find(data_root(root))
    folder = cache_folder() if cache is None else Path(cache).expanduser()
    path = folder / f"omniglot-{size}-{_fingerprint(sources, size)}.npz"
    arrays = load_arrays(path)
    if arrays is None:
        arrays = _decode(sources, size)
        save_arrays(path, arrays)
    return ImageClasses(
        torch.from_numpy(arrays["images"]), tuple(str(name) for name in arrays["names"])
    )


def omniglot_split(
    pool: ImageClasses, seed: int = 0, sizes: Sequence[int] = (1200, 423)
) -> tuple[ImageClasses, ...]:
    """The usual split: 1200 characters at random for meta-training, 423 for meta-testing.

    Args:
        pool: All characters.
        seed: Seed of the permutation.
        sizes: Number of characters of each part.

    Returns:
        Disjoint pools, one per entry of ``sizes``.

    Raises:
        ValueError: The sizes do not fit the pool.
    """
    return pool.split(sizes, seed)


def _find(root: Path) -> list[Path]:
    """The two sources, each an archive or a folder."""
    for base in (root, root / "omniglot", root / "omniglot-py"):
        found = [
            next((p for p in (base / f"{part}.zip", base / part) if p.exists()), None)
            for part in _PARTS
        ]
        sources = [source for source in found if source is not None]
        if len(sources) == len(_PARTS):
            return sources
        if sources:
            missing = next(part for part, p in zip(_PARTS, found, strict=True) if p is None)
            raise DataError(
                f"'{base}' holds {sources[0].name}, but neither {missing}.zip nor {missing}/; "
                "put it there"
            )
    parts = " and ".join(f"{part}.zip (or {part}/)" for part in _PARTS)
    raise DataError(
        f"`root` = '{root}' holds no {parts}, nor does a folder omniglot/ or omniglot-py/ in it; "
        "point `root` at the folder that does"
    )


def _fingerprint(sources: list[Path], size: int) -> str:
    """Another one for other content (archives), or other names, sizes and times (folders)."""
    digest = hashlib.sha256(f"{_VERSION},{size}".encode())
    for source in sources:
        if source.is_dir():
            for path in _drawings_in(source):
                status = path.stat()
                name = path.relative_to(source).as_posix()
                digest.update(f"{name},{status.st_size},{status.st_mtime_ns};".encode())
        else:
            digest.update(hashlib.sha256(_bounded(source, _MAX_ARCHIVE)).digest())
    return digest.hexdigest()[:16]


def _decode(sources: list[Path], size: int) -> dict[str, NDArray[np.generic]]:
    """Decode all drawings, sorted by character and drawing."""
    characters: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for source, expected in zip(sources, _PARTS.values(), strict=True):
        before = len(characters)
        files = _from_folder(source) if source.is_dir() else _from_archive(source)
        for name, where, content in files:
            character, drawing = name.rsplit("/", 1)
            drawings = characters.setdefault(character, {})
            if drawing in drawings:
                _fail(where, "appears a second time")
            drawings[drawing] = _pixels(where, content, size)
        if len(characters) - before != expected:
            _fail(source, f"holds {len(characters) - before} characters instead of {expected}")
    for character, drawings in characters.items():
        if len(drawings) != _DRAWINGS:
            raise DataError(
                f"'{sources[0].parent}' has {len(drawings)} drawings of {character} instead of "
                f"{_DRAWINGS}; {_CURE}"
            )
    names = sorted(characters)
    images = np.stack([np.stack([characters[n][d] for d in sorted(characters[n])]) for n in names])
    return {"images": images[:, :, None], "names": np.array(names)}


def _from_archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, place for messages, and content of each drawing in an archive."""
    try:
        with zipfile.ZipFile(BytesIO(_bounded(path, _MAX_ARCHIVE))) as archive:
            members = archive.infolist()
            _check_members(path, members)
            for member in members:
                inside = PurePosixPath(member.filename)
                match = _DRAWING.fullmatch("/".join(inside.parts[1:]))
                if match is None or inside.parts[0] != path.stem:
                    continue
                with archive.open(member) as file:
                    content = file.read(_MAX_FILE + 1)
                if len(content) > _MAX_FILE:
                    _fail(path, f"holds {member.filename!r}, larger than {_MAX_FILE} bytes")
                yield "/".join(match.groups()), f"{path}/{member.filename}", content
    except DataError:
        raise
    except _BROKEN_ZIP as error:
        raise DataError(f"'{path}' is no sound zip file ({error}); {_CURE}") from error


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > _MAX_MEMBERS:
        _fail(path, f"has {len(members)} members, more than {_MAX_MEMBERS}")
    if sum(member.file_size for member in members) > _MAX_TOTAL:
        _fail(path, f"unpacks to more than {_MAX_TOTAL >> 20} MiB")
    for member in members:
        # `orig_filename`: zipfile cuts the other at a null byte and turns backslashes.
        name = member.orig_filename
        if name.startswith("/") or re.search(r"[\\:\0]|(^|/)\.\.(/|$)", name):
            _fail(path, f"has a member with the unsafe name {name!r}")
        if member.file_size > _MAX_FILE:
            _fail(path, f"holds {name!r} of {member.file_size} bytes, more than {_MAX_FILE}")


def _from_folder(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, place for messages, and content of each drawing in an unpacked folder."""
    for path in _drawings_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield name, str(path), _bounded(path, _MAX_FILE)


def _drawings_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("*/character*/*.png")
        if _DRAWING.fullmatch(path.relative_to(folder).as_posix())
    )


def _bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error}); make it readable") from error
    if len(content) > limit:
        _fail(path, f"has more than {limit} bytes")
    return content


def _pixels(where: str, content: bytes, size: int) -> NDArray[np.uint8]:
    """Decode one drawing and shrink it, ``[size, size]``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "decoding Omniglot needs pillow; install it with: pip install 'bilevel[data]'"
        ) from error

    # The header states the size: look before decoding, or a small file may fill the memory.
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        _fail(where, "is no PNG image")
    width, height = struct.unpack(">II", content[16:24])
    if (width, height) != (_SIDE, _SIDE):
        _fail(where, f"has {width}×{height} pixels instead of {_SIDE}×{_SIDE}")
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            if image.mode not in ("1", "L"):
                _fail(where, f"has the mode {image.mode} instead of black and white")
            gray = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
    except DataError:
        raise
    except _BROKEN_PNG as error:
        raise DataError(f"'{where}' is a broken PNG image ({error}); {_CURE}") from error
    return np.asarray(gray, dtype=np.uint8)


def _fail(where: str | Path, finding: str) -> NoReturn:
    raise DataError(f"'{where}' {finding}; {_CURE}")
