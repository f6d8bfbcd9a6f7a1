"""Segment scans with a trained run.

python -m masm_jax.predict --workdir=RUN --input=CASE_OR_ROOT --output=OUT
python -m masm_jax.predict --workdir=RUN --t1=A --t1ce=B --t2=C --flair=D --output=OUT
python -m masm_jax.predict --from_export=FOLDER ...      (as masm_jax.export writes it; no config)

A run that was trained with data.modality_dropout segments cases that lack modalities, too.

Writes OUT/CASE.nii.gz in the grid, affine, header and label convention of each case, OUT/CASE.png
to look at, and OUT/CASE.json with volumes and how they were made. Exit codes: 0 done, 1 an error, 2
usage, 3 done but some cases failed (listed).
"""

import dataclasses
import logging
import os
import pathlib
import re
import sys
import time

import numpy as np

from masm_jax import runtime
from masm_jax.arguments import Parser
from masm_jax.data import cases as cases_lib
from masm_jax.data import conventions, nifti, preprocess, suspicion
from masm_jax.evaluation import pictures, tables
from masm_jax.files import check_output, name_fault, of_case, printable
from masm_jax.inference import postprocess
from masm_jax.inference.exported import load_export
from masm_jax.inference.volume import (
    FAILURES,
    check_task,
    decoding,
    failure,
    in_scan,
    load_run,
    modalities_used,
)

# What is left of a region where the ones inside it are painted over.
_WORDS = {"WT": "oedema", "TC": "necrosis and non-enhancing core", "ET": "enhancing tumour"}
_log = logging.getLogger("masm_jax.predict")  # run as a module, __name__ is "__main__"


