"""Explain an exception that came from a user's own file: the file, the line, and the closest name."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import pkgutil
import re
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spmd.core import values
from spmd.core.fields import closest

PACKAGE = Path(__file__).resolve().parents[1]
SHOWN = 12  # names that a message lists
CALL = re.compile(r"(?:[\w<>]+\.)*?(\w+)(?:\.__init__)?\(\) (.+)", re.S)


class Frame(NamedTuple):
    """A frame of the user's own code."""

    file: str
    line: int
    function: str


class InputError(ValueError):
    """A mistake in what the experiment's file was given to read, not in its code."""


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Turn what the file `path` raises in the body into a ValueError with `explain`'s message."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(explain(error, path)) from error


def user_frames(error: BaseException, path: Path) -> list[Frame]:
    """The frames of the user's own code, from the first in the file `path` to the innermost; may be empty."""
    frames = []
    for frame, line in _frames(error):
        code = frame.f_code
        if _is_same_file(code.co_filename, path) or (
            frames and not _is_library_file(code.co_filename)
        ):
            frames.append(Frame(_short_path(code.co_filename), line, code.co_name))
    return frames


def explain(error: BaseException, path: Path) -> str:
    """A message about an exception raised while the file `path` was read, or its code ran.

    It names the file and line where the user's own code was, the functions that led there, what was wrong,
    and the closest name that would have worked.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{_short_path(error.filename)}, line {error.lineno}"
        text = f": {error.text.strip()}" if error.text and error.text.strip() else ""
        return f"experiment file {place}: {type(error).__name__}: {error.msg}{text}"
    places = user_frames(error, path)
    if not places:
        return f"experiment file {_short_path(str(path))}: {_describe_mistake(error)}"
    *outer, last = places
    function = "" if last.function == "<module>" else f", in {last.function}()"
    callers = [
        f"{p.file}, line {p.line}" if p.file != last.file else f"line {p.line}"
        for p in reversed(outer)
        if (p.file, p.line) != (last.file, last.line)
    ]
    context = f" (called from {', '.join(dict.fromkeys(callers))})" if callers else ""
    return f"experiment file {last.file}, line {last.line}{function}: {_describe_mistake(error)}{context}"


def from_package(error: BaseException) -> bool:
    """Whether this package raised an error, whose text then describes the mistake."""
    frames = list(_frames(error))
    return bool(frames) and _is_within(frames[-1][0].f_code.co_filename, PACKAGE)


def _describe_mistake(error: BaseException) -> str:
    """The mistake without its place: a wrong call or name with the closest one, else the error."""
    if isinstance(error, SystemExit):
        return f"it ends the process (exit code {error.code})"
    description = (
        _describe_library_error(error)
        or _describe_call(error)
        or _describe_name(error)
        or _describe_import(error)
        or _describe_value(error)
    )
    return description or (
        str(error) if type(error) is ValueError else f"{_type_name(error)}: {error}"
    )


def _describe_call(error: BaseException) -> str:
    """An argument that a class or function does not take, or lacks."""
    match = CALL.fullmatch(str(error)) if isinstance(error, TypeError) else None
    frames = list(_frames(error))
    if match is None or not frames:
        return ""
    name, reason = match.groups()
    function = _find_callable(frames[-1][0], name)
    if function is None:
        return ""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ""
    takes = f"It takes: {_join_names(parameters)}" if parameters else "It takes none"
    unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if unknown:
        return f"{name}() has no {unknown[1]!r}.{closest(unknown[1], parameters)} {takes}"
    if "positional argument" in reason or "missing" in reason:
        return f"{name}() {reason}. {takes}"
    return ""


def _find_callable(frame: types.FrameType, name: str) -> Any:
    """The class or function of that name, as the frame's code may have reached it."""
    reached = [*frame.f_locals.values(), *frame.f_globals.values()]
    for value in reached:
        if isinstance(value, types.ModuleType):
            value = vars(value).get(name)
        if callable(value) and getattr(value, "__name__", "") == name:
            return value
    return None


