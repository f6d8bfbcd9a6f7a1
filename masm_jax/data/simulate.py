"""Simulated glioma cases (phantoms): a tumour grown in real anatomy, imaged by four MR sequences.

A phantom is no patient, and a score on phantoms is no BraTS score: they exist to run, test and
demonstrate the whole way of the data where scans may not be redistributed.

The head comes from ``anatomy``, the tumour from ``growth``, the images from ``signal``; here they
are put together, with what a model must not take for tumour. No modality alone tells the parts
apart: oedema shows in T2 and FLAIR, as do harmless lesions; the rim only in T1ce against T1, as old
blood is bright in both; necrosis differs from CSF by FLAIR.

Everything but the noise is drawn on grids in millimetres: a case is the same head and the same
tumour at every voxel size.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from masm_jax.data.anatomy import Grid, Push, Warp, resample, smooth_field
from masm_jax.data.growth import FAR, borders, grow
from masm_jax.data.signal import TISSUES, acquire

VERSION = 1  # raised whenever the same seed would give another phantom
CASES_PER_ABSENCE = 6  # one case in each run of six has no enhancing tumour
_LATTICE = 2.0  # mm, voxel size of the growth
_REACH = 58.0  # mm, growth stays in a cube of twice this side


@dataclasses.dataclass(frozen=True)
class Plan:
    """What kind of tumour a case gets.

    Attributes:
        volume: Whole tumour to grow to, ml.
        core: Share of the whole tumour that is core.
        enhancing: Whether the rim takes up contrast agent.
        rim: Thickness of the living rim, mm; infinite for a core without necrosis.
        front: Width sqrt(D / rho) of the growing front in white matter, mm.
        density: Density at the border of the visible tumour.
        foci: Number of points it starts from.
        shift: Greatest displacement of normal tissue, mm.
        leak: Level of a unit-variance field above which the rim enhances.
        haemorrhage: Level of such a field above which necrosis holds blood.
        lesions: Load of white-matter hyperintensities, 0 (none) to 1.
    """

    volume: float
    core: float
    enhancing: bool
    rim: float
    front: float
    density: float
    foci: int
    shift: float
    leak: float
    haemorrhage: float
    lesions: float

    @classmethod
    def draw(cls, seed: int, index: int) -> "Plan":
        """The plan of case ``index`` of the set ``seed``."""
        block, place = divmod(index, CASES_PER_ABSENCE)
        absent = np.random.default_rng((seed, block, 5)).integers(CASES_PER_ABSENCE)
        enhancing = bool(place != absent)
        rng = np.random.default_rng((seed, index, 2))
        necrotic = rng.random() < (0.9 if enhancing else 0.3)
        return cls(
            volume=float(np.exp(rng.normal(np.log(70), 0.5)).clip(25, 130)),
            core=float(rng.uniform(0.28, 0.55)),
            enhancing=enhancing,
            rim=float(rng.uniform(4.5, 7.0)) if necrotic else np.inf,
            front=float(rng.uniform(1.6, 2.6)),
            density=float(rng.uniform(0.02, 0.08)),
            foci=1 + int(rng.random() < 0.35),
            shift=float(rng.uniform(0, 6)),
            leak=float(rng.uniform(-2.4, -0.9)),
            haemorrhage=float(rng.uniform(0.7, 1.6)) if rng.random() < 0.35 else np.inf,
            lesions=float(rng.uniform(0.2, 1)) if rng.random() < 0.5 else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One simulated case in the axes of a BraTS file (LPS: x left, y posterior, z superior).

    Attributes:
        images: Modality (t1, t1ce, t2, flair) -> (I, J, K) int16, 0 outside the brain.
        labels: (I, J, K) uint8: 0, 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing.
        tissues: Tissue -> (I, J, K) float32, its fraction of the voxel before any noise.
        affine: (4, 4), voxel to millimetres.
        plan: What was asked of the growth.
    """

    images: dict[str, np.ndarray]
    labels: np.ndarray
    tissues: dict[str, np.ndarray]
    affine: np.ndarray
    plan: Plan


