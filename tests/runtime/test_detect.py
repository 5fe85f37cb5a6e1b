"""Where a process finds its place: flags, SPMD_*, Slurm, OpenMPI."""

from __future__ import annotations

import pytest

from spmd.runtime import RuntimeConfig, detect

SLURM = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_NODELIST": "n[03-04,9]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911;tcp6://[fd00::2]:47625",
}
OURS = {"SPMD_COORDINATOR": "h:1234", "SPMD_NUM_PROCESSES": "4", "SPMD_PROCESS_ID": "2"}


def place(env, **fields):
    found = detect.find_member(RuntimeConfig(**fields), env)
    return found and (found.coordinator, found.num_processes, found.process_id, found.local)


def test_alone():
    assert place({}) is None
    assert place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None  # a batch script's own shell
    assert place(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_each_source():
    assert place(OURS) == ("h:1234", 4, 2, (0, 1))
    assert place(SLURM) == (f"n03:{61440 + 70000 % 4096}", 5, 3, (1, 2))
    address, *rest = place(OPENMPI)
    assert address.startswith("10.96.0.1:6") and rest == [2, 1, (1, 2)]


def test_flags_go_before_the_environment_and_both_before_the_scheduler():
    both = SLURM | OURS
    assert place(both)[:3] == ("h:1234", 4, 2)
    assert place(both, num_processes=8, process_id=7, coordinator="g:1")[:3] == ("g:1", 8, 7)
    # only the address is overridden: the numbers stay the scheduler's
    assert place(SLURM | {"SPMD_COORDINATOR": "h:1"})[:3] == ("h:1", 5, 3)


def test_a_requeued_job_takes_another_port():
    first, again = place(SLURM), place(SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert first[0] != again[0]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[001-015],b", "n001"), ("n[7,9]", "n7"), ("n[1-2]-ib", "n1-ib")],
)
def test_first_host(nodes, first):
    assert detect.first_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "fields", "message"),
    [
        (
            {"SPMD_NUM_PROCESSES": "2"},
            {},
            "missing: --runtime.coordinator (SPMD_COORDINATOR), --run",
        ),
        (OURS | {"SPMD_PROCESS_ID": "4"}, {}, "process_id=4 must be in 0..3"),
        (OURS | {"SPMD_PROCESS_ID": "x"}, {}, "SPMD_PROCESS_ID='x' must be a number"),
        (OURS | {"SPMD_COORDINATOR": "h"}, {}, "'h' is no host:port"),
        (OURS, {"bind": "0.0.0.0"}, "runtime.bind='0.0.0.0' is no host:port"),
        (OURS, {"coordinator": "h:99999"}, "no host:port"),
        ({k: v for k, v in OPENMPI.items() if "uri" not in k}, {}, "set SPMD_COORDINATOR"),
    ],
)
def test_mistakes(env, fields, message):
    with pytest.raises(ValueError) as error:
        place(env, **fields)
    assert message in str(error.value)


def test_gpus_of_a_host_are_shared_out():
    assert detect.local_gpus((0, 1), 8) is None
    assert detect.local_gpus((3, 4), 1) is None  # the scheduler has given one to each
    assert detect.local_gpus((1, 2), 8) == [4, 5, 6, 7]
    assert [detect.local_gpus((i, 4), 4) for i in range(4)] == [[0], [1], [2], [3]]
    with pytest.raises(ValueError, match="8 GPUs of this host do not divide over its 3 processes"):
        detect.local_gpus((0, 3), 8)
