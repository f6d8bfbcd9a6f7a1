"""Score segmentations that any program has made, by the metrics and rules of eval.py.

    python -m masm_jax.score PREDICTIONS --reference=FOLDER --output=OUT

PREDICTIONS holds a file for each case, at any depth: CASE.nii.gz, as nnU-Net, the challenges'
submissions and our predict write them, or CASE_seg, CASE-seg. FOLDER holds the segmentations of the
set, named as prepare and eval.py know them, or CASE.nii.gz. Each case is compared in its grid. OUT
gets metrics.csv, lesions.csv and summary.json, so that ``masm_jax.compare`` takes it beside a run
of ours. Cases without a prediction are failures and in no mean; predictions of other cases are left
out. Exit codes: 0 done, 1 an error, 2 usage, 3 done, but some cases failed (listed).
"""

import argparse
import dataclasses
import logging
import os
import pathlib
import sys
import time
import traceback

import numpy as np

from masm_jax import runtime
from masm_jax.arguments import Parser, some
from masm_jax.data import cases as cases_lib
from masm_jax.data import conventions, nifti
from masm_jax.data.integrity import read_segmentation
from masm_jax.evaluation import metrics, report, scoring, tables
from masm_jax.evaluation.lesions import STYLES
from masm_jax.files import check_output, of_case, told
from masm_jax.parallel import in_order

