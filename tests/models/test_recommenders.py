"""Recommenders: models and losses by their definitions, full ranking, recommendations, every mesh."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spmd
from spmd import metrics
from spmd.metrics.ranking import rank_values
from spmd.models.recommenders import MatrixFactorization
from spmd.models.sasrec import SASRec
from spmd.parallel import mesh, scope
from spmd.parallel.mesh import MeshConfig
from spmd.parallel.top_k import all_axes, padded_rows, sharded_top_k
from spmd.tasks import RatingPrediction, Retrieval
from tests.marks import slow_but

LOG = "--data.generated.users 40 --data.generated.items 60 --data.generated.events 1200"
SMALL = {
    "movielens_mf": "--model.dim 8",
    "movielens_two_tower": "--model.dim 8 --data.history 6 --data.negatives 3",
    "movielens_sasrec": "--data.length 8 --model.length 8 --model.embed 16 --model.layers 1"
    " --optimizer.warmup-steps 5",
}
MESHES = ("--mesh.data 4 --mesh.fsdp 2", "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2")


def words(name: str, more: str = "") -> list[str]:
    return f"--simulate 8 {LOG} --data.batch-size 16 {SMALL[name]} {more}".split()


@pytest.mark.gate
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("name", "layout"),
    slow_but(
        {("movielens_two_tower", MESHES[1])},
        [(name, layout) for name in SMALL for layout in MESHES],
    ),
)
def test_every_mesh_computes_what_one_device_does(name, layout):
    report = spmd.load(name, words(name, layout)).verify(2)
    assert report.verified, str(report)


def test_a_rating_is_mean_biases_and_product():
    config = MatrixFactorization(users=5, items=6, dim=4, mean=3.0, decay=0.1, bias_decay=0.2)
    net: Any = config.build(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    user, item = rng.normal(size=(2, 7, 4)).astype(np.float32)
    out = net(jnp.asarray(user), jnp.asarray(item))
    wanted = 3 + user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(1)
    np.testing.assert_allclose(out["rating"], wanted, rtol=1e-5)
    penalty = sum(0.1 * (x[:, 1:] ** 2).sum(1) + 0.2 * x[:, 0] ** 2 for x in (user, item))
    np.testing.assert_allclose(out["penalty"], penalty, rtol=1e-5)
    batch = {"rows/user": jnp.asarray(user), "rows/item": jnp.asarray(item)}
    np.testing.assert_allclose(
        (net.queries(batch) * net.candidates(batch)).sum(1),
        wanted - 3 - user[:, 0],
        rtol=1e-4,
        atol=1e-5,
    )
    # An evaluation clips, training does not.
    batch |= {"rating": jnp.full(7, 2.0), "weight": jnp.ones(7)}
    far = {"rating": jnp.full(7, 9.0), "penalty": jnp.zeros(7)}
    task = RatingPrediction()
    for train, error in ((True, 49), (False, 9)):
        sums, _ = task.sums_of(far, batch, task.counted(batch), train=train)
        assert float(sums["loss"]) == 7 * error


def test_the_loss_of_retrieval_estimates_the_softmax_over_the_catalogue():
    """Over many batches the mean of the estimated partition is the partition itself."""
    rng = np.random.default_rng(0)
    items, num, negatives, times = 12, 6, 4, 4000
    vectors = rng.normal(size=(items, 3)) * 0.7
    share = rng.dirichlet(np.ones(items) * 3)
    user, own = rng.normal(size=3), 5
    scores = vectors @ user
    task, estimates = Retrieval(temperature=1.0), []
    draws = rng.choice(items, p=share, size=(times, num))
    draws[:, 0] = own
    drawn = rng.integers(items - 1, size=(times, negatives))
    drawn += drawn >= own

    def loss(item, negative):
        outputs = {
            "user": jnp.tile(jnp.asarray(user), (num, 1)),
            "item": jnp.asarray(vectors)[item],
            "negatives": jnp.tile(jnp.asarray(vectors)[negative], (num, 1, 1)),
            "catalogue": jnp.asarray(items - 1),  # what is drawn is never the pair's own
        }
        batch = {"item": item, "share": jnp.asarray(share)[item]}
        # The first row is the pair itself; it counts as one of the batch that was not drawn.
        with scope.bind(weight=jnp.ones(num)):
            return task.values(outputs, batch, train=True)["loss"][0]

    losses = jax.jit(jax.vmap(loss))(draws.astype(np.int32), drawn)
    estimates = np.exp(np.asarray(losses, np.float64) + scores[own]) - np.exp(scores[own])
    others = np.exp(scores).sum() - np.exp(scores[own])
    # The other rows are num - 1 of num draws.
    by_batch = others * (num - 1) / num
    assert estimates.mean() == pytest.approx((by_batch + others) / 2, rel=0.03)
    # Rows of weight 0 are no candidates; an evaluation sees the drawn ones alone.
    outputs = {
        "user": jnp.ones((2, 3)),
        "item": jnp.ones((2, 3)),
        "negatives": jnp.zeros((2, 1, 3)),
    }
    outputs |= {"catalogue": jnp.asarray(items)}
    batch = {"item": jnp.array([1, 2]), "share": jnp.array([0.5, 0.5])}
    with scope.bind(weight=jnp.array([1.0, 0.0])):
        alone = task.values(outputs, batch, train=True)["loss"]
    wanted = np.log(np.exp(3) + items / 2) - 3  # one drawn item counts for half of the catalogue
    np.testing.assert_allclose(alone[0], wanted, rtol=1e-5)
    held = task.values(outputs, batch, train=False)["loss"]
    np.testing.assert_allclose(held, np.log(1 + np.exp(-3.0)), rtol=1e-5)


def test_sasrec_sees_earlier_items_only_and_ignores_what_fills_up():
    net: Any = SASRec(items=20, length=6, embed=16, dropout=0).build(nnx.Rngs(0))
    history = jnp.array([[-1, -1, 3, 7, 1, 4]])
    logits = net(history)
    assert logits.shape == (1, 6, 24) and (logits[..., 20:] < -1e30).all()  # 20 rows padded to 24
    other = net(history.at[0, 4].set(9))
    np.testing.assert_allclose(logits[0, :4, :20], other[0, :4, :20], rtol=1e-6)
    assert abs(logits[0, 4:, :20] - other[0, 4:, :20]).max() > 1e-3
    # Positions count from the last item: a shorter array is the same history.
    np.testing.assert_allclose(net(history[:, 2:])[0], logits[0, 2:], rtol=1e-5, atol=1e-6)
    items = net.candidates({"item": jnp.arange(20)})
    query = net.queries({"history": history})
    np.testing.assert_allclose((query @ items.T)[0], logits[0, -1, :20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_sharded_top_k_is_that_of_numpy(devices, num_devices):
    layout = MeshConfig() if num_devices == 1 else MeshConfig(data=2, fsdp=2, tensor=2)
    grid = mesh.make(layout, devices[:num_devices])
    rng = np.random.default_rng(0)
    # Small integers: exact sums, and many equal scores.
    table = rng.integers(-2, 3, (50, 4)).astype(np.float32)
    query = rng.integers(-2, 3, (5, 4)).astype(np.float32)
    excluded = np.full((5, 49), -1, np.int32)
    excluded[1, :3], excluded[2] = [0, 49, 7], np.arange(49)
    placed = jax.device_put(
        np.pad(table, ((0, padded_rows(50, grid) - 50), (0, 0)), constant_values=9),
        NamedSharding(grid, P(all_axes(grid))),
    )
    top = jax.jit(lambda q, t, e: sharded_top_k(grid, q, t, e, num_rows=50, k=10))(
        query, placed, excluded
    )
    scores = query @ table.T
    for i in range(5):
        scores[i, excluded[i][excluded[i] >= 0]] = -np.inf
        order = np.lexsort((np.arange(50), -scores[i]))[:10]
        np.testing.assert_array_equal(top.scores[i], scores[i][order])
        np.testing.assert_array_equal(top.rows[i], np.where(np.isinf(scores[i][order]), -1, order))


def test_values_of_rankings_are_those_of_the_metric():
    rng = np.random.default_rng(0)
    scores, label = rng.normal(size=(9, 30)), rng.random((9, 30)) < 0.2
    label[:, 0] |= ~label.any(1)
    ranking = metrics.Ranking(k=(3, 10))
    sums = ranking.sums(jnp.asarray(scores), {"label": jnp.asarray(label)}, {"loss": jnp.ones(9)})
    wanted = ranking.compute({name: np.asarray(x) for name, x in sums.items()})
    relevant = [np.flatnonzero(row) for row in label]
    got = rank_values(np.argsort(-scores, axis=1)[:, :10], relevant, (3, 10))
    assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.gate
def test_a_run_ranks_all_items_and_recommends(run_main, tmp_path):
    """Trained on eight devices: all items are ranked; the command prints what Python returns."""
    more = f"--train.steps 30 --log.no-tensorboard --run.dir {tmp_path / 'run'} --eval.every 30"
    line = ["--experiment", "movielens_two_tower", *words("movielens_two_tower", more)]
    done = run_main(*line, "--checkpoint.every", "30")
    assert done.returncode == 0, done.stderr
    logged = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    snapshot = spmd.load("movielens_two_tower", line[2:]).restore()
    retriever, log = snapshot.retriever, snapshot.retriever.log
    users = np.arange(40)
    rows, scores = retriever.rank(users, "test", 60)
    masked = [sorted(set(log.before("test")[u])) for u in users]
    for u in users:
        assert sorted(rows[u][rows[u] >= 0].tolist() + masked[u]) == list(range(60))
        assert (np.diff(scores[u][: 60 - len(masked[u])]) <= 0).all()
    relevant = [log.of("test")[u] for u in users]
    values = rank_values(rows[:, :10], relevant, (10,))
    assert {k: logged[f"eval/test/{k}"] for k in values} == pytest.approx(values)
    found = snapshot.recommend([7, "12"], k=4)
    seen = {str(log.items.words[i]) for i in log.before("all")[6]}
    assert len(set(found.items[0])) == 4 and not seen & {*found.items[0]}
    recommend = ["recommend", *line, "--k", "4"]
    printed = run_main(*recommend, "--user", "7", "12")
    assert printed.returncode == 0, printed.stderr
    listed = [x.split()[0] for x in printed.stdout.splitlines() if "(kind " in x]
    assert listed == [*found.items[0], *found.items[1]]
    assert "60 items on 8 devices" in printed.stdout
    mistakes = {(): "give users by the ids of the log", ("--user", "999"): "user 999 is not among"}
    for user, message in mistakes.items():
        refused = run_main(*recommend, *user)
        assert refused.returncode == 2 and message in refused.stderr
    # A log without the events of user 7, read with the ids of the run.
    other = dataclasses.replace(
        snapshot.retriever.log, part_E=np.where(log.user_E == 6, 9, log.part_E)
    )
    snapshot.retriever.log = other
    with pytest.raises(ValueError, match="user 7 has no history in this log"):
        snapshot.recommend([7])
