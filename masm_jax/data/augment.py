"""Augmentation of a batch on the device, inside ``jit``: what is drawn, and in which order it acts.

``nnunet`` is the default 3-D list of nnU-Net v2 (Isensee et al., Nature Methods 2021; its
``nnUNetTrainer``), in its order, with its probabilities and ranges; ``swin`` is the list of
SwinUNETR for BraTS 2021 (Hatamizadeh et al., 2022); ``scanner`` is ours, for few training cases:
what differs from scanner to scanner, each modality apart. ``none`` leaves the batch as it is.

Each example draws from ``fold_in(key, index in the global batch)``, so the result does not depend
on how many devices share the batch. Every transform acts on the whole batch under ``vmap`` and is
taken where it was drawn; one that no example drew is skipped by a single ``lax.cond``.

Why so, in ms per example (4 modalities, batch 2, mean of the same 30 keys taken in turn, two CPU
cores shared with other work, jax 0.10.2, compilation left out; ``nnunet`` at 48^3 / 96^3):

    vmap over examples, every transform always computed             57 / 588
    lax.map over examples, a cond around each transform             10 / 111
    a Python loop over examples, the same conds                     11 / 98
    vmap, one cond for the whole batch around each transform        10 / 106   (used)

A loop over examples gathers the whole batch onto every device when it is sharded over a mesh, and
in a pod it would gain nothing: all chips wait for the one whose examples drew the most. As it is,
the program for eight devices holds no collective. ``swin`` costs 1 / 8 ms.
"""

import functools
import math

import jax
import jax.numpy as jnp

from masm_jax.data import transforms

BACKGROUND = 128  # bit of the uint8 label that carries "outside the brain" through the geometry


