"""Which process this is, by flags and by variables as schedulers set them."""

import os
import re
import socket
import types

import pytest

from masm_jax import launch

SLURM = {
    "SLURM_JOB_ID": "4095",
    "SLURM_STEP_NODELIST": "node[007-008],other",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}


@pytest.fixture
def detect(monkeypatch):
    """detect({"VARIABLE": "value"}, flag=value) on a machine where nothing else is set."""

    def detect(variables, coordinator=None, num_processes=None, process_id=None):
        for name in os.environ:
            if re.match("SLURM|OMPI|PMI_|MASTER_|WORLD_|RANK|LOCAL_|JAX_|CUDA_|TORCH", name):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        named = {"coordinator": coordinator, "num_processes": num_processes}
        return launch.detect(types.SimpleNamespace(**named, process_id=process_id))

    def no_network(*_, **__):
        raise AssertionError("asked the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    return detect


def test_a_laptop_runs_alone_and_asks_nobody(detect):
    assert detect({}) is None
    assert detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    assert detect(SLURM | TORCH, num_processes=1) is None


def test_flags(detect):
    place = detect(SLURM, "[::1]:1234", 4, 3)
    assert place == launch.Place("[::1]:1234", 4, 3, None, "flags")
    assert (place.host, place.port, place.roll_port) == ("::1", 1234, 1235)
    with pytest.raises(ValueError, match="--num_processes and --process_id missing"):
        detect({}, "a:1234")
    with pytest.raises(ValueError, match="process_id = 4 of num_processes = 4 .from flags"):
        detect({}, "a:1234", 4, 4)
    for wrong in ("a", ":1", "a:b", "a:0", "a:65536"):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            detect({}, wrong, 4, 0)


def test_slurm(detect):
    place = detect(SLURM)
    assert place == launch.Place("node007:65535", 5, 3, (1,), "slurm")
    assert place.roll_port == 65534  # there is none above
    assert detect(SLURM | {"SLURM_NTASKS": "1"}) is None
    # One process on a host has all its devices, and one that sees only its own needs no number.
    assert detect(SLURM | {"SLURM_NODEID": "2"}).local_device_ids is None
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).local_device_ids is None
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device_ids == (1,)
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert detect(batch) is None  # without srun


def test_open_mpi(detect):
    place = detect(OPEN_MPI)
    assert place.coordinator.startswith("10.96.0.1:") and place.how == "ompi"
    assert (place.num_processes, place.process_id, place.local_device_ids) == (4, 2, None)
    assert detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).local_device_ids == (0,)
    with pytest.raises(ValueError, match="a host of ompi, and then: KeyError: .*LOCAL_RANK"):
        detect({k: v for k, v in OPEN_MPI.items() if k != "OMPI_COMM_WORLD_LOCAL_RANK"})
    newer = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    # jax 0.11 knows Open MPI 5, and wants mpi4py for it; before it does not.
    words = "OMPI_COMM_WORLD_SIZE = 4: this is one of several|Open MPI 5 or newer requires mpi4py"
    with pytest.raises(ValueError, match=words):
        detect(newer)


def test_variables_of_torchrun_and_kubernetes(detect):
    place = detect(TORCH)
    assert (place.coordinator, place.num_processes, place.process_id) == ("10.0.0.1:29500", 4, 3)
    assert place.local_device_ids is None
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert detect(TORCH | torchrun).coordinator == "10.0.0.1:29501"  # it has the other itself
    assert detect(TORCH | torchrun).local_device_ids == (1,)
    assert detect(TORCH | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    with pytest.raises(ValueError, match="RANK=x: invalid literal"):
        detect(TORCH | {"RANK": "x"})


def test_incomplete_variables_are_refused(detect):
    variables = {name: value for name, value in TORCH.items() if name != "RANK"}
    with pytest.raises(ValueError, match="WORLD_SIZE = 4: .* set all of MASTER_ADDR"):
        detect(variables)
