"""One case: a prepared image through the network and back into the grid of its scan."""

import jax
import numpy as np

from masm_jax import checkpoint, sharding
from masm_jax import config as config_lib
from masm_jax.data import preprocess
from masm_jax.inference import postprocess, sliding_window
from masm_jax.state import Network, abstract_state
from masm_jax.steps import segment_step


class Segmenter:
    """A network with weights, ready to segment prepared images of any size.

    Args:
      network: the network.
      params: its weights, on the host or on devices.
      mesh: tiles of a batch are spread over its "data" axis.
    """

    def __init__(self, network, params, mesh):
        self.network, self._mesh = network, mesh
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._step = jax.jit(segment_step(network))
        devices = mesh.devices.size
        wanted = network.config.infer.batch
        self._batch = -(-wanted // devices) * devices  # a whole number of tiles per device

    def update(self, params):
        """Take other weights (device arrays); nothing is compiled again."""
        self._params = params

    def probabilities(self, image, progress=None):
        """Region probabilities of one prepared image.

        Args:
          image: (M, D, H, W) float16 or float32, as data.preprocess makes it.
          progress: called with (tiles done, tiles in all).

        Returns:
          (R, D, H, W) float32.
        """
        config = self.network.config
        return sliding_window.predict(
            lambda tiles: self._step(
                self._params, jax.device_put(tiles, sharding.over_batch(self._mesh))
            ),
            np.asarray(image),
            patch=config.patch,
            num_regions=len(self.network.regions),
            overlap=config.infer.overlap,
            batch=self._batch,
            flips=tuple(config.infer.flips),
            progress=progress,
        )


def load_run(workdir, *, which="latest", mesh=None, given=()):
    """The trained network of a run, with its averaged weights.

    Args:
      workdir: folder written by train.py.
      which: "latest" or "best" (by pseudo Dice) checkpoint.
      mesh: of the devices to run on; all by default.
      given: "infer.KEY=VALUE" and "evaluation.KEY=VALUE", over the config's (config.override).

    Returns:
      segmenter, and the metadata of the checkpoint (step, modalities, regions, ...).

    Raises:
      ValueError: there is no run or no checkpoint in ``workdir``.
    """
    config = config_lib.load(workdir, given)
    mesh = mesh or sharding.make_mesh(jax.local_devices())
    checkpoints = checkpoint.Checkpoints(workdir)
    step = checkpoints.best() if which == "best" else checkpoints.latest()
    if step is None:
        raise ValueError(
            f"{checkpoints.folder} holds no complete checkpoint; has train.py saved one?"
        )
    meta = checkpoints.meta(step)
    network = Network(config, modalities=meta["modalities"], regions=meta["regions"])
    target = checkpoint.with_sharding(abstract_state(network), sharding.replicated(mesh))
    state, meta = checkpoints.restore(step, target)
    checkpoints.close()
    return Segmenter(network, state["ema"], mesh), meta


def decoding(config, spacing):
    """The rules of a config as keywords of ``postprocess.decode``, on a grid of ``spacing`` mm."""
    infer = config.infer
    return {
        "threshold": infer.threshold[0] if len(infer.threshold) == 1 else tuple(infer.threshold),
        "largest": infer.largest_component,
        "fill": infer.fill_holes,
        "minimum": int(np.ceil(1000 * infer.minimum_ml / np.prod(spacing))),
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
