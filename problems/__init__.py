"""Ready-made bilevel problems, each with what is known about it, and the data they need."""

from .adaptation import Adaptation
from .data import (
    DataError,
    EpisodeSampler,
    ImageClasses,
    data_root,
    glyphs,
    libsvm,
    omniglot,
    omniglot_split,
    pixel_nearest_neighbour,
    read_libsvm,
)
from .example import Example
from .few_shot import FewShot
from .logistic import Logistic
from .networks import conv_pool, conv_strided, mlp
from .quadratic import Quadratic
from .ridge import Ridge
from .sinusoid import Sinusoid, SinusoidSampler

__all__ = [
    "Adaptation",
    "DataError",
    "EpisodeSampler",
    "Example",
    "FewShot",
    "ImageClasses",
    "Logistic",
    "Quadratic",
    "Ridge",
    "Sinusoid",
    "SinusoidSampler",
    "conv_pool",
    "conv_strided",
    "data_root",
    "glyphs",
    "libsvm",
    "mlp",
    "omniglot",
    "omniglot_split",
    "pixel_nearest_neighbour",
    "read_libsvm",
]
