"""NIfTI files: reading with full checks, reorienting to RAS+ and back, writing label files."""

import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from masm_jax.files import replacing

_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    struct.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


def read(path: Path | str) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads a NIfTI-1 or NIfTI-2 file, ``.nii`` or ``.nii.gz``.

    The whole file is read at once: so the checksum of a gzip file is compared, which a reader that
    stops at the last voxel never does.

    Args:
        path: The file.

    Returns:
        The voxels (I, J, K) or (I, J, K, C) with slope and intercept applied, a last axis of length
        one removed; the 4x4 float64 affine from voxels to mm; the header.

    Raises:
        ValueError: The file cannot be read; the message gives what failed and the fix.
    """
    path = Path(path)
    try:
        image = _parse(path)
        array = np.asanyarray(image.dataobj)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except _BROKEN as error:
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); get the file again"
        ) from error
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{path}: voxel type {array.dtype}, not numbers; export it as float32")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array, np.asarray(image.affine, np.float64), image.header


def _parse(path: Path) -> nib.Nifti1Image:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    if len(data) < 348:
        raise ValueError(f"{len(data)} bytes, expected a NIfTI header of at least 348")
    nifti2 = 540 in (struct.unpack("<i", data[:4])[0], struct.unpack(">i", data[:4])[0])
    return (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(data)


def description(path: Path | str) -> str:
    """The text of the header's field ``descrip``."""
    return bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode("utf-8", "replace")


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
    order = [int(np.flatnonzero(found[:, 0] == axis)[0]) for axis in range(3)]
    return order, [int(found[axis, 1]) for axis in order]


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
    return array[(..., *(slice(None, None, sign) for sign in signs))]


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
    array = array[(..., *(slice(None, None, sign) for sign in signs))]
    return array.transpose(*range(lead), *(lead + order.index(axis) for axis in range(3)))


def canonical_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Returns the voxel sizes in mm along the RAS axes (D, H, W)."""
    sizes = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(0))
    return tuple(float(sizes[axis]) for axis in _axes(affine)[0])


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
    try:
        if isinstance(like, np.ndarray):
            source = nib.Nifti1Image(np.zeros(values.shape, np.uint8), like)
            source.set_qform(like, code=1)
            source.set_sform(like, code=1)
            source.header.set_xyzt_units("mm")
        else:
            source = nib.load(like)
    except (FileNotFoundError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{like}: cannot be read ({error}); its geometry is needed") from error
    if tuple(source.shape[:3]) != values.shape:
        raise ValueError(f"{path}: labels {values.shape} do not fit {like} of {source.shape[:3]}")
    header = source.header.copy()
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the image, not of labels
    image = type(source)(values, source.affine, header)
    image.header["pixdim"][4:] = source.header["pixdim"][4:]  # nibabel writes 1 where none is meant
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
