"""Steps that are compiled once for all training runs of one program shape in this process."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

from spmd.strategies.base import Parts, Strategy
from spmd.tasks import Objective

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment

KEPT = 4  # program shapes; compiled programs stay in memory
_built: collections.deque[tuple[list[Any], Objective, Strategy]] = collections.deque(maxlen=KEPT)


def new_strategy(
    exp: Experiment, parts: Parts, num_steps: int, examples: int
) -> tuple[Objective, Strategy]:
    """The task and a strategy of its own; arguments as in `strategy_of`."""
    return parts.task, exp.strategy.build(parts)


def strategy_of(
    exp: Experiment, parts: Parts, num_steps: int, examples: int
) -> tuple[Objective, Strategy]:
    """The task and the strategy of an earlier run of this shape, with the knobs of `parts`; else new ones.

    num_steps: length of the run. examples: of a step.
    """
    shape = _shape_of(exp, parts, num_steps, examples)
    for known, task, strategy in _built:
        if _equal(known, shape):
            step = dataclasses.replace(strategy.step, knobs={**parts.knobs})
            return task, strategy._replace(step=step)
    task, strategy = new_strategy(exp, parts, num_steps, examples)
    _built.append((shape, task, strategy))
    return task, strategy


def _shape_of(exp: Experiment, parts: Parts, num_steps: int, examples: int) -> list[Any]:
    """Values that two runs must share for one compiled step: all that the step depends on but its knobs."""
    optimizer = exp.optimizer.without_knobs() if parts.knobs else exp.optimizer
    init = dataclasses.replace(exp.init, from_="", skip=())
    closed = (exp.model, exp.task, exp.param_dtype, init, exp.strategy, optimizer)
    built = parts._asdict()
    for name in ("task", "tx", "rate", "knobs"):
        del built[name]
    return [*closed, built, sorted(parts.knobs), num_steps, examples]


def _equal(a: list[Any], b: list[Any]) -> bool:
    try:
        return bool(a == b)
    except Exception:  # values of a user's that cannot be compared, as arrays
        return False
