"""Evaluate a run on whole cases, as the BraTS challenge does; report.html shows it all.

    python eval.py --workdir=runs/masm --split=val --output=runs/masm/eval [--reference=DIR]
        [--labels=NAME | --description=FILE]

Every case of the split is segmented, written as NIfTI in the grid and the labels of its scan, and
compared there with the reference: the segmentation in --reference, else the one it was prepared
from, else (files gone) the prepared label, in the grid of the records. The output says which.
--reference needs no images, only segmentations named as in the set. They must have the label values
of the records, unless --labels or --description, as prepare takes them, says what theirs mean.
Exit codes: 0 done, 1 an error, 2 usage, 3 done but some cases failed (listed).
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

from masm_jax import processes, run_config, runtime
from masm_jax.data import nifti
from masm_jax.data import records as records_lib
from masm_jax.evaluation import gallery, mosaics, reference, report, scoring, tables
from masm_jax.evaluation.clock import Clock
from masm_jax.files import as_path, check_output, of_case, replacing
from masm_jax.inference import postprocess
from masm_jax.inference.volume import (
    FAILURES,
    check_task,
    decoding,
    failure,
    in_scan,
    trained_on,
)
from masm_jax.parallel import in_order
from masm_jax.steps import keep_names, keep_step

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_SPLIT = flags.DEFINE_string(
    "split", "val", "train, val or test of the run, a fold such as 2/5, or all of the records."
)
_CASES = flags.DEFINE_integer(
    "cases", 0, "How many cases of the split, from its first on; 0: all.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for report.html, tables, predictions/ ...")
_REFERENCE = flags.DEFINE_string("reference", None, "Folder of segmentations to compare with.")
_LABELS = flags.DEFINE_string("labels", None, "Scheme of the values in --reference.")
_DESCRIPTION = flags.DEFINE_string(
    "description", None, "Description file of the set in --reference, where it has other names."
)
_RECORDS = flags.DEFINE_string("records", None, "Records, where not those the run was trained on.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which weights.")
_REPORT_MB = flags.DEFINE_integer(
    "report_mb", 200, "Room for scans in report.html, 10^6 bytes: more is finer.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    min(4, os.cpu_count() or 1),
    "Processes that compare and draw cases while others are segmented; 0: none beside this one.",
    lower_bound=0,
)
_SET = flags.DEFINE_multi_string(
    "set", [], "KEY=VALUE of infer. or evaluation., such as infer.flips=0,1,2; may be repeated."
)
_LOADER = flags.DEFINE_string(
    "loader",
    "masm_jax.inference.volume",
    "Module with load_run(workdir, which=, given=): another for a run that train.py has not made.",
)
processes.define_flags()
log = logging.getLogger("masm_jax.eval")


def evaluate(workdir, output, roll):
    """Evaluate the run in ``workdir``; returns the exit code.

    Of several processes (``roll``) each takes its share of the cases; the first one writes tables
    and report, from what all have put into ``output``.
    """
    check_output(output)
    records_lib.refuse_records(output, flag="--output")
    if (pathlib.Path(output) / "config.json").is_file():
        raise ValueError(f"--output={output} is a run; name a folder of its own, such as RUN/eval")
    workdir, output = as_path(workdir), pathlib.Path(output)
    first = jax.process_index() == 0

    # ---------------------------------------------------------------- run, cases, references
    try:
        load_run = importlib.import_module(_LOADER.value).load_run
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--loader={_LOADER.value}: {error}; expected a module with load_run"
        ) from error
    segmenter, meta = load_run(workdir, which=_CHECKPOINT.value, given=_SET.value)
    config = run_config.load(workdir, _SET.value)
    records = records_lib.Records(_RECORDS.value or config.data.records)
    check_task(
        meta, modalities=records.modalities, regions=records.regions, spacing=records.spacing,
        where=records.root,
    )  # fmt: skip
    cases = _cases(workdir, records, config)[: _CASES.value or None]
    trained = trained_on(workdir, config, records, cases) if _SPLIT.value != "train" else []
    if trained:
        log.warning("%d of %d cases were trained on", len(trained), len(cases))
    tuned = sorted(set(run_config.tuned_on(workdir)) & set(cases))
    if tuned:
        log.warning("on %d of %d cases masm_jax.tune has chosen rules", len(tuned), len(cases))
    metas = _metas(records, cases)
    asked = {"labels": _LABELS.value, "description": _DESCRIPTION.value}
    references = reference.find(_REFERENCE.value, cases, records, metas, meta, **asked)
    views = _view_spacing(records, metas.values())
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    if first:
        gallery.clear_views(output)
    roll.agree("the cases", {"step": meta["step"], "cases": cases})
    log.info("step %d of %s, %d cases, %s", meta["step"], workdir, len(cases), jax.devices()[0])

    # ---------------------------------------------------------------- case by case
    # Segmented here, on the device, while worker processes compare the cases before.
    rows, lesions, failed, grids, took = [], [], {}, set(), []
    own = cases[jax.process_index() :: jax.process_count()]
    new = _segmented(segmenter, records, own, references, output, failed, config.evaluation, views)
    jobs = _replacing(new, output) if first else new
    began = time.perf_counter()
    try:
        for scored in in_order(scoring.score, jobs, workers=_WORKERS.value, needs="1 GB"):
            rows += scored.rows
            lesions += scored.lesions
            if scored.problem:
                failed[scored.case] = scored.problem
                log.error("%s failed: %s", scored.case, scored.problem)
            if not scored.rows:
                continue
            grids.add(scored.grid)
            took.append({"case": scored.case} | scored.seconds)
            done = len({row["case"] for row in rows} | failed.keys())
            left = (time.perf_counter() - began) / done * (len(own) - done)
            dice = "  ".join(f"{row['region']} {row['dice']:.3f}" for row in scored.rows)
            log.info("%d/%d %s  Dice %s  left %.0f s", done, len(own), scored.case, dice, left)
    except ValueError as error:  # a worker died: what is scored is written all the same
        failed |= dict.fromkeys(set(own) - {row["case"] for row in rows} - failed.keys(), error)
    if jax.process_count() > 1:
        found = {"rows": rows, "lesions": lesions, "failed": failed, "grids": grids, "took": took}
        rows, lesions, failed, grids, took = _together(roll, found, cases)
    if not first:
        return runtime.EXIT_SOME_FAILED if failed else 0

    # ---------------------------------------------------------------- tables, report
    about = {
        "run": str(workdir),
        "step": meta["step"],
        "split": _SPLIT.value,
        "checkpoint": _CHECKPOINT.value,
        "grid": sorted(grids),
        "failed": {case: str(reason) for case, reason in failed.items()},
        "infer": run_config.to_dict(config.infer),
        "evaluation": run_config.to_dict(config.evaluation),
        "trained_on": trained,
        "tuned_on": tuned,
    }
    clock = Clock()
    summary = tables.summarise(rows) | about | {"intervals": report.intervals(rows)}
    if rows:  # where of several processes another has segmented and this one has not
        gallery.clear(output)
    if rows or not (output / "metrics.csv").is_file():  # else an earlier evaluation's all stand
        tables.write_summary_json(output / "summary.json", summary)
    if rows:
        with clock.stage("writing"):
            tables.write_metrics_csv(output / "metrics.csv", rows)
            tables.write_metrics_csv(output / "lesions.csv", lesions)
        try:
            with clock.stage("report"):
                gallery.write(
                    output,
                    workdir=workdir,
                    records=records,
                    summary=summary,
                    rows=rows,
                    lesions=lesions,
                    config=run_config.to_dict(config),
                    kept=_kept(segmenter, records),
                    learnt=_learnt(segmenter),
                )
        except FAILURES as error:  # the scores of hours are there and are shown
            failed["report.html"] = failure(error)
        with replacing(output / "seconds.json") as temporary:
            seconds = {"cases": took, "together": clock.seconds, "workers": _WORKERS.value}
            temporary.write_text(json.dumps(seconds, indent=1) + "\n")
        print(tables.format_table(summary))
        print(f"compared in: {', '.join(summary['grid'])}")
        written = "" if "report.html" in failed else "report.html, "
        print(f"{output}: {written}metrics.csv, lesions.csv, summary.json, predictions/, ...")
    for case, reason in failed.items():
        print(f"failed: {of_case(case, str(reason))}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _replacing(segmented, output):
    """``segmented``; what an earlier evaluation says there goes with the first case, not before:
    where no case can be segmented (no memory, say) all of it is still there and still true."""
    for number, job in enumerate(segmented):
        if number == 0:
            gallery.clear(output)
        yield job


def _together(roll, found, cases):
    """What all processes have found, in the order of the cases."""
    failed = {case: str(reason) for case, reason in found["failed"].items()}
    found = found | {"failed": failed, "grids": sorted(found["grids"])}
    found = json.loads(json.dumps(found, default=float))  # NumPy's numbers too
    parts = roll.gather("the scores", found, limit=24 * 3600)
    place = {case: i for i, case in enumerate(cases)}

    def joined(name):
        return sorted((row for part in parts for row in part[name]), key=lambda r: place[r["case"]])

    failed = {case: why for part in parts for case, why in part["failed"].items()}
    grids = {grid for part in parts for grid in part["grids"]}
    return joined("rows"), joined("lesions"), failed, grids, joined("took")


def _cases(workdir, records, config):
    named = records_lib.read_split(workdir)
    wanted = _SPLIT.value
    if wanted == "all":
        return records.cases
    if wanted not in named:
        if "/" not in wanted:
            raise ValueError(
                f"--split={wanted}: expected one of {', '.join(named)}, all, or a fold as 2/5"
            )
        return records_lib.split(records.cases, wanted, config.data.split_seed)["val"]
    if not named[wanted]:
        raise ValueError(
            f"--split={wanted}: {workdir / 'split.json'} has no such cases; name another split"
        )
    return named[wanted]


def _metas(records, cases):
    """Case -> meta of the records that can be read; the others are told of in their turn."""
    metas = {}
    for case in cases:
        with contextlib.suppress(ValueError, OSError):
            metas[case] = records.meta(case)
    return metas


def _view_spacing(records, metas):
    """mm at which the scans of all cases fit into the report."""
    if not metas:
        return 1.0
    spacing = [min(edges) for edges in zip(*(meta["record_spacing"] for meta in metas))]
    shapes = [meta["record_shape"] for meta in metas]
    try:
        return report.views_spacing(shapes, spacing, len(records.modalities), _REPORT_MB.value)
    except ValueError as error:
        raise ValueError(f"--report_mb={_REPORT_MB.value}: {error}") from error


def _kept(segmenter, records):
    """Function case -> what the Modality-Aware mixers keep of it, or None without such mixers."""
    segmenter = getattr(segmenter, "segmenters", [segmenter])[0]  # of several runs the first
    names = keep_names(segmenter.network) if segmenter.network else ()  # none: not of ours
    if not names:
        return None
    channels = {"/".join(name): () for name in names}
    settings = dataclasses.replace(segmenter.settings, regions=channels, flips=())
    keeper = segmenter.another(keep_step(segmenter.network), settings)
    return lambda case: dict(zip(names, keeper.probabilities(records.image(case))))


def _learnt(segmenter):
    """{level: (d, h, w, M) probabilities of the offsets} of the mosaics that were learnt."""
    segmenter = getattr(segmenter, "segmenters", [segmenter])[0]  # of several runs the first
    if not segmenter.network:
        return {}
    learnt = segmenter.network.learnt_mosaics(segmenter.params)
    return {level: mosaics.shares(logits) for level, logits in learnt.items()}


def _segmented(segmenter, records, cases, references, output, failed, wanted, views):
    """Segment and write one case after the other; what fails is noted and left out."""
    settings = segmenter.settings
    for case in cases:
        clock = Clock()
        try:
            with clock.stage("reading"):
                meta, image = records.meta(case), np.array(records.image(case))
            rules = decoding(settings, meta["spacing"])
            small = decoding(settings, meta["record_spacing"])
            with clock.stage("inference"):
                probabilities = segmenter.probabilities(image)
                internal, written = in_scan(probabilities, meta, **rules)
                drawn = postprocess.decode(probabilities, regions=settings.regions, **small)
            scan = pathlib.Path(next(iter(meta["files"].values())))
            like = scan if scan.is_file() else np.array(meta["affine"])
            with clock.stage("writing"):
                nifti.write_labels(output / "predictions" / f"{case}.nii.gz", written, like=like)
        except FAILURES as error:
            failed[case] = failure(error)
            log.error("%s failed: %s", case, failed[case])
            continue
        own = reference.prepared_from(case, records, meta)
        own = own if own.segmentation and own.segmentation.is_file() else None
        yield (
            scoring.Segmented(
                case=case,
                records=records.root,
                regions={name: tuple(values) for name, values in settings.regions.items()},
                in_scan=internal,
                in_record=scoring.pack(drawn),
                reference=references.get(case, own),
                tolerance=wanted.tolerance,
                styles=tuple(wanted.styles),
                overlay=output / "overlays" / f"{case}.png",
                view=(gallery.view_file(output, case), views),
                clock=clock,
            ),
        )


def main(_):
    """Flags in, exit code out; an error is one readable line."""
    runtime.start()
    try:
        place = processes.detect(flags.FLAGS)
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_USAGE)
    limit = flags.FLAGS.start_timeout
    with processes.joined(place, limit=limit, readable=(ValueError, OSError)) as roll:
        code = evaluate(_WORKDIR.value, _OUTPUT.value, roll)
    sys.exit(code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "output"])
    app.run(main, flags_parser=runtime.parse_flags)
