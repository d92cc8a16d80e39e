"""Ranks as each launcher gives them."""

import socket

import pytest

from megagpt.errors import LaunchError
from megagpt.launchers import host_name
from megagpt.parallel.launch import detect_launch, free_port

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
BATCH = {"SLURM_JOB_ID": "45678", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
SRUN = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
MPICH = {"PMI_RANK": "6", "MPI_LOCALRANKID": "2", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_SIZE": "8"}
MASTER = {"MASTER_ADDR": "node1"}
ELASTIC = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "1"}
DEEPSPEED = {**TORCHRUN, "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
# one task per node, which starts another launcher; rank 1 of mpirun's two
MPIRUN_PER_NODE = {**MPIRUN, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
# the shell of `salloc --ntasks=8` on the first node, where Slurm is configured so
SALLOC = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, ("torchrun or deepspeed", 3, 1, 4, "node1", 1234)),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "1"}, ("torchrun", 3, 1, 4, "node1", 1234)),
        ({**TORCHRUN, "CROSS_RANK": "1", "CROSS_SIZE": "2"}, ("deepspeed", 3, 1, 4, "node1", 1234)),
        ({**MVAPICH, **MASTER, "MASTER_PORT": "99"}, ("mpirun (MVAPICH)", 5, 1, 8, "node1", 99)),
        ({**MPIRUN, **MASTER, "MASTER_PORT": "99"}, ("mpirun", 2, 0, 4, "node1", 99)),
        ({**SRUN, **MASTER}, ("srun", 5, 1, 8, "node1", 25678)),
        # mpirun inside a Slurm allocation: each rank sees the batch script's SLURM_PROCID=0
        ({**MPIRUN, **BATCH, "SLURM_STEP_ID": "0", **MASTER}, ("mpirun", 2, 0, 4, "node1", 25678)),
        # torchrun as one Slurm task per node
        ({**SRUN, **TORCHRUN}, ("torchrun or deepspeed", 3, 1, 4, "node1", 1234)),
        # MPICH's mpirun, outside and inside Slurm; srun with a PMI plugin
        ({**MPICH, **MASTER, "MASTER_PORT": "99"}, ("mpirun (MPICH)", 6, 2, 8, "node1", 99)),
        ({**MPICH, **SRUN, **MASTER}, ("mpirun (MPICH)", 6, 2, 8, "node1", 25678)),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", **SRUN, **MASTER}, ("srun", 5, 1, 8, "node1", 25678)),
        # torchrun and deepspeed as one task of mpirun per node; RANK exported by hand, which is the same in all ranks
        ({**MPIRUN_PER_NODE, **ELASTIC}, ("torchrun", 3, 1, 4, "node1", 1234)),
        ({**MPIRUN_PER_NODE, **DEEPSPEED}, ("deepspeed", 3, 1, 4, "node1", 1234)),
        ({**MPIRUN, **TORCHRUN, "RANK": "0"}, ("mpirun", 2, 0, 4, "node1", 1234)),
        # a step of some of an allocation's tasks; one of a job of two components, which have 8 tasks together
        ({**SRUN, **MASTER, "SLURM_STEP_NUM_TASKS": "6"}, ("srun", 5, 1, 6, "node1", 25678)),
        ({**SRUN, **MASTER, "SLURM_STEP_NUM_TASKS": "4", "SLURM_HET_SIZE": "2"}, ("srun", 5, 1, 8, "node1", 25678)),
        ({**SALLOC, **DEEPSPEED, "WORLD_SIZE": "8"}, ("deepspeed", 3, 1, 8, "node1", 1234)),
        # one rank needs nobody to meet
        ({**MPIRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ("mpirun", 0, 0, 1, "127.0.0.1", 29500)),
    ],
    ids=[
        *(
            "by hand",
            "torchrun",
            "deepspeed",
            "MVAPICH",
            "mpirun",
            "srun",
            "mpirun in Slurm",
            "torchrun in Slurm",
            "MPICH",
            "MPICH in Slurm",
        ),
        *("srun with PMI", "torchrun in mpirun", "deepspeed in mpirun", "mpirun with RANK", "a smaller step"),
        *("components", "deepspeed in salloc", "one rank"),
    ],
)
def test_each_launcher(environ, expected):
    launch = detect_launch(environ)
    place = (launch.launcher, launch.rank, launch.local_rank, launch.world_size)
    assert (*place, launch.master_addr, launch.master_port) == expected


