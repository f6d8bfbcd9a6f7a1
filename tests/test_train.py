"""The real commands on phantoms: straight, stopped, killed, resumed, on one device and on eight."""

import csv
import json
import shutil
import signal
import subprocess
import time

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from masm_jax import checkpoint, run_config, sharding
from masm_jax.data.records import Records
from masm_jax.state import Network, abstract_state
from tests.conftest import CASES

STEPS = 6
FLAGS = (
    "--config=configs/masm_demo.py",
    f"--config.total_steps={STEPS}",
    "--config.batch_size=8",
    "--config.patch=16",
    "--config.optim.warmup_steps=2",
    "--config.model.mixers=('aware','concat','concat','concat','concat','shift')",
    "--config.model.keep_bias=0.0",
    "--config.log.every=1",
    "--config.log.patch_every=3",
    "--config.log.volume_every=6",
    "--config.log.volumes=1",
    "--config.log.checkpoint_every=4",
    "--config.infer.overlap=0.25",  # a third of the tiles
    "--config.infer.threshold=0.02",  # after six steps nothing is likelier than 0.1
)


@pytest.fixture(scope="module")
def words(records, split):
    """The command line of a run, less its folder."""
    return "train.py", *FLAGS, f"--config.data.records={records}", f"--config.data.split={split}"


@pytest.fixture(scope="module")
def train(command, words):
    """Runs train.py: train(workdir, "--more=flags", code=0)."""

    def run(workdir, *more, code=0):
        return command(*words, f"--workdir={workdir}", *more, code=code)

    return run


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """A run of six steps without a stop."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    train(workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """A run left after three of six steps."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    result = train(workdir, "--config.batch_size=7", "--cpu_devices=8", code=1)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("train.py: config.batch_size = 7: expected a multiple of 8, as the 8 de")
    # A start that failed has not made the folder its own: the right value is not "another config".
    said = train(workdir, "--config.stop_at_step=3", code=75)
    assert "saved step 3" in said.stderr and "the same command goes on" in said.stderr
    assert list(logged(workdir)) == [1, 2, 3] and saved(workdir) == [3]
    return workdir


def test_stopped_before_its_first_line(train, tmp_path):
    """A preemption as any other: saved, and code 75, for which scripts start it again."""
    quiet = "--config.log.every=5", "--config.log.patch_every=0", "--config.log.volume_every=0"
    said = train(tmp_path / "run", "--config.stop_at_step=1", *quiet, code=75)
    assert "saved step 1" in said.stderr and saved(tmp_path / "run") == [1]
    assert not logged(tmp_path / "run") and not (tmp_path / "run" / "curves.png").exists()


def logged(workdir):
    """{step: numbers}, less the times, exactly as they stand in the file."""
    steps = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        # Lines come one interval late, validation at once: their order is not the point.
        kept = {key: value for key, value in numbers.items() if not key.startswith("time/")}
        steps.setdefault(kept.pop("step"), {}).update(kept)
    return dict(sorted(steps.items()))


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def state_of(workdir, step=STEPS):
    config = run_config.load(workdir)
    records = Records(config.data.records)
    network = Network(config, modalities=records.modalities, regions=records.regions)
    everywhere = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
    checkpoints = checkpoint.Checkpoints(workdir)
    target = checkpoint.with_sharding(abstract_state(network), everywhere)
    state, meta = checkpoints.restore(step, target)
    checkpoints.close()
    return state, meta


def assert_same_run(one, other):
    """The same numbers, to the last bit."""
    assert logged(one) == logged(other)
    (first, meta), (second, other_meta) = state_of(one), state_of(other)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert meta == other_meta


# ---------------------------------------------------------------- training


def test_a_run_leaves_its_files(straight, records):
    steps = logged(straight)

    def steps_with(name):
        return [step for step, numbers in steps.items() if name in numbers]

    for name in ("loss", "dice_loss", "grad_norm", "learning_rate", "keep/level1"):
        assert steps_with(f"train/{name}") == [1, 2, 3, 4, 5, 6]
    for name in ("val/dice/WT", "val/dice/TC", "val/dice/ET", "val/dice"):
        assert steps_with(name) == [3, 6]
    assert steps_with("volume/dice/ET") == steps_with("volume/dice") == [6]
    for name in ("config.json", "split.json", "curves.png"):
        assert (straight / name).exists()
    assert (straight / "overlays" / f"{CASES[3]}.png").stat().st_size > 1000
    (events,) = (straight / "tensorboard").iterdir()
    assert f"overlay/{CASES[3]}".encode() in events.read_bytes()
    assert json.loads((straight / "split.json").read_text())["val"] == CASES[3:]
    _, meta = state_of(straight)
    assert meta["step"] == STEPS and meta["modalities"] == ["t1", "t1ce", "t2", "flair"]
    assert meta["dice"] == steps[STEPS]["val/dice"]
    # That of step 3 is not of this one: as the best one so far it would take the other's place.
    assert state_of(straight, 4)[1]["dice"] is None
    assert STEPS in saved(straight) and len(saved(straight)) <= 3  # the newest two, the best


