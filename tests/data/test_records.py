"""Records on disk, their index, and splits."""

import json

import numpy as np
import pytest

from masm_jax.data import records
from masm_jax.data.cases import find_cases
from masm_jax.data.preprocess import Record, preprocess

IDS = [f"case{number:02d}" for number in range(11)]


@pytest.fixture
def prepared(make_case, tmp_path):
    """A folder with one record, and the record."""
    record = preprocess(find_cases(make_case("A"))[0][0])
    root = tmp_path / "records"
    records.write_record(root, record)
    regions = record.meta["regions"]
    index = {"modalities": record.meta["modalities"], "regions": regions, "spacing": None}
    records.write_index(root, index | {"cases": ["A"], "problems": []})
    return root, record


def test_what_is_written_is_read(prepared):
    root, record = prepared
    read = records.Records(root)
    assert read.cases == ["A"] and read.spacing is None
    assert read.modalities == ("t1", "t1ce", "t2", "flair")
    assert read.regions == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    image, label = read.image("A"), read.label("A")
    assert isinstance(image, np.memmap) and isinstance(label, np.memmap)
    assert image.dtype == np.float16 and label.dtype == np.uint8
    np.testing.assert_array_equal(image, record.image)
    np.testing.assert_array_equal(label, record.label)
    assert read.meta("A") == json.loads(json.dumps(record.meta))


def test_foreground_lies_in_its_region(prepared):
    root, record = prepared
    found = records.Records(root).foreground("A")
    for name, inside in record.meta["regions"].items():
        assert found[name].dtype == np.int32
        expected = np.argwhere(np.isin(record.label, inside))
        np.testing.assert_array_equal(found[name], expected)


def test_a_large_region_is_sampled_the_same_way_each_time():
    label = np.ones((40, 40, 40), np.uint8)
    meta = {"case": "A", "regions": {"WT": [1, 2], "ET": [3]}}
    record = Record(np.zeros((1, 40, 40, 40), np.float16), label, meta)
    first, second = records.foreground(record), records.foreground(record)
    assert first["WT"].shape == (10_000, 3) and first["ET"].shape == (0, 3)
    assert len(np.unique(first["WT"], axis=0)) == 10_000
    np.testing.assert_array_equal(first["WT"], second["WT"])
    assert first["WT"].mean(0) == pytest.approx([19.5] * 3, abs=1)


def test_without_segmentation_there_is_no_label(make_case, tmp_path):
    record = preprocess(find_cases(make_case("A", values=None))[0][0])
    records.write_record(tmp_path / "r", record)
    index = {"modalities": [], "regions": record.meta["regions"], "spacing": None, "cases": ["A"]}
    records.write_index(tmp_path / "r", index)
    read = records.Records(tmp_path / "r")
    assert read.label("A") is None
    assert all(voxels.shape == (0, 3) for voxels in read.foreground("A").values())


def test_writing_replaces_whole_records_only(prepared, monkeypatch):
    root, record = prepared
    before = (root / "A" / "image.npy").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(records, "foreground", lambda record: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            records.write_record(root, Record(record.image * 2, record.label, record.meta))
    assert (root / "A" / "image.npy").read_bytes() == before
    records.write_record(root, Record(record.image * 2, record.label, record.meta))
    assert (root / "A" / "image.npy").read_bytes() != before
    assert sorted(path.name for path in root.iterdir()) == ["A", "dataset.json"]


def test_what_is_missing_is_said(prepared, tmp_path):
    root, _ = prepared
    with pytest.raises(ValueError, match="no such folder.*masm_jax.prepare"):
        records.read_index(tmp_path / "absent")
    (root / "A" / "label.npy").unlink()
    with pytest.raises(ValueError, match="label.npy: missing.*run prepare again"):
        records.Records(root).label("A")
    (root / "dataset.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99; expected 1"):
        records.read_index(root)
    (root / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        records.read_index(root)
    (root / "dataset.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        records.read_index(root)


def test_folds_cover_every_case_once_and_depend_on_the_seed_alone():
    folds = [records.split(IDS, f"{fold}/5", seed=3) for fold in range(5)]
    assert sorted(case for fold in folds for case in fold["val"]) == IDS
    assert {len(fold["val"]) for fold in folds} == {2, 3}
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == IDS and fold["test"] == []
    assert records.split(IDS[::-1], "0/5", seed=3) == folds[0]
    assert records.split(IDS, "0/5", seed=4) != folds[0]


def test_visits_of_a_patient_stay_together():
    ids = [f"BraTS-GLI-{patient:05d}-{visit}" for patient in range(6) for visit in (100, 101, 102)]
    for fold in range(3):
        parts = records.split(ids, f"{fold}/3", seed=0)
        patients = [{case[:15] for case in parts[part]} for part in ("train", "val")]
        assert len(parts["val"]) == 6 and not patients[0] & patients[1]


def test_holdout_and_file(tmp_path):
    parts = records.split(IDS, "holdout:case03,case01", seed=0)
    assert parts["val"] == ["case01", "case03"] and len(parts["train"]) == 9
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["case02", "case00"], "test": ["case09"]}))
    assert records.split(IDS, str(path), seed=0) == {
        "train": ["case00", "case02"],
        "val": [],
        "test": ["case09"],
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("5/5", "FOLD from 0 to FOLDS - 1"),
        ("0/1", "2 to 11 folds"),
        ("0/12", "2 to 11 folds"),
        ("holdout:case1", "'case1', which has no record .did you mean"),
        ("holdout:", "0 held out"),
        ("holdout:case01,case01", "again in val"),
        ("holdout:" + ",".join(IDS), "0 cases to train on"),
        ("absent.json", "neither a rule nor a file"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        records.split(IDS, rule, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["case00"], "val": ["case00"]}, "in train and again in val"),
        ({"train": ["other"]}, "train names 'other'"),
        ({"train": [], "validation": []}, "unknown keys"),
        ([1], "cannot be read"),
    ],
)
def test_bad_split_files(tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        records.split(IDS, str(path), seed=0)
