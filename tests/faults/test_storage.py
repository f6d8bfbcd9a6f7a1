"""Disks that are full, cannot be written, or go away: named, and nothing that was whole is lost."""

import json
import logging
import re
import shutil
import subprocess

import pytest

from masm_jax.data import nifti
from tests.faults import judge, runs
from tests.test_train import FLAGS

TRAIN = ("--config.log.checkpoint_every=2", "--config.log.patch_every=0")
TRAIN += ("--config.log.volume_every=0", "--config.batch_size=1")


class Disk:
    """A small disk in memory."""

    def __init__(self, folder):
        self.folder = folder

    def remount(self, options):
        """size=BYTES, ro, rw."""
        words = ["mount", "-o", f"remount,{options}", str(self.folder)]
        subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 20 kB, which those may mount who are root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no right to mount a disk: needs root on Linux")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """Those of other tests write to what was standard error then."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its records and scans, of two cases of a few voxels."""
    root = tmp_path_factory.mktemp("made")
    runs.make(root)
    return root


def evaluated(root, output):
    return runs.evaluate(root, output / "evaluated")


COMMANDS = {
    "prepare": lambda root, output: judge._prepare(root / "raw", output, [], None),
    "predict": lambda root, output: judge._predict(root / "raw", output, [], None),
    "eval": evaluated,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_named_and_the_same_command_goes_on(name, made, disk, capfd):
    (disk.folder / "filler").write_bytes(bytes(8 << 10))
    assert COMMANDS[name](made, disk.folder) in (1, 3)
    said = capfd.readouterr().err
    assert re.search("No space left on device.*; free (some )?space", said)
    assert str(disk.folder) in said
    assert "Traceback" not in said
    assert not [path for path in disk.folder.rglob("*") if path.name.endswith(".tmp")]
    for path in disk.folder.rglob("*.nii.gz"):
        nifti.read(path)  # nothing half-written has a name
    for path in disk.folder.rglob("*.json"):
        json.loads(path.read_text())
    disk.remount("size=20m")
    assert COMMANDS[name](made, disk.folder) == 0
    assert judge._left(disk.folder, judge.HANDLED) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_named(name, made, disk, capfd):
    disk.remount("ro")
    assert COMMANDS[name](made, disk.folder) in (1, 3)
    said = capfd.readouterr().err
    assert "Read-only file system; name a place that can be written to" in said or name == "prepare"
    assert "Read-only file system" in said and str(disk.folder) in said and "Traceback" not in said


def test_scans_and_records_may_be_read_only(made, disk, tmp_path):
    disk.remount("size=20m")
    shutil.copytree(made / "raw", disk.folder / "raw")
    shutil.copytree(made / "records", disk.folder / "records")
    shutil.copytree(made / "run", disk.folder / "run")
    disk.remount("ro")
    for name, command in COMMANDS.items():
        assert command(disk.folder, tmp_path / name) == 0


def words(records, split, workdir):
    return ["train.py", *FLAGS, *TRAIN, f"--config.data.records={records}",
            f"--config.data.split={split}", f"--workdir={workdir}"]  # fmt: skip


def test_a_training_keeps_its_checkpoint_when_the_disk_is_full(command, records, split, disk):
    disk.remount("size=48m")  # one of 30 MB, not two
    run = words(records, split, disk.folder / "run")
    said = command(*run, code=1).stderr
    last = said.splitlines()[-1]
    assert last.startswith(f"train.py: {disk.folder}/run/checkpoints: a checkpoint could not be")
    assert "(No space left on device), the newest is of step 2; free space there" in last
    assert "Traceback" not in said
    disk.remount("size=200m")
    said = command(*run).stderr
    assert "continuing at step 2" in said and "done: 6 steps" in said
    lines = (disk.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
