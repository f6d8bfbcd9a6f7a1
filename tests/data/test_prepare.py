"""The prepare command: exit codes, messages, resuming, and what it refuses."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from masm_jax import prepare
from masm_jax.data import build, records

DASH = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs prepare on tmp_path/raw; returns exit code, standard output and standard error."""

    def call(*flags, source="raw", target="records"):
        base = [f"--input={tmp_path / source}", f"--output={tmp_path / target}", "--workers=1"]
        code = prepare.main([*base, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def break_case(root, name):
    path = root / f"{root.name}{name}.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def test_all_good(make_case, run, tmp_path):
    make_case("BraTS2021_00001")
    make_case("BraTS-GLI-00000-000", DASH, (2, 1, 3), seed=1)
    code, out, err = run("--spacing=2")
    assert (code, err) == (0, "")
    assert "1 case, convention brats2021" in out and "1 case, convention brats2023" in out
    assert "ET: in 2 of 2 cases" in out
    read = records.Records(tmp_path / "records")
    assert read.cases == ["BraTS-GLI-00000-000", "BraTS2021_00001"] and read.spacing == 2
    # One meaning inside, whatever the files said: both sets hold the same three boxes.
    labels = [set(np.unique(read.label(case))) for case in read.cases]
    assert labels[0] == labels[1] == {0, 1, 2, 3}


def test_bad_cases_are_listed_and_the_others_go_on_in_parallel(make_case, run, tmp_path):
    make_case("A")
    break_case(make_case("B", seed=1), "_t2")
    make_case("C", seed=2)
    (make_case("D", seed=3) / "D_flair.nii.gz").unlink()
    code, out, err = run("--workers=2")
    assert code == 3 and "2 records in" in out
    assert "2 cases could not be prepared" in err
    lines = err.splitlines()
    assert any("B: " in line and "B_t2.nii.gz: cannot be read (EOFError" in line for line in lines)
    assert any("D: " in line and "modality flair is missing" in line for line in lines)
    index = records.read_index(tmp_path / "records")
    assert index["cases"] == ["A", "C"]
    assert [problem["case"] for problem in index["problems"]] == ["B", "D"]
    assert set(index["problems"][0]) == {"case", "file", "value", "expectation", "fix"}
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == ["A", "C", "dataset.json"]


def test_parallel_and_serial_give_the_same_bytes(make_case, run, tmp_path):
    make_case("A")
    make_case("B", seed=1)
    run("--spacing=1.5")
    run("--spacing=1.5", "--workers=2", target="parallel")
    for path in sorted((tmp_path / "records").rglob("*.np*")):
        other = tmp_path / "parallel" / path.relative_to(tmp_path / "records")
        assert path.read_bytes() == other.read_bytes()


def test_finished_records_are_kept_and_changed_sources_prepared_again(make_case, run, tmp_path):
    root = make_case("A")
    make_case("B", seed=1)
    run()
    stamps = {case: inode(tmp_path, case) for case in "AB"}
    code, out, _ = run()
    assert code == 0 and "2 of them kept from before" in out
    assert stamps == {case: inode(tmp_path, case) for case in "AB"}
    image = nib.load(root / "A_t1.nii.gz")
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) * 2, image.affine), root / "A_t1.nii.gz")
    code, out, _ = run()
    assert code == 0 and "1 of them kept from before" in out
    assert inode(tmp_path, "B") == stamps["B"]
    break_case(root, "_t2")
    code, _, _ = run()
    assert code == 3 and not (tmp_path / "records" / "A").exists()


