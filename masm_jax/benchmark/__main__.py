"""python -m masm_jax.benchmark COMMAND ...

A command is a module of this package with ``add_arguments(parser)`` and ``run(args) -> exit code``;
its ValueError is an error in one line. Only the module that is asked for is imported: ``tpu`` has
to set the environment before anything imports JAX. Exit codes: 0 done, 1 an error, 2 usage.
"""

import argparse
import importlib
import signal
import sys

from masm_jax.arguments import Parser
from masm_jax.files import told

COMMANDS = {
    "tpu": "compile a step for a TPU pod that is not there: memory, bytes, FLOPs, bounds",
    "plots": "draw what tpu has written",
    "flops": "count parameters and multiply-adds of our networks and of peers in PyTorch",
    "compare": "measure our networks and peers in PyTorch: time, memory, compilation",
    "accuracy": "Dice of MASM and others at equal budget, trained and evaluated alike",
    "input": "crops per second beside MONAI and nnU-Net, waiting, memory",
    "start": "time to the first training step, cold and with the compilation cache",
    "shares": "what a share of the tokens saves in time, and costs in Dice",
    "growth": "how time and memory grow with patch, batch, modalities, depth of the mixers",
    "evaluation": "seconds of an evaluation by stage: reading, inference, metrics, writing",
}


def main(argv=None):
    """Arguments in, exit code out."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m masm_jax.benchmark", description="Cost of the network.")
    commands = parser.add_subparsers(dest="command", required=True)
    module = None
    for name, words in COMMANDS.items():
        own = commands.add_parser(name, help=words, formatter_class=argparse.RawTextHelpFormatter)
        if argv[:1] == [name]:
            module = importlib.import_module(f"masm_jax.benchmark.{name}")
            own.description = module.__doc__
            module.add_arguments(own)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except (ValueError, OSError) as error:
        print(f"benchmark {args.command}: {told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"benchmark {args.command}: stopped before it was done", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
