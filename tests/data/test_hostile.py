"""Bad files, found by tests/faults: each was a traceback, a flood of memory, a hang, or worse."""

import gzip
import json
import os
import pickle
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from masm_jax import prepare
from masm_jax.data import cases, description, nifti, record_checks, records
from masm_jax.files import name_fault, printable

SHAPE = (4, 5, 6)
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
GOOD = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE), np.eye(4)).to_bytes()


def put(data, offset, code, *values):
    new = struct.pack("<" + code, *values)
    return data[:offset] + new + data[offset + len(new) :]


def peak(function, *args):
    """Most bytes that Python objects took meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            function(*args)
        return tracemalloc.get_traced_memory()[1], str(error.value)
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- NIfTI


@QUICK
@given(some.lists(some.tuples(some.integers(0, 351), some.integers(0, 255)), max_size=8),
       some.booleans())  # fmt: skip
def test_any_header_is_read_or_named(tmp_path, changes, packed):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(bytes(data), 1) if packed else bytes(data))
    try:
        array, affine, _ = nifti.read(path)
    except ValueError as error:
        assert str(path) in str(error) and ";" in str(error)
    else:
        assert array.size <= nifti.SMALL_VOXELS and affine.shape == (4, 4)


@QUICK
@given(some.binary(max_size=400))
def test_any_bytes_are_read_or_named(tmp_path, data):
    for name, content in (("a.nii", data), ("b.nii.gz", data), ("c.nii.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            nifti.read(tmp_path / name)


@pytest.mark.parametrize("dims", [(3, *[32767] * 3), (7, *[32767] * 7), (3, *[2000] * 3)])
def test_declared_sizes_take_no_memory(tmp_path, dims):
    path = tmp_path / "a.nii"
    path.write_bytes(put(GOOD, 40, "8h", *dims, *[1] * (8 - len(dims))))
    most, said = peak(nifti.read, path)
    assert most < 5e6 and "voxels, expected at most 16777216 in a file of" in said
    assert "as .nii" in said


def test_a_bomb_is_not_unpacked(tmp_path):
    member = gzip.compress(bytes(1 << 26), 9)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(GOOD) + member * 16)
    most, said = peak(nifti.read, path)
    assert most < 2e7 and "goes on long after the 592 bytes" in said
    # One that declares what it unpacks to: a gigabyte in a megabyte.
    head = put(put(GOOD[:352], 40, "8h", 3, 1024, 1024, 1024, 1, 1, 1, 1), 70, "hh", 2, 8)
    path.write_bytes(gzip.compress(head) + member * 16)
    most, said = peak(nifti.read, path)
    assert most < 2e7 and "1073741824 voxels" in said


def test_labels_may_be_as_many_as_the_voxels_of_their_image(tmp_path):
    labels = np.zeros((300, 300, 200), np.uint8)  # 18 million in 20 kB: no harm, where it is known
    path = tmp_path / "seg.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(labels, np.eye(4)).to_bytes(), 9))
    with pytest.raises(ValueError, match="store it without compression"):
        nifti.read(path)
    assert nifti.read(path, voxels=labels.size)[0].shape == labels.shape


def test_pipes_devices_and_circles_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    (tmp_path / "folder.nii").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(ValueError, match=f"{name}.nii: cannot be read .*expected a file"):
            nifti.read(tmp_path / f"{name}.nii")
    (tmp_path / "circle.nii").symlink_to(tmp_path / "circle.nii")
    with pytest.raises(ValueError, match="circle.nii: cannot be read"):
        nifti.read(tmp_path / "circle.nii")


def test_a_folder_named_like_the_segmentation_is_named(make_case, tmp_path, capsys):
    make_case("A")
    segmentation = tmp_path / "raw" / "A" / "A_seg.nii.gz"
    segmentation.unlink()
    segmentation.mkdir()  # was a case without segmentation, without a word
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    assert prepare.main(flags) == 1
    assert "A_seg.nii.gz: cannot be read" in capsys.readouterr().err


def test_a_damaged_file_gives_no_geometry(tmp_path):
    like = tmp_path / "like.nii.gz"
    like.write_bytes(gzip.compress(GOOD)[:100])
    with pytest.raises(ValueError, match="like.nii.gz: cannot be read"):
        nifti.write_labels(tmp_path / "out.nii.gz", np.zeros(SHAPE, np.uint8), like)
    with pytest.raises(ValueError, match="like.nii.gz: cannot be read"):
        nifti.description(like)
    assert [path.name for path in tmp_path.iterdir()] == ["like.nii.gz"]


@pytest.mark.parametrize("affine, words", [
    (np.diag([1e6, 1, 1, 1]), "voxels of 1e+06x1x1 mm"),
    (np.diag([90.0, 90, 90, 1]), "and 1000 litres in all"),
    (np.array([[1000, 0, 1, 0], [0, 1, 0, 0], [1000, 0, 1.0000001, 0], [0, 0, 0, 1]]), "voxels"),
])  # fmt: skip
def test_volumes_that_no_scanner_makes_are_refused(make_case, affine, words, tmp_path, capsys):
    make_case("A", affine=affine)
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    code, said = prepare.main(flags), capsys.readouterr().err
    assert code == 1 and "A_t1.nii.gz" in said and "Traceback" not in said
    assert words in said


def test_resampling_makes_no_more_voxels_than_the_files_are_worth(make_case, tmp_path, capsys):
    make_case("A", affine=np.diag([60.0, 60, 60, 1]))
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    assert prepare.main([*flags, "--spacing=1"]) == 1
    said = capsys.readouterr().err
    assert "choose a larger --spacing" in said and not (tmp_path / "r" / "A").exists()
    assert prepare.main(flags) == 0  # as they are


# ---------------------------------------------------------------- names


@QUICK
@given(some.text(some.characters(), max_size=12) | some.sampled_from(["..", ".", "", "../x"]))
def test_a_name_without_fault_stays_in_its_folder(tmp_path, name):
    if not name_fault(name):
        path = tmp_path / name
        assert os.path.dirname(os.path.abspath(path)) == str(tmp_path)
        assert name.encode().decode() == name and printable(name) == name


@pytest.mark.parametrize("name", ["..", ".x", "a\\b", "a\nb", "\x1b[31m", "\udcff", "x" * 201, 3])
def test_names_that_no_folder_takes(name):
    assert name_fault(name).isprintable() and name_fault(name)


def test_a_case_called_two_points_costs_nothing(make_case, tmp_path, capsys):
    """With a pattern that has text before {case}; the folder above the records was removed."""
    root = make_case("A")
    for path in list(root.iterdir()):
        part = path.name.split("_")[1].split(".")[0]
        path.rename(root / f"{part}@...nii.gz")
    described = {
        "files": {m: f"{m}@{{case}}" for m in ("t1", "t1ce", "t2", "flair")},
        "segmentation": "seg@{case}", "regions": {"WT": [1, 2, 4]}, "paint": {"WT": 2},
    }  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(described))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'out' / 'r'}", "--workers=1"]
    assert prepare.main([*flags, f"--description={tmp_path / 'd.json'}"]) == 1
    assert "name '..', expected one for a file" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_what_is_said_of_a_name_has_no_control_characters(make_case, tmp_path):
    make_case("Ca\x1b[31m\nse")
    found, problems = cases.find_cases(tmp_path / "raw")
    assert not found and str(problems[0]).isprintable() and "\\x1b" in str(problems[0])


def test_a_link_to_nothing_does_not_end_the_others(make_case, tmp_path, capsys):
    make_case("A")
    root = make_case("B", seed=1)
    (root / "B_t2.nii.gz").unlink()
    (root / "B_t2.nii.gz").symlink_to("/nowhere")
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    assert prepare.main(flags) == 3
    said = capsys.readouterr().err
    assert "B: " in said and "B_t2.nii.gz" in said
    assert records.Records(tmp_path / "r").cases == ["A"]


# ---------------------------------------------------------------- descriptions, records

WORDS = some.text(max_size=6)
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | WORDS,
    lambda inside: some.lists(inside, max_size=3) | some.dictionaries(WORDS, inside),
    max_leaves=5,
)
KEYS = some.sampled_from(["name", "modalities", "files", "channels", "segmentation", "labels",
                          "regions", "paint", "pairs", "window", "brain"])  # fmt: skip


@QUICK
@given(some.dictionaries(KEYS, JSON, max_size=3))
def test_any_description_is_understood_or_named(tmp_path, changes):
    good = {"files": {"t1": "_t1", "t2": "_t2"}, "regions": {"lesion": [1]}}
    path = tmp_path / "d.json"
    path.write_text(json.dumps(good | changes))
    try:
        found = description.load_description(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert not any(map(name_fault, (*found.modalities, *found.regions)))


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "RecursionError"),
    ('{"files": {"t1": "_t1"}, "regions": {"../x": [1]}}', "name '../x'"),
    ('{"files": {"t1": "' + "*" * 9 + '"}, "regions": {"x": [1]}}', "at most four"),
    ('{"files": {"t1": null}, "regions": {"x": [1]}}', "files = "),
    ("[]", "expected an object"),
])  # fmt: skip
def test_descriptions_that_were_tracebacks(tmp_path, text, words):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        description.load_description(tmp_path / "d.json")


class Runs:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def record(make_case, tmp_path):
    """The record A of tmp_path/r, just prepared."""
    make_case("A")
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    assert prepare.main(flags) == 0
    return tmp_path / "r" / "A"


def spoilt(record, name, tmp_path):
    """What may have become of a file of a record."""
    path, whole = record / name, (record / name).read_bytes()
    np.save(tmp_path / "x.npy", np.array([Runs(tmp_path / "ran")], object), allow_pickle=True)
    for data in (
        b"", whole[: len(whole) // 2], b"\0" * len(whole), (tmp_path / "x.npy").read_bytes(),
        pickle.dumps(Runs(tmp_path / "ran")),
    ):  # fmt: skip
        path.write_bytes(data)
        yield path
    path.write_bytes(whole)


def test_damaged_records_are_named_and_made_again(record, tmp_path, capsys):
    readers = {"image.npy": "image", "label.npy": "label", "foreground.npz": "foreground",
               "meta.json": "meta"}  # fmt: skip
    flags = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'r'}", "--workers=1"]
    whole = {name: (record / name).read_bytes() for name in readers}
    for name, reader in readers.items():
        for _ in spoilt(record, name, tmp_path):
            read = records.Records(tmp_path / "r")
            with pytest.raises(ValueError, match=name) as error:
                getattr(read, reader)("A")
            assert "prepare" in str(error.value) and not (tmp_path / "ran").exists()
        (record / name).write_bytes(b"half")
        assert prepare.main(flags) == 0, capsys.readouterr().err
        assert {name: (record / name).read_bytes() for name in readers} == whole


def test_an_archive_of_records_takes_no_memory(record):
    path = record / "foreground.npz"
    np.savez_compressed(path, WT=np.zeros((30_000_000, 3), np.int32), TC=[1], ET=[1])
    most, said = peak(record_checks.voxels, path, ["WT"], records.FOREGROUND_SAMPLES)
    assert most < 5e6 and "360000128 bytes" in said


@pytest.mark.parametrize("key, value", [
    ("shape", [10**6] * 3), ("shape", None), ("crop", [[0, 99]] * 3), ("affine", [[0] * 4] * 4),
    ("spacing", [0, 1, 1]), ("paint", {"WT": []}), ("regions", {"../x": [1]}), ("files", []),
])  # fmt: skip
def test_impossible_values_in_a_record_are_named(record, key, value):
    meta = json.loads((record / "meta.json").read_text())
    (record / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(ValueError, match="meta.json.*run prepare again"):
        records.Records(record.parent).meta("A")


def test_lists_of_cases_that_lead_out_are_refused(record, tmp_path):
    index = json.loads((record.parent / "dataset.json").read_text())
    (record.parent / "dataset.json").write_text(json.dumps(index | {"cases": ["../raw/A"]}))
    with pytest.raises(ValueError, match="dataset.json: name '../raw/A'"):
        records.Records(record.parent)
    (tmp_path / "split.json").write_text('{"train": [], "val": ["../../x"], "test": []}')
    with pytest.raises(ValueError, match="split.json: val: name '../../x'"):
        records.read_split(tmp_path)
    for text in ("", "[]", '{"val": 3}', "[" * 100_000):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match="split.json.*restore it"):
            records.read_split(tmp_path)
