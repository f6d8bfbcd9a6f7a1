"""What the table of a sweep is made of: paired intervals, costs; and its pictures."""

import csv
import itertools
import json

import numpy as np
import pytest

from masm_jax import compare
from masm_jax.benchmark import accuracy_report
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.evaluation import mosaics, pictures
from masm_jax.models.mosaic import offsets
from masm_jax.state import Network
from masm_jax.sweep import cost, report


def test_only_seeds_and_cases_of_both_are_paired():
    def table(**dice):
        return {(case, "WT"): {"dice": value} for case, value in dice.items()}

    first = {0: table(a=0.1, b=0.2), 1: table(a=0.5, b=0.5)}
    other = {1: table(a=0.6, b=0.4, c=0.9), 2: table(a=1.0, b=1.0)}
    (row,) = accuracy_report.difference(first, other).values()
    assert row["difference"] == pytest.approx(0) and (row["seeds"], row["cases"]) == (1, 2)
    assert (row["low"], row["high"]) == pytest.approx((-0.1, 0.1))
    assert accuracy_report.difference(first, {2: other[2]}) is None


def test_the_interval_is_that_of_all_draws():
    """Two seeds, three cases: all 4 x 27 draws, which are equally likely, are written out."""
    differences = np.array([[0.1, 0.3, -0.2], [0.0, 0.4, 0.3]])
    means = [
        differences[np.ix_(seeds, cases)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for cases in itertools.product(range(3), repeat=3)
    ]
    row = compare.crossed(differences)
    assert row["difference"] == pytest.approx(0.15)
    expected = np.percentile(means, [2.5, 97.5], method="nearest")
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.04)
    # With one seed it is the interval over cases that compare.compare gives.
    a = {(case, "WT"): {"dice": 0.0} for case in "abc"}
    b = {(case, "WT"): {"dice": value} for case, value in zip("abc", differences[0])}
    (alone,) = compare.compare(a, b, ["dice"])
    row = compare.crossed(differences[:1])
    assert (row["low"], row["high"]) == pytest.approx((alone["low"], alone["high"]), abs=0.02)
    row = compare.crossed([[0.2]])
    assert (row["difference"], row["low"], row["high"]) == (0.2, None, None)


def test_the_interval_knows_of_the_seeds():
    """No difference, equal spreads: over cases alone the interval misses 0 far more often."""
    draw = np.random.default_rng(0)
    misses = np.zeros(2)
    for _ in range(120):
        spread = draw.normal(size=(3, 1)) + draw.normal(size=(1, 8)) + draw.normal(size=(3, 8))
        for place, differences in enumerate((spread, spread.mean(0, keepdims=True))):
            row = compare.crossed(differences)
            misses[place] += not row["low"] <= 0 <= row["high"]
    assert misses[0] < 0.2 * 120 < misses[1]


def test_what_the_masks_would_save(make_config):
    """Of level 3 at half of the tokens: projections, MLP, and two products of N x N, of which one
    has a column more, for the sum of the weights."""
    config = make_config(patch=32)
    full = cost.costs(config, MODALITIES, REGIONS, {"level3": 1.0})
    assert full["avoidable_gmac"] == 0 and full["gmac"] > 0
    half = cost.costs(config, MODALITIES, REGIONS, {"level1": 1.0, "level3": 0.5})
    tokens, kept, width = 2 * 4**3, 4**3, 64  # of a pair: two modalities of 4x4x4
    saved = (tokens - kept) * (4 + 2 * 2) * width**2 + (tokens**2 - kept**2) * (2 * width + 1)
    assert half["avoidable_gmac"] == pytest.approx(2 * saved / 1e9)
    assert half["gmac"] == full["gmac"]
    assert cost.costs(config, MODALITIES, REGIONS, {})["avoidable_gmac"] is None


def test_the_last_keep_ratios_are_read(tmp_path):
    lines = [{"step": 1, "val/keep/level1": 0.9}, {"step": 2, "val/keep/level1": 0.7, "x": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cost.last(tmp_path / "metrics.jsonl", cost.KEPT) == {"level1": 0.7}
    assert cost.last(tmp_path / "metrics.jsonl", cost.DRAWN) == {}


def test_keep_ratios_of_a_row_of_which_one_seed_logged_none():
    seeds = [{"level1": 0.9}, {}, {"level1": 0.5, "level2": 1.0}]
    assert report._by_level(seeds) == {"level1": pytest.approx(0.7), "level2": 1.0}


# ---------------------------------------------------------------- pictures


def test_keep_ratios_are_averaged_over_seeds(tmp_path):
    files = []
    for seed, keeps in enumerate(({1: 0.9, 2: 0.5}, {1: 0.7, 2: 0.3, 3: 0.1})):
        files.append(tmp_path / f"{seed}.jsonl")
        lines = [json.dumps({"step": s, "train/keep/level1": k}) for s, k in keeps.items()]
        files[-1].write_text("\n".join(lines))
    series = pictures._averaged([pictures._read_series(file) for file in files])
    assert series["train/keep/level1"] == pytest.approx({1: 0.8, 2: 0.4})
    path = tmp_path / "keep.png"
    assert pictures.keep_ratios(path, {"a": files, "b": files[:1]}) and path.is_file()
    files[0].write_text('{"step": 1, "train/loss": 1}')
    assert not pictures.keep_ratios(path, {"a": files[:1]}) and not path.exists()


def test_a_learnt_mosaic_is_read_and_drawn(make_config, tmp_path):
    """A cell of 4^3 on a grid of 2^3 tokens: eight of its places are used."""
    config = make_config(**{"patch": 32, "model.mosaic": "learnt:4"})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = network.init(0)
    logits = np.zeros((4, 4, 4, 4), np.float32)
    bayer = offsets("bayer3d", (2, 2, 2), 4)
    np.put_along_axis(logits[:2, :2, :2], bayer[..., None], np.log(3), -1)
    params["mixers"]["level6"]["learnt"]["logits"] = logits
    ((level, found),) = network.learnt_mosaics(params).items()
    share = mosaics.shares(found)
    assert level == "level6" and share.shape == (2, 2, 2, 4)
    assert (share.argmax(-1) == bayer).all() and share.max() == pytest.approx(0.5)  # 3 of 6
    mosaics.draw(tmp_path / "mosaic.png", share, title=level, modalities=MODALITIES)
    with open(tmp_path / "mosaic.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["likeliest"] == "1"]
    drawn = {tuple(int(row[key]) for key in "dhw"): int(row["offset"]) for row in rows}
    assert drawn == {place: bayer[place] for place in np.ndindex(2, 2, 2)}
    assert (tmp_path / "mosaic.png").read_bytes().startswith(b"\x89PNG")
    fixed = make_config(**{"patch": 32, "model.mosaic": "bayer3d"})
    network = Network(fixed, modalities=MODALITIES, regions=REGIONS)
    assert network.learnt_mosaics(network.init(0)) == {}
