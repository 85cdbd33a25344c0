"""The real networks where there are any, and small random ones."""

import os
from pathlib import Path

import pytest
import torch

from bilevel.problems import DataError, RoadNetwork, tntp


@pytest.fixture(scope="session")
def real_network():
    """Reads a network below the folder of the environment variable BILEVEL_DATA, or skips."""

    def read(name):
        root = os.environ.get("BILEVEL_DATA", "")
        if not root:
            pytest.skip("the environment variable BILEVEL_DATA is not set")
        try:
            return tntp(name, Path(root))
        except DataError as error:
            if "holds neither" in str(error):
                pytest.skip(str(error))
            raise

    return read


@pytest.fixture(scope="session")
def ring():
    """Makes a random strongly connected network: a ring in both directions, and chords."""

    def make(seed, nodes=5, zones=3, chords=4):
        random = torch.Generator().manual_seed(seed)

        def draw(low, high):
            return low + (high - low) * torch.rand((), generator=random, dtype=torch.float64).item()

        ends = [(i, i % nodes + 1) for i in range(1, nodes + 1)]
        ends += [(j, i) for i, j in ends]
        others = [(i, j) for i in range(1, nodes + 1) for j in range(1, nodes + 1) if i != j]
        others = [pair for pair in others if pair not in ends]
        order = torch.randperm(len(others), generator=random).tolist()
        ends += [others[k] for k in order[:chords]]
        links = [
            (
                i,
                j,
                {
                    "free_flow_time": draw(1.0, 3.0),
                    "capacity": draw(1.0, 4.0),
                    "b": draw(0.1, 1.0),
                    "power": float(torch.randint(1, 5, (), generator=random)),
                },
            )
            for i, j in ends
        ]
        demand = {
            (i, j): draw(0.2, 2.0)
            for i in range(1, zones + 1)
            for j in range(1, zones + 1)
            if i != j
        }
        return RoadNetwork.from_links(links, demand)

    return make
