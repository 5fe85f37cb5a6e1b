"""A real Slurm with two nodes on this machine: starts it in a directory, ends it."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "sinfo")
TEMPLATE = Path(__file__).parent / "slurm.conf"
SBIN = (
    f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"  # where daemons are, often off PATH
)


def missing() -> str:
    """The first program that is not installed; "" when a cluster can be started."""
    return next((p for p in PROGRAMS if shutil.which(p, path=SBIN) is None), "")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_together:  # so that they differ
        sockets = [open_together.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """A running cluster; `env` is what its commands need."""

    def __init__(self, directory: Path):
        self.dir = directory
        self.env = os.environ | {"PATH": SBIN, "SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *argv: str, check: bool = True) -> str:
        """A command of Slurm; its output."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)

    def until(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"still {job['JobState']}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self) -> str:
        """The last lines of every daemon."""
        return "\n".join(
            f"{file.name}:\n" + "\n".join(file.read_text().splitlines()[-15:])
            for file in sorted((self.dir / "log").iterdir())
        )


@contextlib.contextmanager
def start() -> Iterator[Cluster]:
    """Munge and three daemons, all as this user; ended and removed at the end."""
    directory = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # short: sockets have at most 108 characters
    daemons: list[subprocess.Popen[bytes]] = []
    cluster = Cluster(directory)

    def daemon(name: str, *argv: str) -> None:
        with (directory / "log" / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [name, *argv],
                env=cluster.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        daemons.append(process)

    try:
        for name in ("state", "spool/n1", "spool/n2", "log", "munge"):
            (directory / name).mkdir(parents=True, mode=0o700)
        controller, node1, node2 = free_ports(3)
        (directory / "slurm.conf").write_text(
            TEMPLATE.read_text()
            .replace("{dir}", str(directory))
            .replace("{user}", getpass.getuser())
            .replace("{controller}", str(controller))
            .replace("{node1}", str(node1))
            .replace("{node2}", str(node2))
        )
        for index in range(
            8
        ):  # files in place of devices: enough for Slurm to count and to hand out
            (directory / f"gpu{index}").touch()
        (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-7]\n")
        munge = directory / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        files = {name: munge / name for name in ("key-file", "pid-file", "seed-file", "log-file")}
        files["key-file"] = munge / "key"
        daemon(
            *("munged", "--foreground", "--force", f"--socket={munge / 'socket'}"),
            *(f"--{option}={file}" for option, file in files.items()),
        )
        _wait(cluster, lambda: (munge / "socket").exists())
        daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node)
        _wait(cluster, lambda: cluster.run("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2")
        yield cluster
    finally:
        if len(daemons) == 4:  # else steps would outlive the daemons
            cluster.run("scancel", f"--user={getpass.getuser()}", check=False)
            _wait(cluster, lambda: not cluster.run("squeue", "--noheader", check=False))
        for process in reversed(daemons):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait(cluster: Cluster, ready) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, f"the cluster did not start\n{cluster.logs()}"
        time.sleep(0.2)
