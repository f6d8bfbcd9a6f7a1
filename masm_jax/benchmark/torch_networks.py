"""Networks of others that MASM is compared with, as MONAI has them; torch is imported only here.

A name of ``BUILDERS``, or MODULE:FUNCTION for one of your own: a function of (modalities, regions,
patch), two numbers and the edges of a crop in voxels, which gives a ``torch.nn.Module``,
(B, M, D, H, W) -> logits (B, R, D, H, W). While training it may give (B, heads, R, D, H, W), the
heads of deep supervision enlarged to the whole grid, the main one first, as MONAI's DynUNet does.
"""

import importlib
import importlib.util

from masm_jax.benchmark.peers import NNUNET, SEGRESNET

SMALLEST = 4  # edge of the coarsest grid, voxels: nnU-Net halves no further


def dynunet(modalities, regions, patch, narrower=1):
    """nnU-Net's network: as many levels as the crop has room for, full widths, deep supervision."""
    from monai.networks.nets import DynUNet

    widths = [width // narrower for width in NNUNET["filters"]]
    levels = 1
    while levels < len(widths) and min(patch) // 2**levels >= SMALLEST:
        levels += 1
    strides = [1] + [2] * (levels - 1)
    shape = {
        "in_channels": modalities,
        "out_channels": regions,
        "kernel_size": [3] * levels,
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": widths[:levels],
        "deep_supervision": levels > 3,
        "deep_supr_num": max(1, levels - 3),  # as nnU-Net: none at the two coarsest levels
    }
    return DynUNet(**NNUNET | shape)


def dynunet_light(modalities, regions, patch):
    """The same with a quarter of the widths: about the multiplications of MASM tiny."""
    return dynunet(modalities, regions, patch, narrower=4)


def segresnet(modalities, regions, patch):
    """MONAI's bundle for BraTS (brats_mri_segmentation): Myronenko 2018 without the autoencoder."""
    from monai.networks.nets import SegResNet

    del patch  # takes any that is a multiple of 8
    shape = {"in_channels": modalities, "out_channels": regions, "init_filters": 16}
    return SegResNet(**SEGRESNET | shape, dropout_prob=0.2)


BUILDERS = {"dynunet": dynunet, "dynunet_light": dynunet_light, "segresnet": segresnet}


def check(name):
    """See that a network can be built here; nothing is built, and only one's own is imported.

    Raises:
      ValueError: no such name, or a package is missing.
    """
    if ":" not in name and name not in BUILDERS:
        raise ValueError(
            f"network {name!r}: expected one of {', '.join(BUILDERS)}, or MODULE:FUNCTION"
        )
    for package in ("torch", "monai") if name in BUILDERS else ("torch",):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"network {name!r} needs {package}, which is not in this Python: `make bench-env` "
                f"makes .venv-bench with it; or leave the network out"
            )
    if name not in BUILDERS:
        _own(name)


def build(name, *, modalities, regions, patch):
    """The network of a name, with fresh weights by torch's generator.

    Args:
      name: see the module.
      modalities, regions: M and R.
      patch: three edges of a crop, voxels.

    Raises:
      ValueError: as ``check``.
    """
    check(name)
    function = BUILDERS.get(name) or _own(name)
    return function(modalities, regions, tuple(patch))


def _own(name):
    """The function of MODULE:FUNCTION."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"network {name!r}: {error}; expected a module in the folder that the command is "
            f"started in, or on PYTHONPATH, with that function"
        ) from error
