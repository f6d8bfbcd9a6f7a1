"""The file that a case is compared with: what is read, and what is refused."""

import nibabel as nib
import numpy as np
import pytest

from masm_jax import prepare
from tests.faults import runs

SEG = "raw/Second/Second_seg.nii.gz"


@pytest.fixture
def evaluate(tmp_path, capsys):
    """evaluate("--more=flags") -> (exit code, standard error), of a run in tmp_path."""
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
