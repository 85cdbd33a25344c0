"""Ready-made bilevel problems, each with what is known about it, and the data they need."""

from .example import Example
from .few_shot import FewShot
from .logistic import Logistic
from .networks import conv_pool, conv_strided, mlp
from .quadratic import Quadratic
from .ridge import Ridge
from .sinusoid import Sinusoid, SinusoidSampler

__all__ = [
    "Example",
    "FewShot",
    "Logistic",
    "Quadratic",
    "Ridge",
    "Sinusoid",
    "SinusoidSampler",
    "conv_pool",
    "conv_strided",
    "mlp",
]
