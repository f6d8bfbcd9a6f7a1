"""Compare two evaluations case by case.

    python -m masm_jax.compare RUN_A RUN_B --output=OUT [--metrics=dice,hd95,nsd]

RUN is a folder that ``eval.py`` has written, or a run with one in ``eval/``. For every region and
metric: the mean of the paired differences B - A with a 95 % bootstrap interval over cases, the
Wilcoxon signed-rank test, and how often B was better. OUT gets compare.csv, compare.json and
compare.png. Exit codes: 0 done, 1 an error, 2 usage.

One seed of each network compares two trainings, not two networks: the spread between seeds is not
in the interval.
"""

import argparse
import math
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from masm_jax import runtime
from masm_jax.arguments import Parser
from masm_jax.evaluation import tables
from masm_jax.files import check_output, replacing

LOWER_IS_BETTER = ("hd95",)
RESAMPLES = 10_000
LEVEL = 0.95
SEEDS, MEAN = "#56b4e9", "#d55e00"  # colours of Okabe and Ito (2008): apart for all eyes


def read(run):
    """{(case, region): {metric: float}} of an evaluation; cells without a number are left out.

    Raises:
        ValueError: no metrics.csv there.
    """
    run = pathlib.Path(run)
    places = [run / "metrics.csv", run / "eval" / "metrics.csv"]
    for path in places:
        if path.is_file():
            break
    else:
        raise ValueError(
            f"{run}: no metrics.csv in it, nor in its folder eval; expected a folder that eval.py "
            f"has written: python eval.py --workdir={run} --split=val --output={run / 'eval'}"
        )
    table = {}
    for row in tables.read_csv(path):
        values = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        table[row["case"], row["region"]] = values
    return table


def compare(a, b, metrics, seed=0):
    """Paired statistics of two evaluations.

    Args:
        a, b: as ``read`` gives them.
        metrics: names of metrics.
        seed: of the bootstrap.

    Returns:
        A list of dicts: "region", "metric", "n", "mean_a", "mean_b", "difference" (mean of B - A),
        "low", "high" (95 % bootstrap percentiles of it; None for n < 2), "p" (Wilcoxon, two-sided;
        None where all differences are 0), "better", "worse" (cases), "differences" (list).

    Raises:
        ValueError: no case is in both, or none has a metric.
    """
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(
            f"the evaluations share no case: the first has {_some(a)}, the second {_some(b)}; "
            f"expected two evaluations of one split"
        )
    rows = []
    for region in dict.fromkeys(region for _, region in shared):
        for metric in metrics:
            pairs = [
                (a[key][metric], b[key][metric])
                for key in shared
                if key[1] == region and metric in a[key] and metric in b[key]
            ]
            if pairs:
                rows.append({"region": region, "metric": metric, **_paired(pairs, metric, seed)})
    missing = sorted(set(metrics) - {row["metric"] for row in rows})
    if missing:
        known = [sorted({key for values in table.values() for key in values}) for table in (a, b)]
        raise ValueError(
            f"no case has {', '.join(missing)} in both; the first has {', '.join(known[0])}, the "
            f"second {', '.join(known[1])}"
        )
    return rows


def absent(evaluations):
    """Of the regions that some cases lack: how often they were left empty, and Dice of the others.

    The Dice of a case without a region is 1 or 0: one of twenty moves the mean by 0.05, more than
    most networks differ.

    Args:
        evaluations: of the seeds of a network, each as ``read`` gives it.

    Returns:
        {region: {"scored": case by case and seed by seed without the region, "left_empty": how many
        of them, "dice": mean over those with it, None: there are none}}.
    """
    found = {}
    for region in dict.fromkeys(region for one in evaluations for _, region in one):
        own = [
            values for one in evaluations for (_, of), values in one.items()
            if of == region and "dice" in values
        ]  # fmt: skip
        lacking = [values["dice"] for values in own if values.get("reference_ml") == 0]
        having = [values["dice"] for values in own if values.get("reference_ml") != 0]
        if lacking:
            found[region] = {
                "scored": len(lacking),
                "left_empty": sum(dice == 1 for dice in lacking),
                "dice": sum(having) / len(having) if having else None,
            }
    return found


