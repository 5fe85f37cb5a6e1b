"""How the devices agree: strategy configs by name. The implementations import jax when built."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spmd.fields import check, closest, free, multiples

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
        """The order in which `source` is read, as loader.train_batches takes it; None is the source's own."""
        return None

    def not_private(self) -> str:
        """Why no privacy can be had with it; "" where it sees nothing of the examples but sums of their
        gradients, to which noise is added: one for each of `private_parts`.
        """
        return f"strategy {self.name} does more with gradients than to sum those of all examples"

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(StrategyConfig):
    """jit over the mesh: rules place the arrays, the compiler inserts the collectives."""

    name: ClassVar[str] = "auto"
    zero: Literal[1, 3] = free(3)
    """What mesh.fsdp cuts: 1 the optimizer state only (ZeRO-1), 3 the parameters too (FSDP)."""
    sequence_parallel: bool = free(False)
    """Cuts norms and residuals over mesh.tensor too, along time: less memory, the same traffic."""

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import auto

        return auto.build(parts, zero=self.zero, sequence_parallel=self.sequence_parallel)

    def not_private(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """How gradients are made smaller to be sent; with error feedback: what is left out is sent later."""

    kind: Literal["none", "int8", "top-k", "powersgd"] = "none"
    """int8: blocks of small integers; top-k: the largest entries; powersgd: products of thin matrices."""
    block: int = 256
    """int8: elements that share a scale (4 bytes)."""
    keep: float = 0.01
    """top-k: the fraction of each array's entries that is sent, with their places (8 bytes each)."""
    rank: int = 4
    """powersgd: columns of the thin matrices; arrays of one dim are sent whole."""

    def __post_init__(self) -> None:
        check(self.block >= 1, f"strategy.compress.block={self.block} must be at least 1")
        check(0 < self.keep <= 1, f"strategy.compress.keep={self.keep} must be in (0, 1]")
        check(self.rank >= 1, f"strategy.compress.rank={self.rank} must be at least 1")

    def not_private(self) -> str:
        """As StrategyConfig's: noise is measured for clipped gradients, and what is left out comes later."""
        return "" if self.kind == "none" else f"strategy.compress.kind={self.kind} changes the sum"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduce(StrategyConfig):
    """shard_map: each device takes its gradient, an explicit reduction sums them (synchronous SGD)."""

    name: ClassVar[str] = "allreduce"
    by_device: ClassVar[bool] = True
    merges_over: ClassVar[tuple[str, ...]] = ("replica", "data")
    reduction: Literal["psum", "ring", "reduce_scatter", "hierarchical"] = free("psum")
    """psum: the compiler's all-reduce; ring: our own, of neighbours; reduce_scatter: with an all-gather;
    hierarchical: the same within mesh.data, and only the shards are summed across mesh.replica."""
    bidirectional: bool = free(False)
    """ring: half of each message goes round the other way."""
    bucket_mb: float = free(4.0)
    """MiB of gradients that travel together (psum: left to the compiler)."""
    compress: Compression = Compression()
    """What is sent instead of the gradients."""

    def __post_init__(self) -> None:
        check(self.bucket_mb > 0, f"strategy.bucket_mb={self.bucket_mb} must be more than 0")
        check(
            not self.bidirectional or self.reduction == "ring",
            f"strategy.bidirectional is for strategy.reduction=ring, not {self.reduction}",
        )
        kind = self.compress.kind
        check(
            kind in ("none", "powersgd") or self.reduction == "psum",
            f"strategy.compress.kind={kind} has collectives of its own and takes no"
            f" strategy.reduction={self.reduction}: leave it at psum, or use kind powersgd or none",
        )

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import allreduce

        return allreduce.build(parts, self)

    def not_private(self) -> str:
        return self.compress.not_private()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server(StrategyConfig):
    """Parameter server on all devices: gradients are pushed to owners, parameters pulled from them."""

    name: ClassVar[str] = "server"
    by_device: ClassVar[bool] = True
    merges_over: ClassVar[tuple[str, ...]] = ("replica", "data")
    staleness: int = 0
    """Workers compute on parameters so many updates old; 0 is synchronous SGD."""
    compress: Compression = Compression()
    """What is pushed instead of the gradients."""

    def __post_init__(self) -> None:
        check(self.staleness >= 0, f"strategy.staleness={self.staleness} must not be negative")

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import server

        return server.build(parts, self)

    def not_private(self) -> str:
        return self.compress.not_private()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(StrategyConfig):
    """Base of the strategies that take local steps between two outer ones."""

    merges_over: ClassVar[tuple[str, ...]] = ("replica",)
    period: int = 50
    """Local steps between two outer ones, H; must divide the run's steps."""
    outer: Literal["average", "nesterov", "adam"] = "nesterov"
    """Outer optimizer of the averaged difference: average (local SGD), nesterov (DiLoCo), adam (FedAdam)."""
    outer_learning_rate: float = 0.0
    """Outer learning rate; 0 is the usual one: 1 of average, 0.7 of nesterov, 0.01 of adam."""
    outer_momentum: float = 0.9
    """Decay of the outer momentum; average has none."""
    compress: Compression = Compression()
    """What the replicas send in an outer step instead of their differences to the consensus."""

    def __post_init__(self) -> None:
        check(self.period >= 1, f"strategy.period={self.period} must be at least 1")
        check(
            self.outer_learning_rate >= 0,
            f"strategy.outer_learning_rate={self.outer_learning_rate} must not be negative",
        )
        check(
            0 <= self.outer_momentum < 1,
            f"strategy.outer_momentum={self.outer_momentum} must be in [0, 1)",
        )

    def check_run(self, num_steps: int, num_examples: int) -> None:
        check(
            num_steps % self.period == 0,
            f"the run's {num_steps} steps end between two outer steps: strategy.period={self.period} must"
            f" divide them; use --train.steps {multiples(num_steps, self.period)}",
        )

    def _outer_tx(self) -> Any:
        from spmd.strategies import local

        usual = {"average": 1.0, "nesterov": 0.7, "adam": 0.01}[self.outer]
        return local.outer_tx(self.outer, self.outer_learning_rate or usual, self.outer_momentum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Rounds):
    """Replicas take `period` steps by themselves, then an outer one together (local SGD, DiLoCo)."""

    name: ClassVar[str] = "local"
    replicas: int = 8
    """Replicas, whatever the mesh; mesh.replica, over which they are spread, must divide them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.replicas >= 1, f"strategy.replicas={self.replicas} must be at least 1")

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import local, merge

        sent = merge.of(self.compress, parts, self.replicas)
        return local.build(parts, self.replicas, local.Outer(self.period, self._outer_tx(), sent))

    @property
    def copies(self) -> int:
        return self.replicas

    def not_private(self) -> str:
        return ""  # each replica's gradient has its noise before anything is made of it, or sent

    @property
    def private_parts(self) -> int:
        return self.replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class Federated(Rounds):
    """Many clients, each with its own examples: in each round a few train, and are averaged (FedAvg)."""

    name: ClassVar[str] = "federated"
    outer: Literal["average", "nesterov", "adam"] = "average"
    """Outer optimizer of the averaged difference: average (FedAvg), nesterov (FedAvgM), adam (FedAdam)."""
    clients: int = 100
    """Clients that the training examples are dealt to."""
    fraction: float = 0.1
    """Part of the clients that takes part in each round, drawn anew."""
    alpha: float = 0.3
    """Of the Dirichlet distribution by which each class is dealt out: 0.1 is few classes each, 100 all."""
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
        from spmd.strategies import clients

        return clients.Rounds(
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

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import federated

        return federated.build(
            parts,
            self.clients_a_round,
            self.period,
            self._outer_tx(),
            proximal=self.proximal,
            limit=self.secure_limit if self.secure else 0.0,
        )


STRATEGIES: dict[str, type[StrategyConfig]] = {
    cls.name: cls for cls in (Auto, AllReduce, Server, Local, Federated)
}


def named(name: str) -> type[Any]:
    """The strategy class of a name; ValueError with the closest one."""
    check(
        name in STRATEGIES,
        f"unknown strategy {name!r}.{closest(name, STRATEGIES)} Known: {', '.join(STRATEGIES)}",
    )
    return STRATEGIES[name]
