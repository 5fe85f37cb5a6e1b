"""Compile an experiment's step in a process of its own: the compiler may abort, and libtpu needs its
environment before JAX starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmd.analysis.plan.compile import TPU_ENVIRONMENT, Compiled, Failed, TooLarge, check_compiler
from spmd.core import fields
from spmd.core.storage import json_text
from spmd.data.registry import TRANSFORMS
from spmd.experiment import files, registry
from spmd.hardware import targets
from spmd.optim import OPTIMIZERS
from spmd.strategies import STRATEGIES

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment


def compile_step(exp: Experiment, target: str) -> Compiled:
    """The step of `exp` on `target` (`v5p:4x4x4`, `h100:64`, `cpu:8`); touches no device and reads no data.

    Blocks; may be called from several threads.

    Raises:
        ValueError: a mistake in the experiment or the target.
        TooLarge: the memory does not suffice, by the compiler.
        Failed: the compilation failed otherwise.
    """
    parsed = targets.parse(target)
    check_compiler(parsed)
    file = registry.file_of(exp.name)
    request = {"file": str(file), "config": fields.plain(exp), "target": parsed.name}
    request["chosen"] = registry.CHOSEN.get(exp.name, {})
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"JAX_PLATFORMS": "cpu"} | (TPU_ENVIRONMENT if parsed.topology else {})
    # The process must import this package, whatever the working directory.
    paths = [str(Path(__file__).resolve().parents[3]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.run(
        [sys.executable, "-m", "spmd.analysis.plan.isolated"],
        input=json_text(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return _result(json.loads(process.stdout.splitlines()[-1]))
    raise Failed(_failure(process))


def _result(answer: dict[str, Any]) -> Compiled:
    """The result of the process, or its error raised."""
    if "mistake" in answer:
        raise ValueError(answer["mistake"])
    if "used" in answer:
        raise TooLarge(answer["failed"], answer["used"], answer["limit"])
    if "failed" in answer:
        raise Failed(answer["failed"])
    return Compiled.from_json(answer)


def _failure(process: subprocess.CompletedProcess[str]) -> str:
    """Exit code or signal of the process, and its fatal or last line of output."""
    end = f"exit code {process.returncode}"
    if process.returncode < 0:
        end = signal.Signals(-process.returncode).name
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("F")] or lines[-1:]
    return f"the compiler ended with {end}" + (f": {fatal[0][:300]}" if fatal else "")


# ---- the compiling process


def _main() -> None:
    """Reads a request from stdin, writes a line of JSON to stdout."""
    request = json.load(sys.stdin)
    try:
        answer = _compile(request).json()
    except TooLarge as error:
        answer = {"failed": str(error), "used": error.used, "limit": error.limit}
    except Failed as error:
        answer = {"failed": str(error)}
    except ValueError as error:
        answer = {"mistake": str(error)}
    print(json_text(answer))


def _compile(request: dict[str, Any]) -> Compiled:
    from spmd.analysis.plan import compile

    target = targets.parse(request["target"])
    base = registry.from_file(files.find(request["file"]), request["chosen"])
    tables: tuple[Mapping[str, type], ...] = (STRATEGIES, OPTIMIZERS, TRANSFORMS)
    classes = {cls.__name__: cls for table in tables for cls in table.values()}
    exp = fields.restore(base, request["config"], classes)
    exp = exp.unread(0 if target.topology else target.num_devices)
    # Only what is read from the program is cached, not the program itself.
    exp = dataclasses.replace(exp, run=dataclasses.replace(exp.run, compile_cache="off"))
    return compile.compile_step(exp.build(compile.devices(target), source=()), target)


if __name__ == "__main__":
    _main()
