"""Choose how probabilities become labels, on the validation cases of one run or of all folds.

    python -m masm_jax.tune --workdir=runs/cv/0 [--workdir=runs/cv/1 ...] [--flips] [--dry_run]

Every case is segmented once. Then thresholds per region, the smallest volume of the last region
(enhancing tumour), keeping the largest part and filling holes are tried one after the other, as
often as one of them raises the mean Dice of all cases and regions by at least 0.001, in the grid of
the records. What was chosen goes to infer.json in every WORKDIR, where ``eval.py`` and
``masm_jax.predict`` find it; what every single value alone would have changed is printed. Exit
codes: 0 done, 1 an error, 2 usage.

A gain on the cases it was chosen on is flattering. The gain printed beside it was found on other
cases: chosen on four fifths of them, measured on the fifth, in turn.
"""

import datetime
import json
import logging
import pathlib
import sys
import time
import types

import numpy as np

from masm_jax import run_config, runtime
from masm_jax.arguments import Parser
from masm_jax.data import records as records_lib
from masm_jax.evaluation import tables
from masm_jax.evaluation.metrics import dice
from masm_jax.evaluation.surfaces import joint_box
from masm_jax.files import replacing
from masm_jax.inference import postprocess
from masm_jax.inference.volume import check_task, decoding, load_run

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
MINIMUM_ML = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
LEAST_GAIN = 0.001  # of the mean Dice; less is noise, and every rule is one more thing to explain
PARTS = 5
_RULES = ("threshold", "minimum_ml", "largest_component", "fill_holes")
_log = logging.getLogger("masm_jax.tune")  # run as a module, __name__ is "__main__"


class Case:
    """The probabilities of a case, cut to where they or the reference say something.

    Args:
        name: of the case.
        probabilities: (R, D, H, W) float32.
        label: (D, H, W) uint8 internal labels.
        spacing: mm.
        regions: region -> internal values.
    """

    def __init__(self, name, probabilities, label, spacing, regions):
        likely = probabilities.max(0) > 0.1  # below all thresholds in use
        box = joint_box(likely, label, margin=1)  # a hole must not become open at the edge
        self.name, self.spacing, self._regions = name, spacing, regions
        self._probabilities = probabilities[(slice(None), *box)].astype(np.float16)
        self._label, self._scores = np.asarray(label[box]), {}

    def dice(self, infer):
        """Dice of every region under the rules of a config's ``infer``; kept, as it is asked often.

        Args:
            infer: dict of the keys that ``decoding`` reads.
        """
        key = json.dumps(infer, sort_keys=True)
        if key not in self._scores:
            rules = decoding(types.SimpleNamespace(**infer), self.spacing)
            predicted = postprocess.decode(self._probabilities, regions=self._regions, **rules)
            self._scores[key] = [
                dice(np.isin(predicted, values), np.isin(self._label, values))
                for values in self._regions.values()
            ]
        return self._scores[key]


def choose(cases, infer, regions):
    """Coordinate ascent over the rules.

    Args:
        cases: list of ``Case``.
        infer: dict of the rules to start from.
        regions: number of regions.

    Returns:
        The best rules found, a dict as ``infer``.
    """
    best, score = infer, mean_dice(cases, infer).mean()
    improved = True
    while improved:
        improved = False
        for _, candidates in steps(best, regions):
            scores = [mean_dice(cases, candidate).mean() for candidate in candidates]
            place = int(np.argmax(scores))
            if scores[place] >= score + LEAST_GAIN:
                best, score, improved = candidates[place], scores[place], True
    return best


def steps(infer, regions):
    """What may be changed next: (what, [rules, ...]) per rule; all but one key as in ``infer``."""
    current = tuple(infer["threshold"])
    current = current * regions if len(current) == 1 else current
    for index in range(regions):
        tuples = [(*current[:index], t, *current[index + 1 :]) for t in THRESHOLDS]
        yield f"threshold {index}", [infer | {"threshold": thresholds} for thresholds in tuples]
    yield "minimum_ml", [infer | {"minimum_ml": ml} for ml in MINIMUM_ML]
    yield "largest_component", [infer | {"largest_component": on} for on in (False, True)]
    yield "fill_holes", [infer | {"fill_holes": on} for on in (False, True)]


def mean_dice(cases, infer):
    """(R,) mean over the cases."""
    return np.mean([case.dice(infer) for case in cases], axis=0)


def cross_fitted(cases, infer, regions):
    """Mean Dice (R,) where the rules for each part of the cases were chosen on the others."""
    parts = min(PARTS, len(cases))
    scores = []
    for part in range(parts):
        others = [case for i, case in enumerate(cases) if i % parts != part]
        chosen = choose(others, infer, regions)
        scores += [case.dice(chosen) for case in cases[part::parts]]
    return np.mean(scores, axis=0)


def main(argv=None):
    """Flags in, exit code out."""
    parser = Parser(
        prog="python -m masm_jax.tune", description="Choose thresholds and small-component rules."
    )
    parser.add_argument(
        "--workdir", action="append", required=True, help="a run; once for each fold"
    )
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    parser.add_argument("--records", help="records, where not those the run was trained on")
    parser.add_argument(
        "--flips", action="store_true", help="also measure averaging over 8 mirrored views"
    )
    parser.add_argument("--dry_run", action="store_true", help="print, and write nothing")
    args = parser.parse_args(argv)
    runtime.start()
    return runtime.command("tune", _tune, args)


