"""Marks that put the cases of a test into the tiers: `make test`, `make gate`, `make slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(
    keep: Collection[Any], cases: Iterable[Any], *, gate: Collection[Any] = ()
) -> list[Any]:
    """Marks all cases slow but those in `keep`, which run everywhere, and those in `gate`, marked gate.

    A tuple is a case of several arguments.
    """
    cases = list(cases)
    assert {*keep, *gate} <= set(cases), "a case to keep that there is not"

    def tiered(case: Any) -> Any:
        if case in keep:
            return case
        mark = pytest.mark.gate if case in gate else pytest.mark.slow
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)

    return [tiered(case) for case in cases]
