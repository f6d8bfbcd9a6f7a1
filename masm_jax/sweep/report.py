"""What the runs of a sweep say together: one table, the differences, the keep ratios."""

import os
import statistics

from masm_jax import compare
from masm_jax.benchmark import tables as markdown
from masm_jax.benchmark.accuracy_report import (
    INTERVAL,
    MEAN,
    difference,
    difference_words,
    machine,
    mean_row,
    means,
    number,
)
from masm_jax.benchmark.study import training_rate
from masm_jax.evaluation import pictures, tables
from masm_jax.files import replacing
from masm_jax.sweep.definition import Run, read_json

COST = (
    "GMAC: forward, one crop; avoidable: what of it the Modality-Aware levels would save if each "
    "worked on the share of tokens that it keeps. Kept: by level, without noise, at the last "
    "validation; drawn: with the noise of the training. Seconds a step: median over the intervals "
    "of a run, with whatever else the machine did"
)


def write(sweep):
    """Write table.csv, table.md, summary.json, differences.png and keep.png of what is done.

    Args:
        sweep: the ``definition.Sweep``.

    Returns:
        lines for the terminal.
    """
    found = {name: values for name in sweep.rows if (values := _row(sweep, name))}
    failed = _failed(sweep)
    if not found:
        return ["nothing is done yet", *_failed_lines(failed)]
    first = next(iter(sweep.rows))
    if first in found:
        for name, values in found.items():
            if name != first:
                values["difference"] = difference(found[first]["tables"], values["tables"])
    summary = {
        "sweep": sweep.name,
        "config": _shown(sweep.base),
        "common": dict(sweep.common),
        "split": sweep.split,
        "seeds": list(sweep.seeds),
        "first": first,
        "machine": machine(),
        "failed": failed,
        "rows": {
            name: {key: value for key, value in values.items() if key != "tables"}
            for name, values in found.items()
        },
    }
    tables.write_summary_json(sweep.workdir / "summary.json", summary)
    _write_csv(sweep.workdir / "table.csv", summary["rows"])
    _figures(sweep, summary)
    lines = [*table(summary), *_mosaics(sweep, found), *_failed_lines(failed)]
    with replacing(sweep.workdir / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return [*lines, "", f"{sweep.workdir}: table.csv, table.md, summary.json, differences.png"]


def _row(sweep, name):
    """What is known of a row, from its seeds that are done; None: none is."""
    runs = [Run(name, seed) for seed in sweep.seeds]
    folders = {run.seed: sweep.folder(run) for run in runs if sweep.done(run)}
    if not folders:
        return None
    evaluations = {seed: compare.read(folder) for seed, folder in folders.items()}
    dice = [means(evaluation) for evaluation in evaluations.values()]
    costs = [read_json(folder / "cost.json") for folder in folders.values()]
    summaries = [read_json(folder / "eval" / "summary.json") for folder in folders.values()]
    avoidable = [cost["avoidable_gmac"] for cost in costs]
    return {
        "changes": dict(sweep.rows[name]),
        "seeds": list(folders),
        "absent": compare.absent(evaluations.values()),
        "cases": len({case for case, _ in next(iter(evaluations.values()))}),
        "trained_on": sorted({case for one in summaries for case in one.get("trained_on", ())}),
        "dice": {region: statistics.mean(one[region] for one in dice) for region in dice[0]},
        "by_seed": [one[MEAN] for one in dice],
        "difference": None,
        "steps": summaries[0]["step"],
        "seconds_per_step": statistics.mean(1 / training_rate(one) for one in folders.values()),
        "kept": _by_level([cost["kept"] for cost in costs]),
        "drawn": _by_level([cost["drawn"] for cost in costs]),
        "parameters": costs[0]["parameters"],
        "gmac": costs[0]["gmac"],
        "avoidable_gmac": None if None in avoidable else statistics.mean(avoidable),
        "tables": evaluations,
    }


def table(summary):
    """Lines of Markdown."""
    rows, first = summary["rows"], summary["first"]
    regions = [name for name in next(iter(rows.values()))["dice"] if name != MEAN]
    heads = [
        "row", "seeds", *(f"Dice {name}" for name in regions), "mean Dice", "by seed",
        f"it minus {first}, mean Dice (95 %)", "steps", "s/step", "kept", "drawn",
        "parameters, M", "GMAC", "avoidable GMAC",
    ]  # fmt: skip
    body = []
    for name, values in rows.items():
        avoidable = values["avoidable_gmac"]
        body.append([
            name,
            len(values["seeds"]),
            *(f"{values['dice'][region]:.3f}" for region in regions),
            f"{values['dice'][MEAN]:.3f}",
            ", ".join(f"{dice:.3f}" for dice in values["by_seed"]),
            difference_words(values["difference"]),
            values["steps"],
            number(values["seconds_per_step"], 2),
            _levels(values["kept"]),
            _levels(values["drawn"]),
            f"{values['parameters'] / 1e6:.2f}",
            f"{values['gmac']:.2f}",
            "-" if avoidable is None else f"{avoidable:.3f}",
        ])  # fmt: skip
    return [*markdown.markdown(heads, body), "", *_notes(summary)]


def _notes(summary):
    rows, facts = summary["rows"], summary["machine"]
    values = next(iter(rows.values()))
    common = ", ".join(f"{key}={value}" for key, value in summary["common"].items())
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    leaked = values["trained_on"]
    if leaked:
        yield f"**{len(leaked)} of the cases were trained on.**"
        yield ""
    for line in compare.absent_lines({name: one["absent"] for name, one in rows.items()}):
        yield line
        yield ""
    yield (
        f"{summary['config']}" + (f" with {common}" if common else "") + f"; {values['cases']} "
        f"cases of {summary['split']}. {INTERVAL}. {COST}. {facts['date']}, {facts['cores']} cores "
        f"of {facts['processor']}, {versions}."
    )


def _write_csv(path, rows):
    flat = []
    for name, values in rows.items():
        row = {"row": name, "seeds": len(values["seeds"]), "cases": values["cases"]}
        for region, dice in values["dice"].items():
            row[f"dice_{region}"] = dice
        for region, one in (values["difference"] or {}).items():
            row |= {f"{key}_{region}": one[key] for key in ("difference", "low", "high")}
            row |= {"paired_seeds": one["seeds"], "paired_cases": one["cases"]}
        row |= {key: values[key] for key in ("steps", "seconds_per_step")}
        for kind in ("kept", "drawn"):
            row |= {f"{kind}_{level}": value for level, value in values[kind].items()}
        row |= {key: values[key] for key in ("parameters", "gmac", "avoidable_gmac")}
        flat.append(tables.finite(row))
    tables.write_csv(path, list(dict.fromkeys(key for row in flat for key in row)), flat)


def _figures(sweep, summary):
    rows = summary["rows"]
    entries = [
        {
            "name": name,
            "seeds": values["by_seed"],
            "mean": values["dice"][MEAN],
            "difference": mean_row(values["difference"]),
        }
        for name, values in rows.items()
    ]
    drawn = compare.forest(
        entries, title=f"{summary['sweep']}, {summary['config']}",
        against=f"it minus {summary['first']}, 95 % over cases and seeds",
    )  # fmt: skip
    with replacing(sweep.workdir / "differences.png") as temporary:
        drawn.savefig(temporary, format="png", dpi=120)
    runs = {
        name: [sweep.folder(Run(name, seed)) / "metrics.jsonl" for seed in values["seeds"]]
        for name, values in rows.items()
    }
    pictures.keep_ratios(sweep.workdir / "keep.png", runs)


def _mosaics(sweep, found):
    """Lines: where eval.py has drawn what the learnt mosaics came to."""
    lines = []
    for name, values in found.items():
        for seed in values["seeds"]:
            folder = sweep.folder(Run(name, seed)) / "eval" / "figures"
            for path in sorted(folder.glob("mosaic_*.png")):
                place = path.relative_to(sweep.workdir).as_posix()
                lines += ["", f"{name}, seed {seed}, {path.stem.replace('_', ' ')}:", ""]
                lines.append(f"![{name}, seed {seed}]({place})")
    return lines


def _failed(sweep):
    """{run: reason} of those that failed and are not done."""
    noted = {str(run): read_json(sweep.folder(run) / "failed.json") for run in sweep.runs()
             if not sweep.done(run)}  # fmt: skip
    return {run: one["reason"] for run, one in noted.items() if one}


def _failed_lines(failed):
    return ["", *(f"failed: {run}: {reason}" for run, reason in failed.items())] if failed else []


def _by_level(seeds):
    """The mean of {level: share} over the seeds that have the level."""
    levels = dict.fromkeys(level for one in seeds for level in one)
    return {k: statistics.mean(one[k] for one in seeds if k in one) for k in levels}


def _levels(shares):
    return " ".join(f"{share:.2f}" for share in shares.values()) or "-"


def _shown(path):
    """A config as the user has named it, as far as that is known."""
    return os.path.relpath(path)
