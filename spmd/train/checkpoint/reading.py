"""Read a saved step, without other processes: its arrays, their types, whether they are good."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from etils import epath

from spmd.core import digest, paths, tree
from spmd.core.fields import check
from spmd.runtime import agree
from spmd.train.checkpoint import steps, stripes

DIGESTS = "digests"  # an additional leaf beside those of the state

# Errors that another attempt, or another machine, may not have: no reason to quarantine a checkpoint.
_PASSING = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|PERMISSION_DENIED|Permission denied|UNAVAILABLE"
    r"|UNAUTHENTICATED|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system", re.I
)


def is_digest(name: str) -> bool:
    """Whether a leaf of a checkpoint holds digests of others."""
    return name == DIGESTS or name.startswith(stripes.PREFIX)


def describe_differences(names: list[str], where: Mapping[str, str] = MappingProxyType({})) -> str:
    """Message about leaves whose digests differ from the stored ones; "" for none. where: of some of them, in
    which part.
    """
    suffix = f" and {len(names) - 3} more" if len(names) > 3 else ""
    shown = [name + where.get(name, "") for name in names[:3]]
    return f"the digest of {', '.join(shown)}{suffix} differs" if names else ""


def verify(path: epath.Path) -> tuple[str, str]:
    """Verify a step on the host, one array at a time: (its fault or "", a description)."""
    # Before any backend starts: verification needs no accelerator, which may be in use.
    jax.config.update("jax_platforms", "cpu")
    try:
        if bad := steps.check_manifest(path):
            return bad, ""
        with jax.enable_x64(True):
            return _verify_arrays(path)
    except Exception as error:
        check(not is_transient(error), f"cannot read {path} now: {first_line(error)}")
        return f"unreadable: {first_line(error)}", ""


def _verify_arrays(path: epath.Path) -> tuple[str, str]:
    leaves = stored_types(path)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    size = 0

    def read_leaf(name: str) -> jax.Array:
        abstract: dict[str, Any] = dict.fromkeys(leaves, ...)  # Orbax leaves these out
        abstract[name] = jax.ShapeDtypeStruct(*leaves[name], sharding=host)
        return load(path, abstract)[name]

    names = sorted(name for name in leaves if not is_digest(name))
    digests = np.asarray(read_leaf(DIGESTS)) if DIGESTS in leaves else None
    wrong, where = [], dict[str, str]()
    for i, name in enumerate(names):
        leaf = read_leaf(name)
        size += leaf.nbytes
        if digests is not None:
            differences = digest.find_differences({name: leaf}, digests[i : i + 1])
            wrong += differences
            if differences and stripes.PREFIX + name in leaves:
                where[name] = stripes.describe(name, leaf, read_leaf(stripes.PREFIX + name))
    verdict = "readable, without digests to verify it"
    if digests is not None:
        verdict = f"verified by digests{' and manifest' if steps.has_manifest(path) else ''}"
    return describe_differences(
        wrong, where
    ), f"{len(names)} arrays, {tree.human_bytes(size)}, {verdict}"


def align_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """`{wanted name: stored name}` of arrays whose position in the optimizer's chain differs.

    optax numbers all parts of a chain, even those without state: switching clipping on moves the momentum
    from opt_state.0 to opt_state.1. Empty where the names agree, or do not agree under any numbering.
    """

    def by_order(names: Iterable[str]) -> dict[tuple[str, ...], str]:
        parts = {name: name.split(".") for name in names}
        chain = {
            n: p for n, p in parts.items() if p[0] == "opt_state" and p[1:2] and p[1].isdigit()
        }
        order = sorted({int(p[1]) for p in chain.values()})
        key = lambda n, p: (p[0], f"#{order.index(int(p[1]))}", *p[2:]) if n in chain else tuple(p)
        return {key(n, p): n for n, p in parts.items()}

    stored_keys, wanted_keys = by_order(stored), by_order(wanted)
    if stored_keys.keys() != wanted_keys.keys():
        return {}
    return {name: stored_keys[key] for key, name in wanted_keys.items() if stored_keys[key] != name}


# Fields of the state that an older version kept in the parameters' type, and that are float32 now.
_WIDENED = ("opt_state.", "model_state.", "strategy_state.")


def find_widened(
    stored: dict[str, tuple[tuple[int, ...], str]],
    wanted: dict[str, tuple[tuple[int, ...], str]],
) -> dict[str, str]:
    """`{name: stored type}` of arrays that an older version saved in bfloat16, as the parameters are, and
    that are float32 now: float32 has every bfloat16, so nothing is lost.
    """
    return {
        name: stored[name][1]
        for name, (shape, dtype) in wanted.items()
        if name.startswith(_WIDENED)
        and dtype == "float32"
        and stored.get(name) == (shape, "bfloat16")
    }


def inspect(
    path: epath.Path, wanted: dict[str, Any], accept: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Check a step before its arrays are read, in process 0.

    Returns JSON types: bad: what is wrong, or "". verified: whether it has digests. striped: names of
    those of stripes. names: align_names of its leaves. widened: find_widened of them.
    ValueError for a step that is good, but of another model.
    """
    try:
        bad = steps.check_manifest(path)
        leaves = {} if bad else stored_types(path)
    except Exception as error:
        check(not is_transient(error), f"cannot read {path} now: {first_line(error)}")
        bad, leaves = f"unreadable: {first_line(error)}", {}
    if bad:
        return {"bad": bad, "verified": False, "striped": [], "names": {}, "widened": {}}
    for name in leaves:
        check(
            steps.is_safe_name(name.replace("/", "\0")),
            f"{path} holds an array named {name!r}, which could lead out of a directory: refused",
        )
    accept(steps.read_metadata(path))
    verified = leaves.pop(DIGESTS, None)
    striped = [name for name in leaves if is_digest(name)]
    leaves = {name: leaf for name, leaf in leaves.items() if name not in striped}
    names = align_names(leaves, wanted)
    stored = {
        name: leaves[names.get(name, name)] for name in wanted if names.get(name, name) in leaves
    }
    stored |= {name: leaf for name, leaf in leaves.items() if name not in names.values()}
    expected = {k: (tuple(v.shape), str(v.dtype)) for k, v in wanted.items()}
    widened = find_widened(stored, expected)
    _check_model(path, stored | {name: expected[name] for name in widened}, expected)
    result = {"bad": "", "verified": verified is not None, "striped": striped}
    return result | {"names": names, "widened": widened}


