"""Every shipped config builds; every fault is said with its value and what was expected."""

import importlib
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest

from configs import masm_brats, masm_demo
from masm_jax import config as config_lib
from masm_jax import run_config
from masm_jax.benchmark import counting
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.models.sizes import SIZES
from masm_jax.state import Network, abstract_state, num_parameters
from masm_jax.steps import segment_step

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (REPOSITORY / "configs").glob("[a-z]*.py"))


def named(name):
    return importlib.import_module(f"configs.{name}").get_config()


def changed(key, value, config=None):
    config = config or masm_brats.get_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


# ---------------------------------------------------------------- the shipped configs


def test_the_experiments_of_the_issue_are_there():
    assert set(NAMES) >= {
        "masm_brats",
        "unet_brats",
        "late_brats",
        "aware_brats",
        "shift_brats",
        "masm_demo",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_builds(name):
    """No array is made: shapes alone, at the configured size."""
    config = named(name)
    config_lib.validate(config)
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    state = abstract_state(network)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(state["ema"]) == jax.tree.structure(state["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert network.patch == (config.patch,) * 3
    image = jax.ShapeDtypeStruct((2, len(MODALITIES), *network.patch), jnp.float16)
    logits, keep = jax.eval_shape(
        lambda params, x: network.apply(params, x, deep=True), state["params"], image
    )
    assert logits[0].shape == (2, *network.patch, len(REGIONS))
    published = config.model.backbone != "unet" and not config.model.mixers  # they have one head
    assert len(logits) == (1 if published else SIZES[config.model.size].deep_heads)
    aware = [f"level{i + 1}" for i, mixer in enumerate(config.model.mixers) if mixer == "aware"]
    assert sorted(keep) == aware
    assert num_parameters(state["params"]) > 1e6


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("mixers", [(), ("aware",) * 5 + ("shift",)], ids=["unet", "masm"])
def test_a_patch_of_three_edges_builds(size, mixers):
    """Shapes alone; the first logits as they are computed, and as voxels."""
    config = changed("model.mixers", mixers, changed("model.size", size))
    config.patch = (64, 128, 96)
    config_lib.validate(config)
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    image = jax.ShapeDtypeStruct((2, len(MODALITIES), 64, 128, 96), jnp.float16)
    params = abstract_state(network)["params"]
    for packed, factor in ((False, 1), (True, network.stem)):
        logits, keep = jax.eval_shape(
            lambda params, x, packed=packed: network.apply(params, x, deep=True, packed=packed),
            params,
            image,
        )
        grid = [edge // factor for edge in network.patch]
        assert logits[0].shape == (2, *grid, factor**3 * len(REGIONS))
        below = network.stem * SIZES[size].strides[1]
        assert logits[1].shape == (2, *(edge // below for edge in network.patch), len(REGIONS))
        assert len(keep) == mixers.count("aware")


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_differ_in_what_they_say_they_differ_in(name):
    base, other = (run_config.to_dict(c) for c in (masm_brats.get_config(), named(name)))
    keys = {line.split(":")[0] for line in run_config.differences(base, other)}
    if name.endswith("_brats"):
        assert keys <= {"model.mixers", "model.backbone"}
    assert run_config.differences(other, other) == []


@pytest.mark.parametrize("name", ["masm_brats", "aware_brats", "shift_brats"])
def test_base_stays_within_its_budget(name):
    """At most 100 GMAC forward at 4 x 128^3, by the counter that agrees with PyTorch's."""
    config = named(name)
    assert (config.model.size, config.patch) == ("base", 128)
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    image = jax.ShapeDtypeStruct((1, 4, 128, 128, 128), jnp.float32)
    counts = counting.macs(segment_step(network), abstract_state(network)["params"], image)
    assert 20 < counting.total(counts) / 1e9 <= 100


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("augment", "nnunett", ("'nnunett'", "one of nnunet, swin, scanner, none")),
        ("model.size", "huge", ("'huge'", "tiny, base, full")),
        ("model.dtype", "float16", ("'float16'", "float32, bfloat16")),
        ("optim.name", "lamb", ("'lamb'", "adamw, sgd")),
        ("optim.schedule", "step", ("'step'", "cosine, poly, constant")),
        ("total_steps", 0, ("= 0", "1 or more")),
        ("batch_size", -1, ("= -1", "1 or more")),
        ("patch", 0, ("= 0", "one edge in voxels", "three (D, H, W)")),
        ("patch", (128, 128), ("= (128, 128)", "three (D, H, W)")),
        ("patch", (128, 0, 128), ("= (128, 0, 128)", "three (D, H, W)")),
        ("patch", (128, 96.0, 128), ("= (128, 96.0, 128)", "three (D, H, W)")),
        ("mesh.data", -1, ("= -1", "0 or more")),
        ("mesh.spatial", 0, ("= 0", "1 or more")),
        ("mesh.spatial", 3, ("= 3", "a divisor of 4", "128 deep")),
        ("accumulate", 0, ("= 0", "1 or more")),
        ("accumulate", 3, ("= 3", "a divisor of batch_size (8)")),
        ("model.remat", "all", ("'all'", "none, blocks, full")),
        ("seed", -1, ("= -1", "0 to ")),
        ("seed", 2**32, ("= 4294967296", "0 to ")),
        ("infer.batch", 0, ("= 0", "1 or more")),
        ("model.shift_depth", 0, ("= 0", "1 or more")),
        ("model.detail", -1, ("= -1", "0 (none) or more")),
        ("model.encoder_width", 0.0, ("= 0.0", "above 0")),
        ("model.encoder_single", 7, ("= 7", "0 to 6")),
        ("model.fused_levels", -1, ("= -1", "0 to 6")),
        ("infer.dtype", "float16", ("= 'float16'", "auto, float32, bfloat16")),
        ("model.keep_bias", float("nan"), ("= nan", "a number")),
        ("data.workers", -1, ("= -1", "0 or more")),
        ("data.split_seed", -1, ("= -1", "0 or more")),
        ("optim.momentum", 1.0, ("= 1.0", "[0, 1)")),
        ("optim.weight_decay", -1.0, ("= -1.0", "0 or more")),
        ("loss.ratio_weight", float("nan"), ("= nan", "0 or more")),
        ("optim.learning_rate", 0.0, ("= 0.0", "above 0")),
        ("optim.clip_norm", -1.0, ("= -1.0", "above 0")),
        ("log.patch_every", -1, ("= -1", "0 (never)")),
        ("log.volumes", 0, ("= 0", "1 or more")),
        ("log.every", 0, ("= 0", "1 or more")),
        ("log.checkpoint_every", 0, ("= 0", "1 or more")),
        ("stop_at_step", -1, ("= -1", "0 (never)")),
        ("data.foreground", 1.5, ("= 1.5", "[0, 1]")),
        ("infer.overlap", 1.0, ("= 1.0", "[0, 1)")),
        ("infer.token_share", 0.0, ("= 0.0", "(0, 1]")),
        ("model.pruning", "drop", ("'drop'", "replace, mask, none")),
        ("infer.threshold", (0.5, 0.0), ("= (0.5, 0.0)", "(0, 1)")),
        ("infer.flips", (0, 3), ("(0, 3)", "axes 0, 1, 2")),
        ("optim.warmup_steps", 100_000, ("= 100000", "total_steps (60000)", "shorten")),
        ("optim.ema_decay", 1.0, ("= 1.0", "[0, 1)")),
        ("loss.keep_target", 0.0, ("= 0.0", "(0, 1]")),
        ("gumbel.end", 0.0, ("= 0.0", "above 0")),
        ("model.mixers", ("aware",) * 5, ("('aware', 'aware'", "six entries", "plain U-Net")),
        ("model.mixers", ("aware",) * 5 + ("swap",), ("'swap'", "aware, shift, concat")),
        ("model.pairs", (("t1", "t1ce"), ("t1ce", "t1")), ("'t1'", "no pair twice")),
        ("model.pairs", (("t1", "t1ce", "t2"),), ("'t2'", "pairs")),
        ("model.mosaic", "bayer4d", ("'bayer4d'", "bayer3d")),
        ("model.mosaic", [[0.5]], ("0.5", "integers")),
    ],
)
def test_a_fault_is_named_with_value_and_expectation(key, value, words):
    with pytest.raises(ValueError) as caught:
        config_lib.validate(changed(key, value))
    lines = str(caught.value).splitlines()
    (line,) = (line for line in lines if line.startswith(f"config.{key}"))
    assert "expected" in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("size", "patch", "words"),
    [
        ("base", 120, ("a multiple of 32", "the nearest is 128")),
        ("tiny", 8, ("a multiple of 16", "the nearest is 16")),
        ("tiny", 41, ("a multiple of 16", "the nearest is 48")),
        ("base", (120, 128, 200), ("a multiple of 32", "the nearest is (128, 128, 192)")),
    ],
)
def test_a_patch_that_does_not_fit_names_the_nearest(size, patch, words):
    config = changed("model.size", size)
    config.patch = patch
    with pytest.raises(ValueError, match=re.escape(f"config.patch = {patch}")) as caught:
        config_lib.validate(config)
    for word in words:
        assert word in str(caught.value)


def test_all_faults_are_said_at_once():
    config = changed("model.size", "huge")
    config.batch_size = 0
    with pytest.raises(ValueError) as caught:
        config_lib.validate(config)
    assert len(str(caught.value).splitlines()) == 2


def records(**changes):
    about = dict(spacing=2.0, modalities=MODALITIES, regions=REGIONS, pairs=())
    return types.SimpleNamespace(**about | changes)


def test_records_of_another_spacing_are_refused():
    config = changed("data.spacing", 1.0)
    with pytest.raises(ValueError, match="config.data.spacing = 1.0.*2.0.*--spacing=1.0"):
        config_lib.validate_records(config, records())
    with pytest.raises(ValueError, match="of the scans"):
        config_lib.validate_records(config, records(spacing=None))
    config_lib.validate_records(config, records(spacing=1.0))
    with pytest.raises(ValueError, match="infer.present names t9: the records have t1, "):
        config_lib.validate_records(changed("infer.present", ("t9",)), records(spacing=1.0))
    config_lib.validate_records(changed("data.spacing", 0.0), records())


def test_thresholds_must_be_one_or_one_for_each_region():
    with pytest.raises(ValueError, match=r"infer.threshold.*2 numbers.*WT, TC, ET"):
        config_lib.validate_records(changed("infer.threshold", (0.5, 0.4)), records(spacing=1.0))
    config_lib.validate_records(changed("infer.threshold", (0.5,) * 3), records(spacing=1.0))


def test_pairs_of_modalities_that_are_not_there_are_refused():
    two = records(spacing=1.0, modalities=("t1", "flair"))
    with pytest.raises(ValueError, match="t1ce, t2.*have t1, flair"):
        config_lib.validate_records(masm_brats.get_config(), two)
    config_lib.validate_records(changed("model.pairs", (("t1", "flair"),)), two)


# ---------------------------------------------------------------- --set and tuned values


def test_inference_can_be_set_on_the_command_line():
    config = masm_brats.get_config().lock()
    given = ["infer.flips=(0,1)", "infer.threshold=0.4", "infer.overlap=0", "infer.fill_holes=True"]
    given.append("infer.present=t1ce,flair")
    run_config.override(config, given)
    assert config.infer.flips == (0, 1) and config.infer.threshold == (0.4,)
    assert config.infer.overlap == 0.0 and config.infer.fill_holes is True
    assert config.infer.present == ("t1ce", "flair")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("infer.flips", "KEY=VALUE"),
        ("infer.flip=(0,)", "no such key.*infer.flips"),
        ("model.size=full", "infer. or evaluation."),
        ("infer.fill_holes=1", "expected a bool"),
        ("infer.batch=2.5", "expected an int"),
        ("infer.overlap=much", "expected a float"),
        ("infer.overlap=1.5", r"infer.overlap = 1.5: expected in \[0, 1\)"),
    ],
)
def test_what_cannot_be_set_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        run_config.override(masm_brats.get_config().lock(), [given])


def test_tuned_values_are_taken_unless_set(tmp_path):
    run_config.save(masm_brats.get_config(), tmp_path)
    (tmp_path / "infer.json").write_text('{"infer": {"threshold": [0.4], "minimum_ml": 0.3}}')
    config = run_config.load(tmp_path, given=["infer.minimum_ml=0"])
    assert tuple(config.infer.threshold) == (0.4,) and config.infer.minimum_ml == 0.0
    (tmp_path / "infer.json").write_text('{"infer": {"treshold": [0.4]}}')
    with pytest.raises(ValueError, match="infer.json.*no such key"):
        run_config.load(tmp_path)


# ---------------------------------------------------------------- JSON and changes


@pytest.mark.parametrize("key", [None, "patch", "model.mixers", "model.mosaic", "infer.flips"])
def test_the_way_through_json_keeps_the_network(key, tmp_path):
    values = {"model.mixers": (), "model.mosaic": [[0, 1], [2, 3]], "infer.flips": (0, 2)}
    values["patch"] = (48, 32, 64)
    config = masm_demo.get_config()
    config.model.mixers = ("aware", "concat", "concat", "concat", "concat", "shift")
    if key:
        changed(key, values[key], config)
    run_config.save(config, tmp_path)
    loaded = run_config.load(tmp_path)
    config_lib.validate(loaded)
    assert run_config.to_dict(loaded) == run_config.to_dict(config)
    assert run_config.differences(run_config.to_dict(config), run_config.to_dict(loaded)) == []
    states = [
        abstract_state(Network(c, modalities=MODALITIES, regions=REGIONS)) for c in (config, loaded)
    ]
    assert states[0] == states[1]
    with pytest.raises(AttributeError):
        loaded.pacth = 32  # locked
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist.*train.py"):
        run_config.load(tmp_path)


@pytest.mark.parametrize("section, key", [("infer", "minimum_ml"), ("optim", "mixer_rate")])
def test_a_config_of_another_version_names_the_missing_key(tmp_path, section, key):
    values = run_config.to_dict(masm_brats.get_config())
    del values[section][key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"config.json lacks a key.*{key}.*configs/masm_brats.py"):
        run_config.load(tmp_path)


def test_a_run_from_before_a_key_goes_on(tmp_path):
    values = run_config.to_dict(masm_brats.get_config())
    for key in ("detail", "encoder_width", "encoder_single", "fused_levels"):
        del values["model"][key]
    del values["infer"]["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = run_config.load(tmp_path)
    assert loaded.model.detail == 0 and loaded.model.encoder_width == 1
    assert (loaded.model.encoder_single, loaded.model.fused_levels) == (0, 6)
    assert loaded.infer.dtype == "auto"
    assert not run_config.differences(values, run_config.to_dict(loaded))
    loaded.model.detail = 8
    changed = run_config.differences(values, run_config.to_dict(loaded))
    assert changed == ["model.detail: 0 -> 8"]


def test_a_run_with_a_key_that_is_gone(tmp_path):
    """It goes on where the key had the value that the network has without it."""
    values = run_config.to_dict(masm_brats.get_config())
    values["model"]["pair_input"] = False
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = run_config.load(tmp_path)
    assert "pair_input" not in loaded.model
    assert not run_config.differences(values, run_config.to_dict(loaded))
    values["model"]["pair_input"] = True
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="config.json: model.pair_input = True: expected False"):
        run_config.load(tmp_path)


def test_a_damaged_config_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="config.json: "):
        run_config.load(tmp_path)


