"""Batches depend on (seed, step) alone, and crops are what they say they are."""

import gc
import itertools
import json

import numpy as np
import pytest

from masm_jax.data.pipeline import Crop, batches
from masm_jax.data.records import Records

CASES = [f"CASE_{i:02d}" for i in range(8)]
PATCH = 8
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def write_case(root, case, shape, label):
    """A record by hand. A voxel holds its own place, so that a crop tells where it was cut."""
    folder = root / case
    folder.mkdir(parents=True)
    place = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 2048 + 1
    np.save(folder / "image.npy", np.stack([place, -place]).astype(np.float16))
    np.save(folder / "label.npy", label)
    inside = {name: np.argwhere(np.isin(label, values)) for name, values in REGIONS.items()}
    np.savez(folder / "foreground.npz", **{k: v.astype(np.int32) for k, v in inside.items()})
    meta = {"case": case, "regions": REGIONS, "segmentation": f"{case}_seg.nii.gz"}
    (folder / "meta.json").write_text(json.dumps(meta))


def write_records(root, volumes):
    for case, (shape, label) in volumes.items():
        write_case(root, case, shape, label)
    index = {"version": 1, "modalities": ["t1", "flair"], "regions": REGIONS, "spacing": None}
    index |= {"cases": sorted(volumes), "problems": []}
    (root / "dataset.json").write_text(json.dumps(index))
    return Records(root)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    rng = np.random.default_rng(0)
    volumes = {}
    for i, case in enumerate(CASES):
        shape = (12 + i % 3, 11, 13)
        label = np.zeros(shape, np.uint8)
        label[2:6, 3:7, 4:8] = rng.integers(0, 4, (4, 4, 4))
        volumes[case] = shape, label
    return write_records(tmp_path_factory.mktemp("records"), volumes)


def take(count, records, cases=CASES, **options):
    options = {"seed": 3, "batch_size": 4, "patch": PATCH} | options
    iterator = batches(records, cases, **options)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert a.keys() == b.keys() == {"image", "label", "case"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def reference(records):
    return take(8, records)


def test_shapes_and_types(reference):
    batch = reference[0]
    assert batch["image"].shape == (4, 2, PATCH, PATCH, PATCH)
    assert batch["image"].dtype == np.float16
    assert batch["label"].shape == (4, PATCH, PATCH, PATCH) and batch["label"].dtype == np.uint8
    assert batch["case"].shape == (4,) and batch["case"].dtype == np.int32


@pytest.mark.parametrize("patch", [PATCH, (4, 9, 6), [12, 1, 8]])
def test_image_and_label_are_cut_at_the_same_place(records, patch):
    edges = (patch,) * 3 if patch == PATCH else tuple(patch)
    for batch in take(3, records, patch=patch):
        assert batch["image"].shape == (4, 2, *edges) and batch["label"].shape == (4, *edges)
        for image, label, case in zip(batch["image"], batch["label"], batch["case"]):
            whole = np.asarray(records.image(CASES[case]))
            start = np.argwhere(whole[0] == image[0, 0, 0, 0])
            assert len(start) == 1  # places are unique below 2048 voxels
            window = tuple(slice(s, s + edge) for s, edge in zip(start[0], edges))
            np.testing.assert_array_equal(image, whole[(slice(None), *window)])
            np.testing.assert_array_equal(label, records.label(CASES[case])[window])


def test_the_seed_decides(records, reference):
    assert_equal(take(8, records, threads=1), reference)
    other = take(8, records, seed=4)
    assert any(not np.array_equal(a["case"], b["case"]) for a, b in zip(reference, other))


def test_every_case_once_per_epoch_in_another_order(reference):
    epochs = np.concatenate([batch["case"] for batch in reference]).reshape(-1, len(CASES))
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8), (4, 1)))
    assert len(np.unique(epochs, axis=0)) > 1
    images = np.concatenate([batch["image"][batch["case"] == 0] for batch in reference])
    assert len(np.unique(images.reshape(4, -1), axis=0)) > 1  # and another crop


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(records, reference, workers):
    assert_equal(take(8, records, workers=workers, threads=1), reference)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_resume_equals_the_uninterrupted_run(records, reference, step):
    assert_equal(take(8 - step, records, start_step=step), reference[step:])


