"""NIfTI files: reading with full checks, reorienting to RAS+ and back, writing label files."""

import contextlib
import gzip
import logging
import math
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np

from masm_jax.files import replacing

# It logs what it mends in a header, with bytes of the file as they are.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

# A scan has a byte on the disk for every few voxels, also where most of it is background: a BraTS
# image one for 3.6. A small file that unpacks to far more is damaged, or meant to fill the memory.
SMALL_VOXELS = 1 << 24  # 256^3: as many may be in a file of any size
VOXELS_PER_BYTE = 64
EDGE_MM = (1e-3, 100.0)  # of a voxel
_FOLLOWS = 1 << 20  # bytes that may follow the voxels
_BEFORE = 1 << 26  # bytes that may come before them: header and extensions


def read(path: Path | str, *, voxels: int = 0) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads a NIfTI-1 or NIfTI-2 file, ``.nii`` or ``.nii.gz``.

    The whole file is read at once: so the checksum of a gzip file is compared, which a reader that
    stops at the last voxel never does. What the header declares is checked before memory is taken.

    Args:
        path: The file.
        voxels: As many may be in it whatever its size on the disk, such as those of an image for
            its segmentation, which is packed to a thousandth.

    Returns:
        The voxels (I, J, K) or (I, J, K, C) with slope and intercept applied, a last axis of length
        one removed; the 4x4 float64 affine from voxels to mm; the header.

    Raises:
        ValueError: The file cannot be read; the message gives what failed and the fix.
    """
    path = Path(path)
    with _named(path):
        data, header = _content(path, max(voxels, room(path)))
        kind = nib.Nifti2Image if header["sizeof_hdr"] == 540 else nib.Nifti1Image
        image = kind.from_bytes(data)
        array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{path}: voxel type {array.dtype}, not numbers; export it as float32")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array, affine, image.header


def room(path: Path | str) -> int:
    """Returns how many voxels a file may hold for its size on the disk, or one like it."""
    with _named(Path(path)):
        return max(SMALL_VOXELS, VOXELS_PER_BYTE * Path(path).stat().st_size)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ValueError that names the file."""
    try:
        with np.errstate(all="ignore"):  # a NaN among the voxels is said later, with its case
            yield
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file, or a link to none; correct the path, or get the file again"
        ) from error
    except Exception as error:  # of any kind: a parser, and bytes that may say anything
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {said}); get the file again"
        ) from error


def _content(path: Path, most: int) -> tuple[bytes, nib.Nifti1Header]:
    """The unpacked file and its header, if it is as long as the header declares."""
    with _opened(path) as stream:
        header = _header(stream)
        shape, first = tuple(map(int, header.get_data_shape())), _first_voxel(header)
        if min(shape, default=0) < 1:
            raise ValueError(f"its header declares {shape} voxels, expected 1 or more along each")
        voxels = math.prod(shape)
        if voxels > most:
            raise ValueError(
                f"its header declares {shape} = {voxels} voxels, expected at most {most} in a file "
                f"of {path.stat().st_size} bytes; if it is what it says, store it without "
                f"compression, as .nii"
            )
        end = first + voxels * header.get_data_dtype().itemsize
        stream.seek(0)
        data = stream.read(end + _FOLLOWS + 1)  # to its end, where the checksum is
    if len(data) < end:
        raise ValueError(f"{len(data)} bytes, expected the {end} that its header declares")
    if len(data) > end + _FOLLOWS:
        raise ValueError(f"it goes on long after the {end} bytes that its header declares")
    return data, header


def last_axes(slices: Iterable[slice]) -> tuple[Any, ...]:
    """The index that takes these of the last axes, however many come before."""
    return (..., *slices)


def _opened(path: Path) -> BinaryIO:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
        raise ValueError("a folder, pipe or device, expected a file")
    packed = path.name.lower().endswith(".gz")
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def _header(stream: BinaryIO) -> nib.Nifti1Header:
    """The header of a file, from its first bytes."""
    head = stream.read(540)
    if len(head) < 348:
        raise ValueError(f"{len(head)} bytes, expected a NIfTI header of at least 348")
    sizes = struct.unpack("<i", head[:4])[0], struct.unpack(">i", head[:4])[0]
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    magic = head[4:8] if 540 in sizes else head[344:348]
    if magic[:3] != (b"n+2" if 540 in sizes else b"n+1"):
        raise ValueError(f"magic {magic!r}, expected that of NIfTI with its voxels in one file")
    return kind(head[: 540 if 540 in sizes else 348])


def _first_voxel(header: nib.Nifti1Header) -> int:
    """Byte where the voxels begin."""
    given, least = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not (given == 0 or least <= given <= _BEFORE):
        raise ValueError(f"vox_offset {given:g}, expected 0 or {least} to {_BEFORE}")
    return max(int(given), least)


