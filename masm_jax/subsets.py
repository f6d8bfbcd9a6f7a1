"""What is lost when scans are missing: Dice for every subset of the modalities.

    python -m masm_jax.subsets --workdir=RUN [--workdir=RUN2 ...] --output=OUT [--split=val]

Each case is segmented once for every non-empty subset (15 of four modalities), as if the others had
not been acquired. Several runs on the same cases, such as MASM and the concatenation U-Net, stand
side by side, with the difference of the first from each, paired by case. A row of a sweep, DIR/ROW,
or a network of `benchmark accuracy`, OUT/BUDGET/NETWORK, counts with all of its seeds. Writes
OUT/subsets.md, .json, .png and .svg. A run that never lost a modality in training
(data.modality_dropout = 0) is measured all the same, and marked.

Exit codes: 0 done, 1 an error, 2 usage, 3 some cases failed (listed, and left out of all).
"""

import itertools
import json
import logging
import pathlib
import sys
import time

import matplotlib.figure
import numpy as np

from masm_jax import compare, run_config, runtime
from masm_jax.arguments import Parser
from masm_jax.benchmark.accuracy_report import interval_words
from masm_jax.benchmark.tables import markdown
from masm_jax.data import records as records_lib
from masm_jax.evaluation import tables
from masm_jax.evaluation.metrics import dice
from masm_jax.files import as_path, check_output, replacing
from masm_jax.inference.postprocess import decode
from masm_jax.inference.volume import (
    FAILURES,
    check_task,
    decoding,
    failure,
    load_run,
    trained_on,
)  # fmt: skip

_log = logging.getLogger("masm_jax.subsets")  # run as a module, __name__ is "__main__"


