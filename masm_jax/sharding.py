"""The mesh and what lies where on it.

One axis, "data": the batch is cut over it, the state is on every device. The axes are Auto: XLA
inserts the collectives.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def make_mesh(devices=None):
    """A mesh of all devices (or those given) with the single axis "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh):
    """Sharding of the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh):
    """Sharding of a batch: its first axis cut over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(mesh, batch):
    """This process's share of a batch (dict of NumPy arrays) -> global arrays on the mesh.

    The transfer is asynchronous: the call returns before the data has arrived.
    """
    sharding = over_batch(mesh)

    def put(array):
        return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))

    return {name: put(array) for name, array in batch.items()}