def test_a_changed_file_is_seen_where_files_of_a_case_share_a_name(make_case, run, tmp_path):
    """As in the Decathlon; what was said of the last of them stood for all."""
    for path in list(make_case("A", ("_0", "_1", "_2", "_3", "_gt"), (1,)).iterdir()):
        folder = tmp_path / "set" / path.name.split("_")[1].removesuffix(".nii.gz") / "nii"
        folder.mkdir(parents=True)
        path.rename(folder / "A.nii.gz")
    content = {"files": {"dwi": "0/nii/{case}", "adc": "1/nii/{case}"}, "regions": {"lesion": [1]}}
    description = tmp_path / "set.json"
    description.write_text(json.dumps(content | {"segmentation": "gt/nii/{case}"}))
    for kept in ("", ", 1 of them kept from before"):
        code, out, _ = run(f"--description={description}", source="set")
        assert code == 0 and f"records{kept};" in out
    before = np.load(tmp_path / "records" / "A" / "image.npy")
    shutil.copy(tmp_path / "set/2/nii/A.nii.gz", tmp_path / "set/0/nii/A.nii.gz")
    code, out, _ = run(f"--description={description}", source="set")
    assert code == 0 and "kept" not in out
    assert (np.load(tmp_path / "records" / "A" / "image.npy") != before).any()


def inode(tmp_path, case):
    state = os.stat(tmp_path / "records" / case / "image.npy")
    return state.st_ino, state.st_mtime_ns


def test_an_interrupted_run_goes_on(make_case, run, tmp_path, monkeypatch):
    make_case("A")
    make_case("B", seed=1)
    whole = build.preprocess

    def stop_at_b(case, **options):
        if case.id == "B":
            raise KeyboardInterrupt
        return whole(case, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build, "preprocess", stop_at_b)
        code, _, err = run()
    assert code == 75 and "same command goes on" in err
    with pytest.raises(ValueError, match="did not finish"):
        records.read_index(tmp_path / "records")
    (tmp_path / "records" / ".B.tmp").mkdir()  # as a kill in the middle of writing leaves it
    code, out, _ = run()
    assert code == 0 and "1 of them kept from before" in out
    assert not (tmp_path / "records" / ".B.tmp").exists()


def test_a_run_killed_before_a_record_got_its_name_goes_on(make_case, run, tmp_path):
    make_case("A")
    run()
    (tmp_path / "records" / "A").rename(tmp_path / "records" / ".A.tmp")
    code, out, err = run()
    assert (code, err) == (0, "") and "1 record in" in out and "kept" not in out
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == ["A", "dataset.json"]


def test_other_settings_are_refused_until_overwrite(make_case, run, tmp_path):
    make_case("A", DASH, (2, 1, 3))
    run("--spacing=2")
    index = records.read_index(tmp_path / "records")
    (tmp_path / "records" / "notes.txt").write_text("mine")
    for flags, words in (
        (("--spacing=3",), "spacing 2.0, now it is 3.0"),
        ((), "spacing 2.0, now it is None"),
        (("--spacing=2", "--labels=msd"), "labels"),
    ):
        code, _, err = run(*flags)
        assert code == 1 and words in err and "--overwrite" in err
        assert records.read_index(tmp_path / "records") == index
    code, _, _ = run("--spacing=3", "--overwrite")
    assert code == 0 and records.Records(tmp_path / "records").spacing == 3
    assert (tmp_path / "records" / "notes.txt").read_text() == "mine"


def test_records_of_another_input_are_refused(make_case, run):
    make_case("A")
    make_case("B", seed=1, folder="other")
    run()
    code, _, err = run(source="other")
    assert code == 1 and "record of A, which is not in this input" in err


def test_duplicates_name_the_first(make_case, run, tmp_path):
    root = make_case("A")
    other = make_case("B", seed=1)
    for suffix in ("_t1", "_t1ce", "_t2", "_flair", "_seg"):  # the same voxels in another file type
        target = tmp_path / "raw" / "C" / f"C{suffix}.nii"
        target.parent.mkdir(exist_ok=True)
        nib.save(nib.load(root / f"A{suffix}.nii.gz"), target)
    shutil.copy(root / "A_t1.nii.gz", other / "B_t1.nii.gz")
    for _ in range(2):  # and once more when resumed
        code, _, err = run()
        assert code == 3
        assert "C_t1ce.nii: t1ce has the same voxels as A" in err
        assert "B_t1.nii.gz: t1 has the same voxels as A" in err
        assert records.read_index(tmp_path / "records")["cases"] == ["A"]


