"""Checkpoints through Orbax: the state, the data position and the configuration, on any mesh."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import jax
from etils import epath

from spmd import tree
from spmd.train import CheckpointConfig

PyTree = Any


def _flat(state: PyTree) -> dict[str, Any]:
    """`{path name: leaf}`, `.` between parts: the names a user sees are the names on disk."""
    return {name.replace("/", "."): leaf for name, leaf in tree.named_leaves(state).items()}


def _unflat(flat: dict[str, Any], like: PyTree) -> PyTree:
    return tree.map_named(lambda name, _: flat[name.replace("/", ".")], like)


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, the newest and the best kept."""

    def __init__(self, directory: epath.Path, config: CheckpointConfig):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        keep: Any = ocp.training.preservation_policies  # its types disagree with its own protocol
        decide: Any = ocp.training.save_decision_policies
        sign = 1.0 if config.best_is == "highest" else -1.0
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(config.keep),
                    keep.BestN(
                        n=1,
                        keep_checkpoints_without_metrics=False,
                        get_metric_fn=lambda m: sign * m.get(config.best, -sign * float("inf")),
                    ),
                ]
            ),
            # Whether to save is the loop's decision; the default policy drops saves while one runs.
            save_decision_policy=decide.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return [c.step for c in self._checkpointer.checkpoints]

    def save(
        self, state: PyTree, step: int, metrics: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Starts saving `state`; waits only for the save before it."""
        if step in self.steps():
            return
        self._checkpointer.wait()
        self._checkpointer.save_async(
            step, _flat(state), force=True, metrics=metrics or None, custom_metadata=extra
        )

    def restore(self, like: PyTree, shardings: PyTree, step: int | None = None) -> PyTree:
        """The state at `step` (default: the newest), each leaf placed by `shardings`.

        like: shapes and dtypes. ValueError with the differing leaves when the checkpoint is of another
        model; Orbax alone would cast dtypes silently.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self._directory}; train first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory};"
                f" there are: {', '.join(map(str, steps))}"
            )
        wanted = _flat(like)
        stored = self._checkpointer.metadata(step).metadata
        self._compare(
            step,
            {k: (tuple(v.shape), str(v.dtype)) for k, v in stored.items()},
            {k: (tuple(v.shape), str(v.dtype)) for k, v in wanted.items()},
        )
        placed = _flat(shardings)
        abstract = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed[k]) for k, v in wanted.items()
        }
        return _unflat(self._checkpointer.load(step, abstract), like)

    def _compare(self, step: int, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        show = lambda leaf: f"{leaf[1]}{list(leaf[0])}" if leaf else "(absent)"
        diff = [
            f"  {k}: {show(stored.get(k))} in the checkpoint, {show(wanted.get(k))} here"
            for k in sorted({*stored, *wanted})
            if stored.get(k) != wanted.get(k)
        ]
        if diff:
            more = f"\n  ... and {len(diff) - 10} more" if len(diff) > 10 else ""
            raise ValueError(
                f"checkpoint {self._directory / str(step)} is of another model:\n"
                + "\n".join(diff[:10])
                + more
            )

    def wait(self) -> None:
        """Waits until what was started is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        with contextlib.suppress(Exception):
            self._checkpointer.close()
