"""Data sets in LIBSVM's text format: a label, then ``index:value`` pairs, on each line.

The format is that of https://www.csie.ntu.edu.tw/~cjlin/libsvm/ with indices from 1.
"""

from __future__ import annotations

import bz2
import gzip
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .locate import data_root

__all__ = ["libsvm", "read_libsvm"]

_MAX_BYTES = 1 << 28  # of text
_MAX_ENTRIES = 1 << 28  # of the dense matrix
_SUFFIXES = ("", ".bz2", ".gz")

# Each alternative starts differently, so that matching takes time linear in the line.
_NUMBER = rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_PAIR = rb"\d{1,9}:" + _NUMBER
_LABEL = re.compile(_NUMBER)
_ENTRY = re.compile(_PAIR)
_LINE = re.compile(rb"[ \t]*" + _NUMBER + rb"(?:[ \t]+" + _PAIR + rb")*[ \t\r]*")


def libsvm(
    name: str,
    root: str | os.PathLike[str] | None = None,
    features: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Read a data set by name, from ``name``, ``name.bz2`` or ``name.gz``.

    Args:
        name: File name such as "a9a" or "a9a.t".
        root: Folder that holds the file or a folder ``libsvm`` with it; default: that of the
            environment variable ``BILEVEL_DATA``.
        features: Number of columns; default: the largest index in the file. Give it where a test
            set lacks the last features.
        dtype: Of both results.

    Returns:
        ``X [rows, features]`` and ``y [rows]``.

    Raises:
        DataError: There is no such file, or it is malformed.
    """
    folder = data_root(root)
    if not name or Path(name).name != name:
        raise DataError(f"`name` is {name!r}; give a plain file name such as 'a9a'")
    for place in (folder, folder / "libsvm"):
        for suffix in _SUFFIXES:
            if (place / f"{name}{suffix}").is_file():
                return read_libsvm(place / f"{name}{suffix}", features, dtype)
    raise DataError(
        f"`root` = '{folder}' holds none of {name}, {name}.bz2 and {name}.gz, nor does its folder "
        "libsvm/; point `root` at the folder that does"
    )


def read_libsvm(
    path: str | os.PathLike[str],
    features: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Read a LIBSVM text file, plain or compressed (.bz2, .gz), into a dense matrix.

    Blank lines and comments after ``#`` are skipped. Indices start at 1 and increase along a line.

    Args:
        path: The file; its suffix names the compression.
        features: Number of columns; default: the largest index in the file.
        dtype: Of both results.

    Returns:
        ``X [rows, features]`` and ``y [rows]``.

    Raises:
        DataError: The file is missing, broken, too large or malformed; the line is named.
    """
    path = Path(path)
    if features is not None and features < 1:
        raise DataError(f"`features` is {features}; give a positive number, or None")
    # One line number per row, for the messages.
    rows_of_file = [
        (number, line)
        for number, line in enumerate(_text(path).split(b"\n"), start=1)
        if line.strip()
    ]
    if not rows_of_file:
        raise DataError(f"'{path}' holds no row; check that it is the file you mean")
    for number, line in rows_of_file:
        if not _LINE.fullmatch(line):
            raise DataError(f"'{path}' line {number} {_malformed(line)}; mend it")

    pairs = np.array([line.count(b":") for _, line in rows_of_file])
    tokens = b" ".join(line for _, line in rows_of_file).replace(b":", b" ").split()
    numbers = np.array(tokens, dtype=np.float64)
    is_label = np.zeros(len(numbers), dtype=bool)
    is_label[np.concatenate([[0], np.cumsum(2 * pairs + 1)[:-1]])] = True
    labels = numbers[is_label]
    index, value = numbers[~is_label].reshape(-1, 2).T
    column = index.astype(np.int64)
    row = np.repeat(np.arange(len(pairs)), pairs)

    width = features if features is not None else int(column.max(initial=0))
    follows = np.append(False, row[1:] == row[:-1])
    before = np.where(follows, np.roll(column, 1), 0)
    for wrong, finding in (
        (column < 1, "has the index {index}; count features from 1"),
        (column <= before, "has the index {index} after {before}; sort the line by index"),
        (column > width, f"has the index {{index}}, but `features` is {width}; raise `features`"),
        (~np.isfinite(value), "has a value too large for a float at index {index}; rescale it"),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            number = rows_of_file[row[at]][0]
            text = finding.format(index=column[at], before=before[at])
            raise DataError(f"'{path}' line {number} {text}")
    if not np.isfinite(labels).all():
        number = rows_of_file[int((~np.isfinite(labels)).argmax())][0]
        raise DataError(f"'{path}' line {number} has a label too large for a float; rescale it")
    if len(pairs) * width > _MAX_ENTRIES:
        raise DataError(
            f"'{path}' would be a dense matrix of {len(pairs)}×{width}, more than {_MAX_ENTRIES} "
            "entries; keep fewer rows or features"
        )
    matrix = torch.zeros(len(pairs), width, dtype=dtype)
    matrix[torch.from_numpy(row), torch.from_numpy(column - 1)] = torch.from_numpy(
        np.ascontiguousarray(value)
    ).to(dtype)
    return matrix, torch.from_numpy(labels).to(dtype)


def _text(path: Path) -> bytes:
    """The text without comments, its size bounded whatever the file unpacks to."""
    try:
        with _open(path) as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; check `path`") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read ({error}); fetch the file again") from error
    if len(text) > _MAX_BYTES:
        raise DataError(
            f"'{path}' holds more than {_MAX_BYTES >> 20} MiB of text; this reader makes a dense "
            "matrix, so keep fewer rows"
        )
    return re.sub(rb"#[^\n]*", b"", text) if b"#" in text else text


def _open(path: Path) -> BinaryIO | bz2.BZ2File | gzip.GzipFile:
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _malformed(line: bytes) -> str:
    """What is wrong with a line that does not have the format."""
    label, *entries = line.split() or [b""]
    if not _LABEL.fullmatch(label):
        return f"starts with {_show(label)}, which is no number"
    wrong = next((entry for entry in entries if not _ENTRY.fullmatch(entry)), line)
    return f"has the entry {_show(wrong)}, which is not index:value"


def _show(text: bytes) -> str:
    shown = text[:40].decode("utf-8", "replace")
    return repr(shown + "…" if len(text) > 40 else shown)
