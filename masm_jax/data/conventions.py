"""File names and label values of the data sets: the built-in conventions."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

MODALITIES = ("t1", "t1ce", "t2", "flair")
# Internal label values of each region, nested, outer to inner. Everything that stacks regions
# along an axis uses this order. Value 4 (resection cavity, BraTS 2024) is in no region.
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
LABEL_NAMES = {
    1: "necrotic/non-enhancing core",
    2: "oedema",
    3: "enhancing tumour",
    4: "resection cavity",
}


@dataclasses.dataclass(frozen=True)
class Convention:
    """How one data set names its files and what its label values mean.

    Attributes:
        name: Name shown to the user and kept in meta.json.
        modalities: Ordered modality names, M of them.
        files: Modality -> name patterns. A pattern without ``{case}`` is a suffix: ``"_t1ce"``
            stands for ``{case}_t1ce.nii`` and ``{case}_t1ce.nii.gz``. A pattern may hold folders
            (``"imagesTr/{case}"``) and ``*`` (anything within one path part).
        segmentation: Name patterns of the segmentation.
        labels: Label value in the file -> internal value. 0 is background in both.
        regions: Region -> internal values, each inside an earlier one or apart from it.
        paint: Region -> label value in the file, painted in the order of ``regions``.
        channels: Modality -> index along the last axis of a 4-D file; empty for 3-D files.
        pairs: Modalities that belong together, for the Modality-Aware mixer.
        window: Modality -> (low, high), such as Hounsfield units: values are cut to it, and a voxel
            at or below ``low`` is outside of the body, as one of value 0 is without a window.
        brain: Whether scans are skull-stripped brains, and are looked at as such.
        ignore_case: Whether upper and lower case are the same in file names.
        note: Why these labels were chosen, for the user.
    """

    name: str
    modalities: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    segmentation: tuple[str, ...]
    labels: Mapping[int, int]
    regions: Mapping[str, tuple[int, ...]]
    paint: Mapping[str, int]
    channels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    window: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    brain: bool = True
    ignore_case: bool = False
    note: str = ""

    def describe(self) -> str:
        """Returns one line for the user: names, label values and what is painted."""
        names = " ".join(f"{m}={'|'.join(self.files[m])}" for m in self.modalities)
        if self.channels:
            names = "channels " + " ".join(f"{m}={self.channels[m]}" for m in self.modalities)
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {names}; label values: {self.meaning()}{note}"

    def meaning(self) -> str:
        """Returns the label values of each region, such as ``WT = 1+2+4, TC = 1+4, ET = 4``."""
        regions = ", ".join(
            f"{name} = {'+'.join(str(v) for v, i in self.labels.items() if i in inside)}"
            for name, inside in self.regions.items()
        )
        covered = set().union(*self.regions.values())
        outside = [v for v, i in self.labels.items() if i not in covered]
        return regions + (f"; {', '.join(map(str, outside))} in no region" if outside else "")


_SCHEMES: dict[str, tuple[dict[int, int], dict[str, int]]] = {
    "brats2018": ({1: 1, 2: 2, 4: 3}, {"WT": 2, "TC": 1, "ET": 4}),
    "brats2021": ({1: 1, 2: 2, 4: 3}, {"WT": 2, "TC": 1, "ET": 4}),
    "brats2023": ({1: 1, 2: 2, 3: 3}, {"WT": 2, "TC": 1, "ET": 3}),
    "brats2024": ({1: 1, 2: 2, 3: 3, 4: 4}, {"WT": 2, "TC": 1, "ET": 3}),
    # The Decathlon swaps 1 and 2 against BraTS: 1 oedema, 2 non-enhancing, 3 enhancing.
    "msd": ({1: 2, 2: 1, 3: 3}, {"WT": 1, "TC": 2, "ET": 3}),
}
LABEL_SCHEMES = tuple(_SCHEMES)
_Files = tuple[Mapping[str, tuple[str, ...]], tuple[str, ...]]
_UNDERSCORE: _Files = ({m: (f"_{m}",) for m in MODALITIES}, ("_seg",))
_DASH: _Files = (
    {"t1": ("-t1n",), "t1ce": ("-t1c",), "t2": ("-t2w",), "flair": ("-t2f",)},
    ("-seg",),
)
_MSD: _Files = (
    {m: ("imagesTr/{case}", "imagesTs/{case}") for m in MODALITIES},
    ("labelsTr/{case}",),
)
# Order of the 4-D file of Task01_BrainTumour; a dataset.json beside the data overrides it.
_MSD_CHANNELS = {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}


def _built_in(name: str) -> Convention:
    labels, paint = _SCHEMES[name]
    files, segmentation = {"brats2018": _UNDERSCORE, "brats2021": _UNDERSCORE, "msd": _MSD}.get(
        name, _DASH
    )
    channels = _MSD_CHANNELS if name == "msd" else {}
    return Convention(
        name, MODALITIES, files, segmentation, labels, REGIONS, paint, channels,
        ignore_case=name != "msd",
    )  # fmt: skip


BUILT_IN = {name: _built_in(name) for name in _SCHEMES}


# Segmentations alone, as nnU-Net and the submissions to challenges have them.
PLAIN = dataclasses.replace(
    BUILT_IN["brats2021"], name="CASE.nii.gz", files={m: () for m in MODALITIES},
    segmentation=("{case}",),
)  # fmt: skip


def with_labels(
    convention: Convention, scheme: str, note: str = "", *, flag: str = "--labels"
) -> Convention:
    """Returns the convention with the label values of another scheme.

    Args:
        convention: Gives the file names.
        scheme: One of ``LABEL_SCHEMES``.
        note: Kept for the user.
        flag: That gives the scheme, for the message.

    Raises:
        ValueError: The scheme is unknown.
    """
    if scheme not in _SCHEMES:
        raise ValueError(
            f"{flag}={scheme}: no such label scheme; expected one of {', '.join(LABEL_SCHEMES)}"
            f"{hint(scheme, LABEL_SCHEMES)}; for another set write a --description file"
        )
    labels, paint = _SCHEMES[scheme]
    base = BUILT_IN.get(convention.name)
    if base is not None and (base.labels, base.paint) == (labels, paint):
        name = convention.name
    elif BUILT_IN[scheme].files == convention.files:
        name = scheme
    else:
        name = f"{convention.name} names with {scheme} labels"
    return dataclasses.replace(
        convention, name=name, labels=labels, regions=REGIONS, paint=paint, note=note
    )


def to_internal(values: np.ndarray, labels: Mapping[int, int]) -> np.ndarray:
    """Remaps label values of a file to internal ones; the one place where this is done on reading.

    Args:
        values: (...) integer label values of the file, each 0 or a key of ``labels``.
        labels: File value -> internal value.

    Returns:
        (...) uint8 internal values.
    """
    table = np.zeros(256, np.uint8)
    for value, internal in labels.items():
        table[value] = internal
    return table[values.astype(np.uint8)]


def to_file(label: np.ndarray, labels: Mapping[int, int]) -> np.ndarray:
    """Remaps internal label values to those of the file; the inverse of ``to_internal``.

    Args:
        label: (...) uint8 internal values.
        labels: File value -> internal value, as in the convention.

    Returns:
        (...) uint8 label values of the file. Where two file values mean the same, the first.
    """
    table = np.zeros(256, np.uint8)
    for value, internal in reversed(list(labels.items())):
        table[internal] = value
    return table[label]


def region_masks(label: np.ndarray, regions: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Returns the region indicators (R, ...) bool of internal labels (...)."""
    return np.stack([np.isin(label, np.asarray(values)) for values in regions.values()])