def _about_one(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    """Below and above 1 with equal chance, uniform on either side (nnU-Net's BGContrast)."""
    side, below, above = jax.random.split(key, 3)
    return jnp.where(
        jax.random.bernoulli(side, 0.5, shape),
        jax.random.uniform(below, shape, minval=low, maxval=1.0),
        jax.random.uniform(above, shape, minval=1.0, maxval=high),
    )


def draw_nnunet(key: jax.Array, modalities: int) -> dict[str, jax.Array]:
    """Parameters of the recipe ``nnunet`` for one example.

    Args:
        key: A typed JAX key.
        modalities: M.

    Returns:
        Flags () bool under the transform's name, and beside each what it would apply: ``matrix``
        (3, 3), ``noise_key``, ``noise_sigma`` (), ``blur_sigma`` (M, 3), ``brightness_factor``,
        ``contrast_factor``, ``zoom``, ``gamma_inverted_exponent``, ``gamma_exponent`` (M,) and
        ``flips`` (3,) bool.
    """
    keys = iter(jax.random.split(key, 22))
    uniform, per = jax.random.uniform, (modalities,)

    def chance(p, shape=()):
        return jax.random.bernoulli(next(keys), p, shape)

    rotate, rescale = chance(0.2), chance(0.2)
    limit = math.pi / 6  # 30 degrees
    angles = jnp.where(rotate, uniform(next(keys), (3,), minval=-limit, maxval=limit), 0.0)
    scale = jnp.where(rescale, uniform(next(keys), (), minval=0.7, maxval=1.4), 1.0)
    sigma = uniform(next(keys), (modalities, 3), minval=0.5, maxval=1.0)
    return {
        "affine": rotate | rescale,
        "matrix": transforms.rotation_scale(angles, scale),
        "noise": chance(0.1),
        "noise_key": next(keys),
        "noise_sigma": uniform(next(keys), (), maxval=0.1),
        "blur": chance(0.2),
        "blur_sigma": jnp.where(chance(0.5, (modalities, 1)), sigma, 0.0),
        "brightness": chance(0.15),
        "brightness_factor": _about_one(next(keys), per, 0.75, 1.25),
        "contrast": chance(0.15),
        "contrast_factor": _about_one(next(keys), per, 0.75, 1.25),
        "low_resolution": chance(0.25),
        "zoom": jnp.where(chance(0.5, per), uniform(next(keys), per, minval=0.5), 1.0),
        "gamma_inverted": chance(0.1),
        "gamma_inverted_exponent": _about_one(next(keys), per, 0.7, 1.5),
        "gamma": chance(0.3),
        "gamma_exponent": _about_one(next(keys), per, 0.7, 1.5),
        "flips": chance(0.5, (3,)),
    }


def apply_nnunet(
    drawn: dict[str, jax.Array], image: jax.Array, label: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply what each example drew, in nnU-Net's order.

    Args:
        drawn: What ``draw_nnunet`` returns, with a leading axis B on every leaf.
        image: (B, M, D, H, W) float32.
        label: (B, D, H, W) uint8, below 128.

    Returns:
        The pair, same shapes and types; background voxels are exactly 0 in the image.
    """

    def where_drawn(name, transform, parameters, *volumes):
        def some(volumes):
            changed = jax.vmap(transform)(*volumes, *parameters)
            changed = changed if isinstance(changed, tuple) else (changed,)
            flags = (drawn[name].reshape((-1,) + (1,) * (v.ndim - 1)) for v in volumes)
            return tuple(jnp.where(f, c, v) for f, c, v in zip(flags, changed, volumes))

        return jax.lax.cond(jnp.any(drawn[name]), some, lambda volumes: volumes, volumes)

    def intensity(name, transform, *parameters):
        return where_drawn(name, transform, [drawn[p] for p in parameters], image)[0]

    # One uint8 volume carries labels and background: one nearest-neighbour pass, always aligned.
    empty = jnp.all(image == 0, axis=1)
    marked = label | jnp.where(empty, BACKGROUND, 0).astype(jnp.uint8)
    affine = functools.partial(transforms.affine, outside=BACKGROUND)
    image, marked = where_drawn("affine", affine, [drawn["matrix"]], image, marked)
    image = intensity("noise", transforms.gaussian_noise, "noise_key", "noise_sigma")
    image = intensity("blur", transforms.gaussian_blur, "blur_sigma")
    image = intensity("brightness", transforms.brightness, "brightness_factor")
    image = intensity("contrast", transforms.contrast, "contrast_factor")
    image = intensity("low_resolution", transforms.low_resolution, "zoom")
    image = intensity("gamma_inverted", transforms.gamma_inverted, "gamma_inverted_exponent")
    image = intensity("gamma", transforms.gamma, "gamma_exponent")
    image, marked = _mirror(image, marked, drawn["flips"])
    empty = (marked >= BACKGROUND)[:, None]
    return jnp.where(empty, 0.0, image), marked & (BACKGROUND - 1)


def draw_swin(key: jax.Array, modalities: int) -> dict[str, jax.Array]:
    """Parameters of ``swin``: ``flips`` (3,) bool, ``scale`` () and ``shift`` () float32."""
    del modalities  # one factor and one offset for all of them, as MONAI draws them
    flips, scale, shift = jax.random.split(key, 3)
    return {
        "flips": jax.random.bernoulli(flips, 0.5, (3,)),
        "scale": jax.random.uniform(scale, (), minval=0.9, maxval=1.1),
        "shift": jax.random.uniform(shift, (), minval=-0.1, maxval=0.1),
    }


def apply_swin(
    drawn: dict[str, jax.Array], image: jax.Array, label: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply ``draw_swin``'s parameters, a leading axis B on each, to a batch as ``apply_nnunet``.

    MONAI shifts the background too; here it stays 0, as it is when a scan is predicted.
    """
    image, label = _mirror(image, label, drawn["flips"])
    scale, shift = (drawn[name].reshape(-1, 1, 1, 1, 1) for name in ("scale", "shift"))
    empty = jnp.all(image == 0, axis=1, keepdims=True)
    return jnp.where(empty, 0.0, image * scale + shift), label


def draw_scanner(key: jax.Array, modalities: int) -> dict[str, jax.Array]:
    """Parameters of ``scanner``, drawn for each modality apart from the others.

    Returns:
        ``flips`` (3,) bool, ``scale`` and ``shift`` (M,), ``field`` (M, 3, 3, 3) float32.
    """
    flips, scale, shift, strength, field = jax.random.split(key, 5)
    # A third of the modalities keep their shading; the others get more, up to 15 % (one sigma).
    per = (modalities, 1, 1, 1)
    sigma = jnp.maximum(jax.random.uniform(strength, per, minval=-0.075, maxval=0.15), 0)
    return {
        "flips": jax.random.bernoulli(flips, 0.5, (3,)),
        "scale": jax.random.uniform(scale, (modalities,), minval=0.75, maxval=1.25),
        "shift": jax.random.uniform(shift, (modalities,), minval=-0.3, maxval=0.3),
        "field": sigma * jax.random.normal(field, (modalities, 3, 3, 3)),
    }


def apply_scanner(
    drawn: dict[str, jax.Array], image: jax.Array, label: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply ``draw_scanner``'s parameters, a leading axis B on each, as ``apply_nnunet``."""
    image, label = _mirror(image, label, drawn["flips"])
    empty = jnp.all(image == 0, axis=1, keepdims=True)
    image = jax.vmap(transforms.bias_field)(image, drawn["field"])
    scale, shift = (drawn[name][..., None, None, None] for name in ("scale", "shift"))
    return jnp.where(empty, 0.0, image * scale + shift), label


def _mirror(image: jax.Array, label: jax.Array, flips: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirror image (B, M, D, H, W) and label (B, D, H, W) alike; ``flips`` (B, 3) bool."""
    flip = jax.vmap(transforms.mirror)
    return flip(image, flips), flip(label, flips)


RECIPES = {
    "nnunet": (draw_nnunet, apply_nnunet),
    "swin": (draw_swin, apply_swin),
    "scanner": (draw_scanner, apply_scanner),
}


def augment(
    key: jax.Array, image: jax.Array, label: jax.Array, *, recipe: str
) -> tuple[jax.Array, jax.Array]:
    """Augment a batch; call it inside ``jit``. A batch sharded along B stays so.

    Args:
        key: A typed JAX key, another one at each step.
        image: (B, M, D, H, W) float, z-scored in the brain and exactly 0 outside.
        label: (B, D, H, W) uint8, internal labels (below 128).
        recipe: "nnunet", "swin", "scanner" or "none".

    Returns:
        image (B, M, D, H, W) float32 and label (B, D, H, W) uint8.

    Raises:
        ValueError: No such recipe.
    """
    image = image.astype(jnp.float32)
    if recipe == "none":
        return image, label
    if recipe not in RECIPES:
        known = ", ".join([*RECIPES, "none"])
        raise ValueError(f"augmentation recipe {recipe!r} is unknown; choose one of: {known}")
    draw, apply = RECIPES[recipe]
    batch, modalities = image.shape[:2]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    drawn = jax.vmap(lambda one: draw(one, modalities))(keys)
    return apply(drawn, image, label)
