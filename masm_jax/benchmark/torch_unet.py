"""The concatenation U-Net of ``model.mixers=()`` in PyTorch: one network, both frameworks.

Written as one writes it in PyTorch (channels first, ``conv3d``, ``instance_norm``, transposed
convolutions); the parameters of the JAX network fit, and the outputs agree
(tests/benchmark/test_torch_unet.py). Not used for training: it is what the counters and the clocks
are compared with.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from masm_jax.models.layers import LEAKY_SLOPE
from masm_jax.models.sizes import SIZES


class ConvNorm(nn.Module):
    """Convolution 3x3x3, instance norm, leaky ReLU."""

    def __init__(self, features_in, features_out, *, stride=1):
        super().__init__()
        self.conv = nn.Conv3d(features_in, features_out, 3, stride, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(features_out, affine=True)

    def forward(self, x):
        """(B, C_in, D, H, W) -> (B, C_out, D / stride, H / stride, W / stride)."""
        return F.leaky_relu(self.norm(self.conv(x)), LEAKY_SLOPE, inplace=True)


class Up(nn.Module):
    """Transposed convolution of kernel and stride ``factor``, with a bias of its own per tap."""

    def __init__(self, features_in, features_out, *, factor):
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(features_in, features_out, *[factor] * 3))
        # Two axes: torch's conversion to channels last takes four for a picture, and fails.
        self.bias = nn.Parameter(torch.zeros(features_out, factor**3))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x):
        """(B, C_in, D, H, W) -> (B, C_out, f D, f H, f W)."""
        f = self.factor
        if f == 1:
            return F.conv3d(x, self.weight.transpose(0, 1), self.bias.flatten())
        y = F.conv_transpose3d(x, self.weight, stride=f)
        taps = y.unflatten(4, (-1, f)).unflatten(3, (-1, f)).unflatten(2, (-1, f))
        bias = self.bias.reshape(-1, 1, f, 1, f, 1, f)
        return (taps + bias).reshape(y.shape)


class UNet(nn.Module):
    """The U-Net.

    Args:
      size: a name of ``models.sizes.SIZES``.
      modalities: M.
      regions: R.
    """

    def __init__(self, size, *, modalities=4, regions=3):
        super().__init__()
        constants = SIZES[size]
        self.stem, widths, strides = constants.stem, constants.widths, constants.strides
        channels, levels = constants.stem**3 * modalities, []
        for width, stride in zip(widths, strides):
            levels.append(nn.Sequential(ConvNorm(channels, width, stride=stride),
                                        ConvNorm(width, width)))  # fmt: skip
            channels = width
        self.levels = nn.ModuleList(levels)
        steps = list(zip(widths[:-1], widths[1:], strides[1:]))
        self.ups = nn.ModuleList(Up(below, width, factor=step) for width, below, step in steps)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNorm(2 * width, width), ConvNorm(width, width)) for width, *_ in steps
        )
        factors = [self.stem] + [1] * (constants.deep_heads - 1)
        self.heads = nn.ModuleList(
            Up(width, regions, factor=factor) for width, factor in zip(widths, factors)
        )

    def forward(self, x, deep=False):
        """(B, M, D, H, W) -> logits (B, R, D, H, W); ``deep``: a list, lower levels behind."""
        x = self._apart(x)
        skips = []
        for level in self.levels:
            x = level(x)
            skips.append(x)
        logits = []
        for level in reversed(range(len(self.ups))):
            x = self.blocks[level](torch.cat([self.ups[level](x), skips[level]], dim=1))
            if level < len(self.heads) and (deep or level == 0):
                logits.insert(0, self.heads[level](x))
        return logits if deep else logits[0]

    def _apart(self, x):
        """Space-to-depth of every modality: channels (M, fd, fh, fw)."""
        f = self.stem
        if f == 1:
            return x
        x = x.unflatten(4, (-1, f)).unflatten(3, (-1, f)).unflatten(2, (-1, f))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

    def load(self, params):
        """Take over the parameters of the JAX network, a nested dict (``Network.init``)."""
        encoder, decoder = params["encoder"]["levels"], params["decoder"]
        for level, module in enumerate(self.levels):
            _load_blocks(module, encoder[level])
        for level, module in enumerate(self.blocks):
            _load_blocks(module, decoder["blocks"][level])
        for kind, modules in (("ups", self.ups), ("heads", self.heads)):
            for level, module in enumerate(modules):
                _load_up(module, decoder[kind][level])
        return self


def _load_blocks(modules, params):
    for place, module in enumerate(modules):
        own = params[place]
        _set(module.conv.weight, np.transpose(own["kernel"], (4, 3, 0, 1, 2)))
        _set(module.norm.weight, own["scale"][0])
        _set(module.norm.bias, own["shift"][0])


def _load_up(module, params):
    channels, features, *taps = module.weight.shape
    kernel = np.reshape(params["kernel"], (channels, *taps, features))
    _set(module.weight, np.moveaxis(kernel, -1, 1))
    _set(module.bias, np.reshape(params["bias"], (-1, features)).T)


def _set(parameter, value):
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(value, np.float32)))
