"""Start-up of a run of several processes: a roll call at the coordinator, then jax.distributed.

JAX aborts the process when a peer does not join in time, without naming it. So the processes first connect to
the coordinator's port: each sends its number and its facts (versions, configuration) as a line of JSON, and
receives an answer that names missing processes or differing facts. The port then goes to JAX's service.
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
from spmd.parallel.mesh import reserve_threads
from spmd.runtime import RuntimeConfig, agree, detect, platforms, proxy
from spmd.runtime.detect import Member
from spmd.runtime.lifeline import Lifeline, read_line, send_line

_HELLO = 5.0  # seconds in which a caller must send it


class Absent(RuntimeError):
    """Some processes did not join in time."""


def join(config: RuntimeConfig, facts: dict[str, Any]) -> bool:
    """Join the other processes of the run, if any, before JAX's backend starts.

    Args:
        config: this process's place in the run, and time-outs.
        facts: values that must be equal in all processes, as JSON types.

    Returns:
        Whether the run has several processes.

    Raises:
        ValueError: facts differ; names them and the processes.
        Absent: some processes did not join in time.
    """
    proxy.bypass(proxy.METADATA)
    member = detect.find_member(config)
    if member is None or agree.has_peers():
        return agree.has_peers()
    proxied = proxy.bypass([*proxy.HERE, *_hosts(member)])
    deadline = time.monotonic() + config.join_timeout
    bind = member.bind or _listen_address(member)
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

    # JAX's preemption service would catch SIGTERM, and lose one that comes before spmd.runtime.stop is ready.
    jax.config.update("jax_enable_preemption_service", False)
    if proxied:  # JAX's warning does not apply: proxy.bypass has excluded these hosts
        jax.config.update("jax_check_proxy_envs", False)
    reserve_threads(1)
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
    agree.record_start(config.join_timeout)
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
    """Names and addresses of the run's hosts that this process can know: the coordinator, to which JAX's
    processes connect, and the workers of a TPU pod, which libtpu connects.
    """
    host, port = split_address(member.coordinator)
    hosts = {host}
    with contextlib.suppress(OSError):  # it may have no name yet
        hosts |= {str(info[4][0]) for info in socket.getaddrinfo(host, port)}
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS"):
        for entry in os.environ.get(name, "").split(","):
            host_name = (
                re.sub(r":\d+$", "", entry) if entry.count(":") == 1 or "]" in entry else entry
            )
            hosts.add(host_name.strip("[] "))
    return hosts - {""}


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen_address(member: Member) -> str:
    """The default address on which process 0 listens: the coordinator's, not all interfaces.

    A host name that resolves to loopback (Debian's 127.0.1.1 for the host's own name) is the exception: the
    other processes connect from elsewhere, so process 0 listens on all interfaces.
    """
    host, port = split_address(member.coordinator)
    if member.process_id != 0:
        return member.coordinator
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ValueError(
            f"the coordinator {member.coordinator} (from {member.source}) cannot be resolved:"
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


def _call_roll(member: Member, bind: str, hello: dict[str, Any], deadline: float) -> Roll:
    """Receive the hello of every process and answer each; in process 0, whose hello is `hello`."""
    hellos: dict[int, dict[str, Any]] = {0: hello}
    callers: dict[int, socket.socket] = {}
    problem, missing = "", False
    with _listen(bind) as server:
        while len(hellos) < member.num_processes and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                problem, missing = _absent_message(hellos, member.num_processes), True
                break
            greeting = _read_hello(caller)
            if greeting is None:  # no process of the run: a port scan, a health check
                caller.close()
                continue
            problem = _refusal(greeting, hellos, member)
            if problem:
                send_line(caller, {"problem": problem})
                break
            callers[greeting["id"]], hellos[greeting["id"]] = caller, greeting
        problem = problem or _differences(hellos)
    for caller in callers.values():  # the port is closed now, and free for JAX's service
        send_line(caller, {"problem": problem, "missing": missing, "name": hello["host"]})
    _raise_problem(problem, missing)
    return callers, {i: greeting["host"] for i, greeting in hellos.items()}


def _listen(bind: str) -> socket.socket:
    host, port = split_address(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual_stack = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual_stack)
    except OSError as error:
        raise ValueError(
            f"the coordinator cannot listen on {bind}: {error.strerror}; choose another with"
            " --runtime.bind or --runtime.coordinator (SPMD_COORDINATOR)"
        ) from None


def _answer_roll(member: Member, hello: dict[str, Any], deadline: float) -> Roll:
    """Send the hello until process 0 listens, then wait for its answer; in the other processes."""
    host, port = split_address(member.coordinator)
    reason = "no answer"
    while (seconds_left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(seconds_left, 10))
            send_line(connection, hello)
            connection.settimeout(max(deadline + 10 - time.monotonic(), 1))
            answer = read_line(connection)
            if answer is not None and "problem" in answer:
                _raise_problem(str(answer["problem"]), bool(answer.get("missing")))
                return {0: connection}, {0: str(answer.get("name", "?"))}
            connection.close()
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise Absent(
        f"process {member.process_id} did not reach the coordinator {member.coordinator}"
        f" (from {member.source}): {reason}; is process 0 running, and the port open?"
    )


def _read_hello(caller: socket.socket) -> dict[str, Any] | None:
    """The hello of a caller; None if it is not well-formed."""
    try:
        caller.settimeout(_HELLO)
        hello = read_line(caller)
    except OSError:
        return None
    kinds = {"id": int, "of": int, "host": str, "facts": dict}
    if hello is None or any(not isinstance(hello.get(k), kind) for k, kind in kinds.items()):
        return None
    return hello


def _raise_problem(problem: str, missing: bool) -> None:
    if problem and missing:
        raise Absent(problem)
    check(not problem, problem)


def _refusal(hello: dict[str, Any], hellos: dict[int, dict[str, Any]], member: Member) -> str:
    index = hello["id"]
    if hello["of"] != member.num_processes:
        return (
            f"process {index} ({hello['host']}) was configured for {hello['of']} processes, process 0 for"
            f" {member.num_processes}; give all the same runtime.num_processes"
        )
    if index in hellos or not 0 <= index < member.num_processes:
        claimant = f" by {hellos[index]['host']} too" if index in hellos else ""
        return (
            f"process number {index} is claimed by {hello['host']}{claimant}; each process needs its own"
            f" runtime.process_id in 0..{member.num_processes - 1}"
        )
    return ""


def _absent_message(hellos: dict[int, dict[str, Any]], num_processes: int) -> str:
    missing = [i for i in range(num_processes) if i not in hellos]
    names = ", ".join(f"{i} ({hellos[i]['host']})" for i in sorted(hellos))
    return (
        f"of {num_processes} processes, {len(missing)} did not join in time:"
        f" {', '.join(map(str, missing))}. Those that joined: {names}. A longer wait:"
        " --runtime.join-timeout SECONDS"
    )


def _differences(hellos: dict[int, dict[str, Any]]) -> str:
    """A message with a line for each fact in which a process differs from process 0; "" for none."""
    absent = "(absent)"
    lines = [
        f"  process {i} ({hellos[i]['host']}): {key} is {facts.get(key, absent)!r}, in process 0"
        f" {hellos[0]['facts'].get(key, absent)!r}"
        for i in sorted(hellos)
        for facts in [hellos[i]["facts"]]
        for key in sorted({*facts, *hellos[0]["facts"]})
        if facts.get(key, absent) != hellos[0]["facts"].get(key, absent)
    ]
    suffix = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
    head = (
        "the processes of this run were not started alike; give all the same command and versions:"
    )
    return "\n".join([head, *lines[:10]]) + suffix if lines else ""
