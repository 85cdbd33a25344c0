"""``bilevel reproduce`` shows a table beside the published numbers."""

import json

CHANGES = {"channels": 4, "tasks": 2, "queries": 2, "eval_tasks": 5, "steps": 2}
SMALL = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}")]


def test_a_figure_is_shown_and_written(invoke, tmp_path):
    done = invoke("reproduce", "imaml-fig2a", "--quick", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert "iMAML, CG = 5" in done.output
    assert "published" in done.output
    assert "yes CG = 5 and CG = 10 coincide" in done.output
    folder = tmp_path / "runs/imaml-fig2a-quick"
    assert {path.suffix for path in folder.glob("imaml-fig2a.*")} == {".md", ".json", ".png"}


def test_a_table_tells_of_each_run_and_of_what_was_found(invoke, tmp_path):
    command = ["reproduce", "imaml-table2", "--quick", "--rows", "no-adaptation", *SMALL]
    done = invoke(*command, "--seeds", "3,4", "--out", "here")
    # Five tasks may miss chance: the table is what is looked at here.
    assert done.exit_code in (0, 1), done.output
    assert "no adaptation · glyphs · 5-way 1-shot" in done.output
    assert "(2 seeds" in done.output
    assert "no test class was trained on" in done.output
    content = json.loads((tmp_path / "here/imaml-table2.json").read_text())
    assert content["seeds"] == [3, 4]
    assert content["checks"][0]["ok"]


def test_a_claim_that_does_not_hold_is_told_by_the_exit_status(invoke, monkeypatch):
    import bilevel.experiments.imaml_fig2a as module

    monkeypatch.setattr(module, "RECONSTRUCTION", {"MAML": {40: 2.0}})
    done = invoke("reproduce", "imaml-fig2a", "--out", "here")
    assert done.exit_code == 1
    assert "no  the reconstruction's values, within 1 %" in done.output


def test_mistakes_are_told_in_one_line(invoke):
    for options, message in (
        (["imaml-fig9"], "there is no reproduction 'imaml-fig9'; known: imaml-table2"),
        (["imaml-fig2a", "--seeds", "one"], "`--seeds` is 'one'; write whole numbers"),
        (["imaml-table2", "--set", "steps"], "`--set` is 'steps'; write key=value"),
        (["imaml-table2", "--columns", "9w"], "`columns` of imaml-table2 has no '9w'"),
        (["imaml-table3"], "BILEVEL_DATA"),
    ):
        done = invoke("reproduce", *options)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_record_names_no_folder_of_this_machine(monkeypatch):
    from bilevel.cli.reproduce import _command

    words = ["bilevel", "reproduce", "x", "--root", "/some/where", "--out=/else", "--quick"]
    monkeypatch.setattr("sys.argv", words)
    assert _command() == "bilevel reproduce x --root DIR --out=DIR --quick"