def main(argv=None):
    """Flags in, exit code out."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = [name for name in conventions.MODALITIES if getattr(args, name)]
    if args.input is None and not given:
        four = " ".join(f"--{name}" for name in conventions.MODALITIES)
        parser.error(f"expected --input, or {four}")
    if args.input is not None and given:
        parser.error("--input and files by modality are both given; leave out one")
    if args.input is not None and args.case:
        parser.error("--case names the one patient of --t1 ... --flair; leave it out with --input")
    if args.input is None and args.description:
        parser.error("--description goes with --input; files by modality are those of BraTS")
    if args.case and (fault := name_fault(args.case)):
        parser.error(f"--case: {fault}")
    if args.from_export and (args.set or args.checkpoint):
        parser.error("--set and --checkpoint go with --workdir: give them to masm_jax.export")
    runtime.start()
    return runtime.command("predict", _predict, args)


def _parser():
    parser = Parser(
        prog="python -m masm_jax.predict", description="Segment scans with a trained run."
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", help="folder of the run (train.py --workdir)")
    network.add_argument("--from_export", metavar="FOLDER", help="of masm_jax.export, not a run")
    parser.add_argument("--input", help="a case folder, or a folder of many")
    for modality in conventions.MODALITIES:
        parser.add_argument(f"--{modality}", metavar="FILE", help="one patient, instead of --input")
    parser.add_argument("--case", help="name of that patient's files (default: of the --t1 file)")
    parser.add_argument("--output", required=True, help="folder for the label files")
    parser.add_argument("--labels", help="label scheme to write, where the names leave it open")
    parser.add_argument("--description", help="description file of another data set (docs/data.md)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of infer., over the run's: infer.flips=0,1,2; may be repeated",
    )  # fmt: skip
    parser.add_argument("--checkpoint", choices=("latest", "best"), help="of the run (latest)")
    parser.add_argument(
        "--probabilities", action="store_true", help="also write OUT/CASE_REGION.nii.gz, 0 to 1"
    )
    return parser


def _predict(args):
    check_output(args.output)
    if args.from_export:
        segmenter, meta = load_export(args.from_export)
    else:
        which = args.checkpoint or "latest"
        segmenter, meta = load_run(args.workdir, which=which, given=args.set)
    partial = not args.from_export and segmenter.settings.may_lack
    cases, problems = _cases(args, partial)
    _spare_the_scans(cases, args.output)
    failed, written = {}, 0
    for problem in problems:
        failed[problem.case] = "; ".join(filter(None, [failed.get(problem.case), str(problem)]))
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        try:
            task = case.convention
            settings = segmenter.settings
            wanted = settings.modalities
            if partial:
                wanted = [name for name in wanted if name in task.modalities] or wanted
            check_task(
                {"modalities": wanted, "regions": settings.regions, "spacing": None},
                modalities=task.modalities, regions=task.regions, spacing=None, where="its files",
            )  # fmt: skip
            volumes = _one(segmenter, case, meta, args)
        except FAILURES as error:
            failed[case.id] = failure(error)
            _log.error("%s failed: %s", case.id, failed[case.id])
            continue
        written += 1
        _log.info(
            "%d/%d %s (%s)  %s  %.1f s",
            number,
            len(cases),
            case.id,
            case.convention.name,
            "  ".join(f"{name} {value:.1f} ml" for name, value in volumes.items()),
            time.perf_counter() - began,
        )
    # Counted as they are written: of two of one name the first is, though the name is in failed.
    print(f"{written} cases in {printable(args.output)}")
    for name, reason in failed.items():
        print(f"failed: {of_case(name, reason)}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def _spare_the_scans(cases, output):
    """Refuse the folder of a scan: what is written may have its name.

    Raises:
        ValueError: it is one.
    """
    place = os.path.realpath(output)
    for case in cases:
        for file in filter(None, (*case.images, case.segmentation)):
            if place in (os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file))):
                raise ValueError(
                    f"--output={output} holds {file.name} of {case.id}, and a result may have the "
                    f"name of a scan; name a folder of its own"
                )


def _cases(args, partial):
    """The cases below --input, or the one that the four flags name; and what is wrong with them."""
    files = {modality: getattr(args, modality) for modality in conventions.MODALITIES}
    given = {modality: pathlib.Path(file) for modality, file in files.items() if file}
    if not given:
        return cases_lib.find_cases(
            args.input, labels=args.labels, description=args.description, partial=partial
        )
    missing = [f"--{modality}" for modality in files if modality not in given]
    if missing and not partial:
        raise ValueError(
            f"{', '.join(missing)} missing: this network was trained with all modalities; give "
            f"the file, or a run that was trained with data.modality_dropout"
        )
    for modality, file in given.items():
        if not file.is_file():
            raise ValueError(f"--{modality}={file}: no such file; correct the path")
    if len(set(map(os.path.realpath, given.values()))) < len(given):
        raise ValueError("one file is given for two modalities; each modality needs its own")
    name = args.case or re.sub(r"\.nii(\.gz)?$", "", next(iter(given.values())).name)
    if fault := name_fault(name):
        raise ValueError(f"{next(iter(given.values()))}: {fault}; name the patient with --case")
    scheme = args.labels or "brats2023"
    if not args.labels:
        _log.info("labels as in BraTS 2023: 1 = core, 2 = oedema, 3 = enhancing; --labels chooses")
    convention = conventions.with_labels(conventions.BUILT_IN["brats2023"], scheme)
    convention = dataclasses.replace(convention, modalities=tuple(given))
    return [cases_lib.Case(name, tuple(given.values()), None, convention)], []


def _one(segmenter, case, run, args):
    """Segment one case and write its files; returns the volume of each region in ml."""
    output, began = pathlib.Path(args.output), time.perf_counter()
    case = dataclasses.replace(case, segmentation=None)  # not asked for, whatever is in it
    record = preprocess.preprocess(case, spacing=run["spacing"])
    settings, present = segmenter.settings, case.convention.modalities
    known = record.meta["record_spacing"], record.meta["covered"]
    found = {"warnings": []}
    if case.convention.brain:
        found = suspicion.look(record.image, present, *known)
    _say(case, found, [name for name in settings.modalities if name not in present])
    image = np.zeros((len(settings.modalities), *record.image.shape[1:]), record.image.dtype)
    image[[settings.modalities.index(name) for name in present]] = record.image
    rules = decoding(settings, record.meta["spacing"])
    regions = settings.regions

    def progress(done, tiles):
        _log.info("%s: %d of %d tiles", case.id, done, tiles)

    probabilities = segmenter.probabilities(image, progress, present)
    internal, written = in_scan(probabilities, record.meta, **rules)
    nifti.write_labels(output / f"{case.id}.nii.gz", written, like=case.images[0])
    drawn = postprocess.decode(
        probabilities, regions=regions, **decoding(settings, record.meta["record_spacing"])
    )
    millilitres = 1.0
    for edge in record.meta["spacing"]:
        millilitres *= edge
    volumes = {
        name: float(sum((internal == value).sum() for value in values)) * millilitres / 1000
        for name, values in regions.items()
    }
    if args.probabilities:
        restored = preprocess.restore(probabilities, record.meta)
        for name, map_ in zip(regions, restored):
            nifti.write_map(output / f"{case.id}_{name}.nii.gz", map_, like=case.images[0])
    summary = {
        "case": case.id,
        "volumes_ml": volumes,
        "files": record.meta["files"],
        "labels": {value: _WORDS.get(name, name) for name, value in record.meta["paint"].items()},
        "run": str(args.from_export or args.workdir),
        "step": run["step"],
        "rules": rules,
        "input": {
            "convention": case.convention.name,
            "modalities": list(present),
            "used": modalities_used(settings, present),
            **found,
        },
        "seconds": round(time.perf_counter() - began, 1),
        "notice": "research software, not a medical device",
    }
    tables.write_summary_json(output / f"{case.id}.json", summary)
    pictures.overlay(
        output / f"{case.id}.png",
        image,
        drawn,
        None,
        title=f"{case.id}   " + "  ".join(f"{n} {v:.1f} ml" for n, v in volumes.items()),
        modalities=settings.modalities,
        spacing=record.meta["record_spacing"],
        regions=regions,
    )
    return volumes


def _say(case, found, missing):
    """How files were mapped to modalities and what speaks against it; what is missing."""
    named = {m: p.name for m, p in zip(case.convention.modalities, case.images)}
    doubted = any("mixed up" in warning for warning in found["warnings"])
    checked = "contrast disagrees" if doubted else "contrast agrees"
    if len({"t1", "t1ce", "t2", "flair"} & named.keys()) < 4:
        checked = "contrast not checked: other modalities than t1, t1ce, t2, flair"
    elif not doubted:
        checked += " (T1 and T1ce: by name alone)"
    _log.info("%s: %s; %s", case.id, ", ".join(f"{m} = {f}" for m, f in named.items()), checked)
    if missing:
        _log.warning(
            "%s: %s missing: segmented without, which the run was trained for", case.id,
            ", ".join(missing),
        )  # fmt: skip
    for warning in found["warnings"]:
        _log.warning("%s: %s", case.id, warning)


if __name__ == "__main__":
    sys.exit(main())
