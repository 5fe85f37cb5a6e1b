"""The parallel run computes what one device computes: proven step by step, or the place where it departs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd import flops, scope, tree
from spmd.mesh import AXES
from spmd.sharding import RULES
from spmd.strategies import base
from spmd.train.loop import Program
from spmd.verify import compare, named
from spmd.verify.compare import Leaf
from spmd.verify.report import Fault, Report, Result

Sizes = Mapping[str, int]
# Of a float64 step, and of one whose model computes in a narrower type whatever its parameters are.
DECIDED = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
# Of the loss in the experiment's own precision, for information.
EXPECTED = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}


class Precision(NamedTuple):
    """One pass over the steps; in float64, which decides, only a fault makes more than rounding."""

    name: str
    param_dtype: Any
    decides: bool = False

    @staticmethod
    def own(param_dtype: str, dtype: str) -> Precision:
        """The experiment's: named by the narrowest type in it."""
        narrow = "bfloat16" if "bfloat16" in (param_dtype, dtype) else dtype or param_dtype
        return Precision(narrow, param_dtype)


DECISIVE = Precision("float64", "float64", decides=True)
Build = Callable[[Precision, Sizes | None], Program]  # None: the reference, strategy auto


@dataclasses.dataclass
class Case:
    """One mesh under way. own: the strategy's state, carried from step to step; None where its layout is that
    of the reference.
    """

    result: Result
    sizes: Sizes
    program: Program
    own: base.TrainState | None


def run(
    build: Build,
    meshes: Sequence[Sizes] | None,
    own: Precision,
    num_steps: int,
    num_devices: int,
    strategy: str,
) -> Report:
    """Compares `meshes` (None: all of num_devices) with one device over `num_steps` steps, in float64 and in
    the experiment's `own` precision.

    ValueError when the only mesh cannot be cut; of several, those are reported as skipped.
    """
    with jax.enable_x64(True):
        reference = build(DECISIVE, None)
        narrow = flops.of_step(reference.task, reference.abstract_batch())
        tolerance = max((DECIDED.get(dtype, 0.0) for dtype in narrow), default=0.0)
        proof = Proof(build, reference, min(num_steps, reference.num_steps), tolerance or 1e-9)
        cuts = list(meshes or factorisations(num_devices, model_axes(reference)))
        results = [Result(describe(sizes), strategy) for sizes in cuts]
        proof.compare(DECISIVE, cuts, results, skip=meshes is None)
    if all(result.skipped for result in results):
        raise ValueError(
            f"no mesh of {num_devices} devices can be cut; {results[0].mesh}: {results[0].skipped}"
        )
    left = [(cut, result) for cut, result in zip(cuts, results, strict=True) if result.sound]
    if left and own.name != DECISIVE.name:
        with jax.enable_x64(own.param_dtype == "float64"):
            beside = dataclasses.replace(proof, reference=build(own, None))
            beside.compare(own, *zip(*left, strict=True), skip=False)
    return Report(
        reference.name, proof.num_steps, proof.tolerance, own.name, EXPECTED[own.name], results
    )


def describe(sizes: Sizes) -> str:
    """`data=4 fsdp=2`."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def model_axes(program: Program) -> list[str]:
    """The axes that can cut this model: the batch's, and those that a rule gives to one of its dims or to its
    sequences.
    """
    dims = {dim for named_dims in program.task.dims.values() for dim in named_dims or () if dim}
    if "tokens" in program.abstract_batch():
        dims.add("time")
    used = {"replica", "data", "fsdp"} | {axis for dim in dims for axis in RULES[dim]}
    return [axis for axis in AXES if axis in used]


def factorisations(number: int, axes: Sequence[str]) -> Iterator[Sizes]:
    """Every way to write `number` as a product over `axes`, those with few axes first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    found = [f for f in itertools.product(divisors, repeat=len(axes)) if math.prod(f) == number]
    for factors in sorted(found, key=lambda f: sum(size > 1 for size in f)):
        yield dict(zip(axes, factors, strict=True))


