"""Traffic: road networks in equilibrium, their design and their tolls."""

from .costs import beckmann, total_time, travel_time, travel_time_slope
from .network import RoadNetwork
from .routes import Routes

__all__ = [
    "RoadNetwork",
    "Routes",
    "beckmann",
    "total_time",
    "travel_time",
    "travel_time_slope",
]
