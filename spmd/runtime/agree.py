"""Agreement between the processes of a run, outside the training step: the same answer in each of them.

Through the key-value store of JAX's coordination service: it needs no devices, and a wait that ends too late
can say who did not come. Every process must make the same calls in the same order. Alone, each is trivial.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

from spmd.core.storage import json_text
from spmd.runtime import EXIT_AGAIN, lifeline

T = TypeVar("T")

_STATE: dict[str, Any] = {"joined": False, "timeout": 300.0, "calls": 0}


class Lost(RuntimeError):
    """Another process of the run is gone, or does not answer."""


class SaidByFirst(ValueError):
    """A mistake that process 0 has found and reports; the others end with it, quietly."""


def joined() -> bool:
    """Whether this run has several processes."""
    return _STATE["joined"]


def started(timeout: float) -> None:
    """Called once, when jax.distributed stands; timeout: seconds to wait for the others in a call."""
    _STATE.update(joined=True, timeout=timeout)


def process() -> tuple[int, int]:
    """(number of this process, how many); (0, 1) alone. Does not start JAX's backend."""
    if not joined():
        return 0, 1
    from jax._src.distributed import global_state

    return global_state.process_id, global_state.num_processes


def is_first() -> bool:
    """Whether this process is the one that prints and writes the run's files."""
    return process()[0] == 0


def say(text: str, file: Any = None) -> None:
    """Prints once for the whole run."""
    if is_first():
        print(text, file=file or sys.stdout, flush=True)


def store() -> Any:
    """The key-value store of the run's coordination service."""
    from jax._src.distributed import global_state  # no public way in; Orbax takes the same

    return global_state.client


def gather(value: Any, what: str) -> list[Any]:
    """The JSON value of each process, in their order, in all of them. Lost names those who did not come.

    what: names the occasion in messages.
    """
    index, num = process()
    if num == 1:
        return [json.loads(json_text(value))]
    _put(index, value)
    return [_get(i, what) for i in range(num)]


def from_first(function: Callable[[], T], what: str) -> T:
    """Process 0 calls `function`; all get its result (JSON types), or end with its ValueError."""
    index, num = process()
    if num == 1:
        return function()
    if index != 0:
        _STATE["calls"] += 1
        kind, result = _get(0, what)
        if kind == "mistake":
            raise SaidByFirst(result)
        return result
    try:
        result = function()
    except ValueError as error:
        _put(0, ("mistake", str(error)))
        raise
    _put(0, ("result", result))
    return result


def _key(call: int, index: int) -> str:
    return f"spmd/agree/{call}/{index}"


def _put(index: int, value: Any) -> None:
    _STATE["calls"] += 1
    store().key_value_set(_key(_STATE["calls"], index), json_text(value))


def _get(index: int, what: str) -> Any:
    key, timeout = _key(_STATE["calls"], index), _STATE["timeout"]
    try:
        return json.loads(store().blocking_key_value_get(key, int(timeout * 1000)))
    except Exception as error:  # the client raises its own kinds, by version
        lost(f"process {index} did not answer within {timeout:.0f} s ({what})", error)


_GONE = re.compile(
    r"gloo|nccl|peer|connection|socket|heartbeat|coordinat|barrier|UNAVAILABLE|ABORTED|DEADLINE",
    re.IGNORECASE,
)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Ends the process with EXIT_AGAIN when a collective failed for want of another process.

    Nothing can be closed in order then: savers and JAX itself would wait for the lost one.
    """
    try:
        yield
    except Lost as error:
        print(f"error: {error}; the last checkpoint stands", file=sys.stderr)
        leave(EXIT_AGAIN)
    except jax.errors.JaxRuntimeError as error:
        if not joined() or not _GONE.search(str(error)):
            raise
        time.sleep(3)  # the lifeline hears of it too, knows who it was, and ends this process first
        said = str(error).strip().split("\n")[0][:300]
        print(
            f"error: another process was lost ({said}); the last checkpoint stands, start the run again",
            file=sys.stderr,
        )
        leave(EXIT_AGAIN)


def leave(code: int, agreed: bool = False) -> NoReturn:
    """Ends this process at once, and the others with the same code: JAX's good-bye would wait for them.

    agreed: the others know why, and leave too.
    """
    lifeline.leaving(code, agreed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(text: str, error: BaseException) -> NoReturn:
    """Raises Lost with the first line of what JAX said."""
    said = re.sub(r"\s+", " ", str(error).strip().split("\n")[0])[:200]
    raise Lost(f"{text}: {said}") from error
