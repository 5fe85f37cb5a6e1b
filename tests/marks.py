"""Marks of test cases."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(keep: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, all but those in `keep` marked slow; a tuple is a case of several arguments."""
    cases = list(cases)
    assert set(keep) <= set(cases), "a case to keep that there is not"
    marked = lambda c: pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow)
    return [case if case in keep else marked(case) for case in cases]