@pytest.mark.parametrize(
    "hosts",
    [
        [(0, 1, 2, 3)],
        [(0, 1), (2, 3)],
        [(0,), (1,), (2,), (3,)],
        [(0, 3), (1, 2)],  # no blocks: as a mesh may lie over its processes
        [range(2), range(2), range(2, 4)],  # two hosts share the volumes of a row
    ],
)
@pytest.mark.parametrize("step", [0, 2])
def test_hosts_together_read_the_batch_of_one_host(records, reference, hosts, step):
    shares = [take(4, records, start_step=step, rows=rows) for rows in hosts]
    for rows, share in zip(hosts, shares):
        wanted = [
            {name: value[list(rows)] for name, value in batch.items()}
            for batch in reference[step : step + 4]
        ]
        assert share[0]["case"].shape == (len(rows),)
        assert_equal(share, wanted)


def test_workers_resume_and_hosts_together(records, reference):
    (part,) = take(1, records, workers=1, threads=1, start_step=5, rows=(2, 3))
    assert_equal([part], [{name: value[2:] for name, value in reference[5].items()}])


def test_fewer_cases_than_the_batch(records):
    batch = take(3, records, cases=CASES[2:5], batch_size=4)
    order = np.concatenate([b["case"] for b in batch])
    np.testing.assert_array_equal(np.sort(order.reshape(4, 3), axis=1), np.tile(range(3), (4, 1)))


def test_far_steps_are_reached_at_once(records):
    far = take(1, records, start_step=10**9)
    assert_equal(take(1, records, start_step=10**9), far)


# --------------------------------------------------------------------------------------------
# Crops
# --------------------------------------------------------------------------------------------


def starts(records, case, foreground, count, patch=(PATCH,) * 3):
    crop = Crop(records, (case,), patch, foreground)
    shape = records.label(case).shape
    generator = np.random.default_rng(0)
    return np.array([crop._start(case, shape, generator) for _ in range(count)])


def test_crops_without_foreground_reach_every_position_equally_often(records):
    found = starts(records, CASES[0], 0.0, 3000)
    room = np.array(records.label(CASES[0]).shape) - PATCH  # 4, 3, 5
    for axis, positions in enumerate(room + 1):
        counts = np.bincount(found[:, axis], minlength=positions)
        assert len(counts) == positions and np.abs(counts * positions / 3000 - 1).max() < 0.2
    assert len(np.unique(found, axis=0)) == np.prod(room + 1)


@pytest.fixture(scope="module")
def corners(tmp_path_factory):
    """Oedema, core and enhancing tumour far apart and of unequal size; no tumour; a small scan."""
    shape = (30, 30, 30)
    label = np.zeros(shape, np.uint8)
    label[10:20, 10:20, 10:20] = 2
    label[25, 25, 25], label[14, 3, 14] = 3, 1
    volumes = {"MIXED": (shape, label), "EMPTY": (shape, np.zeros(shape, np.uint8))}
    volumes["SMALL"] = (5, 8, 3), np.full((5, 8, 3), 2, np.uint8)
    return write_records(tmp_path_factory.mktemp("corners"), volumes)


@pytest.mark.parametrize("patch", [(6, 6, 6), (8, 2, 6)])
def test_foreground_crops_are_centred_and_balanced_over_regions(corners, patch):
    centres = starts(corners, "MIXED", 1.0, 3000, patch=patch) + np.array(patch) // 2
    values = corners.label("MIXED")[tuple(np.minimum(centres, 29).T)]
    at_core = np.mean(np.all(centres == (14, 3, 14), axis=1))
    # 25, 25, 25 does not fit a centre: the crop is moved in, so that it ends at the edge
    at_enhancing = np.mean(np.all(centres == (25, 25, 25), axis=1))
    # WT a third, nearly all of it oedema; TC a third, one of two voxels; ET a third, one voxel.
    assert abs(np.mean(values == 2) - 1 / 3) < 0.035
    assert abs(at_core - 1 / 6) < 0.03 and abs(at_enhancing - 1 / 2) < 0.035


def test_foreground_centres_near_the_edge_are_moved_inside(corners):
    for patch in ((16, 16, 16), (16, 20, 12)):
        found = starts(corners, "MIXED", 1.0, 300, patch=patch)
        assert found.min() >= 0 and (found.max(0) == 30 - np.array(patch)).all()
        enhancing = np.all(found == 30 - np.array(patch), axis=1)
        assert abs(enhancing.mean() - 0.5) < 0.12


