"""Start-up of a run of several processes: a roll call at the coordinator, then jax.distributed.

JAX aborts the process when a peer does not come in time, and names nobody. So the processes first meet at the
coordinator's own port: each says its number and its facts (versions, configuration) as one line of JSON, and
all get one answer, who is missing or what differs. The port is then handed to JAX's service.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import sys
import time
from typing import Any

from spmd.core.fields import check
from spmd.runtime import RuntimeConfig, agree, detect, platforms, proxy
from spmd.runtime.detect import Member
from spmd.runtime.lifeline import Lifeline, read_line, send_line

_HELLO = 5.0  # seconds that a caller has to say it


class Absent(RuntimeError):
    """Not every process came in time."""


def join(config: RuntimeConfig, facts: dict[str, Any]) -> bool:
    """Joins the run's other processes, if there are any; must come before JAX's backend starts.

    facts: what must be equal in all processes, as JSON types; ValueError names what differs and where.
    Returns whether the run has several processes. Absent when some did not come.
    """
    proxy.bypass(proxy.METADATA)
    member = detect.member(config)
    if member is None or agree.joined():
        return agree.joined()
    proxied = proxy.bypass([*proxy.HERE, *_hosts(member)])
    deadline = time.monotonic() + config.join_timeout
    bind = member.bind or _own_address(member)
    hello = {
        "id": member.process_id,
        "of": member.num_processes,
        "host": f"{socket.gethostname()} pid {os.getpid()}",
        "facts": facts,
    }
    if member.process_id == 0:
        connections, names = _call_roll(member, bind, hello, deadline)
    else:
        connections, names = _answer_roll(member, hello, deadline)

    import jax

    # JAX would take SIGTERM for itself, and tell nobody who does not ask it: a signal that comes before
    # ours is caught (spmd.runtime.stop) would be lost.
    jax.config.update("jax_enable_preemption_service", False)
    if proxied:  # else JAX would warn of what is dealt with
        jax.config.update("jax_check_proxy_envs", False)
    gpus = detect.local_gpus(member.local, _num_gpus())
    jax.distributed.initialize(
        member.coordinator,
        member.num_processes,
        member.process_id,
        local_device_ids=gpus,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind,
        initialization_timeout=max(int(config.join_timeout), 1),
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=max(int(config.join_timeout), 1),
    )
    platforms.mute_gloo()
    agree.started(config.join_timeout)
    Lifeline(connections, names)
    return True


def _num_gpus() -> int:
    """GPUs that this process may see, without starting a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([x for x in visible.split(",") if x.strip()])
    with contextlib.suppress(OSError):
        return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    return 0


def _hosts(member: Member) -> set[str]:
    """Names and addresses of this run's hosts, as far as this process can know them: that of the coordinator,
    to which JAX's processes connect, and those of a TPU pod's workers, which libtpu connects.
    """
    host, port = split_address(member.coordinator)
    hosts = {host}
    with contextlib.suppress(OSError):  # it may have no name yet
        hosts |= {str(found[4][0]) for found in socket.getaddrinfo(host, port)}
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS"):
        for entry in os.environ.get(name, "").split(","):
            named = re.sub(r":\d+$", "", entry) if entry.count(":") == 1 or "]" in entry else entry
            hosts.add(named.strip("[] "))
    return hosts - {""}


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _own_address(member: Member) -> str:
    """Where process 0 listens when nothing is said: the coordinator's own address, not all interfaces.

    Only where the name points at loopback although it was not written so (Debian's 127.0.1.1 for a host's own
    name) do the others come from elsewhere, and all interfaces are the one choice that works.
    """
    host, port = split_address(member.coordinator)
    if member.process_id != 0:
        return member.coordinator
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ValueError(
            f"the coordinator {member.coordinator} (from {member.found}) cannot be resolved:"
            f" {error.strerror}; give --runtime.coordinator (SPMD_COORDINATOR) as host:port"
        ) from None
    literal = host == "localhost" or host == address
    if ipaddress.ip_address(str(address)).is_loopback and not literal:
        print(
            f"coordinator: {host} is {address} here, so it listens on all interfaces; choose one with"
            " --runtime.bind (SPMD_COORDINATOR_BIND)",
            file=sys.stderr,
        )
        return f"[::]:{port}" if socket.has_ipv6 else f"0.0.0.0:{port}"
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


# ---- the roll call

