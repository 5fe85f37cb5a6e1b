"""Checkpoints through Orbax: the state, the data position and the configuration, on any mesh; verified."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import digest, paths, tree
from spmd.core.fields import check
from spmd.core.storage import is_remote, without_nonfinite
from spmd.runtime import agree
from spmd.train import CheckpointConfig
from spmd.train.checkpoint import index, reading, steps

PyTree = Any


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says which one stands and what to do."""


def _flat(state: PyTree) -> dict[str, Any]:
    """`{path name: leaf}`, `.` between parts: the names a user sees are the names on disk."""
    named = tree.named_leaves(state)
    for name in named:
        check(
            steps.safe(name),
            f"the state has an array named {name!r}: in a checkpoint, names are made of letters, digits,"
            " '_', '-' and '.', and lead nowhere",
        )
    flat = {name.replace("/", "."): leaf for name, leaf in named.items()}
    check(
        len(flat) == len(named) and reading.DIGESTS not in flat,
        f"the state has two arrays of one name, or one named {reading.DIGESTS!r}: {', '.join(sorted(named))}",
    )
    return flat


def _unflat(flat: dict[str, Any], like: PyTree) -> PyTree:
    return tree.map_named(lambda name, _: flat[name.replace("/", ".")], like)


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, the newest and the best kept, bad ones put aside.

    Every process of a run makes the same calls in the same order. Without `writing` nothing in the directory
    is changed: bad ones are passed over.
    """

    def __init__(self, directory: epath.Path, config: CheckpointConfig, *, writing: bool = True):
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory, self._config, self._writing = directory, config, writing
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        if writing and agree.is_first():
            steps.clean(directory)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return agree.from_first(lambda: steps.listed(self._directory), "listing checkpoints")

    def exist(self) -> bool:
        """Whether there is any; ValueError when there were some and all of them were bad."""
        found = self.steps()
        aside = agree.from_first(lambda: steps.quarantined(self._directory), "listing quarantine")
        check(bool(found) or not aside, self._none_left(aside))
        return bool(found)

    def _none_left(self, aside: dict[str, str]) -> str:
        return (
            f"no good checkpoint is left in {self._directory}; in {self._directory.parent / 'quarantine'}"
            f" there are: {', '.join(aside)} (each with its reason.txt). Restore the files from a copy, or"
            " start anew with --run.fresh"
        )

    def about(self, step: int) -> dict[str, Any]:
        """Metadata saved with the arrays of `step`: see `extra` of save."""
        return agree.from_first(lambda: steps.about(self._directory / str(step)), "reading a step")

    # ---- saving

    def save(
        self, state: PyTree, step: int, metrics: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Starts saving `state`; waits only for the save before it. SaveFailed when that one has failed.

        metrics: those by which the best is kept. extra: JSON types, saved beside the arrays.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        if step in self.steps():
            return
        flat = _flat(state)
        about = without_nonfinite(
            extra | {"metrics": metrics}
        )  # Orbax would write NaN, which is not JSON
        try:
            # Enqueued behind the step and copied with the rest: the host does not wait for the digests.
            leaves = flat | {reading.DIGESTS: digest.of(flat)}
            if not is_remote(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                place = opened.enter_context(paths.plain(self._directory / str(step), same=True))
                response: Any = ocp.save_async(place, leaves, custom_metadata=about)
                shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in leaves.items()}
                held = opened.pop_all()
            self._pending = step, self._thread.submit(self._finish, response, held, step, shapes)
        except Exception as error:
            self._pending = step, concurrent.futures.Future()
            self._pending[1].set_exception(error)
            if (
                not agree.joined()
            ):  # the others find out in their wait(), at the same place as this one
                self.wait()

    def _finish(
        self, response: Any, held: contextlib.ExitStack, step: int, leaves: dict[str, Any]
    ) -> None:
        """In a thread: what follows the save of one step of `leaves`."""
        with held:
            response.result()
        if agree.is_first():
            if wrong := index.reopened(self._directory / str(step), leaves):
                steps.delete(self._directory, step)  # the older ones still stand
                raise OSError(f"opened again after the save, it is not complete: {wrong}")
            with contextlib.suppress(OSError):  # without a manifest the step is good by its digests
                steps.write_manifest(self._directory / str(step))
            self._drop()

    def _drop(self) -> None:
        """Deletes all but the newest and the best."""
        present = steps.listed(self._directory)
        sign = 1 if self._config.best_is == "highest" else -1
        scores = []
        for step in present:
            metrics = steps.about(self._directory / str(step)).get("metrics", {})
            value = metrics.get(self._config.best)
            if value is not None and math.isfinite(value):  # older versions saved NaN too
                scores.append((sign * value, step))
        best = [max(scores)[1]] if scores else []
        for step in set(present) - {*present[-self._config.keep :], *best}:
            with contextlib.suppress(OSError):
                steps.delete(self._directory, step)

    def wait(self) -> None:
        """Waits until what was started is on disk; SaveFailed, in all processes, when it cannot be."""
        if self._pending is None:
            return
        step, future = self._pending
        said = agree.gather(_outcome(step, future), f"saving step {step}")
        self._pending = None
        if why := next(filter(None, said), ""):
            raise _failed(self._directory, f"save step {step}", why)

    def close(self) -> None:
        """Waits for a save under way, in this process, and releases the thread."""
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self._pending[1].result()
        self._thread.shutdown(wait=False)

    # ---- restoring

    def restore(
        self,
        like: PyTree,
        shardings: PyTree,
        step: int | None = None,
        accept: Callable[[dict[str, Any]], None] = lambda about: None,
    ) -> PyTree:
        """The state at `step` (default: the newest good one), each leaf placed by `shardings`.

        like: shapes and dtypes. accept: called in process 0 with what was saved beside the arrays, may refuse
        it by a ValueError. A checkpoint whose files or digests are wrong goes to quarantine/ with the reason
        (stays where it is, without `writing`), and the next older one is taken. ValueError with the differing
        leaves when a good one is of another model (Orbax alone would cast dtypes silently), when none is
        left, or when `step` is bad.
        """
        wanted, placed = _flat(like), _flat(shardings)
        present = self.steps()
        if not present:
            raise ValueError(f"no checkpoint in {self._directory}; train first")
        if step is not None and step not in present:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory};"
                f" there are: {', '.join(map(str, present))}"
            )
        passed: list[str] = []
        for at in [step] if step is not None else present[::-1]:
            leaves, bad = self._read(at, wanted, placed, accept)
            if not bad:
                return _unflat(leaves, like)
            if step is not None:
                raise ValueError(
                    f"the checkpoint of step {at} in {self._directory} is bad: {bad}; without --step the"
                    " newest good one is taken"
                )
            if self._writing:
                became = agree.from_first(
                    lambda at=at, bad=bad: steps.quarantine(self._directory, at, bad), "quarantine"
                )
            else:
                became = "passed over, and left as it is"
                passed.append(f"step {at}: {bad}")
            agree.say(f"the checkpoint of step {at} is bad: {bad}; {became}")
        check(
            not passed,
            f"no checkpoint in {self._directory} is good: {'; '.join(passed)}. Restore the files from a copy,"
            " or train anew with --run.fresh",
        )
        aside = agree.from_first(lambda: steps.quarantined(self._directory), "listing quarantine")
        raise ValueError(self._none_left(aside))

    def _read(
        self,
        step: int,
        wanted: dict[str, Any],
        placed: dict[str, Any],
        accept: Callable[[dict[str, Any]], None],
    ) -> tuple[dict[str, Any], str]:
        """(the leaves, "") or ({}, what is wrong), the same in all processes."""
        about = f"checkpoint of step {step}"
        path = self._directory / str(step)
        found = agree.from_first(lambda: reading.inspect(path, wanted, accept), about)
        if found["bad"]:
            return {}, found["bad"]
        names, narrow = found["names"], found["widened"]  # name here -> name, type there
        abstract = _abstract(wanted, placed, names, narrow)
        if found["verified"]:
            abstract |= _abstract_digests(len(wanted), next(iter(placed.values())))
        leaves: dict[str, Any] = {}
        said = passing = ""
        try:
            leaves = reading.load(path, abstract)
        except Exception as error:
            said = reading.first_line(error)
            passing = said if reading.passes(error) else ""
        for told in agree.gather([said, passing], about):
            check(not told[1], f"cannot read the {about} in {self._directory} now: {told[1]}")
            if told[0]:
                return {}, f"unreadable: {told[0]}"
        wrong = ""
        if found["verified"]:
            digests = np.asarray(leaves.pop(reading.DIGESTS))
            wrong = reading.differ(digest.differing(leaves, digests))
        else:
            agree.say(f"the {about} has no digests (an older version saved it): not verified")
        if narrow:
            agree.say(
                f"the {about} holds {len(narrow)} arrays of optimizer state or statistics in bfloat16 (an"
                " older version saved it): they go on in float32"
            )
        restored = {k: leaves[names.get(k, k)] for k in wanted}
        restored |= {k: restored[k].astype(wanted[k].dtype) for k in narrow}
        return restored, wrong


def _abstract(
    wanted: dict[str, Any], placed: dict[str, Any], names: dict[str, str], types: dict[str, str]
) -> dict[str, Any]:
    """Shapes and dtypes to read `wanted` as, by its names in the checkpoint, on the shardings `placed`."""
    return {
        names.get(k, k): jax.ShapeDtypeStruct(
            v.shape, jax.numpy.dtype(types.get(k, v.dtype)), sharding=placed[k]
        )
        for k, v in wanted.items()
    }


def _abstract_digests(num: int, like: Any) -> dict[str, Any]:
    """The digests of `num` leaves, replicated over the devices of the sharding `like`."""
    replicated = NamedSharding(like.mesh, P()) if isinstance(like, NamedSharding) else like
    return {reading.DIGESTS: jax.ShapeDtypeStruct((num, 2), np.uint32, sharding=replicated)}


def _outcome(step: int, future: concurrent.futures.Future[None]) -> str:
    """Waits for this process's part of a save, or until another tells of a failure; "" if all is well."""
    key = f"spmd/save/{step}"
    while not concurrent.futures.wait([future], 1.0 if agree.joined() else None).done:
        with contextlib.suppress(Exception):  # nothing said yet
            return agree.store().key_value_try_get(key)
    error = future.exception()
    if error is None:
        return ""
    if agree.joined():
        agree.store().key_value_set(key, reading.first_line(error), allow_overwrite=True)
    return reading.first_line(error)


def _failed(directory: epath.Path, what: str, why: str) -> SaveFailed:
    """The exception to raise; removes the half-written step, which would only fill the disk."""
    if agree.is_first():
        steps.clean(directory)
    full = reading.FULL.search(why)
    present = steps.listed(directory)
    stands = f"the checkpoint of step {present[-1]} stands" if present else "no checkpoint stands"
    todo = "Make room" if full else "Remove the cause"
    return SaveFailed(
        f"cannot {what}: {full[0] if full else why}; {stands}. {todo} and type the same command"
    )


@contextlib.contextmanager
def disk_full(directory: epath.Path) -> Iterator[None]:
    """Turns the OSError of a full or read-only disk, wherever a run meets it, into SaveFailed."""
    try:
        yield
    except OSError as error:
        if not reading.FULL.search(str(error)):
            raise
        what = f"write {error.filename or directory}"
        raise _failed(directory / "checkpoints", what, str(error)) from error
