"""Finding cases under every naming, and refusing labels that leave doubt."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from masm_jax.data import cases, conventions, recognition
from masm_jax.data.preprocess import preprocess

UNDERSCORE = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
DASH = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_names_decide_the_modality(make_case, suffix):
    root = make_case("BraTS2021_00001", suffix=suffix)
    found, problems = cases.find_cases(root)
    assert not problems
    (case,) = found
    names = [path.name.removesuffix(suffix) for path in case.images]
    assert names == ["BraTS2021_00001" + end for end in UNDERSCORE[:4]]
    assert case.segmentation.name == f"BraTS2021_00001_seg{suffix}"
    assert case.convention.name == "brats2021" and case.channels == (None,) * 4


def test_t1ce_alone_is_not_taken_for_t1(make_case):
    root = make_case("A")
    (root / "A_t1.nii.gz").unlink()
    found, problems = cases.find_cases(root)
    assert not found
    (problem,) = problems
    assert problem.file.endswith("A_t1.nii.gz") and "modality t1 is missing" in problem.value


def test_a_case_that_lacks_modalities_where_that_is_allowed(make_case):
    """Its convention names those it has; the brain is found in them, and they are normalised."""
    root = make_case("A")
    whole = preprocess(cases.find_cases(root)[0][0], spacing=None)
    for modality in ("t1", "t2"):
        (root / f"A_{modality}.nii.gz").unlink()
    (case,), problems = cases.find_cases(root, partial=True)
    assert not problems and case.convention.modalities == ("t1ce", "flair")
    assert [path.name for path in case.images] == ["A_t1ce.nii.gz", "A_flair.nii.gz"]
    record = preprocess(case, spacing=None)
    assert record.image.shape[0] == 2 and record.meta["modalities"] == ["t1ce", "flair"]
    assert record.image.shape[1:] == whole.image.shape[1:]
    np.testing.assert_array_equal(record.image, whole.image[[1, 3]])


def test_one_root_with_three_conventions_at_any_depth(make_case):
    make_case("Brats18_1", folder="raw/HGG")
    make_case("Brats18_2", folder="raw/LGG", seed=1)
    make_case("BraTS2021_00001", seed=2)
    make_case("BraTS-GLI-00000-000", DASH, (2, 1, 3), seed=3)
    root = make_case("BraTS20_Training_001", seed=4).parent
    (root / "BraTS2021_00001" / "._BraTS2021_00001_t1.nii.gz").write_bytes(b"macOS")
    found, problems = cases.find_cases(root)
    assert not problems
    assert {case.id: case.convention.name for case in found} == {
        "Brats18_1": "brats2018",
        "Brats18_2": "brats2018",
        "BraTS2021_00001": "brats2021",
        "BraTS20_Training_001": "brats2018",
        "BraTS-GLI-00000-000": "brats2023",
    }
    assert [case.id for case in found] == sorted(case.id for case in found)


def test_a_flat_folder(make_case, tmp_path):
    make_case("A")
    make_case("B", seed=1)
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "raw").rglob("*.nii.gz"):
        shutil.copy(path, tmp_path / "flat")
    assert [case.id for case in cases.find_cases(tmp_path / "flat")[0]] == ["A", "B"]


def test_a_case_without_segmentation_serves_for_prediction(make_case):
    found, problems = cases.find_cases(make_case("A", DASH, None))
    assert not problems and found[0].segmentation is None
    assert found[0].convention.paint == {"WT": 2, "TC": 1, "ET": 3}
    assert cases.missing_segmentations(found) == []


def test_a_misnamed_segmentation_is_named_in_the_fix(make_case):
    make_case("BraTS20_Training_354")
    root = make_case("BraTS20_Training_355", seed=1)
    seg = root / "BraTS20_Training_355_seg.nii.gz"
    seg.rename(root / "W39_1998.09.19_Segm.nii.gz")
    (problem,) = cases.missing_segmentations(cases.find_cases(root.parent)[0])
    assert problem.case == "BraTS20_Training_355" and problem.file == str(seg)
    assert "rename W39_1998.09.19_Segm.nii.gz" in problem.fix


def test_the_same_id_twice_and_two_files_for_one_modality(make_case):
    make_case("A", folder="raw/HGG")
    make_case("A", folder="raw/LGG", seed=1)
    root = make_case("B", seed=2)
    shutil.copy(root / "B_t2.nii.gz", root / "B_t2.nii")
    found, problems = cases.find_cases(root.parent)
    assert [str(case.images[0].parent.name) for case in found] == ["A"]
    assert "HGG" in str(found[0].images[0])
    by_case = {problem.case: problem for problem in problems}
    assert "second case of this name" in by_case["A"].value and "LGG" in by_case["A"].file
    assert "2 files for t2" in by_case["B"].value


@pytest.mark.parametrize(
    ("style", "values", "scheme"),
    [
        ("_t1ce", [{1, 2, 4}, {1, 2}], "brats2021"),
        ("_t1ce", [{1, 2}], "brats2021"),
        ("-t1n", [{1, 2, 3}], "brats2023"),
        ("-t1n", [{2}], "brats2023"),
        ("-t1n", [{1, 2, 3}, {2, 4}], "brats2024"),
        ("-t1n", [], "brats2023"),
        ("_t1ce", [], "brats2021"),
    ],
)
def test_labels_are_recognised(style, values, scheme):
    found, note = recognition.recognise_labels(style, dict(enumerate(values)))
    assert found == scheme
    assert ("no enhancing tumour in any case" in note) == (values in ([{1, 2}], [{2}]))


@pytest.mark.parametrize(
    ("style", "values", "flags"),
    [
        ("_t1ce", [{1, 2, 3}], ("--labels=brats2023", "--labels=msd")),
        ("_t1ce", [{1, 2, 4}, {1, 3}], ("--labels=brats2021", "--labels=brats2024")),
        ("-t1n", [{1, 2, 4}], ("--labels=brats2021", "--labels=brats2024")),
    ],
)
def test_doubt_is_refused_with_the_flags_that_decide(style, values, flags):
    with pytest.raises(ValueError) as error:
        recognition.recognise_labels(style, {f"case{i}": v for i, v in enumerate(values)})
    assert all(flag in str(error.value) for flag in flags)
    assert "case0" in str(error.value)


def test_the_flag_decides(make_case):
    root = make_case("A", DASH, (2, 1, 4))
    with pytest.raises(ValueError, match="--labels=brats2021"):
        cases.find_cases(root)
    for name, internal in (("brats2021", 3), ("brats2024", 4)):
        (case,) = cases.find_cases(root, labels=name)[0]
        assert case.convention.labels[4] == internal
        assert case.convention.files == conventions.BUILT_IN["brats2023"].files


def test_paediatric_labels_are_refused(make_case):
    root = make_case("BraTS-PED-00001-000", DASH, (4, 2, 1))
    with pytest.raises(ValueError, match="BraTS-PED.*--description"):
        cases.find_cases(root)


@pytest.fixture
def decathlon(tmp_path):
    """A Task01 folder with one training and one test case; channel c holds 1000 c + noise."""
    root = tmp_path / "Task01_BrainTumour"
    rng = np.random.default_rng(0)
    for name in ("imagesTr/BRATS_001", "imagesTs/BRATS_485"):
        image = rng.integers(1, 99, (8, 8, 8, 4)) + 1000 * np.arange(4)
        save(root / f"{name}.nii.gz", image.astype(np.int16))
    label = np.zeros((8, 8, 8), np.uint8)
    label[2:6, 2:6, 2:6], label[3:5, 3:5, 3:5], label[3, 3, 3] = 1, 2, 3
    save(root / "labelsTr/BRATS_001.nii.gz", label)
    content = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {
            "0": "background",
            "1": "edema",
            "2": "non-enhancing tumor",
            "3": "enhancing tumour",
        },
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def test_decathlon_4d_files(decathlon):
    (case,), problems = cases.find_cases(decathlon)
    assert not problems and case.id == "BRATS_001" and case.convention.name == "msd"
    assert len(set(case.images)) == 1 and case.channels == (1, 2, 3, 0)
    assert case.segmentation.parent.name == "labelsTr"
    assert "imagesTs (1 files) left out" in case.convention.note
    record = preprocess(case)
    means = [record.meta["intensity"][m]["mean"] // 1000 for m in ("flair", "t1", "t1ce", "t2")]
    assert means == [0, 1, 2, 3]
    # 1 is oedema and 2 the core there: TC = 2 + 3.
    assert record.meta["volumes_ml"] == pytest.approx({"WT": 0.064, "TC": 0.008, "ET": 0.001})


def test_decathlon_test_folder_alone(decathlon):
    (case,), _ = cases.find_cases(decathlon / "imagesTs")
    assert case.id == "BRATS_485" and case.segmentation is None


def test_segmentations_alone(decathlon, make_case, tmp_path):
    """With or without images beside them; of the Decathlon also the folder with nothing else."""
    for root in (decathlon, decathlon / "labelsTr"):
        (case,), problems = cases.find_cases(root, images=False)
        assert not problems and (case.id, case.images) == ("BRATS_001", ())
        assert case.convention.labels == {1: 2, 2: 1, 3: 3}
    for path in make_case("A", DASH, (2, 1, 3)).glob("*-t*"):
        path.unlink()
    make_case("B", seed=1)
    make_case("C", values=None, seed=2)
    found, problems = cases.find_cases(tmp_path / "raw", images=False)
    assert not problems and [(case.id, case.images) for case in found] == [("A", ()), ("B", ())]
    assert [case.convention.name for case in found] == ["brats2023", "brats2021"]
    make_case("B", folder="raw/again")
    (problem,) = cases.find_cases(tmp_path / "raw", images=False)[1]
    assert problem.case == "B" and "second case of this name" in problem.value
    with pytest.raises(ValueError, match="name of a segmentation.*expected CASE_seg"):
        cases.find_cases(tmp_path / "raw" / "C", images=False)


def test_a_described_set_with_folders_in_its_patterns(make_case, tmp_path):
    root = make_case("A", ("_0000", "_0001", "_0002", "_0003", "_gt"), (1,))
    for path in list(root.iterdir()):
        folder = tmp_path / "set" / ("labels" if "_gt" in path.name else "images")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name.replace("_gt", ""))
    description = tmp_path / "set.json"
    description.write_text(
        json.dumps(
            {
                "files": {"a": "images/{case}_0001", "b": "images/{case}_0000"},
                "segmentation": "labels/{case}",
                "regions": {"lesion": [1]},
            }
        )
    )
    (case,), problems = cases.find_cases(tmp_path / "set", description=description)
    assert not problems and case.id == "A"
    assert [path.name for path in case.images] == ["A_0001.nii.gz", "A_0000.nii.gz"]
    assert case.segmentation == tmp_path / "set" / "labels" / "A.nii.gz"


def test_a_description_keeps_its_meaning_whatever_its_name(make_case, tmp_path):
    """The name of a built-in convention, and the folders of 2018 to 2020."""
    root = make_case("A", values=(1,), folder="raw/HGG")
    content = {"files": {"t2": "_t2", "t1": "_t1"}, "segmentation": "_seg", "regions": {"all": [1]}}
    description = tmp_path / "brats2021.json"
    description.write_text(json.dumps(content))
    (case,), problems = cases.find_cases(root, description=description)
    assert not problems and case.convention.name == "brats2021"
    assert case.convention.modalities == ("t2", "t1") and case.convention.regions == {"all": (1,)}
    assert [path.name for path in case.images] == ["A_t2.nii.gz", "A_t1.nii.gz"]


def test_nothing_to_find(tmp_path, make_case):
    with pytest.raises(ValueError, match="does not exist"):
        cases.find_cases(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .nii or .nii.gz"):
        cases.find_cases(tmp_path / "empty")
    root = make_case("A", ("_a", "_b", "_c", "_d", "_e"))
    with pytest.raises(ValueError, match="A_a.nii.gz.*--description"):
        cases.find_cases(root)
    with pytest.raises(ValueError, match="no such label scheme"):
        cases.find_cases(root, labels="brats21")


def test_real_names(real_data):
    found, problems = cases.find_cases(real_data / "brats")
    assert not problems and len(found) == 10
    names = {case.id: case.convention.name for case in found}
    assert names["BraTS-GLI-00000-000"] == "brats2023"
    assert names["BraTS2021_01477"] == "brats2021"
    assert names["BraTS20_Training_001"] == "brats2018"
