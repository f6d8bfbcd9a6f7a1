"""What an evaluation leaves behind: a table per case, a summary, pictures of cases and of training.

Rows are dicts ``{"case": ..., "region": ..., **metrics}`` with the metrics of
``masm_jax.evaluation.metrics.evaluate``; further numbers per row are carried along.
"""

import contextlib
import csv
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from masm_jax.data.conventions import REGIONS
from masm_jax.evaluation.lesions import STYLES
from masm_jax.evaluation.metrics import CONVENTIONS, EMPTY_RULES

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Regions = Mapping[str, Sequence[int]]
Path = str | os.PathLike

TABLE = {  # key -> heading, decimals, whether the median is shown
    "dice": ("Dice", 3, True),
    "hd95": ("HD95 mm", 1, True),
    "nsd": ("NSD", 3, False),
    "sensitivity": ("sensitivity", 3, False),
    "precision": ("precision", 3, False),
}
# A hue per region, outer to inner: (reference, prediction). The lines differ in style too, and the
# hues stay apart for the common colour-vision deficiencies.
COLOURS = (("#a6ecff", "#0099ff"), ("#fff2a8", "#ff9d00"), ("#ffb8dc", "#ff1f8f"))
EDGE = [withStroke(linewidth=2.3, foreground="black")]  # pale lines on a bright lesion
SHOWN = {"t1ce": "T1ce", "flair": "FLAIR"}  # core and rim show on the first, oedema on the second
# name -> normal axis, (axis across, axis up), the letters at the left, right, top and bottom edge
PLANES = {
    "axial": (2, (0, 1), "RLAP"),
    "coronal": (1, (0, 2), "RLSI"),
    "sagittal": (0, (1, 2), "APSI"),
}
CURVES = {  # panel -> beginnings of the names drawn in it
    "training loss": ("train/loss", "train/dice_loss", "train/ratio_loss"),
    "validation Dice": ("val/dice", "volume/dice"),
    "keep ratios": ("train/keep",),
    "learning rate": ("train/learning_rate",),
}


def write_metrics_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per case and region: case, region, then every metric any row has.

    Args:
        path: the file, such as OUT/metrics.csv; replaced if there.
        rows: see the module; a metric that is absent or not finite leaves an empty cell.
    """
    columns = list(dict.fromkeys(["case", "region", *(key for row in rows for key in row)]))
    rows = [finite(row) for row in rows]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row.get(column) for column in columns] for row in rows)  # None: empty


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean, sample standard deviation and median of every metric per region, over the cases.

    Args:
        rows: see the module.

    Returns:
        {"cases": n, "regions": {region: {"n", "empty": {side: cases}, metric: {"mean", "sd",
        "median", "n"}}}, "average": {metric: mean of the regions' means}, "conventions": words}.
        The inner "n" counts the finite values, sd is None below two of them.
    """
    regions: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["region"] for row in rows):
        own = [row for row in rows if row["region"] == name]
        regions[name] = {
            "n": len(own),
            "empty": {side: sum(row.get("empty") == side for row in own) for side in EMPTY_RULES},
            **{metric: _statistics(row.get(metric) for row in own) for metric in _metrics(own)},
        }
    average = {
        metric: float(np.mean([r[metric]["mean"] for r in regions.values()]))
        for metric in _metrics(rows)
        if all(r.get(metric, {}).get("mean") is not None for r in regions.values())
    }
    words = "mean, sample standard deviation (n - 1), median over cases; average: over regions"
    return {
        "cases": len({row["case"] for row in rows}),
        "regions": regions,
        "average": average,
        "conventions": CONVENTIONS | {"statistics": words},
    }


