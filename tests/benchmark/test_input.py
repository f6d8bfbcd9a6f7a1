"""Loading crops: the ways draw the same crops; the command reports what it measured."""

import json

import numpy as np
import pytest

from masm_jax.benchmark import blosc_blocks, feeding, input, loaders, workers
from masm_jax.benchmark.__main__ import main
from masm_jax.data.records import Records

INSTALL = "is not among the test requirements (requirements-bench.txt)"


def test_blocks_are_those_of_nnunet():
    # Powers of two, halved in turn from the axis on that is longest beside what a chunk may have:
    # 32768 float32 are 128 KB. Chunks grow where they cover least, to at most 6 MB.
    shape, patch = (4, 140, 172, 140), (128,) * 3
    assert blosc_blocks.sizes(shape, patch, 4) == ((1, 32, 32, 32), (1, 128, 128, 96))
    # Twice as many int16: the longest axis keeps twice as much of them.
    labels = blosc_blocks.sizes((1, *shape[1:]), patch, 2)
    assert labels == ((1, 32, 64, 32), (1, 140, 172, 128))
    # A chunk is at most half as long again as the crop, and nothing larger than the volume.
    assert blosc_blocks.sizes(shape, (64,) * 3, 4) == ((1, 32, 32, 32), (1, 96, 96, 96))
    assert blosc_blocks.sizes((4, 10, 12, 9), (16,) * 3, 1) == ((1, 10, 12, 9),) * 2


def test_crops_over_the_edge_are_padded():
    volume = np.arange(2 * 4 * 4 * 4).reshape(2, 4, 4, 4)
    crop = loaders._crop(volume, np.array([-1, 0, 2]), 4, -7)
    assert crop.shape == (2, 4, 4, 4)
    assert (crop[:, 0] == -7).all() and (crop[..., 2:] == -7).all()
    assert (crop[:, 1:, :, :2] == volume[:, :3, :, 2:]).all()


def test_crops_lie_where_nnunet_draws_them():
    rng, shape = np.random.default_rng(0), (20, 8, 5)
    starts = np.array([loaders._start(shape, 8, {}, rng) for _ in range(300)])
    assert starts.min(0).tolist() == [0, 0, -2] and starts.max(0).tolist() == [12, 0, -1]
    tumour = {"ET": np.zeros((0, 4)), "WT": np.array([[0, 19, 2, 3]])}
    # Centred on the voxel, over the far end of the first axis; the low ends are kept.
    assert loaders._start(shape, 8, tumour, rng).tolist() == [15, 0, -1]


def test_others_store_float32_of_the_scans_integers(records):
    known = Records(records)
    image, label = loaders.whole(known, known.cases[0])
    meta, halves = known.meta(known.cases[0]), known.image(known.cases[0])
    assert image.dtype == np.float32 and label.dtype == np.uint8
    np.testing.assert_allclose(image, halves, atol=4e-3)  # halves of up to 8 are 4e-3 apart
    for channel, modality in zip(image, known.modalities):
        values = meta["intensity"][modality]
        integers = (channel * values["std"] + values["mean"])[channel != 0]
        np.testing.assert_allclose(integers, np.rint(integers), atol=2e-2)


@pytest.mark.parametrize("way", loaders.WAYS)
def test_every_way_hands_out_the_same_kind_of_crops(way, records, tmp_path):
    for package in loaders.NEEDS.get(way, ()):
        pytest.importorskip(package, reason=f"{package} {INSTALL}")
    patch, store = 16, None
    if way == "nnunet":
        packed = loaders.compress(records, tmp_path, patch)
        assert 0 < packed["bytes"] < packed["of"]
        store = tmp_path
    stream = loaders.batches(
        way, records=records, patch=patch, batch=2, foreground=1.0, store=store
    )  # fmt: skip
    for _ in range(4):
        batch = next(stream)
        image, label = np.asarray(batch["image"]), np.asarray(batch["label"]).reshape(2, 16, 16, 16)
        assert image.shape == (2, 4, 16, 16, 16)
        assert image.dtype == (np.float16 if way == "masm_jax" else np.float32)
        assert (label > 0).any((1, 2, 3)).all()  # all around tumour
        assert np.abs(image).max() > 0.5


