"""Train MASM.

    python train.py --config=configs/masm_brats.py --workdir=runs/masm [--config.key=value ...]

Started again with the same command, an interrupted run goes on where it was, with the same numbers
to the last bit on the same devices. Exit codes: 0 done, 1 an error (one line says which), 2 usage,
75 stopped by a signal or config.stop_at_step after saving, 76 another process of the run is gone.
On several processes (TPU pods, SLURM, torchrun, --coordinator) it is the same command on each:
docs/scaling.md.
"""

import hashlib
import json
import logging
import sys
import time
from functools import partial

import jax
from absl import app, flags
from ml_collections import config_flags

from masm_jax import checkpoint, locks, processes, run_config, runtime, sharding
from masm_jax import config as config_lib
from masm_jax.data import pipeline
from masm_jax.data import records as records_lib
from masm_jax.evaluation import validation
from masm_jax.files import as_path, check_output, replacing
from masm_jax.inference.volume import Segmenter, Settings
from masm_jax.metric_log import MetricLog, NonFinite
from masm_jax.models import from_monai
from masm_jax.plan import Plan, step_function
from masm_jax.state import Network, init_state
from masm_jax.steps import eval_step, segment_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Force this many CPU devices (for trials).", lower_bound=0
)
_CONFIG_CHANGE = flags.DEFINE_enum(
    "config_change",
    "refuse",
    ["refuse", "accept"],
    "What to do if the config of a run has changed.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, say what the run would take, and stop.")
processes.define_flags()
log = logging.getLogger("masm_jax.train")


