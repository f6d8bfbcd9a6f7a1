"""Segmentations of other programs: found by name, scored as eval.py scores, faults named."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from masm_jax import compare, score
from masm_jax.data import cases as cases_lib
from tests.conftest import CASES


def seg_of(folder, case):
    return folder / case / f"{case}_seg.nii.gz"


@pytest.fixture
def predictions(phantoms, tmp_path):
    """Folder of CASE.nii.gz: the references moved by a voxel along the first axis."""
    folder = tmp_path / "predictions"
    folder.mkdir()
    for case in CASES:
        image = nib.load(seg_of(phantoms, case))
        moved = np.roll(np.asarray(image.dataobj), 1, 0)
        nib.save(nib.Nifti1Image(moved, image.affine), folder / f"{case}.nii.gz")
    return folder


def scored(predictions, reference, output, *more, code=0):
    words = [str(predictions), f"--reference={reference}", f"--output={output}", "--workers=0"]
    assert score.main([*words, *map(str, more)]) == code
    return json.loads((output / "summary.json").read_text())


def dice_of(folder):
    with open(folder / "metrics.csv") as file:
        return {(r["case"], r["region"]): float(r["dice"]) for r in csv.DictReader(file)}


def test_dice_by_hand(phantoms, predictions, tmp_path, capsys):
    summary = scored(predictions, phantoms, tmp_path / "out")
    found = dice_of(tmp_path / "out")
    assert len(found) == 3 * len(CASES) and summary["cases"] == len(CASES)
    for case in CASES:
        values = np.asarray(nib.load(seg_of(phantoms, case)).dataobj)
        for region, inside in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
            one = np.isin(values, inside)
            other = np.roll(one, 1, 0)
            expected = 2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() else 1
            assert found[case, region] == pytest.approx(expected)
    assert {f"brats{year}_dice" for year in (2023, 2025)} <= summary["regions"]["WT"].keys()
    said = capsys.readouterr().out
    assert "WT" in said and "predictions: brats2021" in said
    rows = compare.compare(*[compare.read(tmp_path / "out")] * 2, ["dice", "hd95"])
    assert {row["difference"] for row in rows} == {0.0}  # compare takes it


def test_other_names_and_values_of_the_same_are_perfect(phantoms, tmp_path):
    """As nnU-Net's converters write them: 1 oedema, 2 core, 3 enhancing; deeper in folders."""
    swapped = np.array([0, 2, 1, 0, 3], np.uint8)
    for number, case in enumerate(CASES):
        image = nib.load(seg_of(phantoms, case))
        values = swapped[np.asarray(image.dataobj).astype(int)]
        name = [f"{case}.nii", f"{case}_seg.nii.gz", f"{case}-seg.nii.gz"][number % 3]
        place = tmp_path / "made" / str(number) / name
        place.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(values, image.affine), place)
    flags = ("--predicted_labels=msd",)
    summary = scored(tmp_path / "made", phantoms, tmp_path / "out", *flags)
    assert set(dice_of(tmp_path / "out").values()) == {1.0} and not summary["failed"]
    assert "1+2+3" in summary["labels"]["predictions"][0].replace("2+1", "1+2")


def test_a_last_axis_of_length_one_is_none(phantoms, predictions, tmp_path):
    """On either side."""
    reference = tmp_path / "reference"
    reference.mkdir()
    for case in CASES:
        image = nib.load(predictions / f"{case}.nii.gz")
        longer = nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine)
        nib.save(longer, reference / f"{case}_seg.nii.gz")
    scored(predictions, reference, tmp_path / "one")
    scored(reference, predictions, tmp_path / "other")
    for name in ("one", "other"):
        assert set(dice_of(tmp_path / name).values()) == {1.0}


