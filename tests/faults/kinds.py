"""The kinds of bad input, by name: each spoils a good case with the numbers it is given.

A kind returns what must come of it: FAILS (an error that names the case), WORKS, or EITHER (a
random change may do no harm; but no traceback, hang, flood or half a file).
"""

import json
import os
import struct
import threading
import time
from collections.abc import Callable

import nibabel as nib
import numpy as np

from tests.faults import made
from tests.faults.made import Case, bomb, field, flipped, zipped

FAILS, WORKS, EITHER = "fails", "works", "either"
KINDS: dict[str, Callable[[Case], str]] = {}


def kind(name: str):
    """Registers a kind under the name that the table shows."""

    def register(function):
        KINDS[name] = function
        return function

    return register


# ---------------------------------------------------------------- headers


@kind("header: random bytes")
def _header_bytes(case):
    path = case.any()
    count = int(case.rng.integers(1, 24))
    case.put(path, flipped(case.plain(path), case.rng, count, stop=352))
    return EITHER


@kind("header: dimensions 0, negative, of another number of axes")
def _dimensions(case):
    path, rng = case.any(), case.rng
    dims = [3, *made.SHAPE, 1, 1, 1, 1]
    which = int(rng.integers(4))
    if which == 0:
        dims[rng.integers(1, 4)] = int(rng.choice([0, -1, -2, -32768]))
    elif which == 1:
        dims[0] = int(rng.choice([0, 1, 2, 8, -3, 768, 32767, -32768]))
    elif which == 2:
        dims[:5] = [4, *made.SHAPE, int(rng.choice([2, 3, 1000]))]
    else:
        dims = [7, *made.SHAPE, *(int(n) for n in rng.integers(2, 100, 4))]
    case.put(path, field(case.plain(path), "dim", *dims))
    return FAILS


@kind("header: sizes far above what is there")
def _huge(case):
    path, rng = case.any(), case.rng
    dims = [int(rng.choice([3, 4, 7])), *(int(n) for n in rng.choice([2000, 9000, 32767], 7))]
    data = field(case.plain(path), "dim", *dims)
    code, bits = ((2, 8), (4, 16), (16, 32), (64, 64), (1536, 128))[rng.integers(5)]
    case.put(path, field(field(data, "datatype", code), "bitpix", bits))
    return FAILS


@kind("header: NIfTI-2 with sizes about 2^31, 2^62 or negative")
def _huge2(case):
    path, rng = case.any(), case.rng
    data = bytearray(made.packed(made.noise(3), "int16", nib.Nifti2Image))
    size = int(rng.choice([2**31 - 1, 2**31, 2**32 + 1, 2**62, -1, -(2**62), 0]))
    struct.pack_into("<q", data, 16 + 8 * int(rng.integers(1, 4)), size)
    case.put(path, bytes(data))
    return FAILS


@kind("header: magic or its own size wrong")
def _magic(case):
    path, rng = case.image(), case.rng
    data = case.plain(path)
    if rng.random() < 0.5:
        data = field(data, "magic", rng.choice([b"n+2\0", b"xxxx", b"\0\0\0\0", b"n+9\0"]))
    else:
        wrong = [0, 347, 349, -348, 2**31 - 1, struct.unpack("<i", b"<htm")[0]]
        data = field(data, "sizeof_hdr", int(rng.choice(wrong)))
    case.put(path, data)
    return EITHER


@kind("header: voxel type unknown, complex, RGB, of other bits")
def _type(case):
    path, rng = case.image(), case.rng
    code = int(rng.choice([0, 1, 3, 32, 128, 255, 1792, 2048, 2304, 9999, -4]))
    data = field(case.plain(path), "datatype", code)
    bits = {32: 64, 128: 24, 1792: 128, 2048: 256, 2304: 32}.get(code, 16)
    data = field(data, "bitpix", bits) + bytes(64 << 10)
    case.put(path, data)
    return FAILS


@kind("header: scale, offset of the voxels, extensions")
def _scale(case):
    path, rng = case.any(), case.rng
    data = case.plain(path)
    odd = [np.nan, np.inf, -np.inf, 0, 1e38, -1e38, 1e-38, 3.4e38]
    which = int(rng.integers(4))
    if which == 0:
        data = field(data, "scl_slope", rng.choice(odd))
        data = field(data, "scl_inter", rng.choice(odd))
    elif which == 1:
        offsets = [*odd, 1, 16, 348, 353, 368.5, 400, -352, 2**31, 2**63]
        data = field(data, "vox_offset", rng.choice(offsets))
    elif which == 2:  # extensions that say they are of any size
        size = int(rng.choice([-16, 0, 1, 8, 16, 2**31 - 1]))
        body = struct.pack("<ii", size, 4) + bytes(8)
        data = field(data[:348] + b"\1\0\0\0" + body + data[352:], "vox_offset", 352.0 + 16)
    else:
        data = field(data, "xyzt_units", int(rng.integers(256)))
    case.put(path, data)
    return EITHER


