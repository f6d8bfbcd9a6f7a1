"""Speeds and costs of peers that others have published: beside our measurements, never among them.

Another machine, another software, and for training another loop around the network. Read on
2026-11-23 at the addresses below.
"""

import dataclasses

from masm_jax.benchmark import tables

_NVIDIA = "https://github.com/NVIDIA/DeepLearningExamples/blob/master"
DLE_TORCH = f"{_NVIDIA}/PyTorch/Segmentation/nnUNet/README.md"
DLE_TENSORFLOW = f"{_NVIDIA}/TensorFlow2/Segmentation/nnUNet/README.md"
RESENC = "https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/resenc_presets.md"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Patches/s of a network at 4 x 128^3 on one device.

    Attributes:
      network: as in peers.NETWORKS.
      device, software, precision: as the source has them.
      batch: patches per call.
      infer, train: patches/s; None: not said.
      source: address.
    """

    network: str
    device: str
    software: str
    precision: str
    batch: int
    infer: float | None
    train: float | None
    source: str


def _speeds(device, software, precision, source, *rows):
    return tuple(
        Speed("dynunet", device, software, precision, batch, infer, train, source)
        for batch, infer, train in rows
    )


# NVIDIA's nnU-Net for Task01: the shape of peers.NETWORKS["dynunet"].
SPEEDS = (
    *_speeds("A100 80 GB", "PyTorch 22.11", "AMP", DLE_TORCH,
             (1, 68.45, 24.61), (2, 56.9, 27.48), (4, 76.39, 29.96)),
    *_speeds("A100 80 GB", "PyTorch 22.11", "TF32", DLE_TORCH,
             (1, 35.02, 9.66), (2, 39.88, 11.27), (4, 41.32, 12.22)),
    *_speeds("A100 80 GB", "TensorFlow 22.11, XLA", "AMP", DLE_TENSORFLOW,
             (1, 78.2, 27.02), (2, 63.76, 29.3), (4, 83.17, 31.87)),
    *_speeds("A100 80 GB", "TensorFlow 22.11, XLA", "TF32", DLE_TENSORFLOW,
             (1, 38.85, 11.63), (2, 40.1, 11.81), (4, 41.69, 12.17)),
    *_speeds("V100 32 GB", "PyTorch 22.11", "AMP", DLE_TORCH,
             (1, 36.93, 11.38), (2, 38.86, 12.34), (4, 39.15, None)),
    *_speeds("V100 32 GB", "PyTorch 22.11", "FP32", DLE_TORCH,
             (1, 9.92, 2.07), (2, 10.14, 2.51), (4, 10.25, None)),
)  # fmt: skip

# A full nnU-Net training of 1000 epochs on one A100 PCIe 40 GB: GB of memory as nvidia-smi says,
# hours; each network with the patch and batch that nnU-Net plans for it, or that of its authors.
TRAININGS = (
    ("nnU-Net", 7.7, 9), ("nnU-Net ResEnc M", 9.1, 12), ("nnU-Net ResEnc L", 22.7, 35),
    ("nnU-Net ResEnc XL", 36.6, 66), ("MedNeXt L k3", 17.3, 68), ("MedNeXt L k5", 18.0, 233),
    ("STU-Net L", 26.5, 51), ("SwinUNETR", 13.1, 15), ("SwinUNETR-V2", 13.4, 15),
    ("nnFormer", 5.7, 8), ("CoTr", 8.2, 18), ("U-Mamba Bot", 12.4, 24), ("U-Mamba Enc", 24.9, 47),
    ("Auto3DSeg SegResNet", 20.0, 22), ("Auto3DSeg SwinUNETR", 34.5, 9),
)  # fmt: skip


def words():
    """Lines of Markdown: both tables, with their sources."""
    lines = [
        "Published by others, not measured here. NVIDIA's nnU-Net (DynUNet), 4 x 128^3, one GPU,",
        f"patches/s ([PyTorch]({DLE_TORCH}), [TensorFlow]({DLE_TENSORFLOW})):",
        "",
    ]
    rows = []
    for row in SPEEDS:
        train = "" if row.train is None else f"{row.train:g}"
        rows.append([row.device, row.software, row.precision, row.batch, f"{row.infer:g}", train])
    heads = ("device", "software", "precision", "batch", "inference", "training")
    lines += tables.markdown(heads, rows)
    lines += [
        "",
        "A whole training of 1000 epochs on one A100 PCIe 40 GB (Isensee et al. 2024, "
        f"[nnU-Net Revisited]({RESENC})):",
        "",
    ]
    return lines + tables.markdown(("network", "memory, GB", "hours"), TRAININGS)