def msd_convention(dataset: Path, scheme: str | None = None) -> Convention | None:
    """Reads the channel order and the label meanings of a Decathlon ``dataset.json``.

    Args:
        dataset: Path of the file.
        scheme: Label scheme that decides instead of the label names in the file.

    Returns:
        The convention, or None where the file describes no four-channel brain tumour set.

    Raises:
        ValueError: It is such a set but its label names are not understood.
    """
    try:
        content = json.loads(dataset.read_text())
        channels = {_msd_modality(v) or "": int(k) for k, v in content["modality"].items()}
        names = {int(k): str(v).lower() for k, v in content["labels"].items() if int(k)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if set(channels) != set(MODALITIES):
        return None
    base = dataclasses.replace(BUILT_IN["msd"], channels=channels)
    if scheme is not None:
        return with_labels(base, scheme, "as --labels says")
    labels = {value: _msd_meaning(name) or 0 for value, name in names.items()}
    if sorted(labels.values()) != [1, 2, 3]:
        raise ValueError(
            f"{dataset}: label names {names} are not understood; expected oedema, "
            "non-enhancing and enhancing tumour once each; correct the names or decide with "
            "--labels=msd"
        )
    back = {internal: value for value, internal in labels.items()}
    paint = {"WT": back[2], "TC": back[1], "ET": back[3]}
    return dataclasses.replace(base, labels=labels, paint=paint, note=f"as {dataset.name} says")


def _msd_modality(name: str) -> str | None:
    name = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {"flair": "flair", "t1w": "t1", "t1": "t1", "t2w": "t2", "t2": "t2"}
    known |= dict.fromkeys(("t1gd", "t1ce", "t1c", "t1wgd"), "t1ce")
    return known.get(name)


def _msd_meaning(name: str) -> int | None:
    if "edema" in name:  # also "oedema"
        return 2
    if "non" in name or "necro" in name:
        return 1
    return 3 if "enhanc" in name else None


def hint(word: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean X?)`` where a known word is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
