"""Runs prepare and predict on one input and says what came of it."""

import contextlib
import gc
import io
import json
import pathlib
import shutil
import traceback
import warnings

import numpy as np

from masm_jax import predict, prepare, runtime
from masm_jax.data import nifti, records
from tests.faults import runs
from tests.faults.kinds import EITHER, FAILS, KINDS, WORKS
from tests.faults.made import Case

HANDLED, CLEAR = "handled rightly", "clear error"
BAD = (
    "TRACEBACK", "HANG", "MEMORY", "HALF-WRITTEN", "ESCAPED", "UNCLEAR", "WRONGLY TAKEN",
    "WRONGLY REFUSED",
)  # fmt: skip
OUTCOMES = (HANDLED, CLEAR, *BAD)
FIXES = (";", "expected", "use the version")  # what a message with a fix has
LIMIT = 2 << 30  # bytes of memory over what the process held before


def made_input(kind: str, seed: int) -> tuple[Case, str]:
    """The input of this kind and seed, and what must come of it."""
    case = Case.good(np.random.default_rng([seed, *kind.encode()]))
    return case, KINDS[kind](case)


def judge(kind: str, seed: int, sandbox: pathlib.Path) -> tuple[str, str]:
    """Makes an input in an empty folder, runs the commands that read it and judges.

    Returns:
        One of OUTCOMES, and what was said.
    """
    return (_judge_run if kind in runs.SPOILT else _judge_scans)(kind, seed, sandbox)


def _judge_run(kind, seed, sandbox):
    """A run and its records are spoilt, then evaluated, then prepared again."""
    root, out = sandbox / "set", sandbox / "o" / "p"
    out.mkdir(parents=True)
    runs.make(root)
    expected = runs.SPOILT[kind](root, np.random.default_rng([seed, *kind.encode()]))
    before, said, worst = _outside(sandbox, out), [], HANDLED
    again = [f"--input={root / 'raw'}", f"--output={root / 'records'}", "--workers=1"]
    for name, run, wanted in (
        ("eval", lambda *_: runs.evaluate(root, out / "predicted"), expected),
        ("prepare", lambda *_: prepare.main(again), EITHER),
    ):
        base = _peak(reset=True)
        outcome, text = _ran(run, root, out, [], None, wanted, str(sandbox))
        if _peak() - base > LIMIT:
            outcome = "MEMORY"
        if any(path.name.endswith((".tmp", ".old")) for path in sandbox.rglob("*")):
            outcome = "HALF-WRITTEN"
        if name == "prepare" and outcome == HANDLED:
            _read_records(root / "records")
        worst = max(worst, outcome, key=OUTCOMES.index)
        said.append(f"{name}: {outcome}: {text.strip()}")
        new = {p for p in _outside(sandbox, out) - before if root / "records" not in p.parents}
        if new or pathlib.Path("CODE_RAN").exists():
            worst = "ESCAPED"
            said.append(f"{sorted(new)[:3]}")
    return worst, "\n".join(said)


def _judge_scans(kind, seed, sandbox):
    """Files below an input folder are spoilt, then prepared and predicted."""
    raw, kept, out = sandbox / "raw", sandbox / "o" / "keep.txt", sandbox / "o" / "p"
    out.mkdir(parents=True)
    raw.mkdir()
    kept.write_text("mine")
    (out / "keep.txt").write_text("mine")
    case, expected = made_input(kind, seed)
    case.write(raw)
    before = _outside(sandbox, out)
    flags = [flag.replace("{root}", str(sandbox)) for flag in case.flags]
    thread = case.meanwhile(raw) if case.meanwhile else None
    if thread:
        thread.start()
    said, worst = [], HANDLED
    spacing = (None, 1.0)[seed % 2]
    # What predict makes of a case does not depend on a segmentation that lies there.
    good = Case.good(np.random.default_rng([seed, *kind.encode()]))
    scans_are_good = _scans(case) == _scans(good) and not flags
    of_scans = EITHER if expected == FAILS and scans_are_good else expected
    for run, wanted in ((_prepare, expected), (_predict, of_scans)):
        base = _peak(reset=True)
        outcome, text = _ran(run, raw, out, flags, spacing, wanted, str(sandbox))
        if _peak() - base > LIMIT:
            outcome = "MEMORY"
        outcome = _left(out, outcome) or outcome
        worst = max(worst, outcome, key=OUTCOMES.index)
        said.append(f"{run.__name__[1:]}: {outcome}: {text.strip()}")
    if thread:
        thread.join()
    gone = before - _outside(sandbox, out) if not thread else set()
    if gone or _outside(sandbox, out) - before or (out / "keep.txt").read_text() != "mine":
        worst = "ESCAPED"
    return worst, "\n".join(said)


