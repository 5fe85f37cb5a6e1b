"""Layout: how a step is sharded and scheduled; the search varies it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd.analysis.plan.blocks import Blocks, declared_stacks
from spmd.analysis.plan.facts import Facts
from spmd.analysis.plan.shardings import GROUPS
from spmd.analysis.plan.tables import check_stripes
from spmd.core.fields import check
from spmd.models.attention.kernels import check_ring
from spmd.parallel.mesh import AXES, BATCH_AXES, MeshConfig
from spmd.strategies import Auto
from spmd.strategies.grads.pipeline import execute, schedules

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment

Sizes = Mapping[str, int]  # mesh axis -> size
REMATS = ("none", "dots", "named", "full")
CONTEXTS = ("ring", "ulysses")


class Layout(NamedTuple):
    """How a step is sharded and scheduled.

    mesh: sizes of the axes that are not 1. zero: what mesh.fsdp shards: 3 parameters and optimizer state, 1
    the optimizer state only. remat: of REMATS, "" for a model without that field. saved: activations that
    remat=named saves. slices: TPU slices that the devices are spread over. pipeline: schedule if mesh.stage
    shards the layers; each stage has `virtual` chunks of each of the model's `stacks`. context: how
    mesh.context shards attention, of CONTEXTS.
    """

    mesh: Sizes
    zero: int = 3
    sequence_parallel: bool = False
    accumulate: int = 1
    remat: str = "none"
    saved: tuple[str, ...] = ("query", "key", "value", "attended")
    slices: int = 1
    pipeline: schedules.Kind = "1f1b"
    virtual: int = 1
    context: str = "ring"
    stacks: int = 1

    def size(self, *axes: str) -> int:
        """Product of the sizes of `axes`."""
        product = 1
        for axis in axes:
            product *= self.mesh.get(axis, 1)
        return product

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.size(*AXES)

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1 without a pipeline."""
        return self.size("stage")

    @property
    def ticks(self) -> int:
        """Ticks of the pipeline's schedule."""
        sizes = self.stages, self.accumulate, self.virtual
        return schedules.ticks(self.pipeline, *sizes, stacks=self.stacks)

    @property
    def chunks(self) -> int:
        """Chunks of layers on each stage."""
        return self.virtual * self.stacks

    def words(self) -> list[str]:
        """Command-line flags that select the layout."""
        sizes = {"data": 1} | {axis: size for axis, size in self.mesh.items() if size > 1}
        words = [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))]
        words += ["--strategy.zero", "1"] if self.zero == 1 and self.size("fsdp") > 1 else []
        words += ["--strategy.sequence-parallel"] if self.sequence_parallel else []
        words += ["--train.accumulate", str(self.accumulate)] if self.accumulate > 1 else []
        if self.stages > 1:
            words += ["--train.pipeline", self.pipeline]
            words += ["--train.virtual-stages", str(self.virtual)] if self.virtual > 1 else []
        words += ["--model.context", self.context] if self.size("context") > 1 else []
        return [*words, *(["--model.remat", self.remat] if self.remat else [])]

    def json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**self._asdict(), "mesh": dict(self.mesh), "saved": list(self.saved)}

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.mesh.items() if size > 1] or ["one device"]
        parts += [f"zero={self.zero}"] if self.size("fsdp") > 1 else []
        parts += ["sequence-parallel"] if self.sequence_parallel else []
        parts += [f"accumulate={self.accumulate}"] if self.accumulate > 1 else []
        if self.stages > 1:
            parts.append(self.pipeline + (f"={self.virtual}" if self.virtual > 1 else ""))
        parts += [self.context] if self.size("context") > 1 else []
        return " ".join([*parts, *([f"remat={self.remat}"] if self.remat else [])])


def from_experiment(exp: Experiment, num_devices: int) -> Layout:
    """The layout of `exp` on `num_devices` devices."""
    auto = exp.strategy if isinstance(exp.strategy, Auto) else Auto()
    model: Any = exp.model
    train = exp.train
    sizes = {axis: n for axis, n in exp.mesh.resolve(num_devices).items() if n > 1}
    pipeline = train.pipeline if "stage" in sizes else "1f1b"
    return Layout(
        sizes,
        zero=auto.zero,
        sequence_parallel=auto.sequence_parallel,
        accumulate=train.accumulate,
        remat=getattr(model, "remat", "none"),
        saved=getattr(model, "saved", ()),
        pipeline=pipeline,
        virtual=train.virtual_stages if pipeline == "interleaved" else 1,
        context=getattr(model, "context", "ring") if "context" in sizes else "ring",
        stacks=max(len(declared_stacks(model)), 1),
    )


def apply(layout: Layout, exp: Experiment) -> Experiment:
    """The experiment, sharded and scheduled as `layout` says."""
    sizes = {"data": 1} | dict(layout.mesh)
    model = exp.model
    if hasattr(model, "remat"):
        model = dataclasses.replace(model, remat=layout.remat)
    if layout.size("context") > 1:
        model = dataclasses.replace(model, context=layout.context)
    train = dataclasses.replace(exp.train, accumulate=layout.accumulate)
    if layout.stages > 1:
        train = dataclasses.replace(
            train,
            pipeline=layout.pipeline,
            virtual_stages=layout.virtual if layout.virtual > 1 else train.virtual_stages,
        )
    return dataclasses.replace(
        exp,
        model=model,
        mesh=MeshConfig(**sizes),
        strategy=Auto(
            zero=3 if layout.zero == 3 else 1, sequence_parallel=layout.sequence_parallel
        ),
        train=train,
    )


