"""A good case as bytes, and the ways to spoil a NIfTI file or a gzip stream: material for kinds.py.

Nothing here writes to a disk; ``Case`` collects what is to be written, ``Case.write`` does it.
"""

import dataclasses
import functools
import gzip
import os
import pathlib
import struct

import nibabel as nib
import numpy as np

SHAPE = (12, 13, 11)
IMAGES = ("t1", "t1ce", "t2", "flair")
# Field of a NIfTI-1 header -> its offset and struct code.
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
    "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "qform_code": (252, "h"),
    "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
    "srow": (280, "12f"), "magic": (344, "4s"), "extension": (348, "4B"),
}  # fmt: skip
MEMBER = 64 << 20  # bytes that one member of a bomb unpacks to


@functools.lru_cache(maxsize=64)
def volume(seed: int, dtype: str = "int16", shape: tuple = SHAPE) -> bytes:
    """A NIfTI-1 file of noise in a box with background around."""
    return packed(noise(seed, shape), dtype)


def noise(seed: int, shape: tuple = SHAPE) -> np.ndarray:
    """int16 noise in a box that leaves a voxel of background around."""
    inside = np.zeros(shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    values = np.random.default_rng(seed).integers(100, 2000, shape)
    return np.where(inside, values, 0).astype(np.int16)


def packed(array: np.ndarray, dtype: str, kind: type = nib.Nifti1Image) -> bytes:
    """A NIfTI file, not compressed, with an affine of LPS."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    image = kind(np.asarray(array).astype(dtype), affine, dtype=dtype)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    return image.to_bytes()


@functools.lru_cache(maxsize=1)
def segmentation() -> bytes:
    """Nested boxes of 2, 1, 4."""
    return packed(label_values(), "uint8")


def label_values() -> np.ndarray:
    """(12, 13, 11) uint8: nested boxes of 2, 1, 4."""
    label = np.zeros(SHAPE, np.uint8)
    for step, value in enumerate((2, 1, 4)):
        label[2 + step : 10 - step, 2 + step : 10 - step, 2 + step : 9 - step] = value
    return label


def field(data: bytes, name: str, *values) -> bytes:
    """The same file with another value in a field of its NIfTI-1 header."""
    offset, code = FIELDS[name]
    new = struct.pack(f"<{code}", *values)
    return data[:offset] + new + data[offset + len(new) :]


def flipped(data: bytes, rng: np.random.Generator, count: int, stop: int | None = None) -> bytes:
    """The same with ``count`` random bytes among the first ``stop`` replaced."""
    data = bytearray(data)
    for place in rng.integers(0, min(stop or len(data), len(data)), count):
        data[place] = rng.integers(256)
    return bytes(data)


@functools.lru_cache(maxsize=2)
def member(value: int) -> bytes:
    """A gzip member of 65 kB that unpacks to 64 MiB of one byte."""
    return gzip.compress(bytes([value]) * MEMBER, 9, mtime=0)


def bomb(head: bytes, size: int, value: int = 0) -> bytes:
    """A gzip file of few bytes: ``head``, then at least ``size`` bytes of one value."""
    return gzip.compress(head, mtime=0) + member(value) * -(-size // MEMBER)


def zipped(data: bytes) -> bytes:
    """As .nii.gz, quickly."""
    return gzip.compress(data, 1, mtime=0)


@dataclasses.dataclass
class Case:
    """What is to lie in the input folder: path -> bytes, or a callable that makes it there."""

    rng: np.random.Generator
    files: dict[str, object] = dataclasses.field(default_factory=dict)
    flags: list[str] = dataclasses.field(default_factory=list)
    meanwhile: object = None  # called with the input folder while the command runs

    @classmethod
    def good(cls, rng: np.random.Generator, name: str = "Case") -> "Case":
        """Four images and a segmentation, in the names of 2021."""
        made = cls(rng)
        made.add(name, seed=int(rng.integers(8)) * 10)
        return made

    def add(self, name: str, seed: int, folder: str | None = None) -> None:
        """One more good case."""
        folder = name if folder is None else folder
        for index, modality in enumerate(IMAGES):
            data = zipped(volume(seed + index))
            self.files[os.path.join(folder, f"{name}_{modality}.nii.gz")] = data
        self.files[os.path.join(folder, f"{name}_seg.nii.gz")] = zipped(segmentation())

    def image(self) -> str:
        """One of its images by chance."""
        return str(self.rng.choice([path for path in self.files if "_seg" not in path]))

    def any(self) -> str:
        """One of its files by chance."""
        return str(self.rng.choice(list(self.files)))

    def plain(self, path: str) -> bytes:
        """Its content, unpacked."""
        return gzip.decompress(self.files[path])

    def put(self, path: str, plain: bytes) -> str:
        """Other content for it; one in three times without compression, as .nii."""
        if self.rng.random() < 1 / 3:
            del self.files[path]
            path = path.removesuffix(".gz")
            self.files[path] = plain
        else:
            self.files[path] = zipped(plain)
        return path

    def write(self, root: pathlib.Path) -> None:
        """Makes the files below ``root``."""
        for path, content in self.files.items():
            place = os.path.join(os.fsencode(root), os.fsencode(path))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if callable(content):
                content(os.fsdecode(place))
            else:
                with open(place, "wb") as file:
                    file.write(content)
