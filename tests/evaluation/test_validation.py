"""What a run measures of itself while it trains."""

import itertools
import types

import jax
import numpy as np
import pytest

from masm_jax.data import records as records_lib
from masm_jax.data.conventions import REGIONS, region_masks
from masm_jax.data.pipeline import batches
from masm_jax.data.preprocess import Record
from masm_jax.evaluation import validation
from masm_jax.processes import Solo

CASES = ["A", "B", "C"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three small cases with all labels; the image of a case holds its labels."""
    root = tmp_path_factory.mktemp("records")
    for number, case in enumerate(CASES):
        label = np.random.default_rng(number).integers(0, 4, (18, 17, 19)).astype(np.uint8)
        meta = {
            "case": case,
            "regions": {name: list(values) for name, values in REGIONS.items()},
            "segmentation": f"{case}_seg.nii.gz",
            "record_spacing": [1.0, 2.0, 3.0],
            "spacing": [1.0, 2.0, 3.0],
            **dict.fromkeys(("shape", "crop_shape", "record_shape"), [18, 17, 19]),
            "crop": [[0, 18], [0, 17], [0, 19]],
            "affine": np.diag([1.0, 2.0, 3.0, 1.0]).tolist(),
            "files": {},
            "labels": {},
            "paint": {name: value for value, name in enumerate(REGIONS, 1)},
            "volumes_ml": None,
            "hashes": {},
        }
        image = np.stack([label, 10 * label]).astype(np.float16)
        records_lib.write_record(root, Record(image, label, meta))
    index = {"modalities": ["t1", "flair"], "regions": REGIONS, "spacing": None}
    records_lib.write_index(root, index | {"cases": CASES, "problems": []})
    return records_lib.Records(root)


def test_validation_crops_are_the_same_each_time_and_not_those_of_training(records, make_config):
    config = make_config(**{"batch_size": 4, "log.patches": 13})
    one, two = (validation.validation_crops(config, records, CASES) for _ in range(2))
    assert len(one) == len(two) == 3  # 13 crops are three whole batches of 4
    for a, b in zip(one, two):
        assert a["image"].shape == (4, 2, 16, 16, 16)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    training = batches(records, CASES, seed=config.seed, batch_size=4, patch=config.patch)
    for crop, trained in zip(one, itertools.islice(training, 3)):
        assert not np.array_equal(crop["image"], trained["image"])
    training.close()


def test_validation_crops_of_some_rows_and_three_edges(records, make_config):
    config = make_config(**{"batch_size": 4, "log.patches": 8, "patch": (16, 32, 16)})
    whole = validation.validation_crops(config, records, CASES)
    some = validation.validation_crops(config, records, CASES, rows=(1, 2))
    assert len(whole) == len(some) == 2 and whole[0]["label"].shape == (4, 16, 32, 16)
    for a, b in zip(whole, some):
        for name in a:
            np.testing.assert_array_equal(a[name][1:3], b[name])


def test_fewer_crops_than_a_batch_are_one_batch(records, make_config):
    config = make_config(**{"batch_size": 8, "log.patches": 1})
    assert len(validation.validation_crops(config, records, CASES)) == 1


class Oracle:
    """Knows the labels, but misses one voxel of every region of the case B."""

    def __init__(self):
        self.settings = types.SimpleNamespace(
            regions=REGIONS,
            threshold=(0.5,),
            largest_component=False,
            fill_holes=False,
            minimum_ml=0.0,
        )

    def probabilities(self, image):
        label = np.asarray(image[0]).astype(np.uint8)
        probability = region_masks(label, REGIONS).astype(np.float32)
        if np.array_equal(label, self.wrong):
            for region in probability:
                region[tuple(np.argwhere(region > 0)[0])] = 0.5  # not above the threshold
        return probability


def test_volume_dice_is_the_mean_over_cases(records, tmp_path):
    oracle = Oracle()
    oracle.wrong = np.asarray(records.label("B"))
    overlays = {"C": tmp_path / "o" / "C.png"}
    scores = validation.volume_dice(oracle, records, CASES, Solo(), overlays)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["C.png"]
    for name, values in REGIONS.items():
        voxels = np.isin(oracle.wrong, values).sum()
        expected = (1 + 2 * (voxels - 1) / (2 * voxels - 1) + 1) / 3
        assert scores[f"volume/dice/{name}"] == pytest.approx(expected, rel=1e-9)
    mean = np.mean([scores[f"volume/dice/{name}"] for name in REGIONS])
    assert scores["volume/dice"] == pytest.approx(mean)
    assert set(scores) == {"volume/dice", *(f"volume/dice/{name}" for name in REGIONS)}


def test_processes_share_the_cases_and_all_get_the_means(records, monkeypatch):
    oracle = Oracle()
    oracle.wrong = np.asarray(records.label("B"))
    whole = validation.volume_dice(oracle, records, CASES, Solo())
    shares = {}

    class Together(Solo):
        """Waits for the other process, as often as it has not come yet."""

        def gather(self, name, value, *, limit=600.0):
            shares[jax.process_index()] = value
            if len(shares) < 2:
                raise TimeoutError
            return [shares[0], shares[1]]

    def of_process(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        return validation.volume_dice(oracle, records, CASES, Together())

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(TimeoutError):
        of_process(0)
    assert of_process(1) == of_process(0) == whole
    assert [sorted(shares[index]) for index in (0, 1)] == [["A", "C"], ["B"]]
