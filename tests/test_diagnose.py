"""Parts of a network switched off by its parameters, measured on a phantom."""

import jax
import numpy as np
import pytest

from masm_jax import diagnose, sharding
from masm_jax.data.records import Records
from masm_jax.evaluation.findings import FINE, WRONG
from masm_jax.inference.volume import Segmenter, Settings
from masm_jax.state import Network
from masm_jax.steps import segment_step
from tests.conftest import CASES


@pytest.fixture(scope="module")
def segmenter(make_config, records):
    """Untrained, with a predictor that prunes every token."""
    mixers = ("aware", "concat", "concat", "concat", "concat", "shift")
    config = make_config(**{"model.mixers": mixers, "infer.overlap": 0.0, "model.keep_bias": -9.0})
    own = Records(records)
    network = Network(config, modalities=own.modalities, regions=own.regions)
    mesh = sharding.make_mesh(jax.devices()[:1])
    settings = Settings.of(network)
    return Segmenter(segment_step(network), network.init(0), mesh, settings, network)


def test_what_is_switched_off_is_that_and_nothing_else(segmenter):
    params = jax.tree.map(np.asarray, segmenter.params)
    masks, skips = diagnose.without_masks(params), diagnose.without_skips(params, ("concat",))
    assert list(masks) == ["level1"] and list(skips) == [f"level{i}" for i in range(1, 7)]
    # A bias; a kernel of the decoder.
    for changed in (masks["level1"], skips["level3"], skips["level6"]):
        paths = jax.tree.leaves(
            jax.tree.map(lambda a, b: not np.array_equal(a, b), params, changed)
        )
        assert sum(paths) == 1
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 16, 16), np.float32)
    kept = jax.jit(lambda params: segmenter.network.apply(params, x)[1]["level1"].mean())
    assert [kept(params), kept(masks["level1"])] == [0.0, 1.0]
    plain = {"encoder": {}}
    assert diagnose.without_skips(plain, ()) == {} == diagnose.without_masks(plain)
    # The decoder looks at the scans through the skips alone: through any, and through no other.
    apply = jax.jit(lambda params, x: segmenter.network.apply(params, x)[0][0])
    other = np.random.default_rng(1).standard_normal(x.shape, np.float32)
    assert not np.array_equal(apply(skips["level1"], x), apply(skips["level1"], other))
    for change in skips.values():
        params = jax.tree.map(lambda whole, part: np.where(part == 0, 0, whole), params, change)
    np.testing.assert_array_equal(apply(params, x), apply(params, other))


def test_a_network_that_prunes_everything_is_found(segmenter, records):
    measured = diagnose.measure(segmenter, Records(records), CASES[3:])
    assert set(measured["kept"]) == {f"level1/{name}" for name in ("t1", "t1ce", "t2", "flair")}
    assert all(max(shares.values()) < 1e-6 for shares in measured["kept"].values())
    assert measured["have"]["WT"] == 1 and measured["shells"]["WT"]["up to 1"]["inside"] > 0
    assert list(measured["masks_off"]) == ["level1"] and len(measured["skips_off"]) == 6
    found = diagnose.judge(segmenter.network.config, measured, [])
    levels = {finding.signature: finding.level for finding in reversed(found)}
    assert levels["masks too aggressive"] == WRONG and levels["wrong patch shifts"] == FINE
    assert any("numbered patches came home" in finding.seen for finding in found)


def test_no_such_run_is_one_line(tmp_path, capsys):
    assert diagnose.main([str(tmp_path / "none")]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
