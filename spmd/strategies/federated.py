"""Federated averaging: each round a few of many clients train on their own examples, and are averaged.

FedAvg (McMahan et al. 2017, arXiv 1602.05629), FedProx (Li et al. 2020, arXiv 1812.06127), FedAdam (Reddi et
al. 2021, arXiv 2003.00295). A round is a period of strategy `local`, a sampled client one of its replicas: it
begins with the consensus and a new optimizer state, and weighs what it has trained on, which is its size
times the local epochs unless the period was too short. Who trains on what is the order of the data
(clients.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import optax

from spmd.core.fields import check
from spmd.strategies import base, clients, local, merge, secure
from spmd.strategies.rounds import Outer, RoundsConfig, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Federated(RoundsConfig):
    """Many clients, each with its own examples: in each round a few train, and are averaged (FedAvg)."""

    name: ClassVar[str] = "federated"
    outer: Literal["average", "nesterov", "adam"] = "average"
    """Outer optimizer of the averaged difference: average (FedAvg), nesterov (FedAvgM), adam (FedAdam)."""
    clients: int = 100
    """Clients that the training examples are dealt to."""
    fraction: float = 0.1
    """Part of the clients that takes part in each round, drawn anew."""
    alpha: float = 0.3
    """Concentration of the Dirichlet distribution of classes over clients: 0.1 few classes each, 100 all."""
    local_epochs: int = 1
    """Passes of a client over its examples in a round, as far as `period` steps allow."""
    drop_outs: float = 0.0
    """Part of the clients of a round that do not report back."""
    proximal: float = 0.0
    """Pull of each local step towards the consensus (mu of FedProx); 0 is off."""
    secure: bool = False
    """Secure aggregation: the server gets masked integers whose sum is exact."""
    secure_limit: float = 4.0
    """Largest change of a parameter in a round under secure aggregation; what exceeds it is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clients", "local_epochs"):
            check(
                getattr(self, name) >= 1,
                f"strategy.{name}={getattr(self, name)} must be at least 1",
            )
        check(
            0 < self.fraction <= 1,
            f"strategy.fraction={self.fraction} must be more than 0, at most 1",
        )
        for name in ("alpha", "secure_limit"):
            check(
                getattr(self, name) > 0,
                f"strategy.{name}={getattr(self, name)} must be more than 0",
            )
        check(0 <= self.drop_outs < 1, f"strategy.drop_outs={self.drop_outs} must be in [0, 1)")
        check(self.proximal >= 0, f"strategy.proximal={self.proximal} must not be negative")
        check(
            self.compress.kind == "none",
            f"strategy.compress.kind={self.compress.kind}: what compression leaves out is sent by the same"
            " replica later, and strategy federated has other clients in each round; use kind none, or"
            " --strategy local",
        )

    @property
    def clients_a_round(self) -> int:
        """At least one."""
        return max(1, round(self.fraction * self.clients))

    @property
    def copies(self) -> int:
        return self.clients_a_round

    def check_run(self, num_steps: int, num_examples: int) -> None:
        super().check_run(num_steps, num_examples)
        check(
            self.clients <= num_examples,
            f"strategy.clients={self.clients} are more than the {num_examples} training examples, and each"
            f" needs one; use at most {num_examples}",
        )

    def order(self, source: Any, seed: int, batch_size: int) -> Any:
        return clients.ClientOrder(
            clients.deal(clients.labels(source), self.clients, self.alpha, seed),
            self.clients_a_round,
            seed=seed,
            batch_size=batch_size,
            period=self.period,
            epochs=self.local_epochs,
            drop_outs=self.drop_outs,
        )

    def not_private(self) -> str:
        return (
            "strategy federated reads each client's examples in whole epochs, not as a random sample, and"
            " weighs a client by how many it has"
        )

    def build(self, parts: base.Parts) -> base.Strategy:
        return build(
            parts,
            self.clients_a_round,
            self.period,
            self._outer_tx(),
            proximal=self.proximal,
            limit=self.secure_limit if self.secure else 0.0,
        )


def build(
    parts: base.Parts,
    num_slots: int,
    period: int,
    tx: optax.GradientTransformation,
    *,
    proximal: float,
    limit: float,
) -> base.Strategy:
    """The Strategy of rounds of clients.

    Args:
        parts: as of every strategy.
        num_slots: clients of a round.
        period: steps of a round.
        tx: outer optimizer.
        proximal: weight of the pull towards the round's first parameters.
        limit: of a parameter's change, for secure aggregation; 0 is without it.

    Raises:
        ValueError: data without a label, and as `local.build`.
    """
    clients.label_of(parts.batch)
    mean = merge.weighted_mean
    if limit:
        check_fits(parts, num_slots)
        rows = parts.batch["weight"].shape[0] // num_slots
        max_weight = float(rows * period * len(parts.task.coefficients))
        mean = functools.partial(secure.mean, limit=limit, max_weight=max_weight)
    outer = Outer(period, tx, merge.stateless(mean), proximal=proximal, forget=True)
    return local.build(parts, num_slots, outer)
