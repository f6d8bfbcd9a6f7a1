"""Evaluate a run on whole cases, as the BraTS challenge does.

    python eval.py --workdir=runs/masm --split=val --output=runs/masm/eval [--reference=DIR]

Every case of the split is segmented, written as NIfTI in the grid and the labels of its scan, and
compared there with the reference: the segmentation in --reference, else the one it was prepared
from, else (files gone) the prepared label, in the grid of the records. The output says which.
Exit codes: 0 done, 1 an error, 2 usage, 3 done but some cases failed (listed).
"""

import json
import logging
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

from masm_jax import runtime
from masm_jax.data import cases as cases_lib
from masm_jax.data import conventions, nifti
from masm_jax.data import records as records_lib
from masm_jax.evaluation import metrics, pictures, tables
from masm_jax.inference import postprocess
from masm_jax.inference.volume import decoding, in_scan, load_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_SPLIT = flags.DEFINE_string(
    "split", "val", "train, val or test of the run, or a fold such as 2/5."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for tables, predictions/ and overlays/.")
_REFERENCE = flags.DEFINE_string("reference", None, "Folder of NIfTI cases to compare with.")
_RECORDS = flags.DEFINE_string("records", None, "Records, where not those the run was trained on.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which weights.")
_OVERLAYS = flags.DEFINE_integer("overlays", 8, "How many cases to draw (in overlays/).")
log = logging.getLogger("masm_jax.eval")


def evaluate(workdir, output):
    """Evaluate the run in ``workdir``; returns the exit code."""
    workdir, output = pathlib.Path(workdir), pathlib.Path(output)

    # ---------------------------------------------------------------- run, cases, references
    segmenter, meta = load_run(workdir, which=_CHECKPOINT.value)
    config = segmenter.network.config
    records = records_lib.Records(_RECORDS.value or config.data.records)
    cases = _cases(workdir, records, config)
    references = _references(_REFERENCE.value, cases)
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    log.info("step %d of %s, %d cases, %s", meta["step"], workdir, len(cases), jax.devices()[0])

    # ---------------------------------------------------------------- case by case
    rows, lesions, failed, grids = [], [], {}, {}
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        try:
            scores, grids[case], drawn = _one(
                segmenter, records, case, references.get(case), output
            )
        except (ValueError, OSError) as error:
            failed[case] = str(error)
            log.error("%s failed: %s", case, error)
            continue
        for name, values in scores.items():
            own = {"case": case, "region": name}
            lesions += [own | lesion for lesion in values.pop("lesions", [])]
            rows.append(own | values)
        if number <= _OVERLAYS.value:
            _draw(records, case, drawn, scores, output)
        left = (time.perf_counter() - began) / number * (len(cases) - number)
        dice = "  ".join(f"{name} {values['dice']:.3f}" for name, values in scores.items())
        log.info("%d/%d %s  Dice %s  left %.0f s", number, len(cases), case, dice, left)

    # ---------------------------------------------------------------- tables
    if rows:
        summary = tables.summarise(rows)
        summary |= {
            "run": str(workdir),
            "step": meta["step"],
            "split": _SPLIT.value,
            "grid": sorted(set(grids.values())),
            "failed": failed,
        }
        tables.write_metrics_csv(output / "metrics.csv", rows)
        tables.write_metrics_csv(output / "lesions.csv", lesions)
        tables.write_summary_json(output / "summary.json", summary)
        print(tables.format_table(summary))
        print(f"compared in: {', '.join(summary['grid'])}")
        print(f"{output}: metrics.csv, lesions.csv, summary.json, predictions/, overlays/")
    for case, reason in failed.items():
        print(f"failed: {case}: {reason}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _cases(workdir, records, config):
    named = json.loads((workdir / "split.json").read_text())
    wanted = _SPLIT.value
    if wanted not in named:
        if "/" not in wanted:
            raise ValueError(
                f"--split={wanted}: expected one of {', '.join(named)} or a fold such as 2/5"
            )
        return records_lib.split(records.cases, wanted, config.seed)["val"]
    if not named[wanted]:
        raise ValueError(f"--split={wanted}: this run's split.json has no such cases")
    return named[wanted]


def _references(folder, cases):
    """Case -> (segmentation file, convention) from a folder of NIfTI cases; empty without one."""
    if folder is None:
        return {}
    found, _ = cases_lib.find_cases(folder)
    references = {case.id: case for case in found if case.segmentation is not None}
    missing = [case for case in cases if case not in references]
    if missing:
        raise ValueError(
            f"--reference={folder}: no segmentation for {', '.join(missing[:5])}"
            f"{' and more' if len(missing) > 5 else ''}; expected one for every case of the split"
        )
    return {
        case: (references[case].segmentation, references[case].convention.labels) for case in cases
    }


def _one(segmenter, records, case, reference, output):
    """Segment, write, compare: scores, the grid compared in, labels in the record's grid."""
    meta = records.meta(case)
    network = segmenter.network
    rules, small = (decoding(network.config, meta[k]) for k in ("spacing", "record_spacing"))
    probabilities = segmenter.probabilities(records.image(case))
    internal, written = in_scan(probabilities, meta, **rules)
    scan = pathlib.Path(next(iter(meta["files"].values())))
    path = output / "predictions" / f"{case}.nii.gz"
    nifti.write_labels(path, written, like=scan if scan.is_file() else np.array(meta["affine"]))
    drawn = postprocess.decode(probabilities, regions=network.regions, **small)
    wanted = network.config.evaluation
    asked = {"regions": network.regions, "tolerance": wanted.tolerance, "styles": wanted.styles}

    if reference is None and meta["segmentation"] and pathlib.Path(meta["segmentation"]).is_file():
        reference = (meta["segmentation"], {int(k): v for k, v in meta["labels"].items()})
    if reference is None:
        label = np.asarray(records.label(case))
        scores = metrics.evaluate(drawn, label, meta["record_spacing"], **asked)
        return scores, "the records", drawn
    values, affine, _ = nifti.read(reference[0])
    if values.shape != internal.shape or not np.allclose(affine, meta["affine"], atol=0.1):
        raise ValueError(
            f"{reference[0]}: grid {values.shape} differs from the scan's {internal.shape}, or its "
            f"affine does; expected the segmentation of the same scan"
        )
    label = conventions.to_internal(values, reference[1])
    spacing = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(0))
    return metrics.evaluate(internal, label, spacing, **asked), "the scans", drawn


def _draw(records, case, drawn, scores, output):
    (output / "overlays").mkdir(exist_ok=True)
    meta = records.meta(case)
    pictures.overlay(
        output / "overlays" / f"{case}.png",
        np.asarray(records.image(case)),
        drawn,
        np.asarray(records.label(case)),
        title=f"{case}   Dice " + "  ".join(f"{n} {v['dice']:.2f}" for n, v in scores.items()),
        modalities=records.modalities,
        spacing=meta["record_spacing"],
        regions=records.regions,
    )


def main(_):
    """Flags in, exit code out; an error is one readable line."""
    runtime.start()
    try:
        sys.exit(evaluate(_WORKDIR.value, _OUTPUT.value))
    except (ValueError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_ERROR)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "output"])
    app.run(main, flags_parser=runtime.parse_flags)
