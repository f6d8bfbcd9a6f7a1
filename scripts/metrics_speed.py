"""Times the metrics of one case beside the official package, in one run, one core each.

    taskset -c 0 python -m scripts.metrics_speed PREDICTION REFERENCE [--official=PYTHON]

PREDICTION and REFERENCE are label files in the values of BraTS 2021 or 2023. PYTHON is that of an
environment with ``brats_evaluation`` 0.0.10 (AGPL, so apart from this project's); both work on
arrays that are read already. Alternating, median and best of ROUNDS; the official package does what
the style ``brats2025`` does, on its six regions, which are taken here too.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from masm_jax.data import nifti
from masm_jax.evaluation import metrics

ROUNDS = 5
REGIONS = {  # all that the official package evaluates
    "wt": (1, 2, 3), "tc": (1, 3), "et": (3,), "netc": (1,), "snfh": (2,), "rc": (4,),
}  # fmt: skip
OFFICIAL = """
import json, sys, time
from importlib.resources import files
import numpy as np
from panoptica import Panoptica_Evaluator
arrays = np.load(sys.argv[1])
bundled = files("brats_evaluation").joinpath("configs", "config_gli.yaml")
evaluator = Panoptica_Evaluator.load_from_config(str(bundled))
for line in sys.stdin:
    began = time.perf_counter()
    found = evaluator.evaluate(
        arrays["prediction"], arrays["reference"], voxelspacing=tuple(arrays["spacing"].tolist())
    )
    dice = {name: result.to_dict().get("global_bin_dsc") for name, result in found.items()}
    print("TIMED", json.dumps([time.perf_counter() - began, dice], default=float), flush=True)
"""


def main():
    """Print a row per way of evaluating."""
    parser = argparse.ArgumentParser(prog="python -m scripts.metrics_speed")
    parser.add_argument("prediction")
    parser.add_argument("reference")
    parser.add_argument("--official", help="Python of an environment with brats_evaluation")
    args = parser.parse_args()
    labels, spacing = [], None
    for path in (args.prediction, args.reference):
        values, affine, _ = nifti.read(path)
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
        labels.append(np.where(values == 4, 3, values).astype(np.uint8))
    ways = {"regions alone": (), "brats2023": ("brats2023",), "brats2025": ("brats2025",)}
    times, process = {name: [] for name in ways}, None
    if args.official:
        arrays = pathlib.Path(tempfile.mkdtemp()) / "case.npz"
        np.savez(arrays, prediction=labels[0], reference=labels[1], spacing=spacing)
        process = subprocess.Popen(
            [args.official, "-c", OFFICIAL, str(arrays)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        times["official brats_evaluation"] = []
    for _ in range(ROUNDS + 1):
        for name, styles in ways.items():
            began = time.perf_counter()
            scores = metrics.evaluate(*labels, spacing, regions=REGIONS, styles=styles)
            times[name].append(time.perf_counter() - began)
        if process:
            process.stdin.write("go\n")
            process.stdin.flush()
            line = next(line for line in process.stdout if line.startswith("TIMED"))
            seconds, dice = json.loads(line.removeprefix("TIMED"))
            times["official brats_evaluation"].append(seconds)
    if process:
        process.stdin.close()
        print("Dice here:", {name: round(values["dice"], 6) for name, values in scores.items()})
        print("official: ", {name: round(value, 6) for name, value in dice.items()})
    print("| | median s | best s |\n|---|---|---|")
    for name, seconds in times.items():
        seconds = seconds[1:]  # the first is warm-up
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} |")


if __name__ == "__main__":
    sys.exit(main())
