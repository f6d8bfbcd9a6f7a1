"""What a run takes, said before it starts: mesh, parameters, bytes per device, steps per epoch."""

import collections
import math

import jax
import jax.numpy as jnp

from masm_jax import sharding
from masm_jax.models.masm import constant_levels, divisor
from masm_jax.state import abstract_state, num_parameters
from masm_jax.steps import train_step


class Plan:
    """A training, planned.

    Args:
      config: validated.
      network: on the mesh.
      mesh: of the run.
      cases: to train on.

    Attributes:
      state: of the run, its shapes and dtypes.
    """

    def __init__(self, config, network, mesh, *, cases):
        self.config, self.network, self.mesh, self.cases = config, network, mesh, cases
        self.state = abstract_state(network)

    def line(self):
        """Mesh, parameters and devices in a line."""
        shape, count = self.mesh.shape, jax.process_count()
        parameters = num_parameters(self.state["params"]) / 1e6
        return (
            f"{parameters:.2f} M parameters in {self.config.model.dtype}; {self.mesh.devices.size} "
            f"{jax.default_backend()} device(s), {shape['data']} data x {shape['spatial']} spatial"
            + (f", on {count} processes" if count > 1 else "")
        )

    def warning(self):
        """What the run would do to no purpose, in a line; None: nothing was found."""
        model, patch = self.config.model, self.network.patch
        levels = constant_levels(model, patch)
        if not levels:
            return None
        needed = divisor(model)
        while constant_levels(model, needed):
            needed += divisor(model)
        return (
            f"config.patch = {self.config.patch} leaves one voxel at level(s) "
            f"{', '.join(map(str, levels))} of model.size={model.size!r}: an instance norm makes a "
            f"constant of it and they learn nothing; expected {needed} or more, or a smaller size"
        )

    def text(self):
        """All of it; compiles the training step, which the run then finds in the cache."""
        config, count = self.config, self.cases
        hosts = collections.Counter(device.process_index for device in self.mesh.devices.flat)
        memory = self.compiled().memory_analysis()
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.state))
        rows = [
            ("mesh", self.line()),
            ("hosts", ", ".join(f"process {p}: {n} devices" for p, n in sorted(hosts.items()))),
            ("crops", f"{config.batch_size} x {'x'.join(map(str, self.network.patch))} a step"),
            ("epoch", f"{math.ceil(count / config.batch_size)} steps for {count} cases"),
            ("run", f"{config.total_steps} steps, {self._epochs():.1f} epochs"),
            ("state", f"{state / 1e9:.3f} GB on every device"),
        ]
        if memory is not None:
            held = memory.argument_size_in_bytes / 1e9
            work = memory.temp_size_in_bytes / 1e9
            rows.append(("memory", f"{held:.3f} GB arguments + {work:.3f} GB work per device"))
        return "\n".join(f"{name:<8}{value}" for name, value in rows)

    def compiled(self):
        """The training step, compiled for these devices."""
        return lowered(self.network, self.mesh, self.config.batch_size).compile()

    def _epochs(self):
        return self.config.total_steps * self.config.batch_size / self.cases


def step_function(network, mesh):
    """The training step as it is run: its results are on every device, the state is reused."""
    everywhere = sharding.replicated(mesh)
    return jax.jit(train_step(network), donate_argnums=0, out_shardings=(everywhere, everywhere))


def lowered(network, mesh, batch_size):
    """The training step, traced for a mesh whose devices need not be here."""
    everywhere = sharding.replicated(mesh)

    def like(shape, dtype, where=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    state = jax.tree.map(lambda leaf: like(leaf.shape, leaf.dtype), abstract_state(network))
    cut, patch = sharding.batch_shardings(mesh), network.patch
    image = (batch_size, len(network.modalities), *patch)
    batch = {
        "image": like(image, jnp.float16, cut["image"]),
        "label": like((batch_size, *patch), jnp.uint8, cut["label"]),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step_function(network, mesh).lower(state, batch, like(key.shape, key.dtype))
