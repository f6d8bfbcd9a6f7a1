"""The constants of every size, by backbone: data, so that masm.py tells the story alone."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """The constants of a size.

    Attributes:
      stem: edge of the space-to-depth stem (1 = none).
      strides: per level, after the stem.
      widths: channels C_j per level, of the decoder (``encoder_widths`` has the encoder's).
      token_widths: d_j of the mixers per level.
      head_width: channels per attention head.
      token_size: edge of a token in input voxels, where the level allows it.
      deep_heads: number of levels with a head while training.
      transformer: of a backbone that has one.
    """

    stem: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    token_widths: tuple[int, ...]
    head_width: int
    token_size: int
    deep_heads: int
    transformer: "Transformer | None" = None


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The constants of a transformer.

    Attributes:
      width: channels (of the first stage).
      blocks: attention blocks per stage.
      heads: per stage.
    """

    width: int
    blocks: tuple[int, ...]
    heads: tuple[int, ...]


SIZES = {
    "tiny": Size(
        stem=2,
        strides=(1, 2, 2, 2, 1, 1),
        widths=(16, 32, 64, 96, 128, 128),
        token_widths=(32, 64, 64, 64, 128, 128),
        head_width=64,
        token_size=8,
        deep_heads=3,
    ),
    "base": Size(
        stem=2,
        strides=(1, 2, 2, 2, 2, 1),
        widths=(24, 48, 96, 192, 256, 256),
        token_widths=(96, 96, 128, 192, 256, 256),
        head_width=32,
        token_size=16,
        deep_heads=4,
    ),
    "full": Size(
        stem=1,
        strides=(1, 2, 2, 2, 2, 2),
        widths=(16, 32, 64, 128, 256, 320),
        token_widths=(96, 96, 128, 192, 256, 320),
        head_width=32,
        token_size=16,
        deep_heads=5,
    ),
}
# Base: as published for BraTS (UNETR: ViT-B/16, feature size 16; Swin UNETR: feature size 48).
UNETR = {
    "tiny": Size(
        stem=1,
        strides=(1, 2, 2, 2, 2, 1),
        widths=(8, 16, 32, 64, 96, 96),
        token_widths=(32, 64, 64, 64, 128, 128),
        head_width=64,
        token_size=8,
        deep_heads=3,
        transformer=Transformer(width=96, blocks=(12,), heads=(4,)),
    ),
    "base": Size(
        stem=1,
        strides=(1, 2, 2, 2, 2, 1),
        widths=(16, 32, 64, 128, 256, 256),
        token_widths=(96, 96, 128, 192, 256, 256),
        head_width=32,
        token_size=16,
        deep_heads=4,
        transformer=Transformer(width=768, blocks=(12,), heads=(12,)),
    ),
}
SWIN_UNETR = {
    "tiny": Size(
        stem=1,
        strides=(1, 2, 2, 2, 2, 2),
        widths=(12, 12, 24, 48, 96, 192),
        token_widths=(32, 32, 64, 64, 128, 128),
        head_width=64,
        token_size=8,
        deep_heads=3,
        transformer=Transformer(width=12, blocks=(2, 2, 2, 2), heads=(3, 6, 12, 24)),
    ),
    "base": Size(
        stem=1,
        strides=(1, 2, 2, 2, 2, 2),
        widths=(48, 48, 96, 192, 384, 768),
        token_widths=(96, 96, 128, 192, 256, 320),
        head_width=32,
        token_size=16,
        deep_heads=4,
        transformer=Transformer(width=48, blocks=(2, 2, 2, 2), heads=(3, 6, 12, 24)),
    ),
}
BACKBONES = {"unet": SIZES, "unetr": UNETR, "swin_unetr": SWIN_UNETR}


def size_of(model):
    """Size of the ``model`` section of a config."""
    return BACKBONES[model.backbone][model.size]


def encoder_single(model):
    """Levels of the encoder, from the first, that have one convolution."""
    return model.encoder_single if _for_each(model) else 0


def encoder_widths(model):
    """Channels E_j per level of the encoder: fewer in the U-Net's that runs for each modality, but
    for the levels that have one convolution and are fused."""
    widths, whole = size_of(model).widths, min(encoder_single(model), model.fused_levels)
    share = model.encoder_width if _for_each(model) else 1
    return widths[:whole] + tuple(max(1, round(width * share)) for width in widths[whole:])


def _for_each(model):
    """Whether the encoder is a U-Net's that runs for each modality."""
    return model.backbone == "unet" and bool(model.mixers)
