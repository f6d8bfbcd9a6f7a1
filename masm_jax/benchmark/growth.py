"""How time and memory grow with patch, batch, modalities and depth of the mixers.

    python -m masm_jax.benchmark growth --network=base --output=runs/growth

One of the four grows, the others stay at the first that is named in the table. Measured as in
`compare`: the training step of train.py and inference, every point in a process of its own, in
alternating order. What does not fit into the free memory is not run. The work is counted as
multiply-adds (masm_jax/benchmark/counting.py): time that grows faster than the work, with an
exponent above 1.1, is said. Stopped, the same command goes on. OUTPUT gets growth.json, growth.md
and a plot.
"""

import argparse
import os
import pathlib
import sys
from typing import NamedTuple

from masm_jax import config_file, run_config, runtime
from masm_jax.arguments import some
from masm_jax.benchmark import counting, growth_report, jax_side, peers, workers
from masm_jax.benchmark.compare import MODES, Worker, measure_all
from masm_jax.benchmark.store import Item, Store
from masm_jax.data.conventions import MODALITIES
from masm_jax.models.masm import divisor
from masm_jax.models.sizes import BACKBONES, SIZES

EDGES = (32, 48, 64, 96, 128, 160)
COUNTS = (1, 2, 4, 8)
AXES = {"patch": EDGES, "batch": COUNTS, "modalities": COUNTS, "depth": COUNTS}
USUAL_EDGE = 48  # of the other axes: this or, where the network cannot have it, the next
# May not differ between the start of a measurement and its continuation.
FIXED = ("network", "dtype", "threads", "device", "seconds", "config")
SPARE = 0.9  # of the free memory may be used


class Point(NamedTuple):
    """What is measured: edge in voxels, patches, modalities, times as many blocks per mixer."""

    patch: int
    batch: int = 1
    modalities: int = 4
    depth: int = 1

    @property
    def name(self):
        """For files and the store."""
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--network", default="base", choices=tuple(SIZES), help="size (base)")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--axis", default=",".join(AXES), metavar="A,B", help=f"of {', '.join(AXES)} (all)"
    )
    parser.add_argument("--mode", default="infer,train", help="infer, train, or both (both)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument(
        "--seconds", type=float, default=5, help="per point and round, 3 calls at least (5)"
    )
    parser.add_argument(
        "--config", default="configs/masm_brats.py", metavar="FILE", help="of the network"
    )
    parser.set_defaults(resident=False)


def run(args):
    """Exit code of the command: 3 where a point has no numbers, 75 stopped.

    Raises:
      ValueError: a flag is wrong, or OUTPUT holds another measurement.
    """
    if args.rounds < 1 or args.seconds < 0:
        raise ValueError(
            f"--rounds={args.rounds} --seconds={args.seconds:g}: expected 1 round or more, of 0 "
            f"seconds or more"
        )
    args.threads = len(workers.cores())
    modes = some("mode", args.mode, MODES)
    axes = points(some("axis", args.axis, AXES), args.network, args.config)
    named = {point.name: point for chosen in axes.values() for point in chosen}
    todo = [Item(f"masm_{args.network}", name, mode) for name in named for mode in modes]
    runtime.start(cache=False)
    settings = {name: getattr(args, name) for name in FIXED}
    store = Store(pathlib.Path(args.output), settings, "growth.json")
    config = config_file.load_config(args.config, [f"model.size={args.network}"])
    store.define({args.network: run_config.to_dict(config)})

    def start(item, args):
        point = named[item.variant]
        own = vars(args) | {"patch": point.patch, "batch": point.batch}
        ours = network(point, args.network, args.config)
        changed = {"changes": ours.changes, "modalities": ours.modalities}
        limit = SPARE * free_memory() if args.device == "cpu" else None
        return Worker(item, argparse.Namespace(**own), ours=changed, limit=limit)

    with runtime.StopSignal() as stop:
        finished = measure_all(todo, args, store, stop, start)
    if not finished:
        print("stopped; the same command goes on", file=sys.stderr)
        return runtime.EXIT_STOPPED
    for name, point in named.items():
        store.counts[name] = store.counts.get(name) or count(point, args)
    store.write()
    growth_report.write(store, axes, modes)
    return runtime.EXIT_SOME_FAILED if store.failed(todo) else 0


def points(chosen, size, config):
    """The points of some axes.

    Args:
      chosen: names of AXES.
      size: of the network.
      config: path.

    Returns:
      {axis: [Point]}, from small to large.
    """
    model = config_file.load_config(config, []).model
    if size not in BACKBONES[model.backbone]:
        raise ValueError(
            f"--network={size}: {config} has model.backbone={model.backbone!r}, which has no such "
            f"size; expected one of {', '.join(BACKBONES[model.backbone])}"
        )
    model.size = size
    edges = [edge for edge in EDGES if edge % divisor(model) == 0]
    usual = Point(next(edge for edge in edges if edge >= USUAL_EDGE))
    return {
        axis: [
            usual._replace(**{axis: value})
            for value in AXES[axis] if axis != "patch" or value in edges
        ]
        for axis in chosen
    }  # fmt: skip


def network(point, size, config):
    """peers.Ours of a point; modalities are paired as far as there are two, then one by one.

    Args:
      point: Point.
      size: of the network.
      config: path; its depths are those of depth 1.
    """
    model = config_file.load_config(config, []).model
    more = [f"modality{number}" for number in range(len(MODALITIES) + 1, point.modalities + 1)]
    names = (*MODALITIES, *more)[: point.modalities]
    changes = {
        "model.size": size,
        "model.pairs": tuple(zip(names[::2], names[1::2])),
        "model.aware_depth": point.depth * model.aware_depth,
        "model.shift_depth": point.depth * model.shift_depth,
    }
    if point.modalities == 1:  # there is nobody to be paired with
        kinds = {"aware": "concat"}
        changes["model.mixers"] = tuple(kinds.get(name, name) for name in model.mixers)
    return peers.Ours("", changes, names)


def count(point, args):
    """{"infer", "train": multiply-adds of a call}."""
    ours = network(point, args.network, args.config)
    built = jax_side.network(ours, patch=point.patch, batch=1, dtype=args.dtype, config=args.config)
    calls = jax_side.calls(built)
    return {
        mode: point.batch * counting.total(counting.macs(*calls[call]))
        for mode, call in (("infer", "forward"), ("train", "train"))
    }


def free_memory():
    """Bytes that may be taken without swapping; infinite where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else float(os.sysconf("SC_PHYS_PAGES") * 4096)
