"""A lease: ownership that must be renewed, for places where the kernel cannot hold a lock.

The owner renews it every tenth of a minute and gives up, ending its process, when that has not worked for
45 s. Another start watches it, and may take it over once it has not been renewed for 54 s. Only durations are
compared, each on one clock, so the clocks of the hosts may differ.
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


class Seen(NamedTuple):
    """A lease as it was read. version: changes with each renewal. made: identifies one owner's lease."""

    owner: dict[str, Any]
    version: Any
    made: Any


class Gone(Exception):
    """The lease is no longer this owner's."""


class LeaseStore(Protocol):
    """Where a lease lies. The store decides each of these at once, or they are safe against each other."""

    def look(self) -> Seen | None:
        """The lease that is there, or None."""
        ...

    def create(self, name: dict[str, Any]) -> None:
        """Writes a lease; FileExistsError where there is one."""
        ...

    def adopt(self, seen: Seen) -> None:
        """Takes the lease that was seen for this owner's."""
        ...

    def renew(self, count: int) -> None:
        """Changes the version of this owner's lease; Gone when it is not there any more."""
        ...

    def remove(self, seen: Seen | None = None) -> None:
        """Deletes the lease that was seen (default: this owner's), and none that came after it."""
        ...


class Lease:
    """Holds a file as a lease until `release`; threads renew it and watch that it is renewed.

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
        began, said, first = _now(), False, None
        settled = False
        while True:
            self._renewed = _now()
            with contextlib.suppress(FileExistsError):
                self._place.create(self._name)
            seen = self._place.look()
            if seen is None:
                continue
            if seen.owner.get("token") == self._name["token"]:
                if first is not None and not settled:
                    # Another that saw the dead lease may be about to delete this one in its place.
                    settled = True
                    time.sleep(max(self._seconds / 30, 0.3))
                    continue
                return self._place.adopt(seen)
            settled = False
            how = owner.relation(seen.owner, self._name)
            now = _now()
            if first is None or first[0].made != seen.made:
                first = seen, now
            if how == "ended" or now - first[1] > self._seconds * _EXPIRED:
                self._place.remove(seen)
                continue
            renewed = seen.version != first[0].version
            if how == "alive" or (renewed and how != "ending"):
                raise owner.Busy(self._where, seen.owner)
            if how == "ending":
                if now - began > owner.ENDING + self._seconds:
                    raise owner.Busy(self._where, seen.owner)
                first = (seen, now) if renewed else first
            if not said:
                said = True
                print(
                    f"{self._where} has an owner ({owner.described(seen.owner)}): waiting up to"
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
            except Gone:
                if not self._ended.is_set():
                    self._lose(f"{self._where} {self._taken()}", EXIT_FAILED)
                return
            except Exception:  # the store's client has errors of its own; the next try may succeed
                continue

    def _taken(self) -> str:
        with contextlib.suppress(Exception):
            if seen := self._place.look():
                return f"was taken over by {owner.described(seen.owner)}"
        return "was given free by another process"

    def _watch(self) -> None:
        """A renewal may hang in the store's client for minutes: this thread does not wait for it."""
        while not self._ended.wait(self._seconds / 60):
            if _now() - self._renewed > self._seconds * _GIVE_UP:
                return self._lose(
                    f"the lease on {self._where} could not be renewed for"
                    f" {self._seconds * _GIVE_UP:.0f} s, and another process may take it over",
                    EXIT_AGAIN,
                )
        return None

    def _lose(self, why: str, code: int) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._lost(why, code)

    def holds(self) -> bool:
        """True: the threads of a lease end the process when it is lost."""
        return True

    def move(self, rename: Callable[[], epath.Path]) -> epath.Path:
        """Calls `rename`, which renames the directory of the file, and follows it."""
        assert isinstance(self._place, _File)  # nothing in an object store is renamed
        with self._moving:
            directory = rename()
            self._place.file = directory / self._place.file.name
        return directory

    def release(self) -> None:
        """Gives the directory free."""
        self._ended.set()
        with contextlib.suppress(Exception):  # it expires
            self._place.remove()


def _now() -> float:
    """Seconds that count while the machine is suspended too, where the system tells them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _leave(why: str, code: int) -> None:
    from spmd.runtime import agree

    with contextlib.suppress(OSError):
        os.write(2, f"\nerror: {why}; the last checkpoint stands\n".encode())
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

    def _call(self, method: str, **how: Any) -> Any:
        return self._store.call(method, "b/{}/o/{}", self._bucket, self._name, **how)

    def look(self) -> Seen | None:
        try:
            found = self._call("GET", json_out=True)
        except FileNotFoundError:
            return None
        try:
            name = {**json.loads(found["metadata"]["owner"])}
        except (KeyError, ValueError, TypeError):
            name = {}  # not one of ours: it expires
        version = found["generation"], found["metageneration"]
        return Seen(name, version, found["generation"])

    def create(self, name: dict[str, Any]) -> None:
        text = json_text(name)
        self._store.pipe_file(
            f"{self._bucket}/{self._name}",
            text.encode(),
            metadata={"owner": text},
            mode="create",
        )

    def adopt(self, seen: Seen) -> None:
        self._generation, self._text = seen.made, json_text(seen.owner)

    def renew(self, count: int) -> None:
        try:
            self._call(
                "PATCH",
                json={"metadata": {"owner": self._text, "renewed": str(count)}},
                ifGenerationMatch=self._generation,
            )
        except (FileNotFoundError, FileExistsError) as error:  # FileExistsError: HTTP's 412
            raise Gone from error

    def remove(self, seen: Seen | None = None) -> None:
        made = seen.made if seen else self._generation
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self._call("DELETE", ifGenerationMatch=made)


class _File:
    """A lease on a file system without flock: created exclusively, renewed through the open file, so that an
    owner that was away for too long writes into what nobody reads any more.
    """

    def __init__(self, file: epath.Path):
        self.file = file
        self._own: int | None = None

    def look(self) -> Seen | None:
        try:
            with open(self.file) as opened:
                facts, text = os.fstat(opened.fileno()), opened.read()
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
        made = facts.st_dev, facts.st_ino
        return Seen(name, (*made, facts.st_mtime_ns, name.get("renewed")), made)

    def create(self, name: dict[str, Any]) -> None:
        self._own = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._text = name
        os.write(self._own, json_text(name).encode())

    def adopt(self, seen: Seen) -> None:
        """The open file is this owner's."""

    def _held(self) -> bool:
        try:
            assert self._own is not None
            return os.path.samestat(os.fstat(self._own), os.stat(self.file))
        except FileNotFoundError:
            return False

    def renew(self, count: int) -> None:
        if not self._held():
            raise Gone
        assert self._own is not None
        text = json_text(self._text | {"renewed": count})
        os.pwrite(self._own, text.encode(), 0)  # never shorter than the text before
        os.utime(self._own)

    def remove(self, seen: Seen | None = None) -> None:
        if seen is None:
            if self._held():
                os.unlink(self.file)
            if self._own is not None:
                os.close(self._own)
                self._own = None
            return
        aside = f"{os.fspath(self.file)}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        facts = os.stat(aside)
        if (facts.st_dev, facts.st_ino) != seen.made:  # another was quicker, and this one is alive
            with contextlib.suppress(OSError):
                os.link(aside, self.file)
        os.unlink(aside)
