"""The lock on a run directory: one owner at a time, released by a crash too.

On a file system it is `flock` on the file `lock` in the directory: the kernel drops it when the process ends.
Where there is no flock (some network file systems), and in an object store, it is a lease (spmd.train.lease).
Both files name the owner.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from spmd.core.storage import is_remote, json_text
from spmd.train import owner
from spmd.train.lease import Lease

FILE, LEASE = "lock", "lease"
FILES = {FILE, LEASE}
_LOCKS: list[Lock] = []  # held by this process: flock over NFS does not distinguish its threads
_GUARD = threading.Lock()


class Lock:
    """Holds a run directory until `release`.

    Args:
      directory: the run directory; created if it does not exist, and removed by `release` if it is empty.

    Raises:
      owner.Busy: another run, of this process or another, holds it; the message names the owner.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: epath.Path):
        self.name = owner.this_process()
        self._place = _real_path(directory)
        self._held: _Flock | Lease | None = None
        self._made: list[str] = []
        with _GUARD:
            for lock in _LOCKS:
                if lock._place == self._place and lock.holds():
                    raise owner.Busy(directory, lock.name)
            if not is_remote(directory):
                self._made = _make_directory(directory)
            _LOCKS.append(self)
        try:
            if not is_remote(directory):
                self._held = _flock(directory / FILE, self.name)
            if self._held is None:
                file = directory / (FILE if is_remote(directory) else LEASE)
                self._held = Lease(file, self.name)
        except BaseException:
            self.release()
            raise

    def holds(self) -> bool:
        """Whether the directory is still the one that was locked, not moved or deleted by hand."""
        return self._held is None or self._held.holds()

    def move(self, rename: Callable[[], epath.Path]) -> None:
        """Call `rename`, which renames the locked directory, and hold the new one, which it returns."""
        assert self._held is not None
        directory = self._held.move(rename)
        self._place, self._made = _real_path(directory), []

    def release(self) -> None:
        """Release the directory; may be called twice."""
        holder, self._held = self._held, None
        if holder is not None:
            holder.release()
        for path in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # fails unless it is empty
        self._made = []
        with _GUARD:
            if self in _LOCKS:
                _LOCKS.remove(self)


def _real_path(directory: epath.Path) -> str:
    return os.fspath(directory) if is_remote(directory) else os.path.realpath(directory)


def _make_directory(directory: epath.Path) -> list[str]:
    """Create a directory with its parents; returns those created, the innermost first."""
    missing, path = [], os.fspath(directory)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    return missing


class _Flock:
    """An exclusive lock on an open file, and the owner's name in it."""

    def __init__(self, descriptor: int, file: epath.Path):
        self._descriptor, self._file = descriptor, file

    def holds(self) -> bool:
        return _same_file(self._descriptor, self._file)

    def move(self, rename: Callable[[], epath.Path]) -> epath.Path:
        directory = rename()
        self._file = directory / FILE
        return directory

    def release(self) -> None:
        if self.holds():
            with contextlib.suppress(OSError):
                os.unlink(
                    self._file
                )  # while locked: a process that has opened it sees that it was removed
        self.close()

    def close(self) -> None:
        """Close the file, which drops the lock once no copy of its descriptor is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _forget_in_child() -> None:
    """Drop the parent's locks in a forked child; an executed program closes the file by itself."""
    for lock in _LOCKS:
        if isinstance(lock._held, _Flock):
            lock._held.close()
        lock._held, lock._made = None, []
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


_WITHOUT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def _flock(file: epath.Path, name: dict[str, Any]) -> _Flock | None:
    """Lock a file; None where the file system or the platform has no flock. Busy names the owner."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        os.makedirs(file.parent, exist_ok=True)  # the previous owner may have removed it meanwhile
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise owner.Busy(file.parent, _read_owner(file)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _WITHOUT:
                with contextlib.suppress(OSError):
                    os.unlink(file)
                return None
            raise
        if not _same_file(descriptor, file):  # the previous owner has removed it meanwhile
            os.close(descriptor)
            continue
        with contextlib.suppress(OSError):  # a full disk: locked, without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json_text(name).encode())
        return _Flock(descriptor, file)


def _same_file(descriptor: int, file: epath.Path) -> bool:
    try:
        return descriptor >= 0 and os.path.samestat(os.fstat(descriptor), os.stat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _read_owner(file: epath.Path) -> dict[str, Any]:
    """The owner in a locked file; waits for its name, which replaces that of a dead owner."""
    name, facts = owner.this_process(), {}
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, TypeError):
            facts = {**json.loads(file.read_text())}
            if owner.relation(facts, name) != "ended":
                return facts
        time.sleep(0.05)
    return facts