@pytest.mark.parametrize(
    "environ", [{}, BATCH, SALLOC], ids=["a shell", "a batch script without srun", "salloc's shell"]
)
def test_a_single_process(environ):
    launch = detect_launch(environ)
    assert (launch.launcher, launch.rank, launch.world_size) == ("single process", 0, 1)
    assert launch.master_addr == "127.0.0.1"
    assert 1024 <= launch.master_port < 65536


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is not set although torchrun or deepspeed seems"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set although torchrun or deepspeed seems"),
        ({**SRUN, "SLURM_NTASKS": "many", **MASTER}, "SLURM_NTASKS='many' is not an integer; srun should set it"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 is outside 0 ... WORLD_SIZE-1=3"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 is outside"),
        ({**TORCHRUN, "RANK": ""}, "RANK='' is not an integer"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http' is not an integer"),
        (
            SRUN,
            "MASTER_ADDR is not set, and srun does not tell on which host rank 0 runs; export it in the batch script",
        ),
        (MPIRUN, "MASTER_ADDR is not set, and mpirun does not tell on which host rank 0 runs; install mpi4py, or"),
        (
            {**SRUN, **MASTER, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
            "RANK=0 contradicts SLURM_PROCID=5, although srun has started one task per rank (SLURM_NTASKS=8)",
        ),
        ({**SRUN, **MASTER, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is not an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_or_wrong_is_named(environ, words):
    with pytest.raises(LaunchError) as caught:
        detect_launch(environ)
    assert words in str(caught.value)


def test_all_ranks_of_a_job_agree_on_a_port_and_jobs_of_a_host_differ():
    ports = {
        job: {
            detect_launch({**SRUN, **MASTER, "SLURM_PROCID": str(r), "SLURM_JOB_ID": job}).master_port for r in range(8)
        }
        for job in ("100", "101")
    }
    assert all(len(found) == 1 for found in ports.values())
    assert ports["100"] != ports["101"]


def test_what_torch_reads_is_set():
    environ: dict[str, str] = {}
    detect_launch({**SRUN, **MASTER, "MASTER_PORT": "99"}).export(environ)
    assert environ == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "99",
    }
    assert detect_launch(environ).rank == 5


def test_what_deepspeed_compares_is_equal():
    environ = {**MPIRUN_PER_NODE, **ELASTIC}
    detect_launch(environ).export(environ)
    assert environ["OMPI_COMM_WORLD_LOCAL_RANK"] == environ["LOCAL_RANK"] == "1"


def test_free_ports_can_be_listened_on():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "node7.cluster.example"),
        ({**SRUN, "SLURMD_NODENAME": "node7"}, "node7"),
        ({**SRUN, **TORCHRUN, "SLURMD_NODENAME": "node7"}, "node7"),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", **SRUN, "SLURMD_NODENAME": "node7"}, "node7"),
        # its first host's, in all ranks; RANK as we have set it
        ({**MPICH, **SRUN, "RANK": "6", "SLURMD_NODENAME": "node1"}, "node7.cluster.example"),
    ],
    ids=["no Slurm", "srun", "torchrun in Slurm", "srun with PMI", "MPICH in Slurm"],
)
def test_a_host_is_called_as_slurm_calls_it(monkeypatch, environ, expected):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.cluster.example")
    assert host_name(environ) == expected
