"""The command line: finds the command, prints a user's mistake as one message, exits with 2."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence

from spmd.core import explain
from spmd.core.fields import closest
from spmd.runtime import EXIT_FAILED, EXIT_MISTAKE, outlet

COMMANDS = {
    "train": "train, or resume what is in the run directory (the default)",
    "eval": "evaluate a checkpoint of a run",
    "predict": "write the predictions of a run for a data set: --out FILE.parquet or .jsonl",
    "sample": "continue prompts with the language model of a run, or translate lines",
    "recommend": "items for users by a run of a recommender: --user 42 --k 10",
    "verify": "compare the step on the mesh with the step on one device; name the first difference",
    "compare": "train strategies with the same budget: loss against steps, bytes, and time on a network",
    "plan": "memory, communication and step time on devices that need not be present",
    "export": "write a checkpoint as Hugging Face safetensors: --to DIR",
    "data": "prepare | show | check the input data",
    "launch": "train elsewhere or in several processes: local | slurm | tpu-vm | gke",
    "runs": "list | status | check [DIR]: the runs below a directory, or one run",
}
OWN_HELP = {"launch"}  # commands that have their own help, without an experiment
WITHOUT_EXPERIMENT = {"runs"}

USAGE = """usage: run.py [COMMAND] --experiment NAME [--field value ...]
       run.py runs list|status|check [DIR]
       run.py --list
(python run.py in a checkout; spmd where the package is installed)

"""


def usage() -> str:
    """Commands, and every field that all experiments share; imports no jax."""
    from spmd.cli.help import shared_fields

    commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    return (
        f"{USAGE}commands:\n{commands}\n\noptions:\n"
        "  --experiment NAME   a name of --list, or a path to a .py file with config()\n"
        "  --list              the experiments, a line each\n"
        "  --help              this; with --experiment NAME every field of that experiment\n\n"
        f"fields of every experiment (type, default):\n{shared_fields()}\n"
    )


def _take(words: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from words; returns the value."""
    for i, word in enumerate(words):
        if word == flag:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise ValueError(f"{flag} needs a value, for example: {flag} digits")
            del words[i]
            return words.pop(i)
        if word.startswith(f"{flag}="):
            return words.pop(i).partition("=")[2]
    return None


def _dispatch(argv: Sequence[str]) -> int:
    words = list(argv)
    command = words.pop(0) if words and not words[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise ValueError(
            f"unknown command {command!r}.{closest(command, COMMANDS)} Known: {', '.join(COMMANDS)}"
        )
    if "--list" in words:
        from spmd.experiment import files

        found = files.available()
        width = max(map(len, found), default=0)
        for name, path in found.items():
            print(f"{name:{width}}  {files.summary_line(path)}")
        return 0
    if command in WITHOUT_EXPERIMENT and not {"--help", "-h"} & set(words):
        return importlib.import_module(f"spmd.cli.{command}").run(words)
    name = _take(words, "--experiment")
    module = f"spmd.cli.{command}"
    if name is None and command in OWN_HELP:
        return importlib.import_module(module).run(name, words)
    if name is None and (not argv or {"--help", "-h"} & set(words)):
        print(usage())
        return 0
    if name is None:
        raise ValueError(
            "no experiment given; type --experiment NAME (run.py --list shows the names)"
        )
    return importlib.import_module(module).run(name, words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the user's mistake, in one message).

    In a run of several processes, an error of this one makes it exit at once: in a normal exit JAX would wait
    for the others, and they for it.

    Args:
        argv: the words after the program's name; None: those of this process.
    """
    outlet.open_standard()
    for stream in (sys.stdout, sys.stderr):  # names of files may not be valid text
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SystemExit:
        raise
    except BaseException as error:
        if not _in_group():
            raise
        traceback.print_exception(error)
        return _leave(EXIT_FAILED)


def _run(argv: Sequence[str]) -> int:
    try:
        try:
            code = _dispatch(argv)
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, OSError) and (code := _unwritable(error)):
            return _leave(code)
        explained = _explain_users_error(error)
        if os.environ.get("SPMD_TRACEBACK") or not (explained or isinstance(error, ValueError)):
            raise
        _say(f"error: {explained or error}")
        if not explained and error.__traceback__ is not None and not explain.from_package(error):
            _say("(from a library; SPMD_TRACEBACK=1 shows where)")
        return _leave(EXIT_MISTAKE)
    except KeyboardInterrupt:
        _say("interrupted before training began; nothing was lost")
        return 130


def _explain_users_error(error: Exception) -> str:
    """The message about an error from the code of an experiment file, or below it; else ""."""
    registry = sys.modules.get("spmd.experiment.registry")
    for path in [file for files in registry.LOADED.values() for file in files] if registry else ():
        if explain.user_frames(error, path):
            return explain.explain(error, path)
    return ""


def _say(text: str) -> None:
    """Print to standard error, whose reader may have closed too."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _unwritable(error: OSError) -> int:
    """The exit code where standard output cannot be written; 0 where the error has another cause.

    Later output is discarded.
    """
    if isinstance(error, BrokenPipeError) and _reader_closed():  # `| head`
        return 128 + signal.SIGPIPE
    descriptor = outlet.descriptor(sys.stdout)
    if error.filename is not None or descriptor is None:
        return 0
    try:
        os.write(descriptor, b"\n")  # fails if it is standard output that failed
    except OSError as again:
        outlet.silence(descriptor)
        _say(f"error: cannot write to standard output: {again.strerror}")
        return EXIT_FAILED
    return 0


def _reader_closed() -> bool:
    """Whether the reader of standard output or error has closed."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if (descriptor := outlet.descriptor(stream)) is not None:
            poll.register(descriptor, 0)
    closed = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in closed:
        outlet.silence(descriptor)
    return bool(closed)


def _in_group() -> bool:
    """Whether the run has several processes; does not import jax."""
    agree = sys.modules.get("spmd.runtime.agree")
    return agree is not None and agree.has_peers()


def _leave(code: int) -> int:
    """The exit code; in a run of several processes, exits at once."""
    if _in_group():
        from spmd.runtime import agree

        agree.leave(code)
    return code
