"""What the report of an evaluation shows, gathered: scans, plots, best and worst cases, mixers."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import masm_jax
from masm_jax.data import nifti
from masm_jax.data.records import Records
from masm_jax.evaluation import mosaics, pictures, report

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "nibabel")
_VIEWS = ".views"


def view_file(output: pathlib.Path, case: str) -> pathlib.Path:
    """Where the worker that scores a case leaves what the report shows of it."""
    return output / _VIEWS / f"{case}.json"


def write(
    output: pathlib.Path,
    *,
    workdir: pathlib.Path,
    records: Records,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    lesions: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    kept: Callable[[str], Mapping[tuple[str, str], np.ndarray]] | None,
    learnt: Mapping[str, np.ndarray],
) -> None:
    """Draw the figures, write report.html, and remove the files of the views.

    Args:
        output: folder of the evaluation; figures go to figures/, each PNG with a CSV.
        workdir: folder of the run; its metrics.jsonl gives the curves.
        records: that were evaluated.
        summary: of the evaluation, with "run", "step", "split", "checkpoint", "grid", "failed".
        rows: of metrics.csv.
        lesions: of lesions.csv.
        config: of the run.
        kept: case -> (level, modality) -> (D, H, W) share kept; None without such mixers.
        learnt: level -> (d, h, w, M) probabilities of the offsets, of the mosaics that were learnt.
    """
    figures = output / "figures"
    shown, pruned = report.distributions(figures, rows), []
    for which, case in report.chosen(rows):
        if (output / "overlays" / f"{case}.png").is_file():
            shown.append(_case(output, which, case, rows))
        if kept is not None:
            path = figures / f"pruning_{case}.png"
            shares = kept(case)
            pruned.append(_pruning(path, records, case, shares))
            caption = (
                "Coloured: patches of the brain replaced by the partner modality's, from all "
                "slices, seen from above. Outlined: the reference in the slice shown."
            )
            shown.append(_picture("pruning", f"{which}: {case}", caption, path, path))
    for level, share in learnt.items():
        path, title = figures / f"mosaic_{level}.png", f"The mosaic that {level} has learnt"
        mosaics.draw(path, share, title=title, modalities=records.modalities)
        caption = (
            "One cell, which is repeated over the tokens. A row per modality: whose patch comes to "
            "each of its places before attention, and how sure the training was of it."
        )
        shown.append(_picture("mosaic", title, caption, path, path))
    if (workdir / "metrics.jsonl").is_file():
        path = figures / "curves.png"
        pictures.curves(path, workdir / "metrics.jsonl")
        shown.append(_picture("training", "Training", "The run, step by step.", path, path))
    report.write(
        output / "report.html",
        title=f"Evaluation of {workdir.name}",
        summary=summary,
        rows=rows,
        lesions=lesions,
        views=_views(output, rows),
        pictures=shown,
        failed=summary["failed"],
        config=config,
        about=_about(summary),
        notes=_notes(summary, records, rows, pruned),
    )
    clear_views(output)


def clear(output: pathlib.Path) -> None:
    """Remove what an earlier evaluation says there of predictions that are about to be replaced."""
    for name in ("report.html", "metrics.csv", "lesions.csv", "summary.json", "seconds.json"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "figures", ignore_errors=True)


def clear_views(output: pathlib.Path) -> None:
    """Remove the scans that an evaluation which was stopped has left for its report."""
    shutil.rmtree(output / _VIEWS, ignore_errors=True)


def _case(output, which, case, rows):
    path = output / "overlays" / f"{case}.png"
    dice = {row["region"]: row["dice"] for row in rows if row["case"] == case}
    words = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    return _picture("cases", f"{which}: {case}", f"Dice {words}", path, None)


def _pruning(path, records, case, kept):
    """Draw it; the share of the brain that was pruned, mean over levels and modalities."""
    image, label = np.asarray(records.image(case)), records.label(case)
    pictures.pruning(
        path,
        image,
        kept,
        np.zeros(image.shape[1:], np.uint8) if label is None else np.asarray(label),
        title=f"{case}: what the mixers pruned in any slice, seen from above",
        modalities=records.modalities,
        spacing=records.meta(case)["record_spacing"],
        regions=records.regions,
    )
    brain = (image != 0).any(0)
    return 1 - float(np.mean([share[brain].mean() for share in kept.values()]))


def _picture(section, title, caption, png, csv):
    csv = None if csv is None else csv.with_suffix(".csv")
    return {"section": section, "title": title, "caption": caption, "png": png, "csv": csv}


def _views(output, rows):
    for case in dict.fromkeys(row["case"] for row in rows):
        if view_file(output, case).is_file():  # else it was not drawn, which eval.py has said
            yield case, json.loads(view_file(output, case).read_text())


def _about(summary):
    versions = {"masm_jax": masm_jax.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    return {
        "run": summary["run"],
        "step": summary["step"],
        "checkpoint": summary["checkpoint"],
        "split": summary["split"],
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "host": platform.platform(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": " ".join(sys.argv),
        "versions": versions,
    }


def _notes(summary, records, rows, pruned):
    notes = [f"Compared in the grid of {' and '.join(summary['grid'])}."]
    case = rows[0]["case"]
    scan = pathlib.Path(next(iter(records.meta(case)["files"].values())))
    if scan.is_file() and nifti.description(scan).startswith("simulated phantom"):
        notes.insert(0, "These cases are simulated phantoms: the results are no BraTS results.")
    if pruned and max(pruned) < 0.001:
        notes.append(
            "Without the noise of the training the Modality-Aware mixers pruned nothing here: what "
            "they pruned in training was drawn by chance."
        )
    if summary["trained_on"]:
        notes.append(
            f"{len(summary['trained_on'])} of {summary['cases']} cases were trained on: what the "
            f"network knows by heart flatters it."
        )
    if summary["tuned_on"]:
        notes.append(
            f"The rules of infer.json were chosen on {len(summary['tuned_on'])} of these cases."
        )
    if summary["checkpoint"] == "best" and summary["split"] == "val":
        notes.append("The checkpoint was chosen by crops of these cases: the scores flatter.")
    cases = summary["cases"]
    if cases < 10:
        notes.append(f"{cases} cases say little about other cases; see the intervals.")
    return notes
