"""MASM-JAX: multi-modal brain tumour segmentation with the Modality-Aware and Shift Mixer.

The letters used in every docstring of the package:

    B  batch            M  MRI modalities (t1, t1ce, t2, flair)
    D H W  voxel grid: the axes i, j, k of a scan in RAS+ (x right, y anterior, z superior)
    C  channels         N  tokens (patches of one modality)        R  regions (WT, TC, ET)

Features are channels-last, ``(B, M, D, H, W, C)``; scans and records are ``(M, D, H, W)``.
Labels inside the package: 0 background, 1 necrotic and non-enhancing core, 2 oedema, 3 enhancing
tumour, 4 resection cavity. They are remapped once where a file is read and once where it is
written.
"""

__version__ = "0.1.0"