# ---------------------------------------------------------------- affines


@kind("affine: singular, NaN, infinite, sheared flat, of impossible size")
def _affine(case):
    path, rng = case.any(), case.rng
    rows = np.diag([-1.0, -1.0, 1.0, 1.0])[:3]
    which = int(rng.integers(6))
    if which == 0:
        rows[:, rng.integers(3)] = 0
    elif which == 1:
        rows[rng.integers(3), rng.integers(3)] = rng.choice([np.nan, np.inf, -np.inf])
    elif which == 2:
        rows *= rng.choice([1e-30, 1e-12, 1e12, 1e30, 3e38])
    elif which == 3:  # two axes that point the same way
        rows[:, 0] = 1000 * rows[:, 2] + 1e-12
    elif which == 4:
        rows[:, 3] = rng.choice([np.nan, np.inf, 3e38], 3)
    else:  # a voxel of metres along one axis
        rows[:, rng.integers(3)] *= rng.choice([1e4, 1e6, 1e9])
    where = [path] if rng.random() < 0.5 else list(case.files)
    for path in where:
        case.put(path, field(case.plain(path), "srow", *rows.ravel()))
    return FAILS


@kind("affine: quaternions and voxel sizes of any value")
def _quaternion(case):
    rng = case.rng
    odd = [np.nan, np.inf, 0, -1, 1, 0.7, 3e38, 1e-40, 1e6]
    sizes, turn = rng.choice(odd, 8), rng.choice(odd, 3)
    where = [case.any()] if rng.random() < 0.5 else list(case.files)
    for path in where:
        data = field(case.plain(path), "sform_code", int(rng.choice([0, 0, 0, -5, 99])))
        data = field(data, "qform_code", int(rng.choice([0, 1, 2, -1, 300])))
        case.put(path, field(field(data, "pixdim", *sizes), "quatern", *turn))
    return EITHER


# ---------------------------------------------------------------- streams


@kind("stream: cut off")
def _cut(case):
    path, rng = case.any(), case.rng
    plain = rng.random() < 0.4
    data = case.plain(path) if plain else case.files[path]
    places = [0, 1, 2, 3, 9, 10, 11, 17, 347, 348, 351, 352, 353]
    places += [len(data) - n for n in (1, 4, 8, 9, 100)] + list(rng.integers(0, len(data), 8))
    data = data[: int(rng.choice([p for p in places if p < len(data)]))]
    if plain:
        del case.files[path]
        path = path.removesuffix(".gz")
    case.files[path] = data
    return FAILS


@kind("stream: random bytes of the gzip file")
def _gzip_bytes(case):
    path, rng = case.any(), case.rng
    case.files[path] = flipped(case.files[path], rng, int(rng.integers(1, 9)))
    return EITHER


@kind("stream: something else than NIfTI")
def _else(case):
    path, rng = case.any(), case.rng
    data = [
        b"", b"<html>Access denied</html>", b"\x1f\x8b", b"\x1f\x8b\x08\x00", bytes(5000),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"PK\x03\x04" + bytes(100), rng.bytes(3000), b"\x80\x04\x95cposix\nsystem\n.",
        b"GIF89a" + bytes(400), b"SIMPLE  =                    T" + bytes(3000),
    ][rng.integers(11)]  # fmt: skip
    case.files[path] = zipped(data) if rng.random() < 0.5 else data
    return FAILS


@kind("bomb: declares a scan, unpacks to 4 GB")
def _bomb(case):
    path = case.any()
    case.files[path] = bomb(case.plain(path), 4 << 30)
    return FAILS


@kind("bomb: declares 1 to 8 GB, and unpacks to it")
def _declared_bomb(case):
    rng = case.rng
    where = [case.any()] if rng.random() < 0.7 else list(case.files)
    side = int(rng.choice([1000, 1400, 2000]))
    for path in where:
        data = field(case.plain(path)[:352], "dim", 3, side, side, side, 1, 1, 1, 1)
        data = field(field(data, "datatype", 2), "bitpix", 8)
        case.files[path] = bomb(data, side**3, value=int(rng.integers(2)))
    return FAILS


