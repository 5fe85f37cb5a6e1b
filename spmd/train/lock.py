"""The lock on a run directory: one owner at a time, which a crash cannot leave locked.

On a file system it is `flock` on the file `lock` in the directory: the kernel drops it when the process ends,
however that ends. Where there is no flock (some network file systems), and in an object store, it is a lease:
the owner rewrites the file every LEASE / 4 seconds. A lease whose file does not change for LEASE seconds has
lost its owner and may be taken over; an owner that cannot renew it for so long, or finds another's name in
it, leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from spmd.runtime import EXIT_AGAIN
from spmd.storage import is_remote

FILE = "lock"
LEASE = 60.0  # seconds
# Set by launchers: the job, the same for all its starts, and the number of the start. Slurm has its own.
JOB = ("SPMD_RUN_TOKEN", "SLURM_JOB_ID")
ATTEMPT = ("SPMD_RUN_ATTEMPT", "SLURM_RESTART_COUNT")


class Busy(ValueError):
    """Another process owns the run directory."""


def owner() -> dict[str, Any]:
    """This process, as the lock file names it."""
    first = lambda names: next(filter(None, map(os.environ.get, names)), "")
    attempt = first(ATTEMPT)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "job": first(JOB),
        "attempt": int(attempt) if attempt.isdecimal() else 0,
        "token": uuid.uuid4().hex,
    }


def busy(path: Any, found: dict[str, Any]) -> Busy:
    """The refusal; found: the owner, {} where the file does not say."""
    who = (
        f"process {found['pid']} on {found['host']}, since {found['since']}"
        if {"pid", "host", "since"} <= found.keys()
        else "another process"
    )
    return Busy(
        f"{path} is in use by {who}: wait for it or stop it (kill -TERM saves first), or choose another"
        " directory with --run.dir"
    )


class Lock:
    """Holds a run directory until `release`.

    Args:
      directory: the run directory; created where there is none, and removed again by `release` if nothing
        else has come into it.

    Raises:
      Busy: another process holds it; the message names the owner.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: epath.Path):
        self._file = directory / FILE
        self._owner = owner()
        self._held: _Flock | _Lease | None = None
        self._made = [] if is_remote(directory) else _make(directory)
        try:
            if not is_remote(directory):
                self._held = _flock(self._file, self._owner)
            if self._held is None:
                self._held = _Lease(self._file, self._owner)
        except BaseException:
            self._remove_made()
            raise

    def moved(self, directory: epath.Path) -> None:
        """Follows the directory, which the owner has renamed to `directory`, until it is released."""
        self._file, self._made = directory / FILE, []
        assert self._held is not None
        self._held.file = self._file

    def release(self) -> None:
        """Gives the directory free; may be called twice."""
        held, self._held = self._held, None
        if held is not None:
            held.release()
            self._remove_made()

    def _remove_made(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # only where it is empty


def _make(directory: epath.Path) -> list[str]:
    """Creates a directory with its parents; returns what was created, the innermost first."""
    missing, path = [], os.fspath(directory)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    return missing


def _read(file: epath.Path) -> dict[str, Any]:
    try:
        return {**json.loads(file.read_text())}
    except (OSError, ValueError, TypeError):
        return {}


class _Flock:
    """An exclusive lock on an open file, and the owner's name in it."""

    def __init__(self, descriptor: int, file: epath.Path):
        self._descriptor, self.file = descriptor, file

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.file)  # while it is held: who opened it meanwhile sees that it is gone
        os.close(self._descriptor)


def _flock(file: epath.Path, name: dict[str, Any]) -> _Flock | None:
    """None where the file system or the platform has no flock."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        os.makedirs(file.parent, exist_ok=True)  # the owner before may just have removed it
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(name).encode())
                return _Flock(descriptor, file)
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise busy(file.parent, _named(file)) from None
        except OSError:
            os.close(descriptor)
            return None


def _same_file(descriptor: int, file: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _named(file: epath.Path) -> dict[str, Any]:
    """The owner, who writes its name just after it has locked."""
    for _ in range(10):
        if found := _read(file):
            return found
        time.sleep(0.05)
    return {}


class _Lease:
    """A file that its owner rewrites in a thread of its own.

    Creating an object is atomic in Cloud Storage, and so is O_EXCL on a file system. To take over one that
    has expired is to delete it and to create it anew; of several that try, one creates it.
    """

    def __init__(
        self,
        file: epath.Path,
        name: dict[str, Any],
        seconds: float | None = None,
        lost: Callable[[str], None] | None = None,
    ):
        self.file, self._name = file, name
        self._seconds = LEASE if seconds is None else seconds
        self._lost = lost or _leave
        self._count = 0
        self._ended = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _text(self) -> str:
        self._count += 1
        return json.dumps(self._name | {"renewed": self._count})

    def _acquire(self) -> None:
        first: tuple[dict[str, Any], float] | None = None
        while not _create(self.file, self._text()):
            found, now = _read(self.file), time.monotonic()
            if _earlier_start(found, self._name):  # its launcher knows that it is dead
                self._take_over(found)
            elif first is None:
                first = found, now
                print(
                    f"{self.file.parent} has an owner: waiting up to {self._seconds:.0f} s for a sign of"
                    " life",
                    file=sys.stderr,
                    flush=True,
                )
            elif found and found != first[0]:
                raise busy(self.file.parent, found)
            elif now - first[1] > self._seconds:
                self._take_over(found)
            else:
                time.sleep(min(1.0, self._seconds / 20))
        time.sleep(min(1.0, self._seconds / 20))  # for another that took it over at the same time
        if _read(self.file).get("token") != self._name["token"]:
            raise busy(self.file.parent, _read(self.file))

    def _take_over(self, found: dict[str, Any]) -> None:
        if _read(self.file).get("token") == found.get("token"):
            with contextlib.suppress(FileNotFoundError):
                self.file.unlink()

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(self._seconds / 4):
            try:
                found = _read(self.file)
                if found and found.get("token") != self._name["token"]:
                    return self._lost(
                        f"{self.file.parent} was taken over by process {found.get('pid')} on"
                        f" {found.get('host')}"
                    )
                self.file.write_text(self._text())
                renewed = time.monotonic()
            except Exception as error:  # the store's client has errors of its own
                if time.monotonic() - renewed > self._seconds * 0.8:
                    return self._lost(f"the lease on {self.file.parent} cannot be renewed: {error}")
        return None

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if _read(self.file).get("token") == self._name["token"]:
            with contextlib.suppress(Exception):
                self.file.unlink()


def _earlier_start(found: dict[str, Any], name: dict[str, Any]) -> bool:
    """Whether the owner is an earlier start of the same launched job."""
    same = bool(name["job"]) and found.get("job") == name["job"]
    return same and found.get("attempt", 0) < name["attempt"]


def _create(file: epath.Path, text: str) -> bool:
    """Creates a file with a text; False where there is one."""
    if not is_remote(file):
        try:
            with open(file, "x") as opened:
                opened.write(text)
            return True
        except FileExistsError:
            return False
    import fsspec

    store: Any = fsspec.filesystem("gs")
    if file.exists():
        return False
    try:
        store.pipe_file(os.fspath(file).removeprefix("gs://"), text.encode(), mode="create")
        return True
    except FileExistsError:
        return False
    except Exception as error:
        if "412" in str(error) or "precondition" in str(error).lower():
            return False
        raise


def _leave(why: str) -> None:
    """Ends the process: two must not write into one directory."""
    from spmd.runtime import agree

    print(f"error: {why}; the last checkpoint stands", file=sys.stderr, flush=True)
    agree.leave(EXIT_AGAIN)