def _settle(
    warp: Warp, plan: Plan, rng: np.random.Generator
) -> tuple[Warp, Push, tuple[np.ndarray, np.ndarray]]:
    """Chooses the tumour's place in the cerebral white matter.

    Returns:
        The warp with the mass effect there, that effect, and the corners of the brain's bounding
        box, mm.
    """
    whole = Grid.whole(_LATTICE)
    lattice = whole.crop(whole.box(np.full(3, -104.0), np.full(3, 104.0)))
    points = warp.points(lattice)
    _, white, _, brain = warp.tissue(lattice, points=points)
    depth = ndimage.distance_transform_edt(brain > 0.5).astype(np.float32) * _LATTICE
    x, y, z = points
    # In MNI space: above the cerebellum and brain stem, or in a temporal lobe; off the midline.
    cerebral = (z > 6) | ((np.abs(x) > 27) & (y > -40) & (z > -20))
    places = np.argwhere((white > 0.8) & (depth > 14) & cerebral & (np.abs(x) > 14))
    origin = np.asarray(lattice.origin)
    centre = origin + _LATTICE * places[int(rng.random() * len(places))]
    inside = np.argwhere(brain > 0.5)
    corners = (origin + _LATTICE * inside.min(0) - 6, origin + _LATTICE * inside.max(0) + 6)
    push = Push(centre, plan.shift, 25.0, depth, lattice)
    return dataclasses.replace(warp, push=push), push, corners


def _inside(distance: np.ndarray, width: float) -> np.ndarray:
    """Fraction of a voxel inside a border ``distance`` mm away, for an edge ``width`` mm wide."""
    return np.clip(0.5 + distance / width, 0, 1)


def _add(tissues: dict[str, np.ndarray], name: str, share: np.ndarray) -> None:
    """Replaces ``share`` of every voxel by tissue ``name``; the others shrink alike."""
    for part in tissues.values():
        part *= 1 - share
    tissues[name] += share


def _normal_variants(
    tissues: dict[str, np.ndarray],
    points: np.ndarray,
    depth: np.ndarray,
    clear: np.ndarray,
    grid: Grid,
    *,
    load: float,
    rng: np.random.Generator,
) -> None:
    """Adds sulci, vessels, choroid plexus and white-matter hyperintensities, in place.

    They are what a model must not take for tumour: vessels, the sagittal sinus and the plexus
    enhance, hyperintensities look like oedema.

    Args:
        tissues: Tissue -> (D, H, W) float32 fractions.
        points: (3, D, H, W) float32, MNI mm.
        depth: (D, H, W) float32, distance to the brain's surface, mm.
        clear: (D, H, W) float32, 0 in and close to the tumour, 1 away from it.
        grid: Grid of the arrays.
        load: Amount of hyperintensities, 0 to 1.
        rng: Generator.
    """
    blur = grid.spacing**2 / 12  # variance of a voxel's box, mm^2

    # Sheets (one field near 0) are sulci, lines (two fields near 0) are vessels. A unit-variance
    # field with control points s apart rises by about 2 / s per mm.
    sheet = smooth_field(rng, grid, scale=13.0) * 6.5
    sulcus = np.sqrt(0.8 / (0.8 + blur)) * np.exp(-(sheet**2) / (2 * (0.8 + blur)))
    _add(tissues, "csf", 0.8 * sulcus * tissues["grey"] * np.clip((20 - depth) / 5, 0, 1))

    square = sum((smooth_field(rng, grid, scale=13.0) * 6.5) ** 2 for _ in range(2))
    tube = 1.5 / (1.5 + blur) * np.exp(-square / (2 * (1.5 + blur)))
    outer = tissues["grey"] + tissues["csf"]
    _add(tissues, "vessel", 0.9 * tube * outer * np.clip((30 - depth) / 8, 0, 1))
    x, y, z = points
    sinus = np.exp(-(x**2) / (2 * (4 + blur))) * np.clip((7 - depth) / 3, 0, 1)
    _add(tissues, "vessel", 0.7 * sinus * ((z > 25) | (y < -75)))

    ventricle = tissues["csf"] * np.clip((depth - 26) / 4, 0, 1)
    _add(tissues, "choroid", 0.8 * ventricle * _inside(smooth_field(rng, grid, scale=6) - 1, 0.6))

    spots = 3 * (smooth_field(rng, grid, scale=7.0) - 2.7 + 0.5 * load)
    halo = ndimage.gaussian_filter(ventricle, 3.0 / grid.spacing) - 0.32 + 0.12 * load
    lesion = np.maximum(_inside(spots, 3.0), _inside(12 * halo, 3.0)) * np.clip(depth / 8 - 1, 0, 1)
    _add(tissues, "lesion", (load > 0) * 0.85 * lesion * tissues["white"] * clear)


