"""The weights of another run, read onto the mesh of this one."""

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
from spmd.core.fields import check
from spmd.core.storage import is_remote, ready
from spmd.runtime import agree
from spmd.tasks import FROZEN
from spmd.train.checkpoint import reading, steps
from spmd.train.program import Program
from spmd.weights import adapters as adapt
from spmd.weights.config import InitConfig, matching
from spmd.weights.huggingface import files, read

T = TypeVar("T")
# `params/layers/1/kernel` or `model_state/norm/mean` of the model itself -> shape, dtype, sharding
Wanted = dict[str, jax.ShapeDtypeStruct]


def start(config: InitConfig, model: Any, program: Program, state: Any) -> Any:
    """`state` with the weights of config.from_, cast to its types; what config.skip matches stays as it is.

    model: the experiment's, whose family says what its arrays are called at Hugging Face.
    Every array goes from the files to where it lies on the mesh. ValueError, with the differing arrays, when
    they are of another model.
    """
    wanted = _wanted(program)
    source = _source(config.from_, model)
    names = {name.removeprefix("params/") for name in (*wanted, *source.arrays)}
    skipped = matching(sorted(names), config.skip, "init.skip")
    wanted = {n: leaf for n, leaf in wanted.items() if n.removeprefix("params/") not in skipped}
    source.check(wanted, skipped)
    old = tree.named_leaves(state)
    for name in wanted:  # its memory is needed for what comes instead
        old[_place(name, old)].delete()
    leaves = _together(lambda: source.read(wanted))
    agree.say(f"starting from {source.about}")
    new = {_place(name, old): leaf for name, leaf in leaves.items()}
    put = lambda prefix, part: tree.map_named(lambda n, x: new.get(f"{prefix}/{n}", x), part)
    state = dataclasses.replace(state, model_state=put("model_state", state.model_state))
    return program.strategy.with_params(state, put("params", state.params))


def _wanted(program: Program) -> Wanted:
    """The arrays of the model itself, as they lie on the mesh: trained, frozen, statistics; no adapters."""
    abstract, shardings = program.abstract_state(), program.strategy.state_shardings
    placed = tree.named_leaves(shardings)
    found = {}
    for name, leaf in tree.named_leaves(abstract).items():
        part, _, rest = name.partition("/")
        if part not in ("params", "model_state") or name.split("/")[-1] in adapt.ADAPTERS:
            continue
        inner = rest.removeprefix(f"{FROZEN}/")
        its = name if inner == rest else f"params/{inner}"
        found[its] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
    return found


