"""Shared parts of the launchers: the job, its options, commands that are printed or run, exit codes."""

from __future__ import annotations

import dataclasses
import functools
import re
import secrets
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]  # run.py, spmd/, experiments/, requirements/
SCRIPT = ROOT / "run.py"  # absent where the package is installed from a wheel
PROGRAM = (str(SCRIPT),) if SCRIPT.is_file() else ("-m", "spmd.cli")  # the words after `python`

# Exit codes of run.py. Final: 0 finished, 1 failed, 2 a mistake, 130 Ctrl-C. Worth a restart from the last
# checkpoint: 143 stopped by SIGTERM and saved, 75 a peer was lost, 128 + n killed by signal n.
SAVED, LOST, INTERRUPTED = 143, 75, 130
STARTS_AGAIN = (
    f"(( code == {LOST} || (code > 128 && code != {INTERRUPTED}) ))"  # the condition in bash
)


def starts_again(code: int) -> bool:
    """Whether to restart a run that ended with this exit code (not negative)."""
    return code == LOST or (code > 128 and code != INTERRUPTED)


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of every launcher."""

    name: str = ""
    """Name of the job; default: that of the experiment."""
    dry_run: bool = False
    """Print exactly what would run, without running it."""
    follow: bool = False
    """With logs: keep printing until the job ends."""

    def job_name(self, experiment: str) -> str:
        """The name of the job of an experiment."""
        return self.name or experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class CloudOptions(LaunchOptions):
    """Options of launchers where the job's name becomes part of host names."""

    def job_name(self, experiment: str) -> str:
        name = self.name or re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-")
        check(
            re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name) is not None,
            f"--name {name!r}: use up to 40 small letters, digits and -, the first a letter",
        )
        return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run to launch: `run.py train --experiment EXPERIMENT FIELDS`."""

    name: str
    experiment: str  # a name of experiments/, or a path of a .py file
    fields: tuple[str, ...] = ()  # words for run.py, as typed
    extra: tuple[str, ...] = ()  # words after --, for sbatch, gcloud or kubectl
    run_dir: str = ""  # the value of --run.dir

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name) is not None,
            f"--name {self.name!r}: use letters, digits, _ . and -, the first a letter or digit",
        )

    def words(self, experiment: str = "") -> list[str]:
        """The words after run.py."""
        return ["train", "--experiment", experiment or self.experiment, *self.fields]

    @property
    def dir(self) -> Path:
        """Directory for job ids and logs; beside the run directories, not in one."""
        return Path("runs/.launch").absolute() / self.name


class Launcher(Protocol):
    """A place to run; each method returns the exit code of the command line."""

    def start(self, job: Job) -> int: ...
    def stop(self, job: Job) -> int: ...
    def logs(self, job: Job) -> int: ...


@functools.cache
def token() -> str:
    """Random id of this launch, passed to all its starts (SPMD_RUN_TOKEN), so that a restart may take over
    the run directory from an earlier start.
    """
    return secrets.token_hex(8)


def check_plain(option: str, value: str) -> str:
    """Returns an option's value that is passed to a script or a cloud; ValueError unless it is plain
    characters.
    """
    check(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./:@,=+-]*", value) is not None,
        f"{option} {value!r}: use letters, digits and _ . / : @ , = + -",
    )
    return value


def at_least(option: str, value: int, least: int) -> int:
    """Returns the value of an option; ValueError if it is less than `least`."""
    check(value >= least, f"{option} {value} must be at least {least}")
    return value


def check_bucket(job: Job, machines: str) -> None:
    """ValueError unless the run directory is shared by all machines and outlives them."""
    check(
        "://" in job.run_dir,
        f"--run.dir {job.run_dir or '(not given)'}: the disks of {machines} are not shared, and are deleted"
        f" with the machine; give a bucket, for example --run.dir gs://BUCKET/runs/{job.name}",
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """A program and its arguments. A dry run prints the same object that otherwise runs."""

    argv: tuple[str, ...]
    stdin: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def shell(self) -> str:
        """The command as typed in bash."""
        env = [f"{k}={shlex.quote(v)}" for k, v in self.env.items()]
        line = " ".join([*env, shlex.join(self.argv)])
        return f"{line} <<'END'\n{self.stdin.rstrip()}\nEND" if self.stdin else line

    def run(self) -> int:
        """Runs the command in the terminal; returns the exit code (128 + n after signal n)."""
        self.check_installed()
        process = subprocess.run(self.argv, input=self.stdin or None, text=True, check=False)
        return exit_code(process.returncode)

    def read(self) -> tuple[int, str]:
        """Runs the command; returns (exit code, output). Errors go to the terminal."""
        self.check_installed()
        process = subprocess.run(
            self.argv, input=self.stdin or None, text=True, check=False, stdout=subprocess.PIPE
        )
        return exit_code(process.returncode), process.stdout.strip()

    def check_installed(self) -> None:
        """ValueError if the program is not on PATH."""
        program = self.argv[0]
        check(
            shutil.which(program) is not None,
            f"there is no {program} on PATH: run this where it is installed, or see what would run"
            " with --dry-run",
        )


def exit_code(returncode: int) -> int:
    """The exit code of a shell for a returncode of subprocess."""
    return 128 - returncode if returncode < 0 else returncode


def show(*commands: Command | str) -> int:
    """Prints commands and comments as a bash script; returns exit code 0."""
    print("\n".join(c if isinstance(c, str) else c.shell() for c in commands))
    return 0