def test_stopped_and_continued_is_the_same_run(straight, stopped, train, tmp_path):
    workdir = tmp_path / "continued"
    shutil.copytree(stopped, workdir)
    said = train(workdir)
    assert "continuing at step 3" in said.stderr
    assert_same_run(straight, workdir)


def test_killed_and_continued_is_the_same_run(straight, train, words, command_line, tmp_path):
    """SIGTERM, then -9 in the run that goes on; thirty of them: python -m tests.faults.kills."""
    workdir = tmp_path / "killed"
    start, options = command_line
    log = workdir / "metrics.jsonl"

    def killed_by(number):
        """Once it has written a line."""
        before = log.stat().st_mtime_ns if log.is_file() else 0
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(
                [*start, *words, f"--workdir={workdir}"], **options, stderr=said
            )
            try:
                while process.poll() is None and not (
                    log.is_file() and log.stat().st_mtime_ns > before and log.read_text()
                ):
                    time.sleep(0.02)
                process.send_signal(number)
                code = process.wait(timeout=300)
            finally:
                process.kill()
        return code, (tmp_path / "said").read_text()

    code, said = killed_by(signal.SIGTERM)
    assert code == 75, said
    assert "SIGTERM: finishing the step and saving" in said
    (step,) = saved(workdir)
    assert 1 <= step < STEPS and list(logged(workdir)) == list(range(1, step + 1))
    code, said = killed_by(signal.SIGKILL)
    assert code == -signal.SIGKILL and f"continuing at step {step}" in said
    train(workdir)
    assert_same_run(straight, workdir)


def test_continued_on_eight_devices_the_numbers_stay(straight, stopped, train, tmp_path):
    workdir = tmp_path / "eight"
    shutil.copytree(stopped, workdir)
    said = train(workdir, "--cpu_devices=8")
    assert "8 cpu device(s)" in said.stderr
    one, eight = logged(straight), logged(workdir)
    assert list(one) == list(eight)
    for step, expected in one.items():
        for name in ("train/loss", "train/dice_loss", "train/cross_entropy", "train/ratio_loss"):
            assert eight[step][name] == pytest.approx(expected[name], rel=1e-5), (step, name)
    for name in ("val/dice", "volume/dice"):
        assert eight[STEPS][name] == pytest.approx(one[STEPS][name], abs=1e-3)


def test_a_finished_run_has_nothing_left_to_do(straight, train, tmp_path):
    workdir = tmp_path / "finished"
    shutil.copytree(straight, workdir)
    said = train(workdir)
    assert "done: 6 steps" in said.stderr
    assert logged(workdir) == logged(straight)


# ---------------------------------------------------------------- what is refused, and how


def readable(result, *words):
    """No traceback; the words are there."""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


def test_a_changed_config_is_refused_with_the_difference(straight, train, split):
    before = {path: path.read_bytes() for path in straight.iterdir() if path.is_file()}
    whole = split.read_text()
    split.write_text(json.dumps({"train": CASES[:2], "val": CASES[3:]}))  # the same path
    try:
        result = train(straight, "--config.optim.learning_rate=0.5", "--config.patch=32", code=1)
    finally:
        split.write_text(whole)
    readable(result, "patch: 16 -> 32", "optim.learning_rate: ", "-> 0.5", "--config_change=accept")
    readable(result, "data.split: gives other cases")
    assert {path: path.read_bytes() for path in straight.iterdir() if path.is_file()} == before


def test_nan_stops_with_step_and_name_and_saves_nothing(train, records, tmp_path):
    broken = tmp_path / "records"
    shutil.copytree(records, broken)
    for case in CASES[:3]:
        image = np.load(broken / case / "image.npy")
        np.save(broken / case / "image.npy", image * np.float16("nan"))
    result = train(tmp_path / "run", f"--config.data.records={broken}", code=1)
    readable(result, "train.py: step 1: ", "train/loss", "is not finite")
    assert saved(tmp_path / "run") == []


