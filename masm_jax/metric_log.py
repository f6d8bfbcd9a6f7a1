"""Where the numbers of a run go: metrics.jsonl, TensorBoard, the terminal.

The loop hands over device arrays and goes on; they are fetched one interval later, when they are
long computed. NaN is found there, with the step and the name.
"""

import collections
import functools
import json
import logging
import math
import time

import jax

from masm_jax.files import as_path, is_remote, replacing

_log = logging.getLogger(__name__)

# Steps the host may be ahead of the device. The device never runs dry; with no bound, batches would
# pile up in its memory, and the rate that is logged would be the host's.
_MOST_AHEAD = 2


class NonFinite(ArithmeticError):
    """A loss or gradient became NaN or infinite; the message has the step and the name."""


class MetricLog:
    """Writes the metrics of a run.

    Args:
      workdir: folder of the run.
      total_steps: for the time left.
      start_step: steps already done; later lines of an interrupted run are taken back.
      every: steps between lines.
      writes: one process of a run writes; the others look for NaN and keep the pace.
    """

    def __init__(self, workdir, *, total_steps, start_step, every, writes=True):
        workdir, self._writes = as_path(workdir), writes
        self._path, self._folder = workdir / "metrics.jsonl", None
        self._file = None
        if writes:
            kept = self._take_back(start_step)
            self._file = _Whole(self._path, kept) if is_remote(workdir) else open(self._path, "a")
            if is_remote(workdir):
                _log.info("%s: TensorBoard files are not written there; metrics.jsonl is", workdir)
            else:
                self._folder = workdir / "tensorboard"
        self._total, self._every, self._first = total_steps, every, start_step
        self._interval, self._pending = [], None
        self._ahead = collections.deque()
        self._mark, self._begun = (time.perf_counter(), start_step), None
        self._waited, self._warned = 0.0, set()

    def waiting(self, seconds):
        """Add to the time the loop spent waiting for data."""
        self._waited += seconds

    def train(self, step, metrics):
        """Take the device arrays of ``step``; at an interval's end, write the one before."""
        self._begun = self._begun or (time.perf_counter(), step)
        self._interval.append((step, metrics))
        self._ahead.append(metrics)
        if len(self._ahead) > _MOST_AHEAD:
            jax.block_until_ready(self._ahead.popleft())
        if step % self._every == 0 or step == self._total:
            self._roll()

    def flush(self):
        """Fetch and write all there is: waits for the device. Before checkpoints and at the end."""
        self._write_pending()
        self._check(jax.device_get(self._interval))

    def write(self, step, values, pictures=None):
        """Write a line of host numbers, and to TensorBoard also pictures: name -> PNG file."""
        if not self._writes:
            return
        line = {"step": step} | {key: _finite(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._warn_of_keep_ratio(step, {k: v for k, v in line.items() if v is not None})
        if self._folder is None:
            return
        for key, value in line.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, step)
        for name, path in (pictures or {}).items():
            from matplotlib import image  # where there are pictures, Matplotlib is loaded

            picture = image.imread(path)[..., :3]
            self._board.add_image(f"overlay/{name}", picture, step, dataformats="HWC")

    def close(self):
        """Close the files; what was handed over is written before."""
        for file in (self._file, self.__dict__.get("_board")):
            if file is not None:
                file.close()

    @functools.cached_property
    def _board(self):
        # Imports torch where that is installed, 2 s: not before the first step is under way.
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=self._first + 1)

    def _roll(self):
        now, step = time.perf_counter(), self._interval[-1][0]
        elapsed, steps = now - self._mark[0], step - self._mark[1]
        # Since the first step was under way: without compilation, with its part of validation.
        since, done = now - self._begun[0], step - self._begun[1]
        times = {
            "time/steps_per_s": steps / elapsed,
            "time/wait_share": min(1.0, self._waited / elapsed),
            "time/left_s": (self._total - step) * (since / done if done else elapsed / steps),
        }
        self._mark, self._waited = (now, step), 0.0
        previous, self._interval = (self._interval, times), []
        self._write_pending()
        self._pending = previous
        if step >= self._total or step == self._first + self._every:
            self._write_pending()  # a first sign of life, and nothing left behind at the end

    def _write_pending(self):
        if self._pending is None:
            return
        (interval, times), self._pending = self._pending, None
        interval = jax.device_get(interval)
        self._check(interval)
        step, metrics = interval[-1]
        values = {key: float(value) for key, value in metrics.items()} | times
        if not self._writes:
            return
        _log.info(
            "step %d/%d  loss %.4f  dice loss %.4f  lr %.2e  %.2f steps/s  waiting %.0f%%  left %s",
            step,
            self._total,
            values["train/loss"],
            values["train/dice_loss"],
            values["train/learning_rate"],
            times["time/steps_per_s"],
            100 * times["time/wait_share"],
            _duration(times["time/left_s"]),
        )
        self.write(step, values)

    def _check(self, interval):
        for step, metrics in interval:
            bad = [key for key, value in metrics.items() if not math.isfinite(value)]
            # A keep ratio is NaN where the step had no pair of which both modalities are there; one
            # that is broken shows in the ratio loss.
            if bad := [key for key in bad if not key.startswith("train/keep/")]:
                self.write(step, {key: float(value) for key, value in metrics.items()})
                raise NonFinite(
                    f"step {step}: {', '.join(bad)} is not finite. Nothing was saved after the "
                    f"last checkpoint; lower optim.learning_rate or optim.clip_norm, lengthen "
                    f"optim.warmup_steps, or try model.dtype=float32, and start again"
                )

    def _warn_of_keep_ratio(self, step, values):
        left = []
        for key, value in values.items():
            if not key.startswith(("train/keep/", "val/keep/")) or key in self._warned:
                continue
            # A run starts by keeping nearly all (optim.keep_target): too much counts from half on.
            if value < 0.05 or (value > 0.95 and 2 * step >= self._total):
                self._warned.add(key)
                left.append(f"{key} = {value:.3f}")
        if left:
            _log.warning(
                "step %d: %s has left [0.05, 0.95]: the mask decides nothing there any more "
                "(loss.keep_target, loss.ratio_weight, model.keep_bias; val: without noise); said "
                "once",
                step,
                ", ".join(left),
            )

    def _take_back(self, start_step):
        if not self._path.is_file():
            return ""
        lines = self._path.read_text().splitlines()
        kept = "".join(line + "\n" for line in lines if _step(line) <= start_step)
        with replacing(self._path) as temporary:
            temporary.write_text(kept)
        return kept


class _Whole:
    """A text file where nothing can be appended, such as a bucket: written anew at each flush."""

    def __init__(self, path, text):
        self._path, self._text = path, text

    def write(self, text):
        self._text += text

    def flush(self):
        self._path.write_text(self._text)

    def close(self):
        self.flush()


def _step(line):
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off: the process or the disk gave out while it was written
        return math.inf


def _finite(value):
    value = float(value)
    return value if math.isfinite(value) else None


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
