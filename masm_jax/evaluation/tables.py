"""The tables of an evaluation: a line per case and region, a summary, both as text to read.

Rows are dicts ``{"case": ..., "region": ..., **metrics}`` with the metrics of
``masm_jax.evaluation.metrics.evaluate``; further numbers per row are carried along.
"""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from masm_jax.evaluation.lesions import STYLES
from masm_jax.evaluation.metrics import CONVENTIONS, EMPTY_RULES, LESION_COLUMNS
from masm_jax.files import replacing

Row = Mapping[str, Any]
Path = str | os.PathLike

TABLE = {  # key -> heading, decimals, whether the median is shown
    "dice": ("Dice", 3, True),
    "hd95": ("HD95 mm", 1, True),
    "nsd": ("NSD", 3, False),
    "sensitivity": ("sensitivity", 3, False),
    "precision": ("precision", 3, False),
}

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet begins a formula with

WORDS = ("case", "region", "empty", "style", "fold", "found")  # columns that are no numbers


def write_metrics_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per case and region: case, region, then every metric any row has.

    Args:
        path: the file, such as OUT/metrics.csv; replaced if there.
        rows: see the module; a metric that is absent or not finite leaves an empty cell.
    """
    columns = list(dict.fromkeys(["case", "region", *(key for row in rows for key in row)]))
    write_csv(path, columns, [finite(row) for row in rows])


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write these columns of the rows. A text that a spreadsheet would take for a formula, such as
    a case called ``=1+1``, gets an apostrophe before it, which ``read_csv`` takes away."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_guarded(row.get(column)) for column in columns] for row in rows)


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv or lesions.csv: numbers as float, empty cells left out.

    Raises:
        ValueError: no columns case and region, a row without, or something else than a number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"case", "region"} <= set(reader.fieldnames or ("case", "region")):
            raise ValueError(f"{path}: no columns case and region; expected a table of eval.py")
        try:
            rows = [
                {k: _plain(cell) if k in WORDS else float(cell) for k, cell in row.items() if cell}
                for row in reader
            ]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; expected a table as eval.py wrote it") from error
    for number, row in enumerate(rows, 1):
        if not row.keys() >= {"case", "region"}:
            raise ValueError(
                f"{path}: row {number} has no case or no region, as if the file were cut short; "
                f"expected a table as eval.py wrote it: run eval.py again"
            )
    return rows


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
        cells = (_cell(region.get(key), *form[1:]) for key, form in TABLE.items())
        lines.append([name, str(region["n"]), *cells])
    means = {key: {"mean": summary["average"].get(key)} for key in TABLE}
    lines.append(["average", "", *(_cell(means[key], *form[1:]) for key, form in TABLE.items())])
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
        # No value where no case has a lesion of the region, drawn or real.
        shown = {k: region.get(f"{style}_{k}", {}).get("mean") for k in LESION_COLUMNS[:4]}
        cells = [_cell({"mean": mean}, 1 if k == "hd95" else 3) for k, mean in shown.items()]
        counts = [region[f"{style}_{key}"] for key in ("tp", "fp", "fn")]
        found, false, missed = (c["mean"] * c["n"] for c in counts)
        lines.append(
            f"  {name}  Dice {cells[0]}  HD95 {cells[1]} mm  NSD {cells[2]}  F1 {cells[3]}  "
            f"found {found:.0f}, missed {missed:.0f}, false {false:.0f}"
        )
    return [f"lesion-wise, {style}:", *lines] if lines else []


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


def _cell(statistics: Mapping[str, Any] | None, decimals: int, with_median: bool = False) -> str:
    """For example "0.862 +- 0.042 (0.850)": mean, standard deviation, median, as far as there."""
    if not statistics or statistics["mean"] is None:
        return "-"
    text = f"{statistics['mean']:.{decimals}f}"
    if statistics.get("sd") is not None:
        text += f" +- {statistics['sd']:.{decimals}f}"
    if with_median and statistics.get("median") is not None:
        text += f" ({statistics['median']:.{decimals}f})"
    return text
