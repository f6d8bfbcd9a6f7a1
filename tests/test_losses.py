"""Losses by hand-made values, and against optax and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from masm_jax.data.conventions import REGIONS
from masm_jax.losses import (
    cross_entropy,
    keep_ratios,
    mean_ratios,
    overlaps,
    ratio_loss,
    region_targets,
    segmentation_loss,
    segmentation_terms,
    soft_dice,
)


def volume(*values, regions=1):
    """(1, 1, 1, N, R): a line of voxels, the same in every region."""
    line = jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1, 1)
    return jnp.broadcast_to(line, (*line.shape[:-1], regions))


def noise(seed=0, shape=(2, 4, 4, 4, 3)):
    logits = jax.random.normal(jax.random.key(seed), shape) * 2
    targets = jax.random.bernoulli(jax.random.key(seed + 100), 0.3, shape)
    return logits, targets.astype(jnp.float32)


def logit(p):
    return float(np.log(p / (1 - p)))


def dice_loss(logits, targets, **options):
    """(R,), of (B, D, H, W, R)."""
    return soft_dice(*overlaps(logits, targets, logits.shape[-1]), **options)


def entropy(logits, targets):
    """(R,), of (B, D, H, W, R)."""
    loss = cross_entropy(logits, targets, logits.shape[-1])
    assert loss.shape == (len(logits), logits.shape[-1])
    return loss.mean(0)


def loss_of(logits, targets, *, batch_dice):
    """As ``segmentation_loss``, of heads that are not packed."""
    terms = segmentation_terms(logits, targets, targets.shape[-1])
    return segmentation_loss(terms, batch_dice=batch_dice)


def packed(x):
    """(B, D, H, W, R) -> (B, D / 2, H / 2, W / 2, 8 R), as the stem and the first head do."""
    b, d, h, w, r = x.shape
    cells = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, r).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return cells.reshape(b, d // 2, h // 2, w // 2, 8 * r)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("label", "wt", "tc", "et"),
    [(0, 0, 0, 0), (1, 1, 1, 0), (2, 1, 0, 0), (3, 1, 1, 1), (4, 0, 0, 0)],
)
def test_regions_of_every_label(label, wt, tc, et):
    maps = region_targets(jnp.full((1, 2, 2, 2), label, jnp.uint8), REGIONS.values())
    assert maps.shape == (1, 2, 2, 2, 3) and maps.dtype == jnp.float32
    np.testing.assert_array_equal(maps, np.broadcast_to([wt, tc, et], maps.shape))


def test_a_region_of_many_values_does_not_wrap_around():
    """Booleans are summed: 256 matches in uint8 would be none."""
    maps = region_targets(jnp.full((1, 1, 1, 1), 3, jnp.uint8), [(3,) * 256])
    assert maps.item() == 1


def test_targets_of_packed_logits_are_the_packed_targets():
    label = np.random.default_rng(0).integers(0, 5, (2, 4, 6, 2)).astype(np.uint8)
    maps = np.stack([np.isin(label, values) for values in REGIONS.values()], -1)
    np.testing.assert_array_equal(region_targets(jnp.asarray(label), REGIONS.values()), maps)
    factored = region_targets(jnp.asarray(label), REGIONS.values(), 2)
    assert factored.shape == (2, 2, 3, 1, 24) and factored.dtype == jnp.float32
    np.testing.assert_array_equal(factored, packed(maps))


# ---------------------------------------------------------------- Dice


def test_dice_by_hand():
    # p = 0.5, 0.8; t = 0, 1: overlap 0.8, total 1.3 + 1.
    loss = dice_loss(volume(0.0, logit(0.8)), volume(0, 1), batch_dice=False)
    assert loss.shape == (1,)
    assert float(loss[0]) == pytest.approx(1 - (2 * 0.8 + 1e-5) / (2.3 + 1e-5), abs=1e-6)


def test_dice_of_perfect_wrong_and_empty():
    sure = 50.0
    for batch_dice in (False, True):
        perfect = dice_loss(volume(-sure, sure), volume(0, 1), batch_dice=batch_dice)
        wrong = dice_loss(volume(sure, -sure), volume(0, 1), batch_dice=batch_dice)
        both_empty = dice_loss(volume(-sure, -sure), volume(0, 0), batch_dice=batch_dice)
        np.testing.assert_allclose([perfect[0], both_empty[0]], 0, atol=1e-6)
        assert float(wrong[0]) == pytest.approx(1, abs=1e-4)


def test_batch_dice_sums_before_it_divides():
    """First crop: p = 0.5 everywhere, region absent. Second: p = 0.5, all of it."""
    logits = jnp.zeros((2, 1, 1, 4, 1))
    targets = jnp.stack([jnp.zeros((1, 1, 4, 1)), jnp.ones((1, 1, 4, 1))])
    smooth = 1e-5
    apart = dice_loss(logits, targets, batch_dice=False)
    first, second = 1 - smooth / (2 + smooth), 1 - (4 + smooth) / (6 + smooth)
    assert float(apart[0]) == pytest.approx((first + second) / 2, abs=1e-6)
    together = dice_loss(logits, targets, batch_dice=True)
    assert float(together[0]) == pytest.approx(1 - (4 + smooth) / (8 + smooth), abs=1e-6)


def test_dice_of_one_region_does_not_see_another():
    logits, targets = noise()
    together = dice_loss(logits, targets, batch_dice=True)
    for region in range(3):
        one = (slice(None),) * 4 + (slice(region, region + 1),)
        alone = dice_loss(logits[one], targets[one], batch_dice=True)
        np.testing.assert_allclose(alone[0], together[region], rtol=1e-6)


@pytest.mark.parametrize("smooth", [1e-5, 3.0])
def test_dice_against_optax(smooth):
    logits, targets = noise()
    ours = dice_loss(logits, targets, batch_dice=False, smooth=smooth)
    for region in range(3):  # one class at a time, where optax takes the sigmoid
        theirs = optax.losses.dice_loss(
            logits[..., region : region + 1], targets[..., region : region + 1], smooth=smooth / 2
        )
        assert float(ours[region]) == pytest.approx(float(theirs.mean()), rel=1e-5)


# ---------------------------------------------------------------- cross-entropy


def test_cross_entropy_by_hand():
    loss = entropy(volume(logit(0.25), logit(0.9)), volume(0, 1))
    assert float(loss[0]) == pytest.approx(-(np.log(0.75) + np.log(0.9)) / 2, rel=1e-5)


def test_cross_entropy_against_optax_and_torch():
    torch = pytest.importorskip("torch", reason="parity needs torch: requirements-test.txt")
    logits, targets = noise()
    targets = targets * 0.75  # soft, as the coarser heads see them
    loss = entropy(logits, targets)
    theirs = optax.losses.sigmoid_binary_cross_entropy(logits, targets).mean((0, 1, 2, 3))
    np.testing.assert_allclose(loss, theirs, rtol=1e-5)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(np.asarray(logits)), torch.tensor(np.asarray(targets)), reduction="none"
    )
    np.testing.assert_allclose(loss, theirs.mean((0, 1, 2, 3)), rtol=1e-5)


def test_extreme_logits_stay_finite():
    logits, targets = volume(-1e4, 1e4, -1e4, 1e4), volume(0, 1, 1, 0)

    def loss(logits):
        total, _ = loss_of([logits], targets, batch_dice=True)
        return total

    value, gradient = jax.value_and_grad(loss)(logits)
    assert float(entropy(logits, targets)[0]) == pytest.approx(5e3)
    assert np.isfinite(value) and np.isfinite(gradient).all()


# ---------------------------------------------------------------- deep supervision


def test_heads_are_weighted_by_halves_and_the_lowest_not_at_all():
    logits = [noise(i, (2, 8 >> i, 16 >> i, 8 >> i, 3))[0] for i in range(4)]
    targets = noise(9, (2, 8, 16, 8, 3))[1]
    total, parts = loss_of(logits, targets, batch_dice=True)
    losses = []
    for i, head in enumerate(logits):
        n, f = 8 >> i, 1 << i
        cells = np.asarray(targets).reshape(2, n, f, 2 * n, f, n, f, 3).mean((2, 4, 6))
        dice = float(dice_loss(head, jnp.asarray(cells), batch_dice=True).mean())
        losses.append((dice, float(entropy(head, jnp.asarray(cells)).mean())))
    weights = np.array([1, 0.5, 0.25, 0]) / 1.75
    assert float(total) == pytest.approx(weights @ np.array(losses).sum(1), rel=1e-5)
    assert float(parts["dice_loss"]) == pytest.approx(losses[0][0], rel=1e-5)
    assert float(parts["cross_entropy"]) == pytest.approx(losses[0][1], rel=1e-5)
    changed, _ = loss_of([*logits[:3], logits[3] + 5], targets, batch_dice=True)
    assert float(changed) == float(total)


def test_one_head_has_all_the_weight():
    logits, targets = noise()
    total, parts = loss_of([logits], targets, batch_dice=True)
    assert float(total) == pytest.approx(float(parts["dice_loss"] + parts["cross_entropy"]))


@pytest.mark.parametrize("batch_dice", [True, False])
def test_packed_logits_have_the_losses_and_gradients_of_unpacked_ones(batch_dice):
    """The first head holds 2^3 voxels in its channels; the others start at the level below."""
    full, targets = noise(0, (2, 8, 4, 12, 3))
    lower = [noise(i, (2, 8 // f, 4 // f, 12 // f, 3))[0] for i, f in ((1, 4), (2, 4))]

    def plain(full, lower):
        return loss_of([full, *lower], targets, batch_dice=batch_dice)

    def of_packed(full, lower):
        terms = segmentation_terms([packed(full), *lower], packed(targets), 3)
        assert len(terms) == 2
        for head in terms:
            assert {name: term.shape for name, term in head.items()} == dict.fromkeys(
                ("overlap", "total", "entropy"), (2, 3)
            )
        return segmentation_loss(terms, batch_dice=batch_dice)

    one, other = (
        jax.value_and_grad(function, (0, 1), has_aux=True)(full, lower)
        for function in (plain, of_packed)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-8)
    for a, b in zip(overlaps(full, targets, 3), overlaps(packed(full), packed(targets), 3)):
        np.testing.assert_allclose(b, a, rtol=1e-5)
    entropies = cross_entropy(packed(full), packed(targets), 3)
    np.testing.assert_allclose(entropies, cross_entropy(full, targets, 3), rtol=1e-5)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_parts_of_a_batch_have_the_loss_of_the_whole(batch_dice):
    """Terms of its examples one after another, also where Dice is summed over the batch."""
    heads = [noise(i, (4, 4 // f, 8 // f, 4 // f, 3))[0] for i, f in enumerate((1, 2, 4))]
    targets = noise(9, (4, 4, 8, 4, 3))[1]
    parts = [
        segmentation_terms([head[rows] for head in heads], targets[rows], 3)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    joined = jax.tree.map(lambda *terms: jnp.concatenate(terms), *parts)
    found, _ = segmentation_loss(joined, batch_dice=batch_dice)
    whole, _ = loss_of(heads, targets, batch_dice=batch_dice)
    assert float(found) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_an_empty_region_has_a_finite_gradient_that_lowers_it(batch_dice):
    logits, targets = noise()
    targets = targets.at[..., 2].set(0)

    def loss(logits):
        return loss_of([logits], targets, batch_dice=batch_dice)[0]

    gradient = jax.grad(loss)(logits)
    assert np.isfinite(gradient).all()
    assert (gradient[..., 2] > 0).all()


# ---------------------------------------------------------------- keep ratios


def test_ratio_loss_by_hand():
    keep = {
        "level1": jnp.ones((2, 2, 2, 2, 2)).at[:, 1].set(0),  # 1, 0
        "level2": jnp.ones((2, 2, 2, 2, 2)).at[0, 0].set(0),  # 0.5, 1
    }
    ratios = keep_ratios(keep)
    np.testing.assert_allclose(ratios["level1"], [[1, 0], [1, 0]])
    np.testing.assert_allclose(ratios["level2"], [[0, 1], [1, 1]])
    expected = np.mean([0.3**2, 0.7**2, 0.2**2, 0.3**2])
    kept = mean_ratios(ratios)
    assert float(ratio_loss(kept, 0.7)) == pytest.approx(expected, rel=1e-5)
    assert float(ratio_loss(kept, jnp.float32(0.7))) == pytest.approx(expected, rel=1e-5)


def test_only_those_count_that_could_be_replaced():
    ratios = {"level1": jnp.array([[0.2, 0.4, 0.1], [0.6, 0.8, 0.3]])}
    free = jnp.array([[1, 1, 0], [0, 1, 0]])  # of the third no example: nothing to say
    np.testing.assert_allclose(mean_ratios(ratios, free)["level1"], [0.2, 0.6, np.nan], rtol=1e-6)

    def loss(ratio):
        return ratio_loss(mean_ratios({"level1": ratio}, free), 0.7, free)

    assert float(loss(ratios["level1"])) == pytest.approx((0.5**2 + 0.1**2) / 3)
    gradient = jax.grad(loss)(ratios["level1"])
    expected = [[2 * -0.5 / 3, -0.1 / 3, 0], [0, -0.1 / 3, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert jnp.isnan(loss(ratios["level1"].at[0, 0].set(jnp.nan)))  # a broken network is seen


def test_ratio_loss_without_mixers_is_nothing():
    assert float(ratio_loss({}, 0.7)) == 0 and ratio_loss({}, 0.7).dtype == jnp.float32