def tokens(facts: Facts, layout: Layout, length: int = 0) -> float:
    """Tokens of a microbatch on a device, not divided by the tensor axis.

    length: tokens of an example, by default those of `facts`.
    """
    num = facts.batch_size * (length or facts.length)
    return num / layout.size(*BATCH_AXES, "context") / layout.accumulate


def check_fits(facts: Facts, layout: Layout) -> None:
    """ValueError with the reason if the experiment cannot have this layout, memory aside."""
    check_mesh(facts, layout)
    rows = layout.size(*BATCH_AXES) * layout.accumulate
    check(
        facts.batch_size % rows == 0,
        f"data.batch_size={facts.batch_size} does not divide over {layout.size(*BATCH_AXES)} batch shards"
        f" x train.accumulate={layout.accumulate}",
    )
    if facts.model is None:
        return
    tensor, context = layout.size("tensor"), layout.size("context")
    for length in facts.model.lengths:
        check(
            not layout.sequence_parallel or length % (tensor * context) == 0,
            f"sequence parallelism: mesh.tensor={tensor}"
            + (f" x mesh.context={context}" if context > 1 else "")
            + f" does not divide the {length} tokens of a sequence",
        )
    if layout.stages > 1:
        _check_stages(facts, layout)


def check_mesh(facts: Facts, layout: Layout) -> None:
    """ValueError if the mesh and the kind of context rule out every layout of the experiment."""
    model = facts.model
    check_stripes(facts.tables, layout.num_devices)
    if model is None:
        for axis in ("stage", "context", "tensor"):
            size = layout.size(axis)
            check(
                size == 1,
                f"mesh.{axis}={size}: the planner knows its cost for models that declare their stacks",
            )
        return
    for blocks in model.blocks:
        _check_blocks(blocks, layout)
    if layout.stages > 1:
        execute.check_layers(model.stacks, layout.stages, 1)


def _check_blocks(blocks: Blocks, layout: Layout) -> None:
    """The part of check_mesh about some blocks."""
    config, tensor, context = blocks.config, layout.size("tensor"), layout.size("context")
    check(
        config.heads % tensor == 0 and config.num_kv_heads % tensor == 0,
        f"mesh.tensor={tensor} does not divide the {config.heads} heads and"
        f" {config.num_kv_heads} key and value heads",
    )
    expert, experts = layout.size("expert"), config.experts.num
    check(
        not experts or experts % expert == 0,
        f"mesh.expert={expert} does not divide the {experts} experts",
    )
    check(
        blocks.length % context == 0,
        f"mesh.context={context} does not divide the {blocks.length} tokens of a sequence",
    )
    if context > 1:
        _check_context(blocks, layout)


def _check_context(blocks: Blocks, layout: Layout) -> None:
    """The checks of models.attention, which run while a step is traced."""
    config, context, tensor = blocks.config, layout.size("context"), layout.size("tensor")
    if layout.context == "ring":
        check(
            config.attention == "xla",
            f"model.attention={config.attention} needs complete sequences, and model.context=ring shards"
            " them",
        )
        check_ring(config.mask, windows=any(config.window))
        check(
            config.mask == "full" or blocks.length % (2 * context) == 0,
            f"model.context=ring: 2 x mesh.context={context} does not divide the {blocks.length} tokens of a"
            " sequence",
        )
        return
    check(
        math.gcd(config.heads, config.num_kv_heads) % (context * tensor) == 0,
        f"model.context=ulysses: mesh.context={context}"
        + (f" x mesh.tensor={tensor}" if tensor > 1 else "")
        + f" does not divide the {config.heads} heads and {config.num_kv_heads} key and value heads",
    )


def _check_stages(facts: Facts, layout: Layout) -> None:
    """The checks of strategies.base and pipeline.schedules, which run when a step is built."""
    assert facts.model
    stages, micro = layout.stages, layout.accumulate
    check(
        all(leaf.group == GROUPS["params"] for leaf in facts.weights),
        f"mesh.stage={stages}: a pipeline takes no frozen parameters or adapters",
    )
    execute.check_layers(facts.model.stacks, stages, layout.virtual)
    check(
        layout.stacks == 1 or micro % stages == 0,
        f"a pipeline of {layout.stacks} stacks takes train.accumulate in multiples of mesh.stage={stages};"
        f" given train.accumulate={micro}",
    )
    check(
        layout.pipeline != "interleaved" or (layout.virtual > 1 and micro % stages == 0),
        f"train.pipeline=interleaved takes train.accumulate in multiples of mesh.stage={stages}, and at least"
        f" 2 virtual stages; given train.accumulate={micro} and train.virtual_stages={layout.virtual}",
    )
