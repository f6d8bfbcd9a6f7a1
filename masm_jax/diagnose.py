"""Why does it segment badly? The failure signatures of a trained run, one by one.

    python -m masm_jax.diagnose RUN [--records=DIR] [--split=val] [--cases=4] [--output=DIR]

Looks at: the patch shifts (a self-check), the masks (what they keep without noise, and the Dice
with those of a level switched off), fine detail (errors by distance from the surface, small parts,
the Dice without the skip of each level), the training's log, empty predictions. Writes OUTPUT
(RUN/diagnose) with diagnose.html, findings in plain words with what to do, and findings.json. Dice
is in the grid of the records. Each case is segmented up to twelve times.

Exit codes: 0 done (whatever was found), 1 an error, 2 usage.
"""

import copy
import dataclasses
import json
import logging
import math
import pathlib
import sys
import time

import numpy as np

from masm_jax import run_config, runtime
from masm_jax.arguments import Parser
from masm_jax.data import records as records_lib
from masm_jax.evaluation import diagnosis_page, findings, tables
from masm_jax.files import as_path, check_output, replacing
from masm_jax.inference.postprocess import decode
from masm_jax.inference.volume import check_task, decoding, load_run
from masm_jax.models.mosaic import learnt_edge
from masm_jax.steps import keep_names, keep_step

_log = logging.getLogger("masm_jax.diagnose")  # run as a module, __name__ is "__main__"
KEEP_ALL = 1e4  # added to the logit of "keep"