# ---------------------------------------------------------------- voxels


@kind("voxels: NaN or infinite")
def _nan(case):
    path, rng = case.image(), case.rng
    array = made.noise(int(rng.integers(99))).astype(np.float32)
    array[tuple(rng.integers(0, n) for n in array.shape)] = rng.choice([np.nan, np.inf, -np.inf])
    case.put(path, made.packed(array, str(rng.choice(["float32", "float64"]))))
    return FAILS


@kind("voxels: all alike, or a copy of another modality")
def _alike(case):
    path, rng = case.image(), case.rng
    if rng.random() < 0.5:
        case.put(path, made.packed(np.full(made.SHAPE, int(rng.integers(3))), "int16"))
    else:
        other = next(p for p in case.files if p != path and "seg" not in p)
        case.files[path] = case.files[other]
    return FAILS


@kind("voxels: of any number type")
def _number_type(case):
    path, rng = case.image(), case.rng
    types = ["uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
    array = made.noise(int(rng.integers(99)) + 50) // 20
    case.put(path, made.packed(array, str(rng.choice(types)), rng.choice(
        [nib.Nifti1Image, nib.Nifti2Image])))  # fmt: skip
    return WORKS


@kind("labels: values outside of the set")
def _labels(case):
    path = next(p for p in case.files if "seg" in p)
    label = made.label_values().astype(np.float64)
    label[5, 5, 5] = case.rng.choice([5, 7, 255, 256, -1, 2.5, np.nan, np.inf, 1e300])
    case.put(path, made.packed(label, "float64"))
    return FAILS


@kind("labels: an image in their place, or on another grid")
def _labels_image(case):
    path, rng = next(p for p in case.files if "seg" in p), case.rng
    array = made.noise(int(rng.integers(99)))
    array = array if rng.random() < 0.5 else made.label_values()[1:]
    case.put(path, made.packed(array, "int16"))
    return FAILS


@kind("labels: none")
def _labels_empty(case):
    path = next(p for p in case.files if "seg" in p)
    case.put(path, made.packed(np.zeros(made.SHAPE), "uint8"))
    return WORKS


# ---------------------------------------------------------------- names and places


def _renamed(case, name, folder="set"):
    case.files = {
        os.path.join(folder, os.path.basename(path).replace("Case", name)): data
        for path, data in case.files.items()
    }


@kind("names: spaces, any script, quotes, formulas, mark-up")
def _names(case):
    names = [
        "Case 1", " Case", "Käse", "患者", "🧠", "=1+1", "+Case", "-Case", "@Case", "a'b", 'a"b',
        "<script>alert(1)<", "&amp;", "%s%d", "{case}", "Case*", "[Case]", "Case;ls", "`ls`", "~",
        "#", "C:ase", "null", "$HOME", "0,5", "a" * 180,
    ]  # fmt: skip
    _renamed(case, str(case.rng.choice(names)))
    return WORKS


@kind("names: newlines, control characters, no UTF-8, too long, reserved")
def _bad_names(case):
    names = [
        "Ca\nse", "Ca\rse", "Ca\tse", "\x1b[31mred", "Ca\x7fse", os.fsdecode(b"Ca\xffse"),
        "a" * 230, "dataset.json", "Ca\u2028se", "Ca\u202ese", "back\\slash",
    ]  # fmt: skip
    _renamed(case, str(case.rng.choice(names)))
    return FAILS


@kind("names: leading out of the folder, by a description")
def _escape(case):
    name = str(case.rng.choice(["..", ".", "...", ".hidden"]))
    case.files = {
        f"set/{p.rsplit('_', 1)[1].split('.')[0]}@{name}.nii.gz": data
        for p, data in case.files.items()
    }
    described = {
        "files": {m: f"{m}@{{case}}" for m in made.IMAGES},
        "segmentation": "seg@{case}",
        "regions": {"WT": [1, 2, 4]},
        "paint": {"WT": 2},
    }
    case.files["../description.json"] = json.dumps(described).encode()
    case.flags = ["--description={root}/description.json"]
    return FAILS


@kind("places: folders, pipes, devices, broken and circular links named as files")
def _places(case):
    path, rng = case.any(), case.rng
    case.files[path] = [
        os.mkdir,
        os.mkfifo,
        lambda place: os.symlink("/dev/zero", place),
        lambda place: os.symlink("/dev/random", place),
        lambda place: os.symlink(place, place),
        lambda place: os.symlink("/nowhere/at/all.nii.gz", place),
        lambda place: os.symlink(os.path.dirname(place), place),
        lambda place: os.symlink("/proc/self/mem", place),
    ][rng.integers(8)]
    return FAILS


@kind("places: folders linked in circles, links to files, deep folders")
def _circles(case):
    rng = case.rng
    which = int(rng.integers(4))
    if which == 0:
        case.files["Case/loop"] = lambda place: os.symlink("..", place)
    elif which == 1:
        case.files["a/b"] = lambda place: os.symlink("../../raw", place)
        case.files["c"] = lambda place: os.symlink("a", place)
    elif which == 2:
        path = case.any()
        case.files["../elsewhere"] = case.files[path]
        case.files[path] = lambda place: os.symlink("../../elsewhere", place)
    else:
        case.files = {f"{'d/' * 60}{path}": data for path, data in case.files.items()}
    return WORKS


@kind("places: a case twice, incomplete, or a file twice")
def _twice(case):
    rng = case.rng
    which = int(rng.integers(3))
    if which == 0:
        case.add("Case", seed=900, folder="other/Case")
    elif which == 1:
        del case.files[case.image()]
    else:
        path = case.any()
        case.files[path.removesuffix(".gz")] = case.plain(path)
    return EITHER if which == 0 else FAILS


@kind("meanwhile: a file vanishes, shrinks, changes or is swapped for a folder")
def _meanwhile(case):
    path, rng = case.any(), case.rng
    delay, which = float(rng.uniform(0, 0.06)), int(rng.integers(4))
    other = zipped(made.volume(int(rng.integers(90, 99))))

    def change(root):
        time.sleep(delay)
        place = root / path
        if which == 0:
            place.unlink(missing_ok=True)
        elif which == 1:
            os.truncate(place, len(case.files[path]) // 2)
        elif which == 2:
            place.write_bytes(other)
        else:
            place.unlink()
            place.mkdir()

    case.meanwhile = lambda root: threading.Thread(target=change, args=(root,), daemon=True)
    return EITHER


# ---------------------------------------------------------------- what describes a set


_ODD = [None, True, -1, 1e308, 2**70, "", "x", [], {}, [[]], [None], {"": None}, "../x"]
_ODD += [float("nan"), "*" * 30]


def _spoilt(value, rng, places=2):
    """A JSON value with odd ones at random places."""
    value = json.loads(json.dumps(value))
    for _ in range(places):
        at = value
        while isinstance(at, dict | list) and len(at):
            key = rng.choice(list(at)) if isinstance(at, dict) else int(rng.integers(len(at)))
            if isinstance(at[key], dict | list) and len(at[key]) and rng.random() < 0.6:
                at = at[key]
                continue
            at[key] = _ODD[rng.integers(len(_ODD))]
            break
    return json.dumps(value).encode()


@kind("description: odd values, names of regions that lead out, not JSON")
def _description(case):
    rng = case.rng
    described = {
        "name": "set", "modalities": list(made.IMAGES), "brain": True,
        "files": {m: f"_{m}" for m in made.IMAGES}, "segmentation": "_seg",
        "regions": {"WT": [1, 2, 4], "TC": [1, 4]}, "labels": {"1": 1, "2": 2, "4": 4},
        "paint": {"WT": 2, "TC": 1}, "pairs": [["t1", "t1ce"]], "window": {"t1": [0, 1000]},
    }  # fmt: skip
    which = int(rng.integers(8))
    if which == 0:
        texts = [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"1", b'"x"']
        text = texts[rng.integers(len(texts))]
    elif which == 1:
        name = str(rng.choice(["../../out", "file", "a/b", "", "\n", ".", "x" * 300]))
        text = json.dumps(described | {"regions": {name: [1, 2, 4]}, "paint": {name: 2}}).encode()
    else:
        text = _spoilt(described, rng)
    case.files["../description.json"] = text
    case.flags = ["--description={root}/description.json"]
    return EITHER


@kind("description: the Decathlon's dataset.json with odd values")
def _decathlon(case):
    rng = case.rng
    array = np.stack([made.noise(seed) for seed in range(4)], -1)
    case.files = {
        "imagesTr/Case.nii.gz": zipped(made.packed(array, "int16")),
        "labelsTr/Case.nii.gz": zipped(made.packed(np.minimum(made.label_values(), 3), "uint8")),
    }
    names = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
    content = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {str(value): name for value, name in enumerate(names)},
    }
    case.files["dataset.json"] = _spoilt(content, rng, int(rng.integers(3)))
    return EITHER