def _check_model(path: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    show = lambda leaf: f"{leaf[1]}{list(leaf[0])}" if leaf else "absent"
    diff = [
        f"  {k}: {show(stored.get(k))} in the checkpoint, {show(wanted.get(k))} in the model"
        for k in sorted({*stored, *wanted})
        if stored.get(k) != wanted.get(k)
    ]
    if diff:
        more = f"\n  ... and {len(diff) - 10} more" if len(diff) > 10 else ""
        raise ValueError(f"checkpoint {path} is of another model:\n" + "\n".join(diff[:10]) + more)


def load(path: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a step that `abstract` names; ValueError when they cannot be read."""
    from orbax.checkpoint import v1 as ocp

    with paths.plain_path(path) as place:
        return dict(_call_orbax(lambda: ocp.load(place, abstract)))


def stored_types(path: epath.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """`{name: (shape, dtype)}` of the leaves of a step; ValueError when that cannot be read."""
    from orbax.checkpoint import v1 as ocp

    with paths.plain_path(path) as place:
        metadata = _call_orbax(lambda: ocp.metadata(place).metadata)
    if metadata is None:  # without an error, if there is no description
        raise ValueError("Orbax finds no description of the arrays")
    return {k: (tuple(v.shape), str(v.dtype)) for k, v in metadata.items()}


def _call_orbax(function: Callable[[], Any]) -> Any:
    """Call Orbax without its barriers over processes, so that none hangs when another fails."""
    with _single_process_context(), _silence():
        try:
            return function()
        except Exception as error:
            kind = ConnectionError if is_transient(error) else ValueError
            reason = first_line(error)
        gc.collect()  # of coroutines that hold each other
    raise kind(reason)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the tracebacks that Python prints for the reads that Orbax abandons when one fails."""
    tasks, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = tasks.disabled
    sys.unraisablehook, tasks.disabled = lambda _: None, True
    try:
        yield
    finally:
        sys.unraisablehook, tasks.disabled = hook, disabled
        _ignore_late_answers()


def _ignore_late_answers() -> None:
    """Ignore TensorStore's late answers to abandoned reads, into an event loop that is closed."""
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") == "but_late_answers":
        return

    def but_late_answers(raised: Any) -> None:
        if "Event loop is closed" not in str(raised.exc_value):
            hook(raised)

    sys.unraisablehook = but_late_answers


def _single_process_context() -> Any:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    index, _ = agree.process()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    return context


def first_line(error: BaseException) -> str:
    """The beginning of the message of an error's first cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if full := FULL.search(text):
        return full[0]
    return text if len(text) <= 200 else f"{text[:200]} ..."


def is_transient(error: BaseException) -> bool:
    """Whether an error does not come from the files themselves, and may not occur again."""
    kinds = (PermissionError, MemoryError, TimeoutError, ConnectionError)
    return isinstance(error, kinds) or bool(_PASSING.search(f"{error} {first_line(error)}"))
