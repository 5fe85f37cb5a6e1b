"""The cache of compiled programs on disk, so that a second start need not compile."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from spmd.core.fields import check
from spmd.core.storage import cache_root, check_usable, is_remote, make_private

# JAX's own threshold of a second would leave out all programs of a small model.
_MIN_SECONDS = 0.1


def use_cache(directory: str) -> None:
    """Set JAX's compilation cache, before the backend starts.

    Args:
        directory: a directory (or gs://bucket/dir), "off", or "": JAX_COMPILATION_CACHE_DIR, else
            `compiled` in the cache directory.

    Raises:
        ValueError: the directory is not private: its programs are executed.
    """
    import jax

    config: Any = jax.config
    config.update("jax_enable_compilation_cache", directory != "off")
    if directory == "off" or (not directory and config.jax_compilation_cache_dir):
        return
    target = directory
    check_usable(directory, "run.compile_cache")
    if not is_remote(directory):
        path = (
            Path(os.path.abspath(os.path.expanduser(directory)))
            if directory
            else default_directory()
        )
        reason = make_private(path)
        if reason and not directory:
            _say_once(f"compiled programs are not kept: {path} {reason}")
            return
        check(
            not reason,
            f"run.compile_cache={directory!r} {reason}; compiled programs are code: give a directory of"
            " your own, or --run.compile-cache off",
        )
        target = str(path)
    if config.jax_compilation_cache_dir != target:
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()  # an earlier compilation has opened another cache, or none
        config.update("jax_compilation_cache_dir", target)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def default_directory() -> Path:
    """A directory for this kind of CPU: a shared home may serve several, and XLA's key ignores it."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kind += "".join(x for x in lines if x.startswith(("model name", "flags", "Features")))
    return Path(cache_root()) / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]
