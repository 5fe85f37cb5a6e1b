"""Sparse tables in a plan: the bytes of their exchange, memory, and what a TPU pads."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spmd
from spmd import Experiment, optim
from spmd.analysis.plan import comms, facts, layout, planner, report
from spmd.analysis.plan.tables import PAYLOAD, table_collectives
from spmd.data import Arrays
from spmd.hardware import hlo
from spmd.parallel.mesh import MeshConfig
from spmd.parallel.routing import bucket_slots
from spmd.parallel.tables import Lookup, Placement, SparseTable
from spmd.tasks import Task
from spmd.train import TrainConfig
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
EXAMPLES, BAG, DIM, IDS, KINDS = 64, 8, 16, 5000, 30
PLACEMENT = Placement(IDS, DIM)


class Bags(nnx.Module):
    tables = MappingProxyType(
        {
            "items": SparseTable(
                ids=IDS, dim=DIM, lookups=(Lookup(feature="bag"),), placement="rows"
            ),
            "kinds": SparseTable(ids=KINDS, dim=DIM, lookups=(Lookup(feature="kind"),)),
        }
    )

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.last = nnx.Linear(DIM, 1, use_bias=False, rngs=rngs)

    def __call__(self, bag: jax.Array, kind: jax.Array) -> jax.Array:
        return self.last(bag * kind)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(Task):
    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return batch["rows/bag"], batch["rows/kind"]

    def values(self, outputs: Any, batch: Any, *, train: bool) -> dict[str, jax.Array]:
        return {"loss": jnp.square(outputs - batch["target"])}


def log() -> dict[str, np.ndarray]:
    return {
        "bag": np.zeros((EXAMPLES, BAG), np.int32),
        "kind": np.arange(EXAMPLES, dtype=np.int32) % KINDS,
        "target": np.ones(EXAMPLES, np.float32),
    }


def distributions() -> dict[str, np.ndarray]:
    rng, shape, every = np.random.default_rng(0), (EXAMPLES, BAG), np.arange(IDS)
    draw = lambda pool: rng.choice(pool, shape)
    return {
        "uniform": draw(every),
        "one id": draw([7]),
        "one owner": draw(every[PLACEMENT.place(every) < PLACEMENT.rows // 8]),
        "few": draw(every[:5]),
        "zipf": np.minimum(rng.zipf(1.2, shape) - 1, IDS - 1),
        "holes": np.where(rng.random(shape) < 0.4, -1, draw(every)),
        "nothing": draw([-1]),
    }


def rounds_of(ids: np.ndarray, num: int) -> int:
    """Rounds until every device has asked every owner, by numpy: a round takes, of each owner, the rows below
    the least place at which a device's bucket is full.
    """
    block, slots = PLACEMENT.rows // num, bucket_slots(ids.size // num, num)
    places = [np.unique(PLACEMENT.place(part[part >= 0])) for part in np.split(ids, num)]
    left = [[rows[rows // block == owner] for rows in places] for owner in range(num)]
    count = 0
    while any(len(rows) for owner in left for rows in owner):
        count += 1
        for owner in left:
            below = min((rows[slots] for rows in owner if len(rows) > slots), default=IDS**2)
            owner[:] = [rows[rows >= below] for rows in owner]
    return count


@pytest.mark.parametrize("num", slow_but((8,), (1, 2, 4, 8)))
def test_bytes_of_a_round_times_its_rounds_are_those_of_the_closed_form(num):
    features = {"bag": ((BAG,), "int32"), "kind": ((), "int32"), "target": ((), "float32")}
    exp = Experiment(
        model=Bags,
        task=Regression(),
        optimizer=optim.SGD(learning_rate=0.1, momentum=0),
        data=Arrays(train=log, eval=log, features=features, batch_size=EXAMPLES),
        train=TrainConfig(steps=9),
        mesh=MeshConfig(data=-1),
        simulate=num,
    )
    program = exp.build()
    strategy, state = program.strategy, program.init()
    batch = next(program.host_batches(0, 1))
    compiled = strategy.step.lower(state, batch).compile()
    axes = {str(axis): size for axis, size in program.mesh.shape.items()}
    text = hlo.read(compiled.as_text() or "", axes)
    program_sends = comms.from_program(text, layout.from_experiment(exp, num))
    lookups = [c for c in program_sends if c.payload == PAYLOAD and c.kind == "all-to-all"]
    stacks = facts.from_experiment(exp).tables
    most = 0
    for name, ids in distributions().items():
        now = {
            **batch,
            "bag": ids.astype(np.int32),
            "example_id": np.arange(EXAMPLES, dtype=np.int32),
        }
        state, metrics = compiled(
            state, jax.device_put(now, strategy.batch_shardings), dict(strategy.step.knobs)
        )
        counted, want = int(metrics["lookup_rounds"]), rounds_of(ids, num)
        assert counted == want, name
        wanted = table_collectives(stacks, EXAMPLES, layout.from_experiment(exp, num), want)
        closed = sum(c.wire_bytes for c in wanted if c.kind == "all-to-all")
        assert counted * sum(c.wire_bytes for c in lookups) == pytest.approx(closed, rel=0.02), name
        most = max(most, counted)
    assert most > 1 or num == 1
    # The dense gradient of the replicated table is summed with those of the parameters; beside the loss.
    summed = lambda collectives: sum(c.wire_bytes for c in collectives if c.kind == "all-reduce")
    wanted = comms.step_collectives(facts.from_experiment(exp), layout.from_experiment(exp, num))
    assert abs(summed(program_sends) - summed(wanted)) <= 0.02 * summed(wanted) + 64 * (num > 1)


def test_a_width_that_tpus_pad_costs_what_the_plan_says():
    plan = lambda dim: planner.plan(
        spmd.load("clicks", ["--model.dim", str(dim), "--model.placement", "rows"]).experiment,
        "v5e:2x4",
        compiled=False,
    )
    padded, wide = plan(96), plan(128)
    (stack,) = padded.facts.tables
    slots = stack.slot_bytes * stack.rows // 8
    assert padded.memory.tables - slots == wide.memory.tables - slots
    assert "rows of 96 numbers take the memory of 128" in report.summary(padded)
    assert "take the memory" not in report.summary(wide)


def test_a_number_of_devices_that_no_run_could_have_is_refused():
    with pytest.raises(ValueError, match="1024 stripes, which 6 devices do not divide"):
        planner.plan(
            spmd.load("clicks", ["--data.batch-size", "1020"]).experiment, "cpu:6", compiled=False
        )
