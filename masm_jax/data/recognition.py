"""Recognises what the label values of a data set mean, and refuses where there is doubt."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from masm_jax.data import conventions, nifti

if TYPE_CHECKING:
    from masm_jax.data.cases import Case


def recognise_labels(style: str, values: Mapping[str, set[int]]) -> tuple[str, str]:
    """Decides what the label values of a data set mean.

    Args:
        style: ``"_t1ce"`` (names of 2018-2021), ``"-t1n"`` (names of 2023 on) or
            ``"CASE.nii.gz"`` (segmentations alone, of any year).
        values: Case id -> label values present in its segmentation.

    Returns:
        The name of the label scheme and the reason, for the user.

    Raises:
        ValueError: The values allow more than one meaning; the message names the flag.
    """
    three = sorted(case for case, seen in values.items() if 3 in seen)
    four = sorted(case for case, seen in values.items() if 4 in seen)
    seen = sorted(v for v in set().union(*values.values()) if v) if values else []
    if not values:
        scheme = "brats2023" if style == "-t1n" else "brats2021"
        return scheme, "no segmentation read: labels assumed from the file names"
    said = f"{len(values)} segmentations with {style} names hold the values {_list(seen)}"
    if style != "-t1n":
        if three and four:
            raise ValueError(
                f"{said}: 4 in {_some(four)} and 3 in {_some(three)}; either may be the "
                "enhancing tumour; decide with --labels=brats2021 (4 is enhancing; cases with 3 "
                "are then listed as faulty) or --labels=brats2024 (3 is enhancing, 4 the cavity)"
            )
        if three:
            raise ValueError(
                f"{said}: 3 in {_some(three)}, 4 in none; sets of 2018-2021 hold 1, 2, 4; decide "
                "with --labels=brats2023 (1 core, 2 oedema, 3 enhancing) or --labels=msd (1 "
                "oedema, 2 core, 3 enhancing: also what converters for nnU-Net write)"
            )
        scheme = "brats2021"
    elif four and not three:
        raise ValueError(
            f"{said}: 4 in {_some(four)}, 3 in none; 4 may be the enhancing tumour (labels of "
            "2021 under new names) or the resection cavity of 2024; decide with --labels=brats2021 "
            "or --labels=brats2024"
        )
    else:
        scheme = "brats2024" if four else "brats2023"
    note = f"label values seen: {_list(seen) or 'none'}"
    if not three and not four:
        note += "; no enhancing tumour in any case, which reads the same whatever its value"
    return scheme, note


def label_values(path: Path, image: Path) -> set[int] | None:
    """Returns the label values other than 0 in a file, None where it cannot be read as labels.

    Labels are packed to a thousandth, so the size of ``image``, of the same case, says how many
    voxels there may be.
    """
    try:
        array = nifti.read(path, voxels=nifti.room(image))[0]
    except ValueError:
        return None  # listed with its reason when the case is prepared
    values = np.unique(array[array != 0])
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        return None
    return {int(v) for v in values}


def recognise(root: Path, cases: "list[Case]", labels: str | None) -> "list[Case]":
    """Gives the cases of one naming style their label scheme.

    Args:
        root: The data set, for messages.
        cases: Cases of one style of names.
        labels: Name of the scheme if the user decided it, else None.

    Returns:
        The cases with their convention's labels set.

    Raises:
        ValueError: There is doubt; the message names the flag that decides.
    """
    if not cases:
        return []
    newer = cases[0].convention.files == conventions.BUILT_IN["brats2023"].files
    plain = cases[0].convention.files == conventions.PLAIN.files
    style = "-t1n" if newer else "CASE.nii.gz" if plain else "_t1ce"
    with_seg = [case for case in cases if case.segmentation is not None]
    if labels is not None:
        scheme, note = labels, "as --labels says"
    else:
        children = [case.id for case in with_seg if "-PED-" in case.id.upper()]
        if children:
            raise ValueError(
                f"{root}: {_some(children)} are of BraTS-PED, where 1 is the enhancing tumour and "
                "4 the oedema; give the meaning in a --description file, or --labels=brats2023 if "
                "the files were remapped"
            )
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            files = [(c.segmentation, (*c.images, c.segmentation)[0]) for c in with_seg]
            read = pool.map(label_values, *zip(*files)) if files else ()
            values = {case.id: seen for case, seen in zip(with_seg, read) if seen is not None}
        try:
            scheme, note = recognise_labels(style, values)
        except ValueError as error:
            raise ValueError(f"{root}: {error}") from error
    converted = {}
    for case in cases:  # of those that lack modalities the convention names the others alone
        kind = case.convention.name, case.convention.modalities
        if kind not in converted:
            converted[kind] = conventions.with_labels(case.convention, scheme, note)
    return [
        dataclasses.replace(c, convention=converted[c.convention.name, c.convention.modalities])
        for c in cases
    ]


def _list(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return shown + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def _some(cases: list[str]) -> str:
    return ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
