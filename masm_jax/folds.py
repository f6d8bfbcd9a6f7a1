"""Gather the folds of a cross-validation into one evaluation.

    for K in 0 1 2 3 4; do
        python train.py --config=configs/masm_brats.py --workdir=runs/cv/$K --config.data.split=$K/5
        python eval.py --workdir=runs/cv/$K --split=val --output=runs/cv/$K/eval
    done
    python -m masm_jax.folds runs/cv/0 runs/cv/1 ... --output=runs/cv/all

Each case is scored by the network that has not seen it. OUT gets metrics.csv and lesions.csv with a
column for the fold, and summary.json; ``masm_jax.compare`` takes OUT for a run. Refused: a case
that no fold validates or two do, folds of different splits, runs of different configs. Exit codes:
0 done, 1 an error, 2 usage, 3 done, but some cases had failed in ``eval.py``.
"""

import json
import pathlib
import sys

from masm_jax import run_config, runtime
from masm_jax.arguments import Parser
from masm_jax.data import records
from masm_jax.evaluation import tables
from masm_jax.files import check_output

DIFFER = ("data.split:", "seed:")  # what may differ between folds, beside what is free to change


def gather(runs):
    """Read the evaluations of all folds.

    Args:
        runs: folders of runs, each with its evaluation on ``val`` in ``eval/``.

    Returns:
        rows, lesions (of metrics.csv and lesions.csv, with "fold": the folder of the run), failed
        {case: reason}.

    Raises:
        ValueError: the runs are not the folds of one cross-validation.
    """
    rows, lesions, failed, seen, first, evaluated = [], [], {}, {}, None, None
    for run in map(pathlib.Path, runs):
        config = run_config.to_dict(run_config.load(run))
        split = records.read_split(run)
        own = set(split["train"]) | set(split["val"])
        first = first or (run, config, own)
        _check_like(run, config, own, first)
        for case in split["val"]:
            if case in seen:
                raise ValueError(
                    f"{case} validates {seen[case]} and {run}; expected every case in one fold: "
                    f"train all with one --config.data.split_seed and split=0/N to N-1/N"
                )
            seen[case] = run
        summary = _summary(run)
        failed |= summary["failed"]
        how = {key: summary.get(key) for key in ("infer", "evaluation", "checkpoint", "grid")}
        evaluated = evaluated or how
        for key, value in how.items():
            if value != evaluated[key]:
                raise ValueError(
                    f"{run / 'eval'} has {key} {value}, {first[0] / 'eval'} {evaluated[key]}; "
                    f"expected folds evaluated alike; evaluate again"
                )
        table, listed = (
            tables.read_csv(run / "eval" / name) for name in ("metrics.csv", "lesions.csv")
        )
        scored = {row["case"] for row in table}
        missing = sorted(set(split["val"]) - scored - failed.keys())
        if missing or scored - set(split["val"]):
            raise ValueError(
                f"{run / 'eval'}: scored {len(scored)} cases, expected the {len(split['val'])} of "
                f"its val in split.json; evaluate again with --split=val"
            )
        rows += [row | {"fold": str(run)} for row in table]
        lesions += [row | {"fold": str(run)} for row in listed]
    unseen = sorted(first[2] - seen.keys())
    if unseen:
        raise ValueError(
            f"{len(unseen)} of {len(first[2])} cases validate no fold ({', '.join(unseen[:3])}"
            f"{' ...' if len(unseen) > 3 else ''}); give all folds"
        )
    return rows, lesions, failed


def main(argv=None):
    """Flags in, exit code out."""
    parser = Parser(
        prog="python -m masm_jax.folds", description="Gather the folds of a cross-validation."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of the folds' runs")
    parser.add_argument("--output", required=True, help="folder for the tables of all folds")
    args = parser.parse_args(argv)
    return runtime.command("folds", _run, args)


def _run(args):
    check_output(args.output)
    rows, lesions, failed = gather(args.runs)
    output = pathlib.Path(args.output)
    summary = tables.summarise(rows)
    folds = {}
    for fold in dict.fromkeys(row["fold"] for row in rows):
        own = tables.summarise([row for row in rows if row["fold"] == fold])
        folds[fold] = {"cases": own["cases"], "average": own["average"]}
    summary |= {"folds": folds, "runs": args.runs, "failed": failed}
    tables.write_metrics_csv(output / "metrics.csv", rows)
    tables.write_metrics_csv(output / "lesions.csv", lesions)
    tables.write_summary_json(output / "summary.json", summary)
    print(tables.format_table(summary))
    for fold, own in folds.items():
        print(f"fold {fold}: {own['cases']} cases, mean Dice {own['average']['dice']:.3f}")
    print(f"{output}: metrics.csv, lesions.csv, summary.json")
    for case, reason in failed.items():
        print(f"failed: {case}: {reason}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _check_like(run, config, cases, first):
    other, expected, its_cases = first
    changes = run_config.differences(expected, config)
    changes = [line for line in changes if not line.startswith(DIFFER)]
    if changes:
        listed = "\n  ".join(changes)
        raise ValueError(f"{run} and {other} differ in more than the fold:\n  {listed}")
    if cases != its_cases:
        raise ValueError(
            f"{run} was trained and validated on {len(cases)} cases, {other} on {len(its_cases)}; "
            f"expected the same cases: folds of one set of records"
        )


def _summary(run):
    path = run / "eval" / "summary.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; evaluate the fold first: python eval.py --workdir={run} "
            f"--split=val --output={run / 'eval'}"
        )
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
