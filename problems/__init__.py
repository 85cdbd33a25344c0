"""Ready-made bilevel problems, each with what is known about it, and the data they need."""

from .adaptation import Adaptation
from .cournot import Cournot
from .data import (
    DataError,
    EpisodeSampler,
    ImageClasses,
    data_root,
    glyphs,
    libsvm,
    mini_imagenet,
    omniglot,
    omniglot_split,
    pixel_nearest_neighbour,
    read_libsvm,
)
from .distillation import Distillation
from .equilibrium import Equilibrium
from .example import Example
from .few_shot import FewShot
from .hyper_cleaning import HyperCleaning
from .logistic import Logistic
from .networks import conv_pool, conv_strided, mlp
from .poisson import Poisson
from .quadratic import Quadratic
from .ridge import Ridge
from .sinusoid import Sinusoid, SinusoidSampler

__all__ = [
    "Adaptation",
    "Cournot",
    "DataError",
    "Distillation",
    "EpisodeSampler",
    "Equilibrium",
    "Example",
    "FewShot",
    "HyperCleaning",
    "ImageClasses",
    "Logistic",
    "Poisson",
    "Quadratic",
    "Ridge",
    "Sinusoid",
    "SinusoidSampler",
    "conv_pool",
    "conv_strided",
    "data_root",
    "glyphs",
    "libsvm",
    "mini_imagenet",
    "mlp",
    "omniglot",
    "omniglot_split",
    "pixel_nearest_neighbour",
    "read_libsvm",
]