def description(path: Path | str) -> str:
    """The text of the header's field ``descrip``."""
    header, _ = _geometry(Path(path))
    return bytes(header["descrip"]).rstrip(b"\0").decode("utf-8", "replace")


def grid(path: Path | str) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the shape and affine that ``read`` gives of a file, whose voxels are not read."""
    header, affine = _geometry(Path(path))
    shape = tuple(map(int, header.get_data_shape()))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape, affine


def orientation(affine: np.ndarray) -> str:
    """Returns the directions of the voxel axes, such as ``"LPS"``.

    Raises:
        ValueError: The affine is singular or not finite.
    """
    _axes(affine)
    return "".join(nib.aff2axcodes(affine))


def _axes(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """For each RAS axis, the file axis it comes from and +1 or -1."""
    affine = np.asarray(affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"affine {affine[:3].round(4).tolist()} maps voxels to no volume; set a valid one"
        )
    found = nib.io_orientation(affine)  # row: file axis -> (RAS axis, flip)
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    if not np.isfinite(found).all() or sizes.min() < EDGE_MM[0] or sizes.max() > EDGE_MM[1]:
        raise ValueError(
            f"affine {affine[:3].round(4).tolist()}: voxels of {by_mm(sizes)} mm, expected three "
            f"axes of {EDGE_MM[0]:g} to {EDGE_MM[1]:g} mm; set a valid one, in mm"
        )
    order = [int(np.flatnonzero(found[:, 0] == axis)[0]) for axis in range(3)]
    return order, [int(found[axis, 1]) for axis in order]


def by_mm(sizes: Sequence[float]) -> str:
    """Returns lengths as people write them, such as 1x1x2.5."""
    return "x".join(f"{size:.3g}" for size in sizes)


def to_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorients the last three axes from the file's order to RAS+, as nibabel's closest canonical.

    Args:
        array: (..., I, J, K) any dtype, in the grid of the file.
        affine: (4, 4) affine of the file.

    Returns:
        (..., D, H, W) view of the array.
    """
    order, signs = _axes(affine)
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *(lead + axis for axis in order))
    return array[last_axes(slice(None, None, sign) for sign in signs)]


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorients the last three axes from RAS+ to the file's order: undoes ``to_canonical``.

    Args:
        array: (..., D, H, W) any dtype, RAS+.
        affine: (4, 4) affine of the file.

    Returns:
        (..., I, J, K) view of the array.
    """
    order, signs = _axes(affine)
    lead = array.ndim - 3
    array = array[last_axes(slice(None, None, sign) for sign in signs)]
    return array.transpose(*range(lead), *(lead + order.index(axis) for axis in range(3)))


def canonical_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Returns the voxel sizes in mm along the RAS axes (D, H, W)."""
    sizes = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(0))
    d, h, w = (float(sizes[axis]) for axis in _axes(affine)[0])
    return d, h, w


def write_labels(path: Path | str, labels: np.ndarray, like: Path | str | np.ndarray) -> None:
    """Writes a label file with the geometry of an input file, atomically.

    Args:
        path: Where to write, ``.nii`` or ``.nii.gz``. Equal labels give equal bytes.
        labels: (I, J, K) uint8 label values in the convention of the file.
        like: A file of the same case: its affine, qform and sform codes, voxel sizes and units
            are kept. A 4-D file gives the geometry of its first three axes. Where no file is
            left, the (4, 4) affine to mm.

    Raises:
        ValueError: The labels do not fit the grid, or ``like`` cannot be read.
    """
    _write(path, np.asarray(labels, np.uint8), like)


def write_map(path: Path | str, values: np.ndarray, like: Path | str | np.ndarray) -> None:
    """Writes (I, J, K) numbers, such as probabilities, as float32; else as ``write_labels``."""
    _write(path, np.asarray(values, np.float32), like)


def _write(path: Path | str, values: np.ndarray, like: Path | str | np.ndarray) -> None:
    path = Path(path)
    if isinstance(like, np.ndarray):
        source = nib.Nifti1Image(np.zeros(values.shape, np.uint8), like)
        source.set_qform(like, code=1)
        source.set_sform(like, code=1)
        source.header.set_xyzt_units("mm")
        header, affine = source.header, source.affine
    else:
        header, affine = _geometry(Path(like))
    grid = tuple(header.get_data_shape()[:3])
    if grid != values.shape:
        raise ValueError(f"{path}: labels {values.shape} do not fit {like} of {grid}")
    pixdim = header["pixdim"][4:].copy()  # nibabel writes 1 where none is meant
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the image, not of labels
    kind = nib.Nifti2Image if header["sizeof_hdr"] == 540 else nib.Nifti1Image
    image = kind(values, affine, header)
    image.header["pixdim"][4:] = pixdim
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _geometry(path: Path) -> tuple[nib.Nifti1Header, np.ndarray]:
    """Header and (4, 4) affine of a file, whose voxels are not read."""
    with _named(path), _opened(path) as stream:
        header = _header(stream)
        return header, header.get_best_affine()
