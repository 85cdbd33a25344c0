"""Decoded data sets, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import BilevelWarning

__all__ = ["cache_folder", "load_arrays", "save_arrays"]

_CHECKSUM = "sha256"


def cache_folder() -> Path:
    """Folder ``bilevel`` in the user's cache folder; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is invalid by the XDG base directory specification.
    home = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return home / "bilevel"


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]] | None:
    """What `save_arrays` wrote, or None where it is missing, truncated or altered.

    Args:
        path: The cache file.

    Returns:
        The arrays by name.
    """
    try:
        # Opened here: NumPy leaves the file open when it is no zip.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stored = str(arrays.pop(_CHECKSUM))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return arrays if stored == _checksum(arrays) else None


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write the arrays so that a reader sees all of them or none.

    A folder that cannot be written gives a `BilevelWarning` and leaves nothing behind.

    Args:
        path: The cache file; its folder is made.
        arrays: No object arrays.
    """
    content = BytesIO()
    np.savez_compressed(
        content, allow_pickle=False, **arrays, **{_CHECKSUM: np.array(_checksum(arrays))}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content.getvalue())
    except OSError as error:
        warnings.warn(
            f"the cache '{path.parent}' cannot be written ({error}), so the images will be decoded "
            "again next time; pass another folder as `cache`",
            BilevelWarning,
            stacklevel=3,
        )


def _write(path: Path, content: bytes) -> None:
    """Write next to the target, then rename: nobody reads half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name},{array.dtype.str},{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
