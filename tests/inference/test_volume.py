"""One case: through a network, and back into the grid and the labels of its scan."""

import types

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from configs import masm_brats
from masm_jax import sharding
from masm_jax.checkpoint import Checkpoints
from masm_jax.data import cases, nifti, preprocess
from masm_jax.data.conventions import MODALITIES, REGIONS, region_masks
from masm_jax.data.pipeline import Crop
from masm_jax.inference.volume import (
    Ensemble,
    Segmenter,
    Settings,
    check_task,
    decoding,
    in_scan,
    load_run,
)

SHAPE = (12, 15, 10)
AFFINES = {
    "LPS": [[-1.0, 0, 0, 3], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]],
    "SAR": [[0, 0, 2.0, 5], [0, 1.0, 0, -7], [1.5, 0, 0, 1], [0, 0, 0, 1]],
}
NAMES = {
    "brats2021": (("_t1", "_t1ce", "_t2", "_flair"), "_seg", (1, 2, 4)),
    "brats2023": (("-t1n", "-t1c", "-t2w", "-t2f"), "-seg", (1, 2, 3)),
}


@pytest.fixture
def make_case(tmp_path):
    """Writes a case of noise whose segmentation is noise too: make_case(scheme, orientation)."""

    def make(scheme, orientation):
        names, seg, values = NAMES[scheme]
        random = np.random.default_rng(0)
        brain = np.zeros(SHAPE, bool)
        brain[2:-1, 1:-3, 1:-2] = True
        label = np.where(brain, random.choice([0, *values], SHAPE), 0).astype(np.uint8)
        affine = np.array(AFFINES[orientation])
        folder = tmp_path / "CASE"
        folder.mkdir()
        for name in names:
            image = np.where(brain, random.integers(1, 900, SHAPE), 0).astype(np.int16)
            nib.save(nib.Nifti1Image(image, affine), folder / f"CASE{name}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"CASE{seg}.nii.gz")
        ((case,), problems) = cases.find_cases(folder, labels=scheme)
        assert not problems
        return case, label

    return make


@pytest.mark.parametrize("orientation", AFFINES)
@pytest.mark.parametrize("scheme", NAMES)
def test_a_perfect_prediction_is_the_segmentation(make_case, tmp_path, scheme, orientation):
    """Cropped, reoriented, remapped, undone and written: every voxel as it was."""
    case, label = make_case(scheme, orientation)
    record = preprocess.preprocess(case)
    probabilities = region_masks(record.label, REGIONS).astype(np.float32)
    internal, written = in_scan(probabilities, record.meta, threshold=0.5)
    np.testing.assert_array_equal(written, label)
    np.testing.assert_array_equal(np.where(internal == 3, NAMES[scheme][2][2], internal), label)
    nifti.write_labels(tmp_path / "out.nii.gz", written, like=case.images[0])
    image = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), label)
    np.testing.assert_array_equal(image.affine, AFFINES[orientation])


def test_resampled_probabilities_come_back_to_the_grid_of_the_scan(make_case):
    case, label = make_case("brats2021", "SAR")
    record = preprocess.preprocess(case, spacing=3.0)
    assert record.image.shape[1:] != SHAPE
    probabilities = np.ones((3, *record.image.shape[1:]), np.float32)
    probabilities[2] = 0.4
    internal, written = in_scan(probabilities, record.meta, threshold=0.5)
    assert internal.shape == written.shape == SHAPE
    brain = np.zeros(SHAPE, bool)
    brain[2:-1, 1:-3, 1:-2] = True
    np.testing.assert_array_equal(internal, np.where(brain, 1, 0))
    internal, written = in_scan(probabilities, record.meta, threshold=0.3)
    np.testing.assert_array_equal(internal, np.where(brain, 3, 0))
    np.testing.assert_array_equal(written, np.where(brain, 4, 0))


def test_labels_without_a_file_to_follow_get_the_affine(tmp_path):
    label = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 5
    affine = np.array(AFFINES["SAR"])
    nifti.write_labels(tmp_path / "out.nii.gz", label.astype(np.uint8), like=affine)
    image = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), label)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-6)


# ---------------------------------------------------------------- the segmenter


class Fixed:
    """A network whose logits are the first modalities, times a weight."""

    def __init__(self):
        self.tiles = []

    def __call__(self, params, x):
        self.tiles.append(x.shape)
        return jnp.moveaxis(x[:, :3], 1, -1) * params


