"""Initial weights from another run or from safetensors, read onto the mesh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core import digest, tree
from spmd.core.fields import check, match_names
from spmd.core.storage import check_usable, is_remote
from spmd.runtime import agree
from spmd.tasks import FROZEN, VARIABLES, is_frozen
from spmd.train.checkpoint import reading, steps
from spmd.train.program import Program
from spmd.weights import adapters as adapt
from spmd.weights import quantized
from spmd.weights.config import InitConfig
from spmd.weights.huggingface import files, read

T = TypeVar("T")
# `params/layers/1/kernel` or `model_state/norm/mean` of the unadapted model -> shape, dtype, sharding
Wanted = dict[str, jax.ShapeDtypeStruct]
STORED = (f"/{quantized.VALUES}", f"/{quantized.SCALE}")


def load_weights(config: InitConfig, task: Any, model: Any, program: Program, state: Any) -> Any:
    """Replace the weights of a state by those of config.from_, and of each frozen model by those of its own.

    Each device reads its shards from the files, and casts them to the types of the state. Arrays that
    config.skip matches are kept.

    Args:
        config: source and patterns.
        task: the experiment's, with its frozen models.
        model: the experiment's model, whose family determines the names of its arrays at Hugging Face.
        program: of the experiment.
        state: its initial state.

    Raises:
        ValueError: the weights are of another model; names the differing arrays.
    """
    if config.from_:
        names = _model_names(program, task.frozen)
        state = _load(config, model, program, state, names)
    for name, frozen in task.frozen.items():
        # The trained model as it starts: the same weights again.
        start = InitConfig(from_=config.from_, skip=config.skip)
        source = start if frozen.model is None else InitConfig(from_=frozen.from_)
        if source.from_:
            prefix = f"model_state/{FROZEN}/{name}/"
            names = {
                array.removeprefix(prefix): array
                for array in tree.named_leaves(program.abstract_state())
                if array.startswith(prefix)
            }
            if any(
                array.startswith("params/") for array in names
            ):  # else it is the base of adapters
                state = _load(source, frozen.model or model, program, state, names)
    return state


def needed(config: InitConfig, task: Any) -> bool:
    """Whether any weights are to be loaded."""
    return bool(config.from_ or any(frozen.from_ for frozen in task.frozen.values()))


def _load(
    config: InitConfig, model: Any, program: Program, state: Any, state_names: dict[str, str]
) -> Any:
    """The state with the arrays `state_names` ({name in the model: name in the state}) from config.from_."""
    wanted = _wanted(program, state_names)
    source = _open_source(config.from_, model)
    names = {name.removeprefix("params/") for name in (*wanted, *source.arrays)}
    skipped = match_names(sorted(names), config.skip, "init.skip")
    wanted = {n: leaf for n, leaf in wanted.items() if n.removeprefix("params/") not in skipped}
    source.check(wanted, skipped)
    old = tree.named_leaves(state)
    for name in wanted:  # its memory is needed for the replacement
        old[state_names[name]].delete()
    leaves = _call_together(lambda: source.read(wanted))
    agree.say(f"starting from {source.about}")
    new = _stored({state_names[name]: leaf for name, leaf in leaves.items()}, old)
    put = lambda prefix, part: tree.map_named(lambda n, x: new.get(f"{prefix}/{n}", x), part)
    state = dataclasses.replace(state, model_state=put("model_state", state.model_state))
    return program.strategy.with_params(state, put("params", state.params))


def _wanted(program: Program, state_names: dict[str, str]) -> Wanted:
    """Shapes and shardings of the arrays that `state_names` lists."""
    abstract = tree.named_leaves(program.abstract_state())
    shardings = tree.named_leaves(program.strategy.state_shardings)
    dtype_of = lambda place: abstract.get(_scale_of(place), abstract[place]).dtype
    return {
        name: jax.ShapeDtypeStruct(
            abstract[place].shape, dtype_of(place), sharding=shardings[place]
        )
        for name, place in state_names.items()
    }


def _scale_of(place: str) -> str:
    """The scales of a matrix whose int8 values are at `place`; no name for other arrays."""
    return place.removesuffix(STORED[0]) + STORED[1] if place.endswith(STORED[0]) else ""


def _stored(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Arrays by their place in the state, those of matrices in int8 as values and scales."""
    stored = {}
    for place, array in new.items():
        if (scale := _scale_of(place)) in old:
            axes = quantized.shared_axes(array, old[scale])
            pair = (array.sharding, old[scale].sharding)
            make = jax.jit(
                lambda x, axes=axes: tuple(quantized.quantize(x, axes).values()), out_shardings=pair
            )
            stored[place], stored[scale] = make(array)
        else:
            stored[place] = array
    return stored


