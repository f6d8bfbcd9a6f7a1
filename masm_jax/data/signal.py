"""MR signals of the phantoms: four sequences from relaxation times and tissue fractions.

Relaxation times are those of 3 T. Grey and white matter: Wansapura et al. 1999, J. Magn. Reson.
Imaging 9:531-538 (T1 1331 and 832 ms, T2 80-110 ms), in line with Stanisz et al. 2005, Magn. Reson.
Med. 54:507-512. Proton densities: the BrainWeb phantom (Collins et al. 1998, IEEE Trans. Med.
Imaging 17:463-468). Pathological tissues have no single literature value: oedema and tumour are set
so that their contrasts against white matter fall in the range seen in clinical glioma scans.
Contrast agent: 1/T1 rises by relaxivity times concentration (Rohrer et al. 2005, Invest. Radiol.
40:715-724). Noise: the magnitude of a complex signal is Rician (Gudbjartsson and Patz 1995, Magn.
Reson. Med. 34:910-914).
"""

import functools

import numpy as np

from masm_jax.data.anatomy import Grid, smooth_field

RELAXIVITY = 4.0e-3  # per mM and ms: 4.0 per mM and second, a gadolinium chelate at 3 T

# T1 ms, T2 ms, proton density, contrast agent mM, relative spread between subjects.
TISSUES = {
    "grey": (1330.0, 94.0, 0.83, 0.0, 0.04),
    "white": (840.0, 80.0, 0.72, 0.0, 0.03),
    "csf": (4000.0, 1500.0, 1.0, 0.0, 0.03),
    "oedema": (1220.0, 114.0, 0.82, 0.0, 0.05),
    "lesion": (1130.0, 110.0, 0.80, 0.0, 0.05),  # age-related white-matter hyperintensity
    "solid": (1720.0, 175.0, 0.90, 0.0, 0.05),  # tumour that does not enhance
    "rim": (1380.0, 115.0, 0.85, 0.18, 0.05),  # tumour with a leaking blood-brain barrier
    "necrosis": (2050.0, 225.0, 0.93, 0.0, 0.06),
    "blood": (480.0, 105.0, 0.85, 0.0, 0.08),  # subacute haemorrhage: bright before contrast too
    "vessel": (1650.0, 45.0, 0.80, 1.0, 0.08),
    "choroid": (1300.0, 130.0, 0.85, 0.25, 0.08),
}


def spin_echo(t1: float, t2: float, density: float, *, tr: float, te: float) -> float:
    """Spin-echo signal ``density (1 - exp(-TR/T1)) exp(-TE/T2)``; times in ms."""
    return density * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)


def inversion_recovery(
    t1: float, t2: float, density: float, *, tr: float, te: float, ti: float
) -> float:
    """Magnitude of ``density (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2)``; times in ms."""
    return density * abs(1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def enhanced_t1(t1: float, concentration: float) -> float:
    """T1 in ms with contrast agent of ``concentration`` mM: ``1 / (1/T1 + r1 C)``."""
    return 1 / (1 / t1 + RELAXIVITY * concentration)


def tissue_signals(rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Signal of every tissue in the four sequences of one subject's examination.

    Args:
        rng: Generator of the spread of tissues, sequences and dose.

    Returns:
        Modality -> tissue -> signal, relative to a proton density of 1.
    """

    def vary(value, spread):
        return value * float(np.exp(np.clip(rng.normal(0, spread), -2 * spread, 2 * spread)))

    t1w = {"tr": vary(520.0, 0.08), "te": vary(11.0, 0.1)}
    t2w = {"tr": vary(4500.0, 0.08), "te": vary(95.0, 0.06)}
    fluid = {"tr": vary(9000.0, 0.03), "te": vary(118.0, 0.06), "ti": vary(2500.0, 0.015)}
    dose = vary(1.0, 0.18)
    signals: dict[str, dict[str, float]] = {name: {} for name in ("t1", "t1ce", "t2", "flair")}
    for name, (t1, t2, density, agent, spread) in TISSUES.items():
        t1, t2, density = vary(t1, spread), vary(t2, spread), vary(density, 0.01)
        after = enhanced_t1(t1, agent * dose)
        signals["t1"][name] = spin_echo(t1, t2, density, **t1w)
        signals["t1ce"][name] = spin_echo(after, t2, density, **t1w)
        signals["t2"][name] = spin_echo(t1, t2, density, **t2w)
        signals["flair"][name] = inversion_recovery(t1, t2, density, **fluid)
    return signals


def acquire(
    fractions: dict[str, np.ndarray], brain: np.ndarray, grid: Grid, *, seed: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The four images of one subject.

    A voxel's signal is the mean of its tissues weighted by their fractions (partial volume), times
    texture and a smooth bias field, with Rician noise, in arbitrary scanner units.

    Args:
        fractions: Tissue (a key of ``TISSUES``) -> (D, H, W) float32; they sum to 1 in the brain.
        brain: (D, H, W) bool.
        grid: Grid of the arrays.
        seed: Entropy of the examination.

    Returns:
        Modality -> (D, H, W) int16: at least 1 in the brain, 0 outside.
    """
    rng = np.random.default_rng((*seed, 4))
    signals = tissue_signals(rng)
    sick = sum(fractions[name] for name in ("oedema", "solid", "rim", "necrosis"))
    grain = smooth_field(rng, grid, scale=7.0)
    clean = {}
    for modality, signal in signals.items():
        parts = (np.float32(signal[name]) * part for name, part in fractions.items())
        image = functools.reduce(np.add, parts)
        own = smooth_field(rng, grid, scale=8.0)
        image *= 1 + 0.02 * own + sick * (0.05 * grain + 0.04 * own)
        strength = rng.uniform(0.02, 0.07)
        image *= np.exp(strength * smooth_field(rng, grid, scale=90.0))
        noise = rng.uniform(0.015, 0.04) * signal["white"]
        gain = np.exp(rng.uniform(np.log(150), np.log(900))) / signal["white"]
        clean[modality] = (image, noise, gain)
    # Noise alone depends on the grid, so it is drawn last.
    images = {}
    for modality, (image, noise, gain) in clean.items():
        real = image + noise * rng.standard_normal(grid.shape, np.float32)
        imaginary = noise * rng.standard_normal(grid.shape, np.float32)
        counts = np.rint(gain * np.hypot(real, imaginary)).clip(1, 32767)
        images[modality] = np.where(brain, counts, 0).astype(np.int16)
    return images
