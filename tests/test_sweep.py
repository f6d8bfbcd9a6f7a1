"""Sweeps: what is run when, and the table, with a stub for the commands; then the command."""

import csv
import itertools
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from masm_jax import commands, compare, config_file, runtime
from masm_jax import config as config_lib
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.evaluation import mosaics, pictures, tables
from masm_jax.locks import Lock
from masm_jax.models.mosaic import offsets
from masm_jax.state import Network
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
    config_lib.save(config, flags["workdir"])
    lines = [{"step": step, "time/steps_per_s": 0.5, "train/keep/level1": 0.8} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def evaluated(flags, folder):
    """What eval.py leaves."""
    config = config_lib.to_dict(config_lib.load(folder))
    summary = {"step": config["total_steps"], "split": flags["split"], "failed": {}}
    summary |= {key: config[key] for key in ("infer", "evaluation")} | {"trained_on": []}
    output, row = pathlib.Path(flags["output"]), folder.parent.name
    tables.write_summary_json(output / "summary.json", summary)
    gain = config["seed"] * (0.3 if row == "gate" else 0.1)
    tables.write_metrics_csv(output / "metrics.csv", [
        {"case": case, "region": region, "dice": dice + gain}
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
    for name in ("differences.png", "keep.png"):
        assert (sweep.out / name).read_bytes().startswith(b"\x89PNG")


def test_only_seeds_and_cases_of_both_are_paired():
    def table(**dice):
        return {(case, "WT"): {"dice": value} for case, value in dice.items()}

    first = {0: table(a=0.1, b=0.2), 1: table(a=0.5, b=0.5)}
    other = {1: table(a=0.6, b=0.4, c=0.9), 2: table(a=1.0, b=1.0)}
    (row,) = report.difference(first, other).values()
    assert row["difference"] == pytest.approx(0) and (row["seeds"], row["cases"]) == (1, 2)
    assert (row["low"], row["high"]) == pytest.approx((-0.1, 0.1))
    assert report.difference(first, {2: other[2]}) is None


def test_the_interval_is_that_of_all_draws():
    """Two seeds, three cases: all 4 x 27 draws, which are equally likely, are written out."""
    differences = np.array([[0.1, 0.3, -0.2], [0.0, 0.4, 0.3]])
    means = [
        differences[np.ix_(seeds, cases)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for cases in itertools.product(range(3), repeat=3)
    ]
    row = compare.crossed(differences)
    assert row["difference"] == pytest.approx(0.15)
    expected = np.percentile(means, [2.5, 97.5], method="nearest")
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.04)
    # With one seed it is the interval over cases that compare.compare gives.
    a = {(case, "WT"): {"dice": 0.0} for case in "abc"}
    b = {(case, "WT"): {"dice": value} for case, value in zip("abc", differences[0])}
    (alone,) = compare.compare(a, b, ["dice"])
    row = compare.crossed(differences[:1])
    assert (row["low"], row["high"]) == pytest.approx((alone["low"], alone["high"]), abs=0.02)
    row = compare.crossed([[0.2]])
    assert (row["difference"], row["low"], row["high"]) == (0.2, None, None)


def test_the_interval_knows_of_the_seeds():
    """No difference, equal spreads: over cases alone the interval misses 0 far more often."""
    draw = np.random.default_rng(0)
    misses = np.zeros(2)
    for _ in range(120):
        spread = draw.normal(size=(3, 1)) + draw.normal(size=(1, 8)) + draw.normal(size=(3, 8))
        for place, differences in enumerate((spread, spread.mean(0, keepdims=True))):
            row = compare.crossed(differences)
            misses[place] += not row["low"] <= 0 <= row["high"]
    assert misses[0] < 0.2 * 120 < misses[1]


def test_what_the_masks_would_save(make_config):
    """Of level 3 at half of the tokens: projections, MLP, and two products of N x N."""
    config = make_config(patch=32)
    full = cost.costs(config, MODALITIES, REGIONS, {"level3": 1.0})
    assert full["avoidable_gmac"] == 0 and full["gmac"] > 0
    half = cost.costs(config, MODALITIES, REGIONS, {"level1": 1.0, "level3": 0.5})
    tokens, kept, width = 2 * 4**3, 4**3, 64  # of a pair: two modalities of 4x4x4
    saved = (tokens - kept) * (4 + 2 * 2) * width**2 + 2 * (tokens**2 - kept**2) * width
    assert half["avoidable_gmac"] == pytest.approx(2 * saved / 1e9)
    assert half["gmac"] == full["gmac"]
    assert cost.costs(config, MODALITIES, REGIONS, {})["avoidable_gmac"] is None


def test_the_last_keep_ratios_are_read(tmp_path):
    lines = [{"step": 1, "val/keep/level1": 0.9}, {"step": 2, "val/keep/level1": 0.7, "x": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cost.last(tmp_path / "metrics.jsonl", cost.KEPT) == {"level1": 0.7}
    assert cost.last(tmp_path / "metrics.jsonl", cost.DRAWN) == {}


# ---------------------------------------------------------------- pictures


def test_keep_ratios_are_averaged_over_seeds(tmp_path):
    files = []
    for seed, keeps in enumerate(({1: 0.9, 2: 0.5}, {1: 0.7, 2: 0.3, 3: 0.1})):
        files.append(tmp_path / f"{seed}.jsonl")
        lines = [json.dumps({"step": s, "train/keep/level1": k}) for s, k in keeps.items()]
        files[-1].write_text("\n".join(lines))
    series = pictures._averaged([pictures._read_series(file) for file in files])
    assert series["train/keep/level1"] == pytest.approx({1: 0.8, 2: 0.4})
    path = tmp_path / "keep.png"
    assert pictures.keep_ratios(path, {"a": files, "b": files[:1]}) and path.is_file()
    files[0].write_text('{"step": 1, "train/loss": 1}')
    assert not pictures.keep_ratios(path, {"a": files[:1]}) and not path.exists()


def test_a_learnt_mosaic_is_read_and_drawn(make_config, tmp_path):
    """A cell of 4^3 on a grid of 2^3 tokens: eight of its places are used."""
    config = make_config(**{"patch": 32, "model.mosaic": "learnt:4"})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = network.init(0)
    logits = np.zeros((4, 4, 4, 4), np.float32)
    bayer = offsets("bayer3d", (2, 2, 2), 4)
    np.put_along_axis(logits[:2, :2, :2], bayer[..., None], np.log(3), -1)
    params["mixers"]["level6"]["learnt"]["logits"] = logits
    ((level, found),) = network.learnt_mosaics(params).items()
    share = mosaics.shares(found)
    assert level == "level6" and share.shape == (2, 2, 2, 4)
    assert (share.argmax(-1) == bayer).all() and share.max() == pytest.approx(0.5)  # 3 of 6
    mosaics.draw(tmp_path / "mosaic.png", share, title=level, modalities=MODALITIES)
    with open(tmp_path / "mosaic.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["likeliest"] == "1"]
    drawn = {tuple(int(row[key]) for key in "dhw"): int(row["offset"]) for row in rows}
    assert drawn == {place: bayer[place] for place in np.ndindex(2, 2, 2)}
    assert (tmp_path / "mosaic.png").read_bytes().startswith(b"\x89PNG")
    fixed = make_config(**{"patch": 32, "model.mosaic": "bayer3d"})
    network = Network(fixed, modalities=MODALITIES, regions=REGIONS)
    assert network.learnt_mosaics(network.init(0)) == {}


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
        (["--rows=gate,other"], {}, "--rows=gate,other: other is no row of some; expected some of"),
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


@pytest.mark.parametrize("name", ["extras", "mosaics", "masks", "pairs"])
def test_the_shipped_sweeps_are_valid(name, tmp_path, monkeypatch):
    sweep = definition.load(f"configs/sweeps/{name}.py", tmp_path)
    assert sweep.seeds == (0, 1, 2) and len(sweep.rows) >= 6
    for row in sweep.rows:
        run, values = Run(row, 2), absl_flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        given = [definition.flag(key, value) for key, value in sweep.changes(run).items()]
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={sweep.base}", *given])
        values(sys.argv)  # as train.py reads them
        assert config_lib.to_dict(holder.value) == config_lib.to_dict(sweep.config(run))
        assert (holder.value.seed, holder.value.total_steps) == (2, 300)


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
