"""Reproductions write a table, JSON and a picture, and go on where they were stopped."""

import json

import pytest
import torch

from bilevel.experiments import REPRODUCTIONS, Check, Options, Table
from bilevel.experiments.imaml_fig2a import (
    PUBLISHED,
    hypergradient_error,
    random_quadratic,
)
from bilevel.run_folder import RunFolderError
from bilevel.solvers import ImplicitCG, Unrolled

SMALL = {"channels": 4, "tasks": 2, "queries": 2, "eval_tasks": 5, "steps": 2}


def options(tmp_path, **given):
    settings = {"out": tmp_path / "out", "quick": True, "threads": 1, "command": "bilevel x"}
    return Options(**{**settings, **given})


def test_names_and_sources():
    assert list(REPRODUCTIONS)[:4] == ["imaml-table2", "imaml-table3", "imaml-fig2a", "imaml-fig2b"]
    for name, one in REPRODUCTIONS.items():
        assert one.name == name
        assert one.title
        assert one.source
        assert type(one).__doc__


# Figure 2a


def test_figure_2a_confirms_every_claim(tmp_path, watcher):
    outcome = REPRODUCTIONS["imaml-fig2a"].run(options(tmp_path), watcher)
    assert all(check.ok for check in outcome.checks), [str(check) for check in outcome.checks]
    assert len(outcome.checks) == 9
    written = {path.name for path in (tmp_path / "out").glob("imaml-fig2a.*")}
    assert written == {"imaml-fig2a.json", "imaml-fig2a.md", "imaml-fig2a.png"}
    content = json.loads((tmp_path / "out/imaml-fig2a.json").read_text())
    assert content["command"] == "bilevel x"
    assert all(check["ok"] for check in content["checks"])
    references = [row for row in content["rows"] if "reference" in row]
    assert len(references) == sum(len(points) for points in PUBLISHED.values())


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_per_mode_an_error_of_imaml_is_twice_that_of_maml(seed):
    """On one eigenvalue exactly: MAML's error is 2x + x²."""
    A, c = random_quadratic(seed)
    A, c = A[:1, :1].abs(), c[:1]
    settings = {"strength": 1.0, "lr": 0.05, "steps": 12}
    x = hypergradient_error(A, c, ImplicitCG(max_steps=1, rtol=0.0), **settings)
    maml = hypergradient_error(A, c, Unrolled(), **settings)
    assert maml == pytest.approx(2 * x + x**2, rel=1e-9)


# Figure 2b


def test_figure_2b_measures_what_it_says(tmp_path, watcher, monkeypatch):
    import bilevel.experiments.imaml_fig2b as module

    job = module._job
    monkeypatch.setattr(module, "_job", lambda ways, shots, channels, given: job(2, 2, 4, given))
    outcome = REPRODUCTIONS["imaml-fig2b"].run(options(tmp_path), watcher)
    claims = {check.claim.split(",")[0]: check for check in outcome.checks}
    # Memory does not depend on the machine; time on one that is busy may.
    assert claims["iMAML's memory is constant over inner and CG steps"].ok
    assert claims["MAML's memory is a line in inner steps"].ok
    assert (tmp_path / "out/imaml-fig2b.png").exists()
    seconds = [row.value for row in outcome.rows if row.metric == "seconds"]
    assert len(seconds) == 5 * 7
    assert min(seconds) > 0


# Tables of accuracies


def table(tmp_path, watcher, name="imaml-table2", **given):
    chosen = options(tmp_path, changes=SMALL, **given)
    return REPRODUCTIONS[name].run(chosen, watcher)


def test_a_table_is_filled_in_several_sittings(tmp_path, watchers):
    rows = ("imaml", "fomaml", "no-adaptation")
    first = table(tmp_path, watchers(), rows=rows[:1], seeds=(0,))
    assert [row.setting["learner"] for row in first.rows if "seed" not in row.setting] == ["imaml"]
    second = watchers()
    outcome = table(tmp_path, second, rows=rows, seeds=(0, 1))
    # What was finished is not run again: five of six cells are.
    assert len(second.results) == 5
    assert outcome.finished
    named = {line[0]: line[1] for line in outcome.table.body}
    assert "2 seeds" in named["iMAML"]
    assert "no adaptation" in named
    assert outcome.table.head == ("glyphs, accuracy in %", "5w1s")
    third = watchers()
    again = table(tmp_path, third, rows=("imaml",), seeds=(0,))
    assert not third.results
    # All that is finished in the folder is shown, whoever asked for it.
    assert again.table == outcome.table


def test_an_interrupted_table_goes_on(tmp_path, watchers):
    stopping = watchers()
    stopping.stop_after = 1
    first = table(tmp_path, stopping, rows=("imaml", "maml"))
    assert not first.finished
    assert not first.rows
    second = table(tmp_path, watchers(), rows=("imaml", "maml"))
    assert second.finished
    steps = (tmp_path / "out/cells/imaml-5w1s-seed0/metrics.jsonl").read_text().count("\n")
    assert steps == 2


