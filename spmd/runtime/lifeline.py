"""The connections of the roll call, kept open: the kernel closes them as soon as a process exits.

JAX's heartbeats detect that only after their time-out, and abort the process without naming the lost one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
from typing import Any

from spmd.core.storage import json_text
from spmd.runtime import EXIT_AGAIN, EXIT_MISTAKE

_LINE = 1 << 20  # bytes of the longest line
_LIFELINES: list[Lifeline] = []


def read_line(connection: socket.socket) -> dict[str, Any] | None:
    """The next line if it is a JSON object; None for anything else, or at the end."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LINE:
        part = connection.recv(65536)
        if not part:
            return None
        data += part
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def send_line(connection: socket.socket, value: dict[str, Any]) -> None:
    """Sends an object as one line of JSON; a closed connection is no error."""
    with contextlib.suppress(OSError):
        connection.sendall(json_text(value).encode() + b"\n")


class Lifeline:
    """Watches other processes: process 0 watches all and informs them, the others watch process 0.

    connections: by process number; names: `host pid n` of each process. When one exits without announcing
    it, this process exits too, with EXIT_AGAIN or the code that the other one sent.
    """

    def __init__(self, connections: dict[int, socket.socket], names: dict[int, str]):
        self._connections, self._names = dict(connections), names
        self._lock = threading.Lock()
        for connection in connections.values():
            connection.settimeout(30.0)
            _keep_alive(connection)
        _LIFELINES.append(self)
        atexit.register(self.leave, 0)  # before JAX's shutdown: handlers run last in, first out
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self, code: int, agreed: bool = False) -> None:
        """Announce the exit: code 0 lets the others continue, any other makes them exit with it."""
        with self._lock:
            for connection in self._connections.values():
                send_line(connection, {"code": code, "agreed": agreed})

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    line: dict[str, Any] | None = None
                    with contextlib.suppress(OSError):
                        line = read_line(self._connections[key.data])
                    selector.unregister(key.fileobj)
                    if line is None or line.get("code") != 0:
                        self._end(key.data, line or {})

    def _end(self, index: int, line: dict[str, Any]) -> None:
        """Exit, and inform the others: process `index` was lost, or reports another one that was."""
        sent_code = line.get("code")
        code = sent_code if isinstance(sent_code, int) else EXIT_AGAIN
        lost = line.get("gone", index)
        name = line.get("name", self._names.get(index, "?"))
        with self._lock:
            for other, connection in self._connections.items():
                if other != index:
                    send_line(connection, line | {"code": code, "gone": lost, "name": name})
        if line.get("agreed"):
            os._exit(code)
        event = "has left" if "code" in line and "gone" not in line else "is gone"
        text = (
            f"error: process {lost} ({name}) {event}; this one cannot continue without it. The last"
            " checkpoint is kept: start the run again"
        )
        if code == EXIT_MISTAKE:  # a start like this one would end like this one
            text = f"process {lost} ({name}) has ended the run; its own message says why"
        sys.stdout.flush()
        os.write(2, f"\n{text}\n".encode())
        os._exit(code)


def announce_exit(code: int, agreed: bool) -> None:
    """Announce to the other processes that this one exits with `code`."""
    for line in _LIFELINES:
        line.leave(code, agreed)


def _keep_alive(connection: socket.socket) -> None:
    """Detect a host without power, or a broken cable, after about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
