"""Processes of a run: start-up, agreement between them, stopping, hung hosts; with their configuration."""

from __future__ import annotations

import dataclasses

from spmd.core.fields import check, free

EXIT_FAILED = 1
"""The run cannot continue: the loss diverged, the disk is full."""
EXIT_MISTAKE = 2
"""The user's mistake; a restart would end the same way."""
EXIT_AGAIN = 75
"""A process was lost or hung, or the grace period ended: the last checkpoint is kept, restart the run
(EX_TEMPFAIL of sysexits.h). A run that a signal stopped has saved, and exits with 128 + signal."""

LONGEST = 1_000_000  # seconds to wait, which in milliseconds is an int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Processes of a run: their addresses, and time-outs."""

    coordinator: str = free("")
    """host:port of process 0; empty is $SPMD_COORDINATOR, else that of Slurm, OpenMPI, a TPU pod or GKE."""
    num_processes: int = free(0)
    """Processes of the run; 0 is $SPMD_NUM_PROCESSES, else as detected."""
    process_id: int = free(-1)
    """Number of this process; -1 is $SPMD_PROCESS_ID, else as detected."""
    bind: str = free("")
    """host:port where process 0 listens; empty is $SPMD_COORDINATOR_BIND, else the coordinator's address."""
    join_timeout: float = free(300.0)
    """Time-out in seconds for peers to join or to answer."""
    heartbeat_timeout: int = free(60)
    """Seconds without a heartbeat after which a process counts as lost."""
    hang_timeout: float = free(900.0)
    """Seconds without a step, batch or save after which a process exits, to be restarted; 0 is off."""
    grace: float = free(30.0)
    """Seconds from SIGTERM or Ctrl-C to the exit: stopping at a common step, saving, exiting."""

    def __post_init__(self) -> None:
        check(
            self.num_processes >= 0,
            f"runtime.num_processes={self.num_processes} must be at least 1",
        )
        for name in ("join_timeout", "heartbeat_timeout", "grace"):
            value = getattr(self, name)
            check(value > 0, f"runtime.{name}={value} must be more than 0")
        for name in ("join_timeout", "heartbeat_timeout", "hang_timeout", "grace"):
            value = getattr(self, name)
            check(value <= LONGEST, f"runtime.{name}={value} must be at most {LONGEST} seconds")
        check(
            self.hang_timeout >= 0, f"runtime.hang_timeout={self.hang_timeout} must not be negative"
        )