def test_a_third_of_the_crops_are_centred_on_tumour(corners):
    found = starts(corners, "MIXED", 1 / 3, 3000, patch=(2, 2, 2))
    enhancing = np.mean(np.all(found == 24, axis=1))
    assert abs(enhancing - 1 / 6) < 0.03


def test_a_case_without_tumour_is_cut_anywhere(corners):
    found = starts(corners, "EMPTY", 1.0, 400, patch=(26, 26, 26))
    assert len(np.unique(found, axis=0)) > 100


@pytest.mark.parametrize("foreground", [0.0, 1.0])
@pytest.mark.parametrize(
    ("patch", "before_and_after"),
    [((6, 6, 6), ((1, 0), (0, 0), (2, 1))), ((8, 6, 4), ((2, 1), (0, 0), (1, 0)))],
)
def test_a_smaller_volume_is_centred_and_padded_with_zeros(
    corners, foreground, patch, before_and_after
):
    crop = Crop(corners, ("SMALL",), patch, foreground)
    front, _, left = (before for before, _ in before_and_after)
    seen = set()
    for seed in range(20):
        out = crop(0, np.random.default_rng(seed))
        (place,) = [s for s in range(3) if out["image"][0, front, 0, left] == 1 + 3 * s]
        seen.add(place)
        window = np.asarray(corners.image("SMALL"))[:, :, place : place + 6]
        expected = np.pad(window, ((0, 0), *before_and_after))  # from 5 x 6 x 3
        np.testing.assert_array_equal(out["image"], expected)
        assert out["label"].sum() == 2 * 5 * 6 * 3 and out["label"].dtype == np.uint8
    assert seen == {0, 1, 2}


# --------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves a damaged .npz open
@pytest.mark.parametrize(
    "name, workers",
    [("image.npy", 0), ("label.npy", 0), ("foreground.npz", 0), ("image.npy", 1)],
)
def test_a_damaged_file_is_named_with_its_case(tmp_path, name, workers):
    label = np.full((9, 9, 9), 3, np.uint8)
    records = write_records(tmp_path, {"GOOD": ((9, 9, 9), label), "BAD": ((9, 9, 9), label)})
    path = tmp_path / "BAD" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"BAD: cannot read .*BAD/{name}.*prepare this case"):
        take(4, records, cases=["GOOD", "BAD"], foreground=1.0, workers=workers, threads=1)
    gc.collect()


def test_a_case_without_segmentation_is_named(tmp_path):
    records = write_records(tmp_path, {"BARE": ((9, 9, 9), np.zeros((9, 9, 9), np.uint8))})
    (tmp_path / "BARE" / "meta.json").write_text(json.dumps({"segmentation": None}))
    with pytest.raises(ValueError, match="BARE: has no segmentation"):
        take(1, records, cases=["BARE"])


def test_grids_that_differ_are_named(tmp_path):
    records = write_records(tmp_path, {"ODD": ((9, 9, 9), np.zeros((9, 9, 10), np.uint8))})
    with pytest.raises(
        ValueError, match=r"ODD: image.npy is \(9, 9, 9\), label.npy is \(9, 9, 10\)"
    ):
        take(1, records, cases=["ODD"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": ()}, r"rows \(\) of a batch of 4: expected one or more"),
        ({"batch_size": 0}, "a batch of 0"),
        ({"rows": (2, 4)}, r"rows \(2, 4\) of a batch of 4: expected .* 0 to 3"),
        ({"rows": (-1, 0)}, r"rows \(-1, 0\) of a batch of 4: expected .* 0 to 3"),
        ({"cases": ["CASE_00", "CASE_99"]}, "CASE_99 unknown; expected ids out of the 8 records"),
        ({"cases": []}, "none named"),
        ({"seed": -1}, "seed -1"),
        ({"patch": 0}, r"patch \(0, 0, 0\)"),
        ({"patch": (8, 0, 8)}, r"patch \(8, 0, 8\)"),
        ({"foreground": 1.5}, "foreground 1.5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(records, options, message):
    with pytest.raises(ValueError, match=message):
        take(1, records, **options)