def test_other_settings_are_not_mixed_in(tmp_path, watchers):
    table(tmp_path, watchers(), rows=("imaml",))
    with pytest.raises(ValueError, match="has steps = 2, not 3"):
        REPRODUCTIONS["imaml-table2"].run(
            options(tmp_path, rows=("imaml",), changes={**SMALL, "steps": 3}), watchers()
        )


def test_a_learner_stays_what_it_is(tmp_path, watchers):
    table(tmp_path, watchers(), rows=("scratch", "no-adaptation"))
    cells = tmp_path / "out/cells"
    scratch = json.loads((cells / "scratch-5w1s-seed0/config.json").read_text())["settings"]
    assert scratch["steps"] == 0
    assert scratch["channels"] == 4
    outcome = table(tmp_path, watchers(), rows=("no-adaptation",))
    chance = [check for check in outcome.checks if "chance" in check.claim]
    assert len(chance) == 1


def test_published_numbers_stand_beside_measured_ones_on_the_same_data_only(tmp_path, watchers):
    reproduction = REPRODUCTIONS["imaml-table2"]
    assert reproduction.published["imaml", "5w1s"] == pytest.approx((0.9916, 0.0035))
    empty = reproduction._table({}, reproduction.columns)
    assert ("  published", "99.16 ± 0.35", "99.67 ± 0.12", "94.46 ± 0.42", "98.69 ± 0.10") in (
        empty.body
    )
    assert empty.body[0] == ("iMAML", *["not measured"] * 4)
    outcome = table(tmp_path, watchers(), rows=("imaml",))
    # These ran on glyphs.
    assert all("published" not in line[0] for line in outcome.table.body)
    assert all(not row.reference for row in outcome.rows)


def test_another_evaluation_is_made_anew_and_not_set_beside_the_published_one(tmp_path, watchers):
    table(tmp_path, watchers(), rows=("imaml",))
    path = tmp_path / "out/cells/imaml-5w1s-seed0"
    trained = (path / "metrics.jsonl").read_bytes()
    changes = {**SMALL, "eval_tasks": 7, "eval_queries": 3}
    chosen = options(tmp_path, rows=("imaml",), changes=changes)
    REPRODUCTIONS["imaml-table2"].run(chosen, watchers())
    result = json.loads((path / "result.json").read_text())
    assert result["accuracy"]["trained"]["tasks"] == 7
    # Trained once.
    assert (path / "metrics.jsonl").read_bytes() == trained
    reproduction = REPRODUCTIONS["imaml-table2"]
    entries = reproduction.entries(tmp_path / "out")
    ((key, entry),) = entries.items()
    entry.settings["data"] = "omniglot"
    assert key not in reproduction._comparable(entries)
    entry.settings["eval_queries"] = 1
    assert key in reproduction._comparable(entries)


def test_runs_that_are_no_seeds_of_one_another_are_refused(tmp_path, watchers):
    table(tmp_path, watchers(), rows=("imaml",), seeds=(0,))
    chosen = options(tmp_path, rows=("imaml",), seeds=(1,), changes={**SMALL, "steps": 3})
    with pytest.raises(RunFolderError, match=r"seed1' has steps = 3, but .*seed0' has 2"):
        REPRODUCTIONS["imaml-table2"].run(chosen, watchers())


def test_numbers_name_what_made_them(tmp_path, watchers, monkeypatch):
    table(tmp_path, watchers(), rows=("imaml",), seeds=(3,))
    # Shown again by other code, on another machine.
    monkeypatch.setattr("bilevel.experiments.results.commit", lambda: "later")
    monkeypatch.setattr("bilevel.experiments.results.processor", lambda: "other")
    path = tmp_path / "out/cells/imaml-5w1s-seed3/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "commit": "earlier"}))
    table(tmp_path, watchers(), rows=("imaml",), seeds=(3,))
    content = json.loads((tmp_path / "out/imaml-table2.json").read_text())
    assert content["commit"] == "earlier"
    assert content["seeds"] == [3]
    assert content["machine"].startswith(result["machine"]["processor"])
    assert "1 threads" in content["machine"]


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, watchers):
    changes = {**SMALL, "inner_solver": "gradient-descent", "inner_lr": 1e20, "inner_steps": 5}
    chosen = options(tmp_path, rows=("imaml", "no-adaptation"), changes=changes)
    outcome = REPRODUCTIONS["imaml-table2"].run(chosen, watchers())
    assert next(row.setting["learner"] for row in outcome.rows) == "no-adaptation"
    failed = outcome.checks[0]
    assert failed.claim == "imaml 5w1s, seed 0: training comes to its end"
    assert not failed.ok
    assert "NON_FINITE" in failed.found