def test_a_device_that_is_slow_never_waits_and_one_that_is_fast_does(records):
    asked = {"records": str(records), "patch": 16, "batch": 2, "foreground": 0.3}
    slow = feeding.waiting(rate=2, seconds=4, **asked)
    assert slow["steps"] >= 2 and slow["idle"] < 0.5 * slow["seconds"]
    fast = feeding.waiting(rate=1e6, seconds=1, **asked)
    assert fast["idle"] > 0.9 * fast["seconds"] and fast["waited"] > 0.2 * fast["seconds"]
    assert fast["steps"] > slow["steps"]


def test_command_reports_what_it_measured(records, tmp_path, capsys):
    asked = f"--records={records} --patch=16 --seconds=0.2 --rounds=1 --crops=30 --batches=2"
    assert main(["input", *asked.split(), f"--output={tmp_path}"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "input.json").read_text())
    assert (tmp_path / "input.md").read_text().strip() in said
    assert (tmp_path / "input.png").stat().st_size > 2000
    own = [row for row in found["throughput"] if row["way"] == "masm_jax"]
    assert [row["workers"] for row in own][0] == 0 and all(row["per_core"] > 0 for row in own)
    assert {row["way"] for row in found["throughput"]} | set(found["skipped"]) == set(loaders.WAYS)
    for way, why in found["skipped"].items():
        assert "not installed" in why and f"{way}: skipped | {why}" in said
    assert all(0 <= row["waited"] <= 1 and 0 <= row["idle"] <= 1 for row in found["waiting"])
    assert found["memory"][0]["process"] == "training process"
    assert "padded" not in said.split("loop at")[0]  # cases of 6 mm are larger than 16^3


def test_a_way_that_dies_is_named_and_the_others_are_kept(records, tmp_path, monkeypatch, capsys):
    real = workers.call

    def call(function, **options):
        if function.endswith(":compress"):
            raise workers.Failed("no space left")
        if function.endswith(":throughput"):
            assert options["environment"] == workers.KEEP_MEMORY  # of all alike
            if options["workers"]:
                raise workers.Failed("signal 9, often out of memory")
        return real(function, **options)

    monkeypatch.setattr(workers, "call", call)
    absent = dict.fromkeys(["monai", "monai, no copy"], "not looked at")
    monkeypatch.setattr(input, "skipped", lambda: absent)
    asked = f"--records={records} --patch=16 --seconds=0.2 --rounds=1 --crops=30 --batches=2"
    assert main(["input", *asked.split(), f"--output={tmp_path}"]) == 3
    assert ": failed | signal 9, often out of memory |" in capsys.readouterr().out
    found = json.loads((tmp_path / "input.json").read_text())
    assert [row["workers"] for row in found["throughput"]] == [0]
    both = ["nnunet, 16^3, its files", f"masm_jax, 16^3, {len(workers.cores())} workers"]
    assert list(found["failed"]) == both


def test_a_wrong_number_is_one_line(records, capsys):
    assert main(["input", f"--records={records}", "--patch=0"]) == 1
    assert "--patch=0: expected whole numbers" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(input.importlib.util, "find_spec", lambda name: None)
    assert set(input.skipped()) == set(loaders.NEEDS)
    assert "blosc2, torch not installed; pip install" in input.skipped()["nnunet"]


def test_an_epoch_of_few_cases_is_as_long_as_one_of_brats():
    visits = loaders.visits(["a", "b"])
    assert len(visits) == 1252 and visits.count("a") == visits.count("b")
    assert loaders.visits(["c"] * 2000) == ["c"] * 2000
