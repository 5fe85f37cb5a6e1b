"""Compare the step on a mesh with the step on one device, step by step, and locate the first difference."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd.analysis.verify import compare, named
from spmd.analysis.verify.compare import ComparedLeaf
from spmd.analysis.verify.report import Fault, MeshResult, VerifyReport
from spmd.core import tree
from spmd.hardware import flops
from spmd.parallel import scope
from spmd.parallel.mesh import AXES
from spmd.parallel.sharding import RULES
from spmd.strategies import base
from spmd.train.program import Program

Sizes = Mapping[str, int]
# Bounds of the float64 pass by the narrowest type that the model computes in: a model may compute in float32
# whatever the type of its parameters.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
# Expected difference of the loss in the experiment's own precision; reported, decides nothing.
EXPECTED = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}


class Precision(NamedTuple):
    """Precision of one pass over the steps. decides: whether a difference in it is a fault; only in float64
    is a difference above rounding always a fault.
    """

    name: str
    param_dtype: Any
    decides: bool = False

    @staticmethod
    def of_experiment(param_dtype: str, dtype: str) -> Precision:
        """The precision that the experiment trains in, named by the narrowest type in it."""
        narrow = "bfloat16" if "bfloat16" in (param_dtype, dtype) else dtype or param_dtype
        return Precision(narrow, param_dtype)


DECISIVE = Precision("float64", "float64", decides=True)
Build = Callable[[Precision, Sizes | None], Program]  # None: the reference, strategy auto


@dataclasses.dataclass
class Case:
    """A mesh under comparison. carried: the strategy's state after its last step; None where its layout is
    that of the reference, so that every step can start from the reference's state alone.
    """

    result: MeshResult
    sizes: Sizes
    program: Program
    carried: base.TrainState | None


def run(
    build: Build,
    meshes: Sequence[Sizes] | None,
    precision: Precision,
    num_steps: int,
    num_devices: int,
    strategy: str,
) -> VerifyReport:
    """Compare meshes with one device, in float64 and in the experiment's own precision.

    Args:
        build: builds the experiment for a precision and a mesh.
        meshes: the meshes; None for all factorisations of `num_devices`.
        precision: the one that the experiment trains in.
        num_steps: steps to compare.
        num_devices: devices of each mesh.
        strategy: its name, for the report.

    Raises:
        ValueError: no mesh fits the experiment. Where several are tried, those that do not fit are reported
            as skipped.
    """
    with jax.enable_x64(True):
        reference = build(DECISIVE, None)
        dtypes = flops.count_step(reference.task, reference.abstract_batch())
        tolerance = max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        verifier = Verifier(
            build, reference, min(num_steps, reference.num_steps), tolerance or 1e-9
        )
        candidates = list(meshes or factorisations(num_devices, model_axes(reference)))
        results = [MeshResult(describe(sizes), strategy) for sizes in candidates]
        verifier.compare(DECISIVE, candidates, results, skip=meshes is None)
    if all(result.skipped for result in results):
        raise ValueError(
            f"no mesh of {num_devices} devices fits; {results[0].mesh}: {results[0].skipped}"
        )
    sound = [pair for pair in zip(candidates, results, strict=True) if pair[1].sound]
    if sound and precision.name != DECISIVE.name:
        with jax.enable_x64(precision.param_dtype == "float64"):
            second = dataclasses.replace(verifier, reference=build(precision, None))
            second.compare(precision, *zip(*sound, strict=True), skip=False)
    return VerifyReport(
        experiment=reference.name,
        steps=verifier.num_steps,
        tolerance=verifier.tolerance,
        precision=precision.name,
        loss_tolerance=EXPECTED[precision.name],
        results=results,
    )


def describe(sizes: Sizes) -> str:
    """`data=4 fsdp=2`."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def model_axes(program: Program) -> list[str]:
    """Mesh axes that can shard this model: the batch axes, and those that a rule maps one of its dims (or
    the dim of its sequences) to.
    """
    dims = {dim for named_dims in program.task.dims.values() for dim in named_dims or () if dim}
    if "tokens" in program.abstract_batch():
        dims.add("time")
    used = {"replica", "data", "fsdp"} | {axis for dim in dims for axis in RULES[dim]}
    return [axis for axis in AXES if axis in used]


def factorisations(number: int, axes: Sequence[str]) -> Iterator[Sizes]:
    """All ways to write `number` as a product over `axes`, those that use few axes first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    products = itertools.product(divisors, repeat=len(axes))
    exact = [factors for factors in products if math.prod(factors) == number]
    for factors in sorted(exact, key=lambda f: sum(size > 1 for size in f)):
        yield dict(zip(axes, factors, strict=True))


def batches(program: Program, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """The run's first batches, every second one with padding that is spread unevenly over the devices: a mean
    of per-device means is only wrong when the devices hold different numbers of examples.
    """
    batch_size = program.data.batch_size
    for step, batch in enumerate(program.host_batches(0, num_steps)):
        if step % 2:
            first, num = batch_size * 5 // 8, batch_size * 9 // 32
            weight_B = batch["weight"].copy()
            weight_B[first : first + num] = 0
            batch = batch | {"weight": weight_B}
        yield batch


def _step(program: Program, state: base.TrainState, batch: Any) -> tuple[base.TrainState, Any]:
    """Runs the program's own step with its tensors named; donates the state."""
    with scope.bind(watched=True):
        return program.strategy.step(state, jax.device_put(batch, program.strategy.batch_shardings))


def _shapes(part: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.named_leaves(part).items()}


