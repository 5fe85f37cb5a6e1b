"""Digests of the stripes of sparse tables: which rows of a checkpoint are damaged.

A table may be larger than a host. Each device digests the stripes that it owns, and compares them with those
that were saved; no host reads another's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from spmd.core import digest
from spmd.parallel.tables import STRIPES, is_replicated, placement_of

PREFIX = "digests."  # of the leaf of a table's digests, beside the table's
SHOWN = 3  # stripes, and ids of each, in a message


def is_striped(name: str, leaf: Any) -> bool:
    """Whether a leaf of the state is an array of a table that is stored in stripes."""
    stored = name.startswith("tables.") and not is_replicated(name.split(".")[1])
    return stored and bool(leaf.shape) and leaf.shape[0] % STRIPES == 0


def compute(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Leaves to save beside those of the state: digests uint32 [stripes, 2] of each striped array."""
    return {
        PREFIX + name: digest.compute_runs(leaf, STRIPES)
        for name, leaf in leaves.items()
        if is_striped(name, leaf)
    }


def abstract(
    stored: set[str], wanted: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, Any]:
    """Shapes to read the saved digests as, sharded as the arrays.

    Args:
        stored: names of the digests in the checkpoint.
        wanted: the leaves of the state.
        shardings: of them.
    """
    return {
        PREFIX + name: jax.ShapeDtypeStruct((STRIPES, 2), np.uint32, sharding=shardings[name])
        for name in wanted
        if PREFIX + name in stored
    }


def describe(name: str, leaf: jax.Array, saved: jax.Array) -> str:
    """Which stripes of an array differ from those that were saved, and ids of their rows; "" for none.

    Args:
        name: of the leaf, as `tables.dim16.rows`.
        leaf: [lines, width], or [rows].
        saved: uint32 [stripes, 2].

    Returns:
        A phrase for a message. Ids count on through the tables of a width.
    """
    layout = leaf.sharding
    out = NamedSharding(layout.mesh, jax.P()) if isinstance(layout, NamedSharding) else layout
    differs = jax.jit(lambda a, b: (a != b).any(axis=1), out_shardings=out)
    wrong = np.flatnonzero(np.asarray(differs(digest.compute_runs(leaf, STRIPES), saved)))
    if not wrong.size:
        return ""
    stack = name.split(".")[1]
    width = 1 if leaf.ndim == 1 else leaf.shape[1] // placement_of(stack, 0).dim
    placement = placement_of(stack, leaf.shape[0] * width)
    length = placement.rows // STRIPES
    phrases = []
    for stripe in wrong[:SHOWN]:
        ids = np.sort(placement.id(np.arange(length) + int(stripe) * length))
        shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
        phrases.append(f"{stripe} (ids {shown})")
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f" in stripes {', '.join(phrases)}{more} of {STRIPES}"


def describe_all(leaves: Mapping[str, jax.Array], saved: Mapping[str, jax.Array]) -> dict[str, str]:
    """`describe` of the leaves whose digests were saved, by name."""
    return {
        name: describe(name, leaf, saved[PREFIX + name])
        for name, leaf in leaves.items()
        if PREFIX + name in saved
    }
