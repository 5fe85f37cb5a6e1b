"""The claim of a training run on its directory: locked at the start, written once a first step has run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from spmd.core.fields import check
from spmd.core.storage import is_remote
from spmd.train import rundir
from spmd.train.lock import Lock


class Claim:
    """In process 0: holds the run directory until `release`.

    Args:
      path: the run directory.
      name: of the experiment.
      config: the resolved configuration as JSON types.
      identity: flat identity fields, those of the data left out, which is not open yet.
      known: `defaults` and `located`, as rundir.same_identity takes them.

    Raises:
      rundir.Refused: the directory holds something else, or another run.
      owner.Busy: another process is training in it.
    """

    def __init__(
        self,
        path: epath.Path,
        name: str,
        config: dict[str, Any],
        identity: dict[str, Any],
        *,
        fresh: bool,
        amend: bool,
        known: Mapping[str, Any],
    ):
        self._path, self._name, self._config = path, name, config
        self._fresh, self._known = fresh, known
        self._cannot: OSError | None = None
        self._lock: Lock | None = None
        inspect = lambda: rundir.inspect(path, identity, fresh=fresh, amend=amend, **known)
        inspect()  # before the lock makes a directory
        try:
            self._lock = Lock(path)
        except OSError as error:  # a finished run may well lie where nothing can be written
            if is_remote(path):
                with rundir.writing(path):
                    raise
            self._cannot = error
        try:
            self.changes = inspect()  # the owner before may just have written it
        except BaseException:
            self.release()
            raise

    @property
    def resumes(self) -> bool:
        """Whether there is a run that goes on."""
        return not self._fresh and rundir.holds_run(self._path)

    def same_saved(
        self, about: Mapping[str, Any], identity: dict[str, Any], known: Mapping[str, Any]
    ) -> None:
        """rundir.Refused when a checkpoint is that of another run."""
        changes: Collection[str] = self.changes
        rundir.same_saved(self._path, about, identity, **known, changes=changes)

    def begin(self, identity: dict[str, Any], step: int) -> None:
        """Moves an old run aside where that was asked for, and writes config.json.

        Args:
          identity: flat identity fields, those of the data among them.
          step: where the run begins or goes on.
        """
        if self._cannot is not None:
            with rundir.writing(self._path):
                raise self._cannot
        if self._fresh and rundir.holds_run(self._path):
            old, self._lock = self._lock, None
            assert old is not None
            try:
                old.move(lambda: rundir.move_aside(self._path))
                self._lock = Lock(self._path)
            finally:
                old.release()
            self._fresh = False
        rundir.create(self._path)
        amended = rundir.recorded(self._path).get("amended", [])
        if self.changes:
            when = time.strftime("%Y-%m-%d %H:%M:%S %z")
            amended.append({"step": step, "time": when, "changes": self.changes})
        rundir.record(self._path, self._name, self._config, identity, amended)

    def check(self) -> None:
        """ValueError when the directory was moved or deleted by hand: its run must not come back there."""
        check(
            self._lock is None or self._lock.holds(),
            f"{self._path} was moved, deleted or replaced while this run was training in it; nothing more is"
            " written",
        )

    def release(self) -> None:
        """Gives the directory free."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
