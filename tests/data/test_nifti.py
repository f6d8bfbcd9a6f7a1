"""Reading, reorienting and writing NIfTI files."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest

from masm_jax.data import nifti

SHAPE = (4, 5, 6)


def axis_affines():
    """All 48 orientations, with voxels of 1, 2 and 3 mm along the file's axes."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for axis, (target, sign) in enumerate(zip(order, signs)):
                affine[target, axis] = sign * (axis + 1)
            affine[:3, 3] = (7, -5, 3)
            yield affine


def test_canonical_agrees_with_nibabel_and_is_undone():
    array = np.arange(2 * np.prod(SHAPE)).reshape(2, *SHAPE)
    for affine in axis_affines():
        canonical = nifti.to_canonical(array, affine)
        reference = nib.as_closest_canonical(nib.Nifti1Image(array[1].astype(np.int16), affine))
        np.testing.assert_array_equal(canonical[1], np.asanyarray(reference.dataobj))
        assert nifti.canonical_spacing(affine) == pytest.approx(reference.header.get_zooms())
        np.testing.assert_array_equal(nifti.from_canonical(canonical, affine), array)


def test_an_oblique_affine_goes_to_the_closest_axes():
    angle = np.deg2rad(20)
    affine = np.diag([-1.0, -1, 2, 1])
    affine[:2, :2] = -np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert nifti.orientation(affine) == "LPS"
    np.testing.assert_array_equal(nifti.to_canonical(array, affine), array[::-1, ::-1])
    assert nifti.canonical_spacing(affine) == pytest.approx((1, 1, 2))


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan)])
def test_a_singular_affine_is_refused(bad):
    with pytest.raises(ValueError, match="maps voxels to no volume"):
        nifti.orientation(bad)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reading_applies_the_slope_and_drops_a_last_axis(tmp_path, kind, name):
    array = np.arange(np.prod(SHAPE)).reshape(*SHAPE, 1).astype(np.int16)
    image = kind(array, np.diag([1.0, 2, 3, 1]))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / name)
    read, affine, header = nifti.read(tmp_path / name)
    assert read.shape == SHAPE
    np.testing.assert_allclose(read, nib.load(tmp_path / name).get_fdata()[..., 0])
    np.testing.assert_array_equal(affine, np.diag([1.0, 2, 3, 1]))
    assert header["sizeof_hdr"] == (348 if kind is nib.Nifti1Image else 540)


def test_damaged_files_say_what_and_where(tmp_path):
    path = tmp_path / "a.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(0, 99, (20, 20, 20)).astype(np.int16), np.eye(4)), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in the checksum: the voxels alone read well
    cases = {
        "cut off": whole[: len(whole) // 2],
        "checksum": bytes(flipped),
        "not gzip": gzip.decompress(whole),
        "web page": gzip.compress(b"<html>Access denied</html>"),
        "half the voxels": gzip.compress(gzip.decompress(whole)[:5000]),
        "empty": b"",
    }
    for name, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.nii.gz: cannot be read") as error:
            nifti.read(path)
        assert "get the file again" in str(error.value), name
    with pytest.raises(ValueError, match="no such file"):
        nifti.read(tmp_path / "absent.nii")


def test_written_labels_keep_the_geometry(tmp_path):
    for number, affine in enumerate(axis_affines()):
        if number % 7:
            continue
        like = tmp_path / f"like{number}.nii.gz"
        image = nib.Nifti1Image(np.ones(SHAPE, np.int16), affine)
        image.set_sform(affine, 4)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm", "sec")
        image.header["cal_max"] = 1500
        image.header.set_slope_inter(0.5, 10)
        nib.save(image, like)
        labels = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.uint8)
        path = tmp_path / "out" / f"{number}.nii.gz"
        nifti.write_labels(path, labels, like)
        written = nib.load(path)
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), labels)
        np.testing.assert_array_equal(written.affine, nib.load(like).affine)
        for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "quatern_b", "srow_x"):
            np.testing.assert_array_equal(written.header[field], nib.load(like).header[field])
        raw = gzip.decompress(path.read_bytes())
        slope, intercept = np.frombuffer(raw[112:120], "<f4")
        assert written.get_data_dtype() == np.uint8 and (slope, intercept) == (1, 0)
        assert written.header["cal_max"] == 0
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".tmp")]


def test_labels_like_a_4d_file_and_the_same_bytes_twice(tmp_path):
    like = tmp_path / "like.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 4), np.float32), np.diag([1.0, 2, 3, 1])), like)
    labels = np.ones(SHAPE, np.uint8)
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write_labels(tmp_path / name, labels, like)
    assert nib.load(tmp_path / "a.nii.gz").shape == SHAPE
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    with pytest.raises(ValueError, match="do not fit"):
        nifti.write_labels(tmp_path / "c.nii.gz", labels[1:], like)
    assert not (tmp_path / "c.nii.gz").exists()
