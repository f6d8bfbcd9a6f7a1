"""Checkpoints: everything Orbax, in one place.

WORKDIR/checkpoints/STEP/ holds the state and a small JSON of metadata. The newest (one, or
``log.keep``) and the best are kept. The data position is the step itself (data/pipeline.py), so
that a run resumes on any number of devices.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from masm_jax.files import as_path, is_remote

_log = logging.getLogger(__name__)


class OtherNetwork(ValueError):
    """A checkpoint holds the parameters of another network."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: folder of the run.
      keep: how many of the newest are kept.
      best: name of the metric in the metadata by which the best is kept; larger is better.
    """

    def __init__(self, workdir, keep=1, best="val/dice"):
        policies = checkpoint_managers
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(n=1, get_metric_fn=lambda metrics: metrics[best]),
            ]
        )
        self.folder = as_path(workdir) / "checkpoints"
        self._best = best
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Without best_fn Orbax writes no metrics to disk; what is kept, the policy says.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, best_fn=lambda metrics: metrics[best]
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step, state, *, dice, meta):
        """Start writing a checkpoint; it appears under its name once complete.

        Raises:
          OSError: it, or the one before it, could not be written.

        Args:
          step: steps done.
          state: the training state; safe to donate as soon as the call returns.
          dice: mean validation Dice; None where this step was not validated.
          meta: JSON-able.
        """
        if not is_remote(self.folder) and not self.folder.is_dir():
            # Orbax would make it anew, on the disk below a mount that is gone.
            raise FileNotFoundError(errno.ENOENT, "the folder of the run is gone", str(self.folder))
        with self._writing():
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta | {"step": step, "checksums": checksums(state)}),
                ),
                metrics={self._best: -1.0 if dice is None else dice},
            )
        if not written:
            raise RuntimeError(
                f"{self.folder}/{step} was not written: a checkpoint at or past step {step} "
                f"exists; continue that run, or choose another --workdir"
            )

    def latest(self):
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def newest(self, count):
        """Steps of the ``count`` newest complete checkpoints.

        Raises:
          ValueError: there are fewer.
        """
        steps = sorted(self._manager.all_steps())[-count:]
        if len(steps) < count:
            raise ValueError(
                f"infer.average = {count}: {self.folder} has {len(steps)} checkpoints; average "
                f"fewer, or train with log.keep={count}"
            )
        return steps

    def best(self):
        """Step of the best one by validation Dice; the newest of equals; None without any."""
        dice = {step: self._manager.metrics(step)[self._best] for step in self._manager.all_steps()}
        return max(dice, key=lambda step: (dice[step], step)) if dice else None

    def restore_newest(self, abstract_state, roll, *, best=False, put_aside=False):
        """The newest (or best) checkpoint that is whole; a broken one is named.

        Args:
          abstract_state: shapes, dtypes and shardings, which need not be those of the saving run.
          roll: of the processes (masm_jax.processes): a checkpoint counts if all can read it.
          best: begin with the best by validation Dice.
          put_aside: move broken ones out of the way, and remove what a killed run has left half
            written; for whoever goes on to save.

        Returns:
          step, state, meta; or None, None, None where there is no checkpoint.

        Raises:
          ValueError: there are some, and none is whole; or they are of another network.
        """
        if put_aside and jax.process_index() == 0 and not is_remote(self.folder):
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best and steps:
            first = self.best()
            steps = [first, *(step for step in steps if step != first)]
        problems = []
        for step in steps:
            problem, state, meta = "", None, None
            try:
                state, meta = self.restore(step, abstract_state)
            except OtherNetwork:
                raise
            except Exception as error:  # of many kinds: files gone, cut, or with other bits
                problem = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            told = [text for text in roll.gather(f"checkpoint {step}", problem) if text]
            if not told:
                for broken, _ in problems if put_aside else ():
                    self._put_aside(broken)
                return step, state, meta
            problems.append((step, told[0]))
            _log.error("checkpoint %s is broken (%s)", self.folder / str(step), told[0])
        if problems:
            raise ValueError(
                f"{self.folder}: no checkpoint is whole: "
                + "; ".join(f"{step}: {why}" for step, why in problems)
                + "; restore the folder from a copy, or start anew in another --workdir"
            )
        return None, None, None

    def restore(self, step, abstract_state):
        """Restore into the shapes, dtypes and shardings of ``abstract_state``.

        Returns:
          state, meta.

        Raises:
          OtherNetwork: it is the state of another.
          ValueError: what is read is not what was saved; other errors where files are damaged.
        """
        self._check_network(step, abstract_state["params"])
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
            ),
        )
        state, meta = restored.state, restored.meta
        found = checksums(state)
        wrong = [name for name, value in meta["checksums"].items() if found.get(name) != value]
        if wrong:
            raise ValueError(
                f"{self.folder / str(step)}: {', '.join(wrong[:3])} are not as they were saved "
                f"({len(wrong)} of {len(found)} arrays)"
            )
        return state, meta

    def _put_aside(self, step):
        """A broken one would be the newest, and no other could be saved before its step."""
        aside = epath.Path(self.folder.with_name("checkpoints_broken") / str(step))
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            if aside.exists():
                aside.rmtree()
            epath.Path(self.folder / str(step)).rename(aside)
            _log.error("moved to %s; going on from the one before", aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {step}")
        self._manager.reload()

    def _check_network(self, step, params):
        """Orbax says it in two hundred lines, and casts a wrong dtype silently."""
        saved = self._manager.item_metadata(step).state
        saved = _by_path(getattr(saved, "tree", saved)["params"])
        wanted = _by_path(params)
        for name in sorted(saved.keys() | wanted.keys()):
            has, needs = (
                "none" if (leaf := tree.get(name)) is None else f"{tuple(leaf.shape)} {leaf.dtype}"
                for tree in (saved, wanted)
            )
            if has != needs:
                raise OtherNetwork(
                    f"{self.folder / str(step)}: parameter {name} is {has} there and {needs} in "
                    f"the network: it was trained with another config or version of the code; use "
                    f"those, or train anew in another --workdir"
                )

    def task(self):
        """The metadata of the newest checkpoint whose metadata can be read: modalities, regions."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
                return self._manager.restore(step, args=meta).meta
            except Exception as error:  # of many kinds: files gone, cut, or with other bits
                _log.error("%s: metadata cannot be read (%s)", self.folder / str(step), error)
        raise ValueError(
            f"{self.folder}: no checkpoint is whole; restore the folder from a copy, or train anew"
        )

    def wait(self):
        """Block until what was started is on disk.

        Raises:
          OSError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self):
        """What goes wrong in Orbax's threads, in hundreds of lines, as one error of the system."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code=\\*'(\d+)", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None)
            why = os.strerror(number) if number else f"{type(error).__name__}: {error}"[:300]
            kept = max(self._manager.all_steps(), default=None)
            kept = "there is no older one" if kept is None else f"the newest is of step {kept}"
            text = f"a checkpoint could not be written ({why}), {kept}"
            raise (
                OSError(number, text, str(self.folder))
                if number
                else OSError(f"{self.folder}: {text}")
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # With an error, other processes do not come here, and what waits for them would for ever.
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self):
        """Wait and release."""
        with self._writing():
            self._manager.close()


def with_sharding(abstract_state, sharding):
    """Attach one sharding to every leaf of a tree of ShapeDtypeStructs."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_state
    )


def checksums(state):
    """{name: CRC-32} of every array: the same on any devices, another after any flipped bit.

    The files are compressed and have checksums of their own only in parts; this covers the whole
    way from the memory of one run to that of the next. Every device holds every array.
    """
    return {
        name: zlib.crc32(np.ascontiguousarray(jax.device_get(leaf.addressable_data(0))))
        for name, leaf in _by_path(state).items()
    }


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
