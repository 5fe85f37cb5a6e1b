"""What is kept of the compiled programs from one run of the suite to the next."""

from __future__ import annotations

import os

import jax
from jax._src.compilation_cache import compress_executable
from jax.experimental.compilation_cache import compilation_cache

from tests import compilations


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_complete_entries_are_kept_and_found_again(tmp_path):
    whole = compress_executable(bytes(range(256)) * 100)
    first, kept = tmp_path / "first", tmp_path / "kept"
    compilations.start(kept, first)
    assert names(first) == [] and kept.stat().st_mode & 0o777 == 0o700
    (first / "a-cache").write_bytes(whole)
    (first / "torn-cache").write_bytes(whole[: len(whole) // 2])
    compilations.keep(first, kept)
    assert names(kept) == ["a-cache"]
    compilations.start(kept, tmp_path / "second")
    assert (tmp_path / "second/a-cache").read_bytes() == whole


def test_what_others_may_write_is_not_used(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a-cache").write_bytes(b"")
    kept.chmod(0o777)
    compilations.start(kept, tmp_path / "first")
    assert names(tmp_path / "first") == []


def test_the_oldest_entries_make_room(tmp_path, monkeypatch):
    entry, kept, first = compress_executable(bytes(100)), tmp_path / "kept", tmp_path / "first"
    monkeypatch.setattr(compilations, "MAX_BYTES", 2 * len(entry))
    first.mkdir()
    kept.mkdir(mode=0o700)
    for age, name in enumerate("cab"):
        (kept / f"{name}-cache").write_bytes(entry)
        os.utime(kept / f"{name}-cache", (age, age))
    compilations.keep(first, kept)
    assert names(kept) == ["a-cache", "b-cache"]


def test_an_entry_has_one_name_in_every_directory(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        for name in ("first", "second"):
            jax.config.update("jax_compilation_cache_dir", str(tmp_path / name))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            compilation_cache.reset_cache()
            jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", compilations.MIN_SECONDS)
        compilation_cache.reset_cache()
    assert names(tmp_path / "first") == names(tmp_path / "second") != []
