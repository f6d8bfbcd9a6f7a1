"""How the scores of an evaluation are spread: pictures with the numbers beside them, intervals."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from masm_jax.evaluation import tables
from masm_jax.evaluation.pictures import COLOURS
from masm_jax.files import replacing

Row = Mapping[str, Any]
Picture = dict[str, Any]

SPREAD = {  # metric -> heading, limits of the axis
    "dice": ("Dice", (-0.02, 1.02)),
    "hd95": ("HD95 in mm", None),
    "nsd": ("NSD", (-0.02, 1.02)),
}
RESAMPLES = 5000


def intervals(rows: Sequence[Row], *, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """95 % bootstrap intervals of the means: cases drawn with replacement, percentile method.

    Args:
        rows: ``{"case": ..., "region": ..., **metrics}``, one per case and region.
        seed: of the draws.

    Returns:
        region -> metric -> [low, high]; nothing for a metric with fewer than two finite values.
        They say how the mean would vary with other cases of the same kind, not with other runs.
    """
    result: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys(row["region"] for row in rows):
        own, result[name] = [row for row in rows if row["region"] == name], {}
        for metric in dict.fromkeys(key for row in own for key in row):
            values = np.array([row[metric] for row in own if _number(row.get(metric))], float)
            if values.size < 2:
                continue
            # How often each case is drawn says as much as which are drawn, and is one product.
            draws = np.random.default_rng(seed).multinomial(
                values.size, np.full(values.size, 1 / values.size), size=RESAMPLES
            )
            low, high = np.percentile(draws @ values / values.size, (2.5, 97.5))
            result[name][metric] = [float(low), float(high)]
    return result


def chosen(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The best, the median and the worst case by the mean Dice over regions; no case twice.

    Args:
        rows: see ``intervals``; cases without a finite Dice are left out.

    Returns:
        ("best" | "median" | "worst", case), three of them or as many as there are cases.
    """
    ranked = sorted(mean_dice(rows).items(), key=lambda item: (-item[1], item[0]))
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    if len(ranked) < 3:
        places = {name: i for i, name in enumerate(("best", "worst")[: len(ranked)])}
    return [(name, ranked[i][0]) for name, i in places.items()]


def mean_dice(rows: Sequence[Row]) -> dict[str, float]:
    """case -> mean Dice over its regions, for the cases that have one."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if _number(row.get("dice")):
            scores.setdefault(row["case"], []).append(float(row["dice"]))
    return {case: float(np.mean(values)) for case, values in scores.items()}


def distributions(folder: str | pathlib.Path, rows: Sequence[Row]) -> list[Picture]:
    """Draw how each metric is spread over the cases, and the volumes against the reference.

    Args:
        folder: gets a PNG and a CSV of each picture; made if absent.
        rows: see ``intervals``.

    Returns:
        One dict per picture for ``report.write``: "section", "title", "caption", "png", "csv".
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    regions = list(dict.fromkeys(row["region"] for row in rows))
    pictures = []
    for metric, (heading, limits) in SPREAD.items():
        if any(_number(row.get(metric)) for row in rows):
            figure = _spread(rows, regions, metric, heading, limits)
            caption = (
                "A point per case. The box holds the middle half of the cases, the line in it is "
                "the median, whiskers reach at most 1.5 box lengths further; the diamond is the "
                "mean."
            )
            title = f"{heading} by region"
            pictures.append(_saved(folder, metric, figure, title, caption, rows, [metric]))
    if any(_number(row.get("volume_ml")) and _number(row.get("reference_ml")) for row in rows):
        caption = (
            "A point per case. On the line the prediction has the volume of the reference, above "
            "it more. Logarithmic from 1 ml on, linear below, so that 0 has a place."
        )
        figure = _volumes(rows, regions)
        title = "Volume predicted against reference"
        metrics = ["volume_ml", "reference_ml"]
        pictures.append(_saved(folder, "volume", figure, title, caption, rows, metrics))
    return pictures


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _spread(
    rows: Sequence[Row], regions: Sequence[str], metric: str, heading: str, limits: Any
) -> Figure:
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes = figure.subplots()
    draw = np.random.default_rng(0)
    for i, name in enumerate(regions):
        listed = (row.get(metric) for row in rows if row["region"] == name)
        values = np.array([value for value in listed if _number(value)])
        if not values.size:
            continue
        colour = COLOURS[i % len(COLOURS)][1]
        axes.boxplot(values, positions=[i], widths=0.5, showfliers=False, showmeans=True,
                     medianprops={"color": "black"},
                     meanprops={"marker": "D", "markerfacecolor": "white",
                                "markeredgecolor": "black", "markersize": 6, "zorder": 4},
                     )  # fmt: skip
        aside = draw.uniform(-0.18, 0.18, values.size)
        axes.plot(i + aside, values, "o", color=colour, markersize=4, alpha=0.6, zorder=3)
    axes.set_xticks(range(len(regions)), regions)
    axes.set_ylabel(heading)
    axes.set_xlim(-0.6, len(regions) - 0.4)
    if limits:
        axes.set_ylim(*limits)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    return figure


def _volumes(rows: Sequence[Row], regions: Sequence[str]) -> Figure:
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes = figure.subplots()
    top = 1.0
    for i, name in enumerate(regions):
        both = [(r.get("reference_ml"), r.get("volume_ml")) for r in rows if r["region"] == name]
        pairs = np.array([p for p in both if _number(p[0]) and _number(p[1])]).reshape(-1, 2)
        top = max(top, pairs.max(initial=0))
        marker = "osv^D"[i % 5]  # the shape says the region too, not the colour alone
        axes.plot(*pairs.T, marker, color=COLOURS[i % len(COLOURS)][1], markersize=5, alpha=0.7,
                  markeredgecolor="black", markeredgewidth=0.4, label=name)  # fmt: skip
    axes.plot([0, 1.3 * top], [0, 1.3 * top], color="grey", linewidth=1, zorder=0)
    for direction in "xy":
        getattr(axes, f"set_{direction}scale")("symlog", linthresh=1)
        getattr(axes, f"set_{direction}lim")(-0.1, 1.3 * top)
    axes.set(xlabel="reference in ml", ylabel="prediction in ml")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _saved(
    folder: pathlib.Path,
    name: str,
    figure: Figure,
    title: str,
    caption: str,
    rows: Sequence[Row],
    metrics: Sequence[str],
) -> Picture:
    with replacing(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    columns = ["case", "region", *metrics]
    tables.write_csv(folder / f"{name}.csv", columns, rows)
    return {
        "section": "distributions",
        "title": title,
        "caption": caption,
        "png": folder / f"{name}.png",
        "csv": folder / f"{name}.csv",
    }
