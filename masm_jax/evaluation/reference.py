"""What a case is compared with: segmentations in a folder, or the one it was prepared from."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from masm_jax.data import cases as cases_lib
from masm_jax.data.conventions import Convention
from masm_jax.data.records import Records
from masm_jax.inference.volume import check_task


def find(
    folder: str | None,
    cases: Sequence[str],
    records: Records,
    metas: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
    *,
    labels: str | None = None,
    description: str | None = None,
) -> dict[str, cases_lib.Case]:
    """Case -> case of its segmentation below a folder; empty without one.

    Args:
        folder: of --reference; None: none.
        cases: Ids, each of which must be there.
        records: That hold the cases.
        metas: Of those that can be read.
        run: Meta of the checkpoint.
        labels: Scheme of the values there, where not that of the records.
        description: Description file of the set, where it has other names or values.

    Raises:
        ValueError: One is missing, incomplete, or its regions or label values mean something else.
    """
    if folder is None:
        if labels or description:
            raise ValueError("--labels and --description go with --reference; leave them out")
        return {}
    found, problems = cases_lib.find_cases(
        folder, labels=labels, description=description, images=False
    )
    references = {case.id: case for case in found}
    missing = [case for case in cases if case not in references]
    wrong = [str(problem) for problem in problems if problem.case in cases][:5]
    if missing:
        wrong.append(
            f"no segmentation for {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}"
            "; expected one for every case of the split, CASE_seg.nii.gz, CASE-seg.nii.gz, "
            "CASE.nii.gz where all are so, or named as a --description says"
        )
    if wrong:
        raise ValueError(f"--reference={folder}: {'; '.join(wrong)}")
    for case in cases:
        task = references[case].convention
        where = f"--reference={folder}: {case}"
        check_task(
            run, modalities=run["modalities"], regions=task.regions, spacing=run["spacing"],
            where=where,
        )  # fmt: skip
        if labels or description or case not in metas:
            continue
        own = prepared_from(case, records, metas[case]).convention
        if not task.labels.items() <= own.labels.items():
            raise ValueError(
                f"{where}: label values {task.meaning()} ({task.name}); its record was made with "
                f"{own.meaning()} ({own.name}); expected the same; say what they mean here with "
                "--labels or --description"
            )
    return {case: references[case] for case in cases}


def prepared_from(case: str, records: Records, meta: Mapping[str, Any]) -> cases_lib.Case:
    """The case of the segmentation that a record was made with."""
    file = meta["segmentation"]
    convention = Convention(
        name=meta["convention"], modalities=records.modalities, files={}, segmentation=(),
        labels={int(value): internal for value, internal in meta["labels"].items()},
        regions=meta["regions"], paint=meta["paint"],
    )  # fmt: skip
    return cases_lib.Case(case, (), pathlib.Path(file) if file else None, convention)