def _place(name: str, state: dict[str, Any]) -> str:
    """Where an array of the model itself lies in the state."""
    frozen = f"model_state/{FROZEN}/{name.removeprefix('params/')}"
    return frozen if frozen in state else name


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
        """The arrays of its model itself."""
        return sorted(self.shapes)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the arrays of its model itself, by the names that they have here."""
        found = {}
        for name, leaf in self.stored.items():
            part, *rest = name.split(".")
            if part == "model_state" and rest[0] == FROZEN:
                part, rest = "params", rest[1:]
            if part in ("params", "model_state") and rest[-1] not in adapt.ADAPTERS:
                found["/".join([part, *rest])] = leaf
        return found

    def check(self, wanted: Wanted, skipped: set[str]) -> None:
        """ValueError with the arrays that differ; another precision is none."""
        there = {
            n: leaf for n, leaf in self.shapes.items() if n.removeprefix("params/") not in skipped
        }
        diff = []
        for name in sorted({*there, *wanted}):
            ours, theirs = wanted.get(name), there.get(name)
            if ours is None or theirs is None or not _fits(ours, *theirs):
                here = "(absent)" if ours is None else f"{ours.dtype}{list(ours.shape)}"
                said = "(absent)" if theirs is None else f"{theirs[1]}{list(theirs[0])}"
                diff.append(f"  {name}: {said} there, {here} here")
        if diff:
            raise ValueError(read.another_model(self.path, diff))

    def read(self, wanted: Wanted) -> dict[str, jax.Array]:
        """The arrays: averaged where the run kept an average, adapters added."""
        abstract: dict[str, Any] = {}
        for name, leaf in wanted.items():
            for stored in self._names(name):
                is_kernel = stored.split(".")[-1] not in adapt.ADAPTERS
                placed = leaf.sharding if is_kernel else _whole(leaf.sharding)
                abstract[stored] = jax.ShapeDtypeStruct(*self.stored[stored], sharding=placed)
        leaves = self._verified(abstract)
        found = {}
        for name, leaf in wanted.items():
            kernel, *pair = (leaves.pop(stored) for stored in self._names(name))
            if pair:
                kernel = self._merged(kernel, *pair)
            found[name] = jax.device_put(kernel.astype(leaf.dtype), leaf.sharding)
        return found

    def _names(self, name: str) -> list[str]:
        """Where it is stored: one name, or those of a matrix and its adapters."""
        dotted = name.removeprefix("params/").replace("/", ".")
        if name.startswith("model_state/"):
            return [dotted]
        trained = "ema" if self.ema else "params"
        frozen = f"model_state.{FROZEN}.{dotted}"
        pair = [f"{trained}.{dotted}.{part}" for part in adapt.ADAPTERS]
        if pair[0] in self.stored:
            return [frozen, *pair]
        return [frozen if frozen in self.stored else f"{trained}.{dotted}"]

    def _merged(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """With its adapters [stack, inputs, rank] and [stack, rank, outputs]; how many dims each has says
        which is which.
        """
        stack, inside = a.ndim + b.ndim - 2 - kernel.ndim, a.ndim - 1
        size = kernel.shape
        shape = adapt.Shape(size[:stack], size[stack:inside], size[inside:])
        return adapt.merged(kernel, a, b, shape, self.scale)

    def _verified(self, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        """The arrays from disk, in all processes or in none."""
        names = sorted(self.stored.keys() - {reading.DIGESTS})
        request = dict.fromkeys(self.stored, ...) | abstract  # Orbax leaves `...` out
        if reading.DIGESTS in self.stored:
            placed = _whole(next(iter(abstract.values())).sharding)
            request[reading.DIGESTS] = jax.ShapeDtypeStruct(
                (len(names), 2), np.uint32, sharding=placed
            )
        try:
            leaves = reading.load(self.path, request)
        except Exception as error:
            said = reading.first_line(error)
            raise ValueError(f"init.from: cannot read {self.path}: {said}") from None
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not ...}
        if reading.DIGESTS in leaves:
            rows = [names.index(name) for name in sorted(abstract)]
            digests = np.asarray(leaves.pop(reading.DIGESTS))[rows]
            bad = reading.differ(digest.differing(leaves, digests))
            check(
                not bad,
                f"init.from: the checkpoint {self.path} is bad: {bad}; give another step of that run",
            )
        return leaves


def _whole(placed: Any) -> Any:
    return NamedSharding(placed.mesh, P()) if isinstance(placed, NamedSharding) else placed


def _together(function: Callable[[], T]) -> T:
    """Call `function`; ValueError in all processes when it fails in one."""
    found, said = None, ""
    try:
        found = function()
    except (ValueError, OSError) as error:
        said = str(error)
    for told in agree.gather(said, "reading weights"):
        check(not told, told)
    assert found is not None
    return found


def _source(directory: str, model: Any) -> StoredRun | read.Weights:
    """The weights in the directory of init.from; ValueError when there is nothing to start from."""
    ready(directory, "init.from")
    path = epath.Path(
        directory if is_remote(directory) else os.path.abspath(os.path.expanduser(directory))
    )
    if not is_remote(path) and files.present(Path(path)):
        return _together(lambda: read.find(Path(path), model))
    return _run(directory, path)


def _run(directory: str, path: epath.Path) -> StoredRun:
    """The newest checkpoint of a run, or the one that `path` is."""

    def look() -> dict[str, Any]:
        check(path.is_dir(), f"init.from={directory!r}: there is no such directory")
        others = [] if is_remote(path) else files.unread(Path(path))
        check(
            not others or (path / "checkpoints").is_dir(),
            f"init.from={directory!r} holds {', '.join(others[:4])}, which is not read: save the model as"
            " safetensors (save_pretrained of transformers does)",
        )
        # A run may be called 300 as well: then it holds checkpoints.
        is_step = path.name.isdigit() and not (path / "checkpoints").is_dir()
        step = path if is_step else path / "checkpoints"
        if not is_step:
            present = steps.listed(step)
            check(
                bool(present),
                f"init.from={directory!r} holds no checkpoint: give the directory of a run, or one step of"
                " it (RUN/checkpoints/STEP)",
            )
            step = step / str(present[-1])
        try:
            bad, stored = steps.check_manifest(step), reading.stored(step)
        except Exception as error:
            bad, stored = f"unreadable: {reading.first_line(error)}", {}
        check(not bad, f"init.from: the checkpoint {step} is bad: {bad}; give another step")
        config = (steps.about(step).get("config") or {}).get("init") or {}
        rank = config.get("lora") or 0
        return {
            "path": str(step),
            "stored": stored,
            "scale": (config.get("lora_alpha") or rank) / max(rank, 1),
        }

    found = agree.from_first(look, "looking at init.from")
    stored = {k: (tuple(shape), dtype) for k, (shape, dtype) in found["stored"].items()}
    ema = any(name.startswith("ema.") for name in stored)
    adapters = any(name.split(".")[-1] in adapt.ADAPTERS for name in stored)
    also = [*["moving average"] * ema, *["adapters merged"] * adapters]
    about = found["path"] + (f" ({', '.join(also)})" if also else "")
    return StoredRun(epath.Path(found["path"]), stored, ema, found["scale"], about)


def _fits(ours: jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype: str) -> bool:
    floats = jnp.issubdtype(ours.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    return tuple(ours.shape) == shape and (floats or str(ours.dtype) == dtype)
