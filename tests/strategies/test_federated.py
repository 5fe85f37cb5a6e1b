"""federated: who trains on what, what is averaged, and what the server sees."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import spmd
from spmd.core import tree
from spmd.strategies import Federated, clients, secure

pytestmark = pytest.mark.usefixtures("devices")
LABELS = np.random.default_rng(0).integers(0, 10, 2000)
WORDS = [
    *("--strategy", "federated", "--strategy.clients", "40", "--strategy.fraction", "0.2"),
    *("--strategy.period", "5", "--data.batch-size", "32", "--model.hidden", "16"),
    *("--optimizer.momentum", "0", "--train.steps", "10", "--simulate", "8"),
]
SPREAD = ("--mesh.replica", "8", "--mesh.data", "1")


# ---- who trains on what


def entropy(shares):
    """Of the classes of a client's examples, in nats; weighted by size."""
    total = 0.0
    for mine in shares:
        p = np.bincount(LABELS[mine], minlength=10) / len(mine)
        total -= len(mine) * np.sum(p[p > 0] * np.log(p[p > 0]))
    return total / len(LABELS)


def test_every_example_has_one_client_and_alpha_says_how_alike_they_are():
    found = {alpha: clients.deal(LABELS, 50, alpha, seed=3) for alpha in (0.05, 0.3, 100.0)}
    for shares in found.values():
        np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(LABELS)))
        assert min(map(len, shares)) >= 1
    assert entropy(found[0.05]) < 0.8 < entropy(found[0.3]) < 1.9 < 2.1 < entropy(found[100.0])
    sizes = {alpha: np.std([len(mine) for mine in shares]) for alpha, shares in found.items()}
    assert sizes[0.05] > 2 * sizes[100.0]
    again = clients.deal(LABELS, 50, 0.3, seed=3)
    assert all(map(np.array_equal, again, found[0.3]))
    assert not all(map(np.array_equal, clients.deal(LABELS, 50, 0.3, seed=4), found[0.3]))
    assert [len(mine) for mine in clients.deal(LABELS[:7], 7, 0.3, 0)] == [1] * 7


def rounds(**changes):
    how = {"seed": 5, "batch_size": 32, "period": 6, "epochs": 2, "drop_outs": 0.3} | changes
    owned = clients.deal(LABELS, 100, 0.3, seed=5)
    return owned, clients.ClientOrder(owned, 8, **how)


def test_a_round_is_epochs_over_the_examples_of_its_clients():
    owned, order = rounds()
    gone = 0
    for number in (0, 1, 7):
        positions = np.arange(6 * 32) + number * 6 * 32
        table = order[positions].reshape(6, 8, 4).transpose(1, 0, 2).reshape(8, 24)
        chosen, dropped = order.clients(number)
        assert len(set(chosen)) == 8
        gone += dropped.sum()
        for row, client, absent in zip(table, chosen, dropped, strict=True):
            mine = owned[client]
            trained = row[row >= 0]
            assert (row[len(trained) :] == -1).all()  # empty rows come last
            assert len(trained) == (0 if absent else min(24, 2 * len(mine)))
            if len(trained) >= len(mine):
                np.testing.assert_array_equal(np.sort(trained[: len(mine)]), mine)
            assert np.isin(trained, mine).all()
    assert 0 < gone < 24
    assert not np.array_equal(order.clients(0)[0], order.clients(1)[0])


def test_the_order_is_a_function_of_seed_and_position():
    _, order = rounds()
    whole = order[np.arange(20 * 32)]
    mixed = np.random.default_rng(1).permutation(20 * 32)
    np.testing.assert_array_equal(rounds()[1][mixed], whole[mixed])
    assert (rounds(seed=6)[1][np.arange(192)] != whole[:192]).any()


# ---- secure aggregation


def uniform(words):
    """Whether the four bytes of uint32 words look uniform: chi-squared of 255 degrees of freedom each."""
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> shift) & 255, minlength=256)
        expected = len(words) / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("absent", [[], [2], [0, 4, 5]])
def test_the_inputs_are_uniform_and_their_sum_is_exact(absent):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1e-3, (7, 20_000)).astype(np.float32)
    values[1] = 0  # even of nothing
    places = secure.fraction_bits(7, 4.0)
    present = ~np.isin(np.arange(7), absent)
    x = np.asarray(jax.vmap(lambda v: secure.to_fixed_point(v, places))(values))
    sent = np.asarray(jax.jit(secure.mask_inputs)(x, present, jax.random.key(1)))
    for client in range(7):
        uniform(sent[client])
        uniform(sent[client] - x[client])
    uniform(sent[1] - sent[3])
    want = x[present].astype(np.int64).sum(0)
    np.testing.assert_array_equal(sent.sum(0, dtype=np.uint32), (want % 2**32).astype(np.uint32))
    signed = np.round(values[present].astype(np.float64) * 2.0**places).sum(0)
    total = secure.from_fixed_point(sent.sum(0, dtype=np.uint32), places, np.float32)
    np.testing.assert_allclose(total, signed / 2.0**places, atol=2.0**-24)


