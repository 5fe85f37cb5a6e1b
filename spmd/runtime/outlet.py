"""Standard output and error of a run whose terminal, or whose reader, may close."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_GONE = {errno.EIO: "SIGHUP", errno.EPIPE: "SIGPIPE"}  # of a closed terminal, of a closed pipe


def open_standard() -> None:
    """Open standard input, output and error where the process was started without them (`>&-`).

    Otherwise the next file that is opened would get their number, and what is printed would go into it.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def descriptor(stream: Any) -> int | None:
    """The file descriptor of a stream; None where it has none, as in a notebook."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def silence(descriptor: int) -> None:
    """Discard what is still buffered and whatever is printed to `descriptor` later."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


class _Outlet:
    """A proxy of a text stream that calls `on_close` instead of raising once its reader has closed."""

    def __init__(self, stream: Any, on_close: Callable[[int], None]):
        self._stream, self._on_close = stream, on_close

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            silence(self._stream.fileno())
            self._on_close(getattr(signal, _GONE[error.errno]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guard(on_close: Callable[[int], None]) -> Iterator[None]:
    """Call `on_close` with SIGHUP or SIGPIPE when the reader of standard output or error closes.

    Without a terminal, as in `ssh host python run.py ...`, no signal announces the end of a session.
    """
    if threading.current_thread() is not threading.main_thread():  # as with signals
        yield
        return
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Outlet(stream, on_close) for stream in streams)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        for stream in streams:  # the run's last words are said later
            with contextlib.suppress(OSError, ValueError):  # a notebook's has no descriptor
                poll = select.poll()
                poll.register(stream.fileno(), 0)
                if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                    silence(stream.fileno())
