"""Train a PyTorch network as train.py trains MASM: same crops, loss, update, schedule, files.

    python -m masm_jax.benchmark.torch_train --network=segresnet --config=configs/masm_laptop.py \
        --workdir=DIR [--config.key=value ...]
    python eval.py --loader=masm_jax.benchmark.torch_train --workdir=DIR --split=val --output=OUT

On the CPU, in float32, on all cores. ``--network`` is explained in torch_networks.py; what a config
says of the model does not count. Started again it goes on. Exit codes as those of train.py.
"""

import json
import logging
import sys
import time
import types

import jax
import numpy as np
import torch
from absl import app, flags
from ml_collections import config_flags
from torch.utils.flop_counter import FlopCounterMode

from masm_jax import config as config_lib
from masm_jax import run_config, runtime
from masm_jax.benchmark import torch_networks, torch_steps
from masm_jax.data import pipeline
from masm_jax.data import records as records_lib
from masm_jax.files import as_path, replacing, told
from masm_jax.inference import sliding_window
from masm_jax.inference.volume import Settings, modalities_used
from masm_jax.metric_log import MetricLog, NonFinite
from masm_jax.models.masm import edges

FRAMEWORK = f"PyTorch {torch.__version__}"
_ABOUT, _CHECKPOINT = "network.json", "checkpoint.pt"
log = logging.getLogger("masm_jax.benchmark.torch_train")


def train(name, config, workdir):
    """Run or continue the training in ``workdir``; returns the exit code.

    Args:
      name: of the network (torch_networks.py).
      config: of the run.
      workdir: its folder.

    Raises:
      ValueError: anything that the user can mend.
    """
    # ---------------------------------------------------------------- config, data, network
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"JAX computes on {jax.default_backend()}, PyTorch here on the CPU: expected both on "
            f"one device; set JAX_PLATFORMS=cpu"
        )
    workdir = as_path(workdir)
    config_lib.validate(config)
    records = records_lib.Records(config.data.records)
    config_lib.validate_records(config, records)
    split = records_lib.split(records.cases, config.data.split, config.data.split_seed)
    _refuse_another(workdir, config, split, name)
    torch.manual_seed(config.seed)
    network = _network(name, records.modalities, records.regions, config)
    torch_steps.start_rare(network, len(records.regions))
    trainer = torch_steps.Trainer(network, config, list(records.regions.values()))
    about = {
        "network": name,
        "framework": FRAMEWORK,
        "modalities": records.modalities,
        "regions": records.regions,
        "spacing": records.spacing,
        **cost(network, (1, len(records.modalities), *edges(config.patch))),
    }
    log.info(
        "%s: %.2f M parameters, %d threads",
        name,
        about["parameters"] / 1e6,
        torch.get_num_threads(),
    )

    # ---------------------------------------------------------------- state: new or restored
    start = 0
    if (workdir / _CHECKPOINT).is_file():
        saved = torch.load(workdir / _CHECKPOINT, weights_only=True)
        start, trainer.ema = saved["step"], saved["ema"]
        network.load_state_dict(saved["network"])
        trainer.optimiser.load_state_dict(saved["optimiser"])
        log.info("continuing at step %d", start)
    run_config.save(config, workdir)
    for file, content in (("split.json", split), (_ABOUT, about)):
        with replacing(workdir / file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    stream = pipeline.batches(
        records,
        split["train"],
        seed=config.seed,
        batch_size=config.batch_size,
        patch=config.patch,
        foreground=config.data.foreground,
        start_step=start,
        workers=config.data.workers,
    )
    crops = torch_steps.crops(config)
    metrics = MetricLog(
        workdir, total_steps=config.total_steps, start_step=start, every=config.log.every
    )

    # ---------------------------------------------------------------- the loop
    with runtime.StopSignal() as stop:
        for step in range(start + 1, config.total_steps + 1):
            asked = time.perf_counter()
            batch = next(stream)
            metrics.waiting(time.perf_counter() - asked)
            metrics.train(step, trainer.step(step - 1, *crops(batch, step - 1)))
            stopped = stop.name or step == config.stop_at_step
            if stopped or step % config.log.checkpoint_every == 0 or step == config.total_steps:
                metrics.flush()  # raises on NaN: a broken state is never saved
                _save(workdir / _CHECKPOINT, step, trainer)
            if stopped:
                break
        else:
            stopped = False
    metrics.flush()
    metrics.close()
    if stopped:
        log.info("saved step %d in %s; the same command goes on", step, workdir)
        return runtime.EXIT_STOPPED
    log.info("done: %d steps in %s", config.total_steps, workdir)
    return 0


def load_run(workdir, *, which="latest", given=()):
    """The trained network of a run, with its averaged weights: for ``eval.py --loader``.

    Args:
      workdir: folder that ``train`` has written.
      which: "latest"; only the newest weights are kept.
      given: "infer.KEY=VALUE" and "evaluation.KEY=VALUE", over the config's.

    Returns:
      a ``TorchSegmenter``, and its metadata (step, modalities, regions, spacing).

    Raises:
      ValueError: no such run, or it cannot do what is asked.
    """
    workdir = as_path(workdir)
    config = run_config.load(workdir, given)
    if which != "latest" or config.infer.average != 1 or tuple(config.infer.runs):
        raise ValueError(
            f"{workdir} is a run in PyTorch: expected --checkpoint=latest, infer.average=1 and no "
            f"infer.runs"
        )
    if not (workdir / _CHECKPOINT).is_file():
        raise ValueError(f"{workdir / _CHECKPOINT} does not exist; has torch_train saved one?")
    meta = json.loads((workdir / _ABOUT).read_text())
    config_lib.check_thresholds(config, meta["regions"])
    network = _network(meta["network"], meta["modalities"], meta["regions"], config)
    saved = torch.load(workdir / _CHECKPOINT, weights_only=True)
    network.load_state_dict(saved["ema"])
    task = types.SimpleNamespace(
        config=config,
        modalities=tuple(meta["modalities"]),
        regions=meta["regions"],
        patch=edges(config.patch),
    )
    return TorchSegmenter(network, Settings.of(task)), meta | {"step": saved["step"]}


class TorchSegmenter:
    """What ``inference.volume.Segmenter`` is, of a PyTorch network.

    Args:
      network: (b, M, p, p, p) float32 -> logits (b, R, p, p, p).
      settings: the ``Settings``.
    """

    network = None  # no JAX network that could be asked for more

    def __init__(self, network, settings):
        self._module, self.settings = network.eval(), settings

    def probabilities(self, image, progress=None, present=None):
        """As ``Segmenter.probabilities``: the same tiles, weights, flips; what is missing is 0."""
        settings = self.settings
        used = modalities_used(settings, present)
        missing = [name not in used for name in settings.modalities]
        if any(missing):
            image = np.array(image)
            image[missing] = 0
        return sliding_window.predict(
            self._logits,
            np.asarray(image),
            patch=settings.patch,
            num_regions=len(settings.regions),
            overlap=settings.overlap,
            batch=settings.batch,
            flips=tuple(settings.flips),
            progress=progress,
        )

    @torch.no_grad()
    def _logits(self, tiles):
        logits = self._module(torch.from_numpy(np.array(tiles)))
        return jax.device_put(logits.movedim(1, -1).contiguous().numpy())


def cost(network, shape):
    """Size of a network, and multiplications of a forward pass.

    Args:
      network: ``torch.nn.Module``.
      shape: of its input.

    Returns:
      {"parameters": scalars, "gmac": 1e9 multiply-accumulates of convolutions and products}.
    """
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "gmac": counter.get_total_flops() / 2e9}


