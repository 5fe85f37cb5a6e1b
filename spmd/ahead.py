"""An experiment's step compiled in a process of its own: the compiler may abort, and libtpu wants its
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmd import fields, registry
from spmd.optim import OPTIMIZERS
from spmd.plan import targets
from spmd.plan.compile import TPU_ENVIRONMENT, Compiled, Failed, TooLarge, ready
from spmd.storage import json_text
from spmd.strategies import STRATEGIES

if TYPE_CHECKING:
    from spmd.experiment import Experiment


def compiled(exp: Experiment, target: str) -> Compiled:
    """The step of `exp` on `target` (`v5p:4x4x4`, `h100:64`, `cpu:8`); touches no device and reads no data.

    Blocks; several threads may call it. ValueError for the user's mistakes; raises Failed, or TooLarge when
    the compiler says that the memory does not suffice.
    """
    parsed = targets.parse(target)
    ready(parsed)
    file = registry.file_of(exp.name)
    request = {"file": str(file), "config": fields.plain(exp), "target": parsed.name}
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"JAX_PLATFORMS": "cpu"} | (TPU_ENVIRONMENT if parsed.topology else {})
    # run.py may be called from any directory.
    paths = [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", "spmd.ahead"],
        input=json_text(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return _answer(json.loads(done.stdout.splitlines()[-1]))
    raise Failed(_last_words(done))


def _answer(found: dict[str, Any]) -> Compiled:
    if "mistake" in found:
        raise ValueError(found["mistake"])
    if "used" in found:
        raise TooLarge(found["failed"], found["used"], found["limit"])
    if "failed" in found:
        raise Failed(found["failed"])
    return Compiled.from_json(found)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    said = [line for line in done.stderr.splitlines() if line.strip()]
    fatal = [line for line in said if line.startswith("F")] or said[-1:]
    return f"the compiler ended with {how}" + (f": {fatal[0][:300]}" if fatal else "")


# ---- the process of its own


def _main() -> None:
    """Reads a request from stdin, writes one line of JSON to stdout."""
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
    from spmd.plan import compile

    target = targets.parse(request["target"])
    base = registry.from_file(registry.find(request["file"]))
    swapped = {cls.__name__: cls for cls in (*STRATEGIES.values(), *OPTIMIZERS.values())}
    exp = fields.restored(base, request["config"], swapped)
    exp = exp.unread(0 if target.topology else target.num_devices)
    # What is kept is what is read from the program, not the program.
    exp = dataclasses.replace(exp, run=dataclasses.replace(exp.run, compile_cache="off"))
    return compile.compiled(exp.build(compile.devices(target), source=()), target)


if __name__ == "__main__":
    _main()
