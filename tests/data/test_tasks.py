"""The described data sets of configs/tasks, each on files made in its layout."""

import pathlib

import nibabel as nib
import numpy as np
import pytest

from masm_jax.config import validate_records
from masm_jax.data import build, cases, conventions, records
from masm_jax.data.description import load_description
from masm_jax.data.preprocess import preprocess
from masm_jax.inference.postprocess import decode

TASKS = pathlib.Path(__file__).parents[2] / "configs/tasks"
SHAPE = (20, 24, 16)
# task -> (image files, label file), the label values
LAYOUTS = {
    "ms_lesions": (
        [f"p/p_{name}" for name in ("T1W", "T1WKS", "T2W", "FLAIR")], "p/p_consensus_gt", [1],
    ),
    "msd_prostate": (["imagesTr/p"], "labelsTr/p", [1, 2]),
    "isles2022": (
        [f"p/ses-0001/dwi/p_ses-0001_{name}" for name in ("dwi", "adc")],
        "derivatives/p/ses-0001/p_ses-0001_msk", [1],
    ),
    "msd_liver": (["imagesTr/p"], "labelsTr/p", [1, 2]),
    "msd_lung": (["imagesTr/p"], "labelsTr/p", [1]),
}  # fmt: skip


def write(root, task):
    """One case of a task: CT in Hounsfield units with air around, the others 0 outside."""
    images, label, values = LAYOUTS[task]
    random = np.random.default_rng(0)
    body = np.zeros(SHAPE, bool)
    body[3:-3, 3:-3, 2:-2] = True
    for path in (*images, label):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    for path in images:
        channels = 2 if task == "msd_prostate" else 1
        shape = (*SHAPE, channels) if channels > 1 else SHAPE
        array = random.normal(40, 20, shape).astype(np.float32)
        array[~body] = -1024 if task in ("msd_liver", "msd_lung") else 0
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"{path}.nii.gz")
    array = np.zeros(SHAPE, np.uint8)
    for place, value in enumerate(values):
        array[8 + 3 * place : 11 + 3 * place, 8:14, 6:10] = value
    nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"{label}.nii.gz")
    return array


def test_every_task_is_tested():
    assert sorted(path.stem for path in TASKS.glob("*.json")) == sorted(LAYOUTS)


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_case_of_the_task_becomes_a_record(task, tmp_path):
    label = write(tmp_path, task)
    (case,), problems = cases.find_cases(tmp_path, description=TASKS / f"{task}.json")
    convention = load_description(TASKS / f"{task}.json")
    assert not problems and case.id == "p" and case.convention.name == task
    record = preprocess(case, spacing=None)
    # Cut to the body, and z-scored in it; outside of it nothing.
    assert record.image.shape == (len(convention.modalities), 14, 18, 12)
    assert abs(float(record.image.mean(dtype=np.float64))) < 1e-3
    assert abs(float(record.image.std(dtype=np.float64)) - 1) < 1e-2
    masks = conventions.region_masks(record.label, convention.regions)
    for mask, values in zip(masks, convention.regions.values()):
        assert mask.sum() == np.isin(label, values).sum() > 0
    # A perfect prediction is the file's label, whatever lies in or beside what.
    found = decode(masks.astype(np.float32), convention.paint, regions=convention.regions)
    np.testing.assert_array_equal(found, label[3:-3, 3:-3, 2:-2])


def test_a_window_by_hand(tmp_path):
    """-1000 and -175 are outside; 250 and 3000 are the same; in between it is linear."""
    write(tmp_path, "msd_liver")
    array = np.full((4, 4, 4), -1000.0, np.float32)
    array[0, 0], array[1, 0] = [-175, 0, 100, 250], [3000, 250, 0, 100]
    for path in tmp_path.glob("*/p.nii.gz"):
        path.unlink()
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "imagesTr/p.nii.gz")
    (case,), _ = cases.find_cases(tmp_path, description=TASKS / "msd_liver.json")
    record = preprocess(case, spacing=None)
    inside = np.array([[0, 175, 275, 425], [425, 425, 175, 275]], np.float64)
    values = inside[inside > 0]
    expected = np.where(inside > 0, (inside - values.mean()) / values.std(), 0)
    np.testing.assert_allclose(record.image[0, :, 0], expected, atol=2e-3)


def test_of_zones_side_by_side_the_likelier_counts():
    regions = {"a": (1,), "b": (2,), "inside b": (3,)}
    regions["b"] = (2, 3)
    probabilities = np.array(
        [[0.9, 0.6, 0.9, 0.2, 0.9], [0.1, 0.8, 0.7, 0.9, 0.6], [0.9, 0.9, 0.9, 0.4, 0.1]]
    )
    found = decode(probabilities, {"a": 1, "b": 2, "inside b": 3}, regions=regions)
    assert found.tolist() == [1, 3, 1, 2, 1]


def test_pairs_come_from_the_description(tmp_path, make_config):
    for task in ("msd_prostate", "msd_lung"):
        write(tmp_path / task, task)
        found, _ = cases.find_cases(tmp_path / task, description=TASKS / f"{task}.json")
        build.build(found, tmp_path / "records" / task, workers=1)
    config = make_config(**{"data.records": "r", "data.spacing": 0.0, "model.pairs": ()})
    validate_records(config, records.Records(tmp_path / "records/msd_prostate"))
    assert tuple(config.model.pairs) == (("t2", "adc"),)
    config = make_config(**{"data.records": "r", "data.spacing": 0.0, "model.pairs": ()})
    with pytest.raises(ValueError, match="one modality has no partner"):
        validate_records(config, records.Records(tmp_path / "records/msd_lung"))
    config = make_config(**{"data.records": "r", "data.spacing": 0.0, "model.mixers": ()})
    validate_records(config, records.Records(tmp_path / "records/msd_lung"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"regions": {"a": [1, 2], "b": [2, 3]}, "labels": {"1": 1, "2": 2, "3": 3}',
         r"region b = \[2, 3\] and region a = \[1, 2\] overlap"),
        ('"regions": {"a": [1]}, "window": {"t1": [5, 5]}', r"window t1 = \[5, 5\]"),
        ('"regions": {"a": [1]}, "window": {"ct": [0, 5]}', "window names 'ct'"),
        ('"regions": {"a": [1]}, "pairs": [["t1", "t9"]]', r"pair \['t1', 't9'\]"),
    ],
)  # fmt: skip
def test_contradictions(changes, message, tmp_path):
    path = tmp_path / "task.json"
    path.write_text('{"files": {"t1": "_a", "t2": "_b"}, ' + changes + "}")
    with pytest.raises(ValueError, match=message):
        load_description(path)
