"""Compile the experiment's own step for devices that need not be present."""

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

from spmd.core import tree
from spmd.core.fields import check
from spmd.core.storage import cache_root, json_text, write_atomically
from spmd.hardware import hlo
from spmd.hardware.targets import Target

How = Literal["compiled", "estimated"]
# libtpu reads these when it is loaded; without them it looks for a TPU and its VM.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TORI = ("v4", "v5p", "7x")  # slices of cubes of 4 chips in each dim are wrapped
CUBE = 4
_PARTITIONED = "*after_spmd-partitioning*.txt"
_SIZE = r"([\d.]+)([KMG]?)"
_TOO_LARGE = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)
_CACHE_FORMAT = 3


class Failed(Exception):
    """The compilation failed, with the message of the compiler."""


class TooLarge(Failed):
    """The program needs more memory than the chip has. used: bytes per device, at least; limit: those of the
    chip.
    """

    def __init__(self, message: str, used: int, limit: int):
        super().__init__(message)
        self.used, self.limit = used, limit


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes per device, as allocated by the compiler.

    aliased: the part of the outputs that reuses donated arguments. For an estimated program only arguments,
    outputs and aliased hold for the target; temporaries and peak are those of the CPU's program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for `target`.

    how: `compiled` by the target's compiler, or `estimated` from the program partitioned for as many
    simulated devices. mesh: axis -> size. state: bytes per device by field of TrainState. seconds,
    host_memory: cost of the compilation.
    """

    target: str
    how: How
    mesh: dict[str, int]
    memory: CompiledMemory
    state: dict[str, int]
    program: hlo.CompiledProgram
    seconds: float
    host_memory: int

    def json(self) -> dict[str, Any]:
        """All fields as JSON types; `from_json` is the inverse."""
        plain = dataclasses.asdict(dataclasses.replace(self, program=None))  # type: ignore[arg-type]
        program = self.program._asdict()
        for name in ("collectives", "kernels"):
            program[name] = [dataclasses.asdict(each) for each in program[name]]
        return plain | {"program": program}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Compiled:
        """The inverse of `json`."""
        fields = dict(plain["program"])
        fields["collectives"] = [
            hlo.Collective(**{**c, "axes": tuple(c["axes"])}) for c in fields["collectives"]
        ]
        fields["kernels"] = [hlo.Kernel(**each) for each in fields["kernels"]]
        memory, program = CompiledMemory(**plain["memory"]), hlo.CompiledProgram(**fields)
        return cls(**{**plain, "memory": memory, "program": program})


def check_compiler(target: Target) -> None:
    """ValueError if the compiler of a TPU target is not installed."""
    check(
        not target.topology or importlib.util.find_spec("libtpu") is not None,
        f"--target {target.name} needs the TPU compiler (libtpu), which runs without a TPU but is not"
        f' installed; for this jax: pip install "jax[tpu]=={importlib.metadata.version("jax")}"',
    )


def devices(target: Target) -> list[Any] | None:
    """Ahead-of-time devices of a TPU slice; None for targets that are simulated on CPU devices.

    The process must have started with TPU_ENVIRONMENT. ValueError for a topology that does not exist.
    """
    if not target.topology:
        return None
    check_compiler(target)
    from jax.experimental import topologies

    chip = target.name.partition(":")[0]
    options: dict[str, Any] = {"topology_name": target.name.replace("7x:", "tpu7x:")}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    # Complete cubes are tori. Without their links a gather is compiled as zeros and an all-reduce.
    if chip in TORI and all(size % CUBE == 0 for size in target.topology):
        options["wrap"] = (True, True, True)
    if target.num_devices < 4:
        options["chips_per_host_bounds"] = (*target.topology, 1)
    try:
        slice_devices = topologies.get_topology_desc(platform="tpu", **options).devices
    except Exception as error:
        raise ValueError(
            f"--target {target.name}: the TPU compiler has no such slice: {str(error).splitlines()[0]}"
        ) from error
    check(
        len(slice_devices) == target.num_devices,
        f"--target {target.name}: the TPU compiler sees {len(slice_devices)} devices, not"
        f" {target.num_devices}",
    )
    return list(slice_devices)


def compile_step(program: Any, target: Target) -> Compiled:
    """Lowers and compiles `program.strategy.step` (of a train.program.Program built on `devices(target)`).

    Compiles in this process, which the compiler may abort; `isolated.compile_step` does so in a process of
    its own. The result is cached on disk, keyed by the lowered program, the target and the versions.
    Raises Failed.
    """
    begin = time.monotonic()
    lowered = lower(program)
    path = _cache_file(lowered, target)
    with contextlib.suppress(FileNotFoundError):
        return Compiled.from_json(json.loads(path.read_text()))
    with _hlo_text(target) as (options, read):
        with _compiler_errors():
            executable = lowered.compile(compiler_options=options)
        text = read(executable)
    axes = {str(axis): size for axis, size in program.mesh.shape.items()}
    result = Compiled(
        target=target.name,
        how="compiled" if target.topology else "estimated",
        mesh=axes,
        memory=_memory(executable.memory_analysis(), reports_peak=bool(target.topology)),
        state=_state(program),
        program=hlo.read(text, axes),
        seconds=time.monotonic() - begin,
        host_memory=_host_memory(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_text(result.json()))
    return result


def _state(program: Any) -> dict[str, int]:
    """Bytes of the state on a device, by field."""
    state, shardings = program.abstract_state(), program.strategy.state_shardings

    def size(field: str) -> int:
        leaves = tree.named_leaves(getattr(state, field))
        shardings_by_name = tree.named_leaves(getattr(shardings, field))
        return sum(
            tree.bytes_per_device(leaf, shardings_by_name[name]) for name, leaf in leaves.items()
        )

    return {field.name: size(field.name) for field in dataclasses.fields(state)}


def lower(program: Any) -> Any:
    """The step lowered for abstract arrays with the strategy's shardings; a jax.stages.Lowered."""
    import jax

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    strategy = program.strategy
    state = jax.tree.map(placed, program.abstract_state(), strategy.state_shardings)
    batch = jax.tree.map(placed, program.abstract_batch(), strategy.batch_shardings)
    return strategy.step.lower(state, batch)


