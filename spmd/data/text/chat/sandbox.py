"""The sandbox in which chat templates run: what transformers gives them, and nothing else."""

from __future__ import annotations

import datetime
import functools
import json
import re
from typing import Any

from spmd.core.fields import check

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode, around what the assistant writes


def import_jinja2() -> Any:
    """The package jinja2; ValueError where it is missing, or too old to run what others wrote."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError(
            "chat templates need jinja2 3.1.6 or newer: pip install 'jinja2>=3.1.6'"
        ) from None
    release = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    check(
        release >= (3, 1, 6),
        f"jinja2 {jinja2.__version__} has known ways out of its sandbox: pip install 'jinja2>=3.1.6'",
    )
    return jinja2


@functools.cache
def environment(date: datetime.date) -> Any:
    """An environment of jinja2 with the options, filters and functions of transformers, and its tag
    `generation`.

    Args:
        date: what strftime_now writes.
    """
    jinja2 = import_jinja2()

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: encloses what it writes by marks."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_enclose")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _enclose(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"the name {name!r} of a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    now = datetime.datetime.combine(date, datetime.time(12))
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: now.strftime(form),
        "namespace": Namespace,
    }
    return made


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0]