def test_missing_records_are_one_readable_line(train, tmp_path):
    result = train(tmp_path / "run", "--config.data.records=/nowhere", code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("train.py: /nowhere/dataset.json") and "masm_jax.prepare" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.py", *FLAGS, "--workdir=w", "--config.modle.size=tiny"), "config key: modle"),
        (("eval.py", "--workdir=w", "--outptu=o"), "unknown command line flag 'outptu'"),
        (
            ("train.py", "--config=configs/masm_demo.py", "--workdir=w", "--total_steps=5"),
            "--config.total_steps",
        ),
        (
            ("train.py", "--config=configs/sweeps/sizes.py", "--workdir=w"),
            "no function get_config(); the files in configs/sweeps are for python -m",
        ),
        (("-m", "masm_jax.predict", "--workdir=w"), "required: --output"),
    ],
)
def test_mistyped_flags_are_usage_errors(command, words, message):
    result = command(*words, code=2)
    assert "Traceback" not in result.stderr
    assert message.lower() in result.stderr.lower()


# ---------------------------------------------------------------- evaluation, prediction


def seg(phantoms, case):
    return nib.load(phantoms / case / f"{case}_seg.nii.gz")


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def assert_overlays(path, phantoms, case):
    """Grid, orientation and labels of the scan; returns the labels."""
    written, scan = nib.load(path), nib.load(phantoms / case / f"{case}_t1.nii.gz")
    assert written.shape == scan.shape
    np.testing.assert_array_equal(written.affine, scan.affine)
    np.testing.assert_array_equal(written.header["pixdim"][:4], scan.header["pixdim"][:4])
    for field in ("qform_code", "sform_code", "xyzt_units"):
        np.testing.assert_array_equal(written.header[field], scan.header[field], err_msg=field)
    assert written.get_data_dtype() == np.uint8
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2, 4}
    return labels


@pytest.fixture(scope="module")
def evaluated(straight, command):
    output = straight / "eval"
    said = command("eval.py", f"--workdir={straight}", "--split=val", f"--output={output}")
    assert "compared in: the scans" in said.stdout
    return output


