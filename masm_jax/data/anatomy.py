"""Head anatomy of the phantoms: the ICBM 2009a tissue maps, deformed anew for every subject.

The atlas is the nonlinear symmetric ICBM 152 2009a average (Fonov et al. 2011, NeuroImage
54(1):313-327): grey matter, white matter and a brain-extracted T1, at 1 mm, as installed with
nilearn. An average head is larger and smoother than a single one; ``Warp`` shrinks it to a usual
brain volume, and the tissue maps are sharpened.

Coordinates are millimetres, RAS+, from the centre of the field of view.
"""

import dataclasses
import functools
import importlib.util
import pathlib

import nibabel as nib
import numpy as np
from scipy import ndimage

FIELD_OF_VIEW = (240.0, 240.0, 155.0)  # mm; that of a BraTS file
_ATLAS_CENTRE = np.array([0.0, -18.0, 5.0])  # mm, MNI; middle of the brain's bounding box
_BSPLINE_SD = (151 / 315) ** 1.5  # sd of a tensor cubic B-spline field of unit normal coefficients


@dataclasses.dataclass(frozen=True)
class Grid:
    """A regular grid of voxel centres ``origin + index * spacing``.

    Attributes:
        origin: Centre of voxel (0, 0, 0), mm.
        spacing: Edge of a cubic voxel, mm.
        shape: (D, H, W).
    """

    origin: tuple[float, float, float]
    spacing: float
    shape: tuple[int, int, int]

    @classmethod
    def whole(cls, spacing: float) -> "Grid":
        """The grid that covers the field of view, centred on it."""
        d, h, w = (int(np.ceil(side / spacing - 1e-6)) for side in FIELD_OF_VIEW)
        x, y, z = (-(n - 1) * spacing / 2 for n in (d, h, w))
        return cls((x, y, z), spacing, (d, h, w))

    def crop(self, box: tuple[slice, slice, slice]) -> "Grid":
        """The part of this grid inside ``box`` (slices with explicit start and stop)."""
        x, y, z = (o + b.start * self.spacing for o, b in zip(self.origin, box))
        d, h, w = (b.stop - b.start for b in box)
        return Grid((x, y, z), self.spacing, (d, h, w))

    def box(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, slice]:
        """Slices of the voxels between the points ``low`` and ``high``, mm, within the grid."""
        origin = np.asarray(self.origin)
        first = np.maximum(np.floor((low - origin) / self.spacing), 0).astype(int)
        last = np.minimum(np.ceil((high - origin) / self.spacing) + 1, self.shape).astype(int)
        d, h, w = (slice(int(a), int(b)) for a, b in zip(first, last))
        return d, h, w

    def axes(self) -> list[np.ndarray]:
        """Coordinates along each axis, mm, shaped to broadcast: (D,1,1), (1,H,1), (1,1,W)."""
        lines = [o + self.spacing * np.arange(n) for o, n in zip(self.origin, self.shape)]
        return [line.astype(np.float32) for line in np.ix_(*lines)]


def resample(values: np.ndarray, source: Grid, target: Grid, *, outside: float) -> np.ndarray:
    """Reads ``values`` on ``source`` at the voxels of ``target``, linearly.

    Args:
        values: (d, h, w) float32 on ``source``.
        source: Grid of ``values``.
        target: Grid to read at.
        outside: Value beyond ``source``.

    Returns:
        (D, H, W) float32 on ``target``.
    """
    scale = target.spacing / source.spacing
    offset = (np.asarray(target.origin) - np.asarray(source.origin)) / source.spacing
    return ndimage.affine_transform(
        values, np.full(3, scale), offset, target.shape, order=1, mode="constant", cval=outside
    )


def smooth_field(rng: np.random.Generator, grid: Grid, *, scale: float) -> np.ndarray:
    """A smooth random field of mean 0 and standard deviation 1.

    A cubic B-spline over control points ``scale`` mm apart that cover the whole field of view: the
    same generator state gives the same field on every grid, whatever its voxel size.

    Args:
        rng: Generator; one normal number per control point is drawn.
        grid: Where to evaluate.
        scale: Distance of the control points, mm; roughly the size of a blob.

    Returns:
        (D, H, W) float32.
    """
    counts = [int(np.ceil(side / scale)) + 4 for side in FIELD_OF_VIEW]
    field = rng.standard_normal(counts).astype(np.float32) / _BSPLINE_SD
    for axis in grid.axes():
        count = counts[0]
        knots = (np.arange(count) - (count - 1) / 2) * scale
        distance = np.abs(axis.reshape(-1, 1) - knots) / scale
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.clip(2 - distance, 0, None) ** 3 / 6
        weights = np.where(distance < 1, near, far).astype(np.float32)
        # tensordot takes the leading axis and appends the new one: three turns restore the order.
        field = np.tensordot(field, weights, axes=(0, 1))
        counts = counts[1:] + counts[:1]
    return np.ascontiguousarray(field)


