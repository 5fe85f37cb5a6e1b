"""Which processes make up the run: from flags, our environment, Slurm, OpenMPI, TPU pods and GKE."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from spmd.core.fields import check
from spmd.runtime import RuntimeConfig


class Member(NamedTuple):
    """Rank and peers of a process.

    source: where these come from, for messages. local: (rank on its host, processes on that host).
    """

    coordinator: str
    num_processes: int
    process_id: int
    bind: str
    source: str
    local: tuple[int, int] = (0, 1)


_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9_.\-]+):(\d{1,5})")
_DYNAMIC_PORTS = (
    61440,
    4096,
)  # first, how many: a job's number chooses the coordinator's port among these


def find_member(config: RuntimeConfig, env: Mapping[str, str] | None = None) -> Member | None:
    """This process's place in the run; None for a single process. ValueError when it is incomplete."""
    env = os.environ if env is None else env
    explicit = _explicit(config, env)
    bind = config.bind or env.get("SPMD_COORDINATOR_BIND", "")
    member = explicit or _slurm(env) or _openmpi(env) or _tpu(env, config.join_timeout)
    if member is None or member.num_processes == 1:
        return None
    check(
        0 <= member.process_id < member.num_processes,
        f"runtime.process_id={member.process_id} must be in 0..{member.num_processes - 1}"
        f" (runtime.num_processes={member.num_processes}, from {member.source})",
    )
    coordinator = config.coordinator or env.get("SPMD_COORDINATOR", "") or member.coordinator
    for name, value in (("coordinator", coordinator), ("bind", bind)):
        check(
            (name == "bind" and not value) or is_address(value),
            f"runtime.{name}={value!r} is no host:port, for example 10.0.0.1:8476 (from {member.source})",
        )
    return member._replace(coordinator=coordinator, bind=bind)


def is_address(text: str) -> bool:
    """Whether `text` is host:port."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[1]) < 65536


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    check(
        not text or re.fullmatch(r"\d+", text) is not None,
        f"the environment variable {name}={text!r} must be a number",
    )
    return int(text) if text else default


def _explicit(config: RuntimeConfig, env: Mapping[str, str]) -> Member | None:
    """The place given by flags, else by SPMD_*; both numbers must be given, or none."""
    num = config.num_processes or _number(env, "SPMD_NUM_PROCESSES", 0)
    index = config.process_id if config.process_id >= 0 else _number(env, "SPMD_PROCESS_ID", -1)
    coordinator = config.coordinator or env.get("SPMD_COORDINATOR", "")
    if not num and index < 0:
        return None
    settings = {
        "--runtime.coordinator (SPMD_COORDINATOR)": coordinator,
        "--runtime.num-processes (SPMD_NUM_PROCESSES)": num or "",
        "--runtime.process-id (SPMD_PROCESS_ID)": index if index >= 0 else "",
    }
    missing = [name for name, value in settings.items() if value == ""]
    check(
        not missing or num == 1,
        f"a run of several processes needs {', '.join(settings)}; missing: {', '.join(missing)}",
    )
    local = (_number(env, "SPMD_LOCAL_ID", 0), _number(env, "SPMD_LOCAL_PROCESSES", 1))
    return Member(coordinator, num, index, "", "flags or SPMD_*", local)


def _coordinator_port(job: int) -> int:
    first, count = _DYNAMIC_PORTS
    return first + job % count


def _slurm(env: Mapping[str, str]) -> Member | None:
    """The place of a process that srun started; None in a bare allocation (salloc, a batch script)."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in env for name in needed):
        return None
    number = lambda name, default=0: _number(env, name, default)
    port = _coordinator_port(number("SLURM_JOB_ID") + number("SLURM_RESTART_COUNT"))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 2(x3),1: of this node, or of the first
    counts = [
        int(count)
        for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", tasks)
        for _ in range(int(times or 1))
    ]
    node = min(number("SLURM_NODEID"), len(counts) - 1)
    return Member(
        f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        number("SLURM_STEP_NUM_TASKS"),
        number("SLURM_PROCID"),
        "",
        "Slurm",
        (number("SLURM_LOCALID"), counts[node]),
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `n[01-04,7],m2` -> `n01`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],\-]+)[^\]]*\]([^,\[]*))?", nodes)
    check(match is not None, f"SLURM_STEP_NODELIST={nodes!r} is no node list")
    assert match
    return match[1] + (match[2] or "") + (match[3] or "")


def _openmpi(env: Mapping[str, str]) -> Member | None:
    """The place of a rank that mpirun (Open MPI 4 or 5) started; the coordinator is mpirun's host."""
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911;tcp6://[fd00::2]:47625
    uri = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PRTE_MCA_prte_hnp_uri", "")
    host = re.search(r"tcp4?://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    job = sum(map(int, re.findall(r"\d+", uri.partition(";")[0])))
    number = lambda name, default: _number(env, name, default)
    address = host[1] or f"[{host[2]}]" if host else ""
    return Member(
        f"{address}:{_coordinator_port(job // _DYNAMIC_PORTS[1] + job)}" if address else "",
        number("OMPI_COMM_WORLD_SIZE", 1),
        number("OMPI_COMM_WORLD_RANK", 0),
        "",
        "OpenMPI (where mpirun does not say its own address, set SPMD_COORDINATOR)",
        (number("OMPI_COMM_WORLD_LOCAL_RANK", 0), number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
    )


def _tpu(env: Mapping[str, str], timeout: float) -> Member | None:
    """The place of a worker of a TPU pod, on a TPU VM or in GKE, as JAX detects it."""
    platforms = env.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or env is not os.environ:
        return None
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm:
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

    for cluster in (GkeTpuCluster, GceTpuCluster):
        if cluster.is_env_present():
            num = cluster.get_process_count()
            if num == 1:
                return None
            port = env.get("JAX_COORDINATOR_PORT")
            return Member(
                cluster.get_coordinator_address(int(timeout), port),
                num,
                cluster.get_process_id(),
                "",
                "the TPU pod",
            )
    return None


def local_gpus(local: tuple[int, int], num_gpus: int) -> list[int] | None:
    """Indices of the host's GPUs that this process takes where several share it; None: all of them."""
    index, count = local
    if (
        count == 1 or num_gpus <= 1
    ):  # a single process, or the scheduler has assigned one GPU to each
        return None
    check(
        num_gpus % count == 0,
        f"{num_gpus} GPUs of this host do not divide over its {count} processes; start 1 process per"
        f" GPU, or a count that divides {num_gpus}",
    )
    share = num_gpus // count
    return list(range(index * share, (index + 1) * share))