def test_the_secure_mean_is_the_weighted_mean_and_a_round_of_few_is_void():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(0, 1, (6, 30, 2)), "b": rng.normal(0, 1, (6, 5))}
    values = {k: v.astype(np.float32) for k, v in values.items()}
    weight = np.array([3, 0, 100, 57, 21, 1], np.float32)
    how = {"limit": 8.0, "max_weight": 100.0}
    mean = jax.jit(lambda values, weight: secure.mean(values, weight, jax.random.key(2), **how))
    found, metrics = mean(values, weight)
    assert metrics["secure_clipped"] == 0
    for name, x in values.items():
        want = np.tensordot(weight / weight.sum(), x, 1)
        np.testing.assert_allclose(found[name], want, atol=1e-6)
    void, _ = mean(values, np.where(np.arange(6) < 4, np.float32(0), weight))
    assert not any(np.any(x) for x in void.values())
    values["b"][0, 0] = 9
    assert mean(values, weight)[1]["secure_clipped"] == 1


# ---- the strategy


def trained(*words, steps=10):
    """The state after so many steps."""
    program = spmd.load("digits", [*WORDS, *words]).build()
    state = program.init()
    for batch in program.host_batches(0, steps):
        state, metrics = program.strategy.step(
            state, jax.device_put(batch, program.strategy.batch_shardings)
        )
        jax.block_until_ready(metrics)
    return state


def test_masks_change_nothing_and_the_mesh_neither():
    """Drop-outs, and the same clients on one device or spread over two."""
    how = ("--strategy.drop-outs", "0.2")
    want = trained(*how, "--simulate", "1", steps=5)
    spread = ("--simulate", "2", "--mesh.replica", "2", "--mesh.data", "1")
    got = trained(*how, *spread, "--strategy.secure", steps=5)
    for name, leaf in tree.named_leaves(want.params).items():
        np.testing.assert_allclose(
            tree.named_leaves(got.params)[name], leaf, atol=1e-5, err_msg=name
        )
    assert np.abs(np.asarray(want.params["head"]["bias"])).max() > 1e-3
    assert got.strategy_state["params"]["head"]["kernel"].sharding.spec[0] == "replica"


def test_the_proximal_term_holds_clients_back():
    drift = {}
    for mu in ("0", "10"):
        state = trained("--simulate", "1", "--strategy.proximal", mu, steps=4)
        kernel_S = np.asarray(state.strategy_state["params"]["head"]["kernel"])
        drift[mu] = np.abs(kernel_S - np.asarray(state.params["head"]["kernel"])[None]).mean()
    assert 0 < drift["10"] < 0.8 * drift["0"]


@pytest.mark.slow
def test_a_thousand_clients_on_eight_devices():
    words = ["--strategy.clients", "1000", "--strategy.fraction", "1", "--data.batch-size", "2000"]
    program = spmd.load("digits", [*WORDS, *words, *SPREAD]).build()
    state = program.init()
    kernel = state.strategy_state["params"]["head"]["kernel"]
    assert kernel.shape == (1000, 16, 10)
    assert {shard.data.shape[0] for shard in kernel.addressable_shards} == {125}
    (batch,) = program.host_batches(0, 1)
    _, metrics = program.strategy.step(
        state, jax.device_put(batch, program.strategy.batch_shardings)
    )
    assert np.isfinite(metrics["loss"])


def test_mistakes_are_one_message(run_main):
    done = run_main("--experiment", "digits", *WORDS, "--strategy.clients", "1500")
    assert done.returncode == 2 and "clients=1500 are more than the 1438" in done.stderr
    text = ["--strategy", "federated", "--train.steps", "50", "--simulate", "1"]
    with pytest.raises(ValueError, match=r"by their label, .*: the data has none"):
        spmd.load("lm_stdlib", [*text, "--data.batch-size", "20"]).build()
    with pytest.raises(ValueError, match=r"10 replicas .* mesh.replica=8; .* 1, 2, 5, 10"):
        spmd.load("digits", [*WORDS, *SPREAD, "--strategy.clients", "50"]).build()
    for name, value in {"clients": 0, "fraction": 0.0, "alpha": 0.0, "drop_outs": 1.0}.items():
        with pytest.raises(ValueError, match=f"strategy.{name}"):
            Federated(**{name: value})
