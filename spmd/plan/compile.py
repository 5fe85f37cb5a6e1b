"""The experiment's own step, compiled for devices that need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from spmd import hlo, tree
from spmd.fields import check
from spmd.plan.targets import Target
from spmd.storage import cache_root, json_text, write_whole

How = Literal["compiled", "estimated"]
# libtpu reads these when it is loaded; without them it looks for a TPU, and for the VM around it.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_PARTITIONED = "*after_spmd-partitioning*.txt"
_SIZE = r"([\d.]+)([KMG]?)"
_TOO_LARGE = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)
_SAVED = 2  # of the form of a cached result


class Failed(Exception):
    """The compiler gave up; the message is its own."""


class TooLarge(Failed):
    """The program needs more memory than the chip has. used (at least), limit: bytes per device."""

    def __init__(self, message: str, used: int, limit: int):
        super().__init__(message)
        self.used, self.limit = used, limit


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, as the compiler lays them out.

    aliased: of the output, what takes the place of the (donated) arguments. Of an estimated program only
    these three hold for the target; temporaries and peak are those of the CPU's program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step on `target`.

    how: `compiled` by the target's own compiler, or `estimated` from the partitioned program of as many
    simulated devices. mesh: axis -> size. state: bytes per device by field. seconds, host_memory: what the
    compilation took.
    """

    target: str
    how: How
    mesh: dict[str, int]
    memory: Memory
    state: dict[str, int]
    program: hlo.Program
    seconds: float
    host_memory: int

    def json(self) -> dict[str, Any]:
        """Everything as JSON types; `from_json` reads it."""
        plain = dataclasses.asdict(dataclasses.replace(self, program=None))  # type: ignore[arg-type]
        program = self.program._asdict()
        program["collectives"] = [dataclasses.asdict(c) for c in self.program.collectives]
        return plain | {"program": program}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Compiled:
        """The reverse of `json`."""
        found = dict(plain["program"])
        found["collectives"] = [
            hlo.Collective(**{**c, "axes": tuple(c["axes"])}) for c in found["collectives"]
        ]
        memory, program = Memory(**plain["memory"]), hlo.Program(**found)
        return cls(**{**plain, "memory": memory, "program": program})


def ready(target: Target) -> None:
    """ValueError when the compiler of a TPU target is not installed."""
    check(
        not target.topology or importlib.util.find_spec("libtpu") is not None,
        f"--target {target.name} needs the TPU compiler (libtpu), which runs without a TPU but is not"
        f' installed; for this jax: pip install "jax[tpu]=={importlib.metadata.version("jax")}"',
    )


