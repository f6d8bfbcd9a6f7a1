"""Turns a folder of scans into records for training and evaluation.

    python -m masm_jax.prepare --input=RAW --output=RECORDS [--spacing=MM] [--workers=N]
        [--labels=NAME] [--description=FILE] [--overwrite]

Exit codes: 0 every case is prepared; 1 nothing could be prepared; 2 usage; 3 some cases failed and
are listed; 75 stopped by a signal, the same command goes on.
"""

import argparse
import collections
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import tqdm

from masm_jax import locks
from masm_jax.arguments import Parser
from masm_jax.data import build, cases, conventions
from masm_jax.files import check_output, printable, told

_FINEST, _COARSEST = 0.1, 10.0  # mm: beyond, it is a slip, or no tumour is left to see


class _Stopped(Exception):
    """A signal asked to stop."""


def _positive(kind):
    def convert(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m masm_jax.prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", required=True, metavar="RAW", help="folder of one case or many, at any depth")
    add("--output", required=True, metavar="RECORDS", help="folder to write the records to")
    add(
        "--spacing",
        type=_positive(float),
        metavar="MM",
        help="voxel size to resample to; default: as it is",
    )
    add("--workers", type=_positive(int), default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes, about 0.5 GB each (default: %(default)s)")  # fmt: skip
    add(
        "--labels",
        choices=conventions.LABEL_SCHEMES,
        help="what label values mean; default: recognised",
    )
    add("--description", metavar="FILE", help="JSON or Python file that describes another data set")
    add("--overwrite", action="store_true", help="remove the records in RECORDS first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments, None for those of the process.

    Returns:
        The exit code.
    """
    try:
        parser = _parser()
        flags = parser.parse_args(argv)
        if flags.spacing and not _FINEST <= flags.spacing <= _COARSEST:
            expected = f"expected {_FINEST:g} to {_COARSEST:g} mm"
            parser.error(f"--spacing={flags.spacing:g}: {expected}; 1 is the grid of BraTS")
    except SystemExit as stop:
        return int(stop.code or 0)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if main_thread else None
    try:
        return _prepare(flags)
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(told(error))
    except (KeyboardInterrupt, _Stopped):
        print(
            "prepare: stopped; finished cases are kept, the same command goes on", file=sys.stderr
        )
        return 75
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _prepare(flags: argparse.Namespace) -> int:
    if os.path.realpath(flags.input) == os.path.realpath(flags.output):
        return _fail(
            "--input and --output are the same folder; give the records a folder of their own"
        )
    check_output(flags.output)
    if os.path.isfile(os.path.join(flags.output, "config.json")):
        return _fail(
            f"--output={flags.output} is a run of train.py; give the records a folder of their own"
        )
    started = time.monotonic()
    found, problems = cases.find_cases(
        flags.input, labels=flags.labels, description=flags.description
    )
    without = cases.missing_segmentations(found)
    found = [case for case in found if case.id not in {problem.case for problem in without}]
    problems += without
    for line, number in collections.Counter(case.convention.describe() for case in found).items():
        print(f"{number} {'case' if number == 1 else 'cases'}, convention {line}")
    if found and all(case.segmentation is None for case in found):
        print("no segmentations: these records serve for prediction only")
    if not found:
        _report(problems, 1)
        return _fail("no complete case; a data set with other names needs a --description file")
    progress = _Progress(len(found))
    try:
        with locks.alone(flags.output):
            built = build.build(
                found,
                flags.output,
                spacing=flags.spacing,
                workers=flags.workers,
                overwrite=flags.overwrite,
                problems=tuple(problems),
                progress=progress.step,
            )
    finally:
        progress.close()
    _summary(built, flags, time.monotonic() - started)
    return _report(built.problems, 3 if built.cases else 1)


def _summary(built: build.Built, flags: argparse.Namespace, seconds: float) -> None:
    if not built.cases:
        return
    kept = f", {built.kept} of them kept from before" if built.kept else ""
    spacings = sorted(
        {tuple(round(s, 2) for s in meta["record_spacing"]) for meta in built.metas.values()}
    )
    number = f"{len(built.cases)} {'record' if len(built.cases) == 1 else 'records'}"
    print(f"{number} in {printable(flags.output)}{kept}; {seconds:.0f} s")
    if flags.spacing is None and len(spacings) > 1:
        print(f"voxel sizes differ: {spacings[:3]} mm; --spacing=1 would make them equal")
    volumes = [meta["volumes_ml"] for meta in built.metas.values() if meta["volumes_ml"]]
    for region in volumes[0] if volumes else ():
        present = [volume[region] for volume in volumes if volume[region] > 0]
        size = f", {min(present):.1f} to {max(present):.1f} ml" if present else ""
        rare = len(volumes) >= 5 and len(present) <= 0.05 * len(volumes)
        doubt = "; hardly a case has it: check what --labels says" if rare else ""
        print(f"  {region}: in {len(present)} of {len(volumes)} cases{size}{doubt}")


def _report(problems: list[cases.Problem], code: int) -> int:
    """Lists problems; returns the exit code, 0 where there are none."""
    if not problems:
        return 0
    number = len({problem.case for problem in problems})
    print(f"{number} {'case' if number == 1 else 'cases'} could not be prepared:", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    print(f"prepare: {printable(message)}", file=sys.stderr)
    return 1


def _stop(number: int, frame) -> NoReturn:
    raise _Stopped


class _Progress:
    """A bar on a terminal; elsewhere a line every half minute."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()
        self._bar = tqdm.tqdm(total=total, unit="case") if sys.stderr.isatty() else None

    def step(self, case: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._said > 30 and self._done < self._total:
            self._said = time.monotonic()
            print(f"{self._done} of {self._total} cases done, last {case}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