@contextlib.contextmanager
def _hlo_text(target: Target) -> Iterator[tuple[dict[str, Any], Any]]:
    """(compiler options, function that reads the HLO of an executable compiled with them)."""
    if target.topology:
        yield {}, lambda executable: executable.as_text()
        return
    # The CPU's final program has no reduce-scatters and no bfloat16: read a dump of the partitioned one.
    with tempfile.TemporaryDirectory(prefix="spmd-plan-") as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "spmd-partitioning|spmd-partitioner",
            "xla_backend_optimization_level": 0,  # it is not run
            "xla_llvm_disable_expensive_passes": True,
        }

        def read(executable: Any) -> str:
            dumps = sorted(Path(folder).glob(_PARTITIONED))
            if target.num_devices == 1:  # nothing is partitioned
                return executable.as_text()
            assert dumps, "the compiler wrote no partitioned module"
            return dumps[-1].read_text()

        with _without_cache():
            yield options, read


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Disables JAX's cache of compiled programs: a program from the cache is not dumped."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    enabled = config.jax_enable_compilation_cache

    def use(cache: bool) -> None:
        config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # it reads the setting only once

    use(False)
    try:
        yield
    finally:
        use(enabled)


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """Raises errors of the compiler as Failed or TooLarge."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        match = next(filter(None, (re.search(form, message) for form in _TOO_LARGE)), None)
        if "RESOURCE_EXHAUSTED" not in message or match is None:
            raise Failed(message[:400]) from error
        scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
        used, limit = (int(float(match[i]) * scale[match[i + 1]]) for i in (1, 3))
        raise TooLarge(match[0], used, limit) from error


def _memory(analysis: Any, reports_peak: bool) -> CompiledMemory:
    """Memory by the compiler's analysis.

    reports_peak: the compiler reports a valid peak. The TPU compiler does, and checks the chip's memory
    against it: a program whose arguments and temporaries add up to 39 GiB, with a peak of 30.8, compiles for
    a v6e of 31.25, since the sum counts parts of the heap that are never full at once. The peak of the CPU
    compiler does not include temporaries; the sum is taken instead.
    """
    memory = CompiledMemory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=0,
    )
    peak = analysis.peak_memory_in_bytes if reports_peak else 0
    total = memory.arguments + memory.outputs - memory.aliased + memory.temporaries
    return dataclasses.replace(memory, peak=peak or total)


def _host_memory() -> int:
    """Peak memory of this process in bytes."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cache_file(lowered: Any, target: Target) -> Path:
    """File of a cached result. The key includes source lines, since the ledger names them."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {name: installed.get(name) for name in ("jax", "jaxlib", "libtpu")}
    digest = hashlib.sha256(json_text([_CACHE_FORMAT, target.name, versions]).encode())
    for file in (Path(__file__), *sorted(Path(hlo.__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    digest.update(lowered.as_text(debug_info=True).encode())
    return Path(cache_root()) / "plan" / f"{digest.hexdigest()[:32]}.json"
