"""Volumes cut along depth over devices: each holds some planes of every volume.

Element by element nothing changes, and where sums run over a whole volume XLA inserts the
collectives. A convolution needs its neighbours' planes. It gets them here by hand: ``conv`` folds
depth into the batch (models/conv.py), where XLA's partitioner would not see neighbours any more.
"""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_mesh = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def cut_over(mesh):
    """Inside, depth is cut over the "spatial" axis of a mesh; None: not cut."""
    token = _mesh.set(mesh if mesh is not None and mesh.shape["spatial"] > 1 else None)
    try:
        yield
    finally:
        _mesh.reset(token)


def with_neighbours(function, x, kernel, *, reach, stride=1):
    """``function`` of x with ``reach`` more planes on both sides, and of a kernel.

    At the ends of the volume they are zero; at a cut they come from the device next door. Where the
    depth cannot be cut evenly (the lowest levels) every device works on whole volumes.

    Args:
      function: (x (B, D + 2 reach, H, W, C), kernel) -> (B, D / stride, H', W', C').
      x: (B, D, H, W, C), batch over "data".
      kernel: the same on all devices; its gradient is summed over them in its own dtype.
      reach: planes.
      stride: of ``function`` along depth.
    """
    mesh = _mesh.get()
    planes = PartitionSpec("data", "spatial")
    if mesh is None or x.shape[1] % (mesh.shape["spatial"] * stride):
        if mesh is not None:
            x = lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))
        return function(jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0))), kernel)
    last = mesh.shape["spatial"] - 1

    def local(x, kernel):
        up = [(i, i + 1) for i in range(last)]
        before = lax.ppermute(x[:, -reach:], "spatial", up)  # zeros where nobody sends
        behind = lax.ppermute(x[:, :reach], "spatial", [(j, i) for i, j in up])
        return function(jnp.concatenate([before, x, behind], axis=1), kernel)

    cut = jax.shard_map(local, mesh=mesh, in_specs=(planes, PartitionSpec()), out_specs=planes)
    return cut(x, kernel)
