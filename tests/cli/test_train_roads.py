"""``bilevel train tolls`` and ``network-design`` leave what they promise, and fail in one line."""

import csv
import json

import pytest

FILES = ["config.json", "links.csv", "map.png", "metrics.jsonl", "result.json"]


def test_tolls_on_braess_reach_the_optimum_and_leave_their_files(invoke, tmp_path):
    done = invoke("train", "tolls", "--out", "run")
    assert done.exit_code == 0, done.output
    assert "first-best tolls on Braess" in done.output
    assert "stage 4/4 · step 0" in done.output
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"] == pytest.approx(552.0)
    assert result["after"] == pytest.approx(498.0, rel=1e-5)
    assert result["optimum"] == pytest.approx(498.0, rel=1e-5)
    with (tmp_path / "run" / "links.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["tail"], r["head"]) for r in rows][3] == ("3", "4")
    assert float(rows[3]["flow_before"]) == pytest.approx(2.0)
    assert float(rows[3]["flow_after"]) == pytest.approx(0.0, abs=1e-2)
    assert len(result["outer"]) == 5


def test_a_single_link_can_be_tolled(invoke, tmp_path):
    done = invoke("train", "tolls", "--links", "3-4", "--out", "run", "--quiet")
    assert done.exit_code == 0, done.output
    assert "stage" not in done.output.split("stages:")[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["title"] == "second-best tolls on Braess"
    # From 13 on the toll empties the link, and that is all that can be gained.
    assert result["outer"][0] > 12
    assert result["after"] == pytest.approx(498.0, rel=1e-3)


def test_a_run_folder_is_not_overwritten_unasked(invoke, tmp_path):
    assert invoke("train", "tolls", "--out", "run", "--steps", 1).exit_code == 0
    again = invoke("train", "tolls", "--out", "run", "--steps", 1)
    assert again.exit_code == 1
    assert "is not empty" in again.output
    done = invoke("train", "tolls", "--out", "run", "--steps", 1, "--overwrite")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "atlantis"], "is none of braess"),
        (["--network", "sioux-falls"], "BILEVEL_DATA is not set"),
        (["--network", "nowhere_net.tntp"], "nowhere_net.tntp"),
        (["--links", "3to4"], "`links` is '3to4'"),
        (["--links", "1-2"], "1 → 2"),
    ],
)
def test_what_cannot_be_solved_is_told_in_one_line(invoke, tmp_path, arguments, message):
    done = invoke("train", "tolls", *arguments, "--out", "run")
    assert done.exit_code in (1, 2), done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_network_design_asks_for_its_files(invoke):
    done = invoke("train", "network-design")
    assert done.exit_code in (1, 2)
    assert "BILEVEL_DATA" in done.output
    done = invoke("train", "network-design", "--variant", "Q")
    assert "`variant` is 'Q'" in done.output


NET = """<NUMBER OF ZONES> 2
<NUMBER OF NODES> 3
<FIRST THRU NODE> 1
<NUMBER OF LINKS> 3
<END OF METADATA>
~ init term capacity length fft b power speed toll type ;
1 2 1.0 1.0 1.0 1.0 1.0 0 0 1 ;
1 3 1.0 1.0 1.0 0.0 1.0 0 0 1 ;
3 2 1.0 1.0 1.0 0.0 1.0 0 0 1 ;
"""
TRIPS = """<NUMBER OF ZONES> 2
<TOTAL OD FLOW> 2.0
<END OF METADATA>
Origin 1
2 : 2.0;
"""


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_network_is_read_from_a_path(invoke, tmp_path, given):
    # Pigou's example: one road of time 1 + v, one of time 2. Half of the first at best.
    (tmp_path / "pigou").mkdir()
    (tmp_path / "pigou" / "Pigou_net.tntp").write_text(NET)
    (tmp_path / "pigou" / "Pigou_trips.tntp").write_text(TRIPS)
    path = "pigou" if given == "folder" else "pigou/Pigou_net.tntp"
    done = invoke("train", "tolls", "--network", path, "--out", "run", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"] == pytest.approx(4.0)
    assert result["optimum"] == pytest.approx(3.75)
    assert result["after"] == pytest.approx(3.75, rel=1e-4)


def test_a_malformed_file_is_told_with_its_line(invoke, tmp_path):
    (tmp_path / "Bad_net.tntp").write_text(NET.replace("3 2 1.0", "3 2 -1.0"))
    (tmp_path / "Bad_trips.tntp").write_text(TRIPS)
    done = invoke("train", "tolls", "--network", "Bad_net.tntp", "--out", "run")
    assert done.exit_code in (1, 2)
    assert "Bad_net.tntp' line 9" in done.output
    assert "Traceback" not in done.output
