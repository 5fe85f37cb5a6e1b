"""Agreement between the processes of a run, outside the training step: the same answer in each of them.

It uses the key-value store of JAX's coordination service, which needs no devices, and whose time-outs name
the missing process. Every process must make the same calls in the same order; a single process needs none.
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


class PeerLost(RuntimeError):
    """Another process of the run has exited, or does not answer."""


class FirstProcessMistake(ValueError):
    """A mistake that process 0 reports; the other processes exit without a message."""


def has_peers() -> bool:
    """Whether this run has several processes."""
    return _STATE["joined"]


def record_start(timeout: float) -> None:
    """Record that jax.distributed has started; timeout: seconds to wait for other processes in a call."""
    _STATE.update(joined=True, timeout=timeout)


def process() -> tuple[int, int]:
    """(number of this process, how many there are), without starting JAX's backend."""
    if not has_peers():
        return 0, 1
    from jax._src.distributed import global_state

    return global_state.process_id, global_state.num_processes


def is_first() -> bool:
    """Whether this is process 0, which prints and writes the run's files."""
    return process()[0] == 0


def say(text: str, file: Any = None) -> None:
    """Print in process 0 only."""
    if is_first():
        print(text, file=file or sys.stdout, flush=True)


def store() -> Any:
    """The key-value store of the run's coordination service."""
    from jax._src.distributed import global_state  # not public; Orbax uses it too

    return global_state.client


def gather(value: Any, occasion: str) -> list[Any]:
    """The values of all processes, in their order, in each of them.

    Args:
        value: this process's value, of JSON types.
        occasion: names the call in messages.

    Raises:
        PeerLost: a process did not answer; names it.
    """
    index, num = process()
    if num == 1:
        return [json.loads(json_text(value))]
    _put(index, value)
    return [_get(i, occasion) for i in range(num)]


def from_first(function: Callable[[], T], occasion: str) -> T:
    """Call `function` in process 0; returns its result (JSON types), or raises its ValueError, in all.

    occasion: names the call in messages. PeerLost when process 0 does not answer.
    """
    index, num = process()
    if num == 1:
        return function()
    if index != 0:
        _STATE["calls"] += 1
        kind, result = _get(0, occasion)
        if kind == "mistake":
            raise FirstProcessMistake(result)
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


def _get(index: int, occasion: str) -> Any:
    key, timeout = _key(_STATE["calls"], index), _STATE["timeout"]
    try:
        return json.loads(store().blocking_key_value_get(key, int(timeout * 1000)))
    except Exception as error:  # the client's classes of errors depend on its version
        raise_lost(f"process {index} did not answer within {timeout:.0f} s ({occasion})", error)


_GONE = re.compile(
    r"gloo|nccl|peer|connection|socket|heartbeat|coordinat|barrier|UNAVAILABLE|ABORTED|DEADLINE",
    re.IGNORECASE,
)


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
    """Exit with EXIT_AGAIN when a collective in the body fails because another process was lost.

    The process exits at once: closing savers and JAX would wait for the lost one.
    """
    try:
        yield
    except PeerLost as error:
        print(f"error: {error}; the last checkpoint is kept", file=sys.stderr)
        leave(EXIT_AGAIN)
    except jax.errors.JaxRuntimeError as error:
        if not has_peers() or not _GONE.search(str(error)):
            raise
        time.sleep(3)  # the lifeline, which knows which process was lost, normally exits first
        reason = str(error).strip().split("\n")[0][:300]
        print(
            f"error: another process was lost ({reason}); the last checkpoint is kept, start the run again",
            file=sys.stderr,
        )
        leave(EXIT_AGAIN)


def leave(code: int, agreed: bool = False) -> NoReturn:
    """Exit at once, and the other processes with the same code: JAX's shutdown would wait for them.

    agreed: the others exit by themselves, for the same reason.
    """
    lifeline.announce_exit(code, agreed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def raise_lost(text: str, error: BaseException) -> NoReturn:
    """Raise PeerLost with the first line of JAX's message."""
    reason = re.sub(r"\s+", " ", str(error).strip().split("\n")[0])[:200]
    raise PeerLost(f"{text}: {reason}") from error
