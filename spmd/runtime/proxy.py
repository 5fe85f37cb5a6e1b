"""Exclude the processes of a run from HTTP proxies.

gRPC, with which JAX's processes communicate, sends everything through `http_proxy` and its like, even to
processes on the same machine. Connections to other hosts, such as gs://, keep their proxy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
# Google's metadata server exists on the machine itself only.
METADATA = ("metadata.google.internal", "metadata", "169.254.169.254")
HERE = ("localhost", "127.0.0.1", "::1")


def bypass(hosts: Iterable[str], env: MutableMapping[str, str] | None = None) -> bool:
    """Exclude `hosts` from the proxies of this process and of those that it starts, before they connect.

    Returns whether the environment names a proxy; without one, nothing is changed.
    """
    env = os.environ if env is None else env
    if not any(name.lower() in PROXIES and value for name, value in env.items()):
        return False
    hosts = list(hosts)
    for name, listed in _lists(env).items():
        entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
        entries += [host for host in dict.fromkeys(hosts) if host and host not in entries]
        env[name] = ",".join(entries)
    return True


def _lists(env: MutableMapping[str, str]) -> dict[str, str]:
    """The variables that list hosts without a proxy, with their present values.

    gRPC reads no_grpc_proxy before no_proxy. Others read no_proxy or NO_PROXY, in which `*` means all hosts
    only as the single entry.
    """
    plain = {name: env[name] for name in ("no_proxy", "NO_PROXY") if name in env} or {
        "no_proxy": ""
    }
    usable = {name: value for name, value in plain.items() if value.strip() != "*"}
    return {"no_grpc_proxy": env.get("no_grpc_proxy", env.get("no_proxy", ""))} | usable
