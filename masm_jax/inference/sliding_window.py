"""A whole scan through a network that sees cubes: overlapping tiles, Gaussian-weighted.

    along one axis: size 110, patch 64, overlap 0.5

    0         23        46        64        87        110
    |---------+---------+---------|                          tile at 0
              |---------+---------+---------|                tile at 23
                        |---------+---------+---------|      tile at 46

The step is at most patch * (1 - overlap) = 32; ceil((110 - 64) / 32) + 1 = 3 tiles are needed, and
they are spread evenly, (110 - 64) / 2 = 23 apart, so that the last ends at the border exactly and
no part of the scan is seen by more tiles than another (as in MIC-DKFZ/nnUNet).

The scan stays on the host: two batches of tiles at the most are on the device, one being computed
while the tiles of the other are added up.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Start = tuple[int, int, int]
Edges = tuple[int, int, int]

# Weights below this part of the largest are lifted to it: at a corner of the scan, which one tile
# alone sees, the quotient of two numbers near 4e-11 would otherwise be what is returned.
SMALLEST_WEIGHT = 1e-4


def tile_starts(size: int, patch: int, overlap: float = 0.5) -> list[int]:
    """First voxel of each tile along one axis, spread evenly from border to border.

    >>> tile_starts(110, 64)
    [0, 23, 46]

    Args:
        size: voxels along the axis, at least `patch`.
        patch: voxels along the edge of a tile.
        overlap: the part of a tile that its neighbour sees too, at least; in [0, 1).

    Returns:
        Ascending starts; the first is 0, the last is size - patch.
    """
    room = size - patch
    assert room >= 0, (size, patch)
    gaps = math.ceil(room / max(1.0, patch * (1 - overlap)))
    return [round(i * room / gaps) for i in range(gaps + 1)] if gaps else [0]


@functools.lru_cache(maxsize=4)
def gaussian(patch: Edges) -> np.ndarray:
    """Weight of each voxel of a tile: a Gaussian about its centre, sigma = patch / 8.

    Isensee et al. 2021 (nnU-Net, doi 10.1038/s41592-020-01008-z): a network is surest where it sees
    most context. The centre is (patch - 1) / 2, so that a mirrored tile has the same weights.

    Args:
        patch: voxels along the three edges.

    Returns:
        ``patch`` float32, largest 1, smallest ``SMALLEST_WEIGHT``.
    """
    z = [(np.arange(edge) - (edge - 1) / 2) / (edge / 8) for edge in patch]
    depth, height, width = (np.exp(-0.5 * line**2) for line in z)
    cube = depth[:, None, None] * height[:, None] * width
    weights = np.maximum(cube / cube.max(), SMALLEST_WEIGHT).astype(np.float32)
    weights.setflags(write=False)  # the cache hands out one array
    return weights


def predict(
    apply: Callable[[jax.Array], jax.Array],
    image: np.ndarray,
    *,
    patch: int | Sequence[int],
    num_regions: int,
    overlap: float = 0.5,
    batch: int = 2,
    flips: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Probabilities of every voxel of one scan.

    Every call of `apply` has the same shape (the last batch is filled up with zeros), so it is
    compiled once, for all scans. A tile that is zero throughout, air around the brain, is not
    computed and casts no vote; a voxel that only such tiles see gets probability 0. Probabilities,
    not logits, are averaged, in float32. A scan smaller than the patch is padded with zeros.

    Args:
        apply: a jitted function, (b, M, p, p, p) float32 -> (b, p, p, p, R) logits of any float
            dtype.
        image: (M, D, H, W) float16 or float32, may be memory-mapped; exactly 0 outside the brain.
        patch: p, the edge of a tile in voxels, or its three edges.
        num_regions: R.
        overlap: part of a tile that its neighbour sees too, in [0, 1).
        batch: b, tiles per call.
        flips: axes to mirror (0, 1, 2 for D, H, W); all combinations are averaged, so (0, 1, 2)
            costs eight calls in place of one.
        progress: called with (tiles done, tiles in all) after each batch.

    Returns:
        (R, D, H, W) float32 probabilities.

    Raises:
        ValueError: an argument is out of range, or the network gives another shape.
    """
    depth, height, width = np.broadcast_to(patch, 3).tolist()
    edges = int(depth), int(height), int(width)
    _check_arguments(image, patch=edges, overlap=overlap, batch=batch, flips=flips)
    image, inner = _pad_to_patch(image, edges)
    tiles = _tiles_with_brain(image, patch=edges, overlap=overlap)
    total = np.zeros((num_regions, *image.shape[1:]), np.float32)
    weight = np.zeros(image.shape[1:], np.float32)
    cube = gaussian(edges)
    mirrors = _mirrors(flips)

    @functools.cache
    def weights_like(sharding: jax.sharding.Sharding) -> jax.Array:
        """The weights beside the logits: on every device of theirs."""
        if isinstance(sharding, jax.NamedSharding):
            sharding = jax.NamedSharding(sharding.mesh, jax.P())
        return jax.device_put(cube / len(mirrors), sharding)

    pending: collections.deque[tuple[list[Start], jax.Array]] = collections.deque()
    done = 0

    def add_oldest() -> None:
        nonlocal done
        starts, votes = pending.popleft()
        for start, vote in zip(starts, jax.device_get(votes)):  # waits for the device here
            box = _box(start, edges)
            total[:, *box] += vote
            weight[box] += cube
        done += len(starts)
        if progress is not None:
            progress(done, len(tiles))

    for starts in _batched(tiles, batch):
        x = _stack(image, starts, patch=edges, batch=batch)
        pending.append((starts, _votes(apply, x, weights_like, mirrors, num_regions)))
        if len(pending) == 2:  # the newest is being computed while the older one is added up
            add_oldest()
    while pending:
        add_oldest()
    np.divide(total, weight, out=total, where=weight > 0)
    return total[:, *inner]


