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
    read_tntp,
    read_tntp_flow,
    tntp,
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
from .traffic import (
    CapacityDecision,
    Decision,
    LogitLoading,
    NetworkDesign,
    PathEquilibrium,
    RoadNetwork,
    RoadTolls,
    StochasticEquilibrium,
    TollDecision,
    UserEquilibrium,
    beckmann,
    dispersion_homotopy,
    equilibrium_under,
    exact_hypergradient,
    sioux_falls_design,
    system_optimum,
    total_time,
    travel_time,
    travel_time_slope,
    user_equilibrium,
)

__all__ = [
    "Adaptation",
    "CapacityDecision",
    "Cournot",
    "DataError",
    "Decision",
    "Distillation",
    "EpisodeSampler",
    "Equilibrium",
    "Example",
    "FewShot",
    "HyperCleaning",
    "ImageClasses",
    "Logistic",
    "LogitLoading",
    "NetworkDesign",
    "PathEquilibrium",
    "Poisson",
    "Quadratic",
    "Ridge",
    "RoadNetwork",
    "RoadTolls",
    "Sinusoid",
    "SinusoidSampler",
    "StochasticEquilibrium",
    "TollDecision",
    "UserEquilibrium",
    "beckmann",
    "conv_pool",
    "conv_strided",
    "data_root",
    "dispersion_homotopy",
    "equilibrium_under",
    "exact_hypergradient",
    "glyphs",
    "libsvm",
    "mini_imagenet",
    "mlp",
    "omniglot",
    "omniglot_split",
    "pixel_nearest_neighbour",
    "read_libsvm",
    "read_tntp",
    "read_tntp_flow",
    "sioux_falls_design",
    "system_optimum",
    "tntp",
    "total_time",
    "travel_time",
    "travel_time_slope",
    "user_equilibrium",
]