def train(config, workdir, roll):
    """Run or continue the training in ``workdir``; returns the exit code.

    ``roll`` is of the processes of the run (masm_jax/processes.py): all of them do this together,
    and the first one writes.
    """
    workdir = as_path(workdir)
    first = jax.process_index() == 0

    # ---------------------------------------------------------------- config, data, network
    config_lib.validate(config)
    records = records_lib.Records(config.data.records)
    config_lib.validate_records(config, records)
    split = records_lib.split(records.cases, config.data.split, config.data.split_seed)
    mesh = sharding.make_mesh(data=config.mesh.data, spatial=config.mesh.spatial)
    network = Network(config, modalities=records.modalities, regions=records.regions, mesh=mesh)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    roll.agree("the config", run_config.to_dict(config))
    roll.agree("the records", _fingerprint(records, split))
    plan = Plan(config, network, mesh, cases=len(split["train"]))
    log.info(
        "%d cases to train on, %d to validate; %s, regions %s",
        len(split["train"]),
        len(split["val"]),
        "+".join(network.modalities),
        ", ".join(network.regions),
    )
    log.info(plan.line())
    if plan.warning() is not None:
        log.warning(plan.warning())
    if _DRY_RUN.value:
        if first:
            print(plan.text())
        return 0

    # ---------------------------------------------------------------- state: new or restored
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.log.keep)
    everywhere = sharding.replicated(mesh)
    target = checkpoint.with_sharding(plan.state, everywhere)
    _refuse_another(workdir, config, split, started=checkpoints.latest() is not None)
    start, state, _ = checkpoints.restore_newest(target, roll, put_aside=True)
    start = start or 0
    if start:
        log.info("continuing at step %d", start)
    else:
        params = sharding.everywhere(mesh, from_monai.start(network))
        state = jax.jit(partial(init_state, network), out_shardings=everywhere)(params)
    if first:
        run_config.save(config, workdir)
        with replacing(workdir / "split.json") as temporary:
            temporary.write_text(json.dumps(split, indent=2) + "\n")

    # ---------------------------------------------------------------- compiled steps, streams
    step_fn = step_function(network, mesh)
    key = jax.jit(partial(jax.random.key, config.seed), out_shardings=everywhere)()
    eval_fn = jax.jit(eval_step(network), out_shardings=everywhere)
    rows = sharding.rows_here(mesh, config.batch_size)
    batches = pipeline.batches(
        records,
        split["train"],
        seed=config.seed,
        batch_size=config.batch_size,
        patch=config.patch,
        foreground=config.data.foreground,
        start_step=start,
        rows=rows,
        workers=config.data.workers,
    )
    stream = sharding.transferred(batches, mesh, config.batch_size)
    crops = segmenter = None
    metrics = MetricLog(
        workdir,
        total_steps=config.total_steps,
        start_step=start,
        every=config.log.every,
        writes=first,
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
    roll.agree("ready to compile", start)
    log.info("compiling the training step; the first one takes longer")
    with checkpoints, runtime.StopSignal() as stop, jax.transfer_guard("disallow"):
        for step in range(start + 1, config.total_steps + 1):
            dice = None  # of this step, if it is validated
            asked = time.perf_counter()
            batch = next(stream)
            metrics.waiting(time.perf_counter() - asked)
            state, values = step_fn(state, batch, key)
            del batch  # its memory is free after the step, and for the validation below
            if step == start + 1:
                runtime.collect_as_ever()  # while the device is at work on it
            metrics.train(step, values)

            if split["val"] and _due(step, config.log.patch_every, config.total_steps):
                crops = crops or validation.validation_crops(config, records, split["val"], rows)
                scores = validation.pseudo_dice(
                    eval_fn, state["ema"], crops, mesh, network.regions, config.batch_size
                )
                metrics.write(step, scores)
                dice = scores["val/dice"]
                log.info("step %d  validation crops: %s", step, _scores(scores))
            if split["val"] and _due(step, config.log.volume_every, config.total_steps):
                # Every process segments cases of its own, on its own devices.
                weights = sharding.local_copy(state["ema"])
                segmenter = segmenter or _segmenter(network, weights, mesh)
                segmenter.update(weights)
                cases = split["val"][: config.log.volumes]
                drawn = {c: workdir / "overlays" / f"{c}.png" for c in cases[: config.log.overlays]}
                scores = validation.volume_dice(segmenter, records, cases, roll, drawn)
                metrics.write(step, scores, pictures=drawn)
                log.info("step %d  %d validation cases: %s", step, len(cases), _scores(scores))

            stopped = roll.stopping(step, stop.name) or step == config.stop_at_step
            if stopped or _due(step, config.log.checkpoint_every, config.total_steps):
                save(step)
            if stopped:
                break
        else:
            stopped = False

    # ---------------------------------------------------------------- the end
    metrics.flush()
    metrics.close()
    written = workdir / "metrics.jsonl"
    if first and written.read_text():  # nothing is where a run is stopped before its first line
        from masm_jax.evaluation import pictures  # Matplotlib: not before the first step

        pictures.curves(workdir / "curves.png", written)
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


def _segmenter(network, weights, mesh):
    """Of this process alone, for whole cases."""
    local = sharding.local_mesh(mesh)
    network = network.on(local)
    return Segmenter(segment_step(network), weights, local, Settings.of(network))


def _fingerprint(records, split):
    """What all processes must see alike, in short."""
    described = json.dumps([records.cases, records.modalities, records.regions, split])
    return {"cases": len(records.cases), "sha256": hashlib.sha256(described.encode()).hexdigest()}


def _refuse_another(workdir, config, split, *, started):
    """Where the folder holds a checkpoint, see that it is of this config and these cases."""
    if not started:
        return
    old = run_config.to_dict(run_config.load(workdir))
    changes = run_config.differences(old, run_config.to_dict(config))
    if records_lib.read_split(workdir) != split:
        changes.append("data.split: gives other cases than split.json has; were records added?")
    if changes and _CONFIG_CHANGE.value != "accept":
        raise ValueError(
            f"{workdir} is a run of another config:\n  " + "\n  ".join(changes) + "\n"
            "choose another --workdir, restore the values, or pass --config_change=accept"
        )


def main(_):
    """Flags in, exit code out; an error is one readable line."""
    runtime.start(devices=_CPU_DEVICES.value)
    runtime.collect_rarely()
    try:
        place = processes.detect(flags.FLAGS)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_USAGE)
    readable = (ValueError, NonFinite, OSError)
    limit = flags.FLAGS.start_timeout
    with processes.joined(place, limit=limit, readable=readable) as roll:
        check_output(_WORKDIR.value, flag="--workdir")
        records_lib.refuse_records(_WORKDIR.value, flag="--workdir")
        holds = jax.process_index() == 0 and not _DRY_RUN.value
        with locks.alone(_WORKDIR.value, holds=holds):
            code = train(_CONFIG.value, _WORKDIR.value, roll)
    sys.exit(code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=runtime.parse_flags)
