"""PyTorch networks get what ours get: crops to the bit, loss, update, tiles."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from masm_jax import losses, optim, run_config, steps
from masm_jax.benchmark import torch_networks, torch_steps, torch_train
from masm_jax.data import pipeline
from masm_jax.data.records import Records
from tests.conftest import CASES

TINY = "tests.benchmark.tiny_torch:build"


@pytest.fixture
def config(make_config, records, split):
    """Of a run of four steps on the test records."""

    def make(**changes):
        given = {
            "total_steps": 4, "batch_size": 2, "data.records": str(records),
            "data.split": str(split), "log.every": 1, "log.checkpoint_every": 2,
        }  # fmt: skip
        return make_config(**given | changes)

    return make


class Watched:
    """A network of one parameter that shows what the step of the JAX networks feeds it."""

    stem, mesh, dtype = 1, None, jnp.float32

    def __init__(self, config, records):
        self.config, self.regions, self.images = config, records.regions, []
        self.modalities = records.modalities

    def apply(self, params, image, present=None, **_):
        if present is not None:  # as our plain U-Net
            image = image * present[..., None, None, None]
        jax.debug.callback(lambda x: self.images.append(np.array(x)), image, ordered=True)
        logits = params["head"]["bias"] * image.mean(1)[..., None]
        return [jnp.repeat(logits, len(self.regions), -1)], {}


@pytest.mark.parametrize(
    "recipe, loses", [("scanner", 0.0), ("nnunet", 0.0), ("swin", 1.0), ("none", 0.5)]
)
def test_crops_are_those_of_the_jax_step_to_the_bit(config, recipe, loses, tmp_path, monkeypatch):
    config = config(augment=recipe, total_steps=3, **{"data.modality_dropout": loses})
    records = Records(config.data.records)
    network, labels = Watched(config, records), []

    def watched_targets(label, *rest, original=losses.region_targets):
        jax.debug.callback(lambda x: labels.append(np.array(x)), label, ordered=True)
        return original(label, *rest)

    monkeypatch.setattr(steps.losses, "region_targets", watched_targets)
    params = {"head": {"bias": jnp.ones(())}}
    state = {
        "step": jnp.int32(0), "params": params, "ema": params,
        "opt_state": optim.optimiser(config.optim, config.total_steps).init(params),
    }  # fmt: skip
    stream = pipeline.batches(
        records, CASES[:3], seed=config.seed, batch_size=config.batch_size, patch=config.patch,
        foreground=config.data.foreground,
    )  # fmt: skip
    step = jax.jit(steps.train_step(network))
    for _ in range(config.total_steps):
        batch = {name: value for name, value in next(stream).items() if name != "case"}
        state, _ = step(state, batch, jax.random.key(config.seed))
    jax.effects_barrier()

    seen = []

    def watched_step(self, number, image, label, original=torch_steps.Trainer.step):
        seen.append((image.numpy().copy(), label.numpy().copy()))
        return original(self, number, image, label)

    monkeypatch.setattr(torch_steps.Trainer, "step", watched_step)
    assert torch_train.train(TINY, config, tmp_path / "run") == 0
    assert len(seen) == len(network.images) == len(labels) == 3
    for (image, label), ours, own_label in zip(seen, network.images, labels):
        assert np.array_equal(image, ours) and image.any()
        assert np.array_equal(label, own_label)
    assert not np.array_equal(seen[0][0], seen[1][0])
    gone = [not scan.any() for image, _ in seen for crop in image for scan in crop]
    assert any(gone) == (loses > 0)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_loss_is_ours(batch_dice, heads):
    rng = np.random.default_rng(0)
    regions = [(1, 2, 3), (1, 3), (3,)]
    label = rng.integers(0, 4, (2, 4, 4, 4)).astype(np.uint8)
    logits = rng.normal(size=(2, heads, 3, 4, 4, 4)).astype(np.float32) * 3

    targets = losses.region_targets(jnp.asarray(label), regions)
    ours = [jnp.moveaxis(jnp.asarray(head), 1, -1) for head in logits.swapaxes(0, 1)]
    ours = ours + ours[:1] if heads > 1 else ours  # the lowest of several has no weight there
    terms = losses.segmentation_terms(ours, targets, len(regions))
    expected, parts = losses.segmentation_loss(terms, batch_dice=batch_dice)

    own = torch_steps.region_targets(torch.from_numpy(label), regions)
    assert np.array_equal(own.movedim(1, -1).numpy(), np.asarray(targets))
    given = torch.from_numpy(logits if heads > 1 else logits[:, 0])
    total, own_parts = torch_steps.segmentation_loss(given, own, batch_dice=batch_dice)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    for name, value in parts.items():
        assert float(own_parts[name]) == pytest.approx(float(value), rel=1e-6)


def test_the_update_is_ours(make_config):
    """AdamW with clipping, schedule, decay on kernels alone, averaged weights: three steps."""
    config = make_config(total_steps=5, **{"optim.weight_decay": 0.3, "optim.clip_norm": 0.5})
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    trainer = torch_steps.Trainer(layer, config, [(1,)])
    values = [layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy()]
    params = {"layer": dict(zip(("kernel", "bias"), map(jnp.asarray, values)))}
    ema, tx = params, optim.optimiser(config.optim, config.total_steps)
    state = tx.init(params)
    rng = np.random.default_rng(1)
    for number in range(3):
        kernel = rng.normal(size=(3, 2)).astype(np.float32)
        bias = rng.normal(size=2).astype(np.float32)
        layer.weight.grad, layer.bias.grad = torch.tensor(kernel.T), torch.tensor(bias)
        norm = trainer.update(number)
        gradient = {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
        assert float(norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-6)
        assert float(norm) > config.optim.clip_norm  # it was clipped
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        ema = optim.average(ema, params, jnp.int32(number), config.optim.ema_decay)
        for expected, weight, bias in (
            (params, layer.weight.detach(), layer.bias.detach()),
            (ema, trainer.ema["weight"], trainer.ema["bias"]),
        ):
            np.testing.assert_allclose(weight.T, expected["layer"]["kernel"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(bias, expected["layer"]["bias"], rtol=0, atol=1e-6)
    assert not np.allclose(trainer.ema["bias"], layer.bias.detach(), atol=1e-6)
    assert not np.allclose(layer.weight.detach().T, values[0], atol=1e-4)


def test_other_optimisers_and_precisions_are_refused(make_config):
    for changes in ({"optim.name": "sgd"}, {"model.dtype": "bfloat16"}):
        (key, value) = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"{key} = '{value}'"):
            torch_steps.Trainer(torch.nn.Linear(3, 2), make_config(**changes), [(1,)])


def test_heads_start_rare():
    network = torch_networks.build(TINY, modalities=4, regions=3, patch=(16, 16, 16))
    torch_steps.start_rare(network, 3)
    assert torch.equal(network[-1].bias, torch.full((3,), -4.0))
    assert network[0].bias.abs().max() < 1


@pytest.fixture
def trained(config, tmp_path):
    """A run of four steps, and its folder."""
    config = config(augment="swin")
    assert torch_train.train(TINY, config, tmp_path / "straight") == 0
    return config, tmp_path / "straight"


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines]


def test_a_stopped_run_goes_on_to_the_bit(trained, config, tmp_path):
    _, straight = trained
    stopping = config(augment="swin", stop_at_step=2)
    assert torch_train.train(TINY, stopping, tmp_path / "run") == 75
    assert len(losses_of(tmp_path / "run")) == 2
    assert torch_train.train(TINY, config(augment="swin"), tmp_path / "run") == 0
    assert losses_of(tmp_path / "run") == losses_of(straight)
    one, other = (
        torch.load(folder / "checkpoint.pt", weights_only=True)
        for folder in (straight, tmp_path / "run")
    )
    assert one["step"] == other["step"] == 4
    for name, tensor in one["ema"].items():
        assert torch.equal(tensor, other["ema"][name])
    with pytest.raises(ValueError, match="is another run:\n  optim.learning_rate"):
        changed = config(augment="swin", **{"optim.learning_rate": 1.0})
        torch_train.train(TINY, changed, tmp_path / "run")


@pytest.mark.parametrize("flips", [(), (1,)])
def test_a_tile_through_the_volume_code_is_the_network(trained, flips):
    _, folder = trained
    segmenter, meta = torch_train.load_run(folder, given=[f"infer.flips={flips}"])
    assert meta["step"] == 4 and list(meta["regions"]) == ["WT", "TC", "ET"]
    image = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float16)
    network = torch_networks.build(TINY, modalities=4, regions=3, patch=(16, 16, 16)).eval()
    network.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["ema"])
    views = []
    for axes in [(), *([(2,)] if flips else [])]:
        tile = np.flip(image.astype(np.float32), axes).copy()
        with torch.no_grad():
            view = torch.sigmoid(network(torch.from_numpy(tile[None])))[0].numpy()
        views.append(np.flip(view, axes))
    found = segmenter.probabilities(image)
    np.testing.assert_allclose(found, np.mean(views, 0), rtol=0, atol=1e-6)


def test_what_is_missing_is_zero(trained):
    _, folder = trained
    image = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
    whole, _ = torch_train.load_run(folder)
    names = whole.settings.modalities
    alone, _ = torch_train.load_run(folder, given=[f"infer.present=('{names[1]}',)"])
    expected = image * np.array([0, 1, 0, 0], np.float32)[:, None, None, None]
    expected = whole.probabilities(expected)
    assert np.array_equal(alone.probabilities(image), expected)
    assert np.array_equal(whole.probabilities(image, present=names[1:2]), expected)
    assert not np.allclose(whole.probabilities(image), expected, atol=1e-4)
    with pytest.raises(ValueError, match="no modality to work with"):
        alone.probabilities(image, present=names[:1])


def test_what_a_run_cannot_do_is_said(trained, tmp_path):
    config, folder = trained
    for options in ({"which": "best"}, {"given": [f"infer.runs=('{folder}',)"]}):
        with pytest.raises(ValueError, match="is a run in PyTorch"):
            torch_train.load_run(folder, **options)
    run_config.save(config, tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt does not exist"):
        torch_train.load_run(tmp_path)
    for name, words in (("nothing", "expected one of dynunet"), ("absent_module:x", "absent")):
        with pytest.raises((ValueError, ModuleNotFoundError), match=words):
            torch_networks.build(name, modalities=4, regions=3, patch=(16,) * 3)


@pytest.mark.parametrize(
    "name, edge, heads, millions",
    [("dynunet", 64, 3, 16.55), ("dynunet_light", 64, 3, 1.04), ("segresnet", 64, 0, 4.70)],
)
def test_networks_of_monai(name, edge, heads, millions):
    pytest.importorskip("monai", reason="MONAI is not in the environment of the tests")
    network = torch_networks.build(name, modalities=4, regions=3, patch=(edge,) * 3)
    found = torch_train.cost(network, (1, 4, edge, edge, edge))
    assert found["parameters"] / 1e6 == pytest.approx(millions, abs=0.01)
    small = torch.zeros(1, 4, 32, 32, 32)
    shape = (1, 3, 32, 32, 32)
    assert network.eval()(small).shape == shape
    training = (1, heads, *shape[1:]) if heads else shape
    assert network.train()(small).shape == training
