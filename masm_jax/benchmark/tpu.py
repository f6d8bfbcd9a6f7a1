"""Compile a step for a TPU pod that is not there, and read off what it costs.

    python -m masm_jax.benchmark tpu --config=configs/masm_brats.py --topology=v5e:4x4

libtpu, the TPU's compiler, needs no TPU (`make tpu-env`). The step is the one that train.py runs,
with its shardings. Nothing runs: memory, FLOPs and bytes are the compiler's, times are bounds.
A large network takes 5 to 15 minutes on two cores; the same program is not compiled twice.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import sys

from masm_jax import config_file
from masm_jax.benchmark import chips, hlo, report, traffic
from masm_jax.files import replacing

_CACHE = pathlib.Path.home() / ".cache" / "masm_jax" / "tpu"
_LISTED = 50  # instructions in the JSON


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--config", required=True, help="such as configs/masm_brats.py")
    parser.add_argument("--topology", required=True, help="CHIP:EDGES, such as v5e:4x4, v5p:4x4x4")
    parser.add_argument("--step", choices=("train", "infer"), default="train")
    parser.add_argument("--patch", help="edge of a crop, or three: 256,256,160 (the config's)")
    parser.add_argument(
        "--batch_per_chip", type=int, default=1, metavar="N",
        help="crops per chip, with --spatial=K per K chips (1)",
    )  # fmt: skip
    parser.add_argument("--spatial", type=int, metavar="K", help="chips that share a volume")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of the config: model.size=full; may be repeated",
    )  # fmt: skip
    parser.add_argument("--movers", type=int, default=15, help="rows of the long tables (15)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--text", metavar="FILE", help="write the optimised program")
    parser.add_argument(
        "--cache", default=str(_CACHE), metavar="DIR",
        help=f"compiled programs, read again where nothing changed ({_CACHE}); '' keeps none",
    )  # fmt: skip


def run(args):
    """Exit code of the command.

    Raises:
      ValueError: anything that the user can mend, in one line.
    """
    where = chips.parse(args.topology)
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "no TPU compiler (libtpu) in this Python; `make tpu-env` makes .venv-tpu with it, then "
            "use .venv-tpu/bin/python -m masm_jax.benchmark tpu ..."
        )
    describe(where)
    # Only now: they import JAX, and that reads the environment.
    from masm_jax import runtime
    from masm_jax.benchmark import program

    runtime.start(cache=False)
    config = settings(args, where)
    lowered, parameters = program.lower(config, where, args.step)
    facts, text = _compiled(program, lowered, where, args.cache)
    patch = config.patch
    found = {
        "what": "compiled for a described pod, not run; times are bounds, not measurements",
        "run": {
            "config": args.config,
            "step": args.step,
            "size": config.model.size,
            "parameters": parameters,
            "topology": str(where),
            "accelerator_type": where.accelerator_type,
            "chips": where.chips,
            "batch_size": config.batch_size,
            "batch_per_chip": config.batch_size / where.chips,
            "spatial": config.mesh.spatial,
            "patch": [patch] * 3 if isinstance(patch, int) else list(patch),
        },
        "chip": report.chip_facts(where),
        "compiled": facts,
        "versions": program.versions(),
        "settings": json.loads(config.to_json()),
    }
    if facts["fits"]:
        found |= report.build(
            facts,
            traffic.count(hlo.parse(text)),
            where=where,
            samples=config.batch_size / where.chips,
            spatial=config.mesh.spatial,
            movers=_LISTED,
        )
    _write(args.json, json.dumps(found, indent=1) + "\n")
    _write(args.text, text)
    print(report.words(found, movers=args.movers) if facts["fits"] else report.misfit(found))
    return 0 if facts["fits"] else runtime.EXIT_ERROR


def describe(where):
    """The environment in which libtpu takes the caller's word; set before JAX is imported."""
    os.environ.update(
        TPU_ACCELERATOR_TYPE=where.accelerator_type,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",  # ask no metadata server of Google's cloud
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no chip is opened: several may compile side by side
        JAX_PLATFORMS="cpu",
    )
    quiet = {"TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def settings(args, where):
    """The config of the command's flags, for a slice (chips.Slice).

    Raises:
      ValueError: a flag is wrong.
    """
    config = config_file.load_config(args.config, args.set)
    if args.patch:
        edges = [int(edge) if edge.isdigit() else 0 for edge in args.patch.split(",")]
        if len(edges) not in (1, 3) or 0 in edges:
            raise ValueError(f"--patch={args.patch}: expected an edge, or three as in 256,256,160")
        config.patch = edges[0] if len(edges) == 1 else tuple(edges)
    if args.spatial is not None:
        config.mesh.spatial = args.spatial
    spatial = config.mesh.spatial
    if spatial < 1 or where.chips % spatial:
        raise ValueError(f"--spatial={spatial}: expected a divisor of {where.chips}, the chips")
    config.batch_size = args.batch_per_chip * where.chips // spatial
    return config


def _compiled(program, lowered, where, cache):
    """(facts, text) of ``program.compile_``, from the cache where the program is the same."""
    said = [lowered.as_text(), str(where), program.versions()]
    said += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    key = hashlib.sha256("\n".join(map(str, said)).encode()).hexdigest()[:16]
    kept = pathlib.Path(cache) / f"{key}.json.gz" if cache else None
    if kept and kept.is_file():
        with gzip.open(kept, "rt") as file:
            facts, text = json.load(file)
        return facts | {"reused": str(kept)}, text
    print(f"compiling for {where}: minutes, a large network 5 to 15", file=sys.stderr)
    facts, text = program.compile_(lowered)
    if kept:
        with replacing(kept) as temporary, gzip.open(temporary, "wt") as file:
            json.dump([facts, text], file)
    return facts, text


def _write(path, content):
    if path:
        with replacing(path) as temporary:
            temporary.write_text(content)
