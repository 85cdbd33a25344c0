"""The arguments that benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

__all__ = ["arguments"]


def arguments(
    doc: str | None,
    full: str | None,
    *,
    rounds: int | None = None,
    device: bool = False,
    root: bool = False,
) -> argparse.Namespace:
    """Read the command line, and set the number of threads.

    Args:
        doc: The script's docstring, whose first line is its help.
        full: What ``--full`` measures; None: there is no ``--full``.
        rounds: Default of ``--rounds``; None: nothing is repeated.
        device: Whether there is ``--device``.
        root: Whether there is ``--root``, the folder of data sets.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    if device:
        parser.add_argument("--device", default="cpu")
    if root:
        parser.add_argument("--root", help="folder of the data sets; default: BILEVEL_DATA")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args
