"""Checkpoints by Orbax: state, data position and configuration, verified, restored on any mesh."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
from collections.abc import Callable
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
from spmd.train.checkpoint import failures, index, reading, steps, stripes

PyTree = Any


def _flatten(state: PyTree) -> dict[str, Any]:
    """`{path name: leaf}` with `.` between parts: the names on disk are those that a user sees."""
    named = tree.named_leaves(state)
    for name in named:
        check(
            steps.is_safe_name(name),
            f"the state has an array named {name!r}: in a checkpoint, names are made of letters, digits,"
            " '_', '-' and '.', and lead nowhere",
        )
    flat = {name.replace("/", "."): leaf for name, leaf in named.items()}
    check(
        len(flat) == len(named) and reading.DIGESTS not in flat,
        f"the state has two arrays of one name, or one named {reading.DIGESTS!r}: {', '.join(sorted(named))}",
    )
    return flat


def _unflatten(flat: dict[str, Any], like: PyTree) -> PyTree:
    return tree.map_named(lambda name, _: flat[name.replace("/", ".")], like)


class Checkpoints:
    """The checkpoints of a run: saved asynchronously, the newest and the best kept, bad ones quarantined.

    Every process of a run makes the same calls in the same order. Without `writing` nothing in the directory
    is changed, and bad checkpoints are skipped.
    """

    def __init__(self, directory: epath.Path, config: CheckpointConfig, *, writing: bool = True):
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory, self._config, self._writing = directory, config, writing
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        if writing and agree.is_first():
            steps.remove_unfinished(directory)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return agree.from_first(lambda: steps.list_steps(self._directory), "listing checkpoints")

    def exist(self) -> bool:
        """Whether there is a checkpoint; ValueError when there were some and all of them were bad."""
        steps_present = self.steps()
        quarantined = agree.from_first(
            lambda: steps.list_quarantine(self._directory), "listing quarantine"
        )
        check(bool(steps_present) or not quarantined, self._none_left(quarantined))
        return bool(steps_present)

    def _none_left(self, quarantined: dict[str, str]) -> str:
        return (
            f"no good checkpoint is left in {self._directory}; in {self._directory.parent / 'quarantine'}"
            f" there are: {', '.join(quarantined)} (each with its reason.txt). Restore the files from a copy,"
            " or start anew with --run.fresh"
        )

    def about(self, step: int) -> dict[str, Any]:
        """Metadata saved with the arrays of `step`: `extra` and `metrics` of save."""
        return agree.from_first(
            lambda: steps.read_metadata(self._directory / str(step)), "reading a step"
        )

    # ---- saving

    def save(
        self, state: PyTree, step: int, metrics: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Start saving `state`; waits for the previous save only.

        Args:
            state: the arrays.
            step: of the state.
            metrics: metrics that may choose the best checkpoint.
            extra: JSON types, saved with the arrays.

        Raises:
            SaveFailed: the previous save has failed.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        if step in self.steps():
            return
        flat = _flatten(state)
        metadata = without_nonfinite(
            extra | {"metrics": metrics}
        )  # Orbax would write NaN, which is not JSON
        try:
            # Enqueued after the step and copied with the arrays: the host does not wait for the digests.
            leaves = flat | {reading.DIGESTS: digest.compute(flat)} | stripes.compute(flat)
            if not is_remote(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                place = stack.enter_context(
                    paths.plain_path(self._directory / str(step), same=True)
                )
                response: Any = ocp.save_async(place, leaves, custom_metadata=metadata)
                shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in leaves.items()}
                cleanup = stack.pop_all()
            self._pending = step, self._thread.submit(self._finish, response, cleanup, step, shapes)
        except Exception as error:
            self._pending = step, concurrent.futures.Future()
            self._pending[1].set_exception(error)
            if (
                not agree.has_peers()
            ):  # the others find out in their wait(), at the same place as this one
                self.wait()

    def _finish(
        self, response: Any, cleanup: contextlib.ExitStack, step: int, leaves: dict[str, Any]
    ) -> None:
        """Wait for the save of a step of `leaves`, check it, delete old ones; runs in a thread."""
        with cleanup:
            response.result()
        if agree.is_first():
            if problem := index.check_complete(self._directory / str(step), leaves):
                steps.delete(self._directory, step)  # the older ones are kept
                raise OSError(f"opened again after the save, it is not complete: {problem}")
            with contextlib.suppress(OSError):  # without a manifest the step is good by its digests
                steps.write_manifest(self._directory / str(step))
            self._drop()

    def _drop(self) -> None:
        """Deletes all but the newest and the best."""
        present = steps.list_steps(self._directory)
        sign = 1 if self._config.best_is == "highest" else -1
        scores = []
        for step in present:
            metrics = steps.read_metadata(self._directory / str(step)).get("metrics", {})
            value = metrics.get(self._config.best)
            if value is not None and math.isfinite(value):  # older versions saved NaN too
                scores.append((sign * value, step))
        best = [max(scores)[1]] if scores else []
        for step in set(present) - {*present[-self._config.keep :], *best}:
            with contextlib.suppress(OSError):
                steps.delete(self._directory, step)

    def wait(self) -> None:
        """Wait until the pending save is on disk; SaveFailed in all processes when it has failed."""
        if self._pending is None:
            return
        step, future = self._pending
        outcomes = agree.gather(failures.await_save(step, future), f"saving step {step}")
        self._pending = None
        if reason := next(filter(None, outcomes), ""):
            raise failures.save_failed(self._directory, f"save step {step}", reason)

    def close(self) -> None:
        """Wait for a pending save of this process, and release the thread."""
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
        """The state at `step`, each leaf placed by `shardings`.

        A checkpoint whose files or digests are wrong is moved to quarantine/ with the reason (without
        `writing`: left in place), and the next older one is read.

        Args:
            like: shapes and dtypes of the state.
            shardings: of its leaves.
            step: default: the newest good one.
            accept: called in process 0 with the metadata saved with the arrays; refuses by a ValueError.

        Raises:
            ValueError: a good checkpoint is of another model (names the differing leaves, whose dtypes Orbax
                would cast silently), none is good, or `step` is bad.
        """
        wanted, leaf_shardings = _flatten(like), _flatten(shardings)
        present = self.steps()
        if not present:
            raise ValueError(f"no checkpoint in {self._directory}; train first")
        if step is not None and step not in present:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory};"
                f" there are: {', '.join(map(str, present))}"
            )
        skipped: list[str] = []
        for candidate in [step] if step is not None else present[::-1]:
            leaves, bad = self._read(candidate, wanted, leaf_shardings, accept)
            if not bad:
                return _unflatten(leaves, like)
            if step is not None:
                raise ValueError(
                    f"the checkpoint of step {candidate} in {self._directory} is bad: {bad}; without --step"
                    " the newest good one is taken"
                )
            action = self._set_aside(candidate, bad)
            if not self._writing:
                skipped.append(f"step {candidate}: {bad}")
            agree.say(f"the checkpoint of step {candidate} is bad: {bad}; {action}")
        check(
            not skipped,
            f"no checkpoint in {self._directory} is good: {'; '.join(skipped)}. Restore the files from a"
            " copy, or train anew with --run.fresh",
        )
        quarantined = agree.from_first(
            lambda: steps.list_quarantine(self._directory), "listing quarantine"
        )
        raise ValueError(self._none_left(quarantined))

    def _set_aside(self, step: int, bad: str) -> str:
        """Quarantine a bad step, if `writing`; returns a phrase that says what was done."""
        if not self._writing:
            return "skipped, and left as it is"
        return agree.from_first(lambda: steps.quarantine(self._directory, step, bad), "quarantine")

    def _read(
        self,
        step: int,
        wanted: dict[str, Any],
        shardings: dict[str, Any],
        accept: Callable[[dict[str, Any]], None],
    ) -> tuple[dict[str, Any], str]:
        """(the leaves, "") or ({}, what is wrong), the same in all processes."""
        subject = f"checkpoint of step {step}"
        path = self._directory / str(step)
        facts = agree.from_first(lambda: reading.inspect(path, wanted, accept), subject)
        if facts["bad"]:
            return {}, facts["bad"]
        names, narrow = facts["names"], facts["widened"]  # name here -> name, type there
        abstract = _abstract(wanted, shardings, names, narrow)
        if facts["verified"]:
            abstract |= _abstract_digests(len(wanted), next(iter(shardings.values())))
            abstract |= stripes.abstract({*facts["striped"]}, wanted, shardings)
        leaves: dict[str, Any] = {}
        reason = transient = ""
        try:
            leaves = reading.load(path, abstract)
        except Exception as error:
            reason = reading.first_line(error)
            transient = reason if reading.is_transient(error) else ""
        for report in agree.gather([reason, transient], subject):
            check(not report[1], f"cannot read the {subject} in {self._directory} now: {report[1]}")
            if report[0]:
                return {}, f"unreadable: {report[0]}"
        problem = ""
        if facts["verified"]:
            digests = np.asarray(leaves.pop(reading.DIGESTS))
            saved = {k: leaves.pop(k) for k in [*leaves] if reading.is_digest(k)}
            if wrong := digest.find_differences(leaves, digests):
                damaged = {name: leaves[name] for name in wrong}
                problem = reading.describe_differences(wrong, stripes.describe_all(damaged, saved))
        else:
            agree.say(f"the {subject} has no digests (an older version saved it): not verified")
        if narrow:
            agree.say(
                f"the {subject} holds {len(narrow)} arrays of optimizer state or statistics in bfloat16 (an"
                " older version saved it): they continue in float32"
            )
        restored = {k: leaves[names.get(k, k)] for k in wanted}
        restored |= {k: restored[k].astype(wanted[k].dtype) for k in narrow}
        return restored, problem


def _abstract(
    wanted: dict[str, Any], shardings: dict[str, Any], names: dict[str, str], types: dict[str, str]
) -> dict[str, Any]:
    """Shapes and dtypes to read `wanted` as, by its names in the checkpoint, on the shardings `placed`."""
    return {
        names.get(k, k): jax.ShapeDtypeStruct(
            v.shape, jax.numpy.dtype(types.get(k, v.dtype)), sharding=shardings[k]
        )
        for k, v in wanted.items()
    }


def _abstract_digests(num: int, like: Any) -> dict[str, Any]:
    """The digests of `num` leaves, replicated over the devices of the sharding `like`."""
    replicated = NamedSharding(like.mesh, P()) if isinstance(like, NamedSharding) else like
    return {reading.DIGESTS: jax.ShapeDtypeStruct((num, 2), np.uint32, sharding=replicated)}
