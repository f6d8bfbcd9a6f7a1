"""Count parameters and multiply-adds of our networks and of peers; nothing is run.

    python -m masm_jax.benchmark flops --networks=masm_base,dynunet --patch=128

One rule for both frameworks (masm_jax/benchmark/counting.py): convolutions and matrix products,
padding counted; no norms, activations, sums, interpolation. One patch, 4 modalities, 3 regions.
Forward is inference; train is forward and backward, ours with its deep supervision heads, peers
with one head. FLOP = 2 x MAC. Peers need torch, most also MONAI (`make bench-env`).
"""

import dataclasses
import json
import pathlib
import sys

from masm_jax.benchmark import counting, jax_side, peers, tables
from masm_jax.files import check_output, replacing
from masm_jax.runtime import EXIT_SOME_FAILED

REASON = """\
XLA counts otherwise: element-wise work and reductions too (about one FLOP an element), and the
products that move voxels; but no taps on padding, and the body of a loop once. Its number is that
of the program before optimisation, for this machine's form of convolution."""


@dataclasses.dataclass(frozen=True)
class Count:
    """What one call costs; ``flops`` is 2 x ``macs``."""

    macs: int
    flops: int


def count(function, *arguments):
    """Multiply-adds and FLOPs of one call of a JAX function, by the rule of PyTorch's counter.

    Args:
      function: traceable by JAX.
      *arguments: arrays or ShapeDtypeStructs, or trees of them.

    Returns:
      Count.

    Raises:
      ValueError: a loop whose length depends on values.
    """
    macs = counting.total(counting.macs(function, *arguments))
    return Count(macs, 2 * macs)


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument(
        "--networks", default="all", metavar="A,B", help=f"all, or of {', '.join(peers.NETWORKS)}"
    )
    parser.add_argument("--patch", type=int, default=128, help="edge of a patch in voxels (128)")
    parser.add_argument(
        "--config", default="configs/masm_brats.py", metavar="FILE",
        help="of our networks; encoder, size, mixers and detail are those of their names",
    )  # fmt: skip
    parser.add_argument(
        "--by-module", action="store_true", help="also by part and level, of our networks"
    )
    parser.add_argument("--no-xla", action="store_true", help="do not ask XLA for its own count")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")


def run(args):
    """Exit code of the command: 3 where a network could not be counted.

    Raises:
      ValueError: a flag is wrong.
    """
    if args.json:
        check_output(pathlib.Path(args.json).parent, flag="--json")
    chosen = peers.chosen(args.networks)
    if args.patch < 1:
        raise ValueError(f"--patch={args.patch}: expected an edge in voxels")
    counts, skipped = count_all(chosen, patch=args.patch, config=args.config, xla=not args.no_xla)
    lines = words(chosen, counts)
    if args.by_module:
        lines += ["", *modules(counts)]
    if skipped:
        lines += ["", "Not counted:", "", *(f"- {name}: {why}" for name, why in skipped.items())]
    print("\n".join(lines))
    if args.json:
        found = {"patch": args.patch, "config": args.config, "unit": "multiply-adds"}
        found |= {"networks": counts, "skipped": skipped}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    return EXIT_SOME_FAILED if skipped else 0


def count_all(chosen, *, patch, config, xla=True):
    """Count networks, one after another.

    Args:
      chosen: {name: peers.Ours or peers.Peer}.
      patch: edge in voxels.
      config: path, of our networks.
      xla: also XLA's own count.

    Returns:
      {name: count of jax_side or torch_side}, and {name: why it could not be counted}.
    """
    counts, skipped = {}, {}
    for name, entry in chosen.items():
        print(f"counting {name}", file=sys.stderr)
        try:
            counts[name] = _count(entry, patch=patch, config=config, xla=xla)
        except ValueError as error:
            skipped[name] = " ".join(str(error).split())
    return counts, skipped


def _count(entry, *, patch, config, xla):
    if entry.framework == "jax":
        return jax_side.count(entry, patch=patch, config=config, xla=xla)
    if reason := peers.cannot_run(entry):
        raise ValueError(reason)
    from masm_jax.benchmark import torch_side

    return torch_side.count(entry, patch=patch)


def words(chosen, counts):
    """Lines of Markdown: a row per counted network, and what XLA says, with the reason."""
    rows = []
    for name, count in counts.items():
        moved = count.get("moved", {}).get("forward")
        entry, parameters = chosen[name], count["parameters"] / 1e6
        cells = [name, entry.words, entry.framework, f"{parameters:.2f}"]
        for direction in ("forward", "train"):
            cells += [f"{count[direction] / 1e9:.1f}", f"{2 * count[direction] / 1e9:.1f}"]
        rows.append([*cells, "" if moved is None else f"{moved / 1e9:.1f}"])
    heads = (
        "network", "what", "in", "M parameters", "GMAC forward", "GFLOP forward", "GMAC train",
        "GFLOP train", "GMAC that move voxels, forward, not counted",
    )  # fmt: skip
    lines = tables.markdown(heads, rows)
    asked = {name: count for name, count in counts.items() if count.get("xla")}
    if asked:
        rows = [
            [name, *(f"{said / 1e9:.1f}, {said / 2 / count[which]:.2f} of ours"
                     for which, said in count["xla"].items())]
            for name, count in asked.items()
        ]  # fmt: skip
        heads = ("network", "XLA: GFLOP forward", "XLA: GFLOP train")
        lines += ["", *tables.markdown(heads, rows), "", REASON]
    return lines


def modules(counts):
    """Lines of Markdown: multiply-adds of our networks by part and level."""
    ours = {name: count["places"] for name, count in counts.items() if "places" in count}
    names = dict.fromkeys(place for each in ours.values() for place in each["train"])
    rows = [[place, *(_both(each, place) for each in ours.values())] for place in names]
    return tables.markdown(["GMAC forward, train", *ours], rows)


def _both(places, place):
    return ", ".join(f"{places[which].get(place, 0) / 1e9:.2f}" for which in ("forward", "train"))
