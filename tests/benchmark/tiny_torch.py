"""Networks for tests of the comparison: no MONAI, seconds."""

import torch


def build(modalities, regions, patch):
    """Two convolutions and a dropout."""
    del patch
    return torch.nn.Sequential(
        torch.nn.Conv3d(modalities, 4, 3, padding=1),
        torch.nn.LeakyReLU(),
        torch.nn.Dropout3d(0.5),
        torch.nn.Conv3d(4, regions, 1),
    )


def broken(modalities, regions, patch):
    """Cannot be built."""
    raise ValueError("broken on purpose")
