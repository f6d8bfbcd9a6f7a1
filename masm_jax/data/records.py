"""Records on disk: a folder per case, memory-mapped arrays, an index, the split into folds."""

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masm_jax.data import conventions, record_checks
from masm_jax.data.preprocess import Record
from masm_jax.files import as_path, name_fault, read_json, replacing

VERSION = 1
FOREGROUND_SAMPLES = 10_000  # voxels kept per region as possible crop centres
_INDEX = "dataset.json"
_AGAIN = "run prepare again"


def write_record(root: Path | str, record: Record) -> None:
    """Writes one case; a reader sees the whole folder or none.

    Args:
        root: Folder of the records.
        record: The prepared case; an older record of the same name is replaced.
    """
    root = Path(root)
    case = record.meta["case"]
    root.mkdir(parents=True, exist_ok=True)
    if fault := name_fault(case):
        raise ValueError(f"record: {fault}; rename the case")
    temporary, final = root / f".{case}.tmp", root / case
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        np.save(temporary / "image.npy", np.ascontiguousarray(record.image, np.float16))
        if record.label is not None:
            np.save(temporary / "label.npy", np.ascontiguousarray(record.label, np.uint8))
        with zipfile.ZipFile(temporary / "foreground.npz", "w") as archive:
            for name, voxels in foreground(record).items():  # savez takes no region called "file"
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, voxels, allow_pickle=False)
        (temporary / "meta.json").write_text(json.dumps(record.meta, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk: what is there helps nobody


def foreground(record: Record) -> dict[str, np.ndarray]:
    """Samples voxels of each region, the same ones whenever the case is prepared.

    Args:
        record: The prepared case.

    Returns:
        Region -> (n, 3) int32 voxel coordinates, n <= 10000, 0 where the region is empty.
    """
    regions = {name: tuple(inside) for name, inside in record.meta["regions"].items()}
    found = {}
    for index, (name, inside) in enumerate(regions.items()):
        if record.label is None:
            found[name] = np.zeros((0, 3), np.int32)
            continue
        voxels = np.argwhere(np.isin(record.label, np.asarray(inside))).astype(np.int32)
        if len(voxels) > FOREGROUND_SAMPLES:
            rng = np.random.default_rng([zlib.crc32(record.meta["case"].encode()), index])
            voxels = voxels[np.sort(rng.choice(len(voxels), FOREGROUND_SAMPLES, replace=False))]
        found[name] = voxels
    return found


def write_index(root: Path | str, index: dict[str, Any]) -> None:
    """Writes dataset.json, atomically.

    Args:
        root: Folder of the records.
        index: ``modalities``, ``regions``, ``spacing``, ``cases`` and ``problems``.
    """
    with replacing(Path(root) / _INDEX) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, **index}, indent=1))


def refuse_records(folder: Path | str, *, flag: str) -> None:
    """See that a folder for something else holds no records.

    Raises:
        ValueError: It does.
    """
    if (as_path(folder) / _INDEX).is_file():
        raise ValueError(
            f"{flag}={folder} holds a data set ({_INDEX}); name a folder of its own, else its "
            f"records are mixed with what is written"
        )


def read_index(root: Path | str) -> dict[str, Any]:
    """Reads dataset.json.

    Args:
        root: Folder of the records.

    Returns:
        Its content.

    Raises:
        ValueError: There is none, it is damaged, or another version wrote it.
    """
    path = Path(root) / _INDEX
    make = f"make the records with python -m masm_jax.prepare --input=RAW --output={root}"
    if not path.is_file():
        state = "prepare did not finish there" if path.parent.is_dir() else "no such folder"
        if next(path.parent.glob("*/*.nii*"), None) or next(path.parent.glob("*.nii*"), None):
            state = "these are scans"
            make = f"give the records, or make them: prepare --input={root} --output=RECORDS"
        raise ValueError(f"{path}: no index of records ({state}); expected one; {make}")
    index = read_json(path, make)
    if index.get("version") != VERSION:
        found = index.get("version")
        raise ValueError(f"{path}: version {found}; expected {VERSION}; {make} --overwrite")
    if fault := record_checks.index_fault(index):
        raise ValueError(f"{path}: {fault}; {make} --overwrite")
    return index


