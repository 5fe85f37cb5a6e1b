"""Metrics of ranked candidates: hit rate, recall, NDCG, MRR."""

# B batch, N candidates, K cut-offs

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import batches, tree
from spmd.core.fields import check
from spmd.metrics.base import Batch, Metric, Sums, Values, Weights, ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Metric):
    """Hit rate, recall, NDCG and MRR at k, of scores [B, N] for N candidates.

    label: int [B], the candidate that is relevant, or [B, N], 1 for each that is. Values: `hit@k`, whether a
    relevant one is among the first k; `recall@k`, the share of the relevant ones that are; `ndcg@k` (Järvelin
    and Kekäläinen 2002, binary gains); `mrr@k`, 1 / rank of the first relevant one. Candidates of equal score
    rank by their number. Examples without a relevant candidate do not count.
    """

    name: str = "ranking"
    label: str = "label"
    k: tuple[int, ...] = (10,)

    def __post_init__(self) -> None:
        check(
            bool(self.k) and min(self.k) >= 1,
            f"metric {self.name!r}: k={self.k} must be cut-offs of at least 1",
        )

    def sums(self, outputs: Any, batch: Batch, weights: Weights) -> Sums:
        """float [K] of each value, and the weight."""
        label = batches.wide_indices(batches.feature(batch, self.label))
        candidates = outputs.shape[-1]
        if label.ndim == outputs.ndim - 1:
            index = jax.lax.broadcasted_iota(label.dtype, outputs.shape, outputs.ndim - 1)
            label = (index == label[..., None]).astype(jnp.int32)
        real = tree.at_least_float32(outputs.dtype)
        most = min(max(self.k), candidates)
        first = jax.lax.top_k(outputs, most)[1]
        relevant = jnp.take_along_axis(label, first, axis=-1) > 0  # [B, most]
        total = (label > 0).sum(-1)
        weight = self.weight(weights, total.shape).astype(real) * (total > 0).astype(real)
        gain = 1 / np.log2(np.arange(2, most + 2))
        ideal = jnp.asarray(np.concatenate([[0.0], np.cumsum(gain)]), real)
        rank = jnp.where(relevant.any(-1), relevant.argmax(-1) + 1, most + 1)
        found: dict[str, list[jax.Array]] = {"hit": [], "recall": [], "ndcg": [], "mrr": []}
        for k in self.k:
            k = min(k, most)
            hits = relevant[..., :k].astype(real)
            within = rank <= k
            found["hit"].append(within.astype(real))
            found["recall"].append(hits.sum(-1) / jnp.maximum(total, 1).astype(real))
            best = ideal[jnp.minimum(total, k)]
            dcg = hits @ jnp.asarray(gain[:k], real)
            found["ndcg"].append(dcg / jnp.where(best > 0, best, 1))
            found["mrr"].append(jnp.where(within, 1 / rank.astype(real), 0))
        totals = {
            name: jnp.stack([(x * weight).sum() for x in values]) for name, values in found.items()
        }
        return totals | {"weight": weight.sum()}

    def compute(self, sums: Mapping[str, np.ndarray]) -> Values:
        """Each value at each k."""
        return {
            f"{name}@{k}": ratio(sums[name][i], sums["weight"])
            for name in ("hit", "recall", "ndcg", "mrr")
            for i, k in enumerate(self.k)
        }


def rank_values(
    ranked: np.ndarray, relevant: Sequence[np.ndarray], cutoffs: Sequence[int]
) -> dict[str, float]:
    """The values of `Ranking` for rankings that are known, on the host, in float64.

    Args:
        ranked: [N, K] candidates in their order, each once; -1 where there are fewer.
        relevant: of each of the N, the candidates that are relevant, one or more.
        cutoffs: each k, of at most K.

    Returns:
        {"hit@k": ..., "recall@k": ..., "ndcg@k": ..., "mrr@k": ...}, means over the N.
    """
    hits = np.array(
        [np.isin(row, items) & (row >= 0) for row, items in zip(ranked, relevant, strict=True)]
    )
    total = np.array([len(np.unique(items)) for items in relevant])
    gain = 1 / np.log2(np.arange(2, ranked.shape[1] + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gain)])
    rank = np.where(hits.any(1), hits.argmax(1) + 1, np.inf)
    values: dict[str, list[float]] = {"hit": [], "recall": [], "ndcg": [], "mrr": []}
    for k in (min(k, ranked.shape[1]) for k in cutoffs):
        values["hit"].append(float(hits[:, :k].any(1).mean()))
        values["recall"].append(float((hits[:, :k].sum(1) / total).mean()))
        values["ndcg"].append(float((hits[:, :k] @ gain[:k] / ideal[np.minimum(total, k)]).mean()))
        values["mrr"].append(float(np.where(rank <= k, 1 / rank, 0).mean()))
    return {
        f"{name}@{k}": x for name, row in values.items() for k, x in zip(cutoffs, row, strict=True)
    }