def _model_names(program: Program, frozen_models: Any) -> dict[str, str]:
    """Names of the arrays of the unadapted model: trained, frozen, statistics; neither adapters nor the
    variables of the task, which begin anew.
    """
    others = (
        f"params/{VARIABLES}/",
        *(f"model_state/{FROZEN}/{name}/" for name in frozen_models),
    )
    names = {}
    for name in tree.named_leaves(program.abstract_state()):
        part, _, rest = name.partition("/")
        is_adapter = name.split("/")[-1] in adapt.ADAPTERS
        if part not in ("params", "model_state") or is_adapter or name.startswith(others):
            continue
        inner = rest.removeprefix(f"{FROZEN}/")
        if inner != rest and inner.endswith(STORED):  # of a matrix in int8: its values stand for it
            if inner.endswith(STORED[0]):
                names[f"params/{inner.removesuffix(STORED[0])}"] = name
            continue
        names[name if inner == rest else f"params/{inner}"] = name
    return names


# ---- a run's checkpoint


class StoredRun(NamedTuple):
    """A step of another run. stored: (shape, dtype) by name, as on disk."""

    path: epath.Path
    stored: dict[str, tuple[tuple[int, ...], str]]
    ema: bool
    scale: float
    about: str

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays of its unadapted model."""
        return sorted(self.shapes)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the arrays of its unadapted model, by the names of this program."""
        shapes = {}
        for name, leaf in self.stored.items():
            part, *rest = name.split(".")
            if part == "model_state" and rest[0] == FROZEN:
                part, rest = "params", rest[1:]
            if part not in ("params", "model_state") or rest[-1] in adapt.ADAPTERS:
                continue
            if not (is_frozen(rest[0]) if part == "model_state" else rest[0] == VARIABLES):
                shapes["/".join([part, *rest])] = leaf
        return shapes

    def check(self, wanted: Wanted, skipped: set[str]) -> None:
        """ValueError with the arrays that differ; another precision is no difference."""
        stored = {
            n: leaf for n, leaf in self.shapes.items() if n.removeprefix("params/") not in skipped
        }
        diff = []
        for name in sorted({*stored, *wanted}):
            expected, saved = wanted.get(name), stored.get(name)
            if expected is None or saved is None or not _fits(expected, *saved):
                expected_text = (
                    "absent" if expected is None else f"{expected.dtype}{list(expected.shape)}"
                )
                saved_text = "absent" if saved is None else f"{saved[1]}{list(saved[0])}"
                diff.append(
                    f"  {name}: {saved_text} in the checkpoint, {expected_text} in the model"
                )
        if diff:
            raise ValueError(read.another_model(self.path, diff))

    def read(self, wanted: Wanted) -> dict[str, jax.Array]:
        """The arrays: the moving average where the run has one, adapters added."""
        abstract: dict[str, Any] = {}
        for name, leaf in wanted.items():
            for stored in self._names(name):
                is_kernel = stored.split(".")[-1] not in adapt.ADAPTERS
                sharding = leaf.sharding if is_kernel else _replicate(leaf.sharding)
                abstract[stored] = jax.ShapeDtypeStruct(*self.stored[stored], sharding=sharding)
        leaves = self._read_verified(abstract)
        arrays = {}
        for name, leaf in wanted.items():
            kernel, *pair = (leaves.pop(stored) for stored in self._names(name))
            if pair:
                kernel = self._merge(kernel, *pair)
            arrays[name] = jax.device_put(kernel.astype(leaf.dtype), leaf.sharding)
        return arrays

    def _names(self, name: str) -> list[str]:
        """The stored names of an array: one, or those of a matrix and its adapters."""
        dotted = name.removeprefix("params/").replace("/", ".")
        if name.startswith("model_state/"):
            return [dotted]
        trained = "ema" if self.ema else "params"
        frozen = f"model_state.{FROZEN}.{dotted}"
        pair = [f"{trained}.{dotted}.{part}" for part in adapt.ADAPTERS]
        if pair[0] in self.stored:
            return [frozen, *pair]
        return [frozen if frozen in self.stored else f"{trained}.{dotted}"]

    def _merge(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """The kernel with its adapters [stack, inputs, rank] and [stack, rank, outputs]; the numbers of dims
        of all three determine those of stack, inputs and outputs.
        """
        stack, inside = a.ndim + b.ndim - 2 - kernel.ndim, a.ndim - 1
        size = kernel.shape
        shape = adapt.Shape(size[:stack], size[stack:inside], size[inside:])
        return adapt.merge(kernel, a, b, shape, self.scale)

    def _read_verified(self, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        """The arrays from disk, checked against their digests."""
        names = sorted(name for name in self.stored if not reading.is_digest(name))
        request = dict.fromkeys(self.stored, ...) | abstract  # Orbax leaves `...` out
        if reading.DIGESTS in self.stored:
            sharding = _replicate(next(iter(abstract.values())).sharding)
            request[reading.DIGESTS] = jax.ShapeDtypeStruct(
                (len(names), 2), np.uint32, sharding=sharding
            )
        try:
            leaves = reading.load(self.path, request)
        except Exception as error:
            reason = reading.first_line(error)
            raise ValueError(f"init.from: cannot read {self.path}: {reason}") from None
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not ...}
        if reading.DIGESTS in leaves:
            rows = [names.index(name) for name in sorted(abstract)]
            digests = np.asarray(leaves.pop(reading.DIGESTS))[rows]
            bad = reading.describe_differences(digest.find_differences(leaves, digests))
            check(
                not bad,
                f"init.from: the checkpoint {self.path} is bad: {bad}; give another step of that run",
            )
        return leaves


def _replicate(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _call_together(function: Callable[[], T]) -> T:
    """Call `function`; ValueError in all processes when it fails in one."""
    result, mistake = None, ""
    try:
        result = function()
    except (ValueError, OSError) as error:
        mistake = str(error)
    for message in agree.gather(mistake, "reading weights"):
        check(not message, message)
    assert result is not None
    return result


def _open_source(directory: str, model: Any) -> StoredRun | read.Weights:
    """The weights in the directory of init.from; ValueError when it holds none."""
    check_usable(directory, "init.from")
    path = epath.Path(
        directory if is_remote(directory) else os.path.abspath(os.path.expanduser(directory))
    )
    if not is_remote(path) and files.has_weights(Path(path)):
        return _call_together(lambda: read.find(Path(path), model))
    return _open_run(directory, path)


def _open_run(directory: str, path: epath.Path) -> StoredRun:
    """The newest checkpoint of a run, or the step `path`."""

    def look() -> dict[str, Any]:
        check(path.is_dir(), f"init.from={directory!r}: there is no such directory")
        unreadable = [] if is_remote(path) else files.unreadable_files(Path(path))
        check(
            not unreadable or (path / "checkpoints").is_dir(),
            f"init.from={directory!r} holds {', '.join(unreadable[:4])}, which is not read: save the model as"
            " safetensors (save_pretrained of transformers does)",
        )
        # The name of a run may be a number too: then it holds checkpoints.
        is_step = path.name.isdigit() and not (path / "checkpoints").is_dir()
        step = path if is_step else path / "checkpoints"
        if not is_step:
            present = steps.list_steps(step)
            check(
                bool(present),
                f"init.from={directory!r} holds no checkpoint: give the directory of a run, or one step of"
                " it (RUN/checkpoints/STEP)",
            )
            step = step / str(present[-1])
        try:
            bad, stored = steps.check_manifest(step), reading.stored_types(step)
        except Exception as error:
            bad, stored = f"unreadable: {reading.first_line(error)}", {}
        check(not bad, f"init.from: the checkpoint {step} is bad: {bad}; give another step")
        config = (steps.read_metadata(step).get("config") or {}).get("init") or {}
        rank = config.get("lora") or 0
        return {
            "path": str(step),
            "stored": stored,
            "scale": (config.get("lora_alpha") or rank) / max(rank, 1),
        }

    facts = agree.from_first(look, "looking at init.from")
    stored = {k: (tuple(shape), dtype) for k, (shape, dtype) in facts["stored"].items()}
    check(
        not any(name.endswith(f".{quantized.VALUES}") for name in stored),
        f"init.from: {facts['path']} holds matrices in int8 (init.quantize): export it first, and give the"
        " directory of the export",
    )
    ema = any(name.startswith("ema.") for name in stored)
    adapters = any(name.split(".")[-1] in adapt.ADAPTERS for name in stored)
    notes = [*["moving average"] * ema, *["adapters merged"] * adapters]
    about = facts["path"] + (f" ({', '.join(notes)})" if notes else "")
    return StoredRun(epath.Path(facts["path"]), stored, ema, facts["scale"], about)


def _fits(expected: jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype: str) -> bool:
    floats = jnp.issubdtype(expected.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return tuple(expected.shape) == shape and (floats or str(expected.dtype) == dtype)