ENDINGS = ("", "_seg", "-seg")  # of the name of a prediction, after the case's
log = logging.getLogger("masm_jax.score")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A case to be scored.

    Attributes:
        reference: the case of its segmentation.
        prediction: the same of what is scored.
        tolerance: of the NSD, mm.
        styles: of the lesion-wise metrics.
    """

    reference: cases_lib.Case
    prediction: cases_lib.Case
    tolerance: float
    styles: tuple[str, ...]


def pairs(references, predictions, *, predicted_labels=None, tolerance=1.0, styles=tuple(STYLES)):
    """Find the prediction of every reference.

    Args:
        references: cases with segmentations (``find_cases(..., images=False)``).
        predictions: folder.
        predicted_labels: scheme of the values there; None: as in the reference.
        tolerance, styles: of ``Pair``.

    Returns:
        list of ``Pair``; cases without prediction; files of no case.

    Raises:
        ValueError: no such folder or scheme, or two files are of one case.
    """
    root = pathlib.Path(predictions)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one with a CASE.nii.gz for each case")
    wanted = {case.id + ending: case for case in references for ending in ENDINGS}
    found, others = {}, []
    for path in cases_lib.nifti_files(root):
        case = wanted.get(cases_lib.stem(path))
        if case is None:
            others.append(path)
        elif case.id in found:
            raise ValueError(f"{case.id}: {found[case.id]} and {path} are of one case; keep one")
        else:
            found[case.id] = path
    made = []
    for case in references:
        if case.id not in found:
            continue
        # Grids are compared with that of the reference, and said so.
        convention = dataclasses.replace(case.convention, modalities=("the reference",))
        if predicted_labels:
            convention = conventions.with_labels(
                convention, predicted_labels, flag="--predicted_labels"
            )
            if convention.regions != case.convention.regions:
                raise ValueError(
                    f"--predicted_labels={predicted_labels}: a scheme of BraTS, and the reference "
                    f"has the regions {', '.join(case.convention.regions)}; leave it out"
                )
        prediction = cases_lib.Case(case.id, (), found[case.id], convention)
        made.append(Pair(case, prediction, tolerance, tuple(styles)))
    missing = [case.id for case in references if case.id not in found]
    return made, missing, others


def score(pair):
    """Compare a case; an error is part of the result.

    Args:
        pair: the ``Pair``.

    Returns:
        ``scoring.Scored``.
    """
    try:
        shape, affine = nifti.grid(pair.reference.segmentation)
        label = _internal(pair.reference, shape, affine, "--labels")
        drawn = _internal(pair.prediction, shape, affine, "--predicted_labels")
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
        found = metrics.evaluate(
            drawn, label, spacing, regions=pair.reference.convention.regions,
            tolerance=pair.tolerance, styles=pair.styles,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return scoring.Scored(pair.reference.id, problem=told(error))
    except Exception:  # a defect: shown with its traceback, and the other cases go on
        return scoring.Scored(pair.reference.id, problem=traceback.format_exc().strip())
    return scoring.Scored(pair.reference.id, *scoring.lines(pair.reference.id, found))


def _internal(case, shape, affine, flag):
    values = read_segmentation(case, shape, affine, flag=flag)
    return conventions.to_internal(values, case.convention.labels)


def main(argv=None):
    """Arguments in, exit code out; an error is one readable line."""
    parser = Parser(
        prog="python -m masm_jax.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", help="folder of what is scored")
    add("--reference", required=True, metavar="FOLDER", help="of the segmentations of the set")
    add("--output", required=True, metavar="OUT")
    add("--labels", metavar="NAME", help="scheme of the values in FOLDER, where they leave doubt")
    add("--predicted_labels", metavar="NAME", help="of those in PREDICTIONS (as in FOLDER)")
    add("--description", metavar="FILE", help="that describes the set in FOLDER")
    add("--tolerance", type=float, default=1.0, metavar="MM", help="of the NSD (1)")
    add("--styles", default=",".join(STYLES), help="of the lesion-wise metrics (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    return runtime.command("score", _run, arguments)


def _run(arguments):
    output = pathlib.Path(arguments.output)
    check_output(output)
    if arguments.workers < 0 or not arguments.tolerance > 0:
        raise ValueError(
            f"--workers={arguments.workers} --tolerance={arguments.tolerance:g}: expected 0 or "
            f"more processes, and mm above 0"
        )
    styles = some("styles", arguments.styles, STYLES)
    runtime.start(cache=False)
    references, problems = cases_lib.find_cases(
        arguments.reference, labels=arguments.labels, description=arguments.description,
        images=False,
    )  # fmt: skip
    failed = {problem.case: str(problem) for problem in problems}
    todo, missing, others = pairs(
        references, arguments.predictions, predicted_labels=arguments.predicted_labels,
        tolerance=arguments.tolerance, styles=styles,
    )  # fmt: skip
    if not todo:
        names = ", ".join(path.name for path in others[:3]) or "no NIfTI file"
        raise ValueError(
            f"{arguments.predictions} has {names}, --reference={arguments.reference} the cases "
            f"{', '.join(missing[:3])}: expected CASE.nii.gz of those"
        )
    failed |= {case: f"no {case}.nii.gz in {arguments.predictions}" for case in missing}
    rows, lesions = _scored(todo, arguments.workers, failed)
    summary = tables.summarise(rows) | {
        "predictions": str(pathlib.Path(arguments.predictions).absolute()),
        "reference": str(pathlib.Path(arguments.reference).absolute()),
        "labels": {
            "reference": _meanings(pair.reference for pair in todo),
            "predictions": _meanings(pair.prediction for pair in todo),
        },
        "grid": ["the scans"],
        "failed": failed,
        "left_out": [str(path) for path in others],
        "evaluation": {"tolerance": arguments.tolerance, "styles": styles},
        "intervals": report.intervals(rows),
    }
    tables.write_summary_json(output / "summary.json", summary)
    if rows:
        tables.write_metrics_csv(output / "metrics.csv", rows)
        tables.write_metrics_csv(output / "lesions.csv", lesions)
        print(tables.format_table(summary))
        for side, meanings in summary["labels"].items():
            print("\n".join(f"{side}: {meaning}" for meaning in meanings))
        print(f"{output}: metrics.csv, lesions.csv, summary.json")
    if others:
        print(f"{len(others)} files of no case of the reference, left out, such as {others[0]}")
    for case, reason in failed.items():
        print(f"failed: {of_case(case, reason)}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} cases failed and are in no mean", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _meanings(cases):
    """What the label values mean, a line for each naming or year."""
    return sorted({f"{case.convention.name}: {case.convention.meaning()}" for case in cases})


def _scored(todo, workers, failed):
    """Rows of metrics.csv and lesions.csv; what fails is put into ``failed``."""
    rows, lesions, began = [], [], time.perf_counter()
    results = in_order(score, ((pair,) for pair in todo), workers=workers, needs="1 GB")
    for done, scored in enumerate(results, 1):
        if scored.problem:
            failed[scored.case] = scored.problem
            log.error("%s failed: %s", scored.case, scored.problem)
            continue
        rows += scored.rows
        lesions += scored.lesions
        left = (time.perf_counter() - began) / done * (len(todo) - done)
        dice = "  ".join(f"{row['region']} {row['dice']:.3f}" for row in scored.rows)
        log.info("%d/%d %s  Dice %s  left %.0f s", done, len(todo), scored.case, dice, left)
    return rows, lesions


if __name__ == "__main__":
    sys.exit(main())
