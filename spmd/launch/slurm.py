"""A Slurm job that requeues itself: render, submit and stop its script, show its output."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

from spmd.launch import base
from spmd.launch.base import Command, Job, check, check_plain

# SIGTERM is sent to the steps (no `B:`), `grace` seconds or up to a minute more before the time limit: they
# save and exit with 143. The exit code of srun is not enough: when a task ends, it kills the others and
# reports those. A task with a final exit code therefore writes it to a file, from a shell that survives
# SIGTERM.
SCRIPT = """\
#!/bin/bash
{directives}
set -uo pipefail

final={state}/$SLURM_JOB_ID.final
rm -f "$final"
# shellcheck disable=SC2016  # expanded by each task
srun --kill-on-bad-exit=1 {srun}bash -c 'trap : TERM INT; final=$1; shift; "$@"; code=$?
  (( code == 0 )) || {starts_again} || echo "$code" >> "$final"
  exit "$code"' task "$final" \\
  {command}
code=$?
if [[ -s $final ]]; then code=$(head -n 1 "$final"); fi
rm -f "$final"

# 143: saved; 75: a peer was lost; above 128: killed. Anything else is the end.
count=${{SLURM_RESTART_COUNT:-0}}
if {starts_again} && (( count < {restarts} )); then
  echo "launch: exit code $code; requeued, restart $(( count + 1 )) of at most {restarts}"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60  # which ends this script
fi
echo "launch: ended with exit code $code"
exit "$code"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm(base.LaunchOptions):
    """A job on a Slurm cluster. Words after -- are passed to sbatch."""

    nodes: int = 1
    """Number of nodes."""
    processes_per_node: int = 1
    """Processes per node."""
    gpus_per_node: int = 0
    """GPUs per node; 0 requests none."""
    cpus_per_process: int = 0
    """CPU cores per process; 0: the cluster's default."""
    time: str = ""
    """Time limit in Slurm's format, for example 4:00:00; empty: that of the partition."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    account: str = ""
    """Account; empty: the user's default."""
    restarts: int = 20
    """Largest number of restarts after the job saved at the time limit, was killed or lost a peer."""
    grace: int = 120
    """Seconds before the time limit at which the run saves and stops."""
    python: str = sys.executable
    """Python on the nodes."""

    def start(self, job: Job) -> int:
        """Submits the script; prints the job's number."""
        submit = Command(("sbatch", "--parsable", *job.extra), stdin=self.script(job))
        if self.dry_run:
            return base.show(Command(("mkdir", "-p", str(job.dir))), submit)
        submit.check_installed()
        job.dir.mkdir(parents=True, exist_ok=True)
        code, printed = submit.read()
        if code:
            return code
        number = printed.split(";")[0]  # "12;cluster" on a federation
        (job.dir / "job").write_text(number + "\n")
        print(
            f"launch: submitted {job.name} as job {number}; output in {self._output(job, number)}"
        )
        return 0

    def stop(self, job: Job) -> int:
        """Cancels the job: the steps get SIGTERM, and the cluster's KillWait (30 s by default) to save."""
        command = Command(("scancel", self._number(job)))
        return base.show(command) if self.dry_run else command.run()

    def logs(self, job: Job) -> int:
        """Prints the output of the last submitted job, with all its starts."""
        file = self._output(job, self._number(job))
        check(self.dry_run or file.exists(), f"{file} does not exist yet: the job has not started")
        command = Command(("tail", "--lines=+1", *(["--follow"] * self.follow), str(file)))
        return base.show(command) if self.dry_run else command.run()

    def script(self, job: Job) -> str:
        """The batch script."""
        words = [self.python, *base.PROGRAM, *job.words()]
        cpus = f"--cpus-per-task={self.cpus_per_process} " if self.cpus_per_process else ""
        return SCRIPT.format(
            directives="\n".join(f"#SBATCH {word}" for word in self._directives(job)),
            state=shlex.quote(str(job.dir)),
            srun=cpus,  # since Slurm 22.05, srun does not inherit it from sbatch
            command=shlex.join(words),
            restarts=base.at_least("--restarts", self.restarts, 0),
            starts_again=base.STARTS_AGAIN,
        )

    def _directives(self, job: Job) -> list[str]:
        nodes = base.at_least("--nodes", self.nodes, 1)
        tasks = base.at_least("--processes-per-node", self.processes_per_node, 1)
        gpus = base.at_least("--gpus-per-node", self.gpus_per_node, 0)
        cpus = base.at_least("--cpus-per-process", self.cpus_per_process, 0)
        check(
            gpus % tasks == 0,
            f"--gpus-per-node {gpus} does not divide by --processes-per-node {tasks}",
        )
        check(0 <= self.grace <= 65535, f"--grace {self.grace} must be between 0 and 65535")
        check(
            re.fullmatch(r"(\d+(-\d+)?(:\d+){0,2})?", self.time) is not None,
            f"--time {self.time!r}: write minutes, hours:minutes:seconds or days-hours",
        )
        options = {
            "job-name": job.name,
            "nodes": nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": gpus,
            "cpus-per-task": cpus,
            "time": self.time,
            "partition": self.partition and check_plain("--partition", self.partition),
            "account": self.account and check_plain("--account", self.account),
            "chdir": directive_path(Path.cwd()),
            "output": directive_path(self._output(job, "%j")),
            "open-mode": "append",
            "signal": f"TERM@{self.grace}",
        }
        return ["--requeue", *[f"--{key}={value}" for key, value in options.items() if value]]

    def _output(self, job: Job, number: str) -> Path:
        return job.dir / f"slurm-{number}.log"

    def _number(self, job: Job) -> str:
        """The number of the job, as recorded by start()."""
        file = job.dir / "job"
        check(file.exists(), f"no job {job.name!r} was submitted from here (no {file})")
        return check_plain("job number", file.read_text().strip())


def directive_path(path: Path) -> str:
    """A path for an #SBATCH line, quoted for sbatch, which is not a shell and replaces %x."""
    text = str(path)
    bad = sorted(set(re.findall(r"[\"'\\\n]|%(?!j\.log$)", text)))
    check(
        not bad,
        f"the directory {text!r} has {' '.join(bad)} in its name, which sbatch misreads",
    )
    return f'"{text}"' if " " in text else text
