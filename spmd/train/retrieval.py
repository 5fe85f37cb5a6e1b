"""Retrieval of items for users: vectors of a trained model, ranked over the complete catalogue."""

# N users, B users of a batch, I items, D width, K results

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.fields import check
from spmd.data import loader
from spmd.data.interactions import InteractionLog
from spmd.metrics.ranking import rank_values
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding
from spmd.parallel.sparse import ShardedTables
from spmd.parallel.tables import SparseTable
from spmd.parallel.top_k import TopK, all_axes, padded_rows, sharded_top_k
from spmd.train.evaluations import Evaluation

if TYPE_CHECKING:
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot

CHUNK = 2**17  # items whose vectors are computed at once


class Recommendations(NamedTuple):
    """Items for users. users: raw ids [N]. items: raw ids [N, K], "" where there are fewer. titles: [N, K].
    scores: [N, K]. seconds: of the queries, without the index and compilation.
    """

    users: list[str]
    items: list[list[str]]
    titles: list[list[str]]
    scores: np.ndarray
    seconds: float


class Retriever:
    """Ranks all items for users by the inner product of their vectors.

    The model has methods `queries` and `candidates`, vectors [B, D] of users and of items from a batch.

    Args:
        snapshot: a trained model, whose data is a log of users and items.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        program = snapshot.program
        self.data = log_of(program)
        self.log = self.data.log
        self.num_items = len(self.log.items)
        self._snapshot, self._mesh = snapshot, program.mesh
        tables = tuple(program.task.tables.items())
        check_model(program)
        self._functions = _compiled(program.task.call, program.mesh, tables, self.num_items)
        self._features = self.data.transformed_features("eval")
        names = {lookup.feature for _, table in tables for lookup in table.lookups}
        self._looked_up = names | {l.weights for _, t in tables for l in t.lookups if l.weights}

    @functools.cached_property
    def index(self) -> jax.Array:
        """The vectors of all items [I, D], padded, rows sharded over all devices."""
        num = padded_rows(self.num_items, self._mesh)
        size = min(num, padded_rows(CHUNK, self._mesh))
        parts = []
        for first in range(0, num, size):
            item = np.arange(first, first + size, dtype=np.int32)
            item = np.where(item < self.num_items, item, -1)
            parts.append(self._functions.vectors(*self._state, self._place({"item": item})))
        return self._functions.join(parts)[:num] if len(parts) > 1 else parts[0]

    def rank(
        self,
        users: np.ndarray,
        part: Literal["validation", "test", "all"],
        k: int,
        *,
        masked: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items of highest score for each user.

        Args:
            users: rows int [N].
            part: the events that are to be predicted; those before are the users' histories.
            k: number of items.
            masked: leave out the items of the history.

        Returns:
            (rows of items int32 [N, K], -1 where there are fewer; scores [N, K]).
        """
        before = self.log.before(part)
        most = int(before.lengths[users].max(initial=1)) if masked else 1
        width = 2 ** int(np.ceil(np.log2(max(most, 1))))  # few shapes to compile
        found = []
        for rows, num in self._batches(users):
            excluded = before.last(rows, width) if masked else np.full((len(rows), 1), -1, np.int32)
            batch = self._place(self.data.queries(rows, part) | {"excluded": excluded})
            found.append((self._functions.best(*self._state, self.index, batch, k), num))
        host = [(jax.device_get(top), num) for top, num in found]
        rows_NK = np.concatenate([top.rows[:num] for top, num in host])
        return rows_NK, np.concatenate([top.scores[:num] for top, num in host])

    @property
    def _state(self) -> tuple[Any, ...]:
        return (*self._snapshot.variables, self._snapshot.state.tables)

    def _batches(self, users: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(users of a batch, the last one repeated; how many of them count)."""
        ways = meshes.batch_shards(self._mesh)
        size = -(-min(self.data.eval_batch_size, len(users)) // ways) * ways
        for first in range(0, len(users), size):
            part = users[first : first + size]
            yield np.pad(part, (0, size - len(part)), mode="edge"), len(part)

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the mesh; looked-up features that it lacks have no ids."""
        num = len(next(iter(batch.values())))
        full = {"weight": np.ones(num, np.float32), **batch}
        for name in sorted(self._looked_up - full.keys()):
            shape, dtype = self._features[name]
            full[name] = np.full((num, *shape), -1 if np.dtype(dtype).kind in "iu" else 0, dtype)
        placed = NamedSharding(self._mesh, sharding.batch_spec())
        rows = loader.process_rows(placed, num)
        return loader.put({name: x[rows] for name, x in full.items()}, placed, num)


class _Functions(NamedTuple):
    """vectors: of items. join: chunks of them. best: the k of highest score."""

    vectors: Callable[..., jax.Array]
    join: Callable[..., jax.Array]
    best: Callable[..., TopK]


@functools.lru_cache(maxsize=8)
def _compiled(
    call: Callable[..., Any],
    mesh: Mesh,
    declared: tuple[tuple[str, SparseTable], ...],
    num_items: int,
) -> _Functions:
    """The jitted functions; of one task, the same for all its states."""
    placement = sharding.placement(mesh, sharding.whole_sequences())
    sharded = ShardedTables(dict(declared), mesh)
    along = NamedSharding(mesh, P(all_axes(mesh)))
    replicated = NamedSharding(mesh, P())

    def run(method: str, params, model_state, tables, batch) -> jax.Array:
        batch = {**batch, **sharded.pull(tables, batch).rows}
        with scope.bind(**placement):
            return call(params, model_state, lambda module: getattr(module, method)(batch))

    def best(params, model_state, tables, index, batch, k) -> TopK:
        query_BD = run("queries", params, model_state, tables, batch)
        together = lambda x: jax.lax.with_sharding_constraint(x, replicated)
        excluded = together(batch["excluded"])
        query_BD = together(query_BD.astype(index.dtype))
        return sharded_top_k(mesh, query_BD, index, excluded, num_rows=num_items, k=k)

    return _Functions(
        vectors=jax.jit(functools.partial(run, "candidates"), out_shardings=along),
        join=jax.jit(lambda parts: jnp.concatenate(parts), out_shardings=along),
        best=jax.jit(best, static_argnames="k", out_shardings=replicated),
    )


def log_of(program: Program) -> InteractionLog:
    """The log of a program; ValueError for other data."""
    data = program.data
    check(
        isinstance(data, InteractionLog),
        f"{type(data).__name__} data has no users and items: recommendations need one of"
        " spmd.data.interactions, as the experiments movielens_* have",
    )
    assert isinstance(data, InteractionLog)
    return data


def check_model(program: Program) -> None:
    """ValueError for a model that has no vectors of users and items."""

    def look(module: Any) -> jax.Array:
        check(
            all(hasattr(module, name) for name in ("queries", "candidates")),
            f"{type(module).__name__} ranks no items: it needs methods queries and candidates, as"
            " spmd.models.recommenders has them",
        )
        return jnp.zeros(())

    variables = jax.eval_shape(program.task.init, jax.random.key(0))
    jax.eval_shape(lambda p, s: program.task.call(p, s, look), *variables)


def recommend(retriever: Retriever, users: Sequence[Any], k: int = 10) -> Recommendations:
    """The k items of highest score for each user, those of its history left out.

    Args:
        retriever: of a trained model.
        users: raw ids.
        k: number of items.

    Raises:
        ValueError: a user is unknown, or has no history; k is not at least 1.
    """
    check(k >= 1, f"--k {k} must be at least 1")
    check(len(users) > 0, "give a user: --user ID")
    log = retriever.log
    rows = log.users.index(np.array([str(user) for user in users]))
    lengths = log.before("all").lengths
    for user, row in zip(users, rows, strict=True):
        check(
            bool(row < len(log.users)),
            f"user {user!s} is not among the {len(log.users)} users that the model was trained on"
            f" ({', '.join(map(str, log.users.words[:3]))}, ...)",
        )
        check(
            bool(lengths[row] > 0),
            f"user {user!s} has no history in this log: there is nothing to recommend from; name a log with"
            " the user's events: --data.files FILE",
        )
    retriever.rank(rows, "all", k)  # builds the index, compiles
    start = time.perf_counter()
    found, scores = retriever.rank(rows, "all", k)
    seconds = time.perf_counter() - start
    titles = titles_of(retriever.data)
    raw = [[str(log.items.words[i]) if i >= 0 else "" for i in row] for row in found]
    named = [[titles.get(item, "") for item in row] for row in raw]
    return Recommendations([str(user) for user in users], raw, named, scores, seconds)


def titles_of(data: InteractionLog) -> dict[str, str]:
    """{raw id: title} of a log's items; {} where none are given."""
    from spmd.data.interactions.events import read_titles

    if data.titles:
        return read_titles(data.titles)
    return {} if data.files else data.generated.titles()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullRanking(Evaluation):
    """Hit rate, recall, NDCG and MRR at k of each user's held-out items among all items."""

    name: str = "ranking"
    part: Literal["validation", "test"] = "validation"
    """The held-out events."""
    k: tuple[int, ...] = (10,)
    """Cut-offs."""
    masked: bool = True
    """Leave out the items that precede: of training, and for a test of validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            bool(self.k) and min(self.k) >= 1,
            f"evaluation {self.name!r}: k={self.k} must be cut-offs of at least 1",
        )

    def check(self, program: Program) -> None:
        """ValueError for other data, a model without vectors, and a log without held-out events."""
        log = log_of(program).log
        check_model(program)
        check(
            bool(log.of(self.part).lengths.any()),
            f"evaluation {self.name!r}: the log has no events of part {self.part!r} to rank",
        )

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | None]:
        """Means over the users that have held-out items."""
        retriever = Retriever(snapshot)
        relevant = retriever.log.of(self.part)
        users = np.flatnonzero(relevant.lengths[: len(retriever.log.users)])
        found, _ = retriever.rank(users, self.part, max(self.k), masked=self.masked)
        return rank_values(found, [relevant[user] for user in users], self.k)
