"""Sweeps: what is run when, and the table, with a stub for the commands; then the command."""

import csv
import json
import pathlib
import subprocess
import sys
import types

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from masm_jax import commands, config_file, run_config, runtime
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.evaluation import tables
from masm_jax.locks import Lock
from masm_jax.sweep import __main__ as sweep_lib
from masm_jax.sweep import cost, definition, report
from masm_jax.sweep.definition import Run
from tests.conftest import CASES

ROWS = {"plain": {}, "gate": {"model.shift_extras": ("gate",)}, "late": {"model.mixers": ()}}
COMMON = {"total_steps": 4, "patch": 16, "optim.warmup_steps": 1, "data.split": "holdout:c2"}
FIGURES = report._figures
DICE = {  # case -> row -> Dice of the regions; 0.1 better with seed 1, of "gate" 0.3
    "c0": {"plain": (0.5, 0.3), "gate": (0.6, 0.4), "late": (0.5, 0.1)},
    "c1": {"plain": (0.7, 0.1), "gate": (0.7, 0.4), "late": (0.2, 0.0)},
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Writes a sweep file and starts the command on it: sweep("--flag", **changes of the file)."""
    records = types.SimpleNamespace(
        cases=["c0", "c1", "c2"], modalities=MODALITIES, regions=REGIONS, spacing=None, pairs=()
    )
    monkeypatch.setattr(definition.records_lib, "Records", lambda place: records)
    file = tmp_path / "some.py"

    def start(*flags, **changes):
        said = {"config": "configs/masm_demo.py", "common": COMMON, "rows": ROWS, "seeds": (0, 1)}
        said |= {"split": "val"} | changes
        file.write_text(f"def get_sweep():\n    return {said!r}\n")
        return sweep_lib.main([f"--config={file}", f"--workdir={tmp_path / 'out'}", *flags])

    start.out, start.load = tmp_path / "out", lambda: definition.load(file, tmp_path / "out")
    return start


@pytest.fixture
def runner(monkeypatch):
    """Stands for train.py and eval.py; its list has (command, run) of every call."""
    calls = []

    def python(words, folder, stop, started):
        command, *flags = words
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        run = f"{folder.parent.name} {folder.name}"
        calls.append((pathlib.Path(command).name, run))
        if calls[-1] == calls.fails:
            raise RuntimeError("train.py ended with code 1: on purpose")
        if calls[-1] == calls.stops:
            raise commands.Stopped
        {"train.py": trained, "eval.py": evaluated}[calls[-1][0]](flags, folder)

    class Calls(list):
        fails = stops = None

    calls = Calls()
    monkeypatch.setattr(commands, "python", python)
    monkeypatch.setattr(cost, "write", costed)
    monkeypatch.setattr(report, "_figures", lambda *_: None)  # a second each
    return calls


def trained(flags, folder):
    """What train.py leaves."""
    given = [f"{key.removeprefix('config.')}={value}" for key, value in flags.items()
             if key.startswith("config.")]  # fmt: skip
    config = config_file.load_config(flags["config"], given)
    run_config.save(config, flags["workdir"])
    lines = [{"step": step, "time/steps_per_s": 0.5, "train/keep/level1": 0.8} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def evaluated(flags, folder):
    """What eval.py leaves."""
    config = run_config.to_dict(run_config.load(folder))
    summary = {"step": config["total_steps"], "split": flags["split"], "failed": {}}
    summary |= {key: config[key] for key in ("infer", "evaluation")} | {"trained_on": []}
    output, row = pathlib.Path(flags["output"]), folder.parent.name
    tables.write_summary_json(output / "summary.json", summary)
    gain = config["seed"] * (0.3 if row == "gate" else 0.1)
    tables.write_metrics_csv(output / "metrics.csv", [
        {"case": case, "region": region, "dice": dice + gain, "reference_ml": 7 * (case == "c0")}
        for case, rows in DICE.items() for region, dice in zip(("WT", "TC"), rows[row])
    ])  # fmt: skip


def costed(folder):
    """What a run costs: as a network with one level that keeps 0.9."""
    kept = {} if folder.parent.name == "late" else {"level1": 0.9}
    found = {"parameters": 2_000_000, "gmac": 1.5, "avoidable_gmac": 0.25 if kept else None}
    (folder / "cost.json").write_text(json.dumps(found | {"kept": kept, "drawn": kept}))


def both(*runs):
    """The calls of these runs."""
    return [(command, run) for run in runs for command in ("train.py", "eval.py")]


# ---------------------------------------------------------------- what is run


def test_seed_by_seed_and_nothing_twice(sweep, runner, capsys):
    assert sweep() == 0
    rows = [f"{row} seed-{seed}" for seed in (0, 1) for row in ROWS]
    assert runner == both(*rows)
    saved = json.loads((sweep.out / "gate" / "seed-1" / "config.json").read_text())
    assert (saved["seed"], saved["total_steps"]) == (1, 4)
    assert saved["model"]["shift_extras"] == ["gate"]
    assert not list(sweep.out.glob("*/*/sweep.lock"))
    said = capsys.readouterr().out
    assert "1/6 plain seed 0: Dice WT 0.600  TC 0.200  mean 0.400" in said and "left about" in said
    runner.clear()
    assert sweep() == 0 and not runner
    assert capsys.readouterr().out.count("done before") == 6


def test_rows_can_be_chosen(sweep, runner):
    assert sweep("--rows=late,gate") == 0
    assert runner == both("gate seed-0", "late seed-0", "gate seed-1", "late seed-1")
    summary = json.loads((sweep.out / "summary.json").read_text())
    assert list(summary["rows"]) == ["gate", "late"]  # the first is not done: no differences
    assert summary["rows"]["gate"]["difference"] is None


def test_seeds_can_be_chosen(sweep, runner):
    assert sweep("--rows=gate", "--seeds=1") == 0
    assert runner == both("gate seed-1")


def test_a_failed_run_is_passed_and_tried_again(sweep, runner, capsys):
    runner.fails = ("train.py", "gate seed-0")
    assert sweep() == runtime.EXIT_SOME_FAILED
    assert len(runner) == 11 and runner[-2:] == both("late seed-1")
    said = capsys.readouterr()
    assert "sweep: 1 failed, said above: gate seed 0" in said.err
    assert "failed: gate seed 0: train.py ended with code 1" in (sweep.out / "table.md").read_text()
    runner.clear()
    runner.fails = None
    assert sweep() == 0 and runner == both("gate seed-0")
    assert "failed:" not in (sweep.out / "table.md").read_text()


def test_a_failure_of_another_process_is_not_repeated(sweep, runner, monkeypatch):
    folder = sweep.out / "gate" / "seed-0"
    folder.mkdir(parents=True)
    noted = {"reason": "it did not learn", "time": 1e12}  # after this one began
    (folder / "failed.json").write_text(json.dumps(noted))
    assert sweep() == runtime.EXIT_SOME_FAILED
    assert not any(run == "gate seed-0" for _, run in runner) and len(runner) == 10


def test_a_signal_ends_it_and_it_goes_on(sweep, runner, capsys):
    runner.stops = ("eval.py", "late seed-0")
    assert sweep() == runtime.EXIT_STOPPED
    assert runner[-1] == runner.stops and "the same command goes on" in capsys.readouterr().out
    assert not list(sweep.out.glob("*/*/sweep.lock"))
    runner.clear()
    runner.stops = None
    assert sweep() == 0 and runner[:2] == both("late seed-0") and len(runner) == 8


def test_what_another_process_does_is_left_to_it(sweep, runner, capsys):
    folder = sweep.out / "gate" / "seed-0"
    lock = Lock(folder / "sweep.lock")
    assert lock.take() is None
    assert sweep() == 0
    assert "gate seed 0: left to process" in capsys.readouterr().out
    assert ("train.py", "gate seed-0") not in runner and len(runner) == 10
    gone = subprocess.Popen(["true"])
    gone.wait()
    content = json.loads((folder / "sweep.lock").read_text())
    content["processes"] = [{"pid": gone.pid, "began": 1}]
    (folder / "sweep.lock").write_text(json.dumps(content))
    runner.clear()
    assert sweep() == 0 and runner == both("gate seed-0")


def test_other_rules_of_segmenting_are_evaluated_again(sweep, runner):
    sweep()
    runner.clear()
    assert sweep(common=COMMON | {"infer.overlap": 0.25}, rows={"plain": {}}) == 0
    assert runner == both("plain seed-0", "plain seed-1")


def test_another_config_is_refused(sweep, runner, capsys):
    sweep()
    runner.clear()
    for flags in ((), ("--report",)):
        rows = ROWS | {"gate": {"model.shift_extras": ("channel",)}}
        assert sweep(*flags, rows=rows) == 1 and not runner
        said = capsys.readouterr().err
        assert "gate seed 0: model.shift_extras: ['gate'] -> ['channel']" in said
        assert "plain seed" not in said and "choose another --workdir" in said


# ---------------------------------------------------------------- the table


def test_the_table_by_hand(sweep, runner, capsys, monkeypatch):
    sweep()
    monkeypatch.setattr(report, "_figures", FIGURES)
    capsys.readouterr()
    (sweep.out / "table.csv").unlink()
    runner.clear()
    assert sweep("--report") == 0 and not runner
    assert "| plain | 2 |" in capsys.readouterr().out
    with open(sweep.out / "table.csv", newline="") as file:
        plain, gate, late = csv.DictReader(file)
    # Seed 0: (0.5 + 0.7) / 2 and (0.3 + 0.1) / 2; seed 1 is 0.1 better.
    assert float(plain["dice_WT"]) == pytest.approx(0.65)
    assert float(plain["dice_TC"]) == pytest.approx(0.25)
    assert float(plain["dice_mean"]) == pytest.approx(0.45)
    assert plain["difference_mean"] == ""
    # gate - plain: WT 0.1, 0.0 and TC 0.1, 0.3 with seed 0, 0.2 more with seed 1.
    assert float(gate["difference_WT"]) == pytest.approx(0.05 + 0.1)
    assert float(gate["difference_TC"]) == pytest.approx(0.20 + 0.1)
    assert float(gate["difference_mean"]) == pytest.approx(0.225)
    # Extremes: the one case (0.1) of seed 0 alone, the other (0.15) of seed 1 alone (+ 0.2).
    assert float(gate["low_mean"]) == pytest.approx(0.1)
    assert float(gate["high_mean"]) == pytest.approx(0.35)
    assert (gate["paired_seeds"], gate["paired_cases"]) == ("2", "2")
    assert (float(gate["seconds_per_step"]), gate["steps"]) == (2.0, "4")
    assert float(gate["kept_level1"]) == 0.9 and float(gate["avoidable_gmac"]) == 0.25
    assert late["kept_level1"] == late["avoidable_gmac"] == ""
    text = (sweep.out / "table.md").read_text()
    row = "| gate | 2 | 0.800 | 0.550 | 0.675 | 0.525, 0.825 | +0.225 [+0.100, +0.350] | 4 |"
    assert row in text
    # c1 has no tumour; its one Dice of 1 is that of gate, seed 1. c0: 0.6, 0.4, in seed 1 0.3 more.
    assert "Cases without WT count 1 or 0; left empty: plain 0 of 2, gate 1 of 2, late" in text
    assert "gate 0.750" in text and "gate 0.550" in text  # WT and TC of c0
    for name in ("differences.png", "keep.png"):
        assert (sweep.out / name).read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- errors, before anything runs


@pytest.mark.parametrize(
    "flags, changes, words",
    [
        ([], {"config": "configs/absent.py"}, "config 'configs/absent.py': no such file"),
        ([], {"seeds": (0, 0)}, "seeds (0, 0): expected whole numbers, each once"),
        ([], {"seeds": ()}, "seeds (): expected whole numbers"),
        ([], {"rows": {}}, "rows: expected one or more"),
        ([], {"rows": {"a/b": {}}}, "row 'a/b': expected letters, digits"),
        ([], {"rows": {"a": {"model.mosiac": "none"}}}, "some, row a: Key mosiac does not exist"),
        ([], {"rows": {"a": {"total_steps": "x"}}}, "some, row a: Could not override field"),
        ([], {"rows": {"a": {"model.mosaic": "x"}}}, "row a: config.model.mosaic='x': expected"),
        ([], {"rows": {"a": {"seed": 3}}}, "a sets seed: seeds says them"),
        ([], {"rows": {"a": {"data.split": "0/2"}}}, "a sets data.split: rows are paired by case"),
        ([], {"common": {"stop_at_step": 3}}, "common sets stop_at_step"),
        ([], {"rows": {"a": {}, "b": {}}}, "rows a and b have the same config"),
        ([], {"rows": {"a": {"model.pairs": (("t1", "pd"),)}}}, "row a: config.model.pairs names"),
        ([], {"common": {"data.split": "holdout:x"}}, "holdout:x"),
        ([], {"more": 1}, "get_sweep() gives config, common, rows, seeds, split, more; expected"),
        (["--rows=gate,other"], {}, "other is not known; expected some of plain, gate, late"),
        (["--seeds=1,2"], {}, "--seeds=1,2: 2 is not known; expected some of 0, 1"),
        (["--set=model.shift_extras=()"], {}, "--set model.shift_extras: row gate of"),
        (["--set=total_stepz=3"], {}, "total_stepz does not exist"),
        (["--set=total_steps"], {}, "--set total_steps: expected KEY=VALUE"),
    ],
)
def test_an_error_is_said_before_anything_runs(sweep, runner, capsys, flags, changes, words):
    assert sweep(*flags, **changes) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not runner


def test_a_file_that_is_no_sweep(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def get_sweep(:\n")
    for path, words in (
        (tmp_path / "absent.py", "no such file; expected such as configs/sweeps/extras.py"),
        ("configs/masm_demo.py", "it has no function get_sweep()"),
        (tmp_path / "broken.py", "SyntaxError"),
    ):
        assert sweep_lib.main([f"--config={path}", f"--workdir={tmp_path / 'out'}"]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_is_helpful(capsys):
    with pytest.raises(SystemExit):
        sweep_lib.main(["--help"])
    said = capsys.readouterr().out
    assert "get_sweep()" in said and "--dry_run" in said and "75 stopped" in said


SHIPPED = {
    "backbones": 8, "extras": 8, "masks": 13, "missing": 4, "missing_brats": 4, "mosaics": 11,
    "pairs": 6, "sizes": 6, "sizes_brats": 6,
}  # fmt: skip


def test_all_shipped_sweeps_are_tested():
    files = pathlib.Path("configs/sweeps").glob("[!_]*.py")
    assert {file.stem for file in files} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_sweeps_are_valid(name, tmp_path, monkeypatch):
    sweep = definition.load(f"configs/sweeps/{name}.py", tmp_path)
    assert sweep.seeds == (0, 1, 2) and len(sweep.rows) == SHIPPED[name]
    for row in sweep.rows:
        run, values = Run(row, 2), absl_flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        given = [definition.flag(key, value) for key, value in sweep.changes(run).items()]
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={sweep.base}", *given])
        values(sys.argv)  # as train.py reads them
        assert run_config.to_dict(holder.value) == run_config.to_dict(sweep.config(run))
        steps = 400 if name.endswith("_brats") else 300
        assert (holder.value.seed, holder.value.total_steps) == (2, steps)


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_from_records_to_a_table(command, records, tmp_path):
    """One run of a U-Net: the real commands."""
    common = {
        "total_steps": 2, "patch": 16, "log.every": 1, "augment": "none", "log.patch_every": 0,
        "log.volume_every": 0, "optim.warmup_steps": 1, "data.records": str(records),
        "data.split": f"holdout:{CASES[3]}", "infer.overlap": 0.0, "infer.batch": 64,
    }  # fmt: skip
    said = {"config": "configs/masm_demo.py", "common": common, "seeds": (0,), "split": "val"}
    said["rows"] = {"unet": {"model.mixers": ()}}
    (tmp_path / "some.py").write_text(f"def get_sweep():\n    return {said!r}\n")
    words = ["-m", "masm_jax.sweep", f"--config={tmp_path / 'some.py'}"]
    result = command(*words, f"--workdir={tmp_path / 'out'}")
    assert "1/1 unet seed 0: Dice WT" in result.stdout
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]["unet"]
    assert (found["steps"], found["cases"], found["kept"]) == (2, 1, {})
    assert found["avoidable_gmac"] is None and found["seconds_per_step"] > 0
