"""Time to the first training step of train.py: cold, and with the cache that the cold start left.

    python -m masm_jax.benchmark start --config=configs/masm_laptop.py --records=DIR --output=FOLDER

Runs train.py for one step, in a new folder, first with an empty cache of compiled programs, then
again with what that start has put there. The time is cut at lines that JAX and train.py write; it
ends where the loss of the first step is known. FOLDER gets start.json and start.md.
"""

import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from masm_jax import runtime
from masm_jax.benchmark import tables
from masm_jax.benchmark.workers import machine
from masm_jax.commands import REPOSITORY
from masm_jax.files import check_output, replacing

AIM = 0.25  # of the cold time
# The parts of a start, and what is written at the end of each: first by JAX, then by train.py.
PARTS = {
    "process, imports, index of the records": "Initializing backend",
    "set up: devices, shapes of the network": " cases to train on",
    "state: initial parameters": "compiling the training step",
    "first step": " step 1/",
}
WORK = {
    "tracing": "tracing",
    "jaxpr to MLIR": "lowering",
    "XLA compilation": "compiling, or reading what was compiled",
}
KINDS = {"cold": "cold", "cached": "with the cache"}
_MODULES = "jax._src.dispatch,jax._src.xla_bridge"
_FINISHED = re.compile(
    rf"DEBUG:(.+?):jax\._src\.dispatch:\d+: Finished ({'|'.join(WORK)}) .*in ([\d.]+) sec"
)


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--records", required=True, metavar="DIR")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="over the config, such as model.size=base; may be repeated",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="starts of each kind (3)")
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args):
    """Exit code of the command.

    Raises:
      ValueError: a flag is wrong, or train.py refuses what it was given.
    """
    check_output(args.output)
    if args.repeats < 1:
        raise ValueError(f"--repeats={args.repeats}: expected 1 or more")
    wrong = [text for text in args.set if "=" not in text]
    if wrong:
        raise ValueError(f"--set {wrong[0]}: expected KEY=VALUE, such as model.size=base")
    for name in ("config", "records"):
        if not pathlib.Path(getattr(args, name)).exists():
            raise ValueError(f"--{name}={getattr(args, name)}: not there; expected a path to it")
    words = [f"--config={pathlib.Path(args.config).absolute()}"]
    words += [f"--config.data.records={pathlib.Path(args.records).absolute()}"]
    words += [f"--config.{text}" for text in args.set]
    starts = {kind: [] for kind in KINDS}
    for number in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind, found in starts.items():
                found.append(start(words, cache))
                seconds = sum(found[-1]["parts"].values())
                print(f"{kind}, {number + 1} of {args.repeats}: {seconds:.1f} s", file=sys.stderr)
    return _write(args, starts)


def start(words, cache):
    """Start train.py once, in a new folder.

    Args:
      words: its flags.
      cache: folder of compiled programs.

    Returns:
      of ``read``.

    Raises:
      ValueError: it did not come to the end of the first step.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # JAX_LOG_COMPILES would be in vain: its warnings are below the level of runtime.start.
        "JAX_DEBUG_LOG_MODULES": _MODULES,
    }
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", *words, f"--workdir={folder}/run"]
        words += ["--config.log.every=1", "--config.stop_at_step=1"]
        began, stamped = time.monotonic(), []
        with subprocess.Popen(
            words, cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                for line in process.stdout:
                    stamped.append((time.monotonic() - began, line.rstrip()))
            except KeyboardInterrupt:
                process.kill()  # it would first finish its step
                raise
        code = process.returncode
    if code not in (0, runtime.EXIT_STOPPED):
        said = [line for _, line in stamped if not line.startswith("DEBUG:")] or ["nothing"]
        raise ValueError(f"train.py ended with code {code}, and said last: {said[-1]}")
    return read(stamped)


def read(stamped):
    """Cut a start into parts, and add up what JAX says it has done in it.

    A program that is traced while another is, counts there and not in the outer one.

    Args:
      stamped: [(seconds since the start, line)].

    Returns:
      {"parts": {name of PARTS: seconds}, "work": {name of WORK: seconds}}.

    Raises:
      ValueError: a line that ends a part is not there.
    """
    parts, work = {}, dict.fromkeys(WORK.values(), 0.0)
    waiting, last, done = list(PARTS.items()), 0.0, []
    for seconds, line in stamped:
        if finished := _FINISHED.match(line):
            when, kind, took = finished.groups()
            ended = datetime.datetime.fromisoformat(when.replace(",", ".")).timestamp()
            own = took = float(took)
            while done and done[-1][0] > ended - took:  # its middle: it was a part of this
                own -= done.pop()[1]
            done.append((ended - took / 2, took))
            work[WORK[kind]] += own
        elif waiting[0][1] in line:
            name, _ = waiting.pop(0)
            parts[name], last = seconds - last, seconds
            if not waiting:
                return {"parts": parts, "work": work}
    raise ValueError(f"train.py has not written {waiting[0][1].strip()!r}, and is through")


def _write(args, starts):
    totals = {kind: [sum(each["parts"].values()) for each in starts[kind]] for kind in KINDS}
    ratio = statistics.median(totals["cached"]) / statistics.median(totals["cold"])
    found = {"config": args.config, "set": args.set, "date": str(datetime.date.today())}
    found |= {"machine": machine(), "ratio": ratio, "aim": AIM, "starts": starts}
    text = "\n".join(table(found)) + "\n"
    folder = pathlib.Path(args.output)
    for name, content in (("start.json", json.dumps(found, indent=1) + "\n"), ("start.md", text)):
        with replacing(folder / name) as temporary:
            temporary.write_text(content)
    print(text, end="")
    return 0


def table(found):
    """Lines of Markdown: medians, and for the whole also the fastest and the slowest start."""
    on, starts = found["machine"], found["starts"]
    rows = []
    for what, names in (("parts", PARTS), ("work", WORK.values())):
        if what == "work":
            whole = [[sum(each["parts"].values()) for each in starts[kind]] for kind in KINDS]
            rows.append(["to the first step", *map(_spread, whole)])
        for name in names:
            columns = [[each[what][name] for each in starts[kind]] for kind in KINDS]
            label = f"of it {name}" if what == "work" else name
            rows.append([label, *(f"{statistics.median(values):.2f}" for values in columns)])
    given = "".join(f", {text}" for text in found["set"])
    return [
        f"train.py with {found['config']}{given}; {len(starts['cold'])} starts of each kind, "
        f"medians; {on['cores']} cores of {on['processor']}, {found['date']}.",
        "",
        *tables.markdown(["s", *KINDS.values()], rows),
        "",
        f"With the cache over cold: {found['ratio']:.2f}. The aim, at most {found['aim']}, is "
        f"{'reached' if found['ratio'] <= found['aim'] else 'missed'}.",
    ]


def _spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