def absent_lines(networks):
    """What the Dice of cases without a region hides, a line for each such region.

    Args:
        networks: {name: ``absent`` of it}.
    """
    lines = []
    for region in dict.fromkeys(region for found in networks.values() for region in found):
        own = {name: found[region] for name, found in networks.items() if region in found}
        empty = ", ".join(f"{k} {v['left_empty']} of {v['scored']}" for k, v in own.items())
        line = f"Cases without {region} count 1 or 0; left empty: {empty}."
        dice = ", ".join(f"{k} {v['dice']:.3f}" for k, v in own.items() if v["dice"] is not None)
        lines.append(f"{line} Dice of those with it: {dice}." if dice else line)
    return lines


def _paired(pairs, metric, seed):
    first, second = np.array(pairs).T
    difference = second - first
    low = high = p = None
    if len(difference) > 1:
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(difference), size=(RESAMPLES, len(difference)))
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(difference[drawn].mean(1), [tail, 100 - tail])
    if difference.any():
        p = float(stats.wilcoxon(difference).pvalue)
    gain = -difference if metric.endswith(LOWER_IS_BETTER) else difference
    return {
        "n": len(difference),
        "mean_a": float(first.mean()),
        "mean_b": float(second.mean()),
        "difference": float(difference.mean()),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "p": p,
        "better": int((gain > 0).sum()),
        "worse": int((gain < 0).sum()),
        "differences": difference.tolist(),
    }


def crossed(differences, seed=0):
    """Mean of differences that are paired by seed and case, with an interval over both.

    Seeds and cases are drawn anew, each apart from the other, as often as there are: what is left
    is what other cases of the kind and other trainings would change. With one seed it is the
    interval over cases.

    Args:
        differences: (S, N) float, seeds and cases.
        seed: of the bootstrap.

    Returns:
        {"difference", "low", "high": 95 % bootstrap percentiles, None for one number alone,
        "seeds": S, "cases": N}.
    """
    differences = np.asarray(differences, np.float64)
    seeds, cases = differences.shape
    low = high = None
    if differences.size > 1:
        rng = np.random.default_rng(seed)
        of_seeds, of_cases = (
            rng.multinomial(count, [1 / count] * count, size=RESAMPLES) / count
            for count in (seeds, cases)
        )
        means = ((of_seeds @ differences) * of_cases).sum(1)
        tail = 100 * (1 - LEVEL) / 2
        low, high = map(float, np.percentile(means, [tail, 100 - tail]))
    found = {"difference": float(differences.mean()), "low": low, "high": high}
    return found | {"seeds": seeds, "cases": cases}


def forest(entries, *, title, against):
    """A figure: the mean Dice of every seed, and how far each entry is from another.

    Args:
        entries: dicts with "name", "seeds" (mean Dice of each), "mean" (of these), "difference"
            (with "difference", "low", "high"; None: nothing to compare).
        title: above.
        against: what the difference is, below it.

    Returns:
        ``matplotlib.figure.Figure``.
    """
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(entries)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, entry in enumerate(entries):
        left.plot(entry["seeds"], [place] * len(entry["seeds"]), "o", color=SEEDS)
        left.plot([entry["mean"]], [place], "D", color=MEAN)
        if row := entry["difference"]:
            if row["low"] is not None:
                right.plot([row["low"], row["high"]], [place] * 2, color=MEAN)
            right.plot([row["difference"]], [place], "D", color=MEAN)
    left.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    left.invert_yaxis()
    left.set_xlabel("mean Dice (dots: seeds; diamond: their mean)")
    right.axvline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=6)
    right.set_xlabel(against)
    figure.suptitle(title, fontsize=10)
    return figure


