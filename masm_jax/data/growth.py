"""Growth of the phantoms' tumours, and the borders of their parts.

The density c of tumour cells follows the Fisher-Kolmogorov equation

    dc/dt = div(D grad c) + rho c (1 - c),

with D in white matter ten times that in grey matter and none in CSF (Swanson et al. 2000, Cell
Prolif. 33:317-329; Jbabdi et al. 2005, Magn. Reson. Med. 54:616-624; Clatz et al. 2005, IEEE Trans.
Med. Imaging 24:1334-1346). Low density is oedema with infiltration, high density the core. Within
the core, cells farther from its surface than the living rim is thick are necrotic.
"""

import numpy as np
from scipy import ndimage

GREY_DIFFUSION = 0.1  # of that in white matter
FAR = 12.0  # mm, at which signed distances are cut off


def grow(
    grey: np.ndarray,
    white: np.ndarray,
    rate: np.ndarray,
    starts: np.ndarray,
    *,
    spacing: float,
    front: float,
    level: float,
    volume: float,
    max_steps: int = 600,
) -> np.ndarray:
    """Grows a tumour by the Fisher-Kolmogorov equation until it has a given volume.

    Explicit Euler steps with the flux between two voxels governed by the harmonic mean of their
    diffusivities, so that none enters CSF. Time is in units of ``1 / rho``.

    Args:
        grey: (d, h, w) float32, fraction of grey matter.
        white: (d, h, w) float32, fraction of white matter.
        rate: (d, h, w) float32, local proliferation, 1 on average.
        starts: (n, 3) int, voxels of density 1 at the start.
        spacing: Voxel size, mm.
        front: ``sqrt(D / rho)`` in white matter, mm.
        level: Density from which a voxel counts as tumour.
        volume: Volume to stop at, ml.
        max_steps: Bound on the steps, for a place that cannot hold the volume.

    Returns:
        (d, h, w) float32 density in [0, 1], 0 in CSF.
    """
    tissue = (grey + white > 0.5).astype(np.float32)
    diffusion = tissue * (white + GREY_DIFFUSION * grey) * (front / spacing) ** 2
    step = 0.9 / (6 * float(diffusion.max()))
    flows = []
    for axis in range(3):
        here, there = _neighbours(diffusion, axis)
        flows.append(2 * step * here * there / np.maximum(here + there, 1e-6))
    gain = step * rate * tissue
    density = np.zeros_like(grey)
    density[tuple(starts.T)] = 1
    voxel_ml = spacing**3 / 1000
    for count in range(max_steps):
        change = gain * density * (1 - density)
        for axis, flow in enumerate(flows):
            here, there = _neighbours(density, axis)
            flux = flow * (there - here)
            into_here, into_there = _neighbours(change, axis)
            into_here += flux
            into_there -= flux
        density += change
        if count % 4 == 3 and np.count_nonzero(density > level) * voxel_ml >= volume:
            break
    return density.clip(0, 1) * tissue


def _neighbours(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of all voxels but the last and all but the first along ``axis``."""
    before = [slice(None)] * 3
    after = [slice(None)] * 3
    before[axis], after[axis] = slice(None, -1), slice(1, None)
    return array[tuple(before)], array[tuple(after)]


def borders(
    density: np.ndarray,
    tissue: np.ndarray,
    ripple: np.ndarray,
    *,
    spacing: float,
    level: float,
    core_share: float,
    rim: float,
) -> dict[str, np.ndarray]:
    """Signed distances to the borders of the tumour's parts, in millimetres.

    Args:
        density: (d, h, w) float32.
        tissue: (d, h, w) bool, where there is brain tissue rather than CSF.
        ripple: (d, h, w) float32 unit-variance field that makes the core uneven.
        spacing: Voxel size, mm.
        level: Density at the border of the visible tumour.
        core_share: Share of the visible tumour, its densest part, that is core.
        rim: Thickness of the living rim of the core, mm.

    Returns:
        whole, core, necrosis -> (d, h, w) float32, mm, positive inside, cut off at +-12.
    """
    # The log odds fall almost linearly from the core outwards: the right thing to interpolate.
    odds = np.log((density + 1e-6) / (1 - density + 1e-6))
    weight = ndimage.gaussian_filter(tissue.astype(np.float32), 1.0)
    odds = ndimage.gaussian_filter(odds * tissue, 1.0) / np.maximum(weight, 1e-3)
    odds[weight < 0.05] = np.log(1e-6)
    slope = np.sqrt(sum(g**2 for g in np.gradient(odds, spacing))).clip(0.1)

    edge = np.log(level)
    parts, count = ndimage.label((odds > edge) & tissue)
    sizes = np.bincount(parts.ravel(), minlength=count + 1) * spacing**3 / 1000
    sizes[0] = 0
    odds[np.isin(parts, np.flatnonzero(sizes < min(1.0, sizes.max()))) & (parts > 0)] = -14
    visible = tissue & (odds > edge)
    border = np.quantile(odds[visible], 1 - core_share)

    whole = (odds - edge) / slope
    core = np.minimum((odds - border) / slope + ripple, whole)
    inner = ndimage.distance_transform_edt((core > 0) & tissue) * spacing - spacing / 2
    necrosis = ndimage.gaussian_filter(inner.astype(np.float32), 0.8) - rim
    necrosis += 1.3 * ripple * (inner > 0)
    cut = {"whole": whole, "core": core, "necrosis": necrosis}
    return {name: part.clip(-FAR, FAR).astype(np.float32) for name, part in cut.items()}
