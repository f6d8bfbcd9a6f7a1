"""The networks that are compared: ours, and peers of MONAI with every argument that matters.

All see 4 modalities and give 3 regions (sigmoid), at full resolution. Peers are built without deep
supervision, their auxiliary heads included; ours has its auxiliary heads in the training step and
not in inference. Nothing is imported before a network is built: ours needs no torch.
"""

import dataclasses
import importlib
import importlib.util

from masm_jax.data import conventions

MODALITIES, REGIONS = 4, 3
_SHAPE = {"spatial_dims": 3, "in_channels": MODALITIES, "out_channels": REGIONS}
NNUNET = _SHAPE | {
    "kernel_size": [3] * 6,
    "strides": [1, 2, 2, 2, 2, 2],
    "upsample_kernel_size": [2] * 5,
    "filters": [32, 64, 128, 256, 320, 320],
    "norm_name": ("INSTANCE", {"affine": True}),
    "act_name": ("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
    "deep_supervision": False,
    "res_block": False,
}
SEGRESNET = _SHAPE | {"blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
_MEDNEXT = _SHAPE | {"kernel_size": 3, "deep_supervision": False}
_MASM = {  # whatever the config has
    "model.backbone": "unet",
    "model.size": "base",
    "model.mixers": ("aware",) * 5 + ("shift",),
    "model.detail": 8,
    "model.encoder_width": 0.5,
    "model.encoder_single": 0,
    "model.fused_levels": 6,
}
_PLAIN = {"model.mixers": ()}  # the modalities come together as channels
_CONCAT = {"model.mixers": ("concat",) * 6}
_UNET = _PLAIN | {"model.detail": 0}  # as it is written in torch too


@dataclasses.dataclass(frozen=True)
class Ours:
    """A network of this package, in JAX.

    Attributes:
      words: what it is.
      changes: {key of the config: value}; of ``NETWORKS`` all that makes the network another one.
      modalities: names, in the order of the input.
    """

    words: str
    changes: dict
    modalities: tuple = conventions.MODALITIES
    framework = "jax"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network in PyTorch.

    Attributes:
      words: what it is.
      name: of the class.
      arguments: of it.
      edge: name of the argument that takes the edges of the patch, "" if there is none.
      module: where the class is.
    """

    words: str
    name: str
    arguments: dict
    edge: str = ""
    module: str = "monai.networks.nets"
    framework = "torch"

    def build(self, patch):
        """The ``torch.nn.Module`` for a patch of ``patch``^3 voxels.

        Raises:
          ValueError: its package is not installed.
        """
        try:
            kind = getattr(importlib.import_module(self.module), self.name)
        except ImportError as error:
            raise ValueError(
                f"{self.name} needs a package that is not here ({error.name}); `make bench-env` "
                f"makes .venv-bench with it"
            ) from error
        edge = {self.edge: (patch,) * 3} if self.edge else {}
        return kind(**self.arguments, **edge)


def _ours(words, changes):
    """What differs from MASM of size base."""
    return Ours(words, _MASM | changes)


def _unet(size):
    """The concatenation U-Net of ``size``, in torch."""
    own = "masm_jax.benchmark.torch_unet"
    shape = {"modalities": MODALITIES, "regions": REGIONS}
    words = f"concatenation U-Net, {size}, in torch"
    return Peer(words, "UNet", {"size": size} | shape, module=own)


NETWORKS = {
    "masm_tiny": _ours("MASM, size tiny", {"model.size": "tiny", "model.encoder_single": 1}),
    "masm_base": _ours("MASM, size base", {}),
    "masm_base_plain": _ours("MASM, size base, model.detail=0", {"model.detail": 0}),
    "masm_base_wide": _ours("MASM, size base, model.encoder_width=1", {"model.encoder_width": 1.0}),
    "masm_full": _ours("MASM, size full", {"model.size": "full"}),
    "masm_unetr": _ours("MASM, UNETR's encoder", {"model.backbone": "unetr"}),
    "masm_swin_unetr": _ours("MASM, Swin UNETR's encoder", {"model.backbone": "swin_unetr"}),
    "unetr_jax": _ours("UNETR, ViT-B/16, ours", _PLAIN | {"model.backbone": "unetr"}),
    "swin_unetr_jax": _ours("SwinUNETR, 48, ours", _PLAIN | {"model.backbone": "swin_unetr"}),
    "late_base": _ours("shared encoder, no mixers, base", _CONCAT),
    "unet_base": _ours("concatenation U-Net, base, model.detail=0", _UNET),
    "unet_base_torch": _unet("base"),
    "unet_tiny": _ours("concatenation U-Net, tiny", _UNET | {"model.size": "tiny"}),
    "unet_tiny_torch": _unet("tiny"),
    "dynunet": Peer("DynUNet, nnU-Net's BraTS shape", "DynUNet", NNUNET),
    "segresnet16": Peer("SegResNet, 16 filters", "SegResNet", SEGRESNET | {"init_filters": 16}),
    "segresnet32": Peer("SegResNet, 32 filters", "SegResNet", SEGRESNET | {"init_filters": 32}),
    "unetr": Peer("UNETR, ViT-B/16", "UNETR", _SHAPE | {"feature_size": 16}, edge="img_size"),
    "swinunetr48": Peer("SwinUNETR, 48 features", "SwinUNETR", _SHAPE | {"feature_size": 48}),
    "vnet": Peer("V-Net", "VNet", _SHAPE),
    "mednext_s": Peer("MedNeXt-S, kernel 3", "MedNextSmall", _MEDNEXT),
    "mednext_b": Peer("MedNeXt-B, kernel 3", "MedNextBase", _MEDNEXT),
}
# Not of interest at full size: for trials on small patches.
SMALL = ("unet_tiny", "unet_tiny_torch")
REFERENCE = "dynunet"  # what times are compared with
NO_TORCH = "needs torch, which is not here; `make bench-env` makes .venv-bench with it"


def cannot_run(entry):
    """Why a network cannot be built in this Python, "" where it can."""
    lacks = entry.framework == "torch" and importlib.util.find_spec("torch") is None
    return NO_TORCH if lacks else ""


def chosen(names):
    """Networks of a flag: "masm_base,dynunet", or "all", which is all but the small ones.

    Returns:
      {name: Ours or Peer}.

    Raises:
      ValueError: no such network.
    """
    if names == "all":
        return {name: entry for name, entry in NETWORKS.items() if name not in SMALL}
    wanted = [name for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in NETWORKS]
    if unknown or not wanted:
        raise ValueError(
            f"--networks={names}: {', '.join(unknown) or 'nothing'} is not known; expected all, or "
            f"some of {','.join(NETWORKS)}"
        )
    return {name: NETWORKS[name] for name in wanted}
