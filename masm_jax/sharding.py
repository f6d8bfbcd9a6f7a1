"""The mesh, and what lies where on it.

Two axes: "data" cuts the batch, "spatial" the depth of every volume (models/spatial.py). The state
is on every device: to cut it would save less than one activation takes (docs/scaling.md).
"""

import collections
import concurrent.futures
import itertools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Batch over "data", depth over "spatial".
IMAGE = PartitionSpec("data", None, "spatial")  # (B, M, D, H, W)
LABEL = PartitionSpec("data", "spatial")  # (B, D, H, W), (B, D, H, W, R)
EXAMPLE = PartitionSpec("data")  # (B, ...): a few numbers per example
_BATCH = {"image": IMAGE, "label": LABEL}


def make_mesh(devices=None, *, data=0, spatial=1):
    """A mesh ("data", "spatial").

    Args:
      devices: all of the run by default.
      data: length of the axis; 0 takes all the devices that ``spatial`` leaves.
      spatial: length of the axis.

    Raises:
      ValueError: the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    rows = data or len(devices) // spatial
    if rows * spatial != len(devices):
        raise ValueError(
            f"config.mesh: data {data or 'any'} x spatial {spatial} does not fit "
            f"{len(devices)} devices; expected a product of {len(devices)}: set mesh.spatial to a "
            f"divisor of it and mesh.data to 0, or use another number of devices"
        )
    names = ("data", "spatial")
    return jax.make_mesh((rows, spatial), names, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(mesh, batch_size, parts=1):
    """See that a batch, and every part of it, can be cut over the mesh.

    Raises:
      ValueError: it cannot.
    """
    rows = mesh.shape["data"]
    if batch_size % (rows * parts):
        divided = f" in {parts} parts (config.accumulate)" if parts > 1 else ""
        raise ValueError(
            f"config.batch_size = {batch_size}{divided}: expected a multiple of "
            f"{rows * parts}, as the {mesh.devices.size} devices are {rows} data x "
            f"{mesh.shape['spatial']} spatial; set it to one, use fewer devices, or give more of "
            f"them to mesh.spatial"
        )


def local_mesh(mesh):
    """Mesh of this process's devices alone: for work that processes do apart, case by case."""
    devices = jax.local_devices()
    spatial = mesh.shape["spatial"]
    return make_mesh(devices, spatial=spatial if len(devices) % spatial == 0 else 1)


def replicated(mesh):
    """Sharding of the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def everywhere(mesh, tree):
    """Host arrays, the same on every process, as global arrays that all devices hold."""
    sharding = replicated(mesh)

    def put(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def local_copy(tree):
    """What every device holds, as arrays of one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def over_batch(mesh):
    """Sharding of an image (B, M, D, H, W)."""
    return NamedSharding(mesh, IMAGE)


def batch_shardings(mesh):
    """{"image", "label"}: as ``global_batch`` lays a batch out."""
    return {name: NamedSharding(mesh, spec) for name, spec in _BATCH.items()}


def rows_here(mesh, batch_size):
    """Places in the global batch whose voxels, or some planes of them, lie on this process.

    Args:
      mesh: of the run.
      batch_size: B, a multiple of the "data" axis.

    Returns:
      ascending ints.
    """
    per_row = batch_size // mesh.shape["data"]
    here = jax.process_index()
    rows = [
        place * per_row + offset
        for place, devices in enumerate(mesh.devices)
        if any(device.process_index == here for device in devices)
        for offset in range(per_row)
    ]
    return rows


def global_batch(mesh, batch, batch_size=None):
    """This process's share of a batch -> global arrays on the mesh.

    The transfer is asynchronous: the call returns before the data has arrived.

    Args:
      mesh: of the run.
      batch: {"image": (b, M, D, H, W), "label": (b, D, H, W)} NumPy arrays, the ``rows_here``;
        other entries are left out.
      batch_size: B; None where the batch is whole, as on a single process.
    """
    batch_size = batch_size or len(batch["label"])
    position = {row: i for i, row in enumerate(rows_here(mesh, batch_size))}

    def put(array, sharding):
        shape = (batch_size, *array.shape[1:])
        parts = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            rows = range(*index[0].indices(batch_size))
            first = position[rows[0]]
            part = np.ascontiguousarray(array[first : first + len(rows), *index[1:]])
            parts.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return {name: put(batch[name], sharding) for name, sharding in batch_shardings(mesh).items()}


def transferred(stream, mesh, batch_size, *, ahead=1):
    """Batches of a stream on the mesh, the next ones on their way while one is worked on.

    A thread puts them together and sends them: both took a tenth of a fast device's step, in which
    the loop could start nothing. What is handed out is held by nobody else: a caller that drops a
    batch frees its memory there and then, and not while it asks for the next.

    Args:
      stream: iterator of host batches; ``global_batch`` says of what.
      mesh, batch_size: as there.
      ahead: batches read or in transfer beside the one handed out; each takes device memory.

    Yields:
      global batches, in order.
    """
    stream = iter(stream)

    def one():
        return [global_batch(mesh, batch, batch_size) for batch in itertools.islice(stream, 1)]

    with concurrent.futures.ThreadPoolExecutor(1, "batches") as sender:
        coming = collections.deque(sender.submit(one) for _ in range(ahead))
        while arrived := coming.popleft().result():
            coming.append(sender.submit(one))
            yield arrived.pop()
