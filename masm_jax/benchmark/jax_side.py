"""Our networks: counted, and as calls that a clock can be held to.

Importing this imports JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np

from masm_jax import config as config_lib
from masm_jax import config_file, plan, sharding, steps
from masm_jax.benchmark import counting, program
from masm_jax.data.conventions import REGIONS
from masm_jax.state import Network, abstract_state, init_state, num_parameters


def settings(ours, config, **chosen):
    """The config of a peers.Ours: augmentation none, nothing computed again on the way back.

    Args:
      ours: peers.Ours.
      config: path of the config that the changes are made to.
      **chosen: more keys, such as patch=64.

    Raises:
      ValueError: no such config, or it lacks a key that a change asks for.
    """
    found = config_file.load_config(config, [])
    fixed = {"augment": "none", "model.remat": "none", "accumulate": 1}
    config_file.change(found, fixed | chosen | ours.changes, f"--config={config}")
    return found


def network(ours, *, patch, batch, dtype, config):
    """Network of a peers.Ours, as ``settings`` has it.

    Args:
      ours: peers.Ours.
      patch: edge in voxels.
      batch: B.
      dtype: "float32" or "bfloat16".
      config: path of the config that the changes are made to.

    Raises:
      ValueError: no such config, or the network cannot have such patches.
    """
    chosen = {"patch": patch, "batch_size": batch, "model.dtype": dtype}
    found = settings(ours, config, **chosen)
    config_lib.validate(found)
    return Network(found, modalities=ours.modalities, regions=REGIONS)


def count(ours, *, patch, config, xla=True):
    """Parameters and multiply-adds of one patch; nothing is compiled or run.

    Args:
      ours: peers.Ours.
      patch: edge in voxels.
      config: path of the config that the changes are made to.
      xla: also ask XLA for its count, which takes as long again.

    Returns:
      {"parameters", "forward", "train"}: ints; "train" is the whole training step. "moved": {the
      same two: multiply-adds that only move voxels, not counted}; "places": {the same two: {part
      and level of the network: multiply-adds}}; and "xla": {the same two: FLOPs}.
    """
    built = network(ours, patch=patch, batch=1, dtype="float32", config=config)
    parameters = num_parameters(abstract_state(built)["params"])
    found = {"parameters": parameters, "moved": {}, "places": {}, "xla": {}}
    for name, (function, *arguments) in calls(built).items():
        counts = counting.macs(function, *arguments)
        found[name], found["moved"][name] = counting.total(counts), counts["resample"]
        found["places"][name] = counting.by_place(function, *arguments)
        if xla:
            cost = jax.jit(function).lower(*arguments).cost_analysis()
            found["xla"][name] = int(cost["flops"])
    return found


def calls(built):
    """What is counted of a ``network``: {"forward", "train": (function, shapes of a patch ...)}."""
    state = abstract_state(built)
    image = jax.ShapeDtypeStruct((1, len(built.modalities), *built.patch), jnp.float32)
    label = jax.ShapeDtypeStruct((1, *built.patch), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {"image": image, "label": label}
    return {
        "forward": (steps.segment_step(built), state["params"], image),
        "train": (steps.train_step(built), state, batch, key),
    }


def prepare(ours, *, patch, batch, dtype, mode, config, device, limit=None):
    """One call of the network, its input on the device already.

    Inference: logits in float32. Training: the step of train.py as it is, without augmentation:
    deep supervision, Dice and cross-entropy, backward, clipping, AdamW, averaged weights, metrics.

    Args:
      ours: peers.Ours.
      patch: edge in voxels.
      batch: B.
      dtype: "float32" or "bfloat16".
      mode: "infer" or "train".
      config: path of the config that the changes are made to.
      device: "cpu" or "cuda".
      limit: bytes; a program that needs more is not run, and all is compiled before the first call.

    Returns:
      a function without arguments that returns when its work is done; of training with the loss.

    Raises:
      ValueError: the program needs more than ``limit``.
    """
    mesh = sharding.make_mesh(jax.devices(device)[:1])
    built = network(ours, patch=patch, batch=batch, dtype=dtype, config=config).on(mesh)
    everywhere = sharding.replicated(mesh)
    params = jax.device_put(built.init(0), everywhere)
    random = np.random.default_rng(0)
    image = random.standard_normal((batch, len(built.modalities), *built.patch), np.float32)
    if mode == "infer":
        tiles = jax.device_put(image, everywhere)
        segment = _within(limit, jax.jit(steps.segment_step(built)), params, tiles)
        return lambda: jax.block_until_ready(segment(params, tiles))

    label = (random.random((batch, *built.patch)) < 0.05).astype(np.uint8)
    data = jax.device_put({"image": image.astype(np.float16), "label": label}, everywhere)
    step, key = plan.step_function(built, mesh), jax.device_put(jax.random.key(0), everywhere)
    state = jax.jit(lambda params: init_state(built, params), out_shardings=everywhere)(params)
    step = _within(limit, step, state, data, key)

    def train():
        nonlocal state
        state, metrics = step(state, data, key)
        jax.block_until_ready((state, metrics))
        return metrics["train/loss"]

    return train


def _within(limit, function, *arguments):
    """``function``, compiled where there is a limit of bytes."""
    if limit is None:
        return function
    compiled = function.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    if needed > limit:
        raise ValueError(f"it needs {needed / 1e9:.1f} GB, and {limit / 1e9:.1f} GB are free")
    return compiled


def peak_bytes(device):
    """Most bytes that were in use on the device; None on a CPU, where the process is asked."""
    return None if device == "cpu" else jax.devices(device)[0].memory_stats()["peak_bytes_in_use"]


def versions(device):
    """{"jax", "jaxlib", "device"}."""
    found = {name: program.versions()[name] for name in ("jax", "jaxlib")}
    return found if device == "cpu" else found | {"device": jax.devices(device)[0].device_kind}
