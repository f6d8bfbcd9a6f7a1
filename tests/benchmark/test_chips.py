"""Names and wiring of slices; data sheets that agree with themselves."""

import pytest

from masm_jax.benchmark import chips


@pytest.mark.parametrize(
    "topology, count, accelerator, ports",
    [
        ("v5e:4x4", 16, "v5litepod-16", 2),  # a mesh: a corner has two neighbours
        ("v5e:8x16", 128, "v5litepod-128", 3),  # an axis of 16 is closed
        ("v5e:16x16", 256, "v5litepod-256", 4),
        ("v6e:2x4", 8, "v6e-8", 2),
        ("v5p:4x4x4", 64, "v5p-128", 6),  # counted in TensorCores; a cube is closed
        ("v5p:2x4x4", 32, "v5p-64", 3),  # less than a cube is not
        ("v4:2x2x1", 4, "v4-8", 2),
    ],
)
def test_slices(topology, count, accelerator, ports):
    described = chips.parse(topology)
    assert (described.chips, described.accelerator_type) == (count, accelerator)
    assert described.ici == ports * described.chip.ici_port
    assert str(described) == topology


@pytest.mark.parametrize(
    "topology, words",
    [
        ("v5e", "expected CHIP:EDGES"),
        ("v9:4x4", "chips known here: v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "expected 2 edges"),
        ("v5p:4x4", "such as v5p:2x2x4"),
        ("v5e:1x1", "the compiler describes no single chip"),
        ("v5e:32x16", "512 chips; expected at most 256"),
    ],
)
def test_slices_that_are_not_made(topology, words):
    with pytest.raises(ValueError, match=words):
        chips.parse(topology)


@pytest.mark.parametrize(
    "name, chips_, edges",
    [("v5e", 8, (2, 4)), ("v5e", 64, (8, 8)), ("v5p", 8, (2, 2, 2)), ("v5p", 128, (4, 4, 8))],
)
def test_squarest_slice(name, chips_, edges):
    assert chips.shape(chips.CHIPS[name], chips_).edges == edges


def test_every_number_has_a_source_and_all_reduce_of_a_pod_agrees():
    published = {"v4": (4096, 1.1e15), "v5e": (256, 51.2e12), "v6e": (256, 102.4e12)}
    for chip in chips.CHIPS.values():
        for name in ("peak_flops", "clock", "hbm_bytes", "hbm_usable", "hbm_bandwidth", "ici_port"):
            assert chip.sources[name], (chip.name, name)
        assert chip.dcn is None or chip.sources["dcn"]
        if chip.name in published:  # what a chip gives to an all-reduce: all its ports, one way
            pod, together = published[chip.name]
            assert together / pod == pytest.approx(2 * chip.axes * chip.ici_port, rel=0.03)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),  # not an L4, nor an L40S
        ("cpu", None),
    ],
)
def test_peaks_of_gpus(name, peak):
    assert chips.gpu_peak(name) == peak
