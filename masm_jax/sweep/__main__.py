"""Train and score the rows of a sweep, each with several seeds, and table what they differ by.

    python -m masm_jax.sweep --config=configs/sweeps/extras.py --workdir=runs/extras

A sweep file is Python with get_sweep(), which returns

    {"config": "configs/masm_demo.py",         # what all rows start from
     "common": {"total_steps": 300},           # keys set over it, for all rows
     "rows": {"none": {}, "gate": {"model.shift_extras": ("gate",)}},
     "seeds": (0, 1, 2),
     "split": "val"}                           # what eval.py scores

The first row is what the others are compared with. Every run is train.py and then eval.py, as a
user would start them, in WORKDIR/ROW/seed-S; log.txt there has their words. What is done is not
done again and what was stopped goes on: start the same command. A run that fails is left, and
listed at the end.

Several processes may work on one sweep, on one machine or on several with one file system: start
the same command again. Each takes the next run that nobody has; a lock file says who has it, and
one that a dead process of this host has left is taken over.

WORKDIR gets table.csv, table.md, summary.json, differences.png and keep.png, after every run.
Exit codes: 0 done, 1 an error, 2 usage, 3 some runs failed (listed), 75 stopped by a signal.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import time

import jax

from masm_jax import commands, runtime
from masm_jax.arguments import Parser, some
from masm_jax.benchmark import accuracy_report
from masm_jax.commands import REPOSITORY, Stopped
from masm_jax.files import replacing
from masm_jax.locks import Lock
from masm_jax.sweep import cost, definition, report


def main(argv=None):
    """Arguments in, exit code out; an error is one readable line."""
    parser = Parser(
        prog="python -m masm_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the sweep file")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of runs and tables")
    parser.add_argument(
        "--rows", metavar="A,B", help="run these alone; the table has all that is done"
    )
    parser.add_argument("--seeds", metavar="A,B", help="of these alone, likewise")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of the config, for all rows: total_steps=1100; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true", help="make table and plots of what is done, and stop"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check all, say what is to be done, and stop"
    )
    args = parser.parse_args(argv)
    return runtime.command("sweep", _run, args)


def _run(args):
    jax.config.update("jax_platforms", "cpu")  # devices are for the runs; here shapes are traced
    sweep = definition.load(args.config, args.workdir, args.set)
    runs = _chosen(sweep, args)
    sweep.check_folders()
    if args.report:
        return _report(sweep)
    sweep.check_records()
    if args.dry_run:
        for run in runs:
            print(f"{run}: {'done' if sweep.done(run) else _words(sweep, run)}")
        return 0
    failed, held = {}, {}
    try:
        with runtime.StopSignal() as stop:
            execute(sweep, runs, failed, held, stop)
    except Stopped:
        _report(sweep)
        print("stopped; the same command goes on")
        return runtime.EXIT_STOPPED
    _report(sweep)
    for run, holder in held.items():
        if not sweep.done(run):
            print(f"{run}: still left to {holder}")
    if failed:
        names = ", ".join(map(str, failed))
        print(f"sweep: {len(failed)} failed, said above: {names}", file=sys.stderr)
    return runtime.EXIT_SOME_FAILED if failed else 0


def execute(sweep, runs, failed, held, stop):
    """Do what is not done and nobody does, in order.

    Args:
        sweep: the ``Sweep``.
        runs: of it.
        failed: gets {run: reason}.
        held: gets {run: who has it, in words}.
        stop: ``runtime.StopSignal``.

    Raises:
        Stopped: a signal has come.
    """
    began, took = time.time(), {}  # row -> seconds of its runs
    for number, run in enumerate(runs):
        place = f"{number + 1}/{len(runs)} {run}"
        lock = Lock(sweep.folder(run) / "sweep.lock")
        if sweep.done(run):
            print(f"{place}: done before", flush=True)
            continue
        if holder := lock.take():
            held[run] = holder
            print(f"{place}: left to {holder}", flush=True)
            continue
        try:
            if sweep.done(run):  # by who had the lock
                print(f"{place}: done meanwhile", flush=True)
                continue
            if reason := _failed_since(sweep, run, began):
                failed[run] = reason
                print(f"{place}: failed meanwhile: {reason}", flush=True)
                continue
            left = _left([one for one in runs[number:] if not sweep.done(one)], took)
            print(f"{place}: started" + (f", left about {left}" if left else ""), flush=True)
            start = time.perf_counter()
            _do(sweep, run, lock, stop)
            seconds = time.perf_counter() - start
            took.setdefault(run.row, []).append(seconds)
            dice = accuracy_report.words(accuracy_report.mean_dice(sweep.folder(run)))
            print(f"{place}: Dice {dice}, {seconds / 60:.1f} min", flush=True)
        except (RuntimeError, ValueError, OSError) as error:
            failed[run] = str(error)
            _note_failure(sweep, run, error)
            print(f"{place}: failed: {error}", flush=True)
        finally:
            lock.release()
        report.write(sweep)


def _do(sweep, run, lock, stop):
    """Train, evaluate, count.

    Raises:
        RuntimeError: a command failed.
        Stopped: a signal has come.
    """
    folder = sweep.folder(run)
    with contextlib.suppress(FileNotFoundError):
        (folder / "failed.json").unlink()
    if not sweep.evaluated(run):
        for words in _commands(sweep, run):
            commands.python(words, folder, stop, started=lock.with_child)
        if not sweep.evaluated(run):
            raise RuntimeError(f"{folder}/eval is not of this config; see {folder / 'log.txt'}")
    cost.write(folder)


def _commands(sweep, run):
    """The words of train.py and eval.py."""
    folder = sweep.folder(run)
    train = [str(REPOSITORY / "train.py"), f"--config={sweep.base}", f"--workdir={folder}"]
    train += [definition.flag(key, value) for key, value in sweep.changes(run).items()]
    evaluate = [
        str(REPOSITORY / "eval.py"), f"--workdir={folder}", f"--split={sweep.split}",
        f"--output={folder / 'eval'}",
    ]  # fmt: skip
    return train, evaluate


def _chosen(sweep, args):
    """The runs of ``--rows`` and ``--seeds``; all, where they are not given."""
    rows = list(sweep.rows) if args.rows is None else some("rows", args.rows, sweep.rows)
    seeds = sweep.seeds
    if args.seeds is not None:
        seeds = [int(seed) for seed in some("seeds", args.seeds, sweep.seeds)]
    return [run for run in sweep.runs() if run.row in rows and run.seed in seeds]


def _words(sweep, run):
    changes = {**sweep.common, **sweep.rows[run.row]}
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "as the config is"


def _left(runs, took):
    """Time for these runs by this process alone; None where nothing is known."""
    known = [seconds for own in took.values() for seconds in own]
    if not known:
        return None
    means = {row: sum(own) / len(own) for row, own in took.items()}
    total = sum(means.get(run.row, sum(known) / len(known)) for run in runs)
    return f"{total // 3600:.0f}:{total % 3600 // 60:02.0f} h"


def _note_failure(sweep, run, error):
    """For the other processes and the report."""
    noted = {"reason": str(error), "time": time.time()}
    noted |= {"host": socket.gethostname(), "pid": os.getpid()}
    with replacing(sweep.folder(run) / "failed.json") as temporary:
        temporary.write_text(json.dumps(noted, indent=1) + "\n")


def _failed_since(sweep, run, began):
    """Why another process has failed at it since this one began; None where none has."""
    noted = definition.read_json(sweep.folder(run) / "failed.json")
    return noted["reason"] if noted.get("time", 0) > began else None


def _report(sweep):
    print("\n".join(report.write(sweep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
