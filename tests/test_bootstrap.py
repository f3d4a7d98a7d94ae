"""Which rank a process is: read from every launcher's environment, and refused by name where it is set in part."""

from __future__ import annotations

import pytest

from muon_dist.run.bootstrap import device_index, find_ranks, first_host, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_a_process_without_a_launcher_is_alone() -> None:
    ranks = find_ranks({"PATH": "/bin", "MASTER_ADDR": "somewhere"})
    assert (ranks.launcher, ranks.rank, ranks.world_size, ranks.local_rank) == ("none", 0, 1, 0)


def test_torchruns_variables() -> None:
    ranks = find_ranks(TORCHRUN)
    assert (ranks.launcher, ranks.rank, ranks.world_size) == ("torchrun", 5, 8)
    assert (ranks.local_rank, ranks.local_world_size, ranks.master_addr, ranks.master_port) == (1, 4, "node1", 29500)


def test_deepspeeds_variables_and_those_set_by_someone_else() -> None:
    bare = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
    ranks = find_ranks({**bare, "LOCAL_SIZE": "4"})
    assert (ranks.launcher, ranks.local_world_size) == ("deepspeed", 4)
    ranks = find_ranks(bare)
    assert (ranks.launcher, ranks.local_world_size) == ("environment", 0)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_torchs_variables_set_in_part_are_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"set in part: .*, but {missing} is not"):
        find_ranks(without(TORCHRUN, missing))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "8", "RANK='8' must be a number from 0 to 7"),
        ("RANK", "-1", "RANK='-1'"),
        ("WORLD_SIZE", "many", "WORLD_SIZE='many'"),
        ("LOCAL_RANK", "4", "LOCAL_RANK='4' must be a number from 0 to 3"),
        ("MASTER_PORT", "99999", "MASTER_PORT='99999'"),
        ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE='9'"),
    ],
)
def test_values_that_can_not_be_are_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_ranks({**TORCHRUN, name: value})


def test_slurms_variables() -> None:
    ranks = find_ranks(SLURM)
    assert (ranks.launcher, ranks.rank, ranks.world_size) == ("slurm", 9, 12)
    assert (ranks.local_rank, ranks.local_world_size, ranks.master_addr) == (1, 4, "gpu07")
    assert 20_000 <= ranks.master_port < 40_000
    other_step = find_ranks({**SLURM, "SLURM_STEP_ID": "3"})
    assert other_step.master_port != ranks.master_port  # two steps of a job may run beside each other
    ranks = find_ranks({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (ranks.master_addr, ranks.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_slurms_variables_set_in_part_are_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match=f"but {missing} is not"):
        find_ranks(without(SLURM, missing))


def test_a_process_in_an_allocation_that_srun_did_not_start_is_refused() -> None:
    batch = without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    with pytest.raises(ValueError, match="SLURM_NTASKS=12 but SLURM_STEP_ID is not set"):
        find_ranks(batch)
    assert find_ranks({**batch, "SLURM_NTASKS": "1"}).launcher == "none"


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert find_ranks({**SLURM, **TORCHRUN}).launcher == "torchrun"


def test_srun_that_speaks_mpi_is_slurm_and_an_mpirun_of_another_size_is_not() -> None:
    assert find_ranks({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "12"}).launcher == "slurm"
    with pytest.raises(ValueError, match=r"PMI_SIZE=24, but mpi4py sees 1 rank"):  # nobody started this test with 24
        find_ranks({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "24"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("login", "login"),
        ("gpu[007-010,12],login", "gpu007"),
        ("a1,a2", "a1"),
        ("rack[1-2]node[03-4],x", "rack1node03"),
        ("n[5]-ib", "n5-ib"),
    ],
)
def test_the_first_host_of_slurms_lists(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world_size", "index"),
    [(0, 3, 8, None), (8, 3, 8, 3), (8, 1, 2, 1), (1, 0, 1, 0), (1, 5, 8, 0), (4, 3, 0, 3)],
)
def test_every_process_has_a_gpu_of_its_own(visible: int, local_rank: int, local_world_size: int, index: int | None) -> None:
    assert device_index(visible, local_rank, local_world_size) == index


@pytest.mark.parametrize(("visible", "local_rank", "local_world_size"), [(2, 5, 8), (2, 0, 8), (4, 4, 0)])
def test_too_few_gpus_are_refused(visible: int, local_rank: int, local_world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"see {visible} GPU\(s\): start as many processes"):
        device_index(visible, local_rank, local_world_size)


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    with pytest.raises(ValueError, match=r"not of the form"):
        tasks_per_node("8x2")
