"""Volumes of which each device holds some planes: what has to be known of the others.

The network runs under ``jax.shard_map`` (``over``): every device computes on its own examples and,
where the mesh has a "spatial" axis, on its own planes of them. Element by element nothing changes;
here is the rest: neighbouring planes, means over a whole volume, and all planes together.

Without that axis all of it falls back to what one device does.
"""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "spatial"
_count = contextvars.ContextVar("count", default=None)  # None: outside of ``over``


def over(mesh, function, specs, out_specs):
    """``function``, each device on its part.

    Args:
      mesh: ("data", "spatial"), or None: as it is, on whatever device.
      function: of arrays; its first argument is on every device (parameters).
      specs: PartitionSpecs of the other arguments.
      out_specs: PartitionSpecs of the results.

    Returns:
      A function of the same arguments as global arrays.
    """
    if mesh is None or mesh.devices.size == 1:
        return function

    def local(params, *arguments):
        # Here, in float32, and not behind the first cast: gradients are summed in their precision.
        params = jax.tree.map(lambda leaf: lax.pcast(leaf, mesh.axis_names, to="varying"), params)
        with shared_by(mesh.shape[AXIS]):
            return function(params, *arguments)

    return jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), *specs), out_specs=out_specs)


@contextlib.contextmanager
def shared_by(count):
    """Inside, ``count`` devices share a volume."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def count():
    """Devices that share a volume."""
    return _count.get() or 1


def mean(x):
    """Mean over the devices that share a volume."""
    return x if _count.get() is None else lax.pmean(x, AXIS)


def total(x):
    """Sum over the devices that share a volume."""
    return x if _count.get() is None else lax.psum(x, AXIS)


def whole(x, axis):
    """The planes of all devices together, along ``axis``."""
    return x if count() == 1 else lax.all_gather(x, AXIS, axis=axis, tiled=True)


def own(x, axis):
    """This device's planes of an array that has them all."""
    if count() == 1:
        return x
    planes = x.shape[axis] // count()
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * planes, planes, axis)


def neighbour(x, by, depth):
    """The plane ``by`` further on in depth, at every plane; zero past the ends of the volume.

    Args:
      x: (B D, H, W, C), planes (layers.planes).
      by: of either sign, fewer than D.
      depth: D.

    Returns:
      (B D, H, W, C).
    """
    if by == 0:
        return x
    if count() > 1:
        volumes = x.reshape(-1, depth, *x.shape[1:])
        padded, reach = _with_halo(volumes, abs(by)), abs(by)
        moved = lax.slice_in_dim(padded, reach + by, reach + by + depth, axis=1)
        return moved.reshape(x.shape)
    # Without unfolding depth, which on TPU would move all of it twice; what comes over from the
    # example next door is taken out.
    moved = lax.pad(x, jnp.zeros((), x.dtype), [(-by, by, 0), *[(0, 0, 0)] * 3])
    place = jnp.arange(depth) + by
    inside = jnp.broadcast_to((place >= 0) & (place < depth), (x.shape[0] // depth, depth))
    return jnp.where(inside.reshape(-1, 1, 1, 1), moved, jnp.zeros((), x.dtype))


def with_halo(x, reach):
    """x with ``reach`` more planes on both sides, zero past the ends: (B, D + 2 reach, ...)."""
    if count() == 1:
        return jnp.pad(x, ((0, 0), (reach, reach), *[(0, 0)] * (x.ndim - 2)))
    return _with_halo(x, reach)


def at_ends():
    """(first, last): whether this device's planes begin, and end, the volume."""
    if count() == 1:
        return True, True
    return lax.axis_index(AXIS) == 0, lax.axis_index(AXIS) == count() - 1


def _with_halo(x, reach):
    up = [(i, i + 1) for i in range(count() - 1)]
    before = lax.ppermute(x[:, -reach:], AXIS, up)  # zeros where nobody sends
    behind = lax.ppermute(x[:, :reach], AXIS, [(j, i) for i, j in up])
    return jnp.concatenate([before, x, behind], axis=1)
