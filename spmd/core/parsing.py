"""Command-line words into dataclasses: what is not understood becomes one line, with the closest option."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Sequence
from typing import Any

from spmd.core.fields import closest

_FLAG = re.compile(r"--[a-zA-Z][\w.\-]*")
_LIBRARYS = re.compile(
    r"^(no type matching|Could not find|invalid literal|could not convert|invalid choice|Error)"
    r"|does not match choices"
)
_MANY = 9  # fields of a group that a message lists


class _Rejected(Exception):
    """A word that tyro rejects; the argument is one of its events."""


def parse(
    cls: Any, words: Sequence[str], prog: str, description: str = "", registry: Any = None
) -> Any:
    """An instance of the dataclass `cls` as command-line words describe it.

    ValueError, in one line, for an option or a value that is not understood; with --help, prints the options
    and exits. registry: tyro's, with rules for values.
    """
    import tyro

    try:
        from tyro._errors import on_parse_error
    except (
        ImportError
    ):  # no public interface yet: another version may have none, and its text is shown
        on_parse_error = lambda hook: contextlib.nullcontext()

    def reject(event: Any) -> None:
        raise _Rejected(event)

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), on_parse_error(reject):
            return tyro.cli(cls, args=words, prog=prog, description=description, registry=registry)
    except _Rejected as rejected:
        message = _message(rejected.args[0], words, cls)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = _without_frame(printed.getvalue())
    raise ValueError(message)


def _message(event: Any, words: Sequence[str], cls: Any) -> str:
    """A tyro event as a single line; the messages of our own checks are unchanged."""
    kind, argument = type(event).__name__, getattr(event, "argument", None)
    if kind == "UnrecognizedArgs":
        return _unknown(list(event.tokens), words, ["--experiment", *options(cls)])
    if argument is not None:
        flag, choices = argument.lowered.name_or_flags[0], argument.lowered.choices or ()
        takes, given = _kind(str(argument.lowered.metavar)), " ".join(_values(words, flag))
        if not given:
            return f"{flag} needs a value: {takes}"
        said = str(getattr(event, "message", ""))
        if said and not _LIBRARYS.search(said):
            return f"{flag}: {said}"
        return f"{flag} takes {takes}, not {given!r}.{closest(given, choices)}".removesuffix(".")
    if hasattr(event, "message"):
        return str(event.message)
    return f"not understood ({kind}): {' '.join(words)}; --help lists all options"


def _kind(metavar: str) -> str:
    """The required type of a value, in words, from tyro's `{a,b}`, `{None}|INT` and `[INT [INT ...]]`."""
    if match := re.fullmatch(r"\{None\}\|(.*)", metavar):
        return f"{_kind(match[1])} or None"
    if match := re.fullmatch(r"\{(.*)\}", metavar):
        return "one of " + ", ".join(name or "(empty)" for name in match[1].split(","))
    if match := re.fullmatch(r"\[(\S+) \[\1 \.\.\.\]\]", metavar):
        return f"any number of {_kind(match[1])}"
    return metavar


def options(cls: Any) -> list[str]:
    """The option names of a dataclass, read from its help."""
    import tyro

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    found: dict[str, None] = {}
    for line in shown.getvalue().splitlines():
        text = line.lstrip("│ \t")
        while match := _FLAG.match(text):  # `--log.wandb, --log.no-wandb`
            found[match[0]] = None
            text = text[match.end() :].removeprefix(", ")
    return list(found)


def _values(words: Sequence[str], flag: str) -> list[str]:
    """The values after the last occurrence of an option."""
    same = lambda word: word.partition("=")[0].replace("_", "-") == flag
    at = max((i for i, word in enumerate(words) if same(word)), default=len(words))
    if at < len(words) and "=" in words[at]:
        return [words[at].partition("=")[2]]
    rest = list(words[at + 1 :])
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


def _unknown(tokens: list[str], words: Sequence[str], known: Sequence[str]) -> str:
    """Message about the first word that belongs to no option."""
    first = tokens[0]
    if not first.startswith("-"):
        return _stray(first, words, known)
    flag = first.partition("=")[0]
    given = " ".join([first, *_values(words, first)][:2])
    if flag == "--experiment":
        return "--experiment is given twice; a command takes one"
    group = [name for name in known if name.startswith(f"{flag}.")]
    if group:
        more = ", ..." if len(group) > _MANY else ""
        return (
            f"{given}: {flag} is a group of options; give one of {', '.join(group[:_MANY])}{more}"
        )
    return f"{given}: there is no option {flag}.{nearest(flag, known)} --help lists all options"


def _stray(word: str, words: Sequence[str], known: Sequence[str]) -> str:
    """Message about a value without an option."""
    at = words.index(word) if word in words else 0
    flag = next((w for w in reversed(words[:at]) if w.startswith("--")), "")
    group, _, name = flag.rpartition(".")
    group = f"{group}." if group else "--"
    switches = [f"{group}{name.lstrip('-')}", f"{group}no-{name.lstrip('-')}"]
    if flag and switches[1] in known:
        return f"{flag} {word}: {flag} takes no value; {switches[1]} is its opposite"
    after = f" after {flag}" if flag else ""
    return (
        f"{word!r}{after} is not understood: options are given as --name value, and a command comes first"
        " (run.py eval --experiment NAME)"
    )


def nearest(flag: str, known: Sequence[str]) -> str:
    """` Did you mean '--train.epochs'?` when an option is near, by its full name or its last part."""
    tails = {name.rpartition(".")[2].lstrip("-"): name for name in reversed(known)}
    last = flag.rpartition(".")[2].lstrip("-")
    if "." not in flag and last in tails:
        return f" Did you mean {tails[last]!r}?"
    found = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    found = found or [
        tails[t] for t in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
    ]
    return f" Did you mean {found[0]!r}?" if found else ""


def _without_frame(text: str) -> str:
    """The text of a box that tyro printed, as a single line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
