"""The phantoms: contrasts of clinical scans, and no modality that tells all."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from masm_jax.data import anatomy, growth, signal
from masm_jax.data.simulate import Plan, simulate

SPACING = 4.0
SEED = 0


@pytest.fixture(scope="module")
def cases():
    """Six cases: exactly one of them without enhancing tumour."""
    return [simulate(SEED, index, spacing=SPACING) for index in range(6)]


def ratio(case, modality, label):
    """Median of a label over the median of pure white matter far from the tumour."""
    image = case.images[modality]
    white = image[(case.tissues["white"] > 0.9) & (case.labels == 0)]
    return np.median(image[case.labels == label]) / np.median(white)


def best_dice(score, target):
    """The best Dice any threshold on ``score`` can reach, bright or dark."""
    order = target[np.argsort(score)]
    best = 0.0
    for ranked in (order, order[::-1]):
        hits = np.cumsum(ranked)
        best = max(best, float(np.max(2 * hits / (np.arange(1, len(ranked) + 1) + hits[-1]))))
    return best


# --- geometry ---------------------------------------------------------------------------------


def test_a_case_depends_on_seed_and_index_alone(cases):
    again = simulate(SEED, 3, spacing=SPACING)
    for modality, image in cases[3].images.items():
        np.testing.assert_array_equal(image, again.images[modality])
    np.testing.assert_array_equal(cases[3].labels, again.labels)
    assert not np.array_equal(cases[3].labels, cases[4].labels)
    other = simulate(SEED + 1, 3, spacing=SPACING)
    assert not np.array_equal(other.labels, cases[3].labels)
    brains = [case.images["t1"] > 0 for case in (cases[3], cases[4], other)]
    assert not np.array_equal(brains[0], brains[1])
    assert not np.array_equal(brains[0], brains[2])


def test_a_case_is_the_same_head_and_tumour_at_every_voxel_size(cases):
    coarse = simulate(SEED, 0, spacing=6.0)
    for label in (1, 2, 4):
        fine_ml = np.sum(cases[0].labels == label) * SPACING**3 / 1000
        coarse_ml = np.sum(coarse.labels == label) * 6.0**3 / 1000
        assert coarse_ml == pytest.approx(fine_ml, rel=0.15, abs=1.5)


def test_labels_brain_and_affine(cases):
    for case in cases:
        inside = sum(case.tissues.values()) > 0
        assert set(np.unique(case.labels)) <= {0, 1, 2, 4}
        assert case.labels.dtype == np.uint8
        assert set(case.images) == {"t1", "t1ce", "t2", "flair"}
        for image in case.images.values():
            assert image.dtype == np.int16
            assert image.shape == case.labels.shape == (60, 60, 39)
            np.testing.assert_array_equal(image > 0, inside)
        assert not np.any(case.labels[~inside])
        total = sum(case.tissues.values())
        np.testing.assert_allclose(total[inside], 1, atol=1e-4)
        assert min(part.min() for part in case.tissues.values()) >= -1e-6
        assert 1100 < inside.sum() * SPACING**3 / 1000 < 1700
        assert nib.aff2axcodes(case.affine) == ("L", "P", "S")
        np.testing.assert_allclose(np.abs(np.diag(case.affine)), [SPACING] * 3 + [1])
        # The brain's surface stays free of the border of the file.
        assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()


def test_sizes_and_nesting(cases):
    for case in cases:
        whole, core = case.labels > 0, np.isin(case.labels, (1, 4))
        assert 20 < whole.sum() * SPACING**3 / 1000 < 150
        assert 0.2 < core.sum() / whole.sum() < 0.65
        depth = ndimage.distance_transform_edt(whole)
        assert depth[core].mean() > depth[case.labels == 2].mean()
        # The core lies in the oedema: little of its surface looks on normal tissue.
        shell = ndimage.binary_dilation(core) & ~core & (case.tissues["csf"] < 0.3)
        shell &= case.images["t1"] > 0
        assert np.mean(case.labels[shell] == 2) > 0.8
    necrotic = [c for c in cases if c.plan.enhancing and np.isfinite(c.plan.rim)]
    assert len(necrotic) >= 3
    for case in necrotic:
        core = np.isin(case.labels, (1, 4))
        depth = ndimage.distance_transform_edt(core)
        assert depth[case.tissues["necrosis"] > 0.7].mean() > depth[case.labels == 4].mean()


def test_one_case_in_six_has_no_enhancing_tumour(cases):
    enhancing = [Plan.draw(SEED, index).enhancing for index in range(60)]
    assert [sum(enhancing[start : start + 6]) for start in range(0, 60, 6)] == [5] * 10
    places = {enhancing[start : start + 6].index(False) for start in range(0, 60, 6)}
    assert len(places) > 2  # not always the same number of the six
    for case in cases:
        assert np.any(case.labels == 4) == case.plan.enhancing
        assert np.any(case.labels == 2)


def test_tumours_lie_in_different_places(cases):
    centres = np.array([ndimage.center_of_mass(case.labels > 0) for case in cases]) * SPACING
    assert np.all(np.ptp(centres, axis=0)[:2] > 20)


def test_the_push_moves_tissue_away_but_not_the_skull():
    warp = anatomy.Warp.draw((3, 1))
    grid = anatomy.Grid.whole(SPACING)
    brain = warp.tissue(grid)[3] > 0.5
    depth = ndimage.distance_transform_edt(brain).astype(np.float32) * SPACING
    centre = np.array([30.0, 0.0, 20.0])
    pushed = anatomy.Warp(warp.matrix, warp.seed, anatomy.Push(centre, 6.0, 25.0, depth, grid))
    moved = np.linalg.norm(pushed.points(grid) - warp.points(grid), axis=0)
    assert moved.max() == pytest.approx(6.0 / 0.92, rel=0.15)  # in atlas mm
    np.testing.assert_allclose(moved[~brain], 0, atol=1e-3)
    assert np.mean((pushed.tissue(grid)[3] > 0.5) != brain) < 1e-3


# --- growth -----------------------------------------------------------------------------------


def test_the_front_moves_at_the_speed_of_fisher_and_kolmogorov():
    # A plane front in white matter moves at 2 sqrt(D rho) = 2 front per unit of time.
    shape, front, spacing = (200, 3, 3), 4.0, 2.0
    white, grey = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    starts = np.argwhere(np.arange(200)[:, None, None] * np.ones(shape) < 3)

    def position(steps):
        density = growth.grow(
            grey,
            white,
            np.ones(shape, np.float32),
            starts,
            spacing=spacing,
            front=front,
            level=0.5,
            volume=np.inf,
            max_steps=steps,
        )
        return np.interp(-0.5, -density[:, 1, 1], np.arange(200)) * spacing

    step = 0.9 / (6 * (front / spacing) ** 2)
    speed = (position(1000) - position(600)) / (400 * step)
    assert speed == pytest.approx(2 * front, rel=0.08)


def test_growth_spares_grey_matter_and_csf():
    shape = (41, 41, 5)
    white = np.ones(shape, np.float32)
    white[25:], white[:15] = 0, 0
    grey = np.zeros(shape, np.float32)
    grey[25:] = 1  # grey matter on one side, CSF on the other
    density = growth.grow(
        grey,
        white,
        np.ones(shape, np.float32),
        np.array([[20, 20, 2]]),
        spacing=2.0,
        front=2.0,
        level=0.05,
        volume=15.0,
    )
    assert not density[:15].any()
    along = np.count_nonzero(density[20, 20:, 2] > 0.05)
    into = np.count_nonzero(density[20:, 20, 2] > 0.05)
    assert 5 < into < along
    assert 0 <= density.min() and density.max() <= 1
    assert np.count_nonzero(density > 0.05) * 0.008 == pytest.approx(15, rel=0.2)


# --- signal -----------------------------------------------------------------------------------


def test_sequences_against_values_worked_out_by_hand():
    assert signal.spin_echo(1000, 100, 2, tr=1000, te=100) == pytest.approx(
        2 * (1 - np.exp(-1)) * np.exp(-1)
    )
    null = 1000 * np.log(2)  # long TR: the signal vanishes at TI = T1 ln 2
    assert signal.inversion_recovery(1000, 100, 1, tr=1e6, te=50, ti=null) == pytest.approx(0)
    assert signal.inversion_recovery(1000, 100, 1, tr=1e6, te=0, ti=1e5) == pytest.approx(1)
    assert signal.enhanced_t1(1000, 0.25) == pytest.approx(500)  # 1/s + 4/(s mM) 0.25 mM = 2/s


def test_noise_is_rician_and_the_brain_never_zero():
    grid = anatomy.Grid.whole(8.0)
    tissues = {name: np.zeros(grid.shape, np.float32) for name in signal.TISSUES}
    brain = np.zeros(grid.shape, bool)
    brain[5:25, 5:25, 3:15] = True  # without any tissue: noise alone, Rayleigh distributed
    images = signal.acquire(tissues, brain, grid, seed=(0, 0))
    for image in images.values():
        assert image[brain].min() >= 1 and not image[~brain].any()
        rayleigh = np.sqrt(np.pi / (4 - np.pi))  # mean over standard deviation
        assert image[brain].mean() / image[brain].std() == pytest.approx(rayleigh, rel=0.1)


def test_contrasts_of_the_parts(cases):
    with_core = 0
    for case in cases:
        assert ratio(case, "t2", 2) > 1.25
        assert ratio(case, "flair", 2) > 1.1
        assert ratio(case, "t1", 2) < 1.0
        fluid = case.tissues["csf"] > 0.9
        dead = (case.tissues["necrosis"] > 0.8) | (case.tissues["solid"] > 0.8)
        assert fluid.sum() > 20
        flair, t2 = case.images["flair"], case.images["t2"]
        if dead.sum() > 5:
            with_core += 1
            assert np.median(flair[dead]) > 2 * np.median(flair[fluid])
            assert np.quantile(flair[dead], 0.05) > np.quantile(flair[fluid], 0.95)
            assert np.median(t2[dead]) > 0.5 * np.median(t2[fluid])  # alike there: both bright
        if case.plan.enhancing:
            assert ratio(case, "t1ce", 4) > 1.1
            assert ratio(case, "t1ce", 4) > 1.3 * ratio(case, "t1", 4)
            assert ratio(case, "t1", 4) < 1.0
    assert with_core >= 4


def test_no_single_modality_separates_the_enhancing_tumour(cases):
    alone = {"t1": [], "t1ce": [], "t2": [], "flair": []}
    together = []
    for case in cases:
        if not case.plan.enhancing:
            continue
        brain = case.images["t1"] > 0
        target = (case.labels == 4)[brain]
        values = {m: image[brain].astype(float) for m, image in case.images.items()}
        values = {m: v / np.median(v) for m, v in values.items()}
        for modality, scores in alone.items():
            scores.append(best_dice(values[modality], target))
        # Enhancement counts where there is tissue that is also bright in FLAIR.
        rise = (values["t1ce"] - values["t1"]) * (values["flair"] > 1.1)
        together.append(best_dice(rise, target))
    mean = {modality: np.mean(scores) for modality, scores in alone.items()}
    assert max(mean["t1"], mean["t2"]) < 0.3, mean
    assert mean["flair"] < 0.65, mean
    assert mean["t1ce"] < 0.8, mean
    assert np.mean(together) > 0.84 and np.mean(together) - mean["t1ce"] > 0.08, (mean, together)


def test_distractors_look_like_tumour_but_are_not(cases):
    lesions = [c for c in cases if np.any(c.tissues["lesion"] > 0.5)]
    assert lesions
    for case in lesions:
        spots = case.tissues["lesion"] > 0.5
        assert not case.labels[spots].any()
        flair = case.images["flair"]
        assert np.median(flair[spots]) == pytest.approx(np.median(flair[case.labels == 2]), rel=0.3)
    for case in cases:
        vessels = (case.tissues["vessel"] > 0.4) & (case.labels == 0)
        rise = case.images["t1ce"] / np.maximum(case.images["t1"], 1)
        white = case.tissues["white"] > 0.9
        assert vessels.sum() > 10
        assert np.median(rise[vessels]) > 1.3 * np.median(rise[white])
