"""Dims of a model's own, sharded as the base dims that they follow: follows = {"rows": "vocab"}."""

from __future__ import annotations

from collections.abc import Mapping

from spmd.core.fields import check, closest
from spmd.parallel.sharding import RULES, Dims, unknown_dim


def base_dims(follows: Mapping[str, str]) -> dict[str, str]:
    """Check a model's `follows`, {its own dim: the dim of RULES that it is sharded as}.

    Raises:
        ValueError: a dim follows none of RULES, or has the name of one.
    """
    for dim, base in follows.items():
        check(
            base in RULES,
            f"follows: dim {dim!r} follows {base!r}, which is no base dim.{closest(base, RULES)}"
            f" Known: {', '.join(RULES)}",
        )
        check(
            dim not in RULES,
            f"follows: {dim!r} is a base dim, and cannot follow {base!r}; give the model's dim another name",
        )
    return dict(follows)


def resolve_dims(name: str, dims: Dims | None, follows: Mapping[str, str]) -> Dims | None:
    """The base dims of an array's dims.

    Args:
        name: of the array, for messages.
        dims: of the array; None has none.
        follows: base dim by dim of the model's own.

    Raises:
        ValueError: a dim is no base dim and follows none.
    """
    if dims is None:
        return None
    for dim in dims:
        if dim is not None and dim not in RULES and dim not in follows:
            raise unknown_dim(name, dim, follows)
    return tuple(follows.get(dim, dim) if dim else None for dim in dims)