def _tune(args):
    cases, mirrored, infer, names = [], [], None, []
    for workdir in map(pathlib.Path, args.workdir):
        segmenter, meta = load_run(workdir, which=args.checkpoint)
        config = run_config.load(workdir, tuned=False)  # not what was chosen before
        names = list(segmenter.settings.regions)
        own = {key: run_config.to_dict(config.infer)[key] for key in _RULES}
        if infer not in (None, own):
            raise ValueError(
                f"{workdir}: infer is {own}, of {args.workdir[0]} {infer}; expected folds that "
                f"differ in nothing but their cases; delete {run_config.TUNED} from all of them"
            )
        infer = own
        records = records_lib.Records(args.records or config.data.records)
        check_task(
            meta, modalities=records.modalities, regions=records.regions, spacing=records.spacing,
            where=records.root,
        )  # fmt: skip
        validation = records_lib.read_split(workdir)["val"]
        twice = sorted({case.name for case in cases} & set(validation))
        if twice:
            raise ValueError(
                f"{workdir}: {', '.join(twice[:3])} validate another --workdir too; expected folds "
                f"of one split, in which every case is validated once"
            )
        cases += _segmented(segmenter, records, validation)
        if args.flips:
            given = ["infer.flips=0,1,2"]
            segmenter, _ = load_run(workdir, which=args.checkpoint, given=given)
            mirrored += _segmented(segmenter, records, validation)
    if not cases:
        raise ValueError(f"{', '.join(args.workdir)}: no validation cases in split.json")

    started = mean_dice(cases, infer)
    chosen = choose(cases, infer, len(names))
    after = mean_dice(cases, chosen)
    honest = cross_fitted(cases, infer, len(names)) if len(cases) > 1 else None
    tried = [("as configured", infer, started)]
    for _, candidates in steps(infer, len(names)):
        tried += [
            (_changes(infer, c), c, mean_dice(cases, c)) for c in candidates if _changes(infer, c)
        ]
    tried.append(("chosen: " + (_changes(infer, chosen) or "nothing"), chosen, after))
    if honest is not None:
        tried.append((f"chosen on other cases ({min(PARTS, len(cases))} parts)", None, honest))
    if args.flips:
        tried.append(("flips=0,1,2, else as configured", infer, mean_dice(mirrored, infer)))
    print(_table(names, tried, started))
    print(f"mean Dice of {len(cases)} cases in the grid of the records")
    if len(cases) < 10:
        print(f"{len(cases)} cases say little: expected at least 10, better all folds")
    if args.dry_run:
        return 0
    result = {
        "infer": chosen,
        "dice": dict(zip(names, after)) | {"mean": after.mean()},
        "dice_before": dict(zip(names, started)) | {"mean": started.mean()},
        "dice_chosen_on_other_cases": None
        if honest is None
        else dict(zip(names, honest)) | {"mean": honest.mean()},
        "cases": [case.name for case in cases],
        "runs": args.workdir,
        "checkpoint": args.checkpoint,
        "date": datetime.date.today().isoformat(),
    }
    for workdir in map(pathlib.Path, args.workdir):
        with replacing(workdir / run_config.TUNED) as temporary:
            temporary.write_text(json.dumps(tables.finite(result), indent=2) + "\n")
        print(f"written: {workdir / run_config.TUNED}; delete it to go back to the config")
    return 0


def _segmented(segmenter, records, names):
    """The cases of one run, with a line for each."""
    regions = segmenter.settings.regions
    began, cases = time.perf_counter(), []
    for number, name in enumerate(names, 1):
        label = records.label(name)
        if label is None:
            raise ValueError(f"{name}: its record has no segmentation; expected one to compare")
        probabilities = segmenter.probabilities(records.image(name))
        spacing = records.meta(name)["record_spacing"]
        cases.append(Case(name, probabilities, np.asarray(label), spacing, regions))
        left = (time.perf_counter() - began) / number * (len(names) - number)
        _log.info("%d/%d %s segmented  left %.0f s", number, len(names), name, left)
    return cases


def _changes(old, new):
    return ", ".join(f"{key}={new[key]}" for key in _RULES if _list(new[key]) != _list(old[key]))


def _list(value):
    """Tuples and lists alike; one threshold is not three equal ones, but means the same."""
    value = list(value) if isinstance(value, list | tuple) else value
    return value[:1] if isinstance(value, list) and len(set(value)) == 1 else value


def _table(names, tried, started):
    width = max(len(words) for words, *_ in tried)
    lines = ["  ".join([" " * width, *(f"{name:<6}" for name in names), "mean    change"])]
    for words, _, scores in tried:
        cells = "  ".join(f"{score:<6.3f}" for score in scores)
        change = scores.mean() - started.mean()
        lines.append(f"{words:<{width}}  {cells}  {scores.mean():<6.3f}  {change:+.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