def test_what_fails_is_named_and_the_rest_is_scored(phantoms, predictions, tmp_path, capsys):
    (predictions / f"{CASES[0]}.nii.gz").unlink()
    image = nib.load(predictions / f"{CASES[1]}.nii.gz")
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(values[1:], image.affine), predictions / f"{CASES[1]}.nii.gz")
    odd = np.where(values == 4, 3, values)
    nib.save(nib.Nifti1Image(odd, image.affine), predictions / f"{CASES[2]}.nii.gz")
    shutil.copy(predictions / f"{CASES[3]}.nii.gz", predictions / "stranger.nii.gz")
    summary = scored(predictions, phantoms, tmp_path / "out", code=3)
    assert {case for case, _ in dice_of(tmp_path / "out")} == {CASES[3]}
    assert summary["failed"].keys() == set(CASES[:3])
    assert f"no {CASES[0]}.nii.gz in" in summary["failed"][CASES[0]]
    assert "expected that of the reference" in summary["failed"][CASES[1]]
    assert "label value 3" in summary["failed"][CASES[2]]
    assert "--predicted_labels" in summary["failed"][CASES[2]]
    assert [path.endswith("stranger.nii.gz") for path in summary["left_out"]] == [True]
    said = capsys.readouterr()
    assert "stranger.nii.gz" in said.out and "3 cases failed and are in no mean" in said.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--predicted_labels=brats2012"], "--predicted_labels=brats2012: no such label scheme"),
        (["--styles=brats1999"], "--styles=brats1999"),
        (["--tolerance=0"], "--tolerance=0"),
        (["--reference=/no/such"], "/no/such: does not exist"),
    ],
)
def test_errors_are_one_line(phantoms, predictions, tmp_path, capsys, flags, words):
    given = [str(predictions), f"--reference={phantoms}", f"--output={tmp_path / 'out'}"]
    assert score.main([*given, "--workers=0", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("score: ") and words in line
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(phantoms, predictions, tmp_path, capsys):
    def error(folder):
        words = [str(folder), f"--reference={phantoms}", f"--output={tmp_path / 'out'}"]
        assert score.main([*words, "--workers=0"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no such folder" in error(tmp_path / "absent")
    shutil.copy(predictions / f"{CASES[0]}.nii.gz", predictions / f"{CASES[0]}_seg.nii.gz")
    assert "are of one case; keep one" in error(predictions)
    (tmp_path / "empty").mkdir()
    assert "has no NIfTI file" in error(tmp_path / "empty")


def test_a_reference_may_have_plain_names(phantoms, predictions, tmp_path):
    """CASE.nii.gz on both sides; scans beside them are no segmentations."""
    summary = scored(predictions, predictions, tmp_path / "out")
    assert set(dice_of(tmp_path / "out").values()) == {1.0}
    assert summary["labels"]["reference"] == summary["labels"]["predictions"]
    scan = phantoms / CASES[0] / f"{CASES[0]}_flair.nii.gz"
    shutil.copy(scan, predictions / scan.name)
    found, problems = cases_lib.find_cases(predictions, images=False)
    assert [case.id for case in found] == CASES and not problems
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(scan, alone / scan.name)
    with pytest.raises(ValueError, match="has the name of a segmentation"):
        cases_lib.find_cases(alone, images=False)


def test_values_that_leave_doubt_are_asked_for(phantoms, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    image = nib.load(seg_of(phantoms, CASES[0]))
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where(values == 4, 3, values), image.affine), folder / "a.nii.gz")
    with pytest.raises(ValueError, match="CASE.nii.gz names hold .* decide with --labels"):
        cases_lib.find_cases(folder, images=False)
    (case,), _ = cases_lib.find_cases(folder, images=False, labels="msd")
    assert case.id == "a" and case.convention.labels == {1: 2, 2: 1, 3: 3}


def test_real_scans_against_themselves(real_data, tmp_path):
    """A real reference is perfect, its mirror image is not."""
    found, _ = cases_lib.find_cases(real_data / "brats", images=False)
    case = next(case for case in found if case.convention.name == "brats2021")
    image, folder = nib.load(case.segmentation), tmp_path / "mirrored"
    folder.mkdir()
    reference = tmp_path / "reference"
    reference.mkdir()
    shutil.copy(case.segmentation, reference / f"{case.id}_seg.nii.gz")
    values = np.asarray(image.dataobj)
    for name, content in (("same", values), ("mirrored", values[::-1])):
        (tmp_path / name).mkdir(exist_ok=True)
        place = tmp_path / name / f"{case.id}.nii.gz"
        nib.save(nib.Nifti1Image(content.astype(np.uint8), image.affine), place)
        scored(tmp_path / name, reference, tmp_path / f"out-{name}")
    assert set(dice_of(tmp_path / "out-same").values()) == {1.0}
    assert dice_of(tmp_path / "out-mirrored")[case.id, "WT"] < 0.5
