"""Export a trained run: one folder to segment with, without the config and the network's code.

python -m masm_jax.export --workdir=RUN --output=FOLDER [--checkpoint=latest|best]
python -m masm_jax.predict --from_export=FOLDER --input=CASE_OR_ROOT --output=OUT

FOLDER gets the averaged weights, a program per platform and export.json
(masm_jax/inference/exported.py says what is in them). Exit codes: 0 done, 1 an error, 2 usage.
"""

import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import masm_jax
from masm_jax import runtime, sharding
from masm_jax.arguments import Parser
from masm_jax.inference import exported
from masm_jax.inference.volume import Settings, restore_run
from masm_jax.models import conv
from masm_jax.steps import segment_step

# docs.jax.dev/en/latest/export/export.html, "Compatibility guarantees".
_GUARANTEE = "jax promises to run it in versions up to 6 months newer and 3 weeks older"


def main(argv=None):
    """Flags in, exit code out."""
    args = _parser().parse_args(argv)
    runtime.start()
    # Else every operation carries the path of its line of code on this machine.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    return runtime.command("export", _export, args)


def _export(args):
    export_run(
        args.workdir,
        args.output,
        which=args.checkpoint,
        platforms=list(dict.fromkeys(args.platforms.split(","))),
        given=args.set if args.batch is None else [*args.set, f"infer.batch={args.batch}"],
    )
    return 0


def _parser():
    parser = Parser(
        prog="python -m masm_jax.export", description="Export a trained run into one folder."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run (train.py --workdir)")
    parser.add_argument("--output", required=True, help="folder to write; an export is replaced")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    parser.add_argument(
        "--platforms", default="cpu,cuda,tpu", help=f"some of {','.join(exported.PLATFORMS)}"
    )
    parser.add_argument("--batch", type=int, help="tiles per call (default: the run's infer.batch)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of infer., over the run's: infer.flips=0,1,2; may be repeated",
    )  # fmt: skip
    return parser


def export_run(workdir, output, *, which="latest", platforms=exported.PLATFORMS, given=()):
    """Write the export of a run.

    Args:
      workdir: folder written by train.py.
      output: the folder to write; not there, empty, or an older export.
      which: "latest" or "best" (by pseudo Dice) checkpoint.
      platforms: some of ``exported.PLATFORMS``.
      given: "infer.KEY=VALUE", over the run's (config.override).

    Raises:
      ValueError: no run, or several; no such platform; or something else is in ``output``.
    """
    unknown = [name for name in platforms if name not in exported.PLATFORMS]
    if unknown:
        raise ValueError(
            f"--platforms={','.join(platforms)}: {unknown[0]!r} is none; expected some of "
            f"{','.join(exported.PLATFORMS)}"
        )
    exported.check_target(output)
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    network, params, meta = restore_run(workdir, which=which, mesh=mesh, given=given)
    infer = network.config.infer
    if infer.runs:
        raise ValueError(
            f"infer.runs = {tuple(infer.runs)}: an export holds one network, expected none; export "
            f"{workdir} alone: --set='infer.runs=()'"
        )
    if infer.present:
        raise ValueError(
            f"infer.present = {tuple(infer.present)}: an export works with all; expected "
            f"none named: --set='infer.present=()'"
        )
    networks = {platform: network.segmenting_on(platform) for platform in platforms}
    about = {
        "run": str(workdir),
        "checkpoint": which,
        "step": meta["step"],
        "average": 1 if which == "best" else infer.average,
        "spacing": meta["spacing"],
        "dtype": {name: own.dtype.__name__ for name, own in networks.items()},
        "convolution": {platform: conv.fastest(platform) for platform in platforms},
        "masm_jax": masm_jax.__version__,
        "jax": jax.__version__,
        "guarantee": _GUARANTEE,
    }
    programs = {platform: program(own, params, platform) for platform, own in networks.items()}
    exported.write_export(output, programs, by_name(params), Settings.of(network), about)
    size = sum(path.stat().st_size for path in pathlib.Path(output).iterdir())
    print(
        f"{output}: step {meta['step']} of {workdir}, for {', '.join(platforms)}; "
        f"{size / 1e6:.1f} MB"
    )
    print(f"python -m masm_jax.predict --from_export={output} --input=SCANS --output=OUT")


def by_name(params):
    """{"encoder.blocks.0.kernel": float32 array on the host, ...} of a tree of parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def program(network, params, platform):
    """The segmentation of tiles as a program for a platform, which need not be here.

    Args:
      network: the network.
      params: its weights, for their names and shapes.
      platform: one of ``exported.PLATFORMS``; decides how convolutions are computed.

    Returns:
      ``jax.export.Exported``: ({name: weight}, (b, M, p, p, p) float32) -> (b, p, p, p, R) float32
      logits, for every b.
    """
    names, structure = list(by_name(params)), jax.tree.structure(params)
    step = segment_step(network)

    def segment(weights, tiles):
        return step(jax.tree.unflatten(structure, [weights[name] for name in names]), tiles)

    modalities = len(network.modalities)
    (b,) = jax.export.symbolic_shape("b")
    tiles = jax.ShapeDtypeStruct((b, modalities, *network.patch), jnp.float32)
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in zip(names, jax.tree.leaves(params))
    }
    with conv.traced_for(platform):
        return jax.export.export(jax.jit(segment), platforms=[platform])(weights, tiles)


if __name__ == "__main__":
    sys.exit(main())
