"""Run any pipeline schedule: a gradient function whose layers are sharded over stages."""

# S stages, M microbatches, V chunks of layers on each stage

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spmd.core import tree
from spmd.core.fields import check
from spmd.parallel import scope, sharding
from spmd.strategies.grads.direct import microbatches
from spmd.strategies.grads.pipeline import schedules
from spmd.strategies.grads.pipeline.arrays import STAGE, LeafGroups
from spmd.strategies.grads.pipeline.parts import StackOfLayers, StagedLoss, StageParts
from spmd.strategies.grads.pipeline.stage import Stage

PyTree = Any
# Manual beside the stages, so that gradients are summed over them once a step instead of once a microbatch;
# where a strategy has made them manual, it sums. Other axes that shard the batch shard parameters too and are
# left to the compiler.
MANUAL_BATCH = ("replica", "data")


def grads_of(
    staged: StagedLoss, dims: Mapping[str, Any], mesh: Mesh, table: schedules.Timetable
) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """The gradient function that runs `table` on mesh.stage. dims: of the parameters; those whose dims begin
    with "layers" are stacked.

    Equals direct.accumulate of as many microbatches. ValueError for layers that the stages do not divide.
    """
    program, num_inputs, num_gradients = schedules.program(table)
    permutes = mesh.shape["context"] > 1

    def pipelined(params, model_state, batch, step_key, scale):
        outer, manual = scope.current().axes, sharding.manual_axes()
        axes = tuple(a for a in MANUAL_BATCH if mesh.shape[a] > 1 and a not in manual)
        batch_M = microbatches(batch, table.microbatches)
        frozen, model_state, batch_M = staged.read_frozen(model_state, batch_M)
        leaves = _groups(params, staged.stacks, dims, _specs(params, dims, mesh))
        states = _groups(model_state, staged.stacks)
        is_other = [of == leaves.stacks for of in leaves.group_of]
        specs = leaves.structure.unflatten([P() if other else P(STAGE) for other in is_other])

        def local(params, model_state, batch_M, step_key, scale):
            with scope.bind(axes=(*outer, *axes), partial=True):
                orders = scope.platform() == "cpu" and mesh.size > table.stages
                args = (params, batch_M, step_key, scale)
                parts = StageParts(staged, table, leaves, states, orders, *args)
                return Stage(parts, permutes).run(
                    model_state, program, num_inputs, num_gradients, axes
                )

        run = jax.shard_map(
            local,
            in_specs=(specs, P(STAGE), P(None, axes), P(), P()),
            out_specs=(specs, P(), P(STAGE)),
            **sharding.shard_map_options(mesh, (STAGE, *axes)),
            # A gradient stays on its device until it is summed, since its branch does not run on all.
            # Exchanges within a stage are shard_maps of their own, which say nothing of how results vary.
            check_vma=False,
        )
        grads, sums, model_state = run(params, model_state, batch_M, step_key, scale)
        return grads, sums, {**model_state, **frozen}

    return pipelined


def _groups(
    nested: PyTree,
    stacks: Sequence[StackOfLayers],
    dims: Mapping[str, Any] | None = None,
    specs: Sequence[P] = (),
) -> LeafGroups:
    """The leaves by stack: a stack has the stacked leaves below its name, the only one all of them.

    dims: of the leaves; None where all are stacked.
    """
    numbers = {stack.name: i for i, stack in enumerate(stacks)}

    def group_of(name: str) -> int:
        if dims is not None and (dims.get(name) or ("",))[0] != "layers":
            return len(stacks)
        top = name.split("/")[0]
        check(
            len(stacks) == 1 or top in numbers,
            f"mesh.stage: {name} is stacked by layers, and belongs to none of the model's stacks"
            f" ({', '.join(numbers)})",
        )
        return 0 if len(stacks) == 1 else numbers[top]

    names = tree.named_leaves(nested)
    structure = jax.tree.structure(nested)
    return LeafGroups([group_of(name) for name in names], structure, len(stacks), list(specs))


def _specs(params: PyTree, dims: Mapping[str, Any], mesh: Mesh) -> list[P]:
    """Specs of the parameters over the axes that are left to the compiler."""
    specs = [
        sharding.spec_of(name, x.shape, dims.get(name), mesh, fsdp=True)
        for name, x in tree.named_leaves(params).items()
    ]
    return [P(*(None if axis == STAGE else axis for axis in spec)) for spec in specs]


def check_layers(stacks: Sequence[StackOfLayers], stages: int, virtual: int) -> None:
    """ValueError with the counts that work, for layers that the stages do not divide into whole periods.

    virtual: chunks of each stack on a stage.
    """
    times = f" x train.virtual_stages={virtual}" if virtual > 1 else ""
    most = min(stack.layers // stack.period for stack in stacks) // virtual
    divides = lambda n: all(s.layers % (n * virtual * s.period) == 0 for s in stacks)
    counts = [n for n in range(2, most + 1) if divides(n)]
    for stack in stacks:
        of = "the model" if len(stacks) == 1 else stack.name
        repeats = f" ({stack.repeats})" if stack.repeats else ""
        periods = f", which repeat every {stack.period}{repeats}" if stack.period > 1 else ""
        unit = stages * virtual * stack.period
        check(
            stack.layers % unit == 0,
            f"mesh.stage={stages}{times} does not divide the {stack.layers} layers of {of}{periods}; "
            + (f"use mesh.stage={' or '.join(map(str, counts))}" if counts else "use mesh.stage=1")
            + f", or {-(-stack.layers // unit) * unit} layers",
        )
