"""Writes a set of simulated brain tumour cases (phantoms) in the layout of BraTS 2021.

    python -m masm_jax.phantom --output=phantoms --cases=40 --spacing=3 --seed=0

About one second per case and core at 3 mm, ten at 1 mm. Each case is a folder with four images and
a segmentation (``Phantom_00000/Phantom_00000_t1.nii.gz`` ...), complete or absent; a second call
adds what is missing. The cases are simulations: results on them are no BraTS results.
"""

import argparse
import json
import logging
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence

import nibabel as nib
import numpy as np
from tqdm import tqdm

from masm_jax.arguments import Parser
from masm_jax.data.simulate import VERSION, Phantom, simulate
from masm_jax.files import replacing, told
from masm_jax.parallel import in_order

logger = logging.getLogger(__name__)

DESCRIPTION = "phantom.json"
_KIND = "simulated phantoms of brain tumours, not BraTS data"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 when all cases are there, 1 when something failed, 2 for wrong arguments, 75 stopped.
    """
    try:
        arguments = _parse(argv)
    except SystemExit as stop:  # argparse has written its message
        return int(stop.code or 0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = pathlib.Path(arguments.output)
    try:
        _claim(root, spacing=arguments.spacing, seed=arguments.seed)
    except (OSError, ValueError) as error:
        logger.error("%s", told(error))
        return 1
    logger.info("these cases are simulated phantoms: results on them are no BraTS results")
    names = {f"Phantom_{index:05d}": index for index in range(arguments.cases)}
    todo = {name: index for name, index in names.items() if not (root / name).is_dir()}
    if len(todo) < len(names):
        logger.info("%d of %d cases are there already", len(names) - len(todo), len(names))
    start = time.monotonic()
    failed = 0
    jobs = [(root, name, arguments.seed, i, arguments.spacing) for name, i in todo.items()]
    workers = min(arguments.workers, len(todo)) if arguments.workers > 1 < len(todo) else 0
    try:
        for name, problem in _progress(in_order(_write, jobs, workers=workers), len(todo)):
            if problem:
                failed += 1
                logger.error("%s: %s", name, problem)
    except ValueError as error:
        logger.error("%s", told(error))
        return 1
    except KeyboardInterrupt:
        logger.error("stopped; finished cases are kept, the same command goes on")
        return 75
    seconds = time.monotonic() - start
    logger.info("%s: %d cases, %d new in %.0f s", root, len(names) - failed, len(todo), seconds)
    if failed:
        logger.error("%d cases failed; run the command again to add them", failed)
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(
        prog="python -m masm_jax.phantom",
        description="Writes simulated brain tumour cases in the layout of BraTS 2021.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--cases", type=int, required=True, metavar="N", help="number of cases")
    parser.add_argument(
        "--spacing", type=float, default=3.0, metavar="MM", help="voxel size, mm (default: 3)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="number of the set (default: 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.cases <= 100_000:
        parser.error(f"--cases={arguments.cases}: expected 1 to 100000")
    if not 0.5 <= arguments.spacing <= 6:
        parser.error(f"--spacing={arguments.spacing:g}: expected 0.5 to 6 mm")
    if arguments.seed < 0:
        parser.error(f"--seed={arguments.seed}: expected 0 or more")
    if arguments.workers < 1:
        parser.error(f"--workers={arguments.workers}: expected 1 or more")
    return arguments


def _claim(root: pathlib.Path, *, spacing: float, seed: int) -> None:
    """Makes ``root`` the folder of one set of phantoms, or checks that it is that already.

    Args:
        root: The output folder.
        spacing: Voxel size, mm.
        seed: Number of the set.

    Raises:
        ValueError: The folder holds another set, or something else.
    """
    wanted = {"kind": _KIND, "version": VERSION, "spacing": spacing, "seed": seed}
    path = root / DESCRIPTION
    if not path.exists():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(
                f"{root} holds files but no {DESCRIPTION}, expected a new or empty folder or one "
                "written by this command; choose another --output"
            )
        root.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not readable as JSON ({error}); delete {root} or choose another --output"
        ) from error
    differing = [
        f"{key} is {found.get(key)!r} there, {value!r} is asked for"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{root} holds phantoms made with other parameters: {'; '.join(differing)}; "
            "use those parameters, choose another --output, or delete the folder"
        )


def _write(root: pathlib.Path, name: str, seed: int, index: int, spacing: float) -> tuple[str, str]:
    """Simulates and writes one case: the folder appears complete or not at all.

    Returns:
        Its name, and what went wrong or "".
    """
    temporary = root / f".{name}.tmp"
    try:
        if temporary.exists():  # left by a call that was stopped
            shutil.rmtree(temporary)
        temporary.mkdir()
        save(simulate(seed, index, spacing=spacing), temporary, name=name)
        os.rename(temporary, root / name)
    except (OSError, ValueError, MemoryError) as error:
        return name, f"{type(error).__name__}: {told(error)}"
    return name, ""


def save(phantom: Phantom, folder: pathlib.Path, *, name: str) -> None:
    """Writes the images and the segmentation under BraTS 2021 file names.

    Args:
        phantom: The case.
        folder: Existing folder.
        name: First part of the file names.
    """
    arrays = {**phantom.images, "seg": phantom.labels}
    for suffix, array in arrays.items():
        image = nib.Nifti1Image(np.asarray(array), phantom.affine)
        image.set_qform(phantom.affine, code=1)
        image.set_sform(phantom.affine, code=1)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = b"simulated phantom, not a patient"
        nib.save(image, folder / f"{name}_{suffix}.nii.gz")


def _progress(results: Iterator[tuple[str, str]], total: int) -> Iterator[tuple[str, str]]:
    """Passes results on with a bar, or on a non-terminal with a line every ten seconds."""
    if sys.stderr.isatty():
        yield from tqdm(results, total=total, unit="case")
        return
    last = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        if time.monotonic() - last > 10:
            last = time.monotonic()
            logger.info("%d of %d cases", done, total)


if __name__ == "__main__":
    sys.exit(main())