def _scans(case):
    return {path: content for path, content in case.files.items() if "_seg" not in path}


def _ran(run, raw, out, flags, spacing, expected, place):
    """Outcome of one command by what it says and its exit code."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(_Utf8(text)), contextlib.redirect_stderr(text):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = run(raw, out, flags, spacing)
    except BaseException:
        return "TRACEBACK", text.getvalue() + traceback.format_exc()
    gc.collect()
    text = text.getvalue()
    if "Traceback" in text:
        return "TRACEBACK", text
    if code == 0:
        return ("WRONGLY TAKEN" if expected == FAILS else HANDLED), text
    if expected == WORKS:
        return "WRONGLY REFUSED", text
    if code not in (1, 3) or place not in text or not any(word in text for word in FIXES):
        return "UNCLEAR", f"exit code {code}: {text}"
    if "\x1b" in text or "\u202e" in text or max(map(len, text.splitlines())) > 3000:
        return "UNCLEAR", text
    return CLEAR, text


class _Utf8(io.TextIOBase):
    """Standard output of a process: it takes nothing that is no UTF-8."""

    def __init__(self, text):
        self._text = text

    def write(self, words):
        words.encode()
        return self._text.write(words)


def _prepare(raw, out, flags, spacing):
    more = [f"--spacing={spacing}"] if spacing else []
    return prepare.main(
        [f"--input={raw}", f"--output={out / 'records'}", "--workers=1", *more, *flags]
    )


def _predict(raw, out, flags, spacing):
    meta = {"spacing": spacing, "step": 1}
    before = predict.load_run, runtime.start
    predict.load_run = lambda workdir, which, given: (runs.Network(), meta)
    runtime.start = lambda: None
    try:
        return predict.main(
            [f"--workdir={out}", f"--input={raw}", f"--output={out / 'predicted'}", *flags]
        )
    finally:
        predict.load_run, runtime.start = before


def _left(out: pathlib.Path, outcome: str) -> str | None:
    """HALF-WRITTEN where something is left that no reader takes, else None."""
    try:
        if any(path.name.endswith((".tmp", ".old")) for path in out.rglob("*")):
            return "HALF-WRITTEN"
        if (out / "records" / "dataset.json").is_file():
            _read_records(out / "records")
        elif any((out / "records").glob("*/*")):
            return "HALF-WRITTEN"
        for path in (out / "predicted").glob("*.nii.gz"):
            nifti.read(path)
            summary = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
            json.loads(summary.read_text())
    except Exception:
        return "HALF-WRITTEN"
    return None


def _read_records(root):
    read = records.Records(root)
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(read.cases)
    for case in read.cases:
        image, label = read.image(case), read.label(case)
        assert np.isfinite(np.asarray(image)).all() and image.dtype == np.float16
        assert image.shape[1:] == tuple(read.meta(case)["record_shape"])
        assert label is None or label.shape == image.shape[1:]
        read.foreground(case)


def _outside(sandbox, out):
    """Everything in the sandbox but what the commands may write."""
    own = (out / "records", out / "predicted")
    found = set()
    for path in sandbox.rglob("*"):
        if not any(path == root or root in path.parents for root in own):
            found.add(path)
    return found


def _peak(reset: bool = False) -> int:
    """Most bytes of memory that this process held since the last reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM in /proc/self/status")


def clear(sandbox: pathlib.Path) -> None:
    """Empties the folder for the next input."""
    shutil.rmtree(sandbox, ignore_errors=True)
    sandbox.mkdir(parents=True, exist_ok=True)
