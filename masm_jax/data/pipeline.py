"""Training crops as an endless stream of batches, by Grain.

The batch of step s is a function of (seed, s) alone: every case once per epoch in a shuffled order,
a crop drawn per visit. It does not depend on the number of worker processes, threads or hosts, so a
run resumes at any step on any of them without saving the state of an iterator.
"""

import dataclasses
import sys
import zipfile
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from masm_jax.data.nifti import last_axes
from masm_jax.data.records import Records

_UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
_WHOLE = 1 << 32  # exclusive limit of the seeds that Grain takes


@dataclasses.dataclass(frozen=True)
class Crop:
    """Reads a random cube of one case from its memory-mapped record.

    Attributes:
        records: The records.
        cases: Ids; an element of the stream is a place in this tuple.
        patch: Edges of the crop, voxels.
        foreground: Chance that the cube is centred on tumour.
    """

    records: Records
    cases: tuple[str, ...]
    patch: tuple[int, int, int]
    foreground: float

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws one crop.

        Args:
            index: Place of the case in ``cases``.
            rng: Seeded by Grain with (seed, place in the stream).

        Returns:
            ``image`` (M, p, p, p) float16, ``label`` (p, p, p) uint8, ``case`` () int32: ``index``.
            Image and label are views of the memory map where the crop lies inside of the volume:
            they are read from the disk by whoever copies them.

        Raises:
            ValueError: A file of the record cannot be read or does not fit the others.
        """
        case = self.cases[index]
        image, label = self._read(case, "image"), self._read(case, "label")
        if label is None:
            raise ValueError(
                f"{case}: has no segmentation, and training needs one for every case; "
                "take it out of the split"
            )
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"{self.records.root / case}: image.npy is {image.shape[1:]}, label.npy is "
                f"{label.shape}; expected one grid; prepare this case again"
            )
        start = self._start(case, label.shape, rng)
        return {
            "image": _cut(image, start, self.patch),
            "label": _cut(label, start, self.patch),
            "case": np.asarray(index, np.int32),
        }

    def _start(self, case: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """First voxel of the cube on each axis, (3,) int; negative where the volume is smaller."""
        room = np.asarray(shape) - self.patch
        start = rng.integers(0, np.maximum(room, 0), endpoint=True)
        if rng.random() < self.foreground:
            found = self._read(case, "foreground")
            present = [voxels for voxels in found.values() if len(voxels)]
            if present:  # the regions first: enhancing tumour is small, and of equal interest
                voxels = present[rng.integers(len(present))]
                centre = voxels[rng.integers(len(voxels))]
                half = np.asarray(self.patch) // 2
                start = np.clip(centre - half, 0, np.maximum(room, 0))
        return np.where(room < 0, room // 2, start)

    def _read(self, case: str, part: str):
        """Part ``image``, ``label`` or ``foreground``; a failure names the case and the file."""
        try:
            return getattr(self.records, part)(case)
        except _UNREADABLE as error:
            suffix = "npz" if part == "foreground" else "npy"
            raise ValueError(
                f"{case}: cannot read {self.records.root / case / part}.{suffix} ({error}); "
                "expected a whole record; prepare this case again"
            ) from error


def _cut(volume: np.ndarray, start: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
    """The crop at ``start`` of the last three axes; 0 outside the volume."""
    stop = start + patch
    low, high = np.maximum(start, 0), np.minimum(stop, volume.shape[-3:])
    part = volume[last_axes(map(slice, low, high))]
    if part.shape[-3:] == patch:
        return part
    cube = np.zeros((*volume.shape[:-3], *patch), volume.dtype)
    cube[last_axes(map(slice, low - start, high - start))] = part
    return cube


@dataclasses.dataclass(frozen=True)
class HostShare:
    """What one host reads of the stream: some places of every global batch.

    The places are those that the mesh has given to its devices (sharding.rows_here), so that the
    global batch is the one that one host alone would have read, in its order; what is drawn by
    place in the batch (augmentation, noise) is the same too.

    Attributes:
        stream: The endless stream of crops, the same on all hosts.
        batch: Size of the global batch.
        rows: Places in it that are this host's.
        start_step: Step to begin with.
    """

    stream: grain.MapDataset
    batch: int
    rows: tuple[int, ...]
    start_step: int

    def __len__(self) -> int:
        """Number of elements: more than a run can reach."""
        return (sys.maxsize // self.batch - self.start_step) * len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Element ``index`` of this host, counted from ``start_step``."""
        step, place = divmod(index, len(self.rows))
        return {name: np.array(part) for name, part in self.crop(step, place).items()}

    def crop(self, step: int, place: int) -> dict[str, np.ndarray]:
        """That of ``rows[place]``, ``step`` steps after the first; views, as ``Crop`` has them."""
        return self.stream[(self.start_step + step) * self.batch + self.rows[place]]


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """The batches of a host, each read by one thread, from the disk into its place in the batch.

    Attributes:
        share: What this host reads.
    """

    share: HostShare

    def __len__(self) -> int:
        """Number of batches: more than a run can reach."""
        return len(self.share) // len(self.share.rows)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, counted from the first."""
        crops = [self.share.crop(step, place) for place in range(len(self.share.rows))]
        return {name: np.stack([crop[name] for crop in crops]) for name in crops[0]}