def check_record(root: Path | str, case: str) -> dict[str, Any]:
    """Sees that the files of a record are there, of the right length and fit together.

    Args:
        root: Folder of the records.
        case: Name of the case.

    Returns:
        Its meta.

    Raises:
        ValueError: One is damaged.
    """
    folder = Path(root) / case
    meta = record_checks.meta(folder / "meta.json")
    shapes = [record_checks.array(folder / "image.npy", np.float16, 4).shape[1:]]
    if meta["segmentation"] is not None:
        shapes.append(record_checks.array(folder / "label.npy", np.uint8, 3).shape)
    record_checks.voxels(folder / "foreground.npz", meta["regions"], FOREGROUND_SAMPLES)
    if set(shapes) != {tuple(meta["record_shape"])}:
        raise ValueError(f"{folder}: grids {shapes}, expected {meta['record_shape']}; {_AGAIN}")
    return meta


class Records:
    """Read access to a folder of records.

    Attributes:
        root: The folder.
        modalities: Ordered modality names.
        regions: Region -> internal values, outer to inner.
        pairs: Modalities that belong together, as the description names them; none for BraTS.
        spacing: Voxel size in mm asked for when they were made, None for that of the files.
        cases: Ids, sorted.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        index = read_index(self.root)
        self.modalities: tuple[str, ...] = tuple(index["modalities"])
        self.regions = {name: tuple(inside) for name, inside in index["regions"].items()}
        self.pairs = tuple(tuple(pair) for pair in index.get("pairs", ()))
        self.spacing: float | None = index["spacing"]
        self.cases: list[str] = sorted(index["cases"])

    def image(self, case: str) -> np.ndarray:
        """Returns the (M, d, h, w) float16 image, memory-mapped."""
        return record_checks.array(self._file(case, "image.npy"), np.float16, 4)

    def label(self, case: str) -> np.ndarray | None:
        """Returns the (d, h, w) uint8 internal labels, memory-mapped; None without segmentation."""
        # Read for every crop, so the rest of it is not checked here.
        meta = read_json(self._file(case, "meta.json"), _AGAIN)
        if meta.get("segmentation") is None:
            return None
        return record_checks.array(self._file(case, "label.npy"), np.uint8, 3)

    def meta(self, case: str) -> dict[str, Any]:
        """Returns the content of meta.json."""
        return record_checks.meta(self._file(case, "meta.json"))

    def foreground(self, case: str) -> dict[str, np.ndarray]:
        """Returns region -> (n, 3) int32 voxel coordinates inside it, possible crop centres."""
        path = self._file(case, "foreground.npz")
        return record_checks.voxels(path, self.regions, FOREGROUND_SAMPLES)

    def _file(self, case: str, name: str) -> Path:
        if fault := name_fault(case):  # of a split.json or a flag
            raise ValueError(f"{self.root}: {fault}; correct the list that names it")
        path = self.root / case / name
        if not path.is_file():
            close = "" if case in self.cases else conventions.hint(case, self.cases)
            raise ValueError(
                f"{path}: missing{close}; expected a record of every case in "
                f"{self.root / _INDEX}; run prepare again"
            )
        return path


def split(cases: Sequence[str], rule: str, seed: int) -> dict[str, list[str]]:
    """Divides cases into training, validation and test.

    Visits of one patient (``BraTS-GLI-00005-100``, ``-101``) stay on one side of a fold.

    Args:
        cases: Ids of the records.
        rule: ``"0/5"`` for fold 0 of 5 by a seeded shuffle; ``"holdout:ID1,ID2"`` validates on
            these and trains on the rest; else the path of a JSON file with lists ``train``, ``val``
            and ``test``.
        seed: Seed of the shuffle.

    Returns:
        ``train``, ``val`` and ``test``, each a sorted list of ids.

    Raises:
        ValueError: The rule is not understood, names unknown cases, or uses one twice.
    """
    cases = sorted(cases)
    fold = re.fullmatch(r"(\d+)/(\d+)", rule)
    if fold:
        return _fold(cases, int(fold[1]), int(fold[2]), seed)
    if rule.startswith("holdout:"):
        held = [case.strip() for case in rule.removeprefix("holdout:").split(",") if case.strip()]
        parts = {"train": [c for c in cases if c not in held], "val": held, "test": []}
    else:
        parts = _read_split(Path(rule))
    seen: dict[str, str] = {}
    for part, members in parts.items():
        for case in members:
            if case not in cases:
                raise ValueError(
                    f"split {rule}: {part} names '{case}', which has no record"
                    f"{conventions.hint(case, cases)}; expected some of {len(cases)} cases such as "
                    f"{', '.join(cases[:3])}; correct the id or prepare the case"
                )
            if case in seen:
                raise ValueError(
                    f"split {rule}: '{case}' is in {seen[case]} and again in {part}; expected "
                    "every case once; remove it from one"
                )
            seen[case] = part
    if rule.startswith("holdout:") and not (parts["train"] and parts["val"]):
        raise ValueError(
            f"split {rule}: {len(parts['train'])} cases to train on, {len(parts['val'])} held out; "
            "expected at least one each; correct the list"
        )
    return {part: sorted(members) for part, members in parts.items()}


def read_split(workdir: Path | str) -> dict[str, list[str]]:
    """Reads the split.json of a run.

    Args:
        workdir: Folder of the run.

    Returns:
        ``train``, ``val`` and ``test``, each a list of ids.

    Raises:
        ValueError: It is missing or damaged, or names something that is no case.
    """
    path, fix = as_path(workdir) / "split.json", "restore it from a copy of the run"
    parts = read_json(path, fix)
    for part, members in parts.items():
        if not isinstance(members, list):
            found = type(members).__name__
            raise ValueError(f"{path}: {part} is a {found}, expected a list; {fix}")
        for fault in filter(None, map(name_fault, members)):
            raise ValueError(f"{path}: {part}: {fault}; {fix}")
    return {part: parts.get(part, []) for part in ("train", "val", "test")}


def _fold(cases: list[str], fold: int, folds: int, seed: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(_patient(case), []).append(case)
    if not 0 <= fold < folds or not 2 <= folds <= len(groups):
        raise ValueError(
            f"split {fold}/{folds}: expected FOLD/FOLDS, 2 to {len(groups)} folds (as many as "
            f"patients), FOLD from 0 to FOLDS - 1; for example 0/{min(5, max(2, len(groups)))}"
        )
    names = sorted(groups)
    order = np.random.default_rng(seed).permutation(len(names))
    val = sorted(case for place in order[fold::folds] for case in groups[names[place]])
    return {"train": [case for case in cases if case not in set(val)], "val": val, "test": []}


def _patient(case: str) -> str:
    """BraTS 2023 on: ``BraTS-GLI-00005-100`` is visit 100 of patient ``BraTS-GLI-00005``."""
    visit = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d+", case)
    return visit[1] if visit else case


def _read_split(path: Path) -> dict[str, list[str]]:
    expected = '"FOLD/FOLDS", "holdout:ID1,ID2" or a JSON file {"train": [...], "val": [...], ...}'
    if not path.is_file():
        raise ValueError(f"split {path}: neither a rule nor a file; expected {expected}")
    try:
        content = json.loads(path.read_text())
        parts = {part: list(content.pop(part, [])) for part in ("train", "val", "test")}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"split {path}: cannot be read ({error}); expected {expected}") from error
    if content:
        raise ValueError(f"split {path}: unknown keys {sorted(content)}; expected train, val, test")
    return parts
