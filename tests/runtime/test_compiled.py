"""The compilation cache: kept by default, used by the second start, never another's."""

from __future__ import annotations

import pytest

RUN = ("--experiment", "digits", "--train.steps", 5)


@pytest.fixture
def cached(run_cli, tmp_path):
    """run.py with its cache in tmp_path, saying what it took from there."""
    logged = {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}

    def run(*words, log=False):
        env = {"JAX_COMPILATION_CACHE_DIR": "", "SPMD_CACHE_DIR": str(tmp_path / "cache")}
        return run_cli(*RUN, *words, env=env | (logged if log else {}))

    return run


def entries(directory):
    return {p.name.split("-")[0] for p in directory.rglob("*-cache")}


@pytest.mark.gate
def test_the_second_start_compiles_no_step(cached, tmp_path):
    first = cached("--run.dir", "a")
    assert (first.returncode, first.stderr) == (0, "")
    assert {"jit_step", "jit_init"} <= entries(tmp_path / "cache/compiled")
    (own,) = (tmp_path / "cache/compiled").iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    second = cached("--run.dir", "b", log=True)
    assert "cache hit for 'jit_step'" in second.stderr
    assert cached("--run.dir", "c").stderr == ""  # XLA has nothing to say about what it loads


@pytest.mark.slow
def test_off_and_a_directory_of_ones_own(cached, tmp_path):
    assert cached("--run.compile-cache", "off").returncode == 0
    assert not (tmp_path / "cache/compiled").exists()
    assert cached("--run.compile-cache", "mine", "--run.fresh").returncode == 0
    assert "jit_step" in entries(tmp_path / "mine")


@pytest.mark.gate
def test_what_others_may_write_is_not_loaded(cached, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused = cached("--run.compile-cache", "open")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "run.compile_cache='open' is writable by others" in refused.stderr
    assert not (tmp_path / "runs").exists()

    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache").chmod(0o777)
    without = cached()
    assert without.returncode == 0
    (line,) = without.stderr.splitlines()
    assert line.startswith("compiled programs are not kept:") and "may replace it" in line
    assert not entries(tmp_path / "cache")
