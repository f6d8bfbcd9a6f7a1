"""The command that writes phantoms: whole cases, kept and added to, and nothing of others."""

import json
import logging

import nibabel as nib
import numpy as np
import pytest

from masm_jax import phantom
from masm_jax.data.simulate import simulate


def contents(root):
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*.nii.gz")}


def test_the_command_writes_extends_and_refuses(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = tmp_path / "set"
    arguments = [f"--output={root}", "--spacing=6", "--seed=4"]
    assert phantom.main([*arguments, "--cases=1"]) == 0
    assert caplog.text.count("no BraTS results") == 1
    first = contents(root)
    assert set(first) == {
        f"Phantom_00000/Phantom_00000_{suffix}.nii.gz"
        for suffix in ("t1", "t1ce", "t2", "flair", "seg")
    }
    described = json.loads((root / "phantom.json").read_text())
    assert described["spacing"] == 6 and described["seed"] == 4
    assert "not BraTS" in described["kind"]

    case = simulate(4, 0, spacing=6.0)
    for suffix, array in {**case.images, "seg": case.labels}.items():
        image = nib.load(root / "Phantom_00000" / f"Phantom_00000_{suffix}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), array)
        assert image.get_data_dtype() == array.dtype
        np.testing.assert_allclose(image.affine, case.affine)
        assert image.header.get_xyzt_units()[0] == "mm"

    (root / ".Phantom_00001.tmp").mkdir()  # as a stopped call leaves it
    assert phantom.main([*arguments, "--cases=2"]) == 0
    second = contents(root)
    assert len(second) == 10
    assert {name: second[name] for name in first} == first  # kept, not written again
    assert not list(root.glob(".*"))

    caplog.clear()
    assert phantom.main([f"--output={root}", "--spacing=5", "--seed=4", "--cases=2"]) == 1
    assert "spacing is 6.0 there, 5.0 is asked for" in caplog.text
    assert "choose another --output" in caplog.text
    assert contents(root) == second


def test_processes_write_the_same_cases(tmp_path):
    root = tmp_path / "set"
    assert phantom.main([f"--output={root}", "--cases=2", "--spacing=6", "--workers=2"]) == 0
    for index in range(2):
        name = f"Phantom_{index:05d}"
        case = simulate(0, index, spacing=6.0)
        for suffix, array in {**case.images, "seg": case.labels}.items():
            image = nib.load(root / name / f"{name}_{suffix}.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(image.dataobj), array)


def test_a_folder_of_something_else_is_refused(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("mine")
    assert phantom.main([f"--output={tmp_path}", "--cases=1"]) == 1
    assert "phantom.json" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_case_that_fails_is_named_and_leaves_nothing(tmp_path, caplog, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(phantom, "save", broken)
    assert phantom.main([f"--output={tmp_path / 'set'}", "--cases=1", "--spacing=6"]) == 1
    assert "Phantom_00000: OSError: no space left" in caplog.text
    assert not (tmp_path / "set" / "Phantom_00000").exists()


@pytest.mark.parametrize(
    "wrong", ["--sede=1", "--spacing=0", "--cases=0", "--seed=-1", "--workers=0", "--cases=x"]
)
def test_wrong_arguments_exit_with_2(tmp_path, wrong, capsys):
    arguments = ["--cases=1", f"--output={tmp_path / 'set'}", wrong]
    assert phantom.main(arguments) == 2
    assert wrong.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_stopped_command_keeps_what_is_finished_and_goes_on(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    root, save = tmp_path / "set", phantom.save

    def stopped(case, folder, *, name):
        if name == "Phantom_00001":
            (folder / "half.nii.gz").write_bytes(b"half of a scan")
            raise KeyboardInterrupt
        save(case, folder, name=name)

    arguments = [f"--output={root}", "--cases=3", "--spacing=6"]
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "save", stopped)
        assert phantom.main(arguments) == 75
    assert "the same command goes on" in caplog.text
    first = contents(root / "Phantom_00000")
    assert len(first) == 5 and not (root / "Phantom_00001").exists()
    assert phantom.main(arguments) == 0
    assert "1 of 3 cases are there already" in caplog.text
    assert contents(root / "Phantom_00000") == first and len(contents(root)) == 15
    assert not list(root.glob(".*"))
