"""The file that a case is compared with: what is read, and what is refused."""

import json
import logging
import shutil

import nibabel as nib
import numpy as np
import pytest

from masm_jax import prepare, processes, runtime
from masm_jax.evaluation import tables
from tests.faults import runs

SEG = "raw/Second/Second_seg.nii.gz"


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """evaluate("--more=flags") -> (exit code, standard error), of a run in tmp_path."""
    # A handler that another test has left would write to an output that is closed.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    runs.make(tmp_path)

    def call(*more):
        code = runs.evaluate(tmp_path, tmp_path / "evaluated", more)
        return code, capsys.readouterr().err

    return call


def rewrite(path, change=lambda labels: labels, move=None):
    """The file with other voxels, or with an affine moved by a 4x4 matrix."""
    image = nib.load(path)
    affine = image.affine if move is None else move @ image.affine
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), affine), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: np.where(labels == 4, 3, labels), "label value 3 (48 voxels)"),
        (lambda labels: labels.astype(np.float32) * 0.999, "write whole numbers"),
        (lambda labels: labels[1:], "shape of the segmentation is 11x13x11"),
    ],
)
def test_a_changed_reference_is_refused(evaluate, tmp_path, change, words):
    """3 was read as background once, and 3.996 as 3."""
    rewrite(tmp_path / SEG, change)
    code, said = evaluate()
    assert code == 3 and f"failed: Second: {tmp_path / SEG}: " in said and words in said
    assert "expected" in said and "Traceback" not in said


def test_whole_numbers_in_floats_are_labels(evaluate, tmp_path):
    rewrite(tmp_path / SEG, lambda labels: labels.astype(np.float32))
    assert evaluate()[0] == 0


def test_ctrl_c_leaves_an_earlier_evaluation_as_it_was(evaluate, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    def contents():
        return {p: p.read_bytes() for p in (tmp_path / "evaluated").rglob("*") if p.is_file()}

    assert evaluate()[0] == 0
    before = contents()
    monkeypatch.setattr(runs.Network, "probabilities", stopped)
    with pytest.raises(SystemExit) as left, processes.joined(None):
        evaluate()
    assert left.value.code == runtime.EXIT_INTERRUPTED
    assert capsys.readouterr().err.endswith("stopped before it was done; start it again\n")
    assert before and contents() == before


def test_a_turned_reference_is_refused(evaluate, tmp_path):
    """By 5 degrees, which moves no element of the affine by more than 0.09."""
    cos, sin = np.cos(np.radians(5)), np.sin(np.radians(5))
    move = np.eye(4)
    move[:2, :2] = [[cos, -sin], [sin, cos]]
    rewrite(tmp_path / SEG, move=move)
    code, said = evaluate()
    assert code == 3 and "moves a corner by 1." in said and "that of t1" in said


def test_a_reference_is_where_preparing_allows_it(evaluate, tmp_path):
    """0.15 mm aside where voxels have 2 mm: within a tenth of one."""
    for path in (tmp_path / "raw").rglob("*.nii.gz"):
        rewrite(path, move=np.diag([2.0, 2.0, 2.0, 1.0]))
    aside = np.eye(4)
    aside[0, 3] = 0.15
    rewrite(tmp_path / SEG, move=aside)
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'records'}", "--workers=1"]
    assert prepare.main(flags) == 0
    assert evaluate()[0] == 0


# ---------------------------------------------------------------- --reference


@pytest.fixture
def reference(tmp_path):
    """reference(name, change) -> flag: the segmentation alone in a folder, by this name."""

    def make(name, change=lambda labels: labels):
        path = tmp_path / "alone" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / SEG, path)
        rewrite(path, change)
        return f"--reference={tmp_path / 'alone'}"

    return make


@pytest.mark.parametrize("name", ["Second_seg", "Second-seg"])
def test_segmentations_alone_are_a_reference(evaluate, reference, tmp_path, name):
    evaluate()
    (tmp_path / SEG).unlink()
    shutil.copy(tmp_path / "evaluated/predictions/Second.nii.gz", tmp_path / SEG)
    more = ("--labels=brats2021",) if "-" in name else ()  # 4 with such names leaves doubt
    assert evaluate(reference(name), *more)[0] == 0
    rows = tables.read_csv(tmp_path / "evaluated" / "metrics.csv")
    assert [float(row["dice"]) for row in rows] == [1.0, 1.0, 1.0]


def of_children(labels):
    """1, 2, 3, 4 as in BraTS-PED: enhancing, core, cyst, oedema."""
    new = np.array([0, 2, 4, 0, 1], np.uint8)[labels]
    new[5, 5, 5] = 3
    return new


PED = {
    "name": "ped", "files": {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f"},
    "segmentation": "-seg", "labels": {"1": 3, "2": 1, "3": 1, "4": 2},
    "regions": {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, "paint": {"WT": 4, "TC": 2, "ET": 1},
}  # fmt: skip


def test_label_values_with_another_meaning_are_refused_unless_said(evaluate, reference, tmp_path):
    flag = reference("Second-seg", of_children)
    code, said = evaluate(flag)
    assert code == 1 and f"{flag}: Second: label values WT = 1+2+3, TC = 1+3, ET = 3; 4 in" in said
    assert "its record was made with WT = 1+2+4, TC = 1+4, ET = 4 (brats2021)" in said
    assert "--labels or --description" in said
    description = tmp_path / "ped.json"
    description.write_text(json.dumps(PED))
    assert evaluate(flag, f"--description={description}")[0] == 0
    description.write_text(json.dumps(PED | {"regions": {"all": [1, 2, 3]}, "paint": {"all": 4}}))
    code, said = evaluate(flag, f"--description={description}")
    assert code == 1 and f"{flag}: Second: regions all = [1, 2, 3]; the run was trained on" in said


def test_what_is_wrong_with_a_reference_is_said(evaluate, reference, tmp_path):
    code, said = evaluate(reference("First_seg"))
    assert code == 1 and "no segmentation for Second; expected one for every case" in said
    reference("Second_seg")
    code, said = evaluate(reference("more/Second_seg"))
    assert code == 1 and "Second: " in said and "a second case of this name" in said
    code, said = evaluate("--labels=brats2021")
    assert code == 1 and "go with --reference" in said
