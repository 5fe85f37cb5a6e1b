"""Failures of saving: collected from all processes, and reported with the checkpoint that is kept."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator

from etils import epath

from spmd.runtime import agree
from spmd.train.checkpoint import reading, steps


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message names the one that is kept and what to do."""


def await_save(step: int, future: concurrent.futures.Future[None]) -> str:
    """Wait for this process's part of a save, or for the failure of another; returns the error or ""."""
    key = f"spmd/save/{step}"
    while not concurrent.futures.wait([future], 1.0 if agree.has_peers() else None).done:
        with contextlib.suppress(Exception):  # nothing said yet
            return agree.store().key_value_try_get(key)
    error = future.exception()
    if error is None:
        return ""
    if agree.has_peers():
        agree.store().key_value_set(key, reading.first_line(error), allow_overwrite=True)
    return reading.first_line(error)


def save_failed(directory: epath.Path, action: str, reason: str) -> SaveFailed:
    """The exception to raise; removes the incomplete step, which would only fill the disk."""
    if agree.is_first():
        steps.remove_unfinished(directory)
    disk_error = reading.FULL.search(reason)
    present = steps.list_steps(directory)
    remaining = (
        f"the checkpoint of step {present[-1]} is kept" if present else "there is no checkpoint"
    )
    remedy = "Make room" if disk_error else "Remove the cause"
    return SaveFailed(
        f"cannot {action}: {disk_error[0] if disk_error else reason}; {remaining}. {remedy} and type the same"
        " command"
    )


@contextlib.contextmanager
def translate_disk_full(directory: epath.Path) -> Iterator[None]:
    """Raise SaveFailed for the OSError of a full or read-only disk."""
    try:
        yield
    except OSError as error:
        if not reading.FULL.search(str(error)):
            raise
        action = f"write {error.filename or directory}"
        raise save_failed(directory / "checkpoints", action, str(error)) from error
