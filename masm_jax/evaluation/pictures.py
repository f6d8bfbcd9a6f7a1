"""Pictures of an evaluation and of a training: slices through a lesion, curves."""

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from masm_jax.data.conventions import REGIONS
from masm_jax.files import as_path, replacing

logger = logging.getLogger(__name__)

Regions = Mapping[str, Sequence[int]]
Path = str | os.PathLike

# A hue per region, outer to inner: (reference, prediction). The lines differ in style too, and the
# hues stay apart for the common colour-vision deficiencies.
COLOURS = (("#a6ecff", "#0099ff"), ("#fff2a8", "#ff9d00"), ("#ffb8dc", "#ff1f8f"))
EDGE = [withStroke(linewidth=2.3, foreground="black")]  # pale lines on a bright lesion
WINDOW = (1, 99.5)  # percentiles of the brain, from black to white
SHOWN = {"t1ce": "T1ce", "flair": "FLAIR"}  # core and rim show on the first, oedema on the second
# name -> normal axis, (axis across, axis up), the letters at the left, right, top and bottom edge
PLANES = {
    "axial": (2, (0, 1), "RLAP"),
    "coronal": (1, (0, 2), "RLSI"),
    "sagittal": (0, (1, 2), "APSI"),
}
KEEP = "keep ratios"
CURVES = {  # panel -> beginnings of the names drawn in it
    "training loss": ("train/loss", "train/dice_loss", "train/ratio_loss"),
    "validation Dice": ("val/dice", "volume/dice"),
    KEEP: ("train/keep", "val/keep"),
    "learning rate": ("train/learning_rate",),
}


