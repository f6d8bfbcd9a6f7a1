"""What a case looks like: right ones pass, and each fault is named."""

import nibabel as nib
import numpy as np
import pytest

from masm_jax.data import cases, suspicion
from masm_jax.data.preprocess import preprocess
from masm_jax.data.simulate import simulate

MODALITIES = ("t1", "t1ce", "t2", "flair")
SPACING = (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def scans():
    """(M, D, H, W) z-scores of a phantom, cropped."""
    images = simulate(5, 1, spacing=3.0).images
    stack = np.stack([images[name] for name in MODALITIES]).astype(np.float32)
    brain = (stack != 0).any(0)
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(brain))
    stack = stack[(slice(None), *box)]
    brain = stack != 0
    means = [(v[b].mean(), v[b].std()) for v, b in zip(stack, brain)]
    return np.stack([np.where(b, (v - m) / s, 0) for v, b, (m, s) in zip(stack, brain, means)])


WHOLE = dict.fromkeys(MODALITIES, 1.0)


def warnings(scans, spacing=SPACING):
    return suspicion.look(scans, MODALITIES, spacing, WHOLE)["warnings"]


def test_a_prepared_case_passes(scans):
    found = suspicion.look(scans, MODALITIES, SPACING, WHOLE)
    assert found["warnings"] == []
    assert found["brain_litres"] == pytest.approx((scans != 0).any(0).sum() * 27e-6)
    assert found["contrast"]["t1"]["white_grey"] > 0.05 > found["contrast"]["t2"]["white_grey"]


@pytest.mark.parametrize(
    ("axis", "voxels", "words"), [(0, 3, "left"), (1, -3, "front"), (2, 3, "down")]
)
def test_a_modality_that_lies_aside(scans, axis, voxels, words):
    """Moved by 9 mm: it would fit better moved back."""
    moved = scans.copy()
    moved[2] = np.roll(moved[2], voxels, axis)
    (warning,) = warnings(moved)
    assert f"t2 fits t1 better 4 mm further {words}" in warning and "docs/data.md" in warning


def test_a_modality_that_covers_half_of_the_brain(tmp_path):
    """Through the preparation, which fills what is missing with the value of 0."""
    images = simulate(5, 1, spacing=3.0).images
    images["flair"][:, : images["flair"].shape[1] // 2] = 0
    for name, image in images.items():
        nib.save(nib.Nifti1Image(image, np.diag([3, 3, 3, 1])), tmp_path / f"A_{name}.nii.gz")
    ((case,), _) = cases.find_cases(tmp_path, labels="brats2021")
    record = preprocess(case)
    covered = record.meta["covered"]
    assert covered["t1"] == pytest.approx(1, abs=0.01) and 0.3 < covered["flair"] < 0.7
    found = suspicion.look(record.image, MODALITIES, record.meta["record_spacing"], covered)
    assert any("there is only: flair" in warning for warning in found["warnings"])


def test_a_head_that_is_not_stripped_and_a_part_of_a_brain(scans):
    assert any("not look skull-stripped" in w for w in warnings(scans, (4.0, 4.0, 4.0)))
    assert any("part of it is missing" in w for w in warnings(scans, (2.0, 2.0, 2.0)))


@pytest.mark.parametrize(
    "pair", [("t2", "flair"), ("t1", "t2"), ("t1ce", "flair"), ("t1", "flair")]
)
def test_files_that_are_mixed_up(scans, pair):
    order = list(range(4))
    a, b = (MODALITIES.index(name) for name in pair)
    order[a], order[b] = order[b], order[a]
    assert any("mixed up" in warning for warning in warnings(scans[order]))


def test_other_modalities_are_not_judged_by_contrast(scans):
    found = suspicion.look(scans[:2], ("ct", "pet"), SPACING, {"ct": 1.0, "pet": 1.0})
    assert not any("mixed up" in warning for warning in found["warnings"])


def test_real_brats_cases_pass(real_data):
    found, _ = cases.find_cases(real_data / "brats")
    for case in [c for c in found if c.id in ("BraTS2021_01482", "BraTS-GLI-00000-000")]:
        record = preprocess(case, spacing=2.0)
        known = record.meta["record_spacing"], record.meta["covered"]
        look = suspicion.look(record.image, MODALITIES, *known)
        assert look["warnings"] == [], case.id
        swapped = suspicion.look(record.image[[0, 1, 3, 2]], MODALITIES, *known)
        assert any("mixed up" in warning for warning in swapped["warnings"])