def _votes(
    apply: Callable[[jax.Array], jax.Array],
    x: np.ndarray,
    weights_like: Callable[[jax.sharding.Sharding], jax.Array],
    mirrors: list[tuple[int, ...]],
    num_regions: int,
) -> jax.Array:
    """Dispatch one batch (b, M, p, p, p) -> (b, R, p, p, p) weighted votes, without waiting.

    The flips are calls of the same compiled network, not one program of eight networks: that would
    take eight times as long to compile.
    """
    tiles = jax.device_put(x)
    votes: jax.Array | None = None
    for mirror in mirrors:
        logits = apply(_mirror(tiles, axes=mirror) if mirror else tiles)
        expected = (x.shape[0], *x.shape[2:], num_regions)
        if logits.shape != expected:
            raise ValueError(
                f"the network gives logits of shape {logits.shape} for tiles {x.shape}, expected "
                f"{expected}: num_regions and the patch must be those of the network"
            )
        vote = _weighted(logits, weights_like(logits.sharding), axes=mirror)
        votes = vote if votes is None else votes + vote
    assert votes is not None  # the first mirror is none, so there is one
    return votes


def _mirrors(flips: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of the axes, none first: (0, 1) -> (), (0,), (1,), (0, 1)."""
    axes = sorted(set(flips))
    return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


@functools.partial(jax.jit, static_argnames="axes")
def _mirror(tiles: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    return jnp.flip(tiles, [axis + 2 for axis in axes])


@functools.partial(jax.jit, static_argnames="axes")
def _weighted(logits: jax.Array, weights: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """(b, p, p, p, R) logits of mirrored tiles -> (b, R, p, p, p) float32 votes, mirrored back."""
    probabilities = jax.nn.sigmoid(logits.astype(jnp.float32))
    probabilities = jnp.flip(probabilities, [axis + 1 for axis in axes])
    return jnp.moveaxis(probabilities, -1, 1) * weights


def _tiles_with_brain(image: np.ndarray, *, patch: Edges, overlap: float) -> list[Start]:
    brain = np.zeros(image.shape[1:], bool)
    for modality in image:  # one at a time: the image may be larger than memory wants to hold
        brain |= modality != 0
    depth, height, width = (tile_starts(n, p, overlap) for n, p in zip(image.shape[1:], patch))
    grid = itertools.product(depth, height, width)
    return [start for start in grid if brain[_box(start, patch)].any()]


def _stack(image: np.ndarray, starts: list[Start], *, patch: Edges, batch: int) -> np.ndarray:
    x = np.zeros((batch, len(image), *patch), np.float32)
    for row, start in zip(x, starts):
        row[:] = image[:, *_box(start, patch)]
    return x


def _box(start: Start, patch: Edges) -> tuple[slice, ...]:
    return tuple(slice(s, s + p) for s, p in zip(start, patch))


def _batched(tiles: list[Start], size: int) -> Iterator[list[Start]]:
    for first in range(0, len(tiles), size):
        yield tiles[first : first + size]


def _pad_to_patch(image: np.ndarray, patch: Edges) -> tuple[np.ndarray, tuple[slice, ...]]:
    """The image, each axis at least `patch` long, and where the original lies in it.

    An odd voxel goes in front, as in data/pipeline.py: one voxel aside, a strided network sees
    another image than the one it was trained on.
    """
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch)]
    before = [m - m // 2 for m in missing]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:]))
    if any(missing):
        image = np.pad(image, [(0, 0), *((b, m - b) for b, m in zip(before, missing))])
    return image, inner


def _check_arguments(
    image: np.ndarray, *, patch: Edges, overlap: float, batch: int, flips: Sequence[int]
) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}; expected (M, D, H, W), none of them 0")
    if min(patch) < 1 or batch < 1:
        raise ValueError(f"patch is {patch} and batch {batch}; expected at least 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected 0 <= overlap < 1, such as 0.5")
    if not set(flips) <= {0, 1, 2}:
        raise ValueError(f"flips are {tuple(flips)}; expected axes out of 0, 1, 2 (D, H, W)")
