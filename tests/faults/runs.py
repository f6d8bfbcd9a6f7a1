"""A small run with records and an evaluation to spoil: what eval.py reads beside scans.

``Network`` stands for trained weights, so that an evaluation takes a second.
"""

import functools
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tempfile

import numpy as np
from absl import flags

from configs import masm_demo
from masm_jax import prepare, run_config
from masm_jax.data import conventions
from masm_jax.files import told
from masm_jax.inference.volume import Settings
from masm_jax.processes import Solo
from tests.faults.made import Case, bomb, flipped

FAILS, EITHER = "fails", "either"
CASES = ("First", "Second")


class Network:
    """Stands for a trained run: where the first modality is bright is tumour."""

    network = None
    settings = Settings(
        modalities=conventions.MODALITIES, regions=conventions.REGIONS, patch=(8, 8, 8),
        overlap=0.5, batch=1, flips=(), threshold=(0.5,), largest_component=False,
        fill_holes=False, minimum_ml=0.0,
    )  # fmt: skip

    def probabilities(self, image, progress=None, present=None):
        return np.repeat((image[:1] > 0.5).astype(np.float32), 3, 0)


def load_run(workdir, which="latest", given=()):
    """As eval.py --loader takes it."""
    regions = {name: list(values) for name, values in conventions.REGIONS.items()}
    return Network(), {
        "step": 1, "modalities": list(conventions.MODALITIES), "regions": regions, "spacing": None
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def _template() -> tempfile.TemporaryDirectory:
    """raw/, records/ and run/, made once in a process."""
    folder = tempfile.TemporaryDirectory()
    root = pathlib.Path(folder.name)
    case = Case(np.random.default_rng(0))
    for index, name in enumerate(CASES):
        case.add(name, seed=100 + 10 * index)
    case.write(root / "raw")
    flags_ = [f"--input={root / 'raw'}", f"--output={root / 'records'}", "--workers=1"]
    assert prepare.main(flags_) == 0
    config = masm_demo.get_config()
    run_config.save(config, root / "run")
    split = {"train": list(CASES[:1]), "val": list(CASES[1:]), "test": []}
    (root / "run" / "split.json").write_text(json.dumps(split))
    infer = {"infer": {"threshold": [0.5]}, "cases": ["First"]}
    (root / "run" / "infer.json").write_text(json.dumps(infer))
    return folder


def make(root: pathlib.Path) -> None:
    """The run, its records and its scans, below ``root``."""
    shutil.copytree(_template().name, root, dirs_exist_ok=True)
    for path in (root / "records").glob("*/meta.json"):  # absolute paths in it
        path.write_text(path.read_text().replace(_template().name, str(root)))


def evaluate(root: pathlib.Path, output: pathlib.Path, more=()) -> int:
    """eval.py in this process; an error becomes what its main() makes of it."""
    import eval as command

    words = [f"--workdir={root / 'run'}", f"--output={output}", "--split=val", "--workers=0"]
    words += [f"--records={root / 'records'}", "--loader=tests.faults.runs", *more]
    flags.FLAGS.unparse_flags()
    for name in ("reference", "labels", "description", "records"):
        flags.FLAGS[name].value = None
    flags.FLAGS(["eval.py", *words])
    try:
        return command.evaluate(root / "run", output, Solo())
    except (ValueError, OSError) as error:
        print(f"eval.py: {told(error)}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------- what is spoilt


class _Runs:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("CODE_RAN",)


def spoil_records(root: pathlib.Path, rng: np.random.Generator) -> str:
    """Bytes of a record: cut, flipped, a pickle, an archive, sizes that are not there."""
    record = root / "records" / "Second"
    name = str(rng.choice(["image.npy", "label.npy", "foreground.npz", "meta.json"]))
    path, which = record / name, int(rng.integers(6))
    data = path.read_bytes()
    if which == 0:
        path.write_bytes(data[: int(rng.choice([0, 1, 7, 60, len(data) // 2, len(data) - 1]))])
    elif which == 1:
        path.write_bytes(flipped(data, rng, int(rng.integers(1, 6)), stop=128))
    elif which == 2:
        path.write_bytes(pickle.dumps(_Runs()))
    elif which == 3:
        file = io.BytesIO()
        np.save(file, np.array([_Runs()], object), allow_pickle=True)
        path.write_bytes(file.getvalue())
    elif which == 4:
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": (4, 9000, 9000, 9000)}
        )
        path.write_bytes(file.getvalue() + bytes(100))
    else:
        path.unlink()
    return EITHER if which == 1 or name == "foreground.npz" else FAILS


def spoil_lists(root: pathlib.Path, rng: np.random.Generator) -> str:
    """Names that lead out, odd values, and no JSON, in what lists cases."""
    name = str(rng.choice(["records/dataset.json", "run/split.json", "run/infer.json"]))
    path = root / name
    content = json.loads(path.read_text())
    out = str(rng.choice(["../../../x", "..", "/tmp/x", "a/b", "", "a\nb", "x" * 300, "absent"]))
    which = int(rng.integers(4))
    if which == 0 and "cases" in content:
        content["cases"] = [*content["cases"], out]
    elif which == 0:
        content["val"] = [out]
    elif which == 1:
        key = str(rng.choice(list(content)))
        content[key] = [None, 1, "x", [1], {"a": 1}, [[]], 1e300][rng.integers(7)]
    elif which == 2:
        content.pop(str(rng.choice(list(content))))
    text = json.dumps(content).encode()
    if which == 3:
        text = [b"", b"{", text[: len(text) // 2], b"[" * 100_000, b"\xff"][rng.integers(5)]
    path.write_bytes(text)
    return EITHER


def spoil_meta(root: pathlib.Path, rng: np.random.Generator) -> str:
    """An odd value at any key of meta.json or config.json."""
    path = [root / "records/Second/meta.json", root / "run/config.json"][rng.integers(2)]
    content = json.loads(path.read_text())
    odd = [None, -1, 0, 1e300, 10**12, "x", [], {}, [10**6] * 3, [[0, 10**6]] * 3, {"../x": [1]}]
    at = content
    while True:
        key = str(rng.choice(list(at)))
        if not isinstance(at[key], dict) or not at[key] or rng.random() < 0.5:
            break
        at = at[key]
    at[key] = odd[rng.integers(len(odd))]
    path.write_text(json.dumps(content))
    return EITHER


def spoil_reference(root: pathlib.Path, rng: np.random.Generator) -> str:
    """The segmentation that a prediction is compared with."""
    path = root / "raw" / "Second" / "Second_seg.nii.gz"
    data, which = path.read_bytes(), int(rng.integers(4))
    if which == 0:
        path.write_bytes(data[: int(rng.integers(len(data)))])
    elif which == 1:
        path.write_bytes(flipped(data, rng, 6))
    elif which == 2:
        path.write_bytes(bomb(b"", 4 << 30))
    else:
        path.unlink()
        os.mkfifo(path)
    return EITHER


SPOILT = {
    "run: a record cut, flipped, swapped for a pickle": spoil_records,
    "run: names that lead out, no JSON, in lists of cases": spoil_lists,
    "run: an odd value in meta.json or config.json": spoil_meta,
    "run: the reference cut, flipped, a bomb, a pipe": spoil_reference,
}
