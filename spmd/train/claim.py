"""The claim of a training run on its directory: locked at the start, written after the first step."""

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
    """Holds the run directory until `release`, in process 0.

    Args:
      path: the run directory.
      name: of the experiment.
      config: the resolved configuration as JSON types.
      identity: flat identity fields, without those of the data, which is not open yet.
      known: `defaults` and `located`, as rundir.check_identity takes them.

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
        except OSError as error:  # the directory of a finished run may be read-only
            if is_remote(path):
                with rundir.translate_write_errors(path):
                    raise
            self._cannot = error
        try:
            self.changes = inspect()  # again: the previous owner may have written it meanwhile
        except BaseException:
            self.release()
            raise

    @property
    def resumes(self) -> bool:
        """Whether the directory holds a run that continues."""
        return not self._fresh and rundir.holds_run(self._path)

    def check_saved(
        self, about: Mapping[str, Any], identity: dict[str, Any], known: Mapping[str, Any]
    ) -> None:
        """Check a checkpoint's metadata: rundir.Refused when another run saved it."""
        changes: Collection[str] = self.changes
        rundir.check_saved(self._path, about, identity, **known, changes=changes)

    def begin(self, identity: dict[str, Any], step: int) -> None:
        """Move an old run aside if `fresh`, and write config.json.

        Args:
          identity: flat identity fields, those of the data among them.
          step: at which the run begins or continues.
        """
        if self._cannot is not None:
            with rundir.translate_write_errors(self._path):
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
        amended = rundir.read_config(self._path).get("amended", [])
        if self.changes:
            when = time.strftime("%Y-%m-%d %H:%M:%S %z")
            amended.append({"step": step, "time": when, "changes": self.changes})
        rundir.write_config(self._path, self._name, self._config, identity, amended)

    def check(self) -> None:
        """ValueError when the directory was moved or deleted: the run must not create it again."""
        check(
            self._lock is None or self._lock.holds(),
            f"{self._path} was moved, deleted or replaced while this run was training in it; nothing more is"
            " written",
        )

    def release(self) -> None:
        """Release the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
