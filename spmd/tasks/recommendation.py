"""Recommendation: ratings, retrieval with in-batch negatives, the next item of a history."""

# B batch, N rows of all devices, D width, K negatives

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import batches, tree
from spmd.core.batches import Ids, feature
from spmd.core.fields import check
from spmd.metrics import MAE, RMSE, Metric
from spmd.parallel import scope
from spmd.parallel.tables import PREFIX
from spmd.tasks.base import Task
from spmd.tasks.language import LanguageModel
from spmd.tasks.objective import Batch, MetricSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingPrediction(Task):
    """The rating of an item by a user: squared error; RMSE and MAE of ratings clipped to their range."""

    label: str = "rating"
    """Feature of ratings."""
    low: float = 1.0
    """Lowest rating."""
    high: float = 5.0
    """Highest rating."""

    def __post_init__(self) -> None:
        check(self.low < self.high, f"task.low={self.low} must be less than task.high={self.high}")

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """RMSE and MAE."""
        return tuple(kind(target=self.label, output="rating") for kind in (RMSE, MAE))

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The rows of users and items."""
        return feature(batch, f"{PREFIX}user"), feature(batch, f"{PREFIX}item")

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 for each rating, and for the penalty that the model takes."""
        weight_B = feature(batch, "weight")
        return dict.fromkeys(("loss", "penalty"), jnp.ones(weight_B.shape, weight_B.dtype))

    def coefficients(self, model: Any) -> dict[str, float]:
        """Squared error and penalty are added."""
        return {"loss": 1.0, "penalty": 1.0}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The squared error of each rating, and the model's penalty."""
        error_B = outputs["rating"] - feature(batch, self.label).astype(outputs["rating"].dtype)
        return {"loss": jnp.square(error_B), "penalty": outputs["penalty"]}

    def sums_of(
        self, outputs: Any, batch: Batch, counted: Mapping[str, jax.Array], *, train: bool
    ) -> tuple[dict[str, jax.Array], MetricSums]:
        """As the base; an evaluation clips."""
        clipped = outputs if train else {**outputs, "rating": self._clip(outputs["rating"])}
        return super().sums_of(clipped, batch, counted, train=train)

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """The clipped ratings [B]."""
        return self._clip(super().predict(model, batch)["rating"])

    def _clip(self, rating_B: jax.Array) -> jax.Array:
        return jnp.clip(rating_B, self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """The item that a user chose, among those of the whole batch and some drawn at random.

    The loss is the cross-entropy of score / temperature over the catalogue, whose sum of exponentials is
    estimated: each candidate but the pair's own item counts less the log of how often it is expected (log-Q;
    Yi et al. 2019), in the batch by its share of all events, among those drawn by 1 / items; the mean of both
    estimates. An evaluation compares with the drawn ones alone, since it may not depend on its batch size.

    The model's outputs: user and item [B, D], negatives [B, K, D], catalogue [], the number of items.
    """

    temperature: float = 0.1
    """Divides the scores; initial value where it is learned."""
    learned: bool = False
    """Whether the temperature is trained."""
    corrected: bool = True
    """Whether to subtract log-Q; without, popular items are pushed down as often as they are drawn."""

    def __post_init__(self) -> None:
        check(self.temperature > 0, f"task.temperature={self.temperature} must be more than 0")

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The rows of each looked-up feature by its name."""
        return ({k.removeprefix(PREFIX): x for k, x in batch.items() if k.startswith(PREFIX)},)

    def variables(self, rngs: nnx.Rngs) -> dict[str, jax.Array]:
        """The log of 1 / temperature, where it is learned."""
        return {"log_scale": jnp.asarray(-math.log(self.temperature))} if self.learned else {}

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """ValueError for a batch without the features that the loss reads."""
        batches.check_indices(batch, "item", "B", "the item that was chosen")
        feature(batch, "share")
        feature(batch, "negatives")
        return {}

    def predict(self, model: Any, batch: Batch) -> Any:
        """The score of each pair [B]."""
        outputs = model(*self.inputs(batch))
        return (outputs["user"] * outputs["item"]).sum(-1)

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each pair."""
        real = tree.at_least_float32(outputs["user"].dtype)
        user_BD, item_BD, drawn_BKD = (
            outputs[k].astype(real) for k in ("user", "item", "negatives")
        )
        scale = jnp.asarray(1 / self.temperature, real)
        if self.learned:
            scale = jnp.exp(batch["task/log_scale"]).astype(real)
        drawn_BK = jnp.einsum("bd,bkd->bk", user_BD, drawn_BKD) * scale
        if not train:
            own_B1 = (user_BD * item_BD).sum(-1, keepdims=True) * scale
            return {"loss": _first_of(jnp.concatenate([own_B1, drawn_BK], axis=1))}
        items = scope.gather_batch(item_BD)
        ids = scope.gather_batch(batches.wide_indices(batch["item"])).rows
        logits_BN = user_BD @ items.rows.T * scale
        if self.corrected:
            share_N = scope.gather_batch(batch["share"].astype(real)).rows
            weight = items.weight.astype(real).sum()
            logits_BN -= jnp.log(2 * weight * share_N)[None]
            drawn_BK -= jnp.log(2 * drawn_BK.shape[1] / outputs["catalogue"].astype(real))
        own_B1 = (user_BD * item_BD).sum(-1, keepdims=True) * scale
        same_BN = ids[None] == batches.wide_indices(batch["item"])[:, None]
        masked_BN = same_BN | (items.weight == 0)[None]
        others_BN = jnp.where(masked_BN, jnp.finfo(real).min, logits_BN)
        return {"loss": _first_of(jnp.concatenate([own_B1, others_BN, drawn_BK], axis=1))}


def _first_of(logits_BN: jax.Array) -> jax.Array:
    """Cross-entropy [B] of the first candidate."""
    return jax.nn.logsumexp(logits_BN, axis=1) - logits_BN[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItem(LanguageModel):
    """The item after each of a history: a softmax over the catalogue, as that of a language model."""

    features: tuple[str, ...] = ("history",)

    def ranges(self, batch: Any, outputs: Any, model: Any) -> dict[str, Ids]:
        """Items are of the catalogue, or -1."""
        first = self.features[0]
        ranges = super().ranges(batch, outputs, model)
        return ranges | {first: ranges[first]._replace(low=-1, things="items of the model")}
