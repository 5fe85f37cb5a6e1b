"""The cache of compiled programs on disk: a second start need not compile again."""

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
from spmd.core.storage import cache_root, is_remote, private, ready

# JAX's own threshold of a second would leave out all programs of a small model.
_MIN_SECONDS = 0.1


def use(given: str) -> None:
    """Sets JAX's compilation cache; must come before the backend starts.

    given: a directory (or gs://bucket/dir), "off", or "": what JAX was told already
    (JAX_COMPILATION_CACHE_DIR), else `compiled` in the cache directory. ValueError when a given directory is
    not private: what lies there is run.
    """
    import jax

    config: Any = jax.config
    config.update("jax_enable_compilation_cache", given != "off")
    if given == "off" or (not given and config.jax_compilation_cache_dir):
        return
    place = given
    ready(given, "run.compile_cache")
    if not is_remote(given):
        path = Path(os.path.abspath(os.path.expanduser(given))) if given else default_directory()
        why = private(path)
        if why and not given:
            _say_once(f"compiled programs are not kept: {path} {why}")
            return
        check(
            not why,
            f"run.compile_cache={given!r} {why}; compiled programs are code: give a directory of"
            " your own, or --run.compile-cache off",
        )
        place = str(path)
    if config.jax_compilation_cache_dir != place:
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()  # a program compiled before this has opened another, or none
        config.update("jax_compilation_cache_dir", place)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def default_directory() -> Path:
    """Names the cache of this kind of CPU: a shared home serves several kinds, and XLA's key has none."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kind += "".join(x for x in lines if x.startswith(("model name", "flags", "Features")))
    return Path(cache_root()) / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]