def _network(name, modalities, regions, config):
    return torch_networks.build(
        name, modalities=len(modalities), regions=len(regions), patch=edges(config.patch)
    )


def _save(path, step, trainer):
    """Write a checkpoint, whole or not at all."""
    state = {
        "step": step,
        "network": trainer.network.state_dict(),
        "ema": trainer.ema,
        "optimiser": trainer.optimiser.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _refuse_another(workdir, config, split, name):
    """Where the folder holds a checkpoint, see that it is of this network, config and cases."""
    if not (workdir / _CHECKPOINT).is_file():
        return
    old = run_config.to_dict(run_config.load(workdir))
    changes = run_config.differences(old, run_config.to_dict(config))
    if json.loads((workdir / "split.json").read_text()) != split:
        changes.append("data.split: gives other cases than split.json has")
    if json.loads((workdir / _ABOUT).read_text())["network"] != name:
        changes.append(f"--network: another than {name}")
    if changes:
        raise ValueError(
            f"{workdir} is another run:\n  " + "\n  ".join(changes) + "\nchoose another --workdir"
        )


def main(_):
    """Flags in, exit code out; an error is one readable line."""
    runtime.start()
    given = flags.FLAGS
    try:
        sys.exit(train(given.network, given.config, given.workdir))
    except (ValueError, NonFinite, OSError) as error:
        print(f"torch_train: {told(error)}", file=sys.stderr)
        sys.exit(runtime.EXIT_ERROR)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("network", None, "Name, or MODULE:FUNCTION.")
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.mark_flags_as_required(["config", "network", "workdir"])
    app.run(main, flags_parser=runtime.parse_flags)