def settings(**changes):
    infer = dict(masm_brats.get_config().infer) | {"batch": 2}
    del infer["average"], infer["runs"], infer["token_share"], infer["dtype"]
    shared = {"modalities": MODALITIES, "regions": REGIONS, "patch": (8, 8, 8)}
    return Settings(**shared | infer | changes)


def image(shape):
    return np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float16)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize(
    ("devices", "spatial", "wanted", "batch"),
    [(1, 1, 2, 2), (4, 1, 2, 4), (4, 1, 5, 8), (4, 2, 3, 4), (4, 4, 3, 3)],
)
def test_tiles_are_spread_over_the_devices(devices, spatial, wanted, batch):
    network = Fixed()
    mesh = sharding.make_mesh(jax.devices()[:devices], spatial=spatial)
    segmenter = Segmenter(network, np.float32(1.0), mesh, settings(batch=wanted))
    seen = []
    scan = image((13, 9, 8))
    with jax.transfer_guard("disallow"):  # as in the training loop
        result = segmenter.probabilities(scan, progress=lambda *done: seen.append(done))
    np.testing.assert_allclose(result, sigmoid(scan[:3]), atol=1e-6)
    assert network.tiles == [(batch, 4, 8, 8, 8)] and seen[-1] == (6, 6)


def test_new_weights_are_taken_without_compiling_again():
    network = Fixed()
    mesh = sharding.make_mesh(jax.devices()[:1])
    segmenter = Segmenter(network, np.float32(1.0), mesh, settings(flips=(0,)))
    scan = image((8, 8, 8))
    first = segmenter.probabilities(scan)
    segmenter.update(jax.device_put(np.float32(-2.0), sharding.replicated(mesh)))
    second = segmenter.probabilities(scan)
    np.testing.assert_allclose(first, sigmoid(scan[:3]), atol=1e-6)
    np.testing.assert_allclose(second, sigmoid(-2.0 * scan[:3].astype(np.float32)), atol=1e-6)
    assert len(network.tiles) == 1


@pytest.mark.parametrize("patch", [(8, 8, 8), (12, 9, 6)])
def test_a_scan_smaller_than_a_tile_lies_in_it_as_in_training(patch):
    scan = image((7, 8, 5))
    label = np.zeros(scan.shape[1:], np.uint8)
    small = types.SimpleNamespace(image=lambda case: scan, label=lambda case: label)
    crop = Crop(small, ("A",), patch, foreground=0.0)(0, np.random.default_rng(0))
    mesh, tiles = sharding.make_mesh(jax.devices()[:1]), []
    segmenter = Segmenter(Fixed(), np.float32(1.0), mesh, settings(batch=1, patch=patch))
    step, segmenter._step = segmenter._step, lambda params, x: tiles.append(x) or step(params, x)
    segmenter.probabilities(scan)
    np.testing.assert_array_equal(tiles[0][0], crop["image"].astype(np.float32))


# ---------------------------------------------------------------- loading


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path, make_config):
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_run(tmp_path)
    from masm_jax import run_config

    run_config.save(make_config(), tmp_path)
    for which in ("latest", "best"):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            load_run(tmp_path, which=which)


@pytest.fixture(scope="module")
def make_run(make_config):
    """make_run(folder, {step: (weight, dice)}, keep, spacing): every averaged weight is that."""
    from masm_jax import run_config
    from masm_jax.state import Network, init_state

    config = make_config(**{"model.mixers": ()})
    network = Network(config, modalities=("t1", "flair"), regions=REGIONS)
    state = jax.jit(lambda params: init_state(network, params))(network.init(0))

    def make(folder, steps, keep=1, spacing=2.0):
        folder.mkdir(exist_ok=True)
        config.log.keep = keep
        run_config.save(config, folder)
        meta = {"modalities": ["t1", "flair"], "regions": REGIONS, "spacing": spacing}
        checkpoints = Checkpoints(folder, keep=keep)
        for step, (weight, dice) in steps.items():
            ema = jax.tree.map(lambda x, weight=weight: jnp.full_like(x, weight), state["ema"])
            checkpoints.save(step, state | {"ema": ema}, dice=dice, meta=meta | {"dice": dice})
        checkpoints.close()
        return folder

    return make


def weights_of(segmenter):
    leaves = jax.device_get(jax.tree.leaves(segmenter._params))
    values = {float(value) for leaf in leaves for value in np.unique(leaf)}
    assert len(values) == 1
    return values.pop()


