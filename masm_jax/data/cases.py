"""Finds the cases of a data set by its file names and recognises what its labels mean."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from masm_jax.data import conventions, recognition
from masm_jax.data.conventions import Convention
from masm_jax.data.description import load_description
from masm_jax.files import name_fault, printable

_NIFTI = re.compile(r"\.nii(\.gz)?\Z", re.IGNORECASE)
_MSD_FOLDERS = ("imagesTr", "imagesTs", "labelsTr")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one case."""

    case: str
    file: str
    value: str
    expectation: str
    fix: str

    def __str__(self) -> str:
        text = f"{self.case}: {self.file}: {self.value}; expected {self.expectation}; {self.fix}"
        return printable(" | ".join(text.splitlines()))


@dataclasses.dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        id: Name of the case.
        images: One path per modality, in the order of the convention; none of a reference.
        segmentation: Path of the label file, None where there is none.
        convention: File names and label values.
        channels: Per modality the index along the last axis of a 4-D file, None for 3-D files.
    """

    id: str
    images: tuple[Path, ...]
    segmentation: Path | None
    convention: Convention
    channels: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.channels:
            object.__setattr__(self, "channels", (None,) * len(self.images))


def find_cases(
    root: Path | str,
    *,
    labels: str | None = None,
    description: Path | str | Convention | None = None,
    partial: bool = False,
    images: bool = True,
) -> tuple[list[Case], list[Problem]]:
    """Finds every case below a folder.

    Args:
        root: A case folder or a folder of many, at any depth.
        labels: Name of the label scheme; None recognises it from the label values of each set.
        description: Description file or convention of another data set; None looks for the
            built-in conventions.
        partial: A case that lacks some modalities is a case too; its convention names those it has.
        images: False finds segmentations, with or without images; the cases then have no images.

    Returns:
        The complete cases, sorted by id; the cases that are incomplete or named twice.

    Raises:
        ValueError: No folder, no case, a bad description, or the labels leave room for doubt.
    """
    root = Path(os.path.abspath(root))  # patterns may name folders above it
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root}: {what}; expected a folder of cases; correct the path")
    if labels is not None and labels not in conventions.LABEL_SCHEMES:
        conventions.with_labels(conventions.BUILT_IN["brats2021"], labels)  # raises, with a hint
    if labels is not None and description is not None:
        raise ValueError(
            f"--labels={labels} and a description are both given; the description says what the "
            "labels mean; leave out --labels"
        )
    files = list(nifti_files(root))
    cases: list[Case] = []
    problems: list[Problem] = []
    for convention, own in _by_convention(root, files, labels, description):
        found, wrong = _assemble(convention, own, partial, images)
        problems += wrong
        if description is None and not convention.channels:
            found = recognition.recognise(root, found, labels)
        cases += found
    if not cases and not problems and not images and description is None:
        plain, problems = _assemble(conventions.PLAIN, _unnamed(files), partial, images)
        cases = recognition.recognise(root, plain, labels)
    if not cases and not problems:
        raise ValueError(_nothing_found(root, files, description, images))
    cases, repeated = _unique(cases)
    return cases, sorted(problems + repeated, key=lambda p: (p.case, p.file))


def missing_segmentations(cases: list[Case]) -> list[Problem]:
    """Lists the cases without segmentation in a set where others have one.

    A misnamed segmentation, such as that of BraTS20_Training_355, is named in the fix.
    """
    if all(case.segmentation is None for case in cases):
        return []
    problems = []
    for case in cases:
        if case.segmentation is not None:
            continue
        folder = case.images[0].parent
        others = [p.name for p in _beside(folder) if p not in case.images]
        wanted = _expected(case.convention.segmentation, case.id)
        alone = len({c.images[0].parent for c in cases}) > 1 and others
        fix = f"rename {others[0]} if it is the segmentation, or " if alone else "add it, or "
        problems.append(
            Problem(
                case.id,
                str(folder / wanted),
                "no segmentation" + (f", but {', '.join(others[:3])} lies there" if alone else ""),
                "one, as other cases of the set have it",
                fix + "keep cases without segmentation in a folder of their own",
            )
        )
    return problems


def nifti_files(root: Path) -> Iterator[Path]:
    """Every NIfTI file below a folder, sorted; hidden ones (macOS ``._*``) left out."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        empty = [f for f in folders if _NIFTI.search(f) and _is_no_folder(Path(folder, f), visited)]
        for name in sorted([*names, *empty]):
            if _NIFTI.search(name) and not name.startswith("."):
                yield Path(folder) / name


