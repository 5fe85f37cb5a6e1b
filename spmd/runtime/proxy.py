"""HTTP proxies and the processes of a run, which reach each other without one.

gRPC, by which JAX's processes talk, sends everything through `http_proxy` and its like, the run's own
processes on the same machine included. What goes to other hosts, such as gs://, keeps its proxy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
# Google's metadata server exists on the machine itself only.
METADATA = ("metadata.google.internal", "metadata", "169.254.169.254")
HERE = ("localhost", "127.0.0.1", "::1")


def bypass(hosts: Iterable[str], env: MutableMapping[str, str] | None = None) -> bool:
    """Has this process, and those that it starts, reach `hosts` without a proxy; other hosts as before.

    Must come before the connection is made. Returns whether the environment names a proxy at all; without
    one, nothing is changed.
    """
    env = os.environ if env is None else env
    if not any(name.lower() in PROXIES and value for name, value in env.items()):
        return False
    hosts = list(hosts)
    for name, before in _lists(env).items():
        entries = [entry.strip() for entry in before.split(",") if entry.strip()]
        entries += [host for host in dict.fromkeys(hosts) if host and host not in entries]
        env[name] = ",".join(entries)
    return True


def _lists(env: MutableMapping[str, str]) -> dict[str, str]:
    """The variables that list what needs no proxy, with their present values.

    gRPC reads no_grpc_proxy before no_proxy. Others read no_proxy or NO_PROXY, in which a lone `*` stands for
    all hosts and is none beside others.
    """
    plain = {name: env[name] for name in ("no_proxy", "NO_PROXY") if name in env} or {
        "no_proxy": ""
    }
    known = {name: value for name, value in plain.items() if value.strip() != "*"}
    return {"no_grpc_proxy": env.get("no_grpc_proxy", env.get("no_proxy", ""))} | known
