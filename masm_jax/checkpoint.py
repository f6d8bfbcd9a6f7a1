"""Checkpoints: everything Orbax, in one place.

WORKDIR/checkpoints/STEP/ holds the state and a small JSON of metadata. The newest (one, or
``log.keep``) and the best are kept. The data position is the step itself (data/pipeline.py), so
that a run resumes on any number of devices.
"""

import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


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
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
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

        Args:
          step: steps done.
          state: the training state; safe to donate as soon as the call returns.
          dice: mean validation Dice, or None before the first validation.
          meta: JSON-able.
        """
        written = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"step": step})
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

    def restore(self, step, abstract_state):
        """Restore into the shapes, dtypes and shardings of ``abstract_state``.

        Returns:
          state, meta.
        """
        self._check_network(step, abstract_state["params"])
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.meta

    def _check_network(self, step, params):
        """Orbax says it in two hundred lines, and casts a wrong dtype silently."""
        saved = self._manager.item_metadata(step).state
        saved = _by_path(getattr(saved, "tree", saved)["params"])
        wanted = _by_path(params)
        for name in sorted(saved.keys() | wanted.keys()):
            has, needs = (
                "none"
                if (leaf := tree.get(name)) is None
                else f"{tuple(leaf.shape)} {leaf.dtype}"
                for tree in (saved, wanted)
            )
            if has != needs:
                raise ValueError(
                    f"{self.folder / str(step)}: parameter {name} is {has} there and {needs} in "
                    f"the network: it was trained with another config or version of the code; use "
                    f"those, or train anew in another --workdir"
                )

    def meta(self, step):
        """The metadata saved with a step."""
        return self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta

    def wait(self):
        """Block until what was started is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        """Wait and release."""
        self._manager.close()


def with_sharding(abstract_state, sharding):
    """Attach one sharding to every leaf of a tree of ShapeDtypeStructs."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_state
    )


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
