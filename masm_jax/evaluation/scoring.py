"""One segmented case against its reference: the part of an evaluation that needs no device."""

import dataclasses
import json
import pathlib
import traceback
import zlib
from typing import Any

import numpy as np

from masm_jax.data import conventions
from masm_jax.data.cases import Case
from masm_jax.data.integrity import read_segmentation
from masm_jax.data.records import Records
from masm_jax.evaluation import metrics, pictures, views
from masm_jax.evaluation.clock import Clock
from masm_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A case that the network is through with.

    Attributes:
        case: its id.
        records: folder of its record.
        regions: region -> internal values.
        in_scan: (I, J, K) uint8 internal labels in the grid of the scan.
        in_record: the same in the grid of the record, zlib-compressed.
        reference: the case of its segmentation file; None: compared with the label of the record.
        tolerance: of the NSD, mm.
        styles: of the lesion-wise metrics.
        overlay: where to draw it.
        view: file for what the report shows of it, and the spacing of that, mm.
        clock: what it took so far.
    """

    case: str
    records: pathlib.Path
    regions: dict[str, tuple[int, ...]]
    in_scan: np.ndarray
    in_record: bytes
    reference: Case | None
    tolerance: float
    styles: tuple[str, ...]
    overlay: pathlib.Path
    view: tuple[pathlib.Path, float]
    clock: Clock = dataclasses.field(default_factory=Clock)


@dataclasses.dataclass(frozen=True)
class Scored:
    """What came of it: lines of metrics.csv and lesions.csv, what went wrong, seconds by stage."""

    case: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lesions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    grid: str = ""
    problem: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def pack(labels: np.ndarray) -> bytes:
    """(D, H, W) uint8 labels as few bytes."""
    return zlib.compress(np.ascontiguousarray(labels, np.uint8).tobytes(), 1)


def score(segmented: Segmented) -> Scored:
    """Compare a case, and draw it; an error is part of the result."""
    try:
        regions, grid = _metrics(segmented)
    except (ValueError, OSError) as error:
        return Scored(segmented.case, problem=str(error))
    except Exception:  # a defect: shown with its traceback, and the other cases go on
        return Scored(segmented.case, problem=traceback.format_exc().strip())
    problem = ""
    try:
        with segmented.clock.stage("report"):
            _show(segmented, regions)
    except (ValueError, OSError) as error:  # a damaged record
        problem = f"scored, but not drawn: {error}"
    except Exception:  # the numbers are worth more than the picture
        problem = f"scored, but not drawn: {traceback.format_exc().strip()}"
    rows, lesions = lines(segmented.case, regions)
    return Scored(segmented.case, rows, lesions, grid, problem, segmented.clock.seconds)


def lines(case: str, regions: dict[str, Any]) -> tuple[list[dict], list[dict]]:
    """Lines of metrics.csv and of lesions.csv, of what ``metrics.evaluate`` says of a case."""
    rows, lesions = [], []
    for name, values in regions.items():
        own = {"case": case, "region": name}
        lesions += [own | lesion for lesion in values.pop("lesions", [])]
        rows.append(own | values)
    return rows, lesions


def _show(segmented: Segmented, scores: dict[str, Any]) -> None:
    """Three slices through the lesion as a picture, and the scans for the report."""
    records, case = Records(segmented.records), segmented.case
    image, label = np.asarray(records.image(case)), records.label(case)  # label: None with another
    drawn = labels_of(segmented, image.shape[1:])  # reference than the one it was prepared with
    spacing = records.meta(case)["record_spacing"]
    known = {"modalities": records.modalities, "regions": segmented.regions, "spacing": spacing}
    dice = "  ".join(f"{name} {values['dice']:.2f}" for name, values in scores.items())
    title = f"{case}   Dice {dice}"
    pictures.overlay(segmented.overlay, image, drawn, label, title=title, **known)
    file, view_spacing = segmented.view
    content = views.view(image, drawn, label, view_spacing=view_spacing, **known)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content))


def labels_of(segmented: Segmented, shape: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) uint8 internal labels in the grid of the record."""
    return np.frombuffer(zlib.decompress(segmented.in_record), np.uint8).reshape(shape)


def _metrics(segmented: Segmented) -> tuple[dict[str, Any], str]:
    """Scores by region, and the grid they were made in."""
    clock, records = segmented.clock, Records(segmented.records)
    meta = records.meta(segmented.case)
    asked: dict[str, Any] = {
        "regions": segmented.regions,
        "tolerance": segmented.tolerance,
        "styles": segmented.styles,
    }
    if segmented.reference is None:
        label = records.label(segmented.case)
        if label is None:
            raise ValueError(
                "it was prepared without a segmentation, so there is nothing to compare with; give "
                "one by --reference=FOLDER, or segment it with masm_jax.predict"
            )
        drawn = labels_of(segmented, label.shape)
        with clock.stage("metrics"):
            found = metrics.evaluate(drawn, label, meta["record_spacing"], **asked)
        return found, "the records"
    affine = np.asarray(meta["affine"])
    with clock.stage("reading"):
        labels = read_segmentation(segmented.reference, segmented.in_scan.shape, affine)
    assert labels is not None  # the case has a segmentation
    label = conventions.to_internal(labels, segmented.reference.convention.labels)
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    with clock.stage("metrics"):
        found = metrics.evaluate(segmented.in_scan, label, spacing, **asked)
    return found, "the scans"
