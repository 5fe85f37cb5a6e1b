"""A lease: ownership that must be renewed, for stores in which the kernel cannot hold a lock.

The owner renews it every 10 s, and exits when no renewal has succeeded for 45 s. Another start watches it,
and may take it over once it has not been renewed for 54 s. Only durations are compared, each on one clock, so
the clocks of the hosts may differ.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from etils import epath

from spmd.core.storage import is_remote, json_text
from spmd.runtime import EXIT_AGAIN, EXIT_FAILED
from spmd.train import owner

SECONDS = 60.0
_RENEW, _GIVE_UP, _EXPIRED = 1 / 6, 0.75, 0.9  # of SECONDS


class ReadLease(NamedTuple):
    """A lease as it was read. version: changes with each renewal. made: identifies an owner's lease."""

    owner: dict[str, Any]
    version: Any
    made: Any


class LeaseLost(Exception):
    """The lease no longer belongs to this owner."""


class LeaseStore(Protocol):
    """Storage of a lease. Each operation is atomic, or safe against concurrent ones."""

    def look(self) -> ReadLease | None:
        """The present lease, or None."""
        ...

    def create(self, name: dict[str, Any]) -> None:
        """Write a lease; FileExistsError where there is one."""
        ...

    def adopt(self, seen: ReadLease) -> None:
        """Take over the lease `seen`, which names this owner."""
        ...

    def renew(self, count: int) -> None:
        """Change the version of this owner's lease; LeaseLost when it does not exist any more."""
        ...

    def remove(self, seen: ReadLease | None = None) -> None:
        """Delete the lease `seen` (default: this owner's), but no later one."""
        ...