def stem(path: Path) -> str:
    """The name of a NIfTI file without .nii or .nii.gz."""
    return _NIFTI.sub("", path.name)


def _is_no_folder(path: Path, visited: set[str]) -> bool:
    """Of a folder named like a file: it stands for one, to be named as what cannot be read.

    Some archives unpack to folders of that name with the file inside; those are folders.
    """
    inside = (name for _, _, names in os.walk(path) for name in names)
    return os.path.realpath(path) in visited or not any(map(_NIFTI.search, inside))


def _beside(folder: Path) -> list[Path]:
    """The NIfTI files right in a folder, sorted."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [folder / name for name in names if _NIFTI.search(name)]


def _by_convention(
    root: Path, files: list[Path], labels: str | None, description: Path | str | Convention | None
) -> Iterator[tuple[Convention, list[Path]]]:
    """Splits the files among the conventions that may hold for them."""
    if description is not None:
        if not isinstance(description, Convention):
            description = load_description(description)
        yield description, files
        return
    left = set(files)
    parents = {p.parent.parent for p in files if p.parent.name in _MSD_FOLDERS}
    for folder in sorted(parents):
        convention = conventions.msd_convention(folder / "dataset.json", labels)
        if convention is None:
            continue
        own = [p for p in files if p.parent.parent == folder and p in left]
        left -= set(own)
        test = [p for p in own if p.parent.name == "imagesTs"]
        if test and len(test) < len(own) - sum(p.parent.name == "labelsTr" for p in own):
            own = [p for p in own if p not in test]
            note = f"{convention.note}; imagesTs ({len(test)} files) left out: name it to use it"
            convention = dataclasses.replace(convention, note=note)
        yield convention, own
    rest = [p for p in files if p in left]
    yield conventions.BUILT_IN["brats2021"], rest
    yield conventions.BUILT_IN["brats2023"], rest


def _matchers(convention: Convention) -> list[tuple[str | None, re.Pattern]]:
    """(modality or None for the segmentation, pattern of the whole path) of a convention."""
    flags = re.DOTALL  # a folder may be called anything, and its cases are to be listed
    flags |= re.IGNORECASE if convention.ignore_case else 0
    # Modalities of one 4-D file share a pattern: the first stands for all.
    shared = convention.modalities[:1] if convention.channels else convention.modalities
    wanted: list[tuple[str | None, str]] = [(m, p) for m in shared for p in convention.files[m]]
    wanted += [(None, p) for p in convention.segmentation]
    return [(m, re.compile(_regex(pattern), flags)) for m, pattern in wanted]


def _unnamed(files: list[Path]) -> list[Path]:
    """Those that have no name of a scan."""
    named = [pattern for name in ("brats2021", "brats2023")
             for _, pattern in _matchers(conventions.BUILT_IN[name])]  # fmt: skip
    return [p for p in files if not any(pattern.match(p.as_posix()) for pattern in named)]


def _regex(pattern: str) -> str:
    pattern = pattern if "{case}" in pattern else "{case}" + pattern
    text, first = "", True
    for part in re.split(r"(\{case\}|\*)", _NIFTI.sub("", pattern).lstrip("/")):
        if part == "{case}":
            text += "(?P<case>[^/]+)" if first else "(?P=case)"
            first = False
        else:
            text += "[^/]*" if part == "*" else re.escape(part)
    return rf"^(?P<root>(?:.*/)?){text}\.nii(\.gz)?\Z"


def _expected(patterns: tuple[str, ...], case: str) -> str:
    pattern = patterns[0] if patterns else "_seg"
    pattern = pattern if "{case}" in pattern else "{case}" + pattern
    return _NIFTI.sub("", pattern).replace("{case}", case) + ".nii.gz"


def _assemble(
    convention: Convention, files: list[Path], partial: bool, images: bool
) -> tuple[list[Case], list[Problem]]:
    """Groups files into cases; incomplete and ambiguous ones become problems."""
    matchers = _matchers(convention)
    groups: dict[tuple[str, str], dict[str | None, list[Path]]] = {}
    for path in files:
        for modality, pattern in matchers:
            match = pattern.match(path.as_posix())
            if match:
                group = groups.setdefault((match["root"], match["case"]), {})
                group.setdefault(modality, []).append(path)
    cases, problems = [], []
    wanted = convention.modalities[:1] if convention.channels else convention.modalities
    for (folder, case), group in sorted(groups.items()):
        if images and convention.channels and set(group) == {None}:
            continue  # labelsTr given alone
        if not images and None not in group:
            continue
        held = tuple(m for m in wanted if m in group) if partial else ()
        needed = (held or wanted) if images else ()
        wrong = _misnamed(case, group)
        wrong = wrong or _incomplete(convention, Path(folder), case, group, needed)
        problems += wrong
        if wrong:
            continue
        known = _year(convention, case, folder)
        if held and not convention.channels:
            known = dataclasses.replace(known, modalities=held)
        own = needed * len(convention.modalities) if convention.channels else needed
        paths = tuple(group[modality][0] for modality in own)
        channels = tuple(convention.channels.get(m) for m in known.modalities)
        seg = group.get(None, [None])[0]
        cases.append(Case(case, paths, seg, known, channels))
    return cases, problems


def _misnamed(case: str, group: dict[str | None, list[Path]]) -> list[Problem]:
    """A case whose name would be no folder of records: files of records have its name."""
    fault = name_fault(case)
    if case == "dataset.json":
        fault = f"name {case}, that of the index of records"
    if not fault:
        return []
    where = str(next(iter(group.values()))[0])
    return [Problem(case, where, fault, "a name for its record", "rename the files of this case")]


def _incomplete(
    convention: Convention,
    folder: Path,
    case: str,
    group: dict[str | None, list[Path]],
    wanted: tuple[str, ...],
) -> list[Problem]:
    problems = []
    for modality in (*wanted, None):
        paths = group.get(modality, [])
        what = modality or "the segmentation"
        if len(paths) > 1:
            problems.append(
                Problem(
                    case,
                    str(paths[1]),
                    f"{len(paths)} files for {what}: {', '.join(p.name for p in paths)}",
                    "one",
                    "keep the right one",
                )
            )
        if not paths and modality is not None:
            beside = _beside(folder)
            own = itertools.chain(*group.values())
            present = sorted({p.name for p in (*own, *(beside if len(beside) < 10 else ()))})
            problems.append(
                Problem(
                    case,
                    str(folder / _expected(convention.files[modality], case)),
                    f"modality {modality} is missing (found {', '.join(present)})",
                    f"a file for each of {', '.join(convention.modalities)}",
                    "add or rename the file",
                )
            )
    return problems


def _year(convention: Convention, case: str, folder: str) -> Convention:
    """The sets of 2018-2020 differ from 2021 only in case names and HGG/LGG folders."""
    if convention is not conventions.BUILT_IN["brats2021"]:  # a description may have its name
        return convention
    old = re.match(r"brats(1[789]|20)_", case, re.IGNORECASE)
    graded = {"HGG", "LGG"} & set(Path(folder).parts)
    return conventions.BUILT_IN["brats2018"] if old or graded else convention


def _unique(cases: list[Case]) -> tuple[list[Case], list[Problem]]:
    kept: dict[str, Case] = {}
    problems = []
    for case in sorted(cases, key=lambda c: (c.id, str(_first(c)))):
        if case.id in kept:
            first = _first(kept[case.id]).parent
            problems.append(
                Problem(
                    case.id,
                    str(_first(case).parent),
                    f"a second case of this name; the first is in {first}",
                    "one case per name",
                    "remove or rename one of them",
                )
            )
        else:
            kept[case.id] = case
    return list(kept.values()), problems


def _first(case: Case) -> Path:
    path = (*case.images, case.segmentation)[0]
    assert path is not None
    return path


def _nothing_found(root: Path, files: list[Path], description, images: bool) -> str:
    if not files:
        return (
            f"{root}: no .nii or .nii.gz below it; expected scans; correct the path or unpack them"
        )
    example = ", ".join(str(p.relative_to(root)) for p in files[:3])
    if description is not None:
        return (
            f"{root}: none of {len(files)} NIfTI files matches the description, such as {example}; "
            "correct its file patterns"
        )
    if not images:
        return (
            f"{root}: none of {len(files)} NIfTI files has the name of a segmentation, such as "
            f"{example}; expected CASE_seg, CASE-seg, CASE or the Decathlon's dataset.json; "
            "describe the set in a file for --description"
        )
    return (
        f"{root}: none of {len(files)} NIfTI files has a known name, such as {example}; expected "
        "CASE_t1 _t1ce _t2 _flair, CASE-t1n -t1c -t2w -t2f or the Decathlon's dataset.json; "
        "describe the set in a file for --description"
    )
