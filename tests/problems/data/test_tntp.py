"""TNTP files: what is read, what is refused, and where the error points."""

import codecs
import contextlib
import importlib
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.data import DataError, read_tntp, read_tntp_flow, tntp

MODULE = importlib.import_module("bilevel.problems.data.tntp")  # the function hides it

NET = """<NUMBER OF ZONES> 2
<NUMBER OF NODES> 3
<FIRST THRU NODE> 1
<NUMBER OF LINKS> 3
<END OF METADATA>

~ \tinit\tterm\tcapacity\tlength\ttime\tb\tpower\tspeed\ttoll\ttype\t;
\t1\t3\t10\t2\t5\t0.15\t4\t0\t0\t1\t;
\t3\t2\t10.5\t2\t6\t0.15\t4\t0\t0\t1\t;
\t2\t1\t1e1\t2\t7\t0\t0\t0\t0\t1\t;
"""
TRIPS = """<NUMBER OF ZONES> 2
<TOTAL OD FLOW> 7.5
<END OF METADATA>

Origin \t1
    1 :      0.0;     2 :    5.0;

Origin 2
    1 : 2.5;
"""
FLOW = "3 2 5 6.5\n1 3 5 5.5\n2 1 2.5 7.25\n"


@pytest.fixture
def write(tmp_path):
    def write(net=NET, trips=TRIPS, name="Tiny", **others):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        files = {f"{name}_net.tntp": net, f"{name}_trips.tntp": trips} | {
            key.replace("__", "."): text for key, text in others.items()
        }
        for file, text in files.items():
            if text is not None:
                (folder / file).write_text(text)
        return folder

    return write


def test_a_small_network(write):
    network = read_tntp(write())
    assert network.name == "Tiny"
    assert network.ends == [(1, 3), (3, 2), (2, 1)]
    assert network.capacity.tolist() == [10.0, 10.5, 10.0]
    assert network.free_flow_time.tolist() == [5.0, 6.0, 7.0]
    assert network.power.tolist() == [4.0, 4.0, 0.0]
    assert network.demand.tolist() == [[0.0, 5.0], [2.5, 0.0]]
    assert network.coordinates is None


def test_tolls_and_lengths_count_by_their_factors(write):
    net = NET.replace("5\t0.15\t4\t0\t0", "5\t0.15\t4\t0\t3").replace(
        "<END", "<TOLL FACTOR> 2\n<DISTANCE FACTOR> 0.5\n<END"
    )
    assert read_tntp(write(net)).toll.tolist() == [7.0, 1.0, 1.0]


def test_coordinates(write):
    table = "Node\tX\tY\t;\n1\t0\t1.5\t;\n2\t-2\t3\t;\n3\t4\t5\t;\n"
    network = read_tntp(write(Tiny_node__tntp=table))
    assert network.coordinates == {1: (0.0, 1.5), 2: (-2.0, 3.0), 3: (4.0, 5.0)}
    points = [
        {"properties": {"id": i}, "geometry": {"type": "Point", "coordinates": [i, 2 * i]}}
        for i in (1, 2, 3)
    ]
    text = json.dumps({"features": points})
    folder = write(name="Other", places__geojson=text)
    assert read_tntp(folder).coordinates == {i: (float(i), 2.0 * i) for i in (1, 2, 3)}
    folder = write(name="Third", places__geojson=json.dumps({"features": points[:2]}))
    with pytest.raises(DataError, match="no coordinates of node 3"):
        read_tntp(folder)
    folder = write(name="Fourth", places__geojson='{"features":\n [')
    with pytest.raises(DataError, match=r"places.geojson' line 2 is no JSON"):
        read_tntp(folder)


def points(places):
    features = [
        {"properties": {"id": node}, "geometry": {"type": "Point", "coordinates": place}}
        for node, place in places
    ]
    return json.dumps({"features": features})


def test_a_file_without_points_beside_the_network_is_ignored(write):
    line = {"geometry": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}
    other = json.dumps({"features": [line, {"geometry": None}]})
    folder = write(links__geojson=other)
    assert read_tntp(folder).coordinates is None
    with pytest.raises(DataError, match=r"links.geojson' has no coordinates of node 1"):
        read_tntp(folder, nodes=folder / "links.geojson")
    (folder / "points.geojson").write_text(points((i, [i, 0.5]) for i in (1, 2, 3)))
    assert read_tntp(folder).coordinates == {i: (float(i), 0.5) for i in (1, 2, 3)}
    for text in ("[]", "{}", '{"type": "Point", "coordinates": [1, 2]}', '{"features": [3]}'):
        folder = write(name="Other", any__geojson=text)
        assert read_tntp(folder).coordinates is None