def main(argv=None):
    """Flags in, exit code out."""
    parser = Parser(
        prog="python -m masm_jax.subsets", description="Dice for every subset of the modalities."
    )
    parser.add_argument(
        "--workdir", action="append", required=True, help="a run, or runs in folders seed-0, "
        "seed-1, ... as a sweep leaves them; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="folder for table and picture")
    parser.add_argument("--records", help="records, where not those the run was trained on")
    parser.add_argument(
        "--split", choices=("val", "test", "all"), default="val",
        help="cases of the first run, or all of the records (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=0, help="how many of them (0: all)")
    args = parser.parse_args(argv)
    runtime.start()
    return runtime.command("subsets", _run, args)


def _run(args):
    check_output(args.output)
    groups, segmenters = {name: runs(name) for name in args.workdir}, {}
    configs = {run: run_config.load(run) for run in itertools.chain(*groups.values())}
    records = _records(args, configs)
    for workdir in configs:
        segmenter, meta = _loaded(workdir)
        segmenters[workdir] = segmenter
        check_task(
            meta, modalities=records.modalities, regions=records.regions, spacing=records.spacing,
            where=records.root,
        )  # fmt: skip
    cases = _cases(args, next(iter(segmenters)), records)
    trained = {run: trained_on(run, configs[run], records, cases) for run in segmenters}
    for workdir, seen in trained.items():
        if seen:
            _log.warning("%s: %d of %d cases were trained on", workdir, len(seen), len(cases))
    scores, failed = {}, {}
    for number, (workdir, segmenter) in enumerate(segmenters.items(), 1):
        _log.info("run %d of %d: %s", number, len(segmenters), workdir)
        scores[workdir] = measure(segmenter, records, cases, failed)
    kept = [place for place, case in enumerate(cases) if case not in failed]
    said = [f"failed: {case}: {why}" for case, why in failed.items()]
    if not kept:
        raise ValueError(f"no case could be segmented with every run: {'; '.join(said)}")
    cases = [cases[place] for place in kept]
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    found = {
        "cases": cases,
        "modalities": list(records.modalities),
        "regions": list(records.regions),
        "without": _without(records, cases),
        "runs": {
            name: {
                "workdirs": [str(workdir) for workdir in group],
                "trained_for_it": all(segmenters[run].settings.may_lack for run in group),
                "trained_on": sorted(set(itertools.chain(*(trained[run] for run in group)))),
                "dice": {
                    "+".join(subset): [scores[run][subset][kept].tolist() for run in group]
                    for subset in subsets(records.modalities)
                },
            }
            for name, group in groups.items()
        },
    }
    found["differences"] = differences(found["runs"])
    with replacing(output / "subsets.json") as temporary:
        temporary.write_text(json.dumps(tables.finite(found), indent=2) + "\n")
    lines = table(found)
    with replacing(output / "subsets.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for kind in ("png", "svg"):
        with replacing(output / f"subsets.{kind}") as temporary:
            _picture(found).savefig(temporary, format=kind, dpi=150)
    print("\n".join(lines))
    for line in said:
        print(line, file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def runs(workdir):
    """[the run itself], or the seeds of a row of a sweep; the former where neither is there."""
    path = as_path(workdir)
    seeds = [file.parent for file in path.glob("seed-*/config.json")]
    if (path / "config.json").exists() or not seeds:
        folds = sorted(path.glob("seed-*/fold-*/config.json"))
        if folds and not (path / "config.json").exists():
            raise ValueError(
                f"--workdir={workdir}: its runs are of several folds, each with cases of its own; "
                f"expected one of them, such as {folds[0].parent}"
            )
        return [path]
    return sorted(seeds, key=lambda seed: (len(seed.name), seed.name))


def _loaded(workdir):
    """``load_run`` of a run of train.py, or of one in PyTorch (``benchmark accuracy``)."""
    if not (workdir / "network.json").is_file():
        return load_run(workdir)
    try:
        from masm_jax.benchmark import torch_train  # needs torch
    except ImportError as error:
        raise ValueError(f"{workdir} is a run in PyTorch ({error}): make bench-env") from error
    return torch_train.load_run(workdir)


def _records(args, configs):
    """Those of --records, or of the runs, which must have the same."""
    if args.records:
        return records_lib.Records(args.records)
    first, *others = configs
    root = configs[first].data.records
    for run in others:
        its = configs[run].data.records
        if pathlib.Path(its).resolve() != pathlib.Path(root).resolve():
            raise ValueError(
                f"{run} was trained on the records {its}, {first} on {root}; expected the same for "
                f"all; name those to compare on by --records"
            )
    return records_lib.Records(root)


def _cases(args, first, records):
    if args.cases < 0:
        raise ValueError(f"--cases={args.cases}: expected a number of them, or 0: all")
    if args.split == "all":
        named = records.cases
    else:
        split = records_lib.read_split(first)
        named = split.get(args.split, [])
    named = [case for case in named if case in records.cases]
    if not named:
        raise ValueError(
            f"--split={args.split}: {first} has no such cases in {records.root}; "
            f"--split=all takes all of the records"
        )
    named = named[: args.cases or None]
    if unlabelled := [case for case in named if records.label(case) is None]:
        raise ValueError(
            f"{records.root}: {', '.join(unlabelled[:3])} without segmentation; expected cases "
            f"that can be scored"
        )
    return named


def subsets(modalities):
    """All non-empty subsets: the whole first, then smaller and smaller."""
    sizes = range(len(modalities), 0, -1)
    return [s for size in sizes for s in itertools.combinations(modalities, size)]


def measure(segmenter, records, cases, failed):
    """Dice of every subset.

    Args:
      segmenter: of ``load_run``.
      records: the records.
      cases: ids with a segmentation.
      failed: {case: why} of those that could not be segmented; not tried again, and added to.

    Returns:
      {names of the modalities that are there: (cases, R) float array}, NaN of cases that failed.
    """
    regions = segmenter.settings.regions
    shape = len(cases), len(regions)
    found = {subset: np.full(shape, np.nan) for subset in subsets(segmenter.settings.modalities)}
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        if case in failed:
            continue
        try:
            image, reference = records.image(case), np.asarray(records.label(case))
            rules = decoding(segmenter.settings, records.meta(case)["record_spacing"])
            for subset, rows in found.items():
                probabilities = segmenter.probabilities(image, present=subset)
                predicted = decode(probabilities, regions=regions, **rules)
                rows[number - 1] = [
                    dice(np.isin(predicted, values), np.isin(reference, values))
                    for values in regions.values()
                ]
        except FAILURES as error:
            failed[case] = failure(error)
        left = (time.perf_counter() - began) / number * (len(cases) - number)
        said = f": {failed[case]}" if case in failed else ""
        _log.info("%d/%d %s  left %.0f s%s", number, len(cases), case, left, said)
    return found


def _without(records, cases):
    """{region: cases that have none of it}, empty for most."""
    values = {case: np.unique(records.label(case)) for case in cases}
    return {
        region: [case for case in cases if not np.isin(values[case], own).any()]
        for region, own in records.regions.items()
    }


def _absent(run, found):
    """``compare.absent`` over subsets and seeds."""
    cells = [(c, r, found["without"][r]) for c in found["cases"] for r in found["regions"]]
    return compare.absent(
        [
            {
                (case, region): {"dice": value, "reference_ml": float(case not in lacking)}
                for (case, region, lacking), value in zip(cells, np.ravel(dice).tolist())
            }
            for seeds in run["dice"].values()
            for dice in seeds
        ]
    )


def differences(runs):
    """How far the first is from each other one: {name: ``compare.crossed``}.

    Of the mean over subsets and regions, paired by case, and by seed where both have several runs.

    Args:
      runs: {name: {"workdirs", "dice": {subset: (runs, cases, R)}}}, the first first.
    """
    means = {
        name: {
            pathlib.PurePath(workdir).name if len(run["workdirs"]) > 1 else "": values
            for workdir, values in zip(
                run["workdirs"], np.mean(list(run["dice"].values()), axis=(0, -1))
            )
        }
        for name, run in runs.items()
    }
    first, found = next(iter(means.values())), {}
    for name, other in list(means.items())[1:]:
        if both := [seed for seed in first if seed in other]:
            found[name] = compare.crossed([first[seed] - other[seed] for seed in both])
    return found


def table(found):
    """Lines of a Markdown table: mean Dice of cases and seeds, a row for every subset."""
    runs, regions, modalities = found["runs"], found["regions"], found["modalities"]
    lines = [f"{len(found['cases'])} cases, mean Dice; ● is there, ○ is missing.", ""]
    names = _names(runs)
    heads = [*modalities, *(f"{names[run]} {r}" for run in runs for r in (*regions, "mean"))]
    rows, cells = {}, []
    for run in runs.values():
        for subset, scores in run["dice"].items():
            means = np.mean(scores, axis=(0, 1))
            rows.setdefault(subset, []).extend([*means, means.mean()])
    for subset, values in rows.items():
        there = ["●" if name in subset.split("+") else "○" for name in modalities]
        cells.append([*there, *(f"{v:.3f}" for v in values)])
    means = np.mean(list(rows.values()), axis=0)
    blank = ["mean", *[""] * (len(modalities) - 1)]
    cells.append([*blank, *(f"{v:.3f}" for v in means)])
    lines += [*markdown(heads, cells), ""]
    first = names[next(iter(runs))]
    for run, row in found["differences"].items():
        lines.append(
            f"{first} minus {names[run]}, over all subsets: {interval_words(row)}, 95 % over cases"
            + (f" and {row['seeds']} seeds." if row["seeds"] > 1 else ", one training each.")
        )
    lines += compare.absent_lines({names[name]: _absent(run, found) for name, run in runs.items()})
    never = [names[name] for name, run in runs.items() if not run["trained_for_it"]]
    if never:
        lines.append(f"Never lost a modality in training: {', '.join(never)}.")
    seen = [f"{names[n]} ({len(r['trained_on'])})" for n, r in runs.items() if r["trained_on"]]
    if seen:
        lines.append(f"Trained on some of these cases, which flatters: {', '.join(seen)}.")
    return lines if lines[-1] else lines[:-1]


def _names(runs):
    """{run: as short a name as tells it from the others}."""
    parts = {run: pathlib.PurePath(run).parts for run in runs}
    for count in range(1, max(map(len, parts.values()))):
        names = {run: "/".join(own[-count:]) for run, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: run for run in runs}


def _picture(found):
    """A heat map per run: subsets down, regions across."""
    runs, modalities, names = found["runs"], found["modalities"], _names(found["runs"])
    figure = matplotlib.figure.Figure(
        figsize=(2.2 + 2.2 * len(runs), 1.2 + 0.32 * (2 ** len(modalities) - 1)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axes, (workdir, run) in zip(panels, runs.items()):
        means = np.array([np.mean(scores, axis=(0, 1)) for scores in run["dice"].values()])
        drawn = axes.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(means):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
        axes.set_xticks(range(means.shape[1]), found["regions"])
        axes.set_yticks(range(len(means)), [name.replace("+", " ") for name in run["dice"]])
        axes.set_title(names[workdir], size=10)
    figure.colorbar(drawn, ax=panels, label="mean Dice", shrink=0.6)
    return figure


if __name__ == "__main__":
    sys.exit(main())