def test_a_set_where_one_case_lacks_its_segmentation(make_case, run):
    make_case("A")
    make_case("B", values=None, seed=1)
    code, _, err = run()
    assert code == 3 and "B: " in err and "no segmentation" in err


def test_a_set_without_segmentations_serves_for_prediction(make_case, run, tmp_path):
    make_case("A", values=None)
    code, out, _ = run()
    assert code == 0 and "prediction only" in out
    assert records.Records(tmp_path / "records").label("A") is None


def test_a_defect_shows_its_traceback(make_case, run, monkeypatch):
    make_case("A")
    monkeypatch.setattr(build, "preprocess", lambda case, **options: [][0])
    code, _, err = run()
    assert code == 1
    assert "Traceback" in err and "IndexError: list index out of range" in err


def test_nothing_usable(make_case, run, tmp_path):
    code, _, err = run(source="absent")
    assert code == 1 and "does not exist" in err and len(err.splitlines()) == 1
    make_case("A", values=(2, 1, 3))
    code, _, err = run()
    assert code == 1 and "--labels=brats2023" in err and "--labels=msd" in err
    code, _, err = run(target="raw")
    assert code == 1 and "same folder" in err
    assert not (tmp_path / "records").exists()
    (tmp_path / "file").write_text("")
    code, _, err = run("--labels=brats2023", target="file")
    assert code == 1 and "file" in err and "Traceback" not in err


def test_usage(run, capsys):
    assert prepare.main(["--input=x"]) == 2
    assert run("--spacng=2")[0] == 2
    code, _, err = run("--spacng=2")
    assert code == 2 and "did you mean --spacing?" in err
    for flag in ("--spacing=-1", "--spacing=two", "--workers=0", "--labels=brats2022"):
        assert run(flag)[0] == 2
    assert prepare.main(["--help"]) == 0
    assert "--description" in capsys.readouterr().out


def test_a_described_set(make_case, run, tmp_path):
    make_case("A", ("_T1W", "_T1WKS", "_T2W", "_FLAIR", "_consensus_gt"), (1,))
    description = tmp_path / "lesions.json"
    content = {
        "files": {"t1": "_T1W", "t1ce": "_T1WKS", "t2": "_T2W", "flair": "_FLAIR"},
        "segmentation": "_consensus_gt",
        "regions": {"lesion": [1]},
    }
    description.write_text(json.dumps(content))
    code, out, _ = run(f"--description={description}")
    assert code == 0 and "lesion: in 1 of 1 cases" in out
    assert records.Records(tmp_path / "records").regions == {"lesion": (1,)}


def test_a_window_that_comes_or_goes_is_another_setting(make_case, run, tmp_path):
    make_case("A", ("_ct", "_1", "_2", "_3", "_gt"), (1,))
    plain = {"files": {"ct": "_ct"}, "segmentation": "_gt", "regions": {"lesion": [1]}}
    window = plain | {"window": {"ct": [0, 500]}}
    description = tmp_path / "ct.json"
    for first, second, words in (
        (plain, window, "window None, now it is {'ct': [0.0, 500.0]}"),
        (window, plain, "window {'ct': [0.0, 500.0]}, now it is None"),
    ):
        description.write_text(json.dumps(first))
        assert run(f"--description={description}", "--overwrite")[0] == 0
        description.write_text(json.dumps(second))
        code, _, err = run(f"--description={description}")
        assert code == 1 and words in err and "--overwrite" in err


def test_real_scans_of_three_conventions(real_data, tmp_path, capsys):
    for name in ("BraTS2021_01485", "BraTS20_Training_001", "BraTS-GLI-00000-000"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / name).symlink_to(real_data / "brats" / name)
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--spacing=2"]
    assert prepare.main([*flags, "--workers=2"]) == 0
    read = records.Records(tmp_path / "r")
    assert len(read.cases) == 3
    for case in read.cases:
        assert set(np.unique(read.label(case))) == {0, 1, 2, 3}
        assert read.meta(case)["volumes_ml"]["ET"] > 0
    assert "brats2018" in capsys.readouterr().out
