"""A run in one folder: written, read without the code that made it, refused where it must be."""

import dataclasses
import hashlib
import json
import shutil
import zipfile

import jax
import jax.export
import nibabel as nib
import numpy as np
import pytest

from masm_jax import export, run_config, sharding
from masm_jax.checkpoint import Checkpoints
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.files import replacing_folder
from masm_jax.inference import exported
from masm_jax.inference.exported import load_export
from masm_jax.inference.volume import load_run
from masm_jax.models import conv
from masm_jax.state import Network, init_state

CASE = "Phantom_00000"
MIXERS = ("aware", "concat", "concat", "concat", "concat", "shift")


def noisy(params, seed):
    """Nothing is zero as at the start: all parts of the network speak."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * random.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """A run with two checkpoints of noise; the averaged weights differ from the others.

    Trained in bfloat16, which a CPU segments in float32 unless it is told not to.
    """
    workdir = tmp_path_factory.mktemp("runs") / "run"
    rules = {"infer.threshold": (0.02, 0.015, 0.018), "model.dtype": "bfloat16"}
    config = make_config(**{"model.mixers": MIXERS, "model.detail": 4} | rules)
    run_config.save(config, workdir)
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = network.init(0)
    meta = {"modalities": MODALITIES, "regions": REGIONS, "spacing": 8.0}
    checkpoints = Checkpoints(workdir)
    for step, dice in ((1, 0.9), (2, 0.1)):
        average = jax.device_put(noisy(params, step))
        state = init_state(network, jax.device_put(params)) | {"ema": average}
        checkpoints.save(step, state, dice=dice, meta=meta | {"dice": dice})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def folder(run, command):
    """Its export, made by the command."""
    output = run.parent / "export"
    words = ("-m", "masm_jax.export", f"--workdir={run}", f"--output={output}")
    said = command(*words)
    assert f"step 2 of {run}, for cpu, cuda, tpu" in said.stdout
    assert f"masm_jax.predict --from_export={output}" in said.stdout
    return output


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "export")


@pytest.fixture(scope="module")
def scan():
    image = np.random.default_rng(3).normal(size=(4, 20, 24, 18)).astype(np.float16)
    image[:, :2] = 0
    return image


def one_device():
    return sharding.make_mesh(jax.devices()[:1])


def rewrite(folder, **changes):
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- the same numbers


@pytest.fixture(scope="module")
def of_run(run, scan):
    segmenter, meta = load_run(run, mesh=one_device())
    probabilities = segmenter.probabilities(scan)
    assert probabilities.std() > 0.01  # the comparison is of something
    return probabilities, segmenter.settings, meta


@pytest.mark.parametrize(("devices", "batch"), [(1, 4), (1, 3), (4, 6)])
def test_probabilities_are_those_of_the_run(folder, of_run, scan, devices, batch):
    expected, settings, meta = of_run
    mesh = sharding.make_mesh(jax.devices()[:devices])
    segmenter, about = load_export(folder, mesh=mesh)
    assert about["step"] == meta["step"] == 2 and about["spacing"] == meta["spacing"] == 8.0
    assert exported_like(segmenter.settings) == exported_like(settings)
    segmenter.settings = dataclasses.replace(segmenter.settings, batch=batch)
    np.testing.assert_allclose(segmenter.probabilities(scan), expected, rtol=0, atol=1e-5)


def test_a_cpu_segments_in_float32(run, of_run, scan, folder, tmp_path, caplog):
    """Also what was trained in bfloat16; the export for an accelerator stays as it was trained."""
    shutil.copytree(run, tmp_path / "run")
    config = run_config.load(run)
    config.model.dtype = "float32"
    run_config.save(config, tmp_path / "run")
    exact = load_run(tmp_path / "run", mesh=one_device())[0].probabilities(scan)
    np.testing.assert_array_equal(of_run[0], exact)
    with caplog.at_level("INFO"):
        load_run(run, mesh=one_device())
    assert "computing in float32 here, trained in bfloat16 (infer.dtype)" in caplog.text
    told = load_run(run, mesh=one_device(), given=["infer.dtype=bfloat16"])[0].probabilities(scan)
    assert 1e-5 < np.abs(told - exact).max() < 0.05
    kinds = json.loads((folder / "export.json").read_text())["dtype"]
    assert kinds == {"cpu": "float32", "cuda": "bfloat16", "tpu": "bfloat16"}


def exported_like(settings):
    return json.loads(json.dumps(dataclasses.asdict(settings)))


@pytest.fixture(scope="module")
def phantom(command, tmp_path_factory):
    raw = tmp_path_factory.mktemp("phantoms")
    command("-m", "masm_jax.phantom", f"--output={raw}", "--cases=1", "--spacing=6")
    return raw / CASE


# Runs predict where these cannot be imported.
BLOCKED = """
import sys
for name in ("configs", "flax", "ml_collections", "optax", "orbax", "grain", "tensorboardX",
             "masm_jax.models", "masm_jax.config", "masm_jax.run_config", "masm_jax.state",
             "masm_jax.checkpoint"):
    sys.modules[name] = None