def plot(path, rows, names):
    """Draw the differences of every case, their mean and its interval, a panel per metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(4.5 * len(metrics), 4), layout="constrained")
    for place, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(1, len(metrics), place)
        own = [row for row in rows if row["metric"] == metric]
        for x, row in enumerate(own):
            spread = np.linspace(-0.18, 0.18, row["n"]) if row["n"] > 1 else np.zeros(1)
            axes.plot(x + spread, row["differences"], "o", color="#7aa6d8", markersize=4, alpha=0.8)
            if row["low"] is not None:
                axes.plot([x, x], [row["low"], row["high"]], color="#c04000", linewidth=2)
            axes.plot([x], [row["difference"]], "D", color="#c04000")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(own)), [row["region"] for row in own])
        better = "down" if metric.endswith(LOWER_IS_BETTER) else "up"
        axes.set_title(f"{metric}: difference per case ({better} = second better)", fontsize=9)
    figure.suptitle(f"{names[1]} - {names[0]}; diamond: mean, bar: 95 % bootstrap", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def table(rows):
    """The statistics as text."""
    heads = ("region", 6), ("metric", 10), ("n", 4), ("A", 7), ("B", 7), ("B - A", 7), ("95 %", 20)
    lines = ["  ".join([*(name.ljust(width) for name, width in heads), "p       +/-"])]
    for row in rows:
        interval = "-" if row["low"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        p = "-" if row["p"] is None else f"{row['p']:.3f}"
        lines.append(
            f"{row['region']:<6}  {row['metric']:<10}  {row['n']:<4}  {row['mean_a']:<7.3f}  "
            f"{row['mean_b']:<7.3f}  {row['difference']:<+7.3f}  {interval:<20}  {p:<6}  "
            f"{row['better']}/{row['worse']}"
        )
    return "\n".join(lines)


def main(argv=None):
    """Arguments in, exit code out; an error is one readable line."""
    parser = Parser(
        prog="python -m masm_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_a", metavar="RUN_A")
    parser.add_argument("run_b", metavar="RUN_B")
    parser.add_argument("--output", required=True, help="folder for compare.csv, .json and .png")
    parser.add_argument("--metrics", default="dice,hd95,nsd", help="columns of metrics.csv")
    arguments = parser.parse_args(argv)
    return runtime.command("compare", _run, arguments)


def _run(arguments):
    names, output = (arguments.run_a, arguments.run_b), pathlib.Path(arguments.output)
    check_output(output)
    a, b = (read(name) for name in names)
    metrics = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    if not metrics:
        raise ValueError("--metrics=: expected columns of metrics.csv, such as dice,hd95")
    rows = compare(a, b, metrics)
    tables.write_metrics_csv(
        output / "compare.csv",
        [{"case": "all", **{k: v for k, v in row.items() if k != "differences"}} for row in rows],
    )
    tables.write_summary_json(output / "compare.json", {"a": names[0], "b": names[1], "rows": rows})
    plot(output / "compare.png", rows, names)
    print(f"A = {names[0]}\nB = {names[1]}")
    print(table(rows))
    if "dice" in metrics:
        both = {
            "A": {key: a[key] for key in a if key in b},
            "B": {key: b[key] for key in b if key in a},
        }
        for line in absent_lines({name: absent([one]) for name, one in both.items()}):
            print(line)
    alone = len({case for case, _ in a} ^ {case for case, _ in b})
    if alone:
        print(f"{alone} cases are in one of the two alone; left out")
    regions = sorted({region for _, region in a} ^ {region for _, region in b})
    if regions:
        print(f"in one of the two alone, left out: {', '.join(regions)}")
    if max(row["n"] for row in rows) < 6:
        print("fewer than 6 cases: Wilcoxon's p cannot fall below 0.05, whatever the difference")
    print(f"{output}: compare.csv, compare.json, compare.png")
    return 0


def _some(table):
    cases = sorted({case for case, _ in table})
    return ", ".join(cases[:3]) + (" ..." if len(cases) > 3 else "") if cases else "none"


if __name__ == "__main__":
    sys.exit(main())
