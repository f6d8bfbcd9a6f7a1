"""Throws bad inputs at prepare, predict and eval.py and tables what came of them.

    python -m tests.faults.run --count=2000 --seed=0 [--kind=WORDS] [--show] [--markdown=FILE]

Every input is judged in a worker process that is watched: 20 seconds or 2 GB over what it held
before end it. Input ``i`` is of the kind ``i`` modulo the number of kinds, from seed and ``i``
alone. Exit codes: 0 all is well; 1 some outcome is bad (listed); 2 usage.
"""

import argparse
import collections
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time

from tests.faults import judge
from tests.faults.kinds import KINDS
from tests.faults.runs import SPOILT

SECONDS = 20.0
ADDRESS_SPACE = 16 << 30  # keeps the machine alive should the watch be late


def main(argv=None):
    """Flags in, exit code out."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run")
    parser.add_argument("--count", type=int, default=2000, help="inputs (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds with these words in their name")
    parser.add_argument("--show", action="store_true", help="print what was said of each")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    kinds = [name for name in (*KINDS, *SPOILT) if args.kind in name]
    if not kinds or args.count < 1:
        parser.error(f"--kind={args.kind}, --count={args.count}: nothing to run")
    table = {name: collections.Counter() for name in kinds}
    bad, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Watched(pathlib.Path(folder)) as worker:
        for index in range(args.count):
            name, seed = kinds[index % len(kinds)], args.seed * 1_000_003 + index
            outcome, said = worker.judge(name, seed)
            table[name][outcome] += 1
            if outcome in judge.BAD:
                bad.append((name, seed, outcome, said))
            if args.show or outcome in judge.BAD:
                print(f"--- {name} {seed}: {outcome}\n{said}", flush=True)
    lines = format_table(table)
    print("\n".join(lines))
    print(f"{args.count} inputs, {time.monotonic() - began:.0f} s, {len(bad)} bad")
    if args.markdown:
        pathlib.Path(args.markdown).write_text("\n".join(lines) + "\n")
    return 1 if bad else 0


def format_table(table):
    """Markdown: a row per kind, a column per outcome that may be; totals at the end."""
    head = ["kind", "inputs", *judge.OUTCOMES]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    total = sum(table.values(), collections.Counter())
    for name, counts in [*table.items(), ("**all**", total)]:
        cells = [counts.total(), *(counts[outcome] for outcome in judge.OUTCOMES)]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return lines


class Watched:
    """A worker process that judges inputs, and is ended and replaced where it does not come back.

    Args:
        folder: for the inputs.
    """

    def __init__(self, folder):
        self._folder, self._process = folder, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def judge(self, kind, seed):
        """As ``judge.judge``; HANG or MEMORY where the worker had to be ended."""
        if self._process is None:
            self._begin()
        self._pipe.send((kind, seed))
        waits, before = 0, _resident(self._process.pid)
        while not self._pipe.poll(0.02):
            waits += 1  # and not the clock: both processes may be stopped for a while
            if waits * 0.02 > SECONDS:
                return self._ended("HANG")
            if _resident(self._process.pid) - before > judge.LIMIT:
                return self._ended("MEMORY")
        try:
            return self._pipe.recv()
        except EOFError:
            return self._ended("TRACEBACK", "the process died")

    def _begin(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._folder), daemon=True)
        self._process.start()
        other.close()
        assert self._pipe.recv() == "ready"

    def _ended(self, outcome, said="ended by the watch"):
        self._end()
        return outcome, said

    def _end(self):
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _work(pipe, folder):
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    sandbox = folder / "sandbox"
    for warm in (False, True):  # the atlas, fonts and caches are no matter of an input
        if warm:
            judge.judge("labels: none", 1, sandbox)
        judge.clear(sandbox)
    pipe.send("ready")
    while True:
        try:
            kind, seed = pipe.recv()
        except EOFError:
            return
        judge.clear(sandbox)
        pipe.send(judge.judge(kind, seed, sandbox))


def _resident(pid):
    """Bytes of memory that a process holds; 0 of one that is gone."""
    try:
        pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