@pytest.mark.parametrize(
    ("node", "place", "finding"),
    [
        (float("inf"), [1, 2], "has the id Infinity, which is no number of a node"),
        (1.5, [1, 2], "has the id 1.5, which is no number of a node"),
        (0, [1, 2], "has the id 0, which is no number of a node"),
        (True, [1, 2], "has the id true, which is no number of a node"),
        ("٣", [1, 2], 'has the id "٣", which is no number of a node'),
        (None, [1, 2], "has the id null, which is no number of a node"),
        (1, [1, 2], "has the node 1 for the second time"),
        (3, "12", 'has the coordinates "12", which are no two finite numbers'),
        (3, ["1", "2"], 'has the coordinates ["1", "2"], which are no two finite numbers'),
        (3, [1], "has the coordinates [1], which are no two finite numbers"),
        (3, [1, float("nan")], "has the coordinates [1, NaN], which are no two finite numbers"),
        (3, [10**400, 1], "has the coordinates [1000"),
        (3, None, "has the coordinates null, which are no two finite numbers"),
    ],
)
def test_the_feature_of_a_bad_point_is_named(write, node, place, finding):
    folder = write(any__geojson=points([(1, [0, 0]), (2, [0, 1]), (node, place)]))
    with pytest.raises(DataError) as caught:
        read_tntp(folder)
    assert f"'{folder / 'any.geojson'}' feature 3 {finding}" in str(caught.value)


def test_points_are_numbered_as_programs_write_it(write):
    folder = write(any__geojson=points([(1.0, [0, 0]), ("2", [0, 1, 7]), (3, [2, 2])]))
    assert read_tntp(folder).coordinates == {1: (0.0, 0.0), 2: (0.0, 1.0), 3: (2.0, 2.0)}
    folder = write(name="Other", any__geojson=f'{{"features": [{"1" * 5000}]}}')
    with pytest.raises(DataError, match=r"any.geojson' cannot be read"):
        read_tntp(folder)


LINK = "\t3\t2\t10.5\t2\t6\t0.15\t4\t0\t0\t1\t;"