@functools.lru_cache(maxsize=4)
def load_atlas(spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """The tissue maps, averaged over voxels of ``spacing`` mm. Loaded once per process.

    Args:
        spacing: Voxel size the maps will be read at, mm; sets the partial volume.

    Returns:
        (4, 197, 233, 189) float32 at 1 mm: grey matter, white matter, CSF, brain (their sum), in
        [0, 1]; and the 4x4 affine to MNI millimetres.

    Raises:
        ValueError: nilearn or its atlas is not installed.
    """
    spec = importlib.util.find_spec("nilearn")  # found, not imported: importing takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the phantom needs the atlas of nilearn; install it: pip install nilearn")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    maps = {}
    for name in ("gm", "wm", "t1"):
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise ValueError(
                f"{path} is absent, expected the ICBM 2009a atlas; install nilearn>=0.13,<0.15"
            )
        image = nib.Nifti1Image.from_filename(path)
        maps[name] = np.asanyarray(image.dataobj)
    parts, count = ndimage.label(maps["t1"] > 0)
    # The brain is the largest part; an islet of T1 in front of it is left out.
    brain = parts == 1 + np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:])
    grey, white = (maps[name].astype(np.float32) / 255 for name in ("gm", "wm"))
    fractions = np.stack([grey, white, np.clip(1 - grey - white, 0, 1)]) ** 2  # sharpened
    fractions *= brain / np.maximum(fractions.sum(0), 1e-6)
    # A box of width s has standard deviation s / sqrt(12); the 1 mm voxels bring theirs already.
    sigma = np.sqrt(max(spacing**2 - 1, 0) / 12)
    fractions = ndimage.gaussian_filter(fractions, (0, sigma, sigma, sigma))
    return np.concatenate([fractions, fractions.sum(0, keepdims=True)]), image.affine


@dataclasses.dataclass(frozen=True)
class Push:
    """The mass effect: tissue driven away from a point, not beyond the skull.

    Attributes:
        centre: (3,) mm.
        shift: Greatest displacement, mm.
        reach: Distance from the centre where it occurs, mm; above ``e * shift`` nothing folds.
        depth: Distance to the brain's surface on ``grid``, (d, h, w) float32, mm.
        grid: Grid of ``depth``.
    """

    centre: np.ndarray
    shift: float
    reach: float
    depth: np.ndarray
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Warp:
    """Where in the atlas each point of a subject's head comes from.

    Attributes:
        matrix: (3, 3) from head to atlas; rotation, anisotropic size, shear.
        seed: Entropy of the smooth displacements.
        push: The mass effect, or None.
    """

    matrix: np.ndarray
    seed: tuple[int, ...]
    push: Push | None = None

    @classmethod
    def draw(cls, seed: tuple[int, ...]) -> "Warp":
        """A random head: sides of the brain 0.86-0.98 of the atlas, rotation of a few degrees."""
        rng = np.random.default_rng((*seed, 0))
        angles = np.deg2rad(rng.normal(0, 2.5, 3))
        skew = np.array(
            [[0, -angles[2], angles[1]], [angles[2], 0, -angles[0]], [-angles[1], angles[0], 0]]
        )
        size = 0.92 * np.exp(rng.normal(0, 0.025, 3)).clip(0.93, 1.065)
        shear = np.triu(rng.normal(0, 0.02, (3, 3)), 1)
        return cls((np.eye(3) + skew + shear) / size, seed)

    def points(self, grid: Grid) -> np.ndarray:
        """Atlas positions of the voxels of ``grid``: (3, D, H, W) float32, MNI mm."""
        axes = grid.axes()
        head = [np.broadcast_to(axis, grid.shape) for axis in axes]
        if self.push is not None:
            push = self.push
            away = [axis - float(c) for axis, c in zip(axes, push.centre)]
            radius = np.sqrt(sum(a**2 for a in away)) / push.reach
            depth = resample(push.depth, push.grid, grid, outside=0.0)
            held = np.clip(depth / 15, 0, 1)  # the skull does not give
            share = push.shift / push.reach * np.exp(1 - radius) * held
            head = [axis - a * share for axis, a in zip(axes, away)]
        rng = np.random.default_rng((*self.seed, 1))
        points = np.empty((3, *grid.shape), np.float32)
        for row, centre, out in zip(self.matrix, _ATLAS_CENTRE, points):
            out[...] = sum(float(w) * axis for w, axis in zip(row, head)) + centre
            out += 3.5 * smooth_field(rng, grid, scale=45.0)
            out += 1.2 * smooth_field(rng, grid, scale=16.0)
        return points

    def tissue(self, grid: Grid, *, points: np.ndarray | None = None) -> np.ndarray:
        """Fractions of grey matter, white matter, CSF, brain: (4, D, H, W) float32."""
        maps, affine = load_atlas(grid.spacing)
        points = self.points(grid) if points is None else points
        # The atlas affine is a translation: voxels are 1 mm, axes RAS+.
        index = points - affine[:3, 3].astype(np.float32).reshape(3, 1, 1, 1)
        return np.stack([ndimage.map_coordinates(m, index, order=1) for m in maps])
