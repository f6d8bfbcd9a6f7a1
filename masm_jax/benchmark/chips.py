"""The TPU chips: what a data sheet says, and how slices of them are named and wired; peaks of GPUs.

Numbers are per chip; units stand beside them. Interconnect numbers are the ones that are easily
misread: Google prints the ICI bandwidth of a chip over all its ports and both directions ("bidi"),
here is one port in one direction, so that published = 2 x ports x ``ici_port``.
"""

import dataclasses
import math
import re

READ = "2026-11-22"  # date on which the pages named in ``Chip.sources`` were read
GIB = 2**30
SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      name: as in a topology, "v5e".
      accelerator: prefix of Google's accelerator types, "v5litepod".
      counts_cores: whether these types count TensorCores ("v5p-128" is 64 chips) or chips.
      cores: TensorCores of a chip; where there are two they work as one device ("megacore").
      peak_flops: bf16 multiply-adds count two, FLOP/s.
      clock: Hz; ``peak_flops`` over what the matrix units do in a cycle (an MXU of 128 x 128 does
        32768 FLOP; v4 and v5p have 8 per chip, v5e 4). Turns the compiler's cycles into time.
      hbm_bytes: capacity as published.
      hbm_usable: bytes that libtpu 0.0.52 lets a program have; it says so where one needs more.
      hbm_bandwidth: bytes/s.
      axes: of the torus, 2 or 3; a chip has two ports per axis.
      ici_port: bytes/s of one port in one direction.
      closes: an axis of a slice is closed to a ring where its length is a multiple of this; with
        three axes only if all of them are (whole cubes, closed by optical switches).
      largest_slice: chips over which a program can run without the data centre's network.
      dcn: bytes/s per chip, one direction, of that network; None: not published.
      sources: {attribute: address}.
    """

    name: str
    accelerator: str
    counts_cores: bool
    cores: int
    peak_flops: float
    clock: float
    hbm_bytes: float
    hbm_usable: float
    hbm_bandwidth: float
    axes: int
    ici_port: float
    closes: int
    largest_slice: int
    dcn: float | None
    sources: dict[str, str]


def _sources(page, **others):
    read = "cores peak_flops clock hbm_bytes hbm_bandwidth axes ici_port largest_slice"
    base = dict.fromkeys(read.split(), page)
    measured = "the message of libtpu 0.0.52 for a program that needs 1.16 TiB"
    return base | {"hbm_usable": measured, "closes": SCALING_BOOK} | others


_V5E = "https://docs.cloud.google.com/tpu/docs/v5e"
_V6E = "https://docs.cloud.google.com/tpu/docs/v6e"
_V5P = "https://docs.cloud.google.com/tpu/docs/v5p"
_V4 = "https://docs.cloud.google.com/tpu/docs/v4"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", accelerator="v4", counts_cores=True, cores=2,
            peak_flops=275e12, clock=275e12 / (8 * 32768),
            hbm_bytes=32 * GIB, hbm_usable=30.75 * GIB, hbm_bandwidth=1200e9,
            # Google's page has no ICI bandwidth of a chip; its 1.1 PB/s of all-reduce over 4096
            # chips are 269 GB/s a chip, six times 45.
            axes=3, ici_port=45e9, closes=4, largest_slice=4096, dcn=None,
            sources=_sources(_V4, ici_port=SCALING_BOOK),
        ),
        Chip(
            name="v5e", accelerator="v5litepod", counts_cores=False, cores=1,
            # The page has been seen with 819 GB/s and with 800 GiB/s (859 GB/s); the lower one.
            peak_flops=197e12, clock=197e12 / (4 * 32768),
            hbm_bytes=16 * GIB, hbm_usable=15.75 * GIB, hbm_bandwidth=819e9,
            axes=2, ici_port=400e9 / 8, closes=16, largest_slice=256,
            dcn=6.4e12 / 8 / 256,  # 6.4 Tbit/s per pod of 256
            sources=_sources(_V5E, dcn=_V5E),
        ),
        Chip(
            name="v5p", accelerator="v5p", counts_cores=True, cores=2,
            peak_flops=459e12, clock=459e12 / (8 * 32768),
            hbm_bytes=95 * GIB, hbm_usable=95.73 * GIB, hbm_bandwidth=2765e9,
            axes=3, ici_port=1200e9 / 12, closes=4, largest_slice=6144,
            dcn=50e9 / 8,  # 50 Gbit/s per chip
            sources=_sources(_V5P, dcn=_V5P),
        ),
        Chip(
            name="v6e", accelerator="v6e", counts_cores=False, cores=1,
            # 1638 GB/s; older copies of the page have 1600 and 1640, and 4 MXUs where this has 2:
            # 4 of 256 x 256, as libtpu estimates 369000 FLOP per cycle for a matrix product.
            peak_flops=918e12, clock=918e12 / (4 * 131072),
            hbm_bytes=32 * GIB, hbm_usable=31.24 * GIB, hbm_bandwidth=1638e9,
            axes=2, ici_port=800e9 / 8, closes=16, largest_slice=256,
            dcn=25.6e12 / 8 / 256,  # 25.6 Tbit/s per pod of 256
            sources=_sources(_V6E, dcn=_V6E),
        ),
    )
}  # fmt: skip

# Dense bf16 FLOP/s of tensor cores by the words in what a driver calls the GPU, the first that fit.
# What NVIDIA's data sheets have without sparsity, as tables of others quote them (2026-11-29); the
# sheets themselves were not read.
_GPU_PEAKS = (
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def gpu_peak(name):
    """Dense bf16 FLOP/s of a GPU, "NVIDIA A100-SXM4-80GB"; None of one that is not known."""
    words = set(re.split("[ -]", name))
    return next((peak for known, peak in _GPU_PEAKS if words >= set(known.split())), None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of a pod: a chip and the edges of its mesh, such as v5e and (4, 4)."""

    chip: Chip
    edges: tuple[int, ...]

    def __str__(self):
        return f"{self.chip.name}:{'x'.join(map(str, self.edges))}"

    @property
    def chips(self):
        return math.prod(self.edges)

    @property
    def accelerator_type(self):
        """As Google names it: "v5litepod-16", "v5p-128"."""
        count = self.chips * (self.chip.cores if self.chip.counts_cores else 1)
        return f"{self.chip.accelerator}-{count}"

    @property
    def ici(self):
        """Bytes/s that every chip can send over its ports at once.

        Along an axis closed to a ring both ports have a neighbour; along an open one the chips at
        the ends have one, and the others wait for them.
        """
        closed = [edge % self.chip.closes == 0 for edge in self.edges]
        if self.chip.axes == 3:
            closed = [all(closed)] * 3
        ports = sum((1 + ring) * (edge > 1) for edge, ring in zip(self.edges, closed))
        return ports * self.chip.ici_port


