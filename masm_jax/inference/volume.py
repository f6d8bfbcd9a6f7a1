"""One case: a prepared image through the network and back into the grid of its scan.

The network is a function here, of a run (``load_run``) or of an export (inference/exported.py).
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from masm_jax import sharding
from masm_jax.data import preprocess
from masm_jax.data import records as records_lib
from masm_jax.files import as_path, told
from masm_jax.inference import postprocess, sliding_window

_log = logging.getLogger("masm_jax.inference")
# What ends one case and not the others, whose scans may be smaller.
FAILURES = (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What segmenting has to know beside the network: its input, its output, ``config.infer``.

    Attributes:
      modalities: names, in the order of the input.
      regions: {name: internal label values}, outer to inner.
      patch: edges of a tile in voxels.
      may_lack: trained with ``data.modality_dropout``, for cases that lack modalities.
      others: the keys of ``config.infer``, explained in configs/masm_brats.py.
    """

    modalities: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    patch: tuple[int, int, int]
    overlap: float
    batch: int
    flips: tuple[int, ...]
    threshold: tuple[float, ...]
    largest_component: bool
    fill_holes: bool
    minimum_ml: float
    present: tuple[str, ...] = ()
    may_lack: bool = False

    @classmethod
    def of(cls, network):
        """Those of a network and its config."""
        # These say which weights, and how the network computes: no matter of segmenting.
        which = ("average", "runs", "token_share", "dtype")
        infer = {key: value for key, value in network.config.infer.items() if key not in which}
        return cls(
            modalities=network.modalities,
            regions=network.regions,
            patch=network.patch,
            may_lack=network.config.data.modality_dropout > 0,
            **infer,
        )


