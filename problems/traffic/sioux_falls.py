"""The continuous network design problem of Sioux Falls, in the versions that circulate."""

from __future__ import annotations

import os

from .decisions import CapacityDecision

__all__ = ["sioux_falls_design"]

# The problem of Suwansirikul, Friesz and Tobin (1987), in the numbering of the TNTP file from 1.
_SIOUX_FALLS_LINKS = (16, 17, 19, 20, 25, 26, 29, 39, 48, 74)
_SIOUX_FALLS_COSTS = (26, 40, 26, 40, 25, 25, 48, 34, 48, 34)


def sioux_falls_design(
    variant: str = "A", root: str | os.PathLike[str] | None = None
) -> CapacityDecision:
    """The continuous network design problem of Sioux Falls, on the files of TNTP.

    Ten links, 0 ≤ y ≤ 25; capacity and y in 1,000 vehicles an hour, time in hours, Z in 1,000
    vehicle-hours. Several versions circulate: "C" is TNTP in these units, with Z(0) = 99.9413; "B"
    has the links 10–16, 15–19 and 15–22 of the first papers, Z(0) = 100.9690; "A" has in addition
    their trips from 16 to 9, Z(0) = 101.0615.

    Args:
        variant: "A", "B" or "C".
        root: Where the files are; see `tntp`.

    Raises:
        DataError: The files are not there.
        ValueError: There is no such variant.
    """
    from ..data.tntp import tntp

    if variant not in ("A", "B", "C"):
        raise ValueError(f"`variant` is {variant!r}; pass 'A', 'B' or 'C'")
    network = tntp("SiouxFalls", root).scaled(
        capacity=1e-3, time=1e-2, demand=1.1e-3, time_unit="h", flow_unit="1000 veh/h"
    )
    if variant != "C":
        old = {(10, 16): (0.05, 5.1335), (15, 19): (0.04, 15.6508), (15, 22): (0.04, 10.3150)}
        network = network.with_links(
            {
                ends: {"free_flow_time": t, "capacity": c}
                for (i, j), (t, c) in old.items()
                for ends in ((i, j), (j, i))
            }
        )
    if variant == "A":
        network = network.with_demand({(16, 9): 1.64})
    links = [one - 1 for one in _SIOUX_FALLS_LINKS]
    return CapacityDecision(network, links, _SIOUX_FALLS_COSTS, weight=0.001)
