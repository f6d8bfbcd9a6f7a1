"""The runs of ``python -m masm_jax.benchmark accuracy``: what they are, how each is done.

A run is one network, trained with one seed on one part of the cases within one budget, and its
evaluation. It has a folder, and processes of its own, one at a time: nothing runs beside it.

    OUTPUT/calibration/NETWORK/                     a few steps, for the steps per second
    OUTPUT/BUDGET/NETWORK/seed-S[/fold-K]/          config.json, metrics.jsonl, checkpoints, log.txt
    OUTPUT/BUDGET/NETWORK/seed-S[/fold-K]/eval/     what eval.py writes
"""

import dataclasses
import json
import math
import os
import shutil
import statistics

from masm_jax import commands
from masm_jax.benchmark import workers
from masm_jax.commands import REPOSITORY

LEVELS = 6
OURS = {  # networks of ours: what they change of the config
    "masm": (),
    "late": (f"model.mixers={('concat',) * LEVELS!r}",),
    "unet": ("model.mixers=()",),
    "aware": (f"model.mixers={('aware',) * LEVELS!r}",),
    "shift": (f"model.mixers={('shift',) * LEVELS!r}",),
    "tiny": ("model.size=tiny", "model.encoder_single=1"),  # each as its config has it
    "base": ("model.size=base", "model.encoder_single=0"),
    "full": ("model.size=full", "model.encoder_single=0"),
}
_INTERVALS = 6  # of a calibration; the first two do not count (``training_rate``)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run gets: so many minutes of training steps, or so many steps."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text):
        """Of "minutes:10" or "steps:400"; ValueError otherwise."""
        kind, _, amount = text.partition(":")
        try:
            amount = {"minutes": float, "steps": int}[kind](amount)
        except (KeyError, ValueError):
            amount = 0
        if not (amount > 0 and math.isfinite(amount)):
            raise ValueError(f"--budget={text}: expected such as minutes:10 or steps:400")
        return cls(kind, amount)

    def __str__(self):
        return f"{self.kind}-{self.amount:.15g}"  # a folder: two budgets never share one

    def words(self):
        """For people."""
        return f"{self.amount:.15g} {self.kind}"

    def steps(self, rate):
        """Steps of a network that makes ``rate`` per second."""
        return self.amount if self.kind == "steps" else max(1, int(60 * self.amount * rate))


@dataclasses.dataclass(frozen=True)
class Fold:
    """One division of the records.

    Attributes:
        folder: its name, "" where there is one alone.
        rule: config.data.split.
    """

    folder: str
    rule: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One training with its evaluation."""

    budget: Budget
    seed: int
    network: str
    fold: Fold

    def __str__(self):
        return " ".join(filter(None, [self.network, f"seed {self.seed}", self.fold.folder]))


class Study:
    """All runs of a command.

    Args:
        output: folder of the study.
        config: file of the config, absolute.
        records: folder of the records to train on.
        test_records: of those to evaluate on; None: the cases that the fold holds out.
        given: "KEY=VALUE" over the config.
        calibration_steps: how many a calibration takes.
    """

    def __init__(self, output, *, config, records, test_records, given, calibration_steps):
        self.output, self._config = output, config
        self._records, self._test_records = records, test_records
        self._given, self._calibration_steps = given, calibration_steps

    def folder(self, run):
        """Of a run."""
        network = run.network.replace(":", ".")
        return self.output / str(run.budget) / network / f"seed-{run.seed}" / run.fold.folder

    def done(self, run, steps):
        """Whether a run was trained for ``steps`` and every case of it evaluated."""
        summary = _json(self.folder(run) / "eval" / "summary.json")
        return summary.get("step") == steps and not summary.get("failed")

    def rate(self, network, fold, stop):
        """Training steps per second of a network alone on this machine, measured once.

        Args:
            network: name.
            fold: of which it trains.
            stop: ``runtime.StopSignal``.

        Raises:
            RuntimeError: it could not be trained.
        """
        folder = self.output / "calibration" / network.replace(":", ".")
        done, here = folder / "done", workers.machine()["processor"]
        # Of another machine it says nothing here. (Older ones are empty, and of this machine.)
        if not done.is_file() or done.read_text() not in ("", here):
            shutil.rmtree(folder, ignore_errors=True)
            total = self._calibration_steps
            more = [
                f"--config.log.every={total // _INTERVALS}",
                f"--config.log.checkpoint_every={total}",
                "--config.optim.warmup_steps=0",
            ]
            self._train(network, folder, 0, fold, total, more, stop)
            done.write_text(here)
        return training_rate(folder)

    def execute(self, run, steps, stop):
        """Train and evaluate.

        Args:
            run: the ``Run``.
            steps: of its schedule.
            stop: ``runtime.StopSignal``.

        Raises:
            RuntimeError: with the last line that the failed process has written.
            commands.Stopped: a signal has come.
        """
        folder = self.folder(run)
        self._train(run.network, folder, run.seed, run.fold, steps, [], stop)
        words = ["eval.py", f"--workdir={folder}", f"--output={folder / 'eval'}"]
        if self._test_records:
            words += [f"--records={self._test_records}", "--split=all"]
        else:
            words.append("--split=val")
        if run.network not in OURS:
            words.append("--loader=masm_jax.benchmark.torch_train")
        _process(words, folder, stop)

    def _train(self, network, folder, seed, fold, steps, more, stop):
        changes = OURS.get(network, ())
        if network in OURS:
            words = ["train.py"]
        else:
            words = ["-m", "masm_jax.benchmark.torch_train", f"--network={network}"]
        words += [
            f"--config={self._config}",
            f"--workdir={folder}",
            *(f"--config.{text}" for text in (*self._given, *changes)),
            # The clock of a run is of training steps; what is compared is evaluated at the end.
            "--config.log.patch_every=0",
            "--config.log.volume_every=0",
            f"--config.data.records={self._records}",
            f"--config.data.split={fold.rule}",
            f"--config.seed={seed}",
            f"--config.total_steps={steps}",
            *more,
        ]
        _process(words, folder, stop)


def training_rate(folder):
    """Steps per second of a run: the median over its intervals.

    The first has the compilation in it, the second what is loaded once the first step is under way,
    two seconds; validation is off, and the few with a checkpoint in them hardly move a median.

    Args:
        folder: of the run.

    Returns:
        float; NaN where the run is shorter than two intervals.
    """
    rates = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        rates += [json.loads(line).get("time/steps_per_s")]
    rates = [rate for rate in rates if rate is not None]
    return statistics.median(rates[2:] or rates[1:] or [math.nan])


def _process(words, folder, stop):
    """``commands.python`` on the CPU: there the PyTorch networks are trained, so all are."""
    environment = {"JAX_PLATFORMS": "cpu"}
    # PyTorch's threads would spin while they wait, on the cores that augmentation needs.
    environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    # MODULE:FUNCTION may lie where the command was started, as it is found there by ``check``.
    places = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    commands.python(words, folder, stop, cwd=REPOSITORY, environment=environment)


def _json(path):
    return json.loads(path.read_text()) if path.is_file() else {}
