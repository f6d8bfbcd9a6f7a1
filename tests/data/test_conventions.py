"""Label values and names of every convention, and descriptions of other sets."""

import json

import numpy as np
import pytest

from masm_jax.data import conventions
from masm_jax.data.description import load_description

# What the data sets' own papers and dataset.json say: file value -> region membership.
MEANING = {
    "brats2018": {1: "core", 2: "oedema", 4: "enhancing"},
    "brats2021": {1: "core", 2: "oedema", 4: "enhancing"},
    "brats2023": {1: "core", 2: "oedema", 3: "enhancing"},
    "brats2024": {1: "core", 2: "oedema", 3: "enhancing", 4: "cavity"},
    "msd": {1: "oedema", 2: "core", 3: "enhancing"},
}
INSIDE = {"core": (1, 1, 0), "oedema": (1, 0, 0), "enhancing": (1, 1, 1), "cavity": (0, 0, 0)}


@pytest.mark.parametrize("name", MEANING)
def test_regions_of_every_file_value(name):
    convention = conventions.BUILT_IN[name]
    values = np.array(list(MEANING[name]), np.uint8)
    masks = conventions.region_masks(
        conventions.to_internal(values, convention.labels), convention.regions
    )
    expected = np.array([INSIDE[meaning] for meaning in MEANING[name].values()], bool).T
    assert list(convention.regions) == ["WT", "TC", "ET"]
    np.testing.assert_array_equal(masks, expected)


@pytest.mark.parametrize("name", MEANING)
def test_labels_and_paint_undo_the_reading(name):
    convention = conventions.BUILT_IN[name]
    values = np.array([0, *MEANING[name]], np.uint8)
    internal = conventions.to_internal(values, convention.labels)
    np.testing.assert_array_equal(conventions.to_file(internal, convention.labels), values)
    painted = np.zeros_like(values)
    for mask, region in zip(
        conventions.region_masks(internal, convention.regions), convention.regions
    ):
        painted[mask] = convention.paint[region]
    in_regions = [0 if MEANING[name].get(int(v)) == "cavity" else v for v in values]
    np.testing.assert_array_equal(painted, in_regions)


def test_float_labels_are_remapped_as_integers():
    values = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    internal = conventions.to_internal(values, conventions.BUILT_IN["msd"].labels)
    assert internal.dtype == np.uint8 and internal.tolist() == [0, 2, 1, 3]


def test_an_unknown_scheme_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"brats2012.*did you mean brats202[134]\?"):
        conventions.with_labels(conventions.BUILT_IN["brats2021"], "brats2012")


def msd_json(path, **changes):
    content = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {
            "0": "background",
            "1": "edema",
            "2": "non-enhancing tumor",
            "3": "enhancing tumour",
        },
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_decathlon_dataset_json_decides_channels_and_labels(tmp_path):
    convention = conventions.msd_convention(msd_json(tmp_path / "dataset.json"))
    assert convention.channels == {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}
    assert convention.labels == {1: 2, 2: 1, 3: 3}
    assert convention.paint == {"WT": 1, "TC": 2, "ET": 3}
    other = {"0": "background", "1": "necrosis", "2": "Oedema", "3": "enhancing"}
    assert conventions.msd_convention(
        msd_json(
            tmp_path / "other.json",
            labels=other,
            modality={"0": "T1w", "1": "T2w", "2": "T1Gd", "3": "FLAIR"},
        )
    ).labels == {1: 1, 2: 2, 3: 3}


def test_decathlon_doubt_names_the_flag(tmp_path):
    path = msd_json(tmp_path / "dataset.json", labels={"1": "a", "2": "b", "3": "c"})
    with pytest.raises(ValueError, match="--labels=msd"):
        conventions.msd_convention(path)
    assert conventions.msd_convention(path, "msd").labels == {1: 2, 2: 1, 3: 3}
    assert conventions.msd_convention(msd_json(path, modality={"0": "CT"})) is None


LESIONS = {
    "files": {"t1": "_T1W", "t1ce": "_T1WKS", "t2": "_T2W", "flair": "_FLAIR"},
    "segmentation": "_consensus_gt",
    "regions": {"lesion": [1]},
}


def describe(tmp_path, **changes):
    path = tmp_path / "lesions.json"
    path.write_text(json.dumps({k: v for k, v in (LESIONS | changes).items() if v is not None}))
    return load_description(path)


def test_a_description_with_defaults(tmp_path):
    convention = describe(tmp_path)
    assert convention.name == "lesions"
    assert convention.modalities == ("t1", "t1ce", "t2", "flair")
    assert convention.labels == {1: 1}
    assert convention.paint == {"lesion": 1}


def test_a_python_description_is_the_same(tmp_path):
    path = tmp_path / "lesions.py"
    path.write_text(f"description = {LESIONS!r}\n")
    assert load_description(path) == describe(tmp_path)


def test_a_described_remapping_with_nested_regions(tmp_path):
    convention = describe(
        tmp_path, labels={"4": 2, "2": 1, "3": 1, "1": 3}, paint={"TC": 2},
        regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]},
    )  # fmt: skip
    assert convention.paint == {"WT": 4, "TC": 2, "ET": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": {"a": [1]}}, r"unknown key 'region'.*did you mean regions"),
        ({"files": None}, "'files' is missing"),
        ({"regions": {"a": [1, 2], "b": [1, 2]}}, r"region b = \[1, 2\] and region a"),
        ({"regions": {"a": [1]}, "labels": {"1": 2}}, "not inside labels"),
        ({"regions": {"a": [0, 1]}}, "label value 0"),
        ({"regions": {"a": [1, 2]}}, r"label values \[1, 2\] belong to it.*'paint'"),
        ({"paint": {"lesion": 7}}, r"paint lesion = 7; expected one of \[1\]"),
        ({"paint": {"leison": 1}}, "did you mean lesion"),
        ({"modalities": ["t1"]}, "differ"),
        ({"channels": {"t1": 0}}, "a channel for each"),
    ],
)
def test_contradictions_in_a_description(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        describe(tmp_path, **changes)
    assert "lesions.json" in str(error.value)


def test_an_unreadable_description(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_description(tmp_path / "absent.json")
    (tmp_path / "bad.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="no variable 'description'"):
        load_description(tmp_path / "bad.py")