from masm_jax import predict
sys.exit(predict.main(sys.argv[1:]))
"""


def test_label_files_are_those_of_the_run_without_config_and_network(
    run, folder, phantom, command, tmp_path
):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    asked = (f"--input={phantom}", "--labels=brats2021", "--probabilities")
    of_run, of_export = tmp_path / "run", tmp_path / "export"
    command("-m", "masm_jax.predict", f"--workdir={run}", *asked, f"--output={of_run}")
    command("-c", BLOCKED, f"--from_export={moved}", *asked, f"--output={of_export}")
    names = sorted(path.name for path in of_run.iterdir())
    assert sorted(path.name for path in of_export.iterdir()) == names
    labels, again = (nib.load(out / f"{CASE}.nii.gz") for out in (of_run, of_export))
    np.testing.assert_array_equal(np.asarray(labels.dataobj), np.asarray(again.dataobj))
    assert len(np.unique(labels.dataobj)) > 1 and (labels.affine == again.affine).all()
    for region in REGIONS:
        maps = [nib.load(out / f"{CASE}_{region}.nii.gz").dataobj for out in (of_run, of_export)]
        np.testing.assert_allclose(*map(np.asarray, maps), rtol=0, atol=1e-5)
    one, other = (json.loads((out / f"{CASE}.json").read_text()) for out in (of_run, of_export))
    assert other["run"] == str(moved) and other["step"] == 2
    for key in ("volumes_ml", "labels", "rules"):
        assert one[key] == other[key]


# ---------------------------------------------------------------- what is in the folder


def test_the_folder_explains_itself(folder, run):
    about = json.loads((folder / "export.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"export.json", *about["sha256"]}
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["convolution"] == {"cpu": "stacked", "cuda": "direct", "tpu": "taps"}
    assert about["notice"] == "research software, not a medical device"
    assert about["settings"]["modalities"] == list(MODALITIES)
    assert about["settings"]["threshold"] == [0.02, 0.015, 0.018]
    assert about["jax"] == jax.__version__ and "6 months" in about["guarantee"]
    for name, digest in about["sha256"].items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert b".py" not in content.replace(b".npy", b"")  # no path of the machine it was made on


def test_weights_are_the_averaged_ones_without_pickle(folder, run):
    network = Network(run_config.load(run), modalities=MODALITIES, regions=REGIONS)
    expected = export.by_name(noisy(network.init(0), 2))
    with np.load(folder / "weights.npz", allow_pickle=False) as weights:
        assert set(weights) == set(expected)
        for name, weight in expected.items():
            np.testing.assert_array_equal(weights[name], weight)
            assert weights[name].dtype == np.float32
    with zipfile.ZipFile(folder / "weights.npz") as file:
        assert all(name.endswith(".npy") for name in file.namelist())


def test_the_programs_hold_the_convolutions_of_their_platforms(folder):
    """Depth in the batch ("stacked", "taps": 4-D kernels) or one 3-D convolution ("direct"); on a
    CPU those of the smallest planes are products."""
    dimensions = {}
    for platform in ("cpu", "cuda", "tpu"):
        content = bytearray((folder / exported.program_file(platform)).read_bytes())
        program = jax.export.deserialize(content)
        assert program.platforms == (platform,)
        text = program.mlir_module()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        dimensions[platform] = len(lines), any("[0, 1, 2, i, o]" in line for line in lines)
    convolutions, on_cpu = dimensions["cuda"][0], dimensions["cpu"][0]
    assert 0 < on_cpu < convolutions
    assert dimensions == {
        "cpu": (on_cpu, False),
        "cuda": (convolutions, True),
        "tpu": (3 * convolutions, False),
    }


@pytest.mark.parametrize("mixers", [(), ("shift",) * 6])
def test_every_network_can_be_exported_for_any_batch(make_config, mixers):
    changes = {"model.mixers": mixers, "model.detail": 4, "model.dtype": "bfloat16"}
    config = make_config(**changes)
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    program = export.program(network, network.init(None), "tpu")
    assert str(program.in_avals[-1]) == "float32[b,4,16,16,16]"
    assert [str(aval) for aval in program.out_avals] == ["float32[b,16,16,16,3]"]
    assert conv.fastest(jax.default_backend()) == "stacked"  # what was traced for ends with it


# ---------------------------------------------------------------- other ways to ask


def test_the_best_checkpoint_with_other_rules_replaces_an_older_export(
    run, folder, command, copied
):
    words = (f"--workdir={run}", f"--output={copied}", "--platforms=cpu")
    given = ("--checkpoint=best", "--batch=7", "--set=infer.flips=(0,)")
    command("-m", "masm_jax.export", *words, *given)
    assert sorted(path.name for path in copied.iterdir()) == [
        "export.json",
        "network.cpu.jaxexport",
        "weights.npz",
    ]
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]  # nothing left over
    segmenter, about = load_export(copied, mesh=one_device())
    assert about["step"] == 1 and about["checkpoint"] == "best"
    assert segmenter.settings.batch == 7 and tuple(segmenter.settings.flips) == (0,)
    # The same program: only the weights and the rules are others.
    name = exported.program_file("cpu")
    assert (copied / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "folder"
    with replacing_folder(path) as new:
        (new / "one").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyError), replacing_folder(path) as new:
        (new / "two").write_text("2")
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["one"]
    with replacing_folder(path) as new:
        (new / "two").write_text("2")
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- what is refused, and how


def test_what_is_not_an_export_is_not_overwritten(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="holds mine, no part of an export"):
        export.export_run(run, tmp_path)
    with pytest.raises(ValueError, match="mine is a file"):
        export.export_run(run, tmp_path / "mine")
    (tmp_path / "export.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="not of an export"):
        export.export_run(run, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_files_beside_an_export_are_not_lost(copied):
    (copied / "segmentations").mkdir()
    with pytest.raises(ValueError, match="holds segmentations, no part of an export"):
        exported.check_target(copied)


def test_what_cannot_be_exported_is_one_readable_line(command, tmp_path):
    flags = ("--workdir=/nowhere", f"--output={tmp_path / 'out'}")
    (line,) = command("-m", "masm_jax.export", *flags, code=1).stderr.splitlines()
    assert line.startswith("export: /nowhere/config.json does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"platforms": ["cpu", "gpu"]}, "'gpu' is none; expected some of cpu,cuda,rocm,tpu"),
        ({"given": ["infer.batch=0"]}, "infer.batch = 0: expected 1 or more"),
        ({"given": ["infer.flip=(0,)"]}, "no such key"),
        ({"given": ["infer.runs=('other',)"]}, "holds one network.*--set='infer.runs="),
    ],
)
def test_what_cannot_be_exported_is_said(run, tmp_path, asked, words):
    with pytest.raises(ValueError, match=words):
        export.export_run(run, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_export_is_said_to_be_none(run, tmp_path):
    for folder in (run, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="export.json does not exist: .* masm_jax.export has"):
            load_export(folder)


@pytest.mark.parametrize("name", ["weights.npz", "network.cpu.jaxexport", "network.tpu.jaxexport"])
def test_a_damaged_or_missing_file_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
        load_export(copied)
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_export(copied)


def test_a_damaged_description_is_named(copied):
    path = copied / "export.json"
    text = path.read_text()
    path.write_text(text[:200])
    with pytest.raises(ValueError, match="export.json is damaged"):
        load_export(copied)
    about = json.loads(text)
    about["settings"]["treshold"] = about["settings"].pop("threshold")
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="export.json .*treshold"):
        load_export(copied)
    del about["settings"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="export.json .*settings"):
        load_export(copied)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 of the format; this masm_jax reads up to 1: update it"),
        ({"preprocessing": 99}, "prepared by version 99; this masm_jax prepares by version"),
        ({"calling_convention": 999}, f"calling convention 999; jax {jax.__version__} runs"),
    ],
)
def test_an_export_of_another_version_is_refused(copied, changes, words):
    rewrite(copied, **changes)
    with pytest.raises(ValueError, match=words):
        load_export(copied)


def test_a_program_that_this_jax_cannot_read_is_named(copied):
    name = exported.program_file("cpu")
    (copied / name).write_bytes(b"of another time")
    sha256 = json.loads((copied / "export.json").read_text())["sha256"]
    rewrite(copied, sha256=sha256 | {name: hashlib.sha256(b"of another time").hexdigest()})
    with pytest.raises(ValueError, match=f"{name} cannot be read by jax .* promises to run it"):
        load_export(copied)


def test_a_platform_that_is_not_in_it_is_named_with_the_command(run, copied):
    rewrite(copied, platforms=["cuda", "tpu"])
    with pytest.raises(ValueError, match="for cuda, tpu; this process computes on cpu") as error:
        load_export(copied)
    words = f"python -m masm_jax.export --workdir={run} --output={copied} --platforms=cuda,tpu,cpu"
    assert words in str(error.value)


def test_other_modalities_than_those_of_the_export_fail_the_case(
    phantom, command, copied, tmp_path
):
    settings = json.loads((copied / "export.json").read_text())["settings"]
    rewrite(copied, settings=settings | {"modalities": ["t1", "flair"]})
    flags = (f"--from_export={copied}", f"--input={phantom}", f"--output={tmp_path / 'out'}")
    said = command("-m", "masm_jax.predict", *flags, "--labels=brats2021", code=3)
    assert "modalities t1, t1ce, t2, flair; the run was trained on t1, flair" in said.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "one of the arguments --workdir --from_export is required"),
        (("--workdir=a", "--from_export=b"), "not allowed with argument --workdir"),
        (("--from_export=b", "--set=infer.batch=1"), "--set and --checkpoint go with --workdir"),
        (("--from_export=b", "--checkpoint=best"), "--set and --checkpoint go with --workdir"),
    ],
)
def test_either_a_run_or_an_export(flags, words, capsys):
    from masm_jax import predict

    with pytest.raises(SystemExit) as stopped:
        predict.main([*flags, "--input=case", "--output=out"])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