def batches(program: Program, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """The run's first batches; every second one padded unevenly over the devices, since a mean of means is
    right as long as all devices hold equally many examples.
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
    """The program's own step, watched; the state is donated."""
    with scope.bind(watched=True):
        return program.strategy.step(state, jax.device_put(batch, program.strategy.batch_shardings))


def _shapes(part: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.named_leaves(part).items()}


def own_state(reference: Program, program: Program) -> base.TrainState | None:
    """A first state, where the layout of the strategy's state is not that of one device."""
    same = _shapes(reference.abstract_state()) == _shapes(program.abstract_state())
    return None if same else program.init()


def place(
    state: base.TrainState, own: base.TrainState | None, to: base.Strategy
) -> base.TrainState:
    """The state of one device (on the host) in a strategy's layout, to start a step from.

    The parameters go through with_params, which sets every copy that the strategy keeps of them; other fields
    of the same shapes are taken over. What only the strategy has (residuals, queues) stays as its last step
    left it: `own`, which is kept.
    """
    if own is None:
        return jax.device_put(state, to.state_shardings)
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    taken = {
        name: jax.device_put(part, getattr(to.state_shardings, name))
        for name, part in fields.items()
        if _shapes(part) == _shapes(getattr(own, name))
    }
    kept = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), own)  # steps donate
    return dataclasses.replace(to.with_params(kept, state.params), **taken)


class Moment(NamedTuple):
    """A step to be looked into: the state before it, and what one device made of it (both on the host)."""

    step: int
    before: base.TrainState
    batch: Mapping[str, np.ndarray]
    want: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Proof:
    """What meshes are compared with. tolerance: of the decision, for each leaf."""

    build: Build
    reference: Program
    num_steps: int
    tolerance: float

    def compare(
        self, precision: Precision, cuts: Sequence[Sizes], results: Sequence[Result], *, skip: bool
    ) -> None:
        """All meshes side by side, so that one state and one step of the reference are held at a time.

        skip: notes meshes that cannot be cut, instead of raising.
        """
        cases = []
        for sizes, result in zip(cuts, results, strict=True):
            try:
                program = self.build(precision, sizes)
                # What does not divide is told while a step is traced.
                with scope.bind(watched=True):
                    jax.eval_shape(
                        program.strategy.step, program.abstract_state(), program.abstract_batch()
                    )
                cases.append(Case(result, sizes, program, own_state(self.reference, program)))
            except ValueError as error:
                if not skip:
                    raise
                result.skipped = str(error)
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
                self._one(precision, case, moment)

    def _one(self, precision: Precision, case: Case, moment: Moment) -> None:
        """One step of one mesh."""
        placed = place(moment.before, case.own, case.program.strategy)
        new, metrics = _step(case.program, placed, moment.batch)
        found = compare.leaves(moment.want, compare.outputs(new, metrics))
        case.result.add(precision.name, found)
        if precision.decides and self._departs(found):
            case.result.fault = self._locate(case, moment, found)
        case.own = None if case.own is None else new
        if moment.step == 0 or case.result.fault:
            print(
                f"{precision.name}  {case.result.mesh}: step {moment.step + 1} of {self.num_steps}"
                f" {'departs' if case.result.fault else 'agrees'}"
                f" ({max(leaf.error for leaf in found.values()):.1e})",
                file=sys.stderr,
                flush=True,
            )

    def _departs(self, found: Mapping[str, Leaf]) -> bool:
        return any(not leaf.error <= self.tolerance for leaf in found.values())

    def _locate(self, case: Case, moment: Moment, found: Mapping[str, Leaf]) -> Fault:
        """Where the step departs first, and which axes alone show it."""

        def tensors(program: Program, own: base.TrainState | None) -> list[named.Named]:
            placed = place(moment.before, own, program.strategy)
            rows = jax.device_put(moment.batch, program.strategy.batch_shardings)
            with scope.bind(watched=True):
                return named.tensors(program.strategy, placed, rows)

        def alone(axis: str, size: int) -> bool:
            try:
                program = self.build(DECISIVE, {axis: size})
            except ValueError:
                return False
            own = own_state(self.reference, program)
            placed = place(moment.before, own, program.strategy)
            new, metrics = _step(program, placed, moment.batch)
            return self._departs(compare.leaves(moment.want, compare.outputs(new, metrics)))

        forward = compare.activations(
            tensors(self.reference, None), tensors(case.program, case.own)
        )
        used = {axis: size for axis, size in case.sizes.items() if size > 1}
        return Fault(
            step=moment.step + 1,
            padded=bool((moment.batch["weight"] == 0).any()),
            off=compare.wrong(found, forward, self.tolerance),
            axes=[axis for axis, size in used.items() if len(used) == 1 or alone(axis, size)],
            used=list(used),
        )
