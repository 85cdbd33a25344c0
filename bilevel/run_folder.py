"""What a run leaves behind: settings, one record per step, weights and the result, in a folder.

Whole files appear complete or not at all: they are written beside their place and then renamed.
Records are appended one line at a time, so that a run that dies keeps all but its last.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .errors import BilevelError
from .pytree import PyTree, tree_map

__all__ = ["RunFolder", "RunFolderError", "alone", "read_json", "read_metrics"]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CURVE = "learning-curve.png"
WEIGHTS = "weights.pt"
CHECKPOINT = "checkpoint.pt"
PROBES = "probes.jsonl"
RESULT = "result.json"
_LOCK = ".lock"
_ANEW = "remove the folder, or start the run anew with --overwrite"
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    NotImplementedError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
_FILES = (CONFIG, METRICS, PROBES, CURVE, CHECKPOINT, WEIGHTS, RESULT)


class RunFolderError(BilevelError, OSError):
    """A run folder cannot be made, read or written; the message names it and the cure."""


@dataclass(frozen=True)
class RunFolder:
    """A folder for one run, made if it does not exist.

    Args:
        path: The folder.
        overwrite: Take a folder that is not empty, and remove the files of an earlier run from it;
            other files in it stay.
        resume: Take a folder as an earlier run left it.

    Raises:
        RunFolderError: The folder is not empty and ``overwrite`` is False, or it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
        >>> folder.append({"step": 0, "loss": 1.5})
        >>> folder.read_metrics()
        [{'step': 0, 'loss': 1.5}]
    """

    path: Path
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        with _explained(f"the run folder '{self.path}' cannot be made"):
            self.path.mkdir(parents=True, exist_ok=True)
            full = any(one.name != _LOCK for one in self.path.iterdir())
        if full and not (self.overwrite or self.resume):
            raise RunFolderError(
                f"the run folder '{self.path}' is not empty; choose another folder, go on with the "
                "run in it by resume=True (on the command line, --resume), or replace it by "
                "overwrite=True (--overwrite)"
            )
        with _explained(f"the run folder '{self.path}' cannot be written"):
            if not self.resume:
                for name in _FILES:
                    (self.path / name).unlink(missing_ok=True)
            # Find out now, and not after minutes of training, whether files can be made here.
            if not (self.path / METRICS).exists():
                self._replace(METRICS, lambda file: None)
            else:
                self._replace(METRICS, lambda file: file.write(_whole_lines(self.path / METRICS)))

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as indented JSON; numbers that are not finite become null."""
        text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return self.write(name, lambda file: _put(file, text.encode()))

    def save_weights(self, outer: PyTree, name: str = WEIGHTS) -> Path:
        """Save the tensors of ``outer``; ``torch.load(path, weights_only=True)`` reads them."""
        tensors = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, outer)
        return self.write(name, lambda file: torch.save(tensors, file))

    def has(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return (self.path / name).is_file()

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote.

        Raises:
            RunFolderError: The file cannot be read, or is no JSON.
        """
        return read_json(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file that no longer holds."""
        with _explained(f"'{self.path / name}' cannot be removed"):
            (self.path / name).unlink(missing_ok=True)

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Save all that a resumption needs: tensors and plain values."""
        return self.write(CHECKPOINT, lambda file: torch.save(state, file))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What `save_checkpoint` wrote, its tensors on the CPU; None where nothing was saved.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not self.has(CHECKPOINT):
            return None
        path = self.path / CHECKPOINT
        try:
            # PyTorch writes checksums and does not look at them.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"'{damaged}' in it does not match its checksum")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no content"
            raise RunFolderError(f"'{path}' cannot be read ({reason}); {_ANEW}") from error
        return state

    def keep_records(self, count: int, name: str = METRICS) -> list[dict[str, Any]]:
        """Keep the records of steps below ``count`` and drop those after; return what is kept."""
        records = [one for one in read_metrics(self.path / name) if one["step"] < count]
        lines = b"".join(_line(record) for record in records)
        self.write(name, lambda file: _put(file, lines))
        return records

    def append(self, record: dict[str, Any], name: str = METRICS) -> None:
        """Append one record to a file of them, as one line that is on its way to disk on return."""
        line = _line(record)
        with (
            _explained(f"'{self.path / name}' cannot be written"),
            open(self.path / name, "ab", buffering=0) as file,
        ):
            end = file.tell()
            try:
                _put(file, line)
            except OSError:
                file.truncate(end)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records that were appended; see `read_metrics`."""
        return read_metrics(self.path / METRICS)

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> Path:
        """Write a whole file by ``fill(file)``: it appears complete or not at all.

        Raises:
            RunFolderError: The file cannot be written; an earlier one of that name is as it was.
        """
        with _explained(f"'{self.path / name}' cannot be written"):
            return self._replace(name, fill)

    def _replace(self, name: str, fill: Callable[[BinaryIO], object]) -> Path:
        path = self.path / name
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


@contextlib.contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes that ask likewise out of a folder meanwhile; a crash lets go of it.

    Args:
        path: The folder, made if it does not exist.

    Raises:
        RunFolderError: Another process works in it, or it cannot be made.
    """
    with _explained(f"the run folder '{path}' cannot be made"):
        Path(path).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(path) / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(
                f"another process works in '{path}'; wait for it, or choose another folder"
            ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            (Path(path) / _LOCK).unlink()
        lock.release()


def read_json(path: str | os.PathLike[str]) -> Any:
    """What `RunFolder.write_json` wrote.

    Raises:
        RunFolderError: The file cannot be read, or is no JSON.
    """
    with _explained(f"'{path}' cannot be read", cure=_ANEW):
        text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"'{path}' is no JSON ({error}); {_ANEW}") from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read records, one JSON object a line.

    Args:
        path: The file. A last line without its end is of a run that died while writing it, and is
            left out.

    Raises:
        RunFolderError: The file cannot be read, or a finished line is not a JSON object.
    """
    with _explained(f"'{path}' cannot be read", cure="name a metrics file of a run"):
        text = Path(path).read_bytes()
    records = []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunFolderError(
                f"'{path}' line {number} is not JSON ({error}); remove the line"
            ) from error
        if not isinstance(record, dict):
            raise RunFolderError(f"'{path}' line {number} is no JSON object; remove the line")
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _whole_lines(path: Path) -> bytes:
    """The content up to its last line end: a run that died may have left a part of a line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _put(file: Any, data: bytes) -> None:
    """Write all of ``data``; an unbuffered file may take a part of it at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _explained(
    finding: str, cure: str = "free some space there, or choose a folder that you may write to"
) -> Iterator[None]:
    """Turn what the operating system says into a message with a cure."""
    try:
        yield
    except RunFolderError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise RunFolderError(f"{finding}: {reason}; {cure}") from error


def _plain(value: Any) -> Any:
    """``value`` in JSON's own terms."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