def _describe_name(error: BaseException) -> str:
    """A variable, or an attribute, that does not exist."""
    if isinstance(error, AttributeError) and error.name:
        names, owner = _public_names(dir(error.obj)), error.obj
        if isinstance(owner, types.ModuleType):
            names = _module_names(owner)
            subject = f"module {owner.__name__}"
        else:
            subject = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        suggestion = closest(error.name, names)
        builtin = type(owner).__module__ == "builtins" and not isinstance(owner, types.ModuleType)
        choices = "" if suggestion or builtin else f" It has: {_join_names(names)}"
        return f"{subject} has no {error.name!r}.{suggestion}{choices}"
    if isinstance(error, NameError) and error.name:
        frame = [frame for frame, _ in _frames(error)][-1:]
        names = {
            k for f in frame for scope in (f.f_locals, f.f_globals, f.f_builtins) for k in scope
        }
        suggestion = closest(error.name, names) or " Is its import missing?"
        return f"the name {error.name!r} is not defined.{suggestion}"
    return ""


def _describe_import(error: BaseException) -> str:
    """A module that does not exist, or has no such name."""
    if not isinstance(error, ImportError) or not error.name:
        return ""
    if isinstance(error, ModuleNotFoundError):
        parent, _, leaf = error.name.rpartition(".")
        package = sys.modules.get(parent)
        suggestion = closest(leaf, _module_names(package)) if package else " Is it installed?"
        return f"ModuleNotFoundError: {error.msg}.{suggestion}"
    module = sys.modules.get(error.name)
    missing = re.search(r"cannot import name '(\w+)'", str(error))
    if module is None or not missing:
        return ""
    names = _module_names(module)
    suggestion = closest(missing[1], names)
    return f"module {error.name} has no {missing[1]!r}.{suggestion or f' It has: {_join_names(names)}'}"


def _describe_value(error: BaseException) -> str:
    """A value of a wrong type, or not finite, in a configuration class of this package."""
    if not isinstance(error, TypeError | AttributeError | OverflowError | ValueError):
        return ""
    for frame, _ in reversed(list(_frames(error))):
        config = frame.f_locals.get("self")
        if (
            frame.f_code.co_name == "__post_init__"
            and dataclasses.is_dataclass(config)
            and _is_within(frame.f_code.co_filename, PACKAGE)
        ):
            owner = type(config).__name__
            return next(values.problems(config, "" if owner == "Experiment" else f"{owner}."), "")
    return ""


def _describe_library_error(error: BaseException) -> str:
    """An error raised inside a library that the user's code called: its place there too."""
    *_, (frame, line) = [*_frames(error)] or [(None, 0)]
    if frame is None or not _is_library_file(frame.f_code.co_filename):
        return ""
    file = frame.f_code.co_filename
    if _is_within(file, PACKAGE) or file.startswith("<"):
        return ""
    root = max((r for r in _roots() if _is_within(file, r)), key=lambda r: len(str(r)))
    inside = os.path.relpath(os.path.realpath(file), os.path.realpath(root))
    return f"{_type_name(error)}: {error} (raised by {inside}, line {line})"


def _type_name(error: BaseException) -> str:
    return type(error).__name__


def _frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _join_names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _public_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def _module_names(module: types.ModuleType) -> list[str]:
    """The public names of a module, lazy ones and modules inside it included."""
    inside = _public_names(m.name for m in pkgutil.iter_modules(getattr(module, "__path__", [])))
    return list(
        dict.fromkeys([*getattr(module, "__all__", ()), *_public_names(dir(module)), *inside])
    )


def _is_library_file(file: str) -> bool:
    """Whether a file is of this package, of the standard library, of an installed package, or is none."""
    return file.startswith("<") or any(_is_within(file, root) for root in _roots())


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    standard = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [PACKAGE, *(Path(p) for p in (*standard, *site.getsitepackages()))]


def _is_within(file: str, root: Path) -> bool:
    path = os.path.realpath(file)
    return any(path.startswith(f"{r}{os.sep}") for r in (root, os.path.realpath(root)))


def _is_same_file(file: str, path: Path) -> bool:
    return os.path.realpath(file) == os.path.realpath(path)


def _short_path(file: str) -> str:
    """A file as the user may have typed it: relative where it is below the working directory."""
    try:
        path = Path(os.path.realpath(file))
        return str(path.relative_to(os.path.realpath(os.getcwd())))
    except (OSError, ValueError):
        return file
