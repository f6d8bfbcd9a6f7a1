"""Numbers at their limits: huge, constant, nearly none; hand-made gradients against differences.

The references are float64 or counted by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from masm_jax import losses, predict, prepare
from masm_jax.data.cases import find_cases
from masm_jax.data.conventions import MODALITIES
from masm_jax.data.integrity import CaseError
from masm_jax.data.pipeline import Crop
from masm_jax.data.preprocess import preprocess
from masm_jax.data.records import Records
from masm_jax.evaluation import metrics
from masm_jax.inference import postprocess
from masm_jax.models import conv_planes, layers, masking, resample
from masm_jax.models.conv import traced_for
from tests.data.conftest import images, segmentation, write
from tests.faults.runs import Network as Stub

UNIT = (1.0, 1.0, 1.0)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def scans(folder, change=lambda index, image: image, label=None):
    """A case A of four scans and a segmentation, below ``folder``."""
    for index, (name, image) in enumerate(zip(MODALITIES, images(0))):
        write(folder / "A" / f"A_{name}.nii.gz", change(index, image.astype(np.float32)))
    label = segmentation((2, 1, 4)) if label is None else label
    write(folder / "A" / "A_seg.nii.gz", label, dtype=np.uint8)
    (case,), problems = find_cases(folder)
    assert not problems
    return case


# ---------------------------------------------------------------- bfloat16 near its end


@functools.partial(jax.jit, static_argnums=2)
def normalised(x, scale, layer):
    """(the norm of x, its cube's sum's gradients); ``layer``: the layer norm."""

    def loss(x, scale):
        norm = functools.partial(layers.instance_norm, scale=scale, shift=0 * scale, depth=2)
        y = layers.LayerNorm(3)(x) if layer else norm(x)
        return (y.astype(jnp.float32) ** 3).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, scale)
    return y.astype(jnp.float32), gradients


@pytest.mark.parametrize("size", [1e4, 1e10, 1e15])
def test_norms_of_huge_bfloat16_are_finite(size):
    """Beyond 1e19 their squares overflow: the loss is not finite then, and the training stops."""
    x = np.clip(np.random.default_rng(0).normal(size=(4, 4, 4, 3)), -3, 3) * size
    x = jnp.asarray(x, jnp.bfloat16)
    assert finite(normalised(x, jnp.ones((2, 3)), True))
    y, gradients = normalised(x, jnp.ones((2, 3)), False)
    assert finite(gradients)
    kept = np.asarray(x, np.float64).reshape(2, 32, 3)
    expected = (kept - kept.mean(1, keepdims=True)) / kept.std(1, keepdims=True)
    np.testing.assert_allclose(y.reshape(2, 32, 3), expected, atol=0.03)


@functools.partial(jax.jit, static_argnums=2)
def loss_and_gradients(logits, targets, batch_dice):
    def loss(logits):
        terms = losses.segmentation_terms(logits, targets, targets.shape[-1])
        return losses.segmentation_loss(terms, batch_dice=batch_dice)

    return jax.value_and_grad(loss, has_aux=True)(logits)


@pytest.mark.parametrize("size", [1e4, 1e20, 1e38])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_losses_of_huge_bfloat16_logits_are_finite(size, batch_dice):
    random = np.random.default_rng(0)
    shapes = [(2, 4, 6, 4, 3), (2, 2, 3, 2, 3), (2, 1, 1, 1, 3)]
    logits = [size * random.choice([-1, 1], shape) for shape in shapes]
    logits = [jnp.asarray(head, jnp.bfloat16).astype(jnp.float32) for head in logits]
    targets = jnp.asarray(random.random(shapes[0]) < 0.3, jnp.float32)
    assert finite(loss_and_gradients(logits, targets, batch_dice))


EXTREME = np.array([-1e4, -700, -88, -20, -1e-4, 0, 1e-4, 20, 88, 700, 1e4])


@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_extreme_logits_against_float64(target):
    """Values and gradients of cross-entropy and Dice, a line of voxels."""
    line = jnp.asarray(EXTREME, jnp.float32).reshape(1, 1, 1, -1, 1)
    targets = jnp.full_like(line, target)

    def entropy(x):
        return losses.cross_entropy(x, targets, 1).sum()

    def dice(x):
        return losses.soft_dice(*losses.overlaps(x, targets, 1), batch_dice=True).sum()

    probability, count = special.expit(EXTREME), EXTREME.size
    value, gradient = jax.jit(jax.value_and_grad(entropy))(line)
    wanted = -target * special.log_expit(EXTREME) - (1 - target) * special.log_expit(-EXTREME)
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient.ravel(), (probability - target) / count, atol=1e-8)
    value, gradient = jax.jit(jax.value_and_grad(dice))(line)
    overlap, total = 2 * target * probability.sum() + 1e-5, (probability + target).sum() + 1e-5
    np.testing.assert_allclose(value, 1 - overlap / total, atol=1e-6)
    slope = -(2 * target * total - overlap) / total**2 * probability * (1 - probability)
    np.testing.assert_allclose(gradient.ravel(), slope, atol=1e-8)


@pytest.mark.parametrize("logit", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_an_infinite_logit_is_never_hidden(logit, target):
    logits = np.zeros((1, 2, 2, 2, 3), np.float32)
    logits[0, 0, 0, 0, 0] = logit
    (total, _), _ = loss_and_gradients([logits], np.full_like(logits, target), True)
    assert not np.isfinite(total)


# ---------------------------------------------------------------- constant and scaled scans


@pytest.mark.parametrize("value", [7.0, 0.1, 1e-6, -3e5, 0.0])
@pytest.mark.parametrize("which", [(1,), (0, 1, 2, 3)])
def test_a_constant_modality_is_refused_and_named(value, which, tmp_path, capsys, monkeypatch):
    """By prepare and by predict, with nothing written."""
    case = scans(
        tmp_path / "raw", lambda i, x: x * 0 + np.float32(value * (1 + i)) if i in which else x
    )
    with pytest.raises(CaseError) as error:
        preprocess(case)
    words = "is 0" if value == 0 else "everywhere in the brain"
    named = [p for p in error.value.problems if words in p.value]
    assert len({problem.file for problem in named}) >= (1 if value else len(which))
    monkeypatch.setattr(
        predict, "load_run", lambda *_, **__: (Stub(), {"step": 1, "spacing": None})
    )
    words = [f"--workdir={tmp_path}", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}"]
    assert predict.main(words) == 3
    said = capsys.readouterr().err
    assert "failed: A: " in said and named[0].value in said and not (tmp_path / "out").exists()


def test_scans_of_any_scale_give_the_same_record(tmp_path):
    scales = (1e-6, 1e6, 1.0, 2.0**-20)
    plain = preprocess(scans(tmp_path / "plain"), spacing=1.5)
    scaled = preprocess(
        scans(tmp_path / "scaled", lambda i, x: x * np.float32(scales[i])), spacing=1.5
    )
    np.testing.assert_array_equal(scaled.image[2:], plain.image[2:])  # powers of two: every bit
    step = np.spacing(np.abs(plain.image[:2]).astype(np.float16)).astype(np.float64)
    assert (np.abs(scaled.image[:2] - plain.image[:2].astype(np.float64)) <= step).all()
    np.testing.assert_array_equal(scaled.label, plain.label)


@pytest.mark.parametrize("value", [0.0, 0.5, -1e4, 1e15])
def test_the_norm_of_a_constant_is_nothing(value):
    """To the rounding of x * gain + offset in bfloat16, at the gain of no spread: 1e-5 ** -0.5."""
    y, gradients = normalised(jnp.full((4, 4, 4, 3), value, jnp.bfloat16), jnp.ones((2, 3)), False)
    assert finite(gradients)
    assert abs(y).max() <= abs(value) * 1e-5**-0.5 * 2**-8


# ---------------------------------------------------------------- one voxel of tumour


@pytest.mark.parametrize("place", [(1, 1, 1), (9, 11, 7), (5, 6, 4)])
def test_crops_hold_the_only_voxel_of_tumour(place, tmp_path):
    label = np.zeros(segmentation(()).shape, np.uint8)
    label[place] = 4
    scans(tmp_path / "raw", label=label)
    words = [f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'records'}", "--workers=1"]
    assert prepare.main(words) == 0
    records = Records(tmp_path / "records")
    for patch in ((1, 1, 1), (4, 4, 4), (5, 3, 16)):
        crop = Crop(records, ("A",), patch, foreground=1.0)
        for seed in range(8):
            drawn = crop(0, np.random.default_rng(seed))
            assert (drawn["label"] == 3).sum() == 1 and drawn["label"].shape == patch


def test_one_voxel_in_the_loss_by_hand():
    """p = 1/2 everywhere, one voxel of 64: overlap 1/2, total 32 + 1."""
    targets = np.zeros((1, 4, 4, 4, 1), np.float32)
    targets[0, 0, 0, 0] = 1
    for batch_dice in (True, False):
        (_, parts), _ = loss_and_gradients([0 * targets], targets, batch_dice)
        assert float(parts["dice_loss"]) == pytest.approx(1 - (1 + 1e-5) / (33 + 1e-5), abs=1e-6)
        assert float(parts["cross_entropy"]) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "predicted, dice, hd95, nsd, in_2023, in_2025",
    [
        # Reference lesions up to 50 mm3 are left out by 2023's rules: found or not, they count 1.
        ([(5, 5, 5)], 1, 0, 1, (1, 0, 1), (1, 0, 1)),
        ([(5, 5, 6)], 0, 1, 1, (1, 0, 1), (0, 373, 0)),  # beside it: touches when dilated
        ([(5, 5, 15)], 0, 10, 0, (0, 374, 0), (0, 373, 0)),
        ([], 0, 373.13, 0, (1, 0, 1), (0, 373, 0)),
    ],
)
def test_one_voxel_in_the_metrics(predicted, dice, hd95, nsd, in_2023, in_2025):
    prediction, reference = np.zeros((2, 20, 20, 20), np.uint8)
    reference[5, 5, 5] = 3
    for place in predicted:
        prediction[place] = 3
    found = metrics.evaluate(prediction, reference, UNIT, styles=("brats2023", "brats2025"))["ET"]
    assert (found["dice"], found["hd95"], found["nsd"]) == (dice, hd95, nsd)
    for style, wanted in (("brats2023", in_2023), ("brats2025", in_2025)):
        assert tuple(found[f"{style}_{key}"] for key in ("dice", "hd95", "nsd")) == wanted, style


def test_no_tumour_at_all_in_the_metrics():
    empty = np.zeros((6, 6, 6), np.uint8)
    for region in metrics.evaluate(empty, empty, UNIT, styles=("brats2023", "brats2025")).values():
        assert (region["dice"], region["hd95"], region["brats2023_dice"]) == (1, 0, 1)
        assert region["brats2025_dice"] is None and region["lesions"] == []


def test_rules_on_one_voxel():
    probabilities = np.zeros((3, 5, 5, 5))
    probabilities[:, 0, 4, 2] = 1
    for rules in ({}, {"largest": True, "fill": True}, {"minimum": 1}):
        assert postprocess.decode(probabilities, **rules)[0, 4, 2] == 3
        assert not postprocess.decode(0 * probabilities, **rules).any()
    assert postprocess.decode(probabilities, minimum=2)[0, 4, 2] == 1  # becomes core


# ---------------------------------------------------------------- hand-made gradients


def against_differences(function, *arguments):
    """The way back against central differences of the way there, in float32."""
    check_grads(
        jax.jit(function), arguments, order=1, modes=["rev"], atol=3e-3, rtol=3e-3, eps=1e-2
    )


@pytest.mark.parametrize(
    "planes, grid, large", [(4, (3, 5), False), (4, (2, 2), False), (2, (32, 32), True)]
)
def test_stride_1_convolution_against_differences(planes, grid, large):
    x = jax.random.normal(jax.random.key(0), (planes, *grid, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 3)) / 7
    against_differences(lambda x, k: conv_planes._dense(x, k, planes // 2, large, 1), x, kernel)


def test_stride_2_convolution_against_differences():
    x = jax.random.normal(jax.random.key(0), (4, 6, 4, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 3)) / 7
    against_differences(lambda x, k: conv_planes._halved(x, k, 2, 1), x, kernel)


@pytest.mark.parametrize("first", [None, 0, 2])
def test_policy_attention_against_differences(first):
    """Also by ``keep``, between 0 and 1, and with three of the queries alone."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 2, 5, 3)) for i in range(3))
    keep = jax.random.uniform(jax.random.key(5), (2, 5), minval=0.2, maxval=0.9)
    q = q if first is None else q[:, :, :3]
    against_differences(lambda *a: masking.policy_attention(*a, first), q, k, v, keep)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_pooling_against_differences(platform):
    x = jax.random.normal(jax.random.key(0), (4, 4, 6, 2))
    with traced_for(platform):
        against_differences(lambda x: resample.average_pool(x, 2), x)


