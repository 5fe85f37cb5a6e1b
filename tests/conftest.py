"""Eight simulated CPU devices, quick compiles, strict promotion, caches in a temporary directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spmd.runtime import compiled
from tests import compilations
from tests.command import HARDWARE, ROOT, start
from tests.skips import Skips

KEPT = "SPMD_TEST_COMPILED"  # inherited by xdist's workers: where compiled programs are kept


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write the golden files anew")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips())
        os.environ[KEPT] = f"{compiled.default_directory()}-tests"
        os.environ[ROOT] = tempfile.mkdtemp(prefix="spmd-tests-")
        os.environ["SPMD_CACHE_DIR"] = f"{os.environ[ROOT]}/cache"
        os.environ["TFDS_DATA_DIR"] = f"{os.environ[ROOT]}/tfds"
        compilations.start(Path(os.environ[KEPT]), Path(os.environ[ROOT], "compiled"))
    compilations.start(Path(os.environ[KEPT]), _compiled(config))

    # What a shell starts in the background ignores SIGINT, and so would all that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Most of the time in these tests is LLVM's: 2.5 times less without its optimisations. What run.py's own
    # processes compile is optimised as ever (tests/command.py), and XLA's passes are the same in both.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()

    import jax

    from spmd.parallel.mesh import reserve_threads

    jax.config.update("jax_compilation_cache_dir", str(_compiled(config)))
    # XLA's own caches for GPUs would make the directory's path a part of each entry's key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", compilations.MIN_SECONDS)
    jax.config.update("jax_num_cpu_devices", 8)
    reserve_threads(8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if not HARDWARE:
        jax.config.update("jax_platforms", "cpu")


def _compiled(config: pytest.Config) -> Path:
    """The cache of the programs that this process compiles; those of run.py share `compiled`."""
    worker = getattr(config, "workerinput", {}).get("workerid", "main")
    return Path(os.environ[ROOT], f"compiled-{worker}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if ROOT not in os.environ:
        return
    compilations.keep(_compiled(config), Path(os.environ[KEPT]))
    if not hasattr(config, "workerinput"):
        compilations.keep(Path(os.environ[ROOT], "compiled"), Path(os.environ[KEPT]))
        shutil.rmtree(os.environ.pop(ROOT), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HARDWARE:
        return
    for item in items:
        if item.get_closest_marker("hardware"):
            item.add_marker(
                pytest.mark.skip(reason="needs an accelerator: set SPMD_TEST_HARDWARE=1")
            )


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--update"))


@pytest.fixture(scope="session")
def devices() -> list:
    """The eight simulated devices."""
    import jax

    found = jax.devices("cpu")
    assert len(found) == 8, "another module started JAX's backend before conftest.py"
    return found


@pytest.fixture(scope="session")
def digits_run(devices: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of digits on one device, checkpoints of steps 40 and 60: to be copied, not changed."""
    import spmd

    directory = tmp_path_factory.mktemp("digits") / "run"
    words = ["--simulate", "1", "--train.steps", "60", "--checkpoint.every", "20"]
    spmd.load("digits", [*words, "--run.dir", str(directory)]).train()
    return directory


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compiles everything anew, for tests of what the compiler says while it does."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # JAX reads the setting only once

    use(False)
    yield
    use(True)


@pytest.fixture
def start_cli(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Like run_cli, but returns the running process."""
    return lambda *args: start(*args, cwd=tmp_path)


@pytest.fixture
def run_main(
    devices: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Like run_cli in this process, which has eight devices (`--simulate 1` takes one): seconds less."""
    from spmd.cli import main

    def run(*args: str | int | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            code = main([*map(str, args)])
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return run


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli("plan", "--experiment", "digits")`: run.py in its own process, in tmp_path."""

    def run(
        *args: str | Path,
        timeout: float = 300,
        env: dict[str, str] | None = None,
        cwd: Path = tmp_path,
    ) -> subprocess.CompletedProcess[str]:
        process = start(*args, cwd=cwd, env=env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run