def write_summary_json(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as strict JSON: numbers that are not finite become null."""
    text = json.dumps(finite(summary), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as text for a terminal: a line per region, then the rules that applied."""
    lines = [["region", "cases", *(heading for heading, *_ in TABLE.values())]]
    for name, region in summary["regions"].items():
        cells = (_cell(region.get(key), *form) for key, (_, *form) in TABLE.items())
        lines.append([name, str(region["n"]), *cells])
    means = {key: {"mean": summary["average"].get(key)} for key in TABLE}
    lines.append(["average", "", *(_cell(means[key], *form) for key, (_, *form) in TABLE.items())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
    table.insert(1, "-" * max(map(len, table)))
    table.append("mean +- standard deviation over cases (Dice and HD95: median)")
    for style in STYLES:
        table += _lesion_lines(summary, style)
    for side, words in summary["conventions"]["empty_rules"].items():
        counts = {name: r["empty"][side] for name, r in summary["regions"].items()}
        hit = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        if side != "neither":
            table.append(f"empty in {side} - {words}; cases: {hit or 'none'}")
    return "\n".join(table)


def _lesion_lines(summary: Mapping[str, Any], style: str) -> list[str]:
    """Lesion-wise means of a style, a line per region; nothing where it was not asked for."""
    lines = []
    for name, region in summary["regions"].items():
        if f"{style}_tp" not in region:
            continue
        shown = {key: region[f"{style}_{key}"] for key in ("dice", "hd95", "nsd", "f1")}
        cells = [_cell({"mean": s["mean"]}, 1 if k == "hd95" else 3) for k, s in shown.items()]
        counts = [region[f"{style}_{key}"] for key in ("tp", "fp", "fn")]
        found, false, missed = (c["mean"] * c["n"] for c in counts)
        lines.append(
            f"  {name}  Dice {cells[0]}  HD95 {cells[1]} mm  NSD {cells[2]}  F1 {cells[3]}  "
            f"found {found:.0f}, missed {missed:.0f}, false {false:.0f}"
        )
    return [f"lesion-wise, {style}:", *lines] if lines else []


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
    centre = _centre(prediction, reference, brain, regions)
    shown = [name for name in SHOWN if name in modalities] or list(modalities[:2])
    figure = Figure(figsize=(12, 4.2 * len(shown) + 1.2), facecolor="black", layout="constrained")
    for row, modality in enumerate(shown):
        scan = np.asarray(image[list(modalities).index(modality)], np.float32)
        low, high = np.percentile(scan[brain], (1, 99.5)) if brain.any() else (0.0, 1.0)
        scan = np.where(brain, scan, low)  # z-scores: 0 is the mean grey, air must be black
        for column, (name, (normal, (across, up), letters)) in enumerate(PLANES.items()):
            axes = figure.add_subplot(len(shown), 3, 3 * row + column + 1)
            axes.imshow(_cut(scan, normal, centre[normal]), cmap="gray", vmin=low,
                        vmax=max(high, low + 1e-6), origin="lower",
                        aspect=spacing[up] / spacing[across])  # fmt: skip
            for labels, style in ((reference, 0), (prediction, 1)):
                if labels is not None:
                    _outline(axes, _cut(np.asarray(labels), normal, centre[normal]), regions, style)
            _dress(axes, scan.shape[across], scan.shape[up], letters)
            heading = f"{SHOWN.get(modality, modality)}, {name} slice {centre[normal]}"
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
    figure.suptitle(title, color="white", fontsize=14)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curves(path: Path, metrics_jsonl: Path) -> None:
    """Draw training loss, Dice, keep ratios and learning rate of a run against the step.

    Args:
        path: the PNG; replaced if there.
        metrics_jsonl: WORKDIR/metrics.jsonl, one JSON object with "step" per line. Where a step
            comes twice (a run that was resumed), the later line counts.

    Raises:
        ValueError: the file is absent or empty.
    """
    series = _read_series(pathlib.Path(metrics_jsonl))
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (title, prefixes) in zip(figure.subplots(2, 2).flat, CURVES.items()):
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.3)
        names = [name for name in series if name.startswith(prefixes)]
        for name in names:
            steps = sorted(series[name])
            values = [series[name][step] for step in steps]
            style = ("--" if name.startswith("volume/") else "-") + ("." if len(steps) < 50 else "")
            axes.plot(steps, values, style, label=name, linewidth=1.3)
        if not names:
            axes.text(0.5, 0.5, "nothing logged", ha="center", transform=axes.transAxes)
            continue
        if title == "keep ratios":
            axes.axhspan(0.05, 0.95, color="tab:green", alpha=0.07, label="healthy: 0.05 to 0.95")
        if title in ("keep ratios", "validation Dice"):
            axes.set_ylim(-0.02, 1.02)
        axes.legend(fontsize=8, ncols=1 + len(names) // 8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def finite(value: Any) -> Any:
    """The value in plain Python types; None for numbers that are not finite: JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metrics(rows: Iterable[Row]) -> list[str]:
    """Keys of the rows that hold numbers, in order of appearance."""
    numbers = (k for row in rows for k, v in row.items() if isinstance(v, int | float | np.number))
    return list(dict.fromkeys(key for key in numbers if key not in ("case", "region")))


def _statistics(values: Iterable[float | None]) -> dict[str, float | int | None]:
    x = np.array([v for v in values if v is not None and math.isfinite(v)], np.float64)
    return {
        "mean": float(x.mean()) if x.size else None,
        "sd": float(x.std(ddof=1)) if x.size > 1 else None,
        "median": float(np.median(x)) if x.size else None,
        "n": int(x.size),
    }


def _cell(
    statistics: Mapping[str, Any] | None, decimals: int, with_median: bool = False
) -> str:
    """For example "0.862 +- 0.042 (0.850)": mean, standard deviation, median, as far as there."""
    if not statistics or statistics["mean"] is None:
        return "-"
    text = f"{statistics['mean']:.{decimals}f}"
    if statistics.get("sd") is not None:
        text += f" +- {statistics['sd']:.{decimals}f}"
    if with_median and statistics.get("median") is not None:
        text += f" ({statistics['median']:.{decimals}f})"
    return text


def _centre(
    prediction: np.ndarray, reference: np.ndarray | None, brain: np.ndarray, regions: Regions
) -> tuple[int, ...]:
    """Voxel in the middle of the largest lesion, or of the brain, or of the grid."""
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path` that becomes it at the end: readers never see half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
