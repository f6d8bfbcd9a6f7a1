"""Integrity checks, normalisation, resampling, and the way back to the input file."""

import nibabel as nib
import numpy as np
import pytest

from masm_jax.data import conventions, nifti
from masm_jax.data.cases import find_cases
from masm_jax.data.preprocess import (
    CaseError,
    preprocess,
    resample,
    resample_labels,
    restore,
    restore_labels,
)

DASH = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")
# Axes swapped and flipped, voxels of 1, 2 and 0.5 mm.
SWAPPED = np.array([[0, 2.0, 0, -9], [0, 0, -0.5, 4], [-1.0, 0, 0, 7], [0, 0, 0, 1]])


def load(root, labels=None):
    """The case of a folder as found, or as --labels would read it."""
    (case,), problems = find_cases(root, labels=labels)
    assert not problems
    return case


def edit(path, change, affine=None):
    """Rewrites a file with changed voxels or affine."""
    image = nib.load(path)
    array = change(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def fails(root, **options):
    with pytest.raises(CaseError) as error:
        preprocess(load(root, **options))
    return error.value.problems


def original(case):
    """The input as float32 (M, I, J, K) and the segmentation's file values."""
    images = np.stack([nifti.read(path)[0] for path in case.images]).astype(np.float32)
    return images, nifti.read(case.segmentation)[0]


def paint(internal, convention):
    """Paints regions with file values, as a prediction is written."""
    values = np.zeros(internal.shape, np.uint8)
    for mask, region in zip(
        conventions.region_masks(internal, convention.regions), convention.regions
    ):
        values[mask] = convention.paint[region]
    return values


@pytest.mark.parametrize("affine", [None, SWAPPED])
def test_preprocess_then_undo_is_the_identity(make_case, affine):
    case = load(make_case("A") if affine is None else make_case("A", affine=affine))
    images, segmentation = original(case)
    record = preprocess(case)
    assert record.image.dtype == np.float16 and record.label.dtype == np.uint8
    np.testing.assert_array_equal(
        conventions.to_file(restore_labels(record.label, record.meta), case.convention.labels),
        segmentation,
    )
    intensity = record.meta["intensity"].values()
    mean, std = (np.array([i[k] for i in intensity])[:, None, None, None] for k in ("mean", "std"))
    brain = record.image.any(axis=0)
    back = restore(np.where(brain, record.image * std + mean, 0).astype(np.float32), record.meta)
    # float16 keeps 11 bits: half a unit in the last place of values up to 2 standard deviations.
    assert np.abs(back - images).max() <= 2**-11 * 2 * std.max()
    np.testing.assert_array_equal(back == 0, images == 0)


def test_normalised_in_the_brain_and_zero_outside(make_case):
    case = load(make_case("A", affine=SWAPPED))
    images, _ = original(case)
    record = preprocess(case)
    outside = ~nifti.to_canonical(images, SWAPPED).any(axis=0)
    (d0, d1), (h0, h1), (w0, w1) = record.meta["crop"]
    outside = outside[d0:d1, h0:h1, w0:w1]
    assert (record.image[:, outside] == 0).all()
    inside = record.image[:, ~outside].astype(np.float64)
    np.testing.assert_allclose(inside.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(inside.std(1), 1, atol=1e-3)
    assert record.meta["shape"] == [12, 14, 10]
    assert record.meta["orientation"] == nifti.orientation(SWAPPED)
    assert record.meta["spacing"] == [2.0, 0.5, 1.0]
    assert list(record.image.shape[1:]) == record.meta["record_shape"]


def test_volumes_are_in_millilitres(make_case):
    case = load(make_case("A", affine=SWAPPED))  # a voxel of 1 mm^3
    _, segmentation = original(case)
    volumes = preprocess(case).meta["volumes_ml"]
    assert volumes["WT"] == pytest.approx((segmentation > 0).sum() / 1000)
    assert volumes["TC"] == pytest.approx(np.isin(segmentation, (1, 4)).sum() / 1000)
    assert volumes["ET"] == pytest.approx((segmentation == 4).sum() / 1000)


def test_large_intensities_survive_float16(make_case):
    root = make_case("A")

    def spike(array):
        array[5, 5, 5] = 32767
        return array

    edit(root / "A_t1.nii.gz", spike)
    record = preprocess(load(root))
    assert np.isfinite(record.image).all()
    t1 = record.meta["intensity"]["t1"]
    assert record.image[0].max() * t1["std"] + t1["mean"] == pytest.approx(32767, rel=1e-3)


def test_prediction_needs_no_segmentation(make_case):
    record = preprocess(load(make_case("A", DASH, None)), spacing=2)
    assert record.label is None and record.meta["volumes_ml"] is None
    maps = restore(np.ones((3, *record.image.shape[1:]), np.float32), record.meta)
    assert maps.shape == (3, 12, 14, 10) and maps.dtype == np.float32
    assert maps[:, 0].max() == 0 and maps[:, 5, 5, 5].min() == 1
    with pytest.raises(ValueError, match="expected"):
        restore(maps, record.meta)


def test_every_problem_names_file_value_expectation_and_fix(make_case):
    def zero(array):
        return array * 0

    def nan(array):
        return np.where(array == array.max(), np.nan, array).astype(np.float32)

    broken = {
        "shape of t2 is 12x14x9": lambda r: edit(r / "A_t2.nii.gz", lambda a: a[:, :, 1:]),
        "moves a corner by 1 mm": lambda r: edit(r / "A_flair.nii.gz", lambda a: a, shifted(r)),
        "voxels of t1ce are NaN": lambda r: edit(r / "A_t1ce.nii.gz", nan),
        "empty brain: every voxel of t1 ": lambda r: edit(r / "A_t1.nii.gz", zero),
        "t1 is 7 everywhere": lambda r: edit(r / "A_t1.nii.gz", lambda a: (a * 0 + 7)),
        "label value 7 (8 voxels)": lambda r: edit(r / "A_seg.nii.gz", lambda a: seven(a)),
        "label value 0.5": lambda r: edit(r / "A_seg.nii.gz", lambda a: a.astype(np.float32) / 2),
        "outside the brain": lambda r: edit(r / "A_seg.nii.gz", lambda a: np.roll(a, 6, 0)),
        "shape of the segmentation": lambda r: edit(r / "A_seg.nii.gz", lambda a: a[1:]),
        "t2 is a copy of t1": lambda r: edit(
            r / "A_t2.nii.gz", lambda a: np.asanyarray(nib.load(r / "A_t1.nii.gz").dataobj)
        ),
        "BadGzipFile": lambda r: (r / "A_t1.nii.gz").write_bytes(b"not gzip, but long enough"),
        "cannot be read (EOFError": lambda r: cut(r / "A_seg.nii.gz"),
        "shape 12x14x10x2 for t1": lambda r: edit(
            r / "A_t1.nii.gz", lambda a: np.stack([a, a], -1)
        ),
    }  # fmt: skip
    for number, (value, breaks) in enumerate(broken.items()):
        root = make_case("A", folder=f"raw{number}")
        breaks(root)
        (problem,) = fails(root, labels="brats2021")
        assert value in problem.value, (value, problem)
        assert problem.case == "A" and problem.file.startswith(str(root))
        assert problem.expectation and problem.fix and "\n" not in str(problem)


def shifted(root):
    affine = nib.load(root / "A_t1.nii.gz").affine.copy()
    affine[2, 3] += 1
    return affine


def seven(array):
    array[5:7, 5:7, 5:7] = 7
    return array


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_all_problems_of_a_case_are_listed(make_case):
    root = make_case("A")
    edit(root / "A_t2.nii.gz", lambda a: a[1:])
    edit(root / "A_flair.nii.gz", lambda a: a, shifted(root))
    assert ["A_t2", "A_flair"] == [p.file.split("/")[-1].split(".")[0] for p in fails(root)]


def test_rounding_of_an_affine_is_no_problem(make_case):
    root = make_case("A")
    affine = nib.load(root / "A_t1.nii.gz").affine + 1e-3
    affine[3] = (0, 0, 0, 1)
    edit(root / "A_flair.nii.gz", lambda a: a, affine)
    preprocess(load(root))


def test_resampling_keeps_the_extent_and_undoes_a_ramp():
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (12, 6, 6))
    half = resample(ramp, (6, 3, 3))
    # Corner to corner: a coarse voxel is the mean of the two fine ones it covers.
    np.testing.assert_allclose(half[:, 1, 1], [0.5, 2.5, 4.5, 6.5, 8.5, 10.5], atol=1e-6)
    back = resample(half, (12, 6, 6))
    np.testing.assert_allclose(back[1:-1, 3, 3], np.arange(1, 11), atol=1e-5)
    # 5 -> 2: a coarse voxel covers two and a half fine ones.
    thirds = resample(ramp[:5], (2, 6, 6))
    np.testing.assert_allclose(thirds[:, 0, 0], [(0 + 1 + 1) / 2.5, (1 + 3 + 4) / 2.5], atol=1e-6)
    np.testing.assert_array_equal(resample(ramp, (12, 6, 6)), ramp)


def test_resampling_stays_in_range_and_keeps_constants():
    rng = np.random.default_rng(0)
    noise = rng.random((2, 13, 11, 9), dtype=np.float32)
    for shape in ((7, 5, 4), (20, 22, 10), (13, 3, 18)):
        out = resample(noise, shape)
        assert out.shape == (2, *shape) and 0 <= out.min() and out.max() <= 1
        np.testing.assert_allclose(resample(np.ones((13, 11, 9)), shape), 1, atol=1e-6)
    # Shrinking averages: the noise of one voxel does not alias through.
    assert resample(noise, (4, 4, 3)).std() < 0.3 * noise.std()


def test_labels_are_resampled_by_region():
    regions = dict(conventions.REGIONS)
    label = np.zeros((24, 24, 24), np.uint8)
    label[2:22, 2:22, 2:22], label[6:18, 6:18, 6:18], label[8:16, 8:16, 8:16] = 2, 3, 1
    label[0:2] = 4  # a cavity, in no region
    coarse = resample_labels(label, (12, 12, 12), regions)
    np.testing.assert_array_equal(coarse, label[::2, ::2, ::2])
    np.testing.assert_array_equal(
        resample_labels(coarse, (24, 24, 24), regions)[:, 12, 12], label[:, 12, 12]
    )
    # Value 1 beside value 3 is core on either side: no oedema may appear between them, as it
    # does where label values are interpolated as numbers.
    pair = np.where(np.arange(9)[:, None, None] < 4, 1, 3) * np.ones((9, 9, 9), np.uint8)
    assert set(np.unique(resample_labels(pair.astype(np.uint8), (5, 5, 5), regions))) <= {1, 3}


def test_a_region_with_two_values_of_its_own_keeps_both():
    label = np.ones((8, 8, 8), np.uint8)
    label[4:] = 2
    coarse = resample_labels(label, (4, 4, 4), {"lesion": (1, 2)})
    np.testing.assert_array_equal(coarse[:, 0, 0], [1, 1, 2, 2])


def test_spacing_equal_to_the_input_changes_nothing(make_case):
    case = load(make_case("A"))
    plain, same = preprocess(case), preprocess(case, spacing=1.0)
    np.testing.assert_array_equal(plain.image, same.image)
    np.testing.assert_array_equal(plain.label, same.label)


def test_reading_twice_gives_the_same_record(make_case):
    case = load(make_case("A"))
    first, second = preprocess(case, spacing=1.5), preprocess(case, spacing=1.5)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.meta == second.meta


@pytest.mark.parametrize("name", ["BraTS2021_01485", "BraTS-GLI-00000-000", "BraTS2021_01477"])
def test_real_scans_come_back_voxel_for_voxel(real_data, tmp_path, name):
    case = load(real_data / "brats" / name)
    record = preprocess(case)
    internal = restore_labels(record.label, record.meta)
    path = tmp_path / f"{name}.nii.gz"
    nifti.write_labels(path, paint(internal, case.convention), case.images[0])
    written, source = nib.load(path), nib.load(case.segmentation)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj))
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.shape == source.shape and written.get_data_dtype() == np.uint8


def test_a_real_scan_at_two_millimetres(real_data):
    case = load(real_data / "brats" / "BraTS2021_01482")  # intensities up to 32767
    record = preprocess(case, spacing=2)
    assert np.isfinite(record.image).all()
    np.testing.assert_allclose(record.meta["record_spacing"], 2, atol=0.03)
    _, segmentation = original(case)
    back = restore_labels(record.label, record.meta)
    truth = conventions.to_internal(segmentation, case.convention.labels)
    for name, mask in zip(
        conventions.REGIONS, conventions.region_masks(truth, conventions.REGIONS)
    ):
        found = conventions.region_masks(back, {name: conventions.REGIONS[name]})[0]
        dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
        # Measured 0.935, 0.933, 0.860: an upper bound of what labels at 2 mm can say.
        assert dice > {"WT": 0.93, "TC": 0.93, "ET": 0.85}[name], (name, dice)
