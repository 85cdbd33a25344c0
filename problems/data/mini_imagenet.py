"""Mini-ImageNet: 100 classes of ImageNet with 600 pictures each, 84×84 in color.

Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016; the split into 64, 16 and
20 classes is that of Ravi and Larochelle, "Optimization as a model for few-shot learning", ICLR
2017. The pictures are ImageNet's, and not free to pass on: bring your own copy.

Every size is checked before anything of that size is decoded.
"""

from __future__ import annotations

import csv
import os
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import DataError
from .images import ImageClasses
from .locate import data_root

__all__ = ["mini_imagenet"]

_SPLITS = {"train": 64, "val": 16, "test": 20}  # classes of each
_SIDE = 84
_FORMATS = ("JPEG", "PNG", "WEBP")
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

_MAX_FILE = 2 << 30
_MAX_PICTURE = 8 << 20
_MAX_PIXELS = 16 << 20

# A header can ask for more memory than there is.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, MemoryError, zlib.error)
_CURE = "copy it again, or point `root` at another copy of mini-ImageNet"

Picture = tuple[str, str, bytes]
"""Class, place for messages, and content."""


def mini_imagenet(
    root: str | os.PathLike[str] | None = None, split: str = "train", size: int = _SIDE
) -> ImageClasses:
    """The classes of one split, sorted by name, decoded (9 s for ``"train"`` on one core).

    Args:
        root: Folder that holds, itself or in a folder ``mini-imagenet`` or ``miniImagenet``, for
            the split one of: ``train.npz`` with the arrays ``data`` (all picture files one after
            another, uint8), ``offsets``, ``labels`` and ``classes``; ``train.csv`` with the columns
            ``filename`` and ``label``, and the pictures in ``images/``; or a folder ``train`` with
            a folder of pictures for each class. Default: the folder that the environment variable
            ``BILEVEL_DATA`` names.
        split: ``"train"``, ``"val"`` or ``"test"``: 64, 16 and 20 classes.
        size: Height and width in pixels, at most 84; pictures of another size are resized.

    Returns:
        Images ``[classes, 600, 3, size, size]`` uint8, with names such as "n01532829".

    Raises:
        DataError: The files are missing or broken, or hold another number of classes, or classes
            of unequal size.
        ImportError: Pillow is not installed.
        ValueError: The split is unknown, or the size out of range.
    """
    if split not in _SPLITS:
        raise ValueError(f"`split` is {split!r}; pass one of {', '.join(_SPLITS)}")
    if not 1 <= size <= _SIDE:
        raise ValueError(f"`size` is {size}; it must lie between 1 and {_SIDE}")
    source, pictures = _find(data_root(root), split)
    classes: dict[str, list[NDArray[np.uint8]]] = {}
    for name, where, content in pictures:
        classes.setdefault(name, []).append(_pixels(where, content, size))
    if len(classes) != _SPLITS[split]:
        _fail(source, f"holds {len(classes)} classes instead of {_SPLITS[split]}")
    counts = {name: len(one) for name, one in classes.items()}
    if len(set(counts.values())) > 1:
        low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        _fail(source, f"holds {counts[low]} pictures of {low} but {counts[high]} of {high}")
    names = sorted(classes)
    images = np.stack([np.stack(classes.pop(name)) for name in names])
    return ImageClasses(torch.from_numpy(images).movedim(-1, 2).contiguous(), tuple(names))


def _find(root: Path, split: str) -> tuple[Path, Iterator[Picture]]:
    """Where the split lies, and its pictures."""
    for base in (root, root / "mini-imagenet", root / "miniImagenet"):
        packed, listing, folder = base / f"{split}.npz", base / f"{split}.csv", base / split
        if packed.is_file():
            return packed, _from_arrays(packed)
        if listing.is_file():
            return listing, _from_listing(listing)
        if folder.is_dir():
            return folder, _from_folder(folder)
    raise DataError(
        f"`root` = '{root}' holds neither {split}.npz nor {split}.csv nor a folder {split}/, nor "
        "does a folder mini-imagenet/ or miniImagenet/ in it; point `root` at the folder that does"
    )


