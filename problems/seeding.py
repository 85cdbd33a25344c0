"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of ``parts``.

    They are hashed, so that neighbouring seeds and steps share no stream.
    """
    text = ",".join(map(str, parts))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(seed)