def parse(topology):
    """ "v5e:4x4" -> Slice.

    Raises:
      ValueError: no such chip, or it is not made in that shape.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not found or found.group(1) not in CHIPS:
        raise ValueError(
            f"--topology={topology}: expected CHIP:EDGES such as v5e:4x4 or v5p:4x4x4; "
            f"chips known here: {', '.join(CHIPS)}"
        )
    chip, edges = CHIPS[found.group(1)], tuple(int(n) for n in found.group(2).split("x"))
    if len(edges) != chip.axes or sum(edge > 1 for edge in edges) < 2 or 0 in edges:
        example = "x".join("224"[: chip.axes])
        raise ValueError(
            f"--topology={topology}: expected {chip.axes} edges, at least two of them above 1 "
            f"(the compiler describes no single chip), such as {chip.name}:{example}"
        )
    described = Slice(chip, edges)
    if described.chips > chip.largest_slice:
        raise ValueError(
            f"--topology={topology}: {described.chips} chips; expected at most "
            f"{chip.largest_slice}, the largest slice of {chip.name}"
        )
    return described


def shape(chip, chips):
    """The squarest slice with a power of two of chips: 8 of v5e are 2x4, 128 of v5p 4x4x8."""
    edges = [1] * chip.axes
    while math.prod(edges) < chips:
        edges[edges.index(min(edges))] *= 2
    return Slice(chip, tuple(sorted(edges)))
