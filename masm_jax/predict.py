"""Segment scans with a trained run.

python -m masm_jax.predict --workdir=RUN --input=CASE_OR_ROOT --output=OUT

Writes OUT/CASE.nii.gz in the grid, affine, header and label convention of each case, and
OUT/CASE.png to look at. Exit codes: 0 done, 1 an error, 2 usage, 3 done but some cases failed
(listed).
"""

import argparse
import logging
import pathlib
import sys
import time

from masm_jax import runtime
from masm_jax.data import cases as cases_lib
from masm_jax.data import nifti, preprocess
from masm_jax.evaluation import report
from masm_jax.inference import postprocess
from masm_jax.inference.volume import in_scan, load_run

_log = logging.getLogger("masm_jax.predict")  # run as a module, __name__ is "__main__"


def main(argv=None):
    """Flags in, exit code out."""
    args = _parser().parse_args(argv)
    runtime.start()
    try:
        return _predict(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return runtime.EXIT_ERROR


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m masm_jax.predict", description="Segment scans with a trained run."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run (train.py --workdir)")
    parser.add_argument("--input", required=True, help="a case folder, or a folder of many")
    parser.add_argument("--output", required=True, help="folder for the label files")
    parser.add_argument("--labels", help="label scheme to write, where the names leave it open")
    parser.add_argument("--description", help="description file of another data set (docs/data.md)")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    return parser


def _predict(args):
    cases, problems = cases_lib.find_cases(
        args.input, labels=args.labels, description=args.description
    )
    segmenter, meta = load_run(args.workdir, which=args.checkpoint)
    failed = {problem.case: str(problem) for problem in problems}
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        try:
            found = tuple(case.convention.modalities)
            if found != segmenter.network.modalities:
                raise ValueError(
                    f"modalities {', '.join(found)}; the run was trained on "
                    f"{', '.join(segmenter.network.modalities)}"
                )
            volumes = _one(segmenter, case, meta, pathlib.Path(args.output))
        except (ValueError, OSError) as error:
            failed[case.id] = str(error)
            _log.error("%s failed: %s", case.id, error)
            continue
        _log.info(
            "%d/%d %s (%s)  %s  %.1f s",
            number,
            len(cases),
            case.id,
            case.convention.name,
            "  ".join(f"{name} {value:.1f} ml" for name, value in volumes.items()),
            time.perf_counter() - began,
        )
    print(f"{len({case.id for case in cases} - failed.keys())} cases in {args.output}")
    for reason in failed.values():
        print(f"failed: {reason}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _one(segmenter, case, run, output):
    """Segment one case and write its files; returns the volume of each region in ml."""
    record = preprocess.preprocess(case, spacing=run["spacing"])
    threshold = segmenter.network.config.infer.threshold
    regions = segmenter.network.regions

    def progress(done, tiles):
        _log.info("%s: %d of %d tiles", case.id, done, tiles)

    probabilities = segmenter.probabilities(record.image, progress)
    internal, written = in_scan(probabilities, record.meta, threshold=threshold)
    nifti.write_labels(output / f"{case.id}.nii.gz", written, like=case.images[0])
    drawn = postprocess.decode(probabilities, regions=regions, threshold=threshold)
    millilitres = 1.0
    for edge in record.meta["spacing"]:
        millilitres *= edge
    volumes = {
        name: float(sum((internal == value).sum() for value in values)) * millilitres / 1000
        for name, values in regions.items()
    }
    report.overlay(
        output / f"{case.id}.png",
        record.image,
        drawn,
        None,
        title=f"{case.id}   " + "  ".join(f"{n} {v:.1f} ml" for n, v in volumes.items()),
        modalities=segmenter.network.modalities,
        spacing=record.meta["record_spacing"],
        regions=regions,
    )
    return volumes


if __name__ == "__main__":
    sys.exit(main())
