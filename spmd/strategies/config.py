"""The base class of the strategy configs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from spmd.strategies.base import Parts, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Base of the strategy configs."""

    name: ClassVar[str] = ""
    by_device: ClassVar[bool] = False  # each device takes the gradient of its own rows by itself
    merges_over: ClassVar[tuple[str, ...]] = ()  # mesh axes over which it exchanges by itself

    def build(self, parts: Parts) -> Strategy:
        """The Strategy on parts.mesh."""
        raise NotImplementedError

    def order(self, source: Any, seed: int, batch_size: int) -> Any:
        """The order in which data is read, as loader.train_batches takes it; None is the source's own.

        Args:
            source: training data.
            seed: of the experiment.
            batch_size: rows of a step.
        """
        return None

    def not_private(self) -> str:
        """Why no privacy can be had with it; "" where it sees nothing of the examples but sums of their
        gradients, to which noise is added: one for each of `private_parts`.
        """
        return f"strategy {self.name} does more with gradients than to sum those of all examples"

    def not_by_term(self) -> str:
        """Why it cannot reduce a gradient for each loss term; "" where it can."""
        return f"strategy {self.name} takes steps of its own, before gradients are summed over all devices"

    def not_sparse(self) -> str:
        """Why it cannot train sparse tables; "" where it can."""
        return f"strategy {self.name} gives each replica parameters of its own, and the rows exist once"

    @property
    def copies(self) -> int:
        """Replicas, or clients at once, that train by themselves; 1 is none."""
        return 1

    @property
    def private_parts(self) -> int:
        """Parts of a private step that sample and add noise by themselves, in the order of the rows."""
        return 1

    def check_run(self, num_steps: int, num_examples: int) -> None:
        """ValueError for a number of steps or of training examples that the strategy cannot take."""