def test_evaluation_leaves_its_files(evaluated, phantoms):
    case = CASES[3]
    labels = assert_overlays(evaluated / "predictions" / f"{case}.nii.gz", phantoms, case)
    reference = np.asarray(seg(phantoms, case).dataobj)
    with open(evaluated / "metrics.csv") as file:
        rows = {row["region"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["WT", "TC", "ET"]
    for region, values in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        assert rows[region]["case"] == case
        expected = dice(np.isin(labels, values), np.isin(reference, values))
        assert float(rows[region]["dice"]) == pytest.approx(expected, abs=1e-6)
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["step"] == STEPS and summary["grid"] == ["the scans"] and not summary["failed"]
    mean = np.mean([float(row["dice"]) for row in rows.values()])
    assert summary["average"]["dice"] == pytest.approx(mean, abs=1e-6)
    assert (evaluated / "overlays" / f"{case}.png").stat().st_size > 1000


def test_what_it_has_written_is_scored_alike_as_segmentations_of_anybody(
    evaluated, phantoms, command, tmp_path
):
    words = [evaluated / "predictions", f"--reference={phantoms}", f"--output={tmp_path}"]
    said = command("-m", "masm_jax.score", *words, code=3)  # the reference has more cases
    assert "3 cases failed and are in no mean" in said.stderr
    for name in ("metrics.csv", "lesions.csv"):
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


def test_the_report_shows_case_plots_mixers_and_config(evaluated):
    case, page = CASES[3], (evaluated / "report.html").read_text()
    assert f'class="view" data-case="{case}"' in page
    assert "simulated phantoms" in page and "no BraTS results" in page
    drawn = {path.name for path in (evaluated / "figures").iterdir()}
    for name in ("dice", "hd95", "nsd", "volume", "curves", f"pruning_{case}"):
        assert {f"{name}.png", f"{name}.csv"} <= drawn, name
    with open(evaluated / "figures" / f"pruning_{case}.csv") as file:
        kept = {(row["level"], row["modality"]): row for row in csv.DictReader(file)}
    assert list(kept) == [("level1", name) for name in ("t1", "t1ce", "t2", "flair")]
    assert all(0 <= float(row["kept_in_brain"]) <= 1 for row in kept.values())
    assert "learning_rate" in page and jax.__version__ in page
    assert not (evaluated / ".views").exists()


def test_cases_that_were_trained_on_are_named_and_old_files_go(straight, command, tmp_path):
    output = tmp_path / "eval"
    (output / "figures").mkdir(parents=True)
    (output / "figures" / "pruning_of_another_run.png").write_text("old")
    flags = ("--set=evaluation.styles=()", "--set=infer.overlap=0", "--workers=0")
    said = command("eval.py", f"--workdir={straight}", "--split=all", f"--output={output}", *flags)
    assert "3 of 4 cases were trained on" in said.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["trained_on"] == CASES[:3] and summary["cases"] == 4
    assert summary["infer"]["overlap"] == 0
    assert "3 of 4 cases were trained on" in (output / "report.html").read_text()
    assert not (output / "figures" / "pruning_of_another_run.png").exists()


def test_without_the_scans_the_records_are_compared(straight, records, command, tmp_path):
    """The best checkpoint, on records whose scans are gone."""
    moved = tmp_path / "records"
    shutil.copytree(records, moved)
    meta = json.loads((moved / CASES[3] / "meta.json").read_text())
    meta["files"] = {name: f"/gone/{name}.nii.gz" for name in meta["files"]}
    meta["segmentation"] = "/gone/seg.nii.gz"
    (moved / CASES[3] / "meta.json").write_text(json.dumps(meta))
    flags = (f"--workdir={straight}", f"--records={moved}", "--checkpoint=best")
    said = command("eval.py", *flags, f"--output={tmp_path / 'eval'}")
    assert "compared in: the records" in said.stdout
    written = nib.load(tmp_path / "eval" / "predictions" / f"{CASES[3]}.nii.gz")
    np.testing.assert_array_equal(written.affine, meta["affine"])
    assert list(written.shape) == meta["shape"]


def test_prediction_of_one_case_is_that_of_the_evaluation(straight, phantoms, command, evaluated):
    case, output = CASES[3], straight / "one"
    flags = (f"--workdir={straight}", f"--input={phantoms / case}", f"--output={output}")
    said = command("-m", "masm_jax.predict", *flags, "--labels=brats2021")
    assert "1 cases" in said.stdout
    labels = assert_overlays(output / f"{case}.nii.gz", phantoms, case)
    written = evaluated / "predictions" / f"{case}.nii.gz"
    np.testing.assert_array_equal(labels, np.asarray(nib.load(written).dataobj))
    assert (output / f"{case}.png").stat().st_size > 1000


def test_a_broken_case_does_not_stop_the_others(straight, phantoms, command, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(phantoms, raw)
    shutil.rmtree(raw / CASES[0])
    image = raw / CASES[1] / f"{CASES[1]}_t2.nii.gz"
    image.write_bytes(image.read_bytes()[:2000])  # a download cut off
    (raw / CASES[2] / f"{CASES[2]}_flair.nii.gz").unlink()
    (raw / CASES[2] / f"{CASES[2]}_t1ce.nii.gz").unlink()
    flags = (f"--workdir={straight}", f"--input={raw}", f"--output={tmp_path / 'out'}")
    said = command("-m", "masm_jax.predict", *flags, code=3)
    assert "1 cases in" in said.stdout
    failed = [line for line in said.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and "Traceback" not in said.stderr
    assert f"{CASES[1]}_t2.nii.gz" in said.stderr and CASES[2] in failed[0] + failed[1]
    assert_overlays(tmp_path / "out" / f"{CASES[3]}.nii.gz", phantoms, CASES[3])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"{CASES[3]}.json", f"{CASES[3]}.nii.gz", f"{CASES[3]}.png"]


def test_one_patient_by_four_files(straight, phantoms, command, evaluated, tmp_path):
    """Names that say nothing; the same voxels as from the folder, in labels of BraTS 2023."""
    case, files = CASES[3], []
    for number, modality in enumerate(("t1", "t1ce", "t2", "flair")):
        path = tmp_path / f"scan {number}.nii.gz"
        shutil.copy(phantoms / case / f"{case}_{modality}.nii.gz", path)
        files.append(f"--{modality}={path}")
    output = tmp_path / "out"
    flags = (f"--workdir={straight}", *files, f"--output={output}", "--case=me", "--probabilities")
    said = command("-m", "masm_jax.predict", *flags)
    assert "labels as in BraTS 2023" in said.stderr
    labels = np.asarray(nib.load(output / "me.nii.gz").dataobj)
    written = np.asarray(nib.load(evaluated / "predictions" / f"{case}.nii.gz").dataobj)
    np.testing.assert_array_equal(labels, np.where(written == 4, 3, written))
    summary = json.loads((output / "me.json").read_text())
    voxel_ml = np.prod(nib.load(output / "me.nii.gz").header.get_zooms()) / 1000
    assert summary["volumes_ml"]["WT"] == pytest.approx((labels > 0).sum() * voxel_ml, rel=1e-5)
    assert summary["volumes_ml"]["ET"] == pytest.approx((labels == 3).sum() * voxel_ml, rel=1e-5)
    probability = np.asarray(nib.load(output / "me_WT.nii.gz").dataobj)
    assert 0 <= probability.min() and probability.max() <= 1
    assert 0 < (labels > 0).sum() < labels.size
    parts, _ = ndimage.label(probability > 0.02, np.ones((3, 3, 3)))  # the config keeps the largest
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    np.testing.assert_array_equal(largest, labels > 0)

    said = command("-m", "masm_jax.predict", *flags[:4], f"--output={output}", code=1)
    assert "--flair missing: this network was trained with all modalities" in said.stderr
    twice = (*flags[:4], f"--flair={tmp_path / 'scan 0.nii.gz'}", f"--output={output}")
    assert "one file is given for two" in command("-m", "masm_jax.predict", *twice, code=1).stderr


def test_scans_are_never_written_over(straight, phantoms, command, tmp_path):
    """Neither by name nor through a link; and a segmentation that is there is not asked for."""
    folder, link, case = tmp_path / "scans", tmp_path / "link", CASES[3]
    shutil.copytree(phantoms / case, folder)
    link.symlink_to(folder)
    (folder / f"{case}_seg.nii.gz").write_bytes(b"broken")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = [
        f"--{name}={folder / f'{case}_{name}.nii.gz'}" for name in ("t1", "t1ce", "t2", "flair")
    ]
    for given in (files, [f"--input={tmp_path}"]):
        flags = (f"--workdir={straight}", *given, f"--output={link}")
        said = command("-m", "masm_jax.predict", *flags, code=1)
        readable(said, f"--output={link} holds {case}_t1", "name a folder of its own")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    flags = (f"--workdir={straight}", f"--input={folder}", "--labels=brats2021")
    command("-m", "masm_jax.predict", *flags, f"--output={tmp_path / 'out'}")
    assert (tmp_path / "out" / f"{case}.nii.gz").is_file()


def test_runs_and_records_are_no_place_for_anything_else(straight, records, train, command):
    readable(train(records, code=1), "--workdir=", "holds a data set (dataset.json)")
    for place, words in ((records, "holds a data set"), (straight, "is a run; name a folder")):
        said = command("eval.py", f"--workdir={straight}", f"--output={place}", code=1)
        readable(said, "eval.py: ", f"--output={place} {words}")


def test_a_patient_with_two_scans(straight, phantoms, command, tmp_path):
    """Of a run that says it was trained for that: the same as naming them with infer.present."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["modality_dropout"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    raw = tmp_path / "raw" / CASES[3]
    shutil.copytree(phantoms / CASES[3], raw)
    flags = (f"--workdir={run}", f"--input={raw}", "--labels=brats2021")
    named = "--set=infer.present=t1ce,flair"
    command("-m", "masm_jax.predict", *flags, named, f"--output={tmp_path / 'named'}")
    for modality in ("t1", "t2"):
        (raw / f"{CASES[3]}_{modality}.nii.gz").unlink()
    said = command("-m", "masm_jax.predict", *flags, f"--output={tmp_path / 'two'}")
    assert "t1, t2 missing: segmented without" in said.stderr
    found, expected = (
        np.asarray(nib.load(tmp_path / name / f"{CASES[3]}.nii.gz").dataobj)
        for name in ("two", "named")
    )
    np.testing.assert_array_equal(found, expected)
    whole = command("-m", "masm_jax.subsets", f"--workdir={run}", "--split=all", "--cases=1",
                    f"--output={tmp_path / 'subsets'}").stdout  # fmt: skip
    assert whole.count("●") == 1 + 32 and "Never lost" not in whole
    assert (tmp_path / "subsets" / "subsets.png").stat().st_size > 1000


def test_a_diagnosis_of_a_run(straight, command, tmp_path):
    flags = (straight, "--cases=1", f"--output={tmp_path}")
    said = command("-m", "masm_jax.diagnose", *flags).stdout
    assert "mosaic bayer3d: numbered patches came home" in said and "training: mean loss" in said
    found = json.loads((tmp_path / "findings.json").read_text())
    assert len(found["cases"]) == 1 and len(found["skips_off"]) == 6
    assert (tmp_path / "diagnose.html").stat().st_size > 20_000
