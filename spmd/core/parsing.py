"""Command-line words into dataclasses; a mistake becomes one line that names the closest option."""

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
    """An instance of the dataclass `cls` from command-line words; with --help, prints the options and exits.

    Args:
        cls: a dataclass whose fields have defaults.
        words: the command line.
        prog: name of the program, for the help.
        description: text above the options of the help.
        registry: tyro's rules for types of values.

    Raises:
        ValueError: an option or a value is not understood; a single line.
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
        message = _event_message(rejected.args[0], words, cls)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = _unbox(printed.getvalue())
    raise ValueError(message)


def _event_message(event: Any, words: Sequence[str], cls: Any) -> str:
    """A tyro event as a single line; messages of this package's checks are unchanged."""
    kind, argument = type(event).__name__, getattr(event, "argument", None)
    if kind == "UnrecognizedArgs":
        return _unknown_option_message(list(event.tokens), words, ["--experiment", *options(cls)])
    if argument is not None:
        flag, choices = argument.lowered.name_or_flags[0], argument.lowered.choices or ()
        takes, text = (
            _describe_metavar(str(argument.lowered.metavar)),
            " ".join(_values(words, flag)),
        )
        if not text:
            return f"{flag} needs a value: {takes}"
        reason = str(getattr(event, "message", ""))
        if reason and not _LIBRARYS.search(reason):
            return f"{flag}: {reason}"
        return f"{flag} takes {takes}, not {text!r}.{closest(text, choices)}".removesuffix(".")
    if hasattr(event, "message"):
        return str(event.message)
    return f"not understood ({kind}): {' '.join(words)}; --help lists all options"


def _describe_metavar(metavar: str) -> str:
    """The required type of a value, in words, from tyro's `{a,b}`, `{None}|INT` and `[INT [INT ...]]`."""
    if match := re.fullmatch(r"\{None\}\|(.*)", metavar):
        return f"{_describe_metavar(match[1])} or None"
    if match := re.fullmatch(r"\{(.*)\}", metavar):
        return "one of " + ", ".join(name or "(empty)" for name in match[1].split(","))
    if match := re.fullmatch(r"\[(\S+) \[\1 \.\.\.\]\]", metavar):
        return f"any number of {_describe_metavar(match[1])}"
    return metavar


def options(cls: Any) -> list[str]:
    """The option names of a dataclass, read from its help."""
    import tyro

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    names: dict[str, None] = {}
    for line in output.getvalue().splitlines():
        text = line.lstrip("│ \t")
        while match := _FLAG.match(text):  # `--log.wandb, --log.no-wandb`
            names[match[0]] = None
            text = text[match.end() :].removeprefix(", ")
    return list(names)


def _values(words: Sequence[str], flag: str) -> list[str]:
    """The values after the last occurrence of an option."""
    same = lambda word: word.partition("=")[0].replace("_", "-") == flag
    start = max((i for i, word in enumerate(words) if same(word)), default=len(words))
    if start < len(words) and "=" in words[start]:
        return [words[start].partition("=")[2]]
    rest = list(words[start + 1 :])
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


def _unknown_option_message(tokens: list[str], words: Sequence[str], names: Sequence[str]) -> str:
    """Message about the first word that belongs to no option."""
    first = tokens[0]
    if not first.startswith("-"):
        return _stray_value_message(first, words, names)
    flag = first.partition("=")[0]
    typed = " ".join([first, *_values(words, first)][:2])
    if flag == "--experiment":
        return "--experiment is given twice; a command takes one"
    group = [name for name in names if name.startswith(f"{flag}.")]
    if group:
        ellipsis = ", ..." if len(group) > _MANY else ""
        return f"{typed}: {flag} is a group of options; give one of {', '.join(group[:_MANY])}{ellipsis}"
    return f"{typed}: there is no option {flag}.{nearest(flag, names)} --help lists all options"


def _stray_value_message(word: str, words: Sequence[str], names: Sequence[str]) -> str:
    """Message about a value without an option."""
    position = words.index(word) if word in words else 0
    flag = next((w for w in reversed(words[:position]) if w.startswith("--")), "")
    group, _, name = flag.rpartition(".")
    group = f"{group}." if group else "--"
    switches = [f"{group}{name.lstrip('-')}", f"{group}no-{name.lstrip('-')}"]
    if flag and switches[1] in names:
        return f"{flag} {word}: {flag} takes no value; {switches[1]} is its opposite"
    context = f" after {flag}" if flag else ""
    return (
        f"{word!r}{context} is not understood: options are given as --name value, and a command comes first"
        " (run.py eval --experiment NAME)"
    )


def nearest(flag: str, names: Sequence[str]) -> str:
    """` Did you mean '--train.epochs'?` when an option is near, by its full name or its last part."""
    tails = {name.rpartition(".")[2].lstrip("-"): name for name in reversed(names)}
    last = flag.rpartition(".")[2].lstrip("-")
    if "." not in flag and last in tails:
        return f" Did you mean {tails[last]!r}?"
    matches = difflib.get_close_matches(flag, names, n=1, cutoff=0.7)
    matches = matches or [
        tails[t] for t in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
    ]
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _unbox(text: str) -> str:
    """The text of a box that tyro printed, as a single line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