def _from_arrays(path: Path) -> Iterator[Picture]:
    if path.stat().st_size > _MAX_FILE:
        _fail(path, f"has more than {_MAX_FILE >> 20} MiB")
    try:
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(one.file_size for one in packed.infolist())
        if unpacked > _MAX_FILE:
            _fail(path, f"unpacks to more than {_MAX_FILE >> 20} MiB")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            wanted = ("data", "offsets", "labels", "classes")
            missing = [name for name in wanted if name not in file.files]
            if missing:
                _fail(path, f"has no array '{missing[0]}'")
            data, offsets, labels, classes = (file[name] for name in wanted)
    except DataError:
        raise
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' is no sound npz file ({error}); {_CURE}") from error
    if data.dtype != np.uint8 or data.ndim != 1:
        _fail(path, f"has `data` of {data.dtype} {data.shape} instead of uint8 in a row")
    whole = all(one.ndim == 1 and one.dtype.kind in "iu" for one in (offsets, labels))
    if not whole or len(offsets) != len(labels) + 1:
        _fail(path, f"has {offsets.shape} `offsets` for {labels.shape} `labels`")
    offsets = offsets.astype(np.int64)  # differences of unsigned numbers never fall
    rising = len(offsets) > 1 and offsets[0] >= 0 and bool((np.diff(offsets) > 0).all())
    if not rising or offsets[-1] > len(data):
        _fail(path, f"has `offsets` that leave its {len(data)} bytes of `data`, or fall")
    if labels.min() < 0 or labels.max() >= len(classes):
        _fail(path, f"has a label outside its {len(classes)} `classes`")
    for i, label in enumerate(labels):
        content = data[offsets[i] : offsets[i + 1]].tobytes()
        yield str(classes[label]), f"{path}, picture {i}", content


def _from_listing(path: Path) -> Iterator[Picture]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if not {"filename", "label"} <= set(table.fieldnames or ()):
                _fail(path, "has no columns `filename` and `label`")
            lines = [(row["filename"], row["label"]) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read ({error}); {_CURE}") from error
    for number, (name, label) in enumerate(lines, start=2):
        if not name or not label or Path(name).name != name:
            _fail(f"{path}, line {number}", f"names no picture in images/: {name!r}, {label!r}")
        picture = path.parent / "images" / name
        yield label, str(picture), _read(picture)


def _from_folder(folder: Path) -> Iterator[Picture]:
    for picture in sorted(folder.glob("*/*")):
        if picture.suffix.lower() in _ENDINGS:
            yield picture.parent.name, str(picture), _read(picture)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_PICTURE + 1)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error}); {_CURE}") from error
    if len(content) > _MAX_PICTURE:
        _fail(path, f"has more than {_MAX_PICTURE} bytes")
    return content


def _pixels(where: str, content: bytes, size: int) -> NDArray[np.uint8]:
    """Decode one picture, ``[size, size, 3]``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "decoding mini-ImageNet needs pillow; install it with: pip install 'bilevel[data]'"
        ) from error

    try:
        with Image.open(BytesIO(content), formats=_FORMATS) as image:
            # The header states the size: look before decoding.
            if image.width * image.height > _MAX_PIXELS:
                _fail(where, f"has {image.width}×{image.height} pixels")
            colors = image.convert("RGB")
            if colors.size != (size, size):
                colors = colors.resize((size, size), Image.Resampling.LANCZOS)
    except DataError:
        raise
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DataError(f"'{where}' is no sound picture ({error}); {_CURE}") from error
    return np.asarray(colors, dtype=np.uint8)


def _fail(where: str | Path, finding: str) -> NoReturn:
    raise DataError(f"'{where}' {finding}; {_CURE}")
