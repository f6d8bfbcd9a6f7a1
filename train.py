"""Train MASM.

    python train.py --config=configs/masm_brats.py --workdir=runs/masm [--config.key=value ...]

Started again with the same command, an interrupted run goes on where it was, with the same numbers
to the last bit on the same devices. Exit codes: 0 done, 1 an error (one line says which), 2 usage,
75 stopped by a signal or config.stop_at_step after saving.
"""

import json
import logging
import pathlib
import sys
import time
from functools import partial

import jax
from absl import app, flags
from ml_collections import config_flags

from masm_jax import checkpoint, runtime, sharding
from masm_jax import config as config_lib
from masm_jax.data import pipeline
from masm_jax.data import records as records_lib
from masm_jax.evaluation import pictures, validation
from masm_jax.inference.volume import Segmenter, Settings
from masm_jax.metric_log import MetricLog, NonFinite
from masm_jax.state import Network, abstract_state, init_state, num_parameters
from masm_jax.steps import eval_step, segment_step, train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Force this many CPU devices (for trials).")
_CONFIG_CHANGE = flags.DEFINE_enum(
    "config_change",
    "refuse",
    ["refuse", "accept"],
    "What to do if the config of a run has changed.",
)
log = logging.getLogger("masm_jax.train")


def train(config, workdir):
    """Run or continue the training in ``workdir``; returns the exit code."""
    workdir = pathlib.Path(workdir).absolute()

    # ---------------------------------------------------------------- config, data, network
    config_lib.validate(config)
    records = records_lib.Records(config.data.records)
    config_lib.validate_records(config, records)
    split = records_lib.split(records.cases, config.data.split, config.data.split_seed)
    mesh = sharding.make_mesh(data=config.mesh.data, spatial=config.mesh.spatial)
    network = Network(config, modalities=records.modalities, regions=records.regions, mesh=mesh)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.log.keep)
    start, dice = checkpoints.latest() or 0, None
    _claim(workdir, config, split, started=start > 0)
    log.info(
        "%d cases to train on, %d to validate; %s, regions %s",
        len(split["train"]),
        len(split["val"]),
        "+".join(network.modalities),
        ", ".join(network.regions),
    )

    # ---------------------------------------------------------------- mesh, state: new or restored
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    everywhere = sharding.replicated(mesh)
    abstract = abstract_state(network)
    if start:
        target = checkpoint.with_sharding(abstract, everywhere)
        state, meta = checkpoints.restore(start, target)
        dice = meta["dice"]
        log.info("continuing at step %d", start)
    else:
        params = jax.device_put(network.init(config.seed), everywhere)
        state = jax.jit(partial(init_state, network), out_shardings=everywhere)(params)
    log.info(
        "%.2f M parameters in %s; %d %s device(s)",
        num_parameters(abstract["params"]) / 1e6,
        config.model.dtype,
        mesh.devices.size,
        jax.default_backend(),
    )

    # ---------------------------------------------------------------- compiled steps, streams
    step_fn = jax.jit(train_step(network), donate_argnums=0, out_shardings=(everywhere, everywhere))
    key = jax.jit(partial(jax.random.key, config.seed), out_shardings=everywhere)()
    eval_fn = jax.jit(eval_step(network), out_shardings=everywhere)
    stream = iter(
        pipeline.batches(
            records,
            split["train"],
            seed=config.seed,
            batch_size=config.batch_size,
            patch=config.patch,
            foreground=config.data.foreground,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
        )
    )
    crops = segmenter = None
    metrics = MetricLog(
        workdir, total_steps=config.total_steps, start_step=start, every=config.log.every
    )

    def save(step):
        metrics.flush()  # raises on NaN: a broken state is never saved
        meta = {
            "dice": dice,
            "modalities": network.modalities,
            "regions": network.regions,
            "spacing": records.spacing,
        }
        checkpoints.save(step, state, dice=dice, meta=meta)

    # ---------------------------------------------------------------- the loop
    # Order matters: log, validate, save, so that a checkpoint knows the step's validation.
    log.info("compiling the training step; the first one takes longer")
    with runtime.StopSignal() as stop, jax.transfer_guard("disallow"):
        for step in range(start + 1, config.total_steps + 1):
            asked = time.perf_counter()
            batch = next(stream)
            metrics.waiting(time.perf_counter() - asked)
            batch = {name: batch[name] for name in ("image", "label")}
            state, values = step_fn(state, sharding.global_batch(mesh, batch), key)
            metrics.train(step, values)

            if split["val"] and _due(step, config.log.patch_every, config.total_steps):
                crops = crops or validation.validation_crops(config, records, split["val"])
                scores = validation.pseudo_dice(eval_fn, state["ema"], crops, mesh, network.regions)
                metrics.write(step, scores)
                dice = scores["val/dice"]
                log.info("step %d  validation crops: %s", step, _scores(scores))
            if split["val"] and _due(step, config.log.volume_every, config.total_steps):
                segmenter = segmenter or Segmenter(
                    segment_step(network), state["ema"], mesh, Settings.of(network)
                )
                segmenter.update(state["ema"])
                cases = split["val"][: config.log.volumes]
                drawn = {c: workdir / "overlays" / f"{c}.png" for c in cases[: config.log.overlays]}
                scores = validation.volume_dice(segmenter, records, cases, drawn)
                metrics.write(step, scores, pictures=drawn)
                log.info("step %d  %d validation cases: %s", step, len(cases), _scores(scores))

            stopped = bool(stop) or step == config.stop_at_step
            if stopped or _due(step, config.log.checkpoint_every, config.total_steps):
                save(step)
            if stopped:
                break
        else:
            stopped = False

    # ---------------------------------------------------------------- the end
    checkpoints.close()
    metrics.flush()
    metrics.close()
    pictures.curves(workdir / "curves.png", workdir / "metrics.jsonl")
    if stopped:
        log.info("saved step %d in %s; the same command goes on", step, checkpoints.folder)
        return runtime.EXIT_STOPPED
    log.info("done: %d steps, checkpoints and curves.png in %s", config.total_steps, workdir)
    return 0


def _due(step, every, last):
    return bool(every) and (step % every == 0 or step == last)


def _scores(scores):
    dice = {key.split("/", 1)[1]: value for key, value in scores.items() if "/dice" in key}
    return "  ".join(f"{name} {value:.3f}" for name, value in dice.items())


def _claim(workdir, config, split, *, started):
    """Make the folder a run of this config or, where it holds a checkpoint, see that it is one."""
    if started:
        old = config_lib.to_dict(config_lib.load(workdir))
        changes = config_lib.differences(old, config_lib.to_dict(config))
        if json.loads((workdir / "split.json").read_text()) != split:
            changes.append("data.split: gives other cases than split.json has; were records added?")
        if changes and _CONFIG_CHANGE.value != "accept":
            raise ValueError(
                f"{workdir} is a run of another config:\n  " + "\n  ".join(changes) + "\n"
                "choose another --workdir, restore the values, or pass --config_change=accept"
            )
    config_lib.save(config, workdir)
    (workdir / "split.json").write_text(json.dumps(split, indent=2) + "\n")


def main(_):
    """Flags in, exit code out; an error is one readable line."""
    runtime.start(devices=_CPU_DEVICES.value)
    try:
        sys.exit(train(_CONFIG.value, _WORKDIR.value))
    except (ValueError, NonFinite, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_ERROR)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=runtime.parse_flags)
