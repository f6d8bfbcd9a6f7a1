"""Bounds and predicted scaling, by hand."""

import pytest

from masm_jax.benchmark import chips, roofline
from masm_jax.benchmark.traffic import Collective

V5E = chips.parse("v5e:4x4")  # 197 TFLOP/s, 819 GB/s, 2 ports of 50 GB/s in use


def test_seconds_of_collectives():
    seconds = roofline.exchange_seconds
    assert seconds(V5E, "all-reduce", 1e9, 16) == pytest.approx(2 * 15 / 16 / 100)
    assert seconds(V5E, "all-gather", 1e9, 16) == pytest.approx(15 / 16 / 100)
    assert seconds(V5E, "reduce-scatter", 1e9, 2) == pytest.approx(1 / 2 / 100)
    assert seconds(V5E, "collective-permute", 1e9, 16) == pytest.approx(1 / 50)
    assert seconds(V5E, "all-reduce", 1e9, 1) == 0


def test_the_longest_of_three_bounds_the_step():
    def bound(flops, size, payload):
        gradient = [Collective("a", "all-reduce", payload, 16, 1)]
        return roofline.roofline(V5E, flops=flops, hbm_bytes=size, collectives=gradient, samples=4)

    memory = bound(197e10, 819e8, 1e8)  # 10 ms, 100 ms, 1.875 ms
    assert memory["bound"] == "memory"
    assert memory["seconds"] == pytest.approx(0.1)
    assert memory["compute"] == pytest.approx(0.01)
    assert memory["interconnect"] == pytest.approx(0.001875)
    assert memory["mfu"] == pytest.approx(0.1)
    assert memory["samples_per_second_per_chip"] == pytest.approx(40)
    assert bound(197e11, 819e8, 0)["bound"] == "compute"
    assert bound(0, 819e6, 1e9)["bound"] == "interconnect"


def test_weak_scaling_by_hand():
    rows = roofline.weak_scaling(
        V5E.chip, work_seconds=0.1, other_seconds=0.0, reduced_bytes=1e9, pods=(8, 256, 1024)
    )
    small, pod, several = rows
    assert (small["slice"], small["slices"]) == ("2x4", 1)
    assert small["ici_seconds"] == pytest.approx(2 * 7 / 8 / 100)  # 2 ports of 50 GB/s
    assert small["efficiency"] == pytest.approx(0.1 / 0.1175)
    assert small["efficiency_overlapped"] == 1.0
    assert pod["ici_seconds"] == pytest.approx(2 * 255 / 256 / 200)  # closed rings: 4 ports
    # 1024 chips are 4 slices: each chip sums a 256th of the bytes over 3.125 GB/s.
    assert (several["slice"], several["slices"]) == ("16x16", 4)
    assert several["dcn_seconds"] == pytest.approx(2 * 3 / 4 * 1e9 / 256 / 3.125e9)
    together = several["ici_seconds"] + several["dcn_seconds"]
    assert several["efficiency"] == pytest.approx(0.1 / (0.1 + together))


def test_an_exchange_longer_than_the_work_is_not_hidden():
    (row,) = roofline.weak_scaling(
        V5E.chip, work_seconds=0.01, other_seconds=0.001, reduced_bytes=2e9, pods=(16,)
    )
    exchange = 0.001 + 2 * 15 / 16 * 2 / 100
    assert row["efficiency_overlapped"] == pytest.approx(0.01 / exchange)


def test_pods_whose_network_is_not_published_are_left_out():
    rows = roofline.weak_scaling(
        chips.CHIPS["v4"], work_seconds=1, other_seconds=0, reduced_bytes=1e9, pods=(4096, 8192)
    )
    assert rows[0]["efficiency"] is not None
    assert rows[1]["dcn_seconds"] is None and rows[1]["efficiency"] is None


def test_nothing_exchanged_is_perfect():
    rows = roofline.weak_scaling(V5E.chip, work_seconds=1, other_seconds=0, reduced_bytes=0)
    assert [row["chips"] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert {row["efficiency"] for row in rows} == {1.0}