def _tumour(
    tissues: dict[str, np.ndarray],
    levels: dict[str, np.ndarray],
    grid: Grid,
    plan: Plan,
    rng: np.random.Generator,
) -> np.ndarray:
    """Puts the tumour into the tissue fractions, in place, and labels it.

    Args:
        tissues: Tissue -> (D, H, W) float32 fractions.
        levels: Signed distances (D, H, W) float32 of ``growth.borders``, on ``grid``.
        grid: Grid of the arrays.
        plan: The case's plan.
        rng: Generator.

    Returns:
        (D, H, W) uint8 labels 0, 1, 2, 4.
    """
    edge = max(grid.spacing, 1.5)
    fluid = tissues["csf"]
    room = np.clip((0.7 - fluid) / 0.4, 0, 1)  # thin sulci are swallowed, ventricles are not
    solid_ground = fluid < 0.5
    leak = 6 * (smooth_field(rng, grid, scale=12.0) - plan.leak)
    stain = 5 * (smooth_field(rng, grid, scale=10.0) - plan.haemorrhage)

    whole = levels["whole"]
    core = _inside(levels["core"], edge) * room
    necrosis = np.minimum(_inside(levels["necrosis"], edge) * room, core)
    enhancing = _inside(leak, edge) * plan.enhancing
    bloody = _inside(stain, edge)

    water = _inside(whole, edge + 1.5) * (0.7 + 0.3 * np.clip(whole / 6, 0, 1))
    _add(tissues, "oedema", water * room * (1 - 0.3 * tissues["grey"]))
    living = core - necrosis
    inner = {
        "rim": living * enhancing,
        "solid": living * (1 - enhancing),
        "necrosis": necrosis * (1 - bloody),
        "blood": necrosis * bloody,
    }
    for part in tissues.values():
        part *= 1 - core
    for name, share in inner.items():
        tissues[name] += share

    labels = np.zeros(grid.shape, np.uint8)
    labels[(whole > 0) & solid_ground] = 2
    in_core = (levels["core"] > 0) & solid_ground
    labels[in_core] = 1
    labels[in_core & (levels["necrosis"] <= 0) & (enhancing > 0.5)] = 4
    return labels


def simulate(seed: int, index: int, *, spacing: float) -> Phantom:
    """Simulates one case; the same arguments give the same case.

    Args:
        seed: Number of the set, at least 0.
        index: Number of the case in the set, at least 0; a case does not depend on the others.
        spacing: Voxel size, mm.

    Returns:
        The phantom, over a field of view of 240 x 240 x 155 mm.
    """
    plan = Plan.draw(seed, index)
    rng = np.random.default_rng((seed, index, 3))
    warp, push, corners = _settle(Warp.draw((seed, index)), plan, rng)

    lattice, centre = push.grid, push.centre
    local = lattice.crop(lattice.box(centre - _REACH, centre + _REACH))
    grey, white, csf, brain = warp.tissue(local)
    jitter = rng.uniform(-10, 10, (2, 3)) * np.array([[0.0], [1.0]])
    starts = (centre + jitter[: plan.foci] - np.asarray(local.origin)) / _LATTICE
    rate = np.exp(0.35 * smooth_field(rng, local, scale=18.0))
    density = grow(
        grey,
        white,
        rate,
        np.rint(starts).astype(int),
        spacing=_LATTICE,
        front=plan.front,
        level=plan.density,
        volume=plan.volume,
    )
    ripple = smooth_field(rng, local, scale=9.0)
    levels = borders(
        density,
        (csf < 0.5) & (brain > 0.5),
        ripple,
        spacing=_LATTICE,
        level=plan.density,
        core_share=plan.core,
        rim=plan.rim,
    )

    whole = Grid.whole(spacing)
    box = whole.box(*corners)
    grid = whole.crop(box)
    levels = {n: resample(part, local, grid, outside=-FAR) for n, part in levels.items()}
    points = warp.points(grid)
    grey, white, csf, brain = warp.tissue(grid, points=points)
    inside = brain > 0.5
    tissues = {name: np.zeros(grid.shape, np.float32) for name in TISSUES}
    for name, part in (("grey", grey), ("white", white), ("csf", csf)):
        tissues[name] += part * inside / np.maximum(brain, 0.5)
    depth = resample(push.depth, lattice, grid, outside=0.0)
    clear = np.clip((-levels["whole"] - 4) / 4, 0, 1)
    _normal_variants(tissues, points, depth, clear, grid, load=plan.lesions, rng=rng)
    labels = _tumour(tissues, levels, grid, plan, rng) * inside
    for part in tissues.values():
        part *= inside
    images = acquire(tissues, inside, grid, seed=(seed, index))

    def file_axes(array):  # RAS to LPS
        full = np.zeros(whole.shape, array.dtype)
        full[box] = array
        return np.ascontiguousarray(full[::-1, ::-1])

    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[1, 3] = (whole.shape[1] - 1) * spacing  # the origin of BraTS files
    return Phantom(
        images={name: file_axes(image) for name, image in images.items()},
        labels=file_axes(labels),
        tissues={name: file_axes(part) for name, part in tissues.items()},
        affine=affine,
        plan=plan,
    )
