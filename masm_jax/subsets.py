"""What is lost when scans are missing: Dice for every subset of the modalities.

    python -m masm_jax.subsets --workdir=RUN [--workdir=RUN2 ...] --output=OUT [--split=val]

Each case is segmented once for every non-empty subset (15 of four modalities), as if the others had
not been acquired. Several runs on the same cases, such as MASM and the concatenation U-Net, stand
side by side. Writes OUT/subsets.md, .json, .png and .svg. A run that never lost a modality in
training (data.modality_dropout = 0) is measured all the same, and marked.

Exit codes: 0 done, 1 an error, 2 usage.
"""

import itertools
import json
import logging
import pathlib
import sys
import time

import matplotlib.figure
import numpy as np

from masm_jax import config as config_lib
from masm_jax import runtime
from masm_jax.arguments import Parser
from masm_jax.data import records as records_lib
from masm_jax.evaluation import tables
from masm_jax.evaluation.metrics import dice
from masm_jax.files import replacing, told
from masm_jax.inference.postprocess import decode
from masm_jax.inference.volume import check_task, decoding, load_run

_log = logging.getLogger("masm_jax.subsets")  # run as a module, __name__ is "__main__"


def main(argv=None):
    """Flags in, exit code out."""
    parser = Parser(
        prog="python -m masm_jax.subsets", description="Dice for every subset of the modalities."
    )
    parser.add_argument("--workdir", action="append", required=True, help="a run; may be repeated")
    parser.add_argument("--output", required=True, help="folder for table and picture")
    parser.add_argument("--records", help="records, where not those the run was trained on")
    parser.add_argument(
        "--split", choices=("val", "test", "all"), default="val",
        help="cases of the first run, or all of the records (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=0, help="how many of them (0: all)")
    args = parser.parse_args(argv)
    runtime.start()
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"subsets: {told(error)}", file=sys.stderr)
        return runtime.EXIT_ERROR


def _run(args):
    runs = {}
    for workdir in args.workdir:
        segmenter, meta = load_run(workdir)
        runs[workdir] = segmenter
        records = records_lib.Records(args.records or config_lib.load(workdir).data.records)
        check_task(
            meta, modalities=records.modalities, regions=records.regions, spacing=records.spacing,
            where=records.root,
        )  # fmt: skip
    cases = _cases(args, records)
    scores = {workdir: measure(segmenter, records, cases) for workdir, segmenter in runs.items()}
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    found = {
        "cases": cases,
        "modalities": list(records.modalities),
        "regions": list(records.regions),
        "runs": {
            workdir: {
                "trained_for_it": runs[workdir].settings.may_lack,
                "dice": {"+".join(subset): rows.tolist() for subset, rows in own.items()},
            }
            for workdir, own in scores.items()
        },
    }
    with replacing(output / "subsets.json") as temporary:
        temporary.write_text(json.dumps(tables.finite(found), indent=2) + "\n")
    lines = table(found)
    with replacing(output / "subsets.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    for kind in ("png", "svg"):
        with replacing(output / f"subsets.{kind}") as temporary:
            _picture(found).savefig(temporary, format=kind, dpi=150)
    print("\n".join(lines))
    return 0


def _cases(args, records):
    if args.split == "all":
        named = records.cases
    else:
        split = records_lib.read_split(args.workdir[0])
        named = split.get(args.split, [])
    named = [case for case in named if case in records.cases]
    if not named:
        raise ValueError(
            f"--split={args.split}: {args.workdir[0]} has no such cases in {records.root}; "
            f"--split=all takes all of the records"
        )
    return named[: args.cases or None]


def subsets(modalities):
    """All non-empty subsets: the whole first, then smaller and smaller."""
    sizes = range(len(modalities), 0, -1)
    return [s for size in sizes for s in itertools.combinations(modalities, size)]


def measure(segmenter, records, cases):
    """Dice of every subset.

    Args:
      segmenter: of ``load_run``.
      records: the records.
      cases: ids with a segmentation.

    Returns:
      {names of the modalities that are there: (cases, R) float array}.
    """
    settings = segmenter.settings
    found = {subset: [] for subset in subsets(settings.modalities)}
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        label = records.label(case)
        if label is None:
            raise ValueError(f"{case}: its record has no segmentation; expected one to compare")
        image, reference = records.image(case), np.asarray(label)
        rules = decoding(settings, records.meta(case)["record_spacing"])
        for subset, rows in found.items():
            probabilities = segmenter.probabilities(image, present=subset)
            predicted = decode(probabilities, regions=settings.regions, **rules)
            rows.append(
                [
                    dice(np.isin(predicted, values), np.isin(reference, values))
                    for values in settings.regions.values()
                ]
            )
        left = (time.perf_counter() - began) / number * (len(cases) - number)
        _log.info("%d/%d %s  left %.0f s", number, len(cases), case, left)
    return {subset: np.array(rows) for subset, rows in found.items()}


def table(found):
    """Lines of a Markdown table: mean Dice of the cases, a row for every subset."""
    runs, regions, modalities = found["runs"], found["regions"], found["modalities"]
    lines = [f"{len(found['cases'])} cases, mean Dice; ● is there, ○ is missing.", ""]
    names = [pathlib.Path(run).name for run in runs]
    heads = [*modalities, *(f"{name} {r}" for name in names for r in (*regions, "mean"))]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    rows = {}
    for run in runs.values():
        for subset, scores in run["dice"].items():
            means = np.mean(scores, axis=0)
            rows.setdefault(subset, []).extend([*means, means.mean()])
    for subset, values in rows.items():
        there = ["●" if name in subset.split("+") else "○" for name in modalities]
        lines.append("| " + " | ".join([*there, *(f"{v:.3f}" for v in values)]) + " |")
    means = np.mean(list(rows.values()), axis=0)
    blank = ["mean", *[""] * (len(modalities) - 1)]
    lines.append("| " + " | ".join([*blank, *(f"{v:.3f}" for v in means)]) + " |")
    never = [name for name, run in zip(names, runs.values()) if not run["trained_for_it"]]
    if never:
        lines += ["", f"Never lost a modality in training: {', '.join(never)}."]
    return lines


def _picture(found):
    """A heat map per run: subsets down, regions across."""
    runs, modalities = found["runs"], found["modalities"]
    figure = matplotlib.figure.Figure(
        figsize=(2.2 + 2.2 * len(runs), 1.2 + 0.32 * (2 ** len(modalities) - 1)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axes, (workdir, run) in zip(panels, runs.items()):
        means = np.array([np.mean(scores, axis=0) for scores in run["dice"].values()])
        drawn = axes.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(means):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
        axes.set_xticks(range(means.shape[1]), found["regions"])
        axes.set_yticks(range(len(means)), [name.replace("+", " ") for name in run["dice"]])
        axes.set_title(pathlib.Path(workdir).name, size=10)
    figure.colorbar(drawn, ax=panels, label="mean Dice", shrink=0.6)
    return figure


if __name__ == "__main__":
    sys.exit(main())
