"""Attention in numpy, and the masks that its kernels are held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Fields of a Mask; keys: how many, if not as many as queries; padded: segments on "both" sides, of "keys"
# alone or "apart" on both; options of attend.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"kind": "causal"},
    "causal_packed": {"kind": "causal", "padded": "both", "softcap": 2.0},
    "causal_scaled": {"kind": "causal", "padded": "both", "scale": 0.7},
    "causal_bias": {"kind": "causal", "padded": "both", "bias": True},
    "causal_apart": {"kind": "causal", "padded": "apart"},
    "full": {"kind": "full"},
    "full_packed": {"kind": "full", "padded": "both", "scale": 0.7, "softcap": 2.0},
    "full_padded_keys": {"kind": "full", "padded": "keys"},
    "full_bias": {"kind": "full", "padded": "keys", "bias": True, "scale": 0.7},
    "full_softcap_bias": {"kind": "full", "padded": "both", "softcap": 2.0, "bias": True},
    "window_left": {"kind": "window", "window": (3, 0), "padded": "both"},
    "window": {"kind": "window", "window": (2, 5), "padded": "both", "softcap": 2.0},
    "window_alone": {"kind": "window", "window": (2, 1)},
    "prefix": {"kind": "prefix", "padded": "both"},
    "prefix_alone": {"kind": "prefix", "scale": 0.3},
    "cross": {"kind": "full", "keys": 2.0},
    "cross_padded": {"kind": "full", "keys": 0.5, "padded": "apart"},
    "cross_window": {"kind": "window", "window": (2, 2), "keys": 0.5},
    "cross_causal": {"kind": "causal", "keys": 2.0},
}


class Inputs(NamedTuple):
    """Inputs of attend: queries, keys, values, fields of the mask, options; w weighs a loss."""

    qkv: tuple[Any, Any, Any]
    mask: dict[str, Any]
    options: dict[str, Any]
    w: Any


def slopes(query_T: Any, key_S: Any) -> Any:
    """A bias of four heads: -|distance| times a slope (ALiBi)."""
    distance_1TS = jnp.abs(query_T[:, None] - key_S[None]).astype(jnp.float32)[None]
    return -distance_1TS * jnp.asarray([0.5, 0.25, 0.125, 0.0], jnp.float32)[:, None, None]


def inputs_of(case: str, *, batch=2, time=16, heads=(4, 2), head_dim=8, dtype=np.float64):
    """The Inputs of a case."""
    rng, given = np.random.default_rng(0), dict(CASES[case])
    keys, padded = int(time * given.pop("keys", 1.0)), given.pop("padded", "")
    normal = lambda length, num: rng.normal(size=(batch, length, num, head_dim)).astype(dtype)
    qkv = normal(time, heads[0]), normal(keys, heads[1]), normal(keys, heads[1])
    number = lambda length: np.sort(rng.integers(0, 3, (batch, length)))[:, ::-1].astype(np.int32)
    query = number(time)
    key = query if padded == "both" else np.minimum(number(keys), 1 + (padded == "apart"))
    if padded in ("both", "apart"):
        given["query_segments_BT"] = query
    if padded:
        given["key_segments_BS"] = key
    if given["kind"] == "prefix":
        given["prefix_B"] = np.asarray(rng.integers(1, time, batch), np.int32)
    options = {name: given.pop(name) for name in ("scale", "softcap", "bias") if name in given}
    options |= {"bias": slopes} if "bias" in options else {}
    return Inputs(qkv, given, options, normal(time, heads[0]))


def expected(inputs: Inputs) -> Any:
    """Attention [B, T, H, K], pair by pair from the definition."""
    (q, k, v), mask, options = inputs.qkv, inputs.mask, inputs.options
    (batch, time, heads, head_dim), keys = q.shape, k.shape[1]
    query = mask.get("query_segments_BT", np.ones((batch, time)))
    key = mask.get("key_segments_BS", np.ones((batch, keys)))
    left, right = mask.get("window", (0, 0))
    sees = {
        "full": lambda b, i, j: True,
        "causal": lambda b, i, j: j <= i,
        "window": lambda b, i, j: i - left <= j <= i + right,
        "prefix": lambda b, i, j: j <= i or j < mask["prefix_B"][b],
    }[mask["kind"]]
    bias = np.zeros((heads, time, keys))
    if "bias" in options:
        bias = np.asarray(options["bias"](jnp.arange(time), jnp.arange(keys)), np.float64)
    y = np.zeros(q.shape)
    for b, i, h in np.ndindex(batch, time, heads):
        seen = [j for j in range(keys) if sees(b, i, j) and query[b, i] == key[b, j]]
        if not seen:
            continue
        g = h // (heads // k.shape[2])
        scores = k[b, seen, g] @ q[b, i, h] * options.get("scale", head_dim**-0.5)
        if "softcap" in options:
            scores = options["softcap"] * np.tanh(scores / options["softcap"])
        scores = scores + bias[h, i, seen]
        shares = np.exp(scores - scores.max())
        y[b, i, h] = shares @ v[b, seen, g] / shares.sum()
    return y