Roll = tuple[dict[int, socket.socket], dict[int, str]]  # connections and names, by process number


def _call_roll(member: Member, bind: str, own: dict[str, Any], deadline: float) -> Roll:
    """Process 0: hears everyone, answers everyone."""
    came: dict[int, dict[str, Any]] = {0: own}
    callers: dict[int, socket.socket] = {}
    problem, missing = "", False
    with _listen(bind) as server:
        while len(came) < member.num_processes and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                problem, missing = _absent(came, member.num_processes), True
                break
            hello = _read(caller)
            if hello is None:  # not one of ours: a port scan, a health check
                caller.close()
                continue
            problem = _refused(hello, came, member)
            if problem:
                send_line(caller, {"problem": problem})
                break
            callers[hello["id"]], came[hello["id"]] = caller, hello
        problem = problem or _differences(came)
    for caller in callers.values():  # the port is free now, for JAX's service
        send_line(caller, {"problem": problem, "missing": missing, "name": own["host"]})
    _raise(problem, missing)
    return callers, {i: hello["host"] for i, hello in came.items()}


def _listen(bind: str) -> socket.socket:
    host, port = split_address(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"the coordinator cannot listen on {bind}: {error.strerror}; choose another with"
            " --runtime.bind or --runtime.coordinator (SPMD_COORDINATOR)"
        ) from None


def _answer_roll(member: Member, hello: dict[str, Any], deadline: float) -> Roll:
    """The others: say hello until someone listens, then wait for the answer."""
    host, port = split_address(member.coordinator)
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10))
            send_line(connection, hello)
            connection.settimeout(max(deadline + 10 - time.monotonic(), 1))
            answer = read_line(connection)
            if answer is not None and "problem" in answer:
                _raise(str(answer["problem"]), bool(answer.get("missing")))
                return {0: connection}, {0: str(answer.get("name", "?"))}
            connection.close()
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(0.2)
    raise Absent(
        f"process {member.process_id} did not reach the coordinator {member.coordinator}"
        f" (from {member.found}): {why}; is process 0 running, and the port open?"
    )


def _read(caller: socket.socket) -> dict[str, Any] | None:
    """A well-formed hello, else None."""
    try:
        caller.settimeout(_HELLO)
        hello = read_line(caller)
    except OSError:
        return None
    kinds = {"id": int, "of": int, "host": str, "facts": dict}
    if hello is None or any(not isinstance(hello.get(k), kind) for k, kind in kinds.items()):
        return None
    return hello


def _raise(problem: str, missing: bool) -> None:
    if problem and missing:
        raise Absent(problem)
    check(not problem, problem)


def _refused(hello: dict[str, Any], came: dict[int, dict[str, Any]], member: Member) -> str:
    index = hello["id"]
    if hello["of"] != member.num_processes:
        return (
            f"process {index} ({hello['host']}) was told of {hello['of']} processes, process 0 of"
            f" {member.num_processes}; give all the same runtime.num_processes"
        )
    if index in came or not 0 <= index < member.num_processes:
        other = f" by {came[index]['host']} too" if index in came else ""
        return (
            f"process number {index} is claimed by {hello['host']}{other}; each process needs its own"
            f" runtime.process_id in 0..{member.num_processes - 1}"
        )
    return ""


def _absent(came: dict[int, dict[str, Any]], num_processes: int) -> str:
    missing = [i for i in range(num_processes) if i not in came]
    names = ", ".join(f"{i} ({came[i]['host']})" for i in sorted(came))
    return (
        f"of {num_processes} processes, {len(missing)} did not come in time:"
        f" {', '.join(map(str, missing))}. Those that came: {names}. A longer wait:"
        " --runtime.join-timeout SECONDS"
    )


def _differences(came: dict[int, dict[str, Any]]) -> str:
    """The facts in which a process differs from process 0, a line each."""
    absent = "(absent)"
    lines = [
        f"  process {i} ({came[i]['host']}): {key} is {theirs.get(key, absent)!r}, in process 0"
        f" {came[0]['facts'].get(key, absent)!r}"
        for i in sorted(came)
        for theirs in [came[i]["facts"]]
        for key in sorted({*theirs, *came[0]["facts"]})
        if theirs.get(key, absent) != came[0]["facts"].get(key, absent)
    ]
    more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
    head = (
        "the processes of this run were not started alike; give all the same command and versions:"
    )
    return "\n".join([head, *lines[:10]]) + more if lines else ""
