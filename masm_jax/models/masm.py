"""MASM: an encoder shared by the modalities, mixers on the skips, one decoder.

    scans (B, M, D, H, W)
      -> space-to-depth stem (base, tiny), modalities folded into the batch
      -> Encoder (or that of UNETR or Swin UNETR): features F^j (B, M, S_j^3, E_j), j = 1..6
      -> per level a mixer: "aware" (pairs attend, prune, replace), "shift" (mosaic) or "concat"
      -> the first ``fused_levels``: Fuse: the M results become one skip (B, S_j^3, C_j)
      -> Decoder, which looks at what is not fused side by side -> logits (B, D, H, W, R)

Which mixer works at which level is data (``mixers``). With no mixers at all the modalities are
concatenated at the input instead: the plain U-Net that every comparison starts from, or UNETR or
Swin UNETR as published.
Source: arXiv 2403.02074; docs/paper.md lists what the paper says and what we chose.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from masm_jax.models.aware import AwareMixer
from masm_jax.models.conv import CONV
from masm_jax.models.decoder import Decoder
from masm_jax.models.detail import Detail
from masm_jax.models.encoder import Encoder
from masm_jax.models.layers import Fuse, depth_to_space, planes, stem, volumes
from masm_jax.models.residual import ResidualDecoder
from masm_jax.models.shift import ShiftMixer
from masm_jax.models.sizes import encoder_single, encoder_widths, size_of
from masm_jax.models.swin_unetr import SwinEncoder
from masm_jax.models.unetr import UNETREncoder

MIXERS = ("aware", "shift", "concat")
REMAT = ("none", "blocks", "full")  # what is computed again on the way back (models/layers.py)


class MASM(nnx.Module):
    """The network.

    Args:
      model: the ``model`` section of a config (configs/masm_brats.py says what each key means).
      patch: (D, H, W), the edges of the input in voxels, multiples of ``divisor(model)``.
      modalities: names, in the order of the input's axis.
      num_regions: R.
      init: where the parameters come from (models/init.py).
    """

    def __init__(self, model, *, patch, modalities, num_regions, init):
        size = size_of(model)
        self.stem, self.mixer_names, self.remat = size.stem, tuple(model.mixers), model.remat
        # Modalities are seen one by one, or (no mixers) together as channels.
        folded = len(modalities) if self.mixer_names else 1
        channels = size.stem**3 * len(modalities) // folded
        groups = folded if model.modality_affine else 1
        widths = encoder_widths(model)
        if model.backbone == "unetr":
            plain = not self.mixer_names
            self.encoder = UNETREncoder(channels, size, patch=patch, init=init, plain=plain)
        elif model.backbone == "swin_unetr":
            self.encoder = SwinEncoder(channels, size, init=init)
        else:
            single = encoder_single(model)
            self.encoder = Encoder(
                channels, widths, size.strides, init=init, groups=groups, single=single
            )
        names, pairs = list(modalities), []
        if "aware" in self.mixer_names:  # the others do without, on any modalities
            pairs = [tuple(names.index(m) for m in pair) for pair in model.pairs]
        mixers, fuse = {}, []
        stride = size.stem
        for level, name in enumerate(self.mixer_names):
            stride *= size.strides[level]
            width = size.token_widths[level]
            # Level 6 attends over its voxels; elsewhere a token spans token_size input voxels.
            token = max(1, size.token_size // stride)
            grid = tuple(edge // (stride * token) for edge in patch)
            heads = max(1, width // size.head_width)
            # Apart at every level, mixed or not: the others start as they would without this one.
            own = init.apart()
            shared = dict(modalities=folded, width=width, heads=heads, init=own)
            if name == "aware":
                mixers[_key(level)] = AwareMixer(
                    widths[level],
                    token,
                    grid,
                    pairs=pairs,
                    depth=model.aware_depth,
                    keep_bias=model.keep_bias,
                    pruning=model.pruning,
                    **shared,
                )
            elif name == "shift":
                mixers[_key(level)] = ShiftMixer(
                    widths[level],
                    token,
                    grid,
                    mosaic=model.mosaic,
                    depth=model.shift_depth,
                    extras=tuple(model.shift_extras),
                    **shared,
                )
            if level < model.fused_levels:
                fuse.append(Fuse(folded * widths[level], size.widths[level], init=init))
        self.mixers, self.fuse = nnx.Dict(mixers), nnx.List(fuse)
        if model.backbone != "unet" and not self.mixer_names:  # UNETR, Swin UNETR as published
            self.decoder = ResidualDecoder(self.encoder.widths, num_regions=num_regions, init=init)
            return
        detail = None
        if model.detail and size.stem > 1:
            shape = size.widths[0], model.detail, size.stem, len(modalities), num_regions
            detail = Detail(*shape, init=init.apart())
        self.decoder = Decoder(
            size.widths,
            size.strides,
            skips=[*size.widths[: len(fuse)], *(folded * width for width in widths[len(fuse) :])],
            stem=size.stem,
            num_regions=num_regions,
            heads=size.deep_heads,
            detail=detail,
            init=init,
        )

    def __call__(
        self, x, *, key=None, temperature=1.0, noise=1.0, deep=False, packed=False, share=1.0,
        present=None,
    ):  # fmt: skip
        """Segment.

        Args:
          x: (B, M, D, H, W) in the compute dtype, z-scored; (D, H, W) as ``patch`` was.
          key: (B,) PRNG keys of the Gumbel noise while training; None decides without noise.
          temperature: of the Gumbel-Softmax.
          noise: scale of its noise.
          deep: also return the logits of the lower levels.
          share: of the tokens that the Modality-Aware mixers work on, by score.
          present: (B, M) of 0 and 1, at least one 1: what a missing modality holds is not looked
            at, and no part of the result; None: none is missing.
          packed: leave the first logits (B, D / s, H / s, W / s, s^3 R), s the stem, as computed.

        Returns:
          logits: list of float32 arrays; first (B, D, H, W, R), then, if ``deep``, the grids of
            levels 2, 3, ...
          keep: {"level1": (B, M', d, h, w) of 0 and 1, ...} of the Modality-Aware levels.
        """
        if present is not None:
            x = jnp.where(present[:, :, None, None, None] > 0, x, 0)
        run = functools.partial(self._run, deep=deep, share=share)
        if self.remat == "blocks":
            policy = jax.checkpoint_policies.save_only_these_names(CONV)
            run = jax.checkpoint(run, policy=policy)
        logits, keep = run(x, key, temperature, noise, present)
        if not packed:
            unpacked = depth_to_space(planes(logits[0]), self.stem)
            logits[0] = volumes(unpacked, x.shape[2])
        return logits, keep

    def _run(self, x, key, temperature, noise, present, deep, share):
        wrap = jax.checkpoint if self.remat == "full" else lambda block: block
        batch, modalities, depth = x.shape[:3]
        # Modality slowest: what belongs to one is then a block of planes.
        x = planes(x.swapaxes(0, 1)[..., None])
        weighs = present is not None and self.mixer_names  # the plain U-Net is fed zeros
        scans = together(_weighed(x, present) if weighs else x, modalities)
        x = stem(x[..., 0], self.stem)
        if not self.mixer_names:
            features = self.encoder(together(x, modalities), depth // self.stem, wrap)
            skips = [((x,), depth) for x, depth in features]
            return self.decoder(skips, scans, deep, wrap), {}

        skips, keep = [], {}
        features = self.encoder(x, depth // self.stem, wrap)
        for level, (name, (x, depth)) in enumerate(zip(self.mixer_names, features)):
            with jax.named_scope("mixers"), jax.named_scope(_key(level)):
                level_key = None
                if key is not None:
                    level_key = jax.vmap(jax.random.fold_in, (0, None))(key, level)
                options = dict(key=level_key, temperature=temperature, noise=noise, present=present)
                if name == "aware":
                    mixer = functools.partial(self.mixers[_key(level)], depth=depth, share=share)
                    x, kept = wrap(mixer)(x, **options)
                    if kept is not None:
                        keep[_key(level)] = kept
                elif name == "shift":
                    x = wrap(functools.partial(self.mixers[_key(level)], depth=depth))(x, **options)
                x = x if present is None else _weighed(x, present)
                x = jnp.split(x, modalities)
                if level < len(self.fuse):
                    x = [self.fuse[level](*x, depth=depth)]
                skips.append((x, depth))
        return self.decoder(skips, scans, deep, wrap), keep


def together(x, modalities):
    """Planes (M B D, H, W, C), modality slowest -> (B D, H, W, M C)."""
    return jnp.concatenate(jnp.split(x, modalities), axis=-1)


def _weighed(x, present):
    """Planes (M B D, H, W, C) for the decoder: none of what is missing, more of what is there."""
    weight = present * (present.shape[1] / present.sum(1, keepdims=True))  # (B, M)
    weight = jnp.repeat(weight.T.reshape(-1), len(x) // weight.size)
    return x * weight.astype(x.dtype)[:, None, None, None]


def edges(patch):
    """``config.patch``, one edge or three, as (D, H, W)."""
    return (patch,) * 3 if isinstance(patch, int) else tuple(patch)


def divisor(model):
    """The number that a patch edge must be a multiple of: the total stride, and whole tokens."""
    size = size_of(model)
    stride, needed = size.stem, size.stem
    for level, step in enumerate(size.strides):
        stride *= step
        needed = max(needed, stride)
        if model.mixers and model.mixers[level] != "concat":
            needed = max(needed, stride * max(1, size.token_size // stride))
    return needed


def constant_levels(model, patch):
    """Levels, counted from 1, of which a patch has one voxel: an instance norm makes a constant of
    it, so that their convolutions are given no gradient. UNETR and Swin UNETR: none are looked for.
    """
    size, stride, found = size_of(model), size_of(model).stem, []
    for level, step in enumerate(size.strides, 1):
        stride *= step
        if model.backbone == "unet" and max(edges(patch)) <= stride:
            found.append(level)
    return found


def _key(level):
    return f"level{level + 1}"
