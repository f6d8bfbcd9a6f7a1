"""Prepares many cases in parallel: resumable, atomic per case, duplicates found at the end."""

import collections
import contextlib
import dataclasses
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masm_jax.data import records
from masm_jax.data.cases import Case, Problem
from masm_jax.data.preprocess import VERSION, CaseError, preprocess
from masm_jax.parallel import in_order


@dataclasses.dataclass
class Built:
    """What came of preparing a set: ids now in the index, how many were kept, what failed."""

    cases: list[str]
    kept: int
    problems: list[Problem]
    metas: dict[str, dict[str, Any]]


def build(
    cases: list[Case],
    root: Path | str,
    *,
    spacing: float | None = None,
    workers: int = 1,
    overwrite: bool = False,
    problems: tuple[Problem, ...] = (),
    progress: Callable[[str], None] = lambda case: None,
) -> Built:
    """Prepares cases into a folder of records and writes its index.

    Finished records with the same sources and settings are kept.

    Args:
        cases: The cases, ids unique.
        root: Folder of the records.
        spacing: Voxel size in mm, None for that of the files.
        workers: Processes; 1 works in this one.
        overwrite: Removes all records in the folder first.
        problems: Of cases left out before, for the index.
        progress: Called with the id after each case.

    Returns:
        What came of it. Cases with problems have no record.

    Raises:
        ValueError: The folder holds records with other settings or of other cases, the cases do
            not share modalities and regions, or a worker died.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _check_one_task(cases)
    wanted, gone = {}, []
    for case in cases:
        try:
            wanted[case.id] = _source(case, spacing)
        except OSError as error:  # a link to nothing or in a circle; gone since it was found
            value, fix = f"{error.strerror}", "get the file again, or remove the link"
            gone.append(Problem(case.id, str(error.filename), value, "a file", fix))
    cases = [case for case in cases if case.id in wanted]
    problems = (*problems, *gone)
    kept = {}
    if overwrite:
        _clear(root)
    else:
        kept = _finished(root, wanted, {problem.case for problem in problems})
    with contextlib.suppress(FileNotFoundError):
        (root / "dataset.json").unlink()  # an index only beside a whole set
    failed = list(problems)
    metas: dict[str, dict[str, Any]] = {}
    hashes: dict[str, tuple[str, str]] = {}
    left = [case for case in cases if case.id not in kept]
    jobs = ((case, root, spacing, wanted[case.id]) for case in left)
    workers = min(workers, len(left)) if workers > 1 < len(left) else 0
    results = in_order(_work, jobs, workers=workers, needs="0.5 GB")
    try:
        for case in cases:
            meta, wrong = (kept[case.id], []) if case.id in kept else next(results)
            wrong = wrong or _duplicate(case, meta, hashes)
            failed += wrong
            if wrong:
                shutil.rmtree(root / case.id, ignore_errors=True)
            else:
                metas[case.id] = meta
                for modality, digest in meta["hashes"].items():
                    hashes.setdefault(digest, (case.id, modality))
            progress(case.id)
    finally:
        results.close()
    failed.sort(key=lambda problem: (problem.case, problem.file))
    if metas:
        first = cases[0].convention
        records.write_index(
            root,
            {
                "modalities": list(first.modalities),
                "regions": {name: list(inside) for name, inside in first.regions.items()},
                "pairs": [list(pair) for pair in first.pairs],
                "spacing": spacing,
                "cases": sorted(metas),
                "problems": [dataclasses.asdict(problem) for problem in failed],
            },
        )
    return Built(sorted(metas), len(set(kept) & set(metas)), failed, metas)


def _check_one_task(cases: list[Case]) -> None:
    first = cases[0]
    for case in cases:
        task, first_task = (
            (c.modalities, list(c.regions.items())) for c in (case.convention, first.convention)
        )
        if task != first_task:
            raise ValueError(
                f"{case.id} ({case.convention.name}) and {first.id} ({first.convention.name}) "
                "differ in modalities or regions; expected one task per folder of records; prepare "
                "them apart"
            )


def _source(case: Case, spacing: float | None) -> dict[str, Any]:
    """What a record depends on: the settings, and the names, sizes and times of the files."""
    files = {}
    paths = [path for path in dict.fromkeys((*case.images, case.segmentation)) if path is not None]
    count = collections.Counter(path.name for path in paths)
    for path in paths:
        state, name = path.stat(), path.name
        if count[name] > 1:  # imagesTr/C1.nii.gz and labelsTr/C1.nii.gz
            name = path.relative_to(os.path.commonpath(paths)).as_posix()
        files[name] = [state.st_size, state.st_mtime_ns]
    convention = case.convention
    settings: dict[str, Any] = {
        "version": VERSION,
        "spacing": spacing,
        "modalities": list(convention.modalities),
        "channels": list(case.channels),
        "labels": {str(value): internal for value, internal in convention.labels.items()},
        "regions": {name: list(inside) for name, inside in convention.regions.items()},
        "paint": dict(convention.paint),
    }
    if convention.window:
        settings["window"] = {name: list(ends) for name, ends in convention.window.items()}
    return {"settings": settings, "files": files}


def _finished(root: Path, wanted: dict[str, dict], failed: set[str]) -> dict[str, dict[str, Any]]:
    """Case id -> meta of the records that can be kept; refuses a folder made in another way."""
    kept = {}
    for path in sorted(root.glob("*/meta.json")):
        case = path.parent.name
        if case.startswith("."):  # left by a kill before it was renamed
            continue
        if case in failed and case not in wanted:  # whole once, incomplete now
            shutil.rmtree(path.parent)
            continue
        if case not in wanted:
            raise ValueError(
                f"{root}: holds a record of {case}, which is not in this input; expected records "
                "of one input; give another --output, put both sets below one --input, or start "
                "afresh with --overwrite (removes every record there)"
            )
        meta = _meta(root, case)
        if meta is None:  # damaged: made again
            continue
        old, new = meta["source"]["settings"], wanted[case]["settings"]
        for key in new | old:  # a window may be gone
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"{root}: the record of {case} was made with {key} {old.get(key)}, now it is "
                    f"{new.get(key)}; expected one setting for all; give another --output, or "
                    "start afresh with --overwrite (removes every record there)"
                )
        if meta["source"]["files"] == wanted[case]["files"]:
            kept[case] = meta
    return kept


def _meta(root: Path, case: str) -> dict[str, Any] | None:
    """The meta of a record that is whole, so far as that can be seen without reading all of it."""
    try:
        meta = records.check_record(root, case)
    except (ValueError, OSError):
        return None
    source = meta.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("settings"), dict):
        return None
    return meta if "files" in source else None


def _clear(root: Path) -> None:
    """Removes records and what a killed run left, and nothing else."""
    for folder in root.iterdir():
        unfinished = folder.name.startswith(".") and folder.name.endswith(".tmp")
        if folder.is_dir() and (unfinished or (folder / "foreground.npz").is_file()):
            shutil.rmtree(folder)


def _duplicate(
    case: Case, meta: dict[str, Any], hashes: dict[str, tuple[str, str]]
) -> list[Problem]:
    """Problems for images that an earlier case already has."""
    problems = []
    for modality, digest in meta["hashes"].items():
        if digest in hashes:
            other, of = hashes[digest]
            same = "" if of == modality else f" as {of}"
            problems.append(
                Problem(
                    case.id,
                    meta["files"][modality],
                    f"{modality} has the same voxels as {other}{same}",
                    "every image once",
                    f"remove this case or {other}, or get the right file",
                )
            )
    return problems


def _work(
    case: Case, root: Path, spacing: float | None, source: dict[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Prepares and writes one case; never raises, so that one case cannot end the others."""
    try:
        record = preprocess(case, spacing=spacing)
        record.meta["source"] = source
        records.write_record(root, record)
        return record.meta, []
    except CaseError as error:
        return {}, error.problems
    except OSError as error:
        fix = "free some space or correct the rights, then run again"
        return {}, [Problem(case.id, str(root), f"cannot write ({error})", "a writable disk", fix)]
    except ValueError as error:  # of a file that changes meanwhile
        where, fix = str(case.images[0].parent), "run again when the files are at rest"
        return {}, [Problem(case.id, where, str(error), "files that can be read", fix)]
    except MemoryError:
        where, fix = str(case.images[0].parent), "give fewer --workers, or a larger --spacing"
        return {}, [Problem(case.id, where, "out of memory", "room for the case", fix)]
    except Exception:  # a defect: shown with its traceback, and the other cases go on
        trace = traceback.format_exc().strip()
        where = str(case.images[0].parent)
        return {}, [Problem(case.id, where, trace, "no exception", "report it with this traceback")]