def test_the_latest_or_the_best_averaged_weights_are_loaded(tmp_path, make_run):
    make_run(tmp_path, {1: (1.0, 0.9), 2: (2.0, 0.1)})
    for which, step in (("latest", 2), ("best", 1)):
        segmenter, meta = load_run(tmp_path, which=which)
        assert meta["step"] == step and meta["spacing"] == 2.0
        assert segmenter.settings.modalities == ("t1", "flair")
        assert segmenter.settings.regions == {k: list(v) for k, v in REGIONS.items()}
        assert weights_of(segmenter) == step
        for leaf in jax.tree.leaves(segmenter._params):
            assert len(leaf.sharding.device_set) == len(jax.devices())


def test_weights_of_the_newest_checkpoints_are_averaged(tmp_path, make_run):
    make_run(tmp_path, {1: (9.0, 0.9), 2: (1.0, 0.1), 3: (2.0, 0.1), 4: (6.0, 0.1)}, keep=3)
    for count, mean in ((1, 6.0), (2, 4.0), (3, 3.0)):
        assert weights_of(load_run(tmp_path, given=[f"infer.average={count}"])[0]) == mean
    assert weights_of(load_run(tmp_path, which="best")[0]) == 9.0
    with pytest.raises(ValueError, match="infer.average = 2 averages the newest"):
        load_run(tmp_path, which="best", given=["infer.average=2"])
    with pytest.raises(ValueError, match="infer.average = 4: expected 1 to log.keep .3."):
        load_run(tmp_path, given=["infer.average=4"])


def test_probabilities_of_several_runs_are_averaged(tmp_path, make_run):
    a, b = (make_run(tmp_path / name, {1: (w, 0.5)}) for name, w in (("a", 0.02), ("b", -0.03)))
    ensemble, _ = load_run(a, given=[f"infer.runs=({str(b)!r},)"])
    scan, seen = np.random.default_rng(2).normal(size=(2, 18, 16, 16)).astype(np.float16), []
    found = ensemble.probabilities(scan, lambda *done: seen.append(done))
    alone = [load_run(run)[0].probabilities(scan) for run in (a, b)]
    np.testing.assert_allclose(found, (alone[0] + alone[1]) / 2, atol=1e-6)
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    other = make_run(tmp_path / "c", {1: (1.0, 0.5)}, spacing=1.0)
    with pytest.raises(ValueError, match="infer.runs: spacing of .*c is 1.0, of .*a 2.0"):
        load_run(a, given=[f"infer.runs={str(other)!r}"])


def test_several_runs_take_what_lacks_modalities_where_all_were_trained_for_it():
    mesh = sharding.make_mesh(jax.devices()[:1])
    for trained, may_lack in (((True, True), True), ((True, False), False), ((False, True), False)):
        own = [Segmenter(Fixed(), 1.0, mesh, settings(may_lack=each)) for each in trained]
        assert Ensemble(own).settings == settings(may_lack=may_lack)


def test_the_minimum_is_a_volume():
    """0.05 ml of voxels of 8 mm3 are 6.25: six are too few, seven are enough."""
    small = settings(minimum_ml=0.05)
    assert decoding(small, (2.0, 2.0, 2.0))["minimum"] == 7
    assert decoding(small, (1.0, 1.0, 1.0))["minimum"] == 50
    assert decoding(settings(minimum_ml=0.0), (2.0, 2.0, 2.0))["minimum"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing": 1.0}, "spacing 1.0; the run was trained on 2.0"),
        ({"spacing": None}, "spacing that of the scans; the run was trained on 2.0"),
        ({"modalities": ("flair", "t1")}, "modalities flair, t1; the run was trained on t1, flair"),
        ({"regions": {"WT": (1, 2, 3)}}, "regions WT = .1, 2, 3.; the run"),
        ({"regions": dict(reversed(REGIONS.items()))}, "regions .*the same task"),
    ],
)
def test_data_of_another_task_are_refused(changes, words):
    meta = {"modalities": ["t1", "flair"], "spacing": 2.0}
    meta["regions"] = {name: list(values) for name, values in REGIONS.items()}
    data = {"modalities": ("t1", "flair"), "spacing": 2.0, "regions": REGIONS}
    check_task(meta, **data, where="records/a")
    with pytest.raises(ValueError, match=f"records/a: .*{words}"):
        check_task(meta, **data | changes, where="records/a")
