"""Mask pairs of the golden lesion-wise values, and the command that made the values.

    python -m venv official
    official/bin/pip install brats_evaluation==0.0.10 pandas surface-distance
    official/bin/python tests/evaluation/golden_lesions.py BRATS-2023-METRICS \
        tests/evaluation/golden_lesions.json

BRATS-2023-METRICS is a folder with the lesion-wise functions of
github.com/rachitsaluja/BraTS-2023-Metrics (commit 0c603fc) as the module
``brats_2023_metrics.brats_metrics``. ``brats_evaluation`` is AGPL: it runs in an environment of its
own and is never imported by the tests. The masks come from seeds, so the file holds values alone.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
from scipy import ndimage

SHAPE = (40, 44, 36)
SPACINGS = [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.75, 1.25, 2.0)]
COUNT = 48


def mask_pair(index):
    """Pair ``index``: prediction and reference, (40, 44, 36) bool, and the spacing in mm."""
    rng = np.random.default_rng(1000 + index)
    spacing = SPACINGS[index % 3]
    prediction, reference = np.zeros((2, *SHAPE), bool)
    kind = index // 3
    if kind == 0:  # one side empty, both empty
        if index:
            [prediction, reference][index - 1][10:18, 12:20, 8:15] = True
    elif kind == 1:  # single voxels: same, near, far
        reference[20, 20, 20] = True
        prediction[[20, 21, 35][index % 3], 20, 20] = True
    elif kind == 2:  # touching by a face, an edge, a corner; and one lesion against two
        reference[8:14, 8:14, 8:14] = True
        shift = np.array([[6, 0, 0], [6, 6, 0], [6, 6, 6]][index % 3])
        low = 8 + shift
        prediction[tuple(slice(a, a + 6) for a in low)] = True
        if index % 3 == 2:
            prediction[9:12, 9:12, 9:12] = True
    elif kind == 3:  # far apart at the borders of the grid
        reference[:5, :5, :5] = True
        prediction[-5:, -5:, -5:] = True
        if index % 3:
            prediction[:4, 1:5, :6] = True
    else:  # random blobs, coarse to fine, overlapping more or less, some with specks
        sigma = [3.5, 2.5, 1.6, 1.1][index % 4]
        base = ndimage.gaussian_filter(rng.normal(size=SHAPE), sigma)
        other = ndimage.gaussian_filter(rng.normal(size=SHAPE), sigma)
        level = np.quantile(base, [0.97, 0.99, 0.9][index % 5 % 3])
        mixed = base + [0.3, 0.8, 2.0][index % 7 % 3] * other
        reference = base > level
        prediction = mixed > np.quantile(mixed, [0.98, 0.95][index % 2])
        if index % 4 == 0:
            prediction ^= rng.random(SHAPE) > 0.9995
            reference ^= rng.random(SHAPE) > 0.9998
    return prediction, reference, spacing


def masks_as_labels(masks):
    """Enhancing tumour, label 3 of BraTS 2023."""
    return [3 * mask.astype(np.uint8) for mask in masks]


def main():
    """Write the values of all pairs as JSON."""
    from importlib.resources import files

    import nibabel as nib
    from panoptica import Panoptica_Evaluator

    np.Inf = np.inf  # of NumPy 1, in surface-distance 0.1
    sys.path.insert(0, sys.argv[1])
    from brats_2023_metrics import brats_metrics

    bundled = files("brats_evaluation").joinpath("configs", "config_gli.yaml")
    evaluator = Panoptica_Evaluator.load_from_config(str(bundled))
    values = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(pathlib.Path(folder) / f"{name}.nii.gz") for name in ("pred", "ref")]
        for index in range(COUNT):
            *masks, spacing = mask_pair(index)
            for labels, path in zip(masks_as_labels(masks), paths):
                nib.save(nib.Nifti1Image(labels, np.diag([*spacing, 1.0])), path)
            # Its command takes every voxel for 1 mm; its evaluator knows better if told.
            new = evaluator.evaluate(*masks_as_labels(masks), voxelspacing=spacing)["et"].to_dict()
            old = brats_metrics.get_lesion_wise_results(*paths, "BraTS-GLI").iloc[0]
            values.append(
                {
                    "brats2025": {
                        "dice": new.get("sq_dsc"),
                        "hd95": new.get("sq_hd95"),
                        "nsd": new.get("sq_nsd"),
                        "tp": new.get("tp"),
                        "fp": new.get("fp"),
                        "fn": new.get("fn"),
                        "f1": new.get("rq"),
                        "region_dice": new.get("global_bin_dsc"),
                        "region_hd95": new.get("global_bin_hd95"),
                        "region_nsd": new.get("global_bin_nsd"),
                    },
                    "brats2023": {
                        "dice": float(old["Lesion_Wise_Score_Dice"]),
                        "hd95": float(old["Lesion_Wise_Score_HD95"]),
                        "tp": int(old["Num_TP"]),
                        "fp": int(old["Num_FP"]),
                        "fn": int(old["Num_FN"]),
                        "region_dice": float(old["Legacy_Dice"]),
                        "region_hd95": float(old["Legacy_HD95"]),
                    },
                }
            )
    with open(sys.argv[2], "w") as file:  # NaN and Infinity as Python reads them
        json.dump(values, file, indent=1, default=float)


if __name__ == "__main__":
    main()