class Segmenter:
    """A network with weights, ready to segment prepared images of any size.

    Args:
      step: the network: (params, (b, M, p, p, p) float32) -> (b, p, p, p, R) logits; is compiled.
      params: its weights, on the host or on devices.
      mesh: tiles of a batch are spread over its "data" axis, their depth over "spatial".
      settings: the ``Settings``; an attribute that may be exchanged.
      network: that of the step; None where only a program is there.
    """

    def __init__(self, step, params, mesh, settings, network=None):
        self.settings, self.network, self._mesh = settings, network, mesh
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._step = jax.jit(step)

    @property
    def params(self):
        """The weights, on every device of the mesh."""
        return self._params

    def update(self, params):
        """Take other weights; nothing is compiled again."""
        self._params = jax.device_put(params, sharding.replicated(self._mesh))

    def another(self, step, settings):
        """A Segmenter of another step with the same weights on the same devices."""
        return Segmenter(step, self._params, self._mesh, settings, self.network)

    def probabilities(self, image, progress=None, present=None):
        """Region probabilities of one prepared image.

        Args:
          image: (M, D, H, W) float16 or float32, as data.preprocess makes it.
          progress: called with (tiles done, tiles in all).
          present: names of the modalities that are there, if not all; of these ``infer.present``
            are used.

        Returns:
          (R, D, H, W) float32.

        Raises:
          ValueError: no modality is left, or ``infer.present`` names one that the run has not.
        """
        settings, devices = self.settings, self._mesh.shape["data"]
        used = modalities_used(settings, present)
        there = ()
        if len(used) < len(settings.modalities):
            there = np.array([name in used for name in settings.modalities], np.float32)
            there = (jax.device_put(there, sharding.replicated(self._mesh)),)
        return sliding_window.predict(
            lambda tiles: self._step(
                self.params, jax.device_put(tiles, sharding.over_batch(self._mesh)), *there
            ),
            np.asarray(image),
            patch=settings.patch,
            num_regions=len(settings.regions),
            overlap=settings.overlap,
            batch=-(-settings.batch // devices) * devices,  # a whole number for each device
            flips=tuple(settings.flips),
            progress=progress,
        )


def modalities_used(settings, present=None):
    """Those of ``present`` (None: all) that ``infer.present`` lets through, in order.

    Raises:
      ValueError: none is left, or ``infer.present`` names one that the run has not.
    """
    unknown = [name for name in settings.present if name not in settings.modalities]
    if unknown:
        raise ValueError(
            f"infer.present names {', '.join(unknown)}: this run has "
            f"{', '.join(settings.modalities)}; name some of them, or none for all"
        )
    there = settings.modalities if present is None else present
    used = [name for name in settings.modalities if name in there]
    used = [name for name in used if name in settings.present or not settings.present]
    if not used:
        raise ValueError(
            f"no modality to work with: the case has {', '.join(there)}, infer.present names "
            f"{', '.join(settings.present)}; name one that the case has"
        )
    return used


class Ensemble:
    """Several networks, such as those of the folds: their probabilities are averaged.

    Args:
      segmenters: alike in modalities and regions; the settings of the first decide, but for
        ``may_lack``: a case may lack modalities where all were trained for it.
    """

    def __init__(self, segmenters):
        self.segmenters = segmenters
        may_lack = all(segmenter.settings.may_lack for segmenter in segmenters)
        self.settings = dataclasses.replace(segmenters[0].settings, may_lack=may_lack)

    def probabilities(self, image, progress=None, present=None):
        """As ``Segmenter.probabilities``."""
        total = None
        for number, segmenter in enumerate(self.segmenters):

            def of_all(done, tiles, number=number):
                if progress is not None:
                    progress(number * tiles + done, len(self.segmenters) * tiles)

            own = segmenter.probabilities(image, of_all, present)
            total = own if total is None else total + own
        return total / len(self.segmenters)


def load_run(workdir, *, which="latest", mesh=None, given=()):
    """The trained network of a run, with its averaged weights; or with those of ``infer.runs``.

    Args:
      workdir: folder written by train.py.
      which: "latest" or "best" (by pseudo Dice) checkpoint.
      mesh: of the devices to run on; all by default.
      given: "infer.KEY=VALUE" and "evaluation.KEY=VALUE", over the config's (config.override).

    Returns:
      segmenter, and the metadata of the checkpoint (step, modalities, regions, ...).

    Raises:
      ValueError: there is no run or no checkpoint in ``workdir``, or the runs do not fit together.
    """
    from masm_jax.steps import segment_step

    mesh = mesh or sharding.make_mesh(jax.local_devices())
    network, params, meta = restore_run(workdir, which=which, mesh=mesh, given=given)
    network, trained = network.segmenting_on(mesh.devices.flat[0].platform), network.dtype.__name__
    if (here := network.dtype.__name__) != trained:
        _log.info(f"{workdir}: computing in {here} here, trained in {trained} (infer.dtype)")
    segmenter = Segmenter(segment_step(network), params, mesh, Settings.of(network), network)
    others = []
    for run in network.config.infer.runs:
        alone = [*given, "infer.runs=()"]
        other, its_meta = load_run(run, which=which, mesh=mesh, given=alone)
        for key in ("modalities", "regions", "spacing"):
            if its_meta[key] != meta[key]:
                raise ValueError(
                    f"infer.runs: {key} of {run} is {its_meta[key]}, of {workdir} {meta[key]}; "
                    f"expected networks of the same task and voxel size"
                )
        others.append(other)
    return (Ensemble([segmenter, *others]) if others else segmenter), meta


def restore_run(workdir, *, which, mesh, given=()):
    """As ``load_run``, but returns network, averaged weights (on the mesh) and metadata."""
    # Imported here, because an export is run without network, config and checkpoints.
    from masm_jax import checkpoint, run_config
    from masm_jax import config as config_lib
    from masm_jax.processes import Solo
    from masm_jax.state import Network, abstract_state

    config = run_config.load(workdir, given)
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.latest() is None:
        raise ValueError(
            f"{checkpoints.folder} holds no complete checkpoint; has train.py saved one?"
        )
    if which == "best" and config.infer.average > 1:
        raise ValueError(
            f"infer.average = {config.infer.average} averages the newest checkpoints; expected 1 "
            f"with --checkpoint=best"
        )
    task = checkpoints.task()
    config_lib.check_thresholds(config, task["regions"])
    if config.infer.present and not config.data.modality_dropout:
        said = "infer.present leaves modalities out, and %s has never lost one in training"
        _log.warning(f"{said} (data.modality_dropout = 0): it may find anything", workdir)
    if tuned := run_config.tuned_on(workdir):
        said = "%s: rules of infer.json, chosen by masm_jax.tune on %d cases, not the config's"
        _log.info(said, workdir, len(tuned))
    regions = task["regions"]
    network = Network(config, modalities=task["modalities"], regions=regions, mesh=mesh)
    target = checkpoint.with_sharding(abstract_state(network), sharding.replicated(mesh))
    if config.infer.average == 1:
        _, state, meta = checkpoints.restore_newest(target, Solo(), best=which == "best")
        weights = [state["ema"]]
    else:
        steps = checkpoints.newest(config.infer.average)
        restored = [checkpoints.restore(step, target) for step in steps]
        weights, meta = [state["ema"] for state, _ in restored], restored[-1][1]
    checkpoints.close()
    return network, jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *weights), meta