def test_full_size_is_the_published_one():
    reproduction = REPRODUCTIONS["imaml-table2"]
    full = Options(out=None)
    chosen = reproduction.settings("imaml", "20w1s", 0, full)
    assert (chosen.ways, chosen.inner_steps, chosen.eval_queries) == (20, 25, 1)
    assert (chosen.channels, chosen.tasks, chosen.steps) == (64, 32, 20_000)
    assert chosen.eval_tasks == 600
    assert len(reproduction.selected(full)) == 40
    hessian_free = reproduction.settings("imaml-hessian-free", "5w5s", 0, full)
    assert hessian_free.inner_options == {"cg_steps": 5, "cg_rtol": 0.0}
    third = REPRODUCTIONS["imaml-table3"].settings("imaml", "5w1s", 0, full)
    assert (third.data, third.network, third.channels, third.inner_steps) == (
        "mini-imagenet",
        "pool",
        32,
        10,
    )


def test_published_numbers_are_those_of_the_paper():
    table = REPRODUCTIONS["imaml-table2"].published
    rows = {
        "maml": (98.7, 99.9, 95.8, 98.9),
        "fomaml": (98.3, 99.2, 89.4, 97.9),
        "reptile": (97.68, 99.48, 89.43, 97.12),
        "imaml": (99.16, 99.67, 94.46, 98.69),
        "imaml-hessian-free": (99.5, 99.74, 96.18, 99.14),
    }
    columns = ("5w1s", "5w5s", "20w1s", "20w5s")
    for row, values in rows.items():
        found = [round(100 * table[row, column][0], 2) for column in columns]
        assert found == list(values)
    assert len(table) == len(rows) * len(columns)


def test_methods_are_looked_at(tmp_path, watchers):
    rows = ("fomaml-no-norm", "imaml-no-norm")
    changes = {**SMALL, "probe_every": 1}
    outcome = REPRODUCTIONS["imaml-methods"].run(
        options(tmp_path, rows=rows, columns=("5w1s",), changes=changes), watchers()
    )
    assert outcome.table.head[0] == "learner"
    found = {row.metric for row in outcome.rows if row.setting["learner"] == "imaml-no-norm"}
    assert {"indefinite_share", "cosine_with_first_order", "solved_share"} <= found
    probes = (tmp_path / "out/cells/imaml-no-norm-5w1s-seed0/probes.jsonl").read_text()
    assert probes.count("\n") == 2 * 2


def test_strengths_are_learned_from_the_ends_only(tmp_path, watchers):
    outcome = table(tmp_path, watchers(), "imaml-strength", columns=("0.02", "0.5"))
    by_learner = {row.setting["learner"]: set() for row in outcome.rows}
    for row in outcome.rows:
        by_learner[row.setting["learner"]].add(row.setting["task"])
    assert by_learner == {
        "imaml": {"0.02", "0.5"},
        "imaml-unbounded": {"0.02"},
        "imaml-lbfgs": {"0.02", "0.5"},
        "imaml-lbfgs-unbounded": {"0.02"},
    }
    last = outcome.checks[-1]
    assert "L-BFGS: λ learned from 0.02 is within 1 point of the best" in last.claim
    # What is told is the λ that was evaluated with.
    weights = tmp_path / "out/cells/imaml-lbfgs-unbounded-0.02-seed0/weights.pt"
    kept = torch.load(weights, weights_only=True)["log_strength"].exp().item()
    assert last.found.endswith(f"λ ends at {kept:.3g}")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("imaml-table2", {"columns": ("6w1s",)}, "`columns` of imaml-table2 has no '6w1s'; known"),
        ("imaml-table2", {"rows": ("mamal",)}, "`rows` of imaml-table2 has no 'mamal'; known: im"),
        ("imaml-table2", {"changes": {"step": 1}}, "there is no setting 'step'"),
        ("imaml-fig2a", {"changes": {"steps": 1}}, "there are no settings to change"),
        ("imaml-fig2a", {"rows": ("x",)}, "`rows` of imaml-fig2a has no 'x'; known: none"),
        ("imaml-fig2a", {"seeds": (5,)}, "does not depend on `seeds`"),
        ("imaml-fig2a", {"device": "cuda"}, "does not depend on `device`"),
        ("imaml-fig2b", {"device": "banana"}, "`device` is 'banana', which cannot be used"),
        ("imaml-table2", {"changes": {"ways": 7}}, "`ways` cannot be set; choose by `columns`"),
        ("imaml-table2", {"changes": {"seed": 7}}, "`seed` cannot be set; choose by `seeds`"),
        (
            "imaml-table2",
            {"rows": ("fomaml",), "changes": {"clip": 1.0}},
            "`clip` is what makes fomaml, and cannot be set",
        ),
        ("imaml-strength", {"changes": {"strength": 1.0}}, "`strength` names the columns"),
        ("imaml-strength", {"rows": ("imaml-unbounded",), "columns": ("0.1",)}, "has no cell"),
    ],
)
def test_what_is_not_known_is_named(name, given, message, tmp_path, watcher):
    with pytest.raises(ValueError, match=message):
        REPRODUCTIONS[name].run(options(tmp_path, **given), watcher)


def test_text_forms():
    assert Table(("a", "b"), (("1", "2"),)).markdown() == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert str(Check("x", False, "1 against 2")) == "NO · x: 1 against 2"
    assert torch.get_num_threads() >= 1