def batches(
    records: Records,
    cases: list[str],
    *,
    seed: int,
    batch_size: int,
    patch: int | Sequence[int],
    foreground: float = 1 / 3,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of random crops for this host.

    Args:
        records: Prepared cases.
        cases: Ids to train on; fewer than ``batch_size`` will do.
        seed: Decides order and crops, from 0 to 2**32 - 1.
        batch_size: Size of the global batch, B.
        patch: Edge of a crop in voxels, p, or three; a smaller volume is centred, padded with 0.
        foreground: Chance of a crop centred on a voxel of a region, each region that the case has
            with equal chance; other crops lie anywhere inside the volume.
        start_step: First step, to go on where a run stopped.
        rows: Places in the global batch that this host reads; None: all.
        workers: Worker processes; 0 reads in threads of this process, enough for local disks.
        threads: Reading threads in each process.

    Returns:
        Iterator of {"image": (b, M, p, p, p) float16, "label": (b, p, p, p) uint8, "case": (b,)
        int32, places in ``cases``}, b = len(rows). ``close()`` ends the workers.

    Raises:
        ValueError: The arguments do not fit together; from the iterator, a record is unreadable.
    """
    depth, height, width = np.broadcast_to(patch, 3).tolist()
    edges = int(depth), int(height), int(width)
    rows = tuple(range(batch_size) if rows is None else rows)
    _check(records, cases, seed, batch_size, edges, foreground, rows)
    crop = Crop(records, tuple(cases), edges, foreground)
    stream = grain.MapDataset.range(len(cases)).seed(seed).shuffle().repeat().random_map(crop)
    share = HostShare(stream, batch_size, rows, start_step)
    # Grain's default buffer is 500 elements, of 17 MB each at 4x128^3.
    if not workers:
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
        return iter(grain.MapDataset.source(HostBatches(share)).to_iter_dataset(read))
    # Single crops from the workers: they come through /dev/shm, which is small in a container, and
    # a batch made by Grain inside them loses records (google/grain#1129).
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain passes flags of its own on to its workers
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    dataset = grain.MapDataset.source(share).to_iter_dataset(read).mp_prefetch(options)
    return iter(dataset.batch(len(rows), drop_remainder=True))


def _check(records, cases, seed, batch_size, patch, foreground, rows):
    """Raises ValueError where the arguments of ``batches`` do not fit together."""
    unknown = sorted(set(cases) - set(records.cases))
    if not cases or unknown:
        found = f"{', '.join(unknown[:3])} unknown" if unknown else "none named"
        raise ValueError(
            f"{records.root}: cases to train on: {found}; expected ids out of the "
            f"{len(records.cases)} records there; correct the split"
        )
    if batch_size < 1 or not rows or not set(rows) <= set(range(batch_size)):
        raise ValueError(
            f"rows {rows} of a batch of {batch_size}: expected one or more, from 0 to "
            f"{batch_size - 1}"
        )
    if not 0 <= seed < _WHOLE:
        raise ValueError(f"seed {seed}: expected 0 to {_WHOLE - 1}; choose another")
    if min(patch) < 1:
        raise ValueError(f"patch {patch}: expected positive edges in voxels")
    if not 0 <= foreground <= 1:
        raise ValueError(f"foreground {foreground}: expected a share of the crops, 0 to 1")
