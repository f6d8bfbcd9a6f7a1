"""Files of records, read so that a damaged or foreign one is named and can do no harm.

Nothing here loads a pickle, and nothing takes memory for what a file only declares.
"""

import math
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masm_jax.data import nifti
from masm_jax.files import name_fault, read_json

AGAIN = "remove the folder of this case and run prepare again"
MOST_VOXELS = 1 << 31  # of a scan: 2048 x 1024 x 1024
# NumPy reads the head of a file with ast.literal_eval, and CPython counts the depth of a syntax
# tree for all threads together: two readers at once can end in "SystemError: AST constructor
# recursion depth mismatch" (seen on 3.11.7; python/cpython#106905).
_READING = threading.Lock()


def array(path: Path, dtype: type, axes: int) -> np.ndarray:
    """Returns a .npy file, memory-mapped.

    Args:
        path: The file.
        dtype: Its type.
        axes: Their number.

    Raises:
        ValueError: It is damaged, or another array.
    """
    try:
        with _READING:
            found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of any kind: a parser, and bytes that may say anything
        raise _damaged(path, error) from error
    if found.dtype != dtype or found.ndim != axes or found.size == 0:
        raise ValueError(
            f"{path}: {found.dtype} of shape {found.shape}, expected {np.dtype(dtype)} of {axes} "
            f"axes; {AGAIN}"
        )
    return found


def voxels(path: Path, names: Iterable[str], most: int) -> dict[str, np.ndarray]:
    """Returns name -> (n, 3) int32 of an archive of .npy files.

    Args:
        path: The archive.
        names: Of the arrays to read.
        most: Greatest n.

    Raises:
        ValueError: It is damaged, or holds something else.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                size = archive.getinfo(f"{name}.npy").file_size
                if size > 12 * most + 10_000:
                    raise ValueError(f"{name} has {size} bytes, of {most} voxels at most")
                with _READING, archive.open(f"{name}.npy") as file:
                    found[name] = np.lib.format.read_array(file, allow_pickle=False)
                if found[name].dtype != np.int32 or found[name].shape[1:] != (3,):
                    raise ValueError(f"{name} is {found[name].dtype} {found[name].shape}")
    except Exception as error:  # of any kind, as above
        raise _damaged(path, error) from error
    return found


def meta(path: Path) -> dict[str, Any]:
    """Returns the content of meta.json.

    Raises:
        ValueError: It is damaged, or a value in it is impossible.
    """
    content = read_json(path, AGAIN)
    try:
        fault = _meta_fault(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ValueError(f"{path}: {fault}, expected what prepare wrote; {AGAIN}")
    return content


def index_fault(index: Mapping[str, Any]) -> str:
    """What is wrong with the content of dataset.json; "" if nothing is."""
    for key, kind in (("modalities", list), ("regions", dict), ("cases", list)):
        if not isinstance(index.get(key), kind):
            return f"{key} = {index.get(key)!r:.100}, expected a {kind.__name__}"
    pairs = index.get("pairs", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
        return f"pairs = {pairs!r:.100}, expected a list of lists"
    spacing = index.get("spacing", "missing")
    if not (spacing is None or _is_number(spacing) and 0 < spacing < 1e6):
        return f"spacing = {spacing!r:.100}, expected mm, or null"
    for name in (*index["modalities"], *index["regions"], *index["cases"]):
        if fault := name_fault(name):
            return fault
    return _regions_fault(index["regions"])


def _meta_fault(content: Mapping[str, Any]) -> str:
    for key in ("shape", "crop_shape", "record_shape"):
        edges = content[key]
        whole = len(edges) == 3 and all(type(n) is int and n > 0 for n in edges)
        if not whole or math.prod(edges) > MOST_VOXELS:
            return f"{key} = {edges!r:.100}, three edges and at most {MOST_VOXELS} voxels in all"
    for key in ("spacing", "record_spacing"):
        edges = content[key]
        if len(edges) != 3 or not all(_is_number(edge) and 0 < edge < 1e6 for edge in edges):
            return f"{key} = {edges!r:.100}, three edges in mm"
    affine = np.array(content["affine"], np.float64)
    if affine.shape != (4, 4):
        return f"affine of shape {affine.shape}, 4x4"
    grid = nifti.to_canonical(np.broadcast_to(np.uint8(0), content["shape"]), affine).shape
    cut = [stop - start for start, stop in content["crop"]]
    inside = all(0 <= start < stop <= n for (start, stop), n in zip(content["crop"], grid))
    if cut != content["crop_shape"] or not inside:
        return f"crop = {content['crop']!r:.100}, {content['crop_shape']} voxels inside of {grid}"
    if not (content["segmentation"] is None or isinstance(content["segmentation"], str)):
        return f"segmentation = {content['segmentation']!r:.100}, a path or null"
    if not all(isinstance(path, str) for path in content["files"].values()):
        return "files are no paths"
    for key in ("labels", "paint"):
        if not all(type(value) is int and 0 <= value < 256 for value in content[key].values()):
            return f"{key} = {content[key]!r:.100}, label values"
    if not all(0 < int(value) < 256 for value in content["labels"]):
        return f"labels = {content['labels']!r:.100}, label values as keys"
    if list(content["paint"]) != list(content["regions"]):
        return f"paint of {list(content['paint'])!r:.100}, the regions {list(content['regions'])}"
    volumes = content["volumes_ml"]
    if volumes is not None and not all(_is_number(volumes[name]) for name in content["regions"]):
        return f"volumes_ml = {volumes!r:.100}, a number for each region"
    if not all(isinstance(digest, str) for digest in content["hashes"].values()):
        return f"hashes = {content['hashes']!r:.100}, text"
    return _regions_fault(content["regions"])


def _regions_fault(regions: Mapping[str, Any]) -> str:
    for name, inside in regions.items():
        good = isinstance(inside, list) and all(type(v) is int and 0 < v < 256 for v in inside)
        if fault := name_fault(name) or ("" if good else f"region {name} = {inside!r:.100}"):
            return fault
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _damaged(path: Path, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:300]
    return ValueError(f"{path}: cannot be read ({type(error).__name__}: {said}); {AGAIN}")
