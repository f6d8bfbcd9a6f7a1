"""Real scans of both conventions through prepare, train, predict and back."""

import json

import nibabel as nib
import numpy as np
import pytest

from masm_jax.data import cases, nifti
from masm_jax.data.conventions import REGIONS, region_masks
from masm_jax.data.preprocess import preprocess
from masm_jax.inference.volume import in_scan

# case -> a modality to take the geometry from, the segmentation, label values
SCANS = {
    "BraTS2021_01485": ("_t1", "_seg", {1, 2, 4}),
    "BraTS-GLI-00000-000": ("-t1n", "-seg", {1, 2, 3}),
}


@pytest.fixture(scope="module")
def raw(real_data, tmp_path_factory):
    """A folder with one case of each convention."""
    folder = tmp_path_factory.mktemp("real") / "raw"
    folder.mkdir()
    for case in SCANS:
        (folder / case).symlink_to(real_data / "brats" / case)
    return folder


@pytest.fixture(scope="module")
def predicted(raw, command):
    """prepare at 2 mm, two steps of training, predict."""
    root = raw.parent
    command(
        "-m", "masm_jax.prepare", f"--input={raw}", f"--output={root / 'records'}", "--spacing=2"
    )
    command(
        "train.py",
        "--config=configs/masm_demo.py",
        f"--workdir={root / 'run'}",
        f"--config.data.records={root / 'records'}",
        "--config.data.split=holdout:BraTS-GLI-00000-000",
        "--config.total_steps=2",
        "--config.patch=32",
        "--config.model.mixers=('aware','concat','concat','concat','concat','shift')",
        "--config.optim.warmup_steps=1",
        "--config.optim.learning_rate=0.02",
        "--config.infer.overlap=0.0",
        "--config.infer.threshold=0.02",
    )
    command(
        "-m",
        "masm_jax.predict",
        f"--workdir={root / 'run'}",
        f"--input={raw}",
        f"--output={root / 'predicted'}",
    )
    return root / "predicted"


@pytest.mark.parametrize("case", SCANS)
def test_the_label_file_overlays_the_scan(raw, predicted, case):
    image, _, values = SCANS[case]
    scan = nib.load(raw / case / f"{case}{image}.nii.gz")
    written = nib.load(predicted / f"{case}.nii.gz")
    assert written.shape == scan.shape == (240, 240, 155)
    assert np.asarray(written.affine).tobytes() == np.asarray(scan.affine).tobytes()
    np.testing.assert_array_equal(written.header["pixdim"][:4], scan.header["pixdim"][:4])
    for field in (
        *("dim", "qform_code", "sform_code", "xyzt_units"),
        *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
        *("srow_x", "srow_y", "srow_z"),
    ):
        np.testing.assert_array_equal(written.header[field], scan.header[field], err_msg=field)
    assert written.get_data_dtype() == np.uint8
    labels = np.asarray(written.dataobj)
    assert {0} < set(np.unique(labels).tolist()) <= {0} | values
    # Nothing is painted where there is no brain, but for the rim of a resampled voxel.
    brain = nifti.read(raw / case / f"{case}{image}.nii.gz")[0] != 0
    inside = np.argwhere(brain)
    low, high = inside.min(0), inside.max(0)
    painted = np.argwhere(labels > 0)
    assert (painted >= low - 2).all() and (painted <= high + 2).all()
    assert (predicted / f"{case}.png").stat().st_size > 10_000


def test_the_run_has_learnt_from_one_convention_and_met_both(raw, predicted):
    root = predicted.parent
    split = json.loads((root / "run" / "split.json").read_text())
    assert split == {"train": ["BraTS2021_01485"], "val": ["BraTS-GLI-00000-000"], "test": []}
    for case, convention in (
        ("BraTS2021_01485", "brats2021"),
        ("BraTS-GLI-00000-000", "brats2023"),
    ):
        meta = json.loads((root / "records" / case / "meta.json").read_text())
        assert meta["convention"] == convention


@pytest.mark.parametrize("case", SCANS)
def test_a_perfect_prediction_is_the_segmentation_voxel_by_voxel(raw, case, tmp_path):
    """At native spacing: probabilities from the record's labels, and all the way back."""
    (found,), _ = cases.find_cases(raw / case)
    record = preprocess(found)
    probabilities = region_masks(record.label, REGIONS).astype(np.float32)
    _, written = in_scan(probabilities, record.meta, threshold=0.5)
    nifti.write_labels(tmp_path / "out.nii.gz", written, like=found.images[0])
    _, seg, values = SCANS[case]
    original = nib.load(raw / case / f"{case}{seg}.nii.gz")
    result = nib.load(tmp_path / "out.nii.gz")
    expected = np.asarray(original.dataobj)
    assert set(np.unique(expected).astype(int)) == {0} | values
    np.testing.assert_array_equal(np.asarray(result.dataobj), expected)
    np.testing.assert_array_equal(result.affine, original.affine)