def main(argv=None):
    """Flags in, exit code out."""
    parser = Parser(
        prog="python -m masm_jax.diagnose", description="Failure signatures of a trained run."
    )
    parser.add_argument("run", help="folder written by train.py")
    parser.add_argument("--records", help="records, where not those the run was trained on")
    parser.add_argument(
        "--split", choices=("val", "test", "train", "all"), default="val",
        help="cases of the run's split.json, or all of the records (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=4, help="how many of them (%(default)s)")
    parser.add_argument("--output", help="folder of the page (RUN/diagnose)")
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error(f"--cases={args.cases}: expected 1 or more")
    runtime.start()
    return runtime.command("diagnose", _run, args)


def _run(args):
    workdir = as_path(args.run)
    output = pathlib.Path(args.output or workdir / "diagnose")
    check_output(output)
    config = run_config.load(workdir)
    segmenter, meta = load_run(workdir)
    segmenter = getattr(segmenter, "segmenters", [segmenter])[0]  # of several runs the first
    records = records_lib.Records(args.records or config.data.records)
    check_task(
        meta, modalities=records.modalities, regions=records.regions, spacing=records.spacing,
        where=records.root,
    )  # fmt: skip
    cases = _cases(args, workdir, records)
    measured = measure(segmenter, records, cases)
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {
        "run": str(workdir), "step": meta["step"], "cases": cases, **measured,
        "findings": [dataclasses.asdict(finding) for finding in judge(config, measured, log)],
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "findings.json") as temporary:
        temporary.write_text(json.dumps(tables.finite(found), indent=1) + "\n")
    diagnosis_page.write(output / "diagnose.html", found, log)
    for finding in found["findings"]:
        print(f"{finding['level']:>12}  {finding['signature']}: {finding['seen']}")
        if finding["advice"]:
            print(f"{'':>12}  -> {finding['advice']}")
    print(f"{output}: diagnose.html, findings.json")
    return 0


def _cases(args, workdir, records):
    named = records.cases
    if args.split != "all":
        named = records_lib.read_split(workdir).get(args.split, [])
    named = [
        case for case in named if case in records.cases and records.label(case) is not None
    ]  # fmt: skip
    if not named:
        raise ValueError(
            f"--split={args.split}: {workdir} has no such cases with a segmentation in "
            f"{records.root}; --split=all takes all of the records"
        )
    return named[: args.cases]


# ---------------------------------------------------------------- measuring


def measure(segmenter, records, cases):
    """Segment cases as trained and with parts switched off.

    Args:
      segmenter: of ``load_run``, of one run.
      records: the records.
      cases: ids with a segmentation.

    Returns:
      {"dice": {region: mean}, "mean": float, "kept": {"level1/t1": {"all", "brain", "tumour"}},
      "masks_off", "skips_off": {level: mean Dice}, "shells": {region: findings.shells}, "parts":
      {region: findings.parts}, "missed", "have": {region: cases}}.
    """
    settings, params = segmenter.settings, segmenter.params
    regions = settings.regions
    off = {f"masks {level}": change for level, change in without_masks(params).items()}
    mixers = segmenter.network.config.model.mixers
    off |= {f"skips {level}": change for level, change in without_skips(params, mixers).items()}
    names = keep_names(segmenter.network)
    channels = {"/".join(name): () for name in names}
    keeper = names and segmenter.another(
        keep_step(segmenter.network), dataclasses.replace(settings, regions=channels, flips=())
    )
    rows, kept = {"as trained": [], **{name: [] for name in off}}, {name: [] for name in channels}
    shells, lesions = {name: [] for name in regions}, {name: [] for name in regions}
    missed, have = dict.fromkeys(regions, 0), dict.fromkeys(regions, 0)
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        image, label = records.image(case), np.asarray(records.label(case))
        spacing = records.meta(case)["record_spacing"]

        def segmented(image=image, spacing=spacing):
            probabilities = segmenter.probabilities(image)
            return decode(probabilities, regions=regions, **decoding(settings, spacing))

        internal = segmented()
        rows["as trained"].append(findings.scores(internal, label, regions))
        for name, values in regions.items():
            predicted, reference = np.isin(internal, values), np.isin(label, values)
            if not reference.any():
                continue
            have[name] += 1
            shells[name].append(findings.shells(predicted, reference, spacing))
            lesions[name] += findings.parts(predicted, reference, math.prod(spacing) / 1000)
            missed[name] += not predicted.any()
        for name, changed in off.items():
            segmenter.update(changed)
            rows[name].append(findings.scores(segmented(), label, regions))
        segmenter.update(params)
        if keeper:
            brain, tumour = (np.asarray(image) != 0).any(0), label > 0
            for name, share in zip(channels, keeper.probabilities(image)):
                parts = {"all": share, "brain": share[brain], "tumour": share[tumour]}
                kept[name].append({k: float(v.mean()) for k, v in parts.items() if v.size})
        left = (time.perf_counter() - began) / number * (len(cases) - number)
        _log.info("%d/%d %s  left %.0f s", number, len(cases), case, left)
    means = {name: float(np.mean(scores)) for name, scores in rows.items()}
    return {
        "dice": dict(zip(regions, np.mean(rows["as trained"], axis=0).tolist())),
        "mean": means["as trained"],
        "kept": {name: _averaged(shares) for name, shares in kept.items()},
        "masks_off": _of(means, "masks "),
        "skips_off": _of(means, "skips "),
        "shells": {name: findings.added(own) for name, own in shells.items() if own},
        "parts": {name: own for name, own in lesions.items() if own},
        "missed": missed,
        "have": have,
    }


def without_masks(params):
    """{level: parameters of which the predictor of that level keeps every token}."""
    found = {}
    for level, mixer in params.get("mixers", {}).items():
        if "predictor" in mixer:
            changed = copy.deepcopy(params)
            bias = changed["mixers"][level]["predictor"]["logits"]["bias"]
            changed["mixers"][level]["predictor"]["logits"]["bias"] = bias + np.array(
                [KEEP_ALL, -KEEP_ALL], np.float32
            )
            found[level] = changed
    return found


def without_skips(params, mixers):
    """{level: parameters with which the decoder does not look at the skip of that level}.

    None of a network without ``mixers``. Of the last level, which is all that the decoder starts
    from, it keeps the biases.
    """
    if not mixers:
        return {}
    found = {}
    for number in params["decoder"]["blocks"]:
        changed = copy.deepcopy(params)
        first = changed["decoder"]["blocks"][number][0]
        kernel = np.array(first["kernel"])
        kernel[..., kernel.shape[-1] :, :] = 0  # before them: of what comes from below
        first["kernel"] = kernel
        found[f"level{number + 1}"] = changed
    changed = copy.deepcopy(params)
    lowest = changed["decoder"]["ups"][len(found) - 1]
    lowest["kernel"] = np.zeros_like(lowest["kernel"])
    return found | {f"level{len(found) + 1}": changed}


def _of(means, prefix):
    return {name.removeprefix(prefix): v for name, v in means.items() if name.startswith(prefix)}


def _averaged(shares):
    keys = ("all", "brain", "tumour")
    return {key: float(np.mean([s[key] for s in shares if key in s] or [1.0])) for key in keys}


# ---------------------------------------------------------------- judging


def judge(config, measured, log):
    """All findings of a run.

    Args:
      config: of the run.
      measured: of ``measure``.
      log: lines of metrics.jsonl.
    """
    mixers = tuple(config.model.mixers)
    shift = findings.Finding("wrong patch shifts", findings.FINE, "no level shifts patches")
    if "shift" in mixers:  # the network does not build with a wrong one (mosaic.verify)
        words = "learnt, a permutation whatever it is" if learnt_edge(config.model.mosaic) else (
            "numbered patches came home, and no place has lost or doubled one"
        )  # fmt: skip
        shift = dataclasses.replace(shift, seen=f"mosaic {config.model.mosaic}: {words}")
    found = [shift]
    if measured["kept"]:
        found += findings.masks(
            measured["kept"], measured["masks_off"], measured["mean"], config.loss.keep_target
        )
    else:
        found.append(
            findings.Finding("masks too aggressive", findings.FINE, "this network prunes nothing")
        )
    found += findings.detail(measured["shells"], measured["parts"])
    found += findings.skips(measured["skips_off"], measured["mean"])
    found += findings.training(log, config.optim.clip_norm)
    return found + findings.empties(measured["missed"], measured["have"])


if __name__ == "__main__":
    sys.exit(main())
