"""The real steps, lowered and compiled for a pod that is described and not there.

Importing this imports JAX; ``masm_jax.benchmark.tpu.describe`` must have run before.
"""

import datetime
import importlib.metadata
import platform
import time

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import topologies

import masm_jax
from masm_jax import checkpoint, plan, sharding, steps
from masm_jax import config as config_lib
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.models import conv
from masm_jax.state import Network, abstract_state, num_parameters


def devices(where):
    """The described chips (chips.Slice) as JAX devices, one per chip.

    Raises:
      ValueError: the compiler knows no such slice.
    """
    # A v4 chip would be two devices; two cores of a v5p are one without being asked.
    options = {"chip_config_name": "megacore"} if where.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=str(where), **options)
        found = found.devices
    except (RuntimeError, IndexError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"--topology={where}: the compiler knows no such slice: {said}") from error
    assert len(found) == where.chips, (where, len(found))
    return found


def lower(config, where, step):
    """Lower a step for a slice, compiled in train.py and in inference/volume.py with these options.

    Args:
      config: ``batch_size``, ``patch`` and ``mesh`` are those of this slice; validated here.
      where: chips.Slice.
      step: "train" or "infer".

    Returns:
      ``jax.stages.Lowered``, and the number of parameters.

    Raises:
      ValueError: the config is not valid, or does not fit the slice.
    """
    config_lib.validate(config)
    mesh = sharding.make_mesh(devices(where), data=config.mesh.data, spatial=config.mesh.spatial)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    network = Network(config, modalities=MODALITIES, regions=REGIONS, mesh=mesh)
    with conv.traced_for("tpu"):
        if step == "train":
            lowered = plan.lowered(network, mesh, config.batch_size)
        else:
            params = checkpoint.with_sharding(
                abstract_state(network)["params"], sharding.replicated(mesh)
            )
            shape = (config.batch_size, len(network.modalities), *network.patch)
            tiles = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.over_batch(mesh))
            lowered = jax.jit(steps.segment_step(network)).lower(params, tiles)
    return lowered, num_parameters(abstract_state(network)["params"])


def compile_(lowered):
    """Compile, and keep what the compiler says.

    Returns:
      a dict for JSON: "fits", "seconds", "date"; where it fits "memory" and "cost" (bytes, FLOPs
      per chip), else "message"; and the optimised HLO text ("" where it does not fit).

    Raises:
      ValueError: the compiler fails for another reason than memory.
    """
    began = time.perf_counter()
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in said:
            raise ValueError(f"the TPU compiler failed: {said}") from error
        seconds = time.perf_counter() - began
        return facts | {"fits": False, "seconds": seconds, "message": said}, ""
    facts |= {"fits": True, "seconds": time.perf_counter() - began}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    facts["memory"] = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    facts["cost"] = {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
    }
    return facts, compiled.as_text()


def versions():
    """{"jax", "jaxlib", "libtpu", "masm_jax", "python"}."""
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = "of TPU_LIBRARY_PATH"
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "libtpu": libtpu,
        "masm_jax": masm_jax.__version__,
        "python": platform.python_version(),
    }