def devices(target: Target) -> list[Any] | None:
    """Ahead-of-time devices of a TPU slice; None for what is simulated on CPU devices.

    The process must have started with TPU_ENVIRONMENT. ValueError for a topology that no slice has.
    """
    if not target.topology:
        return None
    ready(target)
    from jax.experimental import topologies

    chip = target.name.partition(":")[0]
    options: dict[str, Any] = {"topology_name": target.name.replace("7x:", "tpu7x:")}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    if target.num_devices < 4:
        options["chips_per_host_bounds"] = (*target.topology, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", **options).devices
    except Exception as error:
        raise ValueError(
            f"--target {target.name}: the TPU compiler has no such slice: {str(error).splitlines()[0]}"
        ) from error
    check(
        len(found) == target.num_devices,
        f"--target {target.name}: the TPU compiler sees {len(found)} devices, not {target.num_devices}",
    )
    return list(found)


def compiled(program: Any, target: Target) -> Compiled:
    """Lowers and compiles `program.strategy.step` (of a train.program.Program built on `devices(target)`).

    In this process, which the compiler may end; `spmd.ahead` runs it in one of its own. A result is kept in
    the cache directory, by the lowered program, the target and the versions. Raises Failed.
    """
    begin = time.monotonic()
    lowered = lower(program)
    path = _place(lowered, target)
    with contextlib.suppress(FileNotFoundError):
        return Compiled.from_json(json.loads(path.read_text()))
    with _text(target) as (options, read):
        with _failing():
            built = lowered.compile(compiler_options=options)
        text = read(built)
    axes = {str(axis): size for axis, size in program.mesh.shape.items()}
    made = Compiled(
        target=target.name,
        how="compiled" if target.topology else "estimated",
        mesh=axes,
        memory=_memory(built.memory_analysis(), own=bool(target.topology)),
        state=_state(program),
        program=hlo.read(text, axes),
        seconds=time.monotonic() - begin,
        host_memory=_host_memory(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_text(made.json()))
    return made


def _state(program: Any) -> dict[str, int]:
    abstract, placed = program.abstract_state(), program.strategy.state_shardings
    fields = [field.name for field in dataclasses.fields(abstract)]

    def held(field: str) -> int:
        leaves, places = (tree.named_leaves(getattr(of, field)) for of in (abstract, placed))
        return sum(tree.bytes_per_device(leaf, places[name]) for name, leaf in leaves.items())

    return {field: held(field) for field in fields}


def lower(program: Any) -> Any:
    """The step on abstract arrays, placed as the strategy wants them; a jax.stages.Lowered."""
    import jax

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    strategy = program.strategy
    state = jax.tree.map(placed, program.abstract_state(), strategy.state_shardings)
    batch = jax.tree.map(placed, program.abstract_batch(), strategy.batch_shardings)
    return strategy.step.lower(state, batch)


@contextlib.contextmanager
def _text(target: Target) -> Iterator[tuple[dict[str, Any], Any]]:
    """Compiler options, and what reads the HLO once it has been compiled with them."""
    if target.topology:
        yield {}, lambda built: built.as_text()
        return
    # The CPU's final program hides reduce-scatters and bfloat16: the partitioned one is read, as dumped.
    with tempfile.TemporaryDirectory(prefix="spmd-plan-") as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning|spmd-partitioner",
            "xla_backend_optimization_level": 0,  # nobody runs it
            "xla_llvm_disable_expensive_passes": True,
        }

        def read(built: Any) -> str:
            dumps = sorted(Path(folder).glob(_PARTITIONED))
            if target.num_devices == 1:  # nothing to be partitioned
                return built.as_text()
            assert dumps, "the compiler wrote no partitioned module"
            return dumps[-1].read_text()

        with _anew():
            yield options, read


@contextlib.contextmanager
def _anew() -> Iterator[None]:
    """Without JAX's cache of compiled programs: what comes from there has not been dumped."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    was = config.jax_enable_compilation_cache

    def use(cache: bool) -> None:
        config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # else what it found at its first use stands

    use(False)
    try:
        yield
    finally:
        use(was)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """The compiler's errors as Failed."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        found = next(filter(None, (re.search(form, said) for form in _TOO_LARGE)), None)
        if "RESOURCE_EXHAUSTED" not in said or found is None:
            raise Failed(said[:400]) from error
        scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
        used, limit = (int(float(found[i]) * scale[found[i + 1]]) for i in (1, 3))
        raise TooLarge(found[0], used, limit) from error


def _memory(analysis: Any, own: bool) -> Memory:
    """own: the compiler's own peak holds. A TPU's memory is checked against it: a program whose arguments
    and temporaries add up to 39 GiB, with a peak of 30.8, compiles for a v6e of 31.25. The sum counts parts
    of the heap that are never full at once; a CPU's peak leaves its temporaries out.
    """
    made = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=0,
    )
    peak = analysis.peak_memory_in_bytes if own else 0
    together = made.arguments + made.outputs - made.aliased + made.temporaries
    return dataclasses.replace(made, peak=peak or together)


def _host_memory() -> int:
    """Peak bytes of this process."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _place(lowered: Any, target: Target) -> Path:
    """Where the result lies; lines of source are part of the program, since the ledger names them."""
    known = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {name: known.get(name) for name in ("jax", "jaxlib", "libtpu")}
    digest = hashlib.sha256(json_text([_SAVED, target.name, versions]).encode())
    for file in (Path(__file__), *sorted(Path(hlo.__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    digest.update(lowered.as_text(debug_info=True).encode())
    return Path(cache_root()) / "plan" / f"{digest.hexdigest()[:32]}.json"
