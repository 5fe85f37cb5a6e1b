"""Reading a saved step, in one process by itself: its arrays, what they are, whether they are good."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from spmd.core import digest, paths, tree
from spmd.core.fields import check
from spmd.runtime import agree
from spmd.train.checkpoint import steps

DIGESTS = "digests"  # a leaf of our own beside those of the state

# What another try, or another machine, may read: no reason to put a checkpoint aside.
_PASSING = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|PERMISSION_DENIED|Permission denied|UNAVAILABLE"
    r"|UNAUTHENTICATED|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system", re.I
)


def differ(names: list[str]) -> str:
    """Message about leaves whose digests differ from the stored ones; "" for none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the digest of {', '.join(names[:3])}{more} differs" if names else ""


def examined(path: epath.Path) -> tuple[str, str]:
    """(what is wrong with a step or "", what it consists of); on the host, one array at a time."""
    # before any backend starts: this is no work for an accelerator, which may be in use
    jax.config.update("jax_platforms", "cpu")
    try:
        if bad := steps.check_manifest(path):
            return bad, ""
        with jax.enable_x64(True):
            return _verified(path)
    except Exception as error:
        check(not passes(error), f"cannot read {path} now: {first_line(error)}")
        return f"unreadable: {first_line(error)}", ""


def _verified(path: epath.Path) -> tuple[str, str]:
    leaves = stored(path)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    size = 0

    def one(name: str) -> jax.Array:
        abstract: dict[str, Any] = dict.fromkeys(leaves, ...)  # Orbax leaves these out
        abstract[name] = jax.ShapeDtypeStruct(*leaves[name], sharding=host)
        return load(path, abstract)[name]

    names = sorted(leaves.keys() - {DIGESTS})
    digests = np.asarray(one(DIGESTS)) if DIGESTS in leaves else None
    wrong = []
    for i, name in enumerate(names):
        leaf = one(name)
        size += leaf.nbytes
        if digests is not None:
            wrong += digest.differing({name: leaf}, digests[i : i + 1])
    has = ["digests" if digests is not None else "", "manifest" if steps.sealed(path) else ""]
    by = " and ".join(filter(None, has))
    how = f"verified by {by}" if digests is not None else "readable, without digests to verify it"
    return differ(wrong), f"{len(names)} arrays, {tree.human_bytes(size)}, {how}"


def align_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """`{name here: name there}` of arrays whose place in the optimizer's chain differs.

    optax numbers the parts of a chain, those without a state too: clipping that is switched on moves the
    momentum from opt_state.0 to opt_state.1. Empty where the names agree, or do not with other numbers.
    """

    def by_order(names: Iterable[str]) -> dict[tuple[str, ...], str]:
        parts = {name: name.split(".") for name in names}
        chain = {
            n: p for n, p in parts.items() if p[0] == "opt_state" and p[1:2] and p[1].isdigit()
        }
        order = sorted({int(p[1]) for p in chain.values()})
        key = lambda n, p: (p[0], f"#{order.index(int(p[1]))}", *p[2:]) if n in chain else tuple(p)
        return {key(n, p): n for n, p in parts.items()}

    there, here = by_order(stored), by_order(wanted)
    if there.keys() != here.keys():
        return {}
    return {name: there[key] for key, name in here.items() if there[key] != name}


# Fields of the state that an older version kept in the parameters' type, and that are float32 now.
_WIDENED = ("opt_state.", "model_state.", "strategy_state.")