def test_differences_are_listed_with_both_values():
    old, new = masm_brats.get_config(), masm_brats.get_config()
    new.model.mixers = ()
    new.optim.learning_rate = 0.5
    lines = run_config.differences(run_config.to_dict(old), run_config.to_dict(new))
    assert len(lines) == 2
    assert lines[0].startswith("model.mixers: ['aware'") and lines[0].endswith("-> []")
    assert lines[1] == "optim.learning_rate: 0.001 -> 0.5"


def test_what_is_free_to_change_is_not_listed():
    old = run_config.to_dict(masm_brats.get_config())
    new = json.loads(json.dumps(old))
    new["stop_at_step"] = 7
    new["data"] |= {"records": "/elsewhere", "workers": 4}
    new["mesh"] = {"data": 2, "spatial": 4}
    for section in ("log", "infer"):
        new[section] = dict.fromkeys(new[section], "other")
    assert run_config.differences(old, new) == []
    for section, key in (("data", "spacing"), ("data", "split"), ("data", "foreground")):
        other = json.loads(json.dumps(old))
        other[section][key] = "other"
        assert [f"{section}.{key}" in line for line in run_config.differences(old, other)] == [True]


def test_a_key_that_only_one_of_them_has_is_a_difference():
    old = run_config.to_dict(masm_brats.get_config())
    new = json.loads(json.dumps(old))
    del new["optim"]["mixer_rate"]
    assert run_config.differences(old, new) == ["optim.mixer_rate: 1.0 -> None"]


@pytest.mark.parametrize("key, value", [("model.pruning", "none"), ("model.mixers", ())])
def test_no_share_of_tokens_that_have_no_scores(key, value):
    config = changed("infer.token_share", 0.5)
    config_lib.validate(config)
    with pytest.raises(ValueError, match="infer.token_share = 0.5: .* gives tokens no scores"):
        config_lib.validate(changed(key, value, config))