@pytest.mark.parametrize(
    ("old", "new", "line", "finding"),
    [
        ("\t10.5\t", "\t-10.5\t", 9, "has '-10.5' for the capacity, which is negative; mend it"),
        ("\t10.5\t", "\t0\t", 9, "has the capacity 0"),
        ("\t10.5\t", "\tten\t", 9, "has 'ten' for the capacity, which is no number"),
        ("\t10.5\t", "\tnan\t", 9, "has 'nan' for the capacity, which is not finite"),
        ("\t10.5\t", "\t1_0\t", 9, "has '1_0' for the capacity, which is no number"),
        ("\t6\t0.15", "\t-6\t0.15", 9, "has '-6' for the free flow time, which is negative"),
        (LINK, "\t3\t2\t10.5\t2\t6;", 9, "has 5 columns; a link has at least 7"),
        (LINK, LINK[:-1], 9, "does not end in ';', so it may be cut off"),
        (LINK, LINK.replace("3\t2", "3\t4", 1), 9, "has the node 4, but there are 3"),
        (LINK, LINK.replace("3\t2", "0\t2", 1), 9, "has the node 0, but there are 3"),
        (LINK, LINK.replace("3\t2", "3.5\t2", 1), 9, "has '3.5' for a node"),
        (LINK, LINK.replace("3\t2", "1\t3", 1), 9, "has the link 1 → 3, as line 8 has"),
        (LINK, LINK.replace("3\t2", "3\t3", 1), 9, "has a link from 3 to itself"),
        (LINK + "\n", "", 9, "is the last, after 2 links, but <NUMBER OF LINKS> is 3"),
        ("LINKS> 3", "LINKS> 4", 10, "is the last, after 3 links, but <NUMBER OF LINKS> is 4"),
        (LINK + "\n", LINK, 9, "has 20 columns where a link has at most 10"),
        (LINK, LINK + " 7 8", 9, "has 12 columns where a link has at most 10"),
        (
            LINK,
            "3 2 1 2 6 0.15 4; 1 2;",
            9,
            "has 9 columns where a link has at most 10, all before",
        ),
        ("\t10.5\t", "\t٣\t", 9, "has '٣' for the capacity, which is no number"),
        (LINK, LINK.replace("3\t2", "٣\t2", 1), 9, "has '٣' for a node, which is no whole number"),
        ("ZONES> 2", "ZONES> 100000", 1, "has 100000 for <NUMBER OF ZONES>, above the 20000"),
        ("NODES> 3", "NODES> 10000001", 2, "has 10000001 for <NUMBER OF NODES>, above the"),
        ("LINKS> 3", "LINKS> " + "0" * 9 + "3" * 5000, 4, "has '000000000333"),
        ("ZONES> 2", "ZONES> 2\n<NUMBER OF ZONES> 3", 2, "has <NUMBER OF ZONES>, as line 1 has"),
        ("LINKS> 3", "LINKS> many", 4, "has 'many' for <NUMBER OF LINKS>"),
        ("ZONES> 2", "ZONES> 4", 1, "has 4 for <NUMBER OF ZONES>, above the 3 nodes"),
        ("NODE> 1", "NODE> 9", 3, "has 9 for <FIRST THRU NODE>, above the 4 nodes + 1"),
        ("4\t0\t0\t1\t;\n\t2", "0.5\t0\t0\t1\t;\n\t2", 9, "has the power 0.5"),
    ],
)
def test_the_line_of_a_bad_network_is_named(write, old, new, line, finding):
    assert old in NET
    folder = write(NET.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        read_tntp(folder)
    assert f"'{folder / 'Tiny_net.tntp'}' line {line} {finding}" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "finding"),
    [
        ("5.0;", "-5.0;", 6, "has '-5.0' for trips 1 → 2, which is negative"),
        ("5.0;", "some;", 6, "has 'some' for trips 1 → 2, which is no number"),
        ("5.0;", "5.0", 6, "ends in '2 :    5.0' without ';', so it may be cut off"),
        ("2 :    5.0", "3 :    5.0", 6, "has the zone 3, but there are 2"),
        ("2 :    5.0", "2     5.0", 6, "has the entry '2     5.0', not 'destination : trips'"),
        ("2 :    5.0", "1 :    5.0", 6, "has trips 1 → 1 for the second time"),
        ("Origin 2", "Origin 1", 8, "begins the origin 1, as line 5 did"),
        ("Origin 2", "Origin 7", 8, "has the zone 7, but there are 2"),
        ("Origin \t1\n", "\n", 6, "has trips before the first 'Origin'"),
        ("Origin 2\n    1 : 2.5;\n", "", 6, "is the last, after 5 trips, but <TOTAL OD FLOW> is"),
        ("ZONES> 2", "ZONES> 20001", 1, "has 20001 for <NUMBER OF ZONES>, above the 20000"),
        ("ZONES> 2", "ZONES> 2\n<number of zones> 2", 2, "has <NUMBER OF ZONES>, as line 1 has"),
        ("5.0;", "٥;", 6, "has '٥' for trips 1 → 2, which is no number"),
        ("ZONES> 2", "ZONES> 3", 1, "announces 3 zones, but the network has 2"),
        ("FLOW> 7.5", "FLOW> x", 2, "has 'x' for <TOTAL OD FLOW>"),
    ],
)
def test_the_line_of_bad_trips_is_named(write, old, new, line, finding):
    assert old in TRIPS
    folder = write(trips=TRIPS.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        read_tntp(folder)
    assert f"'{folder / 'Tiny_trips.tntp'}' line {line} {finding}" in str(caught.value)


def test_trips_that_no_route_serves_are_named_with_their_line(write):
    net = NET.replace("\t2\t1\t1e1", "\t1\t2\t1e1")
    with pytest.raises(DataError) as caught:
        read_tntp(write(net))
    message = str(caught.value)
    assert "Tiny_trips.tntp' line 9: `demand` has 2.5 trips from 2 to 1, but no route" in message


@pytest.mark.parametrize("key", ["NUMBER OF ZONES", "NUMBER OF NODES", "NUMBER OF LINKS"])
def test_missing_metadata(write, key):
    net = "".join(line for line in NET.splitlines(keepends=True) if key not in line)
    with pytest.raises(DataError, match=rf"Tiny_net.tntp' has no metadata <{key}>"):
        read_tntp(write(net))


def test_files_that_are_no_files_of_this_kind(write, tmp_path):
    with pytest.raises(DataError, match="has no line <END OF METADATA>"):
        read_tntp(write(NET.replace("<END OF METADATA>", "")))
    with pytest.raises(DataError, match="is empty; fetch"):
        read_tntp(write(""))
    with pytest.raises(DataError, match="holds no trip"):
        read_tntp(write(trips="<NUMBER OF ZONES> 2\n<END OF METADATA>\n"))
    with pytest.raises(DataError, match=r"Bare_trips.tntp' does not exist"):
        read_tntp(write(trips=None, name="Bare"))
    with pytest.raises(DataError, match="does not exist; point `path`"):
        read_tntp(tmp_path / "none")
    with pytest.raises(DataError, match=r"not named …_net\.tntp"):
        read_tntp(tmp_path / "Tiny" / "Tiny_trips.tntp")
    with pytest.raises(DataError, match=r"holds 0 files named …_net.tntp"):
        read_tntp(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    folder = write(Tiny_node__tntp="1 0 1\n2 3 4\n3 5 6\n", Tiny_flow__tntp=FLOW)
    for file in folder.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    network = read_tntp(folder)
    assert network.coordinates == {1: (0.0, 1.0), 2: (3.0, 4.0), 3: (5.0, 6.0)}
    assert read_tntp_flow(folder, network)[0].tolist() == [5.0, 5.0, 2.5]
    (folder / "Tiny_node.tntp").unlink()
    text = points((i, [i, 2]) for i in (1, 2, 3))
    (folder / "any.geojson").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_tntp(folder).coordinates[3] == (3.0, 2.0)


def test_utf_16_is_said_so(write):
    folder = write()
    (folder / "Tiny_net.tntp").write_bytes(NET.encode("utf-16"))
    with pytest.raises(DataError, match=r"Tiny_net.tntp' line 1 has NUL bytes, as UTF-16 has"):
        read_tntp(folder)
    (folder / "Tiny_net.tntp").write_text(NET.replace("10.5", "1\x005"))
    with pytest.raises(DataError, match=r"Tiny_net.tntp' line 9 has NUL bytes"):
        read_tntp(folder)


def test_comments_after_metadata(write):
    net = NET.replace("ZONES> 2", "ZONES> 2 ~ both").replace("THRU NODE> 1", "THRU NODE> 1~all")
    assert read_tntp(write(net, TRIPS.replace("FLOW> 7.5", "FLOW> 7.5 ~ sum"))).zones == 2


@pytest.mark.parametrize("file", ["Tiny_net.tntp", "Tiny_trips.tntp", "any.geojson"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(write, file, kind):
    folder = write(any__geojson=points((i, [i, 2]) for i in (1, 2, 3)))
    (folder / file).unlink()
    if kind == "pipe":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"{file}' is a device, a pipe or a folder"):
        read_tntp(folder)


@pytest.mark.parametrize("file", ["Tiny_net.tntp", "Tiny_trips.tntp", "any.geojson"])
def test_no_more_is_read_than_a_file_may_hold(write, monkeypatch, file):
    monkeypatch.setattr(MODULE, "_MAX_BYTES", 1 << 20)
    folder = write(any__geojson=points((i, [i, 2]) for i in (1, 2, 3)))
    with (folder / file).open("ab") as end:
        end.truncate(1 << 30)
    with pytest.raises(DataError, match=rf"{file}' holds more than 1 MiB"):
        read_tntp(folder)


def test_names_that_are_too_long_for_a_file(write, tmp_path):
    folder = write()
    for read in (
        lambda: tntp("a" * 300, tmp_path),
        lambda: tntp("Tiny", "b" * 5000),
        lambda: read_tntp("b" * 5000),
        lambda: read_tntp(f"{'a' * 300}_net.tntp"),
        lambda: read_tntp(folder, trips="b" * 5000),
        lambda: read_tntp(folder, nodes="a" * 300),
        lambda: read_tntp_flow("b" * 5000, read_tntp(folder)),
    ):
        with pytest.raises(DataError):
            read()
    # One letter more than `_net.tntp` has is one too many for `_node.tntp`.
    (folder / "Tiny_net.tntp").rename(folder / f"{'c' * 246}_net.tntp")
    assert read_tntp(folder, trips=folder / "Tiny_trips.tntp").links == 3


@given(st.binary(max_size=60), st.integers(0, len(NET)))
def test_damage_is_an_error_of_data_or_none(tmp_path_factory, damage, at):
    folder = tmp_path_factory.mktemp("damaged")
    text = NET.encode()
    (folder / "x_net.tntp").write_bytes(text[:at] + damage + text[at + len(damage) :])
    (folder / "x_trips.tntp").write_text(TRIPS)
    with contextlib.suppress(DataError):
        read_tntp(folder)


@given(st.integers(0, len(NET) - 3))
def test_a_network_cut_short_is_noticed(tmp_path_factory, at):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "x_net.tntp").write_text(NET[:at])
    (folder / "x_trips.tntp").write_text(TRIPS)
    with pytest.raises(DataError):
        read_tntp(folder)


def test_flows(write):
    folder = write(Tiny_flow__tntp="From \tTo \tVolume \tCost \n" + FLOW)
    network = read_tntp(folder)
    flow, cost = read_tntp_flow(folder, network)
    assert flow.tolist() == [5.0, 5.0, 2.5]
    assert cost.tolist() == [5.5, 6.5, 7.25]
    path = folder / "Tiny_flow.tntp"
    for text, finding in (
        ("1 3 5 5.5\n", "ends without the link 3 → 2 and 1 others"),
        ("1 3 5\n", "line 1 has 3 columns of the 4"),
        ("1 2 5 5.5\n", "line 1 has the link 1 → 2, which the network lacks"),
        ("1 3 5 5.5\n1 3 5 5.5\n", "line 2 has the link 1 → 3 for the second time"),
        ("1 3 x 5.5\n", "line 1 has 'x' for the volume"),
        ("1 3 -5 5.5\n", "line 1 has '-5' for the volume, which is negative"),
        (FLOW.replace("1 3", "l 3"), "line 2 has 'l' for a node, which is no whole number"),
        (FLOW + "From To Volume Cost\n", "line 4 has 'From' for a node"),
        (FLOW + "<END OF METADATA>\n", "line 4 has 3 columns of the 4"),
        (FLOW.replace("7.25", "7.25 8"), "line 3 has 5 columns, but line 1 has 4"),
        (FLOW[:-2], "line 3 does not end in a newline, so its last number may be cut off"),
        (FLOW[:-1], "line 3 does not end in a newline"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=finding):
            read_tntp_flow(folder, network)


def test_flows_that_end_in_a_semicolon_need_no_newline(write):
    folder = write(Tiny_flow__tntp="~ from to volume cost\n" + FLOW.replace("\n", " ;\n")[:-1])
    assert read_tntp_flow(folder, read_tntp(folder))[1].tolist() == [5.5, 6.5, 7.25]


@given(st.integers(0, len(FLOW) - 1))
def test_flows_cut_short_are_noticed(tmp_path_factory, at):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "x_net.tntp").write_text(NET)
    (folder / "x_trips.tntp").write_text(TRIPS)
    (folder / "x_flow.tntp").write_text(FLOW[:at])
    with pytest.raises(DataError):
        read_tntp_flow(folder, read_tntp(folder))


def test_networks_are_found_by_name(write, tmp_path, monkeypatch):
    folder = write()
    assert tntp("Tiny", tmp_path).links == 3
    assert tntp("Tiny", folder).links == 3
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert tntp("Tiny").links == 3
    (tmp_path / "transportation").mkdir()
    os.rename(folder, tmp_path / "transportation" / "Tiny")
    assert tntp("Tiny").links == 3
    with pytest.raises(DataError, match=r"holds neither .* networks there: Tiny"):
        tntp("Atlantis")
    for name in ("../Tiny", "", ".."):
        with pytest.raises(DataError, match="plain folder name"):
            tntp(name)


@pytest.mark.parametrize(
    ("name", "nodes", "links", "pairs", "total", "first"),
    [
        ("SiouxFalls", 24, 76, 528, 360_600.0, 1),
        ("Anaheim", 416, 914, 1_406, 104_694.4, 39),
        ("Braess-Example", 4, 5, 1, 6.0, 1),
    ],
)
def test_real_files(real_data, name, nodes, links, pairs, total, first):
    try:
        network = tntp(name, real_data)
    except DataError as error:
        if "holds neither" in str(error):
            pytest.skip(str(error))
        raise
    assert (network.nodes, network.links, len(network.pairs)) == (nodes, links, pairs)
    assert network.demand.sum().item() == pytest.approx(total)
    assert network.first_through == first
    assert network.demand.dtype == torch.float64
    assert name == "Braess-Example" or len(network.coordinates) == nodes
    if name != "Braess-Example":  # which comes without
        flow, _ = read_tntp_flow(next(real_data.glob(f"**/{name}_flow.tntp")), network)
        assert flow.min() >= 0
