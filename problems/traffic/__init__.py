"""Traffic: road networks in equilibrium, their design and their tolls."""

from .costs import beckmann, total_time, travel_time, travel_time_slope
from .decisions import CapacityDecision, Decision, TollDecision
from .homotopy import dispersion_homotopy
from .loading import LogitLoading
from .network import RoadNetwork
from .network_design import NetworkDesign, RoadTolls
from .path_equilibrium import PathEquilibrium, equilibrium_under, exact_hypergradient
from .routes import Routes
from .sioux_falls import sioux_falls_design
from .stochastic_equilibrium import StochasticEquilibrium
from .user_equilibrium import UserEquilibrium, system_optimum, user_equilibrium

__all__ = [
    "CapacityDecision",
    "Decision",
    "LogitLoading",
    "NetworkDesign",
    "PathEquilibrium",
    "RoadNetwork",
    "RoadTolls",
    "Routes",
    "StochasticEquilibrium",
    "TollDecision",
    "UserEquilibrium",
    "beckmann",
    "dispersion_homotopy",
    "equilibrium_under",
    "exact_hypergradient",
    "sioux_falls_design",
    "system_optimum",
    "total_time",
    "travel_time",
    "travel_time_slope",
    "user_equilibrium",
]