def state_to_carry(reference: Program, program: Program) -> base.TrainState | None:
    """An initial state, if the strategy's state has another layout than that of one device; else None."""
    same = _shapes(reference.abstract_state()) == _shapes(program.abstract_state())
    return None if same else program.init()


def place(
    state: base.TrainState, carried: base.TrainState | None, strategy: base.Strategy
) -> base.TrainState:
    """The state of one device (on the host) in the layout of `strategy`, to start a step from.

    The parameters go through with_params, which sets every copy that the strategy holds of them; other fields
    of the same shapes are copied. Fields that only the strategy has (residuals, queues) are taken from
    `carried`, which stays valid.
    """
    if carried is None:
        return jax.device_put(state, strategy.state_shardings)
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    copied = {
        name: jax.device_put(part, getattr(strategy.state_shardings, name))
        for name, part in fields.items()
        if _shapes(part) == _shapes(getattr(carried, name))
    }
    # A copy, because steps donate their state.
    previous = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), carried)
    return dataclasses.replace(strategy.with_params(previous, state.params), **copied)


class Moment(NamedTuple):
    """A step of the reference: the state before it and its outputs, both on the host."""

    step: int
    before: base.TrainState
    batch: Mapping[str, np.ndarray]
    want: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Verifier:
    """Compares meshes with the reference. tolerance: bound on the relative difference of each leaf."""

    build: Build
    reference: Program
    num_steps: int
    tolerance: float

    def compare(
        self,
        precision: Precision,
        meshes: Sequence[Sizes],
        results: Sequence[MeshResult],
        *,
        skip: bool,
    ) -> None:
        """Compares all meshes at each step, so that only one state of the reference is held at a time.

        skip: record meshes that do not fit as skipped, instead of raising.
        """
        cases = self._cases(precision, meshes, results, skip=skip)
        state = self.reference.init()
        for step, batch in enumerate(batches(self.reference, self.num_steps)):
            before = jax.tree.map(np.array, state)
            state, metrics = _step(self.reference, state, batch)
            moment = Moment(step, before, batch, compare.host(compare.outputs(state, metrics)))
            if not np.isfinite(loss := moment.want["metrics/loss"]):
                raise ValueError(
                    f"on one device the loss of step {step + 1} is {loss} in {precision.name}: nothing"
                    " can be compared with that; try a lower learning rate"
                )
            for case in [case for case in cases if case.result.sound]:
                self._compare_step(precision, case, moment)

    def _cases(
        self,
        precision: Precision,
        meshes: Sequence[Sizes],
        results: Sequence[MeshResult],
        *,
        skip: bool,
    ) -> list[Case]:
        cases = []
        for sizes, result in zip(meshes, results, strict=True):
            try:
                program = self.build(precision, sizes)
                # Some sizes are only checked for divisibility while a step is traced.
                with scope.bind(watched=True):
                    jax.eval_shape(
                        program.strategy.step, program.abstract_state(), program.abstract_batch()
                    )
                carried = state_to_carry(self.reference, program)
                cases.append(Case(result, sizes, program, carried))
            except ValueError as error:
                if not skip:
                    raise
                result.skipped = str(error)
        return cases

    def _compare_step(self, precision: Precision, case: Case, moment: Moment) -> None:
        state = place(moment.before, case.carried, case.program.strategy)
        new, metrics = _step(case.program, state, moment.batch)
        leaves = compare.leaves(moment.want, compare.outputs(new, metrics))
        case.result.add(precision.name, leaves)
        if precision.decides and self._differ(leaves):
            case.result.fault = self._locate(case, moment, leaves)
        case.carried = None if case.carried is None else new
        if moment.step == 0 or case.result.fault:
            print(
                f"{precision.name}  {case.result.mesh}: step {moment.step + 1} of {self.num_steps}"
                f" {'differs' if case.result.fault else 'agrees'}"
                f" ({max(leaf.error for leaf in leaves.values()):.1e})",
                file=sys.stderr,
                flush=True,
            )

    def _differ(self, leaves: Mapping[str, ComparedLeaf]) -> bool:
        return any(not leaf.error <= self.tolerance for leaf in leaves.values())

    def _locate(self, case: Case, moment: Moment, leaves: Mapping[str, ComparedLeaf]) -> Fault:
        """The first tensor of the step that differs, and the mesh axes that each suffice to show it."""
        forward = compare.activations(
            self._tensors(self.reference, None, moment),
            self._tensors(case.program, case.carried, moment),
        )
        used = {axis: size for axis, size in case.sizes.items() if size > 1}
        single = len(used) == 1
        return Fault(
            step=moment.step + 1,
            padded=bool((moment.batch["weight"] == 0).any()),
            differences=compare.find_differences(leaves, forward, self.tolerance),
            axes=[a for a, size in used.items() if single or self._suffices(a, size, moment)],
            used=list(used),
        )

    def _tensors(
        self, program: Program, carried: base.TrainState | None, moment: Moment
    ) -> list[named.Named]:
        """The named tensors of the program's step."""
        state = place(moment.before, carried, program.strategy)
        rows = jax.device_put(moment.batch, program.strategy.batch_shardings)
        with scope.bind(watched=True):
            return named.tensors(program.strategy, state, rows)

    def _suffices(self, axis: str, size: int, moment: Moment) -> bool:
        """Whether the step differs on a mesh of this axis only."""
        try:
            program = self.build(DECISIVE, {axis: size})
        except ValueError:
            return False
        placed = place(moment.before, state_to_carry(self.reference, program), program.strategy)
        new, metrics = _step(program, placed, moment.batch)
        return self._differ(compare.leaves(moment.want, compare.outputs(new, metrics)))
