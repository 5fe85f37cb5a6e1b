"""The lock on a run directory: one owner at a time, which a crash cannot leave locked.

On a file system it is `flock` on the file `lock` in the directory: the kernel drops it when the process ends,
however that ends. Where there is no flock (some network file systems), and in an object store, it is a lease
(spmd.train.lease). Either way the file names the owner.
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
_HERE: list[Lock] = []  # held by this process: flock over NFS does not tell its threads apart
_GUARD = threading.Lock()


class Lock:
    """Holds a run directory until `release`.

    Args:
      directory: the run directory; created where there is none, and removed again by `release` if nothing
        else has come into it.

    Raises:
      owner.Busy: another run, of this process or another, holds it; the message names the owner.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: epath.Path):
        self.name = owner.this()
        self._place = _place(directory)
        self._held: _Flock | Lease | None = None
        self._made: list[str] = []
        with _GUARD:
            for other in _HERE:
                if other._place == self._place and other.holds():
                    raise owner.Busy(directory, other.name)
            if not is_remote(directory):
                self._made = _make(directory)
            _HERE.append(self)
        try:
            if not is_remote(directory):
                self._held = _flock(directory / FILE, self.name)
            if self._held is None:
                where = directory / (FILE if is_remote(directory) else LEASE)
                self._held = Lease(where, self.name)
        except BaseException:
            self.release()
            raise

    def holds(self) -> bool:
        """Whether the directory is still the one that was locked, not moved or deleted by hand."""
        return self._held is None or self._held.holds()

    def move(self, rename: Callable[[], epath.Path]) -> None:
        """Calls `rename`, which renames the locked directory, and goes on holding what it returns."""
        assert self._held is not None
        directory = self._held.move(rename)
        self._place, self._made = _place(directory), []

    def release(self) -> None:
        """Gives the directory free; may be called twice."""
        held, self._held = self._held, None
        if held is not None:
            held.release()
        for path in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # only where it is empty
        self._made = []
        with _GUARD:
            if self in _HERE:
                _HERE.remove(self)


def _place(directory: epath.Path) -> str:
    return os.fspath(directory) if is_remote(directory) else os.path.realpath(directory)


def _make(directory: epath.Path) -> list[str]:
    """Creates a directory with its parents; returns what was created, the innermost first."""
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
                os.unlink(self._file)  # while it is held: who has opened it sees that it is gone
        self.close()

    def close(self) -> None:
        """Closes the file, which drops the lock once no copy of it is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _in_child() -> None:
    """A forked child does not keep its parent's lock; what is executed anew closes the file by itself."""
    for lock in _HERE:
        if isinstance(lock._held, _Flock):
            lock._held.close()
        lock._held, lock._made = None, []
    _HERE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


_WITHOUT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


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
        except BlockingIOError:
            os.close(descriptor)
            raise owner.Busy(file.parent, _named(file)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _WITHOUT:
                with contextlib.suppress(OSError):
                    os.unlink(file)
                return None
            raise
        if not _same_file(descriptor, file):  # the owner before has just removed it
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


def _named(file: epath.Path) -> dict[str, Any]:
    """The owner, who writes its name just after it has locked: before, a dead one's may be there."""
    name, found = owner.this(), {}
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = {**json.loads(file.read_text())}
            if owner.relation(found, name) != "ended":
                return found
        time.sleep(0.05)
    return found
