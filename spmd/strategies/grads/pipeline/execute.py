"""Run any pipeline schedule: a gradient function whose layers are sharded over stages."""

# S stages, M microbatches, V chunks of layers on each stage

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies.grads.direct import microbatches
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import STAGE, StackedLeaves
from spmd.strategies.grads.pipeline.stage import Stage, StagedLoss

PyTree = Any
# Manual beside the stages, so that gradients are summed over them once a step instead of once a microbatch;
# where a strategy has made them manual, it sums. Other axes that shard the batch shard parameters too and are
# left to the compiler.
MANUAL_BATCH = ("replica", "data")


def grads_of(
    staged: StagedLoss, dims: Mapping[str, Any], mesh: Mesh, table: schedules.Table
) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """The gradient function that runs `table` on mesh.stage. dims: of the parameters; those whose dims begin
    with "layers" are stacked.

    Equals direct.accumulate of as many microbatches. ValueError for layers that the stages do not divide.
    """
    program, num_inputs, num_gradients = schedules.program(table)
    permutes = mesh.shape["context"] > 1

    def pipelined(params, model_state, batch, step_key, scale):
        outer, manual = scope.current().axes, sharding.inside()
        axes = tuple(a for a in MANUAL_BATCH if mesh.shape[a] > 1 and a not in manual)
        stacked = [_is_stacked(dims, name) for name in tree.named_leaves(params)]
        structure = jax.tree.structure(params)
        specs = structure.unflatten([P(STAGE) if is_stacked else P() for is_stacked in stacked])
        layers = num_layers(params, dims)
        leaves = StackedLeaves(stacked, structure, _specs(params, dims, mesh))

        def local(params, model_state, batch_M, step_key, scale):
            with scope.bind(axes=(*outer, *axes), partial=True):
                orders = scope.platform() == "cpu" and mesh.size > table.stages
                per_chunk = layers // (table.stages * table.virtual)
                args = (params, batch_M, step_key, scale)
                stage = Stage(staged, table, leaves, per_chunk, permutes, orders, *args)
                return stage.run(model_state, program, num_inputs, num_gradients, axes)

        run = jax.shard_map(
            local,
            in_specs=(specs, P(STAGE), P(None, axes), P(), P()),
            out_specs=(specs, P(), P(STAGE)),
            **sharding.manual(mesh, (STAGE, *axes)),
            # A gradient stays on its device until it is summed, since its branch does not run on all.
            # Exchanges within a stage are shard_maps of their own, which say nothing of how results vary.
            check_vma=False,
        )
        return run(params, model_state, microbatches(batch, table.microbatches), step_key, scale)

    return pipelined


def _is_stacked(dims: Mapping[str, Any], name: str) -> bool:
    return (dims.get(name) or ("",))[0] == "layers"


def _specs(params: PyTree, dims: Mapping[str, Any], mesh: Mesh) -> list[P]:
    """Specs of the parameters over the axes that are left to the compiler."""
    specs = [
        sharding.spec_of(name, x.shape, dims.get(name), mesh, fsdp=True)
        for name, x in tree.named_leaves(params).items()
    ]
    return [P(*(None if axis == STAGE else axis for axis in spec)) for spec in specs]


def num_layers(params: PyTree, dims: Mapping[str, Any]) -> int:
    """Number of stacked layers."""
    named = tree.named_leaves(params)
    return max(x.shape[0] for name, x in named.items() if _is_stacked(dims, name))


def check_layers(layers: int, stages: int, virtual: int, period: int = 1) -> None:
    """ValueError with the counts that work, for layers that the stages do not divide into whole periods."""
    times = f" x train.virtual_stages={virtual}" if virtual > 1 else ""
    periods = f", which repeat every {period} (model.window)" if period > 1 else ""
    unit = stages * virtual * period
    counts = [n for n in range(2, layers // virtual + 1) if layers % (n * virtual * period) == 0]
    check(
        layers % unit == 0,
        f"mesh.stage={stages}{times} does not divide the {layers} layers of the model{periods}; "
        + (f"use mesh.stage={' or '.join(map(str, counts))}" if counts else "use mesh.stage=1")
        + f", or {-(-layers // unit) * unit} layers",
    )
