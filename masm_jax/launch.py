"""Which process of a run on several this is: by flags, or by what launched it."""

import dataclasses
import os
import re

from absl import flags as absl_flags

_FLAGS = ("coordinator", "num_processes", "process_id")
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in a run of several.

    Args:
      coordinator: "host:port" of process 0, for JAX; the roll call takes the port above.
      num_processes: in the run.
      process_id: of this one, from 0.
      local_device_ids: this process's devices among those of its host; None is all.
      how: what said so, such as "flags" or "slurm".
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    how: str

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"coordinator = {self.coordinator!r} (from {self.how}): expected HOST:PORT of "
                f"process 0, such as 10.0.0.1:12345"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id = {self.process_id} of num_processes = {self.num_processes} (from "
                f"{self.how}): expected ids from 0 to num_processes - 1"
            )

    @property
    def host(self):
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self):
        return int(self.coordinator.rpartition(":")[2])

    @property
    def roll_port(self):
        return self.port + 1 if self.port < 2**16 - 1 else self.port - 1

    @property
    def firewall(self):
        """What is often the matter, as the end of a message."""
        return (
            f"see that process 0 runs on {self.host}, and that a firewall lets ports {self.port} "
            f"and {self.roll_port} through"
        )


def define_flags():
    """The flags that detect reads, and --start_timeout."""
    absl_flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, for a run on several; PORT+1 is used too."
    )
    absl_flags.DEFINE_integer("num_processes", None, "Processes in the run; 1: it runs alone.")
    absl_flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    absl_flags.DEFINE_float("start_timeout", 300.0, "Seconds for all processes to come.")


def detect(flags):
    """Find this process's place by the flags, else by what launched it, as os.environ tells.

    Known are MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK (torchrun, Kubernetes operators), Open
    MPI, SLURM and Cloud TPU. Nothing is asked over a network but on a TPU's host.

    Args:
      flags: has coordinator, num_processes and process_id, each None if not given.

    Returns:
      A Place, or None for a run of one process.

    Raises:
      ValueError: flags or variables are incomplete or wrong.
    """
    named = {name: getattr(flags, name) for name in _FLAGS}
    if named["num_processes"] == 1:
        return None
    missing = [f"--{name}" for name, value in named.items() if value is None]
    if not missing:
        return Place(**named, local_device_ids=None, how="flags")
    if len(missing) < len(named):
        raise ValueError(
            f"{' and '.join(missing)} missing: a run on several processes needs --coordinator="
            f"HOST:PORT --num_processes=N --process_id=0..N-1, all three on every process"
        )
    if all(name in os.environ for name in _VARIABLES):
        place = _by_variables()
    else:
        place = _by_jax()
        for name in () if place else _LAUNCHED:
            if os.environ.get(name, "1") != "1":
                raise ValueError(
                    f"{name} = {os.environ[name]}: this is one of several processes, but nothing "
                    f"says where process 0 is; set all of {', '.join(_VARIABLES)}, or pass "
                    f"--coordinator, --num_processes and --process_id (--num_processes=1: alone)"
                )
    return place if place and place.num_processes > 1 else None


def _by_variables():
    # torchrun itself listens on MASTER_PORT.
    offset = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0
    local, size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    try:
        return Place(
            f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + offset}",
            int(os.environ["WORLD_SIZE"]),
            int(os.environ["RANK"]),
            _own_devices(int(local), int(size)),
            "variables",
        )
    except ValueError as error:
        values = ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES)
        raise ValueError(f"{values}: {error}") from error


def _by_jax():
    """What JAX itself knows of schedulers. Private modules of it: all use of them is here."""
    from jax._src import clusters

    # Not Kubernetes', which needs a package and rights of its own, and warns without them.
    for kind in ("OmpiCluster", "SlurmCluster", "GkeTpuCluster", "GceTpuCluster"):
        cluster = getattr(clusters, kind)
        try:
            if not cluster.is_env_present():  # two look at variables, two first for a TPU
                continue
            if (count := cluster.get_process_count()) == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(300, port)
            local = cluster.get_local_process_id()  # None on TPU
            own = None if local is None else _own_devices(local, _on_this_host(cluster.name))
            return Place(address, count, cluster.get_process_id(), own, cluster.name)
        except (RuntimeError, OSError, ImportError, KeyError) as error:
            raise ValueError(
                f"JAX takes this for a host of {cluster.name}, and then: {type(error).__name__}: "
                f"{error}; pass --num_processes=1 to run alone, or --coordinator, --num_processes "
                f"and --process_id"
            ) from error
    return None


def _on_this_host(scheduler):
    """How many of the run's processes are on this host, or None."""
    if scheduler == "ompi":
        return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) or None
    tasks = []  # "2(x3),1" is 2, 2, 2, 1 on four nodes
    for number, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        tasks += [int(number)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return tasks[node] if node < len(tasks) else None


def _own_devices(local, size):
    """One process on a host has all of its devices; of several, each has the one of its number.

    JAX would give the only process of an eight-GPU host one GPU, and ask for GPU 3 where the
    scheduler shows the process nothing but its own.
    """
    if size == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:  # JAX reads that one
        return None
    for name in _VISIBLE:
        if name in os.environ and len(os.environ[name].split(",")) < (size or local + 1):
            return None
    return (local,)
