"""Data sets for bilevel problems: few-shot image tasks, files of LIBSVM, road networks.

Everything here reads local files or makes its own data; nothing is downloaded.
"""

from __future__ import annotations

from .episodes import EpisodeSampler
from .errors import DataError
from .glyphs import glyphs
from .images import ImageClasses
from .libsvm import libsvm, read_libsvm
from .locate import data_root
from .mini_imagenet import mini_imagenet
from .nearest_neighbour import pixel_nearest_neighbour
from .omniglot import omniglot, omniglot_split
from .tntp import read_tntp, read_tntp_flow, tntp

__all__ = [
    "DataError",
    "EpisodeSampler",
    "ImageClasses",
    "data_root",
    "glyphs",
    "libsvm",
    "mini_imagenet",
    "omniglot",
    "omniglot_split",
    "pixel_nearest_neighbour",
    "read_libsvm",
    "read_tntp",
    "read_tntp_flow",
    "tntp",
]
