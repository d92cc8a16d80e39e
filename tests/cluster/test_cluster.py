"""The shipped batch files and every launcher on two nodes: the losses of one host to the last digit."""

import sys

import pytest
from small_runs import OPTIONS, Run, output_option, srun_job, write_data

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STEPS = 12


@pytest.fixture(scope="module")
def tiny_data(cluster) -> dict[str, str]:
    return write_data(cluster)


@pytest.fixture(scope="module")
def expected(cluster, tiny_data) -> dict[int, float]:
    """The losses of one host."""
    return Run(cluster.folder.parent / "one-host", tiny_data, STEPS).on_one_host(cluster)


def job_of(cluster, run: Run, launcher: str) -> tuple[str, ...]:
    """sbatch's words for one way to start the ranks."""
    output, configs = output_option(cluster), (str(run.config), str(run.deepspeed))
    if launcher == "srun":
        return srun_job(cluster, run)
    if launcher == "deepspeed without ssh":
        return (output, *OPTIONS, "--export=ALL,TASKS_PER_NODE=2", "slurm/pretrain_deepspeed.sbatch", *configs)
    hostfile = run.folder / "hostfile"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    train = f"megagpt.train {' '.join(run.arguments)}"
    deepspeed = f"deepspeed --hostfile {hostfile} --master_addr 10.77.0.11 --master_port 23111"
    passed = "-x PATH -x PYTHONPATH -x OMP_NUM_THREADS -x DS_ACCELERATOR"
    command = {
        "srun and torchrun": "srun torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d "
        f"--rdzv-endpoint=node1:23112 --rdzv-id=1 -m {train}",
        "deepspeed pdsh": f"{deepspeed} --launcher pdsh --no_local_rank --module {train}",
        "deepspeed openmpi": f"{deepspeed} --launcher openmpi --no_ssh_check "
        f'--launcher_args="--bind-to none --oversubscribe {passed}" --module {train}',
        "mpirun": f"mpirun -n 4 --hostfile {hostfile} --oversubscribe --bind-to none "
        f"--mca btl_tcp_if_include eth0 {passed} {sys.executable} -m {train}",
    }[launcher]
    passed_on = run.folder / "deepspeed_env"  # ssh passes no variables
    passed_on.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    variables = f"--export=ALL,DS_ENV_FILE={passed_on}"
    return (output, *OPTIONS, "--ntasks-per-node=1", "--cpus-per-task=2", variables, f"--wrap={command}")


LAUNCHERS = (
    "srun",
    "deepspeed without ssh",
    "srun and torchrun",
    "deepspeed pdsh",
    "deepspeed openmpi",
    "mpirun",
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_give_the_losses_of_one_host(cluster, tiny_data, expected, launcher) -> None:
    run = Run(cluster.folder.parent / launcher.replace(" ", "-"), tiny_data, STEPS)
    job = cluster.submit(*job_of(cluster, run, launcher))
    state = cluster.wait_for(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 180)
    assert state == "COMPLETED", cluster.output(job)
    assert run.losses() == expected
    # torchrun's agents may end while others still talk to their store, and say so; of ranks it would be ours.
    ours = [line for line in cluster.output(job).splitlines() if "torch/distributed/elastic" not in line]
    assert not [line for line in ours if "Traceback" in line], cluster.output(job)
    if launcher == "deepspeed pdsh":
        assert "warning: pdsh will wait for ever for a host that loses its power" in cluster.output(job)