def find_widened(
    stored: dict[str, tuple[tuple[int, ...], str]], wanted: dict[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """`{name: type there}` of what lies in bfloat16 beside bfloat16 parameters of an older version, and is
    float32 here: float32 has every bfloat16, so nothing is lost.
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

    Returns JSON types: bad: what is wrong, or "". verified: whether it has digests. names: align_names of its
    leaves. widened: find_widened of them. ValueError for a step that is good, but of another model.
    """
    try:
        bad = steps.check_manifest(path)
        leaves = {} if bad else stored(path)
    except Exception as error:
        check(not passes(error), f"cannot read {path} now: {first_line(error)}")
        bad, leaves = f"unreadable: {first_line(error)}", {}
    if bad:
        return {"bad": bad, "verified": False, "names": {}, "widened": {}}
    for name in leaves:
        check(
            steps.safe(name.replace("/", "\0")),
            f"{path} holds an array named {name!r}, which could lead out of a directory: refused",
        )
    accept(steps.about(path))
    verified = leaves.pop(DIGESTS, None)
    names = align_names(leaves, wanted)
    there = {
        name: leaves[names.get(name, name)] for name in wanted if names.get(name, name) in leaves
    }
    there |= {name: leaf for name, leaf in leaves.items() if name not in names.values()}
    here = {k: (tuple(v.shape), str(v.dtype)) for k, v in wanted.items()}
    widened = find_widened(there, here)
    _same_model(path, there | {name: here[name] for name in widened}, here)
    found = {"bad": "", "verified": verified is not None}
    return found | {"names": names, "widened": widened}


def _same_model(path: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    show = lambda leaf: f"{leaf[1]}{list(leaf[0])}" if leaf else "(absent)"
    diff = [
        f"  {k}: {show(stored.get(k))} in the checkpoint, {show(wanted.get(k))} here"
        for k in sorted({*stored, *wanted})
        if stored.get(k) != wanted.get(k)
    ]
    if diff:
        more = f"\n  ... and {len(diff) - 10} more" if len(diff) > 10 else ""
        raise ValueError(f"checkpoint {path} is of another model:\n" + "\n".join(diff[:10]) + more)


def load(path: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a step that `abstract` asks for; ValueError when they cannot be read."""
    from orbax.checkpoint import v1 as ocp

    with paths.plain(path) as place:
        return dict(_ask(lambda: ocp.load(place, abstract)))


def stored(path: epath.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """`{name: (shape, dtype)}` of the leaves of a step; ValueError when that cannot be read."""
    from orbax.checkpoint import v1 as ocp

    with paths.plain(path) as place:
        found = _ask(lambda: ocp.metadata(place).metadata)
    if found is None:  # Orbax's way to say so
        raise ValueError("Orbax finds no description of the arrays")
    return {k: (tuple(v.shape), str(v.dtype)) for k, v in found.items()}


def _ask(function: Callable[[], Any]) -> Any:
    """Call Orbax without waiting for other processes, so that none hangs when another fails."""
    with _alone(), _silent():
        try:
            return function()
        except Exception as error:
            kind = ConnectionError if passes(error) else ValueError
            said = first_line(error)
        gc.collect()  # of coroutines that hold each other
    raise kind(said)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the tracebacks that Python prints, one for each read that Orbax abandons when one fails."""
    tasks, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = tasks.disabled
    sys.unraisablehook, tasks.disabled = lambda _: None, True
    try:
        yield
    finally:
        sys.unraisablehook, tasks.disabled = hook, disabled
        _ignore_late_answers()


def _ignore_late_answers() -> None:
    """TensorStore answers abandoned reads at any later time, into an event loop that is closed."""
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") == "but_late_answers":
        return

    def but_late_answers(raised: Any) -> None:
        if "Event loop is closed" not in str(raised.exc_value):
            hook(raised)

    sys.unraisablehook = but_late_answers


def _alone() -> Any:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    index, _ = agree.process()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    return context


def first_line(error: BaseException) -> str:
    """The beginning of what the first cause of an error says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if full := FULL.search(text):
        return full[0]
    return text if len(text) <= 200 else f"{text[:200]} ..."


def passes(error: BaseException) -> bool:
    """Whether an error says nothing of the files themselves."""
    kinds = (PermissionError, MemoryError, TimeoutError, ConnectionError)
    return isinstance(error, kinds) or bool(_PASSING.search(f"{error} {first_line(error)}"))