class Lease:
    """Holds a file as a lease until `release`; threads renew it and watch the renewals.

    Args:
      file: the lease; its directory exists.
      name: the owner, see spmd.train.owner.
      lost: called once, with the reason and an exit code, when the lease cannot be held any longer. The
        default ends the process: two must not write into one run directory.

    Raises:
      owner.Busy: another process holds it.
    """

    def __init__(
        self,
        file: epath.Path,
        name: dict[str, Any],
        seconds: float = SECONDS,
        lost: Callable[[str, int], None] | None = None,
    ):
        self._where, self._name, self._seconds = file.parent, name, seconds
        self._lost = lost or _leave
        self._place: LeaseStore = _Object(file) if is_remote(file) else _File(file)
        self._ended = threading.Event()
        self._moving = threading.Lock()
        self._renewed = _now()
        self._acquire()
        for work in (self._renew, self._watch):
            threading.Thread(target=work, name="lease", daemon=True).start()

    def _acquire(self) -> None:
        began, announced, first = _now(), False, None
        waited = False
        while True:
            self._renewed = _now()
            with contextlib.suppress(FileExistsError):
                self._place.create(self._name)
            lease = self._place.look()
            if lease is None:
                continue
            if lease.owner.get("token") == self._name["token"]:
                if first is not None and not waited:
                    # Another start that read the expired lease may be about to delete this one instead.
                    waited = True
                    time.sleep(max(self._seconds / 30, 0.3))
                    continue
                return self._place.adopt(lease)
            waited = False
            relation = owner.relation(lease.owner, self._name)
            now = _now()
            if first is None or first[0].made != lease.made:
                first = lease, now
            if relation == "ended" or now - first[1] > self._seconds * _EXPIRED:
                self._place.remove(lease)
                continue
            renewed = lease.version != first[0].version
            if relation == "alive" or (renewed and relation != "ending"):
                raise owner.Busy(self._where, lease.owner)
            if relation == "ending":
                if now - began > owner.ENDING + self._seconds:
                    raise owner.Busy(self._where, lease.owner)
                first = (lease, now) if renewed else first
            if not announced:
                announced = True
                print(
                    f"{self._where} has an owner ({owner.describe(lease.owner)}): waiting up to"
                    f" {self._seconds:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(self._seconds / 60)

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(self._seconds * _RENEW):
            count, began = count + 1, _now()
            try:
                with self._moving:
                    self._place.renew(count)
                self._renewed = began
            except LeaseLost:
                if not self._ended.is_set():
                    self._lose(f"{self._where} {self._taken()}", EXIT_FAILED)
                return
            except Exception:  # errors of the store's client; the next renewal may succeed
                continue

    def _taken(self) -> str:
        with contextlib.suppress(Exception):
            if lease := self._place.look():
                return f"was taken over by {owner.describe(lease.owner)}"
        return "was given free by another process"

    def _watch(self) -> None:
        """Watch the renewals from another thread, since one may hang in the store's client for minutes."""
        while not self._ended.wait(self._seconds / 60):
            if _now() - self._renewed > self._seconds * _GIVE_UP:
                return self._lose(
                    f"the lease on {self._where} could not be renewed for"
                    f" {self._seconds * _GIVE_UP:.0f} s, and another process may take it over",
                    EXIT_AGAIN,
                )
        return None

    def _lose(self, reason: str, code: int) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._lost(reason, code)

    def holds(self) -> bool:
        """True: the process exits when its lease is lost."""
        return True

    def move(self, rename: Callable[[], epath.Path]) -> epath.Path:
        """Call `rename`, which renames the directory of the file, and hold the lease in the new one."""
        assert isinstance(self._place, _File)  # nothing in an object store is renamed
        with self._moving:
            directory = rename()
            self._place.file = directory / self._place.file.name
        return directory

    def release(self) -> None:
        """Release the directory."""
        self._ended.set()
        with contextlib.suppress(Exception):  # it expires
            self._place.remove()


def _now() -> float:
    """Seconds that include suspension of the machine, where the system counts it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _leave(reason: str, code: int) -> None:
    from spmd.runtime import agree

    with contextlib.suppress(OSError):
        os.write(2, f"\nerror: {reason}; the last checkpoint is kept\n".encode())
    agree.leave(code)


class _Object:
    """A lease in Cloud Storage. Each write is made on the condition that the object is still of the
    generation that was seen, which the store decides; a renewal only changes the object's metadata.
    """

    def __init__(self, file: epath.Path):
        import fsspec

        self._store: Any = fsspec.filesystem("gs")
        self._bucket, _, self._name = os.fspath(file).removeprefix("gs://").partition("/")
        self._generation = self._text = ""

    def _call(self, method: str, **options: Any) -> Any:
        return self._store.call(method, "b/{}/o/{}", self._bucket, self._name, **options)

    def look(self) -> ReadLease | None:
        try:
            metadata = self._call("GET", json_out=True)
        except FileNotFoundError:
            return None
        try:
            name = {**json.loads(metadata["metadata"]["owner"])}
        except (KeyError, ValueError, TypeError):
            name = {}  # of an unknown form: it expires
        version = metadata["generation"], metadata["metageneration"]
        return ReadLease(name, version, metadata["generation"])

    def create(self, name: dict[str, Any]) -> None:
        text = json_text(name)
        self._store.pipe_file(
            f"{self._bucket}/{self._name}",
            text.encode(),
            metadata={"owner": text},
            mode="create",
        )

    def adopt(self, seen: ReadLease) -> None:
        self._generation, self._text = seen.made, json_text(seen.owner)

    def renew(self, count: int) -> None:
        try:
            self._call(
                "PATCH",
                json={"metadata": {"owner": self._text, "renewed": str(count)}},
                ifGenerationMatch=self._generation,
            )
        except (FileNotFoundError, FileExistsError) as error:  # FileExistsError: HTTP's 412
            raise LeaseLost from error

    def remove(self, seen: ReadLease | None = None) -> None:
        generation = seen.made if seen else self._generation
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self._call("DELETE", ifGenerationMatch=generation)


class _File:
    """A lease on a file system without flock: created exclusively, renewed through the open file, so that an
    owner that was suspended for too long writes into a deleted file.
    """

    def __init__(self, file: epath.Path):
        self.file = file
        self._own: int | None = None

    def look(self) -> ReadLease | None:
        try:
            with open(self.file) as stream:
                facts, text = os.fstat(stream.fileno()), stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise
        try:
            name = {**json.loads(text)}
        except (ValueError, TypeError):
            name = {}  # about to be written
        identity = facts.st_dev, facts.st_ino
        return ReadLease(name, (*identity, facts.st_mtime_ns, name.get("renewed")), identity)

    def create(self, name: dict[str, Any]) -> None:
        self._own = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._text = name
        os.write(self._own, json_text(name).encode())

    def adopt(self, seen: ReadLease) -> None:
        """Nothing to do: the open file belongs to this owner."""

    def _held(self) -> bool:
        try:
            assert self._own is not None
            return os.path.samestat(os.fstat(self._own), os.stat(self.file))
        except FileNotFoundError:
            return False

    def renew(self, count: int) -> None:
        if not self._held():
            raise LeaseLost
        assert self._own is not None
        text = json_text(self._text | {"renewed": count})
        os.pwrite(self._own, text.encode(), 0)  # never shorter than the text before
        os.utime(self._own)

    def remove(self, seen: ReadLease | None = None) -> None:
        if seen is None:
            if self._held():
                os.unlink(self.file)
            if self._own is not None:
                os.close(self._own)
                self._own = None
            return
        moved = f"{os.fspath(self.file)}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            os.rename(self.file, moved)
        except FileNotFoundError:
            return
        facts = os.stat(moved)
        if (
            facts.st_dev,
            facts.st_ino,
        ) != seen.made:  # another start was faster, and its lease is alive
            with contextlib.suppress(OSError):
                os.link(moved, self.file)
        os.unlink(moved)
