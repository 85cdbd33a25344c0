"""Maps: every network can be drawn, and colors mean what their bar says."""

import numpy as np
import pytest
from matplotlib.image import imread

from bilevel.experiments.roads import Panel, draw_map
from bilevel.experiments.roads.map import _scale, _top
from bilevel.problems.traffic import RoadNetwork

LINK = {"free_flow_time": 1.0, "capacity": 1.0}


def corridor(coordinates):
    ends = [(1, 2), (2, 1), (2, 3), (3, 2)]
    return RoadNetwork.from_links(
        [(i, j, LINK) for i, j in ends], {(1, 3): 1.0}, zones=3, coordinates=coordinates
    )


@pytest.mark.parametrize(
    "coordinates",
    [
        None,
        {1: (0.0, 0.0), 2: (1.0, 0.0), 3: (2.0, 0.0)},
        {1: (0.0, 0.0), 2: (0.0, 1.0), 3: (0.0, 2.0)},
        {1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 0.0)},
    ],
    ids=["none", "horizontal", "vertical", "one place"],
)
def test_links_are_seen_wherever_the_nodes_lie(tmp_path, coordinates):
    network = corridor(coordinates)
    draw_map(network, [Panel("x", [4.0] * 4, "x", middle=1.0)], tmp_path / "map.png")
    picture = imread(tmp_path / "map.png")[..., :3]
    # The darkest red of the color map, above the bar.
    red = (picture[..., 0] > 0.4) & (picture[..., 1:].max(-1) < 0.1)
    above = red[: int(0.8 * len(red))]
    if coordinates is None or len(set(coordinates.values())) > 1:
        assert above.sum() > 100


def test_the_middle_color_is_that_of_the_middle_value():
    scale = _scale(Panel("x", [0.0, 4.0], "x", middle=1.0), 4.0)
    assert scale(1.0) == pytest.approx(0.5)
    assert scale(4.0) == pytest.approx(1.0)
    assert _scale(Panel("x", [0.0, 4.0], "x"), 4.0)(1.0) == pytest.approx(0.25)


def test_a_few_large_values_do_not_hide_the_others():
    usual = np.linspace(0.5, 1.0, 50).tolist()
    assert _top([*usual, 60.0]) < 2.0
    assert _top(usual) == 1.0
    assert _top([0.0, 0.0]) > 0.0
