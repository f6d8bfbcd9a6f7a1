"""Kills commands with -9 at random moments, starts them again, and compares what they leave.

    python -m tests.faults.kills --workdir=DIR [--of=train,prepare,predict] [--kills=30] [--seed=0]

Each command is first run without a kill. Then it is started in an empty folder and killed at a
random moment, again and again, until it ends by itself; then in the next empty folder, until there
were --kills. Every second kill takes the process alone and leaves its workers, as the kernel does
when memory runs out; the others take all of them, as a scheduler does.

After each kill, what has the name of something whole must be whole: a record, a segmentation, a
checkpoint. At the end all must be as without a kill: parameters, optimiser and averaged weights bit
for bit, and every number of metrics.jsonl; records and segmentations byte for byte.

Prints a table. Exit codes: 0 all is well, 1 something was not (the message says what), 2 usage.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from masm_jax import checkpoint, run_config, runtime, sharding
from masm_jax.data.records import Records
from masm_jax.state import Network, abstract_state

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STEPS = 120
LIMIT = 900.0  # seconds, of a command that nobody kills
TRAIN = (
    "--config=configs/masm_demo.py",
    f"--config.total_steps={STEPS}",
    "--config.batch_size=1",
    "--config.patch=16",
    "--config.optim.warmup_steps=5",
    "--config.model.mixers=('aware','concat','concat','concat','concat','shift')",
    "--config.log.every=1",
    "--config.log.patch_every=25",
    "--config.log.volume_every=0",
    "--config.log.checkpoint_every=5",
)


class Wrong(Exception):
    """Something is not as it must be."""


class Train:
    """train.py with asynchronous checkpoints every five steps."""

    name = "train.py"

    def __init__(self, root):
        self._records = root / "records"

    def words(self, output):
        """The command that writes to ``output``."""
        return ["train.py", *TRAIN, f"--config.data.records={self._records}",
                "--config.data.split=1/4", f"--workdir={output}"]  # fmt: skip

    def said(self, output):
        """Where in its work it was, for the table; looked at before anything is started again."""
        folder = output / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if any(not name.isdigit() for name in names):
            return "while a checkpoint was written"
        return "between checkpoints" if names else "before the first checkpoint"

    def check_partial(self, output):
        """Every checkpoint that has its name can be read: its checksums are looked at."""
        copy = output.with_name("copy")  # opening it removes what is not whole
        shutil.rmtree(copy, ignore_errors=True)
        if not (output / "checkpoints").is_dir():
            return
        shutil.copytree(output, copy)
        for path in (output / "checkpoints").iterdir():
            if path.name.isdigit():
                self._state(copy, int(path.name))

    def check_whole(self, straight, output):
        """The last state and all numbers, bit for bit."""
        if _numbers(straight) != _numbers(output):
            raise Wrong(f"{output}/metrics.jsonl differs from {straight}/metrics.jsonl")
        for one, other in zip(*map(jax.tree.leaves, map(self._state, (straight, output)))):
            if np.asarray(one).tobytes() != np.asarray(other).tobytes():
                raise Wrong(f"{output}: the state after {STEPS} steps differs from {straight}")

    def _state(self, workdir, step=STEPS):
        config = run_config.load(workdir)
        records = Records(config.data.records)
        network = Network(config, modalities=records.modalities, regions=records.regions)
        everywhere = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
        target = checkpoint.with_sharding(abstract_state(network), everywhere)
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return checkpoints.restore(step, target)[0]


class Prepare:
    """prepare with two workers."""

    name = "prepare"

    def __init__(self, root):
        self._raw = root / "raw"

    def words(self, output):
        """The command that writes to ``output``."""
        return ["-m", "masm_jax.prepare", f"--input={self._raw}", f"--output={output}",
                "--workers=2"]  # fmt: skip

    def said(self, output):
        """How far it was."""
        whole = len(list(output.glob("[!.]*/meta.json")))
        return "some records were there" if whole else "no record was there"

    def check_partial(self, output):
        """Every record that has its name is whole; the index is there with all of them alone."""
        for path in output.glob("[!.]*"):
            if path.is_dir() and not (path / "meta.json").is_file():
                raise Wrong(f"{path} has the name of a record and is none")
        if (output / "dataset.json").is_file():
            records = Records(output)  # looks at the files of every case
            for case in records.cases:
                records.image(case)

    def check_whole(self, straight, output):
        """Byte for byte, and nothing else is left."""
        _same_files(straight, output)


class Predict:
    """predict on all phantoms."""

    name = "predict"

    def __init__(self, root):
        self._raw, self._run = root / "raw", root / "train" / "straight"
        if not (self._run / "checkpoints").is_dir():
            raise Wrong(f"no run in {self._run}: expected --of=train,predict")

    def words(self, output):
        """The command that writes to ``output``."""
        return ["-m", "masm_jax.predict", f"--workdir={self._run}", f"--input={self._raw}",
                f"--output={output}"]  # fmt: skip

    def said(self, output):
        """How far it was."""
        whole = len(list(output.glob("*.nii.gz")))
        return "some segmentations were there" if whole else "no segmentation was there"

    def check_partial(self, output):
        """What has the name of a result has all its bytes."""
        straight = output.with_name("straight")
        for path in output.glob("[!.]*"):
            if path.suffix != ".json" and path.read_bytes() != (straight / path.name).read_bytes():
                raise Wrong(f"{path} is not that of {straight}")
            if path.suffix == ".json":
                json.loads(path.read_text())  # it has a time in it

    def check_whole(self, straight, output):
        """Byte for byte, and nothing else is left but temporary files of a name with a point."""
        self.check_partial(output)
        names = [{path.name for path in folder.glob("[!.]*")} for folder in (straight, output)]
        if names[0] != names[1]:
            raise Wrong(f"{output} and {straight} differ in {sorted(names[0] ^ names[1])}")


TARGETS = {"train": Train, "prepare": Prepare, "predict": Predict}


def main(argv=None):
    """Flags in, exit code out."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="empty, or of this command")
    parser.add_argument(
        "--of", default="train,prepare,predict", help="commands; predict uses train's run"
    )
    parser.add_argument("--kills", type=int, default=30, help="of each command (30)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if unknown := set(args.of.split(",")) - TARGETS.keys():
        parser.error(f"--of={args.of}: {', '.join(unknown)} unknown; known: {', '.join(TARGETS)}")
    root = pathlib.Path(args.workdir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    raw, records = root / "raw", root / "records"
    run(["-m", "masm_jax.phantom", f"--output={raw}", "--cases=12", "--spacing=6"], root / "log")
    run(["-m", "masm_jax.prepare", f"--input={raw}", f"--output={records}"], root / "log")
    print("| command | kills | at which moment | starts | folders completed | compared |")
    print("|---|---|---|---|---|---|")
    try:
        for name in args.of.split(","):
            kill_often(TARGETS[name](root), root / name, args.kills, args.seed)
    except Wrong as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    return 0


def kill_often(target, root, kills, seed):
    """One row of the table."""
    straight, log = root / "straight", root / "log"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    run(target.words(root / "first"), log)  # compiles, so that the time is that of the next
    began = time.monotonic()
    run(target.words(straight), log)
    seconds = time.monotonic() - began
    target.check_whole(root / "first", straight)
    random, done, starts, folders, moments = np.random.default_rng(seed), 0, 0, 0, {}
    while done < kills:
        output, ended = root / f"killed-{folders}", False
        while not ended:
            moment = random.uniform(0, seconds) if done < kills else LIMIT
            ended = run(target.words(output), log, moment, alone=done % 2 == 0)
            starts += 1
            if not ended:
                done += 1
                where = target.said(output)
                moments[where] = moments.get(where, 0) + 1
                target.check_partial(output)
        target.check_whole(straight, output)
        folders += 1
    moments = ", ".join(f"{count} {words}" for words, count in moments.items())
    print(f"| {target.name} | {done} | {moments} | {starts} | {folders} | same |", flush=True)


def run(words, log, limit=LIMIT, alone=False):
    """Run a command, or kill it after ``limit`` seconds, with or without its children.

    Returns:
        Whether it came to its end.
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            if limit == LIMIT:
                raise Wrong(f"{' '.join(words)}: not done in {LIMIT} s, see {log}") from None
            return False
        finally:
            if process.poll() is None:
                process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise Wrong(f"{' '.join(words)}: exit code {code}, see {log}")
    return True


def _numbers(workdir):
    """{step: numbers} of metrics.jsonl, less the times."""
    steps = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        numbers = {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        steps.setdefault(numbers.pop("step"), []).append(numbers)
    return {step: sorted(lines, key=str) for step, lines in sorted(steps.items())}


def _same_files(one, other):
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    ]
    if names[0] != names[1]:
        raise Wrong(f"{one} and {other} differ in {sorted(names[0] ^ names[1])[:5]}")
    for name in sorted(names[0]):
        if (one / name).read_bytes() != (other / name).read_bytes():
            raise Wrong(f"{other / name} differs from {one / name}")


if __name__ == "__main__":
    runtime.start()
    sys.exit(main())
