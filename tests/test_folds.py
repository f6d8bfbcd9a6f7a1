"""The folds of a cross-validation in one table."""

import json

import pytest

from configs import masm_demo
from masm_jax import compare, folds, run_config
from masm_jax.data.records import split
from masm_jax.evaluation import tables

CASES = [f"case{i}" for i in range(7)]
DICE = dict(zip(CASES, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)))


@pytest.fixture
def runs(tmp_path):
    """Three folds, each with an evaluation of its own cases."""
    for fold in range(3):
        make(tmp_path / str(fold), fold)
    return tmp_path


def make(run, fold, *, cases=CASES, seed=0, **changes):
    run.mkdir()
    config = masm_demo.get_config()
    config.update_from_flattened_dict({"data.split": f"{fold}/3", "seed": fold} | changes)
    run_config.save(config, run)
    own = split(cases, f"{fold}/3", seed)
    (run / "split.json").write_text(json.dumps(own))
    rows = [
        {"case": case, "region": region, "dice": DICE[case], "hd95": 1.0, "empty": "neither"}
        for case in own["val"]
        for region in ("WT", "TC")
    ]
    tables.write_metrics_csv(run / "eval" / "metrics.csv", rows)
    lesions = [{"case": own["val"][0], "region": "WT", "style": "brats2025", "dice": 1.0}]
    tables.write_metrics_csv(run / "eval" / "lesions.csv", lesions)
    tables.write_summary_json(run / "eval" / "summary.json", {"failed": {}})
    return run


def gather(runs, *names):
    names = names or ("0", "1", "2")
    flags = [*(str(runs / name) for name in names), f"--output={runs / 'all'}"]
    return folds.main(flags)


def test_every_case_once_and_the_mean_over_all(runs, capsys):
    assert gather(runs) == 0
    said = capsys.readouterr().out
    assert f"fold {runs / '2'}: 2 cases" in said
    summary = json.loads((runs / "all" / "summary.json").read_text())
    assert summary["cases"] == 7
    assert summary["regions"]["WT"]["dice"]["mean"] == pytest.approx(0.4)
    rows = tables.read_csv(runs / "all" / "metrics.csv")
    assert sorted({row["case"] for row in rows}) == CASES
    assert {row["fold"] for row in rows} == {str(runs / name) for name in "012"}
    assert len(tables.read_csv(runs / "all" / "lesions.csv")) == 3
    both = compare.compare(compare.read(runs / "all"), compare.read(runs / "all"), ["dice"])
    assert [row["n"] for row in both] == [7, 7]


def test_a_fold_that_is_missing(runs, capsys):
    assert gather(runs, "0", "2") == 1
    assert "2 of 7 cases validate no fold" in capsys.readouterr().err


def test_a_case_in_two_folds(runs, capsys):
    make(runs / "3", 1, seed=1)
    assert gather(runs, "0", "1", "3") == 1
    assert "expected every case in one fold" in capsys.readouterr().err


def test_runs_that_differ_in_more_than_the_fold(runs, capsys):
    make(runs / "3", 2, **{"optim.learning_rate": 0.5})
    assert gather(runs, "0", "1", "3") == 1
    assert "optim.learning_rate: 0.003 -> 0.5" in capsys.readouterr().err


def test_other_cases(runs, capsys):
    make(runs / "3", 2, cases=CASES[:6])
    assert gather(runs, "0", "1", "3") == 1
    assert "expected the same cases" in capsys.readouterr().err


def test_a_fold_not_evaluated_or_on_other_cases(runs, capsys):
    table = runs / "1" / "eval" / "metrics.csv"
    tables.write_metrics_csv(table, tables.read_csv(runs / "2" / "eval" / "metrics.csv"))
    assert gather(runs) == 1
    assert "evaluate again with --split=val" in capsys.readouterr().err
    (runs / "1" / "eval" / "summary.json").unlink()
    assert gather(runs) == 1
    assert "evaluate the fold first: python eval.py" in capsys.readouterr().err


def test_failed_cases_are_listed_at_the_end(runs, capsys):
    path = runs / "0" / "eval"
    rows = tables.read_csv(path / "metrics.csv")
    lost = rows[0]["case"]
    tables.write_metrics_csv(path / "metrics.csv", [row for row in rows if row["case"] != lost])
    tables.write_summary_json(path / "summary.json", {"failed": {lost: "no such file"}})
    assert gather(runs) == 3
    assert f"failed: {lost}: no such file" in capsys.readouterr().err


def test_folds_evaluated_in_another_way(runs, capsys):
    tables.write_summary_json(
        runs / "1" / "eval" / "summary.json", {"failed": {}, "checkpoint": "best"}
    )
    assert gather(runs) == 1
    assert "expected folds evaluated alike" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(runs, capsys):
    (runs / "all").write_text("")
    assert gather(runs) == 1
    assert f"{runs / 'all'} is a file; name a folder" in capsys.readouterr().err
    (runs / "all").unlink()
    (runs / "all" / "summary.json").mkdir(parents=True)
    assert gather(runs) == 1
    said = capsys.readouterr().err
    assert said.startswith("folds: ") and said.count("\n") == 1 and "name a file" in said