def check_task(meta, *, modalities, regions, spacing, where):
    """See that data are of the task that a run was trained on.

    Args:
      meta: of the run's checkpoint.
      modalities, regions, spacing: of the data.
      where: what the data are, for the message.

    Raises:
      ValueError: they differ.
    """

    def comparable(modalities, regions, spacing):
        # Of regions the order counts too: outer to inner.
        regions = [(name, sorted(values)) for name, values in regions.items()]
        return {"modalities": list(modalities), "regions": regions, "spacing": spacing}

    def words(value):
        if isinstance(value, list):
            named = (one if isinstance(one, str) else f"{one[0]} = {one[1]}" for one in value)
            return ", ".join(named)
        return "that of the scans" if value is None else value

    found = comparable(modalities, regions, spacing)
    expected = comparable(meta["modalities"], meta["regions"], meta["spacing"])
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(
                f"{where}: {key} {words(found[key])}; the run was trained on {words(value)}; "
                f"expected data of the same task, prepared alike"
            )


def trained_on(workdir, config, records, cases):
    """Which of the cases a run, or one averaged with it, was trained on.

    Args:
      workdir: of the run.
      config: of the run.
      records: that hold the cases.
      cases: ids.
    """
    trained = set()
    for run in (workdir, *map(as_path, config.infer.runs)):
        trained |= set(records_lib.read_split(run)["train"])
    seen, own = sorted(trained & set(cases)), pathlib.Path(config.data.records)
    if own.is_dir() and own.resolve() != records.root.resolve():
        # Other records may hold other scans of the same name, or the same scans in another place.
        own = records_lib.Records(own)
        hashes = [[of.meta(case)["hashes"] for of in (own, records)] for case in seen]
        seen = [case for case, (one, other) in zip(seen, hashes) if one == other]
    return seen


def failure(error):
    """What one of ``FAILURES`` says to the user, in a line."""
    said = str(error).partition("\n")[0]
    if isinstance(error, MemoryError):
        return f"out of memory ({said or 'of the host'}); free some, or use a machine with more"
    if isinstance(error, jax.errors.JaxRuntimeError):
        fix = "; a smaller infer.batch takes less" if "RESOURCE_EXHAUSTED" in said else ""
        return f"on the device: {said}{fix}"
    return told(error)


def decoding(settings, spacing):
    """The rules of ``Settings`` as keywords of ``postprocess.decode``, on a grid of spacing mm."""
    threshold = tuple(settings.threshold)
    return {
        "threshold": threshold[0] if len(threshold) == 1 else threshold,
        "largest": settings.largest_component,
        "fill": settings.fill_holes,
        "minimum": int(np.ceil(1000 * settings.minimum_ml / np.prod(spacing))),
    }


def in_scan(probabilities, meta, **rules):
    """Probabilities in the grid of a record -> labels in the grid of its scan.

    Probabilities are resampled, then thresholded; the regions are decoded nested (ET in TC in WT).

    Args:
      probabilities: (R, d, h, w) float32.
      meta: of the record (data/preprocess.py).
      **rules: of ``postprocess.decode``, as ``decoding`` gives them.

    Returns:
      (I, J, K) uint8 internal labels, and (I, J, K) uint8 labels in the convention of the scan.
    """
    restored = preprocess.restore(probabilities, meta)
    regions = {name: tuple(values) for name, values in meta["regions"].items()}
    internal = postprocess.decode(restored, regions=regions, **rules)
    paint = meta["paint"]
    return internal, postprocess.decode(restored, paint, regions=regions, **rules)