def test_soft_average_against_differences():
    scores, v = jax.random.normal(jax.random.key(0), (2, 5, 4)), jnp.ones((2, 4, 3)).at[0, 1].set(2)
    against_differences(masking.soft_average, scores, v)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_instance_norm_against_differences(platform, groups):
    """It takes one voxel off, which has no gradient: the whole must have it."""
    x = jax.random.normal(jax.random.key(0), (4, 3, 4, 2)) + 5
    scale, shift = jax.random.normal(jax.random.key(1), (2, groups, 2))
    with traced_for(platform):  # a CPU has a way back of its own
        against_differences(functools.partial(layers.instance_norm, depth=2), x, scale, shift)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_constant_channel_is_its_shift_and_hands_nothing_back(platform):
    """Of a crop of air each norm of a chain made the gradients 316 times as large, up to inf."""
    scale, shift = jnp.ones((1, 2)), jnp.array([[0.5, 0.0]])
    x = jnp.zeros((4, 3, 4, 2)).at[..., 0].set(0.1)

    def chain(x):
        for _ in range(20):
            x = layers.instance_norm(x, scale, shift, 2)
        return x

    with traced_for(platform):
        y, back = jax.vjp(chain, x)
    np.testing.assert_array_equal(y, jnp.broadcast_to(shift[0], x.shape))
    np.testing.assert_array_equal(back(jax.random.normal(jax.random.key(0), x.shape))[0], 0)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_instance_norm_of_bfloat16_adds_up_planes_in_float32(platform):
    """The gradient by the shift is the sum of the cotangent. A plane may be rounded; where the sum
    of the planes was too, it was 0.7 % off."""
    x = (jax.random.normal(jax.random.key(0), (128, 8, 8, 16)) + 1).astype(jnp.bfloat16)
    dy = jax.random.uniform(jax.random.key(1), x.shape, minval=0.5, maxval=1.5).astype(x.dtype)
    scale = jnp.ones((1, 16))
    with traced_for(platform):
        _, back = jax.vjp(lambda shift: layers.instance_norm(x, scale, shift, 128), 0 * scale)
    np.testing.assert_allclose(back(dy)[0][0], np.asarray(dy, np.float64).sum((0, 1, 2)), rtol=3e-3)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_upsampling_is_the_same_on_all_platforms(factor):
    """A CPU goes from neighbour to neighbour, others multiply by a matrix per axis."""
    x = jax.random.normal(jax.random.key(0), (6, 3, 2, 2))
    against_differences(lambda x: resample.upsample(x, factor, 3), x)
    y = resample.upsample(x, factor, 3)
    with traced_for("tpu"):
        np.testing.assert_allclose(y, resample.upsample(x, factor, 3), atol=1e-6)


def test_layer_norm_against_differences():
    x = jax.random.normal(jax.random.key(0), (4, 3, 4, 2)) + 5
    against_differences(layers.LayerNorm(2), x * jnp.array([1.0, -2.0]))
