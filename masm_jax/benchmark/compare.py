"""Measure our networks and peers in PyTorch on this machine: time, memory, compilation.

    python -m masm_jax.benchmark compare --networks=masm_base,dynunet --output=runs/speed

Same shapes, dtype, threads and allocator for both frameworks, every network in a process of its
own; in each round all are measured, in alternating order. Inference gives logits in float32. A
training step is forward, Dice and cross-entropy, backward, clipping, AdamW; ours is that of
train.py, which has deep supervision, averaged weights and metrics besides, peers have one head.
Input and targets are on the device already. Stopped, the same command goes on. OUTPUT gets
comparison.json, report.md and plots. Peers need torch, most also MONAI (`make bench-env`).
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from masm_jax import run_config, runtime
from masm_jax.arguments import some
from masm_jax.benchmark import flops, jax_side, pareto, peers, ranking, workers
from masm_jax.benchmark.store import Item, Store, item_of
from masm_jax.files import check_output, replacing

MODES = ("infer", "train")
TORCH_VARIANTS = ("eager", "compile", "contiguous")
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA, of WSL, of AMD
# May not differ between the start of a comparison and its continuation.
FIXED = ("patch", "batch", "dtype", "threads", "device", "seconds", "config")


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument(
        "--networks", default="all", metavar="A,B", help=f"all, or of {', '.join(peers.NETWORKS)}"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--patch", type=int, default=128, help="edge of a patch in voxels (128)")
    parser.add_argument("--batch", type=int, default=1, help="patches per call (1)")
    parser.add_argument("--mode", default="infer,train", help="infer, train, or both (both)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--variants", default="eager,compile", metavar="A,B",
        help="of torch: eager and compile, both channels last; contiguous (eager,compile)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="cores (0: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="per network and round, 3 calls at least (10)"
    )
    parser.add_argument(
        "--resident", action="store_true",
        help="keep all processes between rounds: no start-up, but all memory at once, and\n"
        "the peak of a process is then that of its compilation too",
    )  # fmt: skip
    parser.add_argument(
        "--config", default="configs/masm_brats.py", metavar="FILE",
        help="of our networks; encoder, size, mixers and detail are those of their names",
    )  # fmt: skip


def run(args):
    """Exit code of the command: 3 where a network has no numbers, 75 stopped.

    Raises:
      ValueError: a flag is wrong, or OUTPUT holds another comparison.
    """
    chosen, todo = _checked(args)
    runtime.start(cache=False)
    check_output(args.output)
    store = Store(pathlib.Path(args.output), {name: getattr(args, name) for name in FIXED})
    store.define({name: _definition(entry, args.config) for name, entry in chosen.items()})
    for item in todo:
        if reason := peers.cannot_run(chosen[item.network]):
            store.failures[" ".join(item)] = reason
    with runtime.StopSignal() as stop:
        finished = measure_all(todo, args, store, stop)
    if not finished:
        print("stopped; the same command goes on", file=sys.stderr)
        return runtime.EXIT_STOPPED
    missing = {name: entry for name, entry in chosen.items() if name not in store.counts}
    counts, _ = flops.count_all(missing, patch=args.patch, config=args.config, xla=False)
    store.counts.update(counts)
    store.write()
    report(store, todo)
    return runtime.EXIT_SOME_FAILED if store.failed(todo) else 0


def _checked(args):
    """({name: network}, [Item]) of the flags."""
    chosen = peers.chosen(args.networks)
    for name in ("patch", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)}: expected 1 or more")
    if args.seconds < 0:
        raise ValueError(f"--seconds={args.seconds:g}: expected 0 or more")
    modes = some("mode", args.mode, MODES)
    variants = some("variants", args.variants, TORCH_VARIANTS)
    cores = len(workers.cores())
    if not 0 <= args.threads <= cores:
        raise ValueError(f"--threads={args.threads}: expected 1 to {cores}, the cores, or 0: all")
    args.threads = args.threads or cores
    if args.device == "cuda" and not any(map(os.path.exists, _DRIVERS)):
        raise ValueError(
            f"--device=cuda: no driver of a GPU here (none of {', '.join(_DRIVERS)}); expected a "
            f"machine with one, or --device=cpu"
        )
    if not pathlib.Path(args.config).is_file():
        raise ValueError(f"--config={args.config}: no such file")
    todo = [
        Item(name, variant, mode)
        for name, entry in chosen.items()
        for variant in (variants if entry.framework == "torch" else ("jit",))
        for mode in modes
    ]
    return chosen, todo


def _definition(entry, config):
    """What makes a network the one that it is, as plain values."""
    if entry.framework == "jax":
        return run_config.to_dict(jax_side.settings(entry, config))
    return {"class": f"{entry.module}.{entry.name}", "arguments": entry.arguments}


def measure_all(todo, args, store, stop, start=None):
    """Round after round, there and back; what is in the store is not measured again.

    Args:
      todo: Items.
      args: of the command line.
      store: Store, written after every measurement.
      stop: true when it is time to leave.
      start: (Item, args) -> Worker.

    Returns:
      whether all was measured.
    """
    plan = [
        (number, item)
        for number in range(args.rounds)
        for item in (reversed(todo) if number % 2 else todo)
        if not any(found["round"] == number for found in store.of(item))
    ]
    logger, waiting = logging.getLogger("masm_jax"), {}
    try:
        for place, (number, item) in enumerate(plan):
            if stop:
                return False
            if " ".join(item) in store.failures:
                continue
            began = time.monotonic()
            if not store.of(item):  # what a failed attempt has compiled would be in no time
                shutil.rmtree(_cache(args, item), ignore_errors=True)
            worker = waiting.pop(item, None) or (start or Worker)(item, args)
            try:
                found = worker.measure(args.seconds)
            except RuntimeError as error:
                worker.close()
                store.failures[" ".join(item)] = str(error)
                store.write()
                logger.info("round %d of %d: %s: %s", number + 1, args.rounds, _named(item), error)
                continue
            except BaseException:  # a second Ctrl-C: it would go on, beside what comes next
                worker.kill()
                raise
            if args.resident:
                waiting[item] = worker
            else:
                worker.close()
            store.versions[peers.NETWORKS[item.network].framework] = found.pop("versions")
            wall = time.monotonic() - began
            store.results.append(item._asdict() | {"round": number} | found | {"wall": wall})
            store.write()
            left = _left(plan[place + 1 :], store)
            logger.info(
                "round %d of %d: %s: %.4g s a call; about %.0f min left",
                number + 1, args.rounds, _named(item), found["median"], left / 60,
            )  # fmt: skip
    finally:
        for worker in waiting.values():
            worker.close()
    return True


def _left(plan, store):
    """Seconds that the rest takes: as long as before, the mean where there is no before."""
    mean = sum(found["wall"] for found in store.results) / len(store.results)
    known = {item_of(found): found["wall"] for found in store.results}
    return sum(known.get(item, mean) for _, item in plan if " ".join(item) not in store.failures)


def _named(item):
    return f"{item.network} ({item.variant}), {item.mode}"


class Worker:
    """A process that measures one item.

    Args:
      item: Item.
      args: of the command line.
      more: of the job, beside them: "ours", fields of peers.Ours; "limit" of bytes.
    """

    def __init__(self, item, args, **more):
        folder = pathlib.Path(args.output).absolute()
        job = item._asdict() | {name: getattr(args, name) for name in FIXED} | more
        self._log = folder / "logs" / f"{'-'.join(item)}.txt"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "masm_jax.benchmark.worker", json.dumps(job)]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | environment(_cache(args, item), args),
                start_new_session=True,  # Ctrl-C is for the command: a measurement is finished
            )  # fmt: skip

    def measure(self, seconds):
        """What ``worker.measure`` says, and "peak" (bytes) and "versions".

        Raises:
          RuntimeError: it failed; why.
        """
        line = ""
        try:
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it is gone; what it said is below
        line = line or self._process.stdout.readline()
        found = json.loads(line) if line else {"error": self._death()}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _death(self):
        code = self._process.wait()
        if code == -9:
            return "killed, most likely for want of memory"
        return f"its process ended with code {code}; see {self._log}"

    def kill(self):
        """End the process in the middle of what it does."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close()

    def close(self):
        """End the process, and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._process.wait()


def _cache(args, item):
    """Folder of the compiled programs of an item."""
    return pathlib.Path(args.output).absolute() / "cache" / "-".join(item)


def environment(cache, args):
    """Environment of a worker: cores, caches of compiled programs, one allocator for both sides."""
    platforms = "cpu" if args.device == "cpu" else "cuda,cpu"
    return workers.KEEP_MEMORY | {
        "OMP_NUM_THREADS": str(args.threads),
        "JAX_PLATFORMS": platforms,
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }


def report(store, todo):
    """Print the tables, write them to OUTPUT/report.md, and draw the plots."""
    device = next((said["device"] for said in store.versions.values() if "device" in said), "")
    rows = ranking.rows(store.results, store.counts, store.settings, device)
    text = "\n".join(ranking.words(rows, store, store.failed(todo))) + "\n"
    with replacing(store.folder / "report.md") as temporary:
        temporary.write_text(text)
    if rows:
        pareto.draw(rows, store.folder)
    print(text, end="")
