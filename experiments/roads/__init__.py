"""Roads: tolls and new capacity on a network, found by hypergradients, with maps."""

from .cases import network_of
from .map import Panel, draw_map
from .run import NetworkDesignSettings, RoadResult, TollSettings, design, toll

__all__ = [
    "NetworkDesignSettings",
    "Panel",
    "RoadResult",
    "TollSettings",
    "design",
    "draw_map",
    "network_of",
    "toll",
]