def overlay(
    path: Path,
    image: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray | None,
    *,
    title: str,
    modalities: Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    regions: Regions = REGIONS,
) -> None:
    """Draw three slices through the largest lesion, prediction and reference outlined.

    Radiological view: the patient's right is on the left, anterior up, on sagittal slices left.

    Args:
        path: the PNG; replaced if there.
        image: (M, D, H, W) float, RAS, 0 outside the brain.
        prediction: (D, H, W) integer internal labels.
        reference: the same, or None. The slices go through the reference's largest lesion, where
            it has none the prediction's, where neither has any the middle of the brain.
        title: one line above, such as the case and its Dice.
        modalities: the names of the M; T1ce and FLAIR are drawn, where absent the first two.
        spacing: voxel edges in mm along D, H, W.
        regions: region -> internal values, ordered outer to inner.
    """
    brain = (np.asarray(image) != 0).any(axis=0)
    middle = centre(prediction, reference, brain, regions)
    shown = [name for name in SHOWN if name in modalities] or list(modalities[:2])
    figure = Figure(figsize=(12, 4.2 * len(shown) + 1.2), facecolor="black", layout="constrained")
    for row, modality in enumerate(shown):
        scan = np.asarray(image[list(modalities).index(modality)], np.float32)
        low, high = np.percentile(scan[brain], WINDOW) if brain.any() else (0.0, 1.0)
        scan = np.where(brain, scan, low)  # z-scores: 0 is the mean grey, air must be black
        for column, (name, (normal, (across, up), letters)) in enumerate(PLANES.items()):
            axes = figure.add_subplot(len(shown), 3, 3 * row + column + 1)
            axes.imshow(_cut(scan, normal, middle[normal]), cmap="gray", vmin=low,
                        vmax=max(high, low + 1e-6), origin="lower",
                        aspect=spacing[up] / spacing[across])  # fmt: skip
            for labels, style in ((reference, 0), (prediction, 1)):
                if labels is not None:
                    _outline(axes, _cut(np.asarray(labels), normal, middle[normal]), regions, style)
            _dress(axes, scan.shape[across], scan.shape[up], letters)
            heading = f"{SHOWN.get(modality, modality)}, {name} slice {middle[normal]}"
            axes.set_title(heading, color="white", fontsize=11)
    handles = []
    for i, region in enumerate(regions):
        for side, style in (("reference", 0), ("prediction", 1)):
            if style == 1 or reference is not None:
                colour, dashes = _line(i, style)
                handles.append(Line2D([], [], color=colour, ls=dashes, label=f"{region} {side}"))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=len(regions),
                           frameon=False, labelcolor="white", handlelength=3.5, fontsize=11,
                           title="R is the patient's right")  # fmt: skip
    legend.get_title().set_color("white")
    figure.suptitle(title, color="white", fontsize=14, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curves(path: Path, metrics_jsonl: Path) -> None:
    """Draw training loss, Dice, keep ratios and learning rate of a run against the step.

    Args:
        path: the PNG; replaced if there. Beside it a CSV of the numbers: name, step, value.
        metrics_jsonl: WORKDIR/metrics.jsonl, one JSON object with "step" per line. Where a step
            comes twice (a run that was resumed), the later line counts.

    Raises:
        ValueError: the file is absent or empty.
    """
    series = _read_series(as_path(metrics_jsonl))
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, title in zip(figure.subplots(2, 2).flat, CURVES):
        _panel(axes, title, series)
        axes.set_title(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    drawn = tuple(prefix for prefixes in CURVES.values() for prefix in prefixes)
    with replacing(as_path(path).with_suffix(".csv")) as temporary:
        lines = [
            f"{name},{step},{value!r}\n"
            for name in series if name.startswith(drawn)
            for step, value in sorted(series[name].items())
        ]  # fmt: skip
        temporary.write_text("name,step,value\n" + "".join(lines), encoding="utf-8")


def keep_ratios(path: Path, runs: Mapping[str, Sequence[Path]]) -> bool:
    """Draw what share of the tokens each level keeps, step by step: a panel for each entry.

    Args:
        path: the PNG; replaced if there, and removed where there is nothing to draw.
        runs: name -> metrics.jsonl of its runs, such as its seeds, which are averaged.

    Returns:
        Whether any of them keeps and prunes at all.
    """
    entries = {}
    for name, files in runs.items():
        series = _averaged([_read_series(as_path(file)) for file in files])
        if any(key.startswith(CURVES[KEEP]) for key in series):
            entries[name] = series
    if not entries:
        as_path(path).unlink(missing_ok=True)
        return False
    across = min(3, len(entries))
    down = -(-len(entries) // across)
    figure = Figure(figsize=(5.5 * across, 3.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, (name, series) in zip(panels.flat, entries.items()):
        _panel(axes, KEEP, series)
        axes.set_title(name, fontsize=10)
    for axes in panels.flat[len(entries) :]:
        axes.set_axis_off()
    figure.suptitle("share of the tokens kept (train: drawn with noise; val: without)", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    return True


def _panel(axes: Any, title: str, series: Mapping[str, Mapping[int, float]]) -> None:
    """The curves of CURVES[title] against the step."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)
    names = [name for name in series if name.startswith(CURVES[title])]
    colours: dict[str, str] = {}  # of a level one, with noise and without
    for name in names:
        colour = colours.setdefault(name.rpartition("keep/")[2], f"C{len(colours) % 10}")
        steps = sorted(series[name])
        values = [series[name][step] for step in steps]
        line = "--" if name.startswith(("volume/", "val/keep")) else "-"
        dots = "." if len(steps) < 50 else ""
        axes.plot(steps, values, dots + line, label=name, linewidth=1.3, color=colour)
    if not names:
        axes.text(0.5, 0.5, "nothing logged", ha="center", transform=axes.transAxes)
        return
    if title == KEEP:
        axes.axhspan(0.05, 0.95, color="tab:green", alpha=0.07, label="healthy: 0.05 to 0.95")
    if title in (KEEP, "validation Dice"):
        axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8, ncols=1 + len(names) // 8)


def pruning(
    path: Path,
    image: np.ndarray,
    kept: Mapping[tuple[str, str], np.ndarray],
    labels: np.ndarray,
    *,
    title: str,
    modalities: Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    regions: Regions = REGIONS,
) -> None:
    """Draw where the Modality-Aware mixers took the partner's patch: a row per level.

    Seen from above: coloured is what was pruned in the brain in any slice, on one axial slice.

    Args:
        path: the PNG; replaced if there. Beside it a CSV: the share kept per level and modality,
            in the brain and in the outermost region.
        image: (M, D, H, W) float, RAS, 0 outside the brain.
        kept: (level, modality) -> (D, H, W) share of the votes of all tiles for keeping, 0 to 1.
        labels: (D, H, W) integer internal labels, outlined.
        title: one line above.
        modalities: names of the M.
        spacing: voxel edges in mm along D, H, W.
        regions: region -> internal values.
    """
    levels = list(dict.fromkeys(level for level, _ in kept))
    shown = list(dict.fromkeys(modality for _, modality in kept))
    brain = (np.asarray(image) != 0).any(axis=0)
    tumour = np.isin(labels, list(next(iter(regions.values()))))
    place = centre(labels, labels, brain, regions)
    figure = Figure(
        figsize=(2.6 * len(shown), 2.9 * len(levels) + 0.8), facecolor="black", layout="constrained"
    )
    panels = figure.subplots(len(levels), len(shown), squeeze=False)
    for row, level in enumerate(levels):
        for axes, modality in zip(panels[row], shown):
            scan = np.asarray(image[list(modalities).index(modality)], np.float32)
            low, high = np.percentile(scan[brain], WINDOW) if brain.any() else (0.0, 1.0)
            pruned = np.where(brain, 1 - kept[level, modality], 0)
            aspect = spacing[1] / spacing[0]
            axes.imshow(_cut(np.where(brain, scan, low), 2, place[2]), cmap="gray", vmin=low,
                        vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)  # fmt: skip
            shade = _cut(pruned.max(2, keepdims=True), 2, 0)  # of all slices: most are near the rim
            axes.imshow(np.ma.masked_less(shade, 0.02), cmap="autumn", alpha=0.6 * shade.clip(0, 1),
                        vmin=0, vmax=1, origin="lower", aspect=aspect)  # fmt: skip
            _outline(axes, _cut(np.asarray(labels), 2, place[2]), regions, 0)
            axes.set_axis_off()
            share = 1 - float(kept[level, modality][brain].mean()) if brain.any() else 0.0
            axes.set_title(f"{level} {modality}: {share:.0%} pruned", color="white", fontsize=9)
    figure.suptitle(title, color="white", fontsize=11, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    with replacing(pathlib.Path(path).with_suffix(".csv")) as temporary:
        lines = ["level,modality,kept_in_brain,kept_in_tumour\n"]
        for (level, modality), part in kept.items():
            inside = f"{part[tumour].mean():.4f}" if tumour.any() else ""
            lines.append(f"{level},{modality},{part[brain].mean():.4f},{inside}\n")
        temporary.write_text("".join(lines), encoding="utf-8")


def centre(
    prediction: np.ndarray, reference: np.ndarray | None, brain: np.ndarray, regions: Regions
) -> tuple[int, ...]:
    """Voxel in the middle of the largest lesion, or of the brain, or of the grid.

    Args:
        prediction: (D, H, W) integer internal labels; counts where the reference has no lesion.
        reference: the same, or None.
        brain: (D, H, W) bool.
        regions: region -> internal values.

    Returns:
        Three indices.
    """
    tumour = sorted({value for values in regions.values() for value in values})
    for labels in (reference, prediction):
        if labels is not None and (mask := np.isin(labels, tumour)).any():
            lesions, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            largest = int(np.bincount(lesions.ravel())[1:].argmax()) + 1
            # A lesion in one piece has voxels in every plane between its ends, so also in these.
            return tuple(round(c) for c in ndimage.center_of_mass(lesions == largest))
    if brain.any():
        return tuple(round(c) for c in ndimage.center_of_mass(brain))
    return tuple(n // 2 for n in brain.shape)


def _cut(volume: np.ndarray, normal: int, index: int) -> np.ndarray:
    """One plane as (rows, columns) for origin="lower": the first axis runs from right to left."""
    return np.take(volume, index, axis=normal)[::-1].T


def _line(region: int, style: int) -> tuple[str, str]:
    """Colour and line style of a region's outline; style 0 is the reference, 1 the prediction."""
    return COLOURS[region % len(COLOURS)][style], ("solid", "dashed")[style]


def _dress(axes: Any, across: int, up: int, letters: str) -> None:
    """Room around the slice, and in it the letters for the left, right, top and bottom."""
    x, y = 0.08 * across, 0.08 * up
    axes.set(xlim=(-x, across + x), ylim=(-y, up + y))
    axes.set_axis_off()
    for letter, place in zip(letters, ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))):
        axes.text(*place, letter, color="white", ha="center", va="center", weight="bold",
                  transform=axes.transAxes)  # fmt: skip


def _outline(axes: Any, labels: np.ndarray, regions: Regions, style: int) -> None:
    labels = np.pad(labels, 1)  # closes outlines at the border
    rows, columns = (np.arange(-1, n - 1) for n in labels.shape)
    for i, values in enumerate(regions.values()):
        mask = np.isin(labels, list(values))
        if mask.any():  # contour warns where there is nothing to draw
            colour, dashes = _line(i, style)
            axes.contour(columns, rows, mask.astype(float), [0.5], colors=colour,
                         linestyles=dashes, linewidths=1.3).set_path_effects(EDGE)  # fmt: skip


def _read_series(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """name -> {step: value} of the finite numbers in a metrics.jsonl."""
    if not path.is_file():
        raise ValueError(f"{path} is absent: pass the metrics.jsonl of a training workdir")
    series: dict[str, dict[int, float]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            # A run that is killed may leave half a line; the rest is still worth a picture.
            logger.warning("%s line %d is no JSON object with a step; left out", path, number)
            continue
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, {})[step] = value
    if not series:
        raise ValueError(f"{path} holds no metrics; wait for the first log line of the run")
    return series


def _averaged(runs: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    """The mean of several series, at the steps that all of them have."""
    averaged = {}
    for name in runs[0]:
        steps = set.intersection(*(set(run.get(name, ())) for run in runs))
        if steps:
            averaged[name] = {
                step: sum(run[name][step] for run in runs) / len(runs) for step in sorted(steps)
            }
    return averaged
