"""Classification of images or vectors."""

# B batch, C classes, T time, D embed, V vocab

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spmd.core import batches, tree
from spmd.core.batches import Ids, feature
from spmd.core.fields import check
from spmd.models.functional import network
from spmd.tasks import losses
from spmd.tasks.base import Task, scaled_loss, stages_of, training

if TYPE_CHECKING:
    from spmd.tasks.base import Batch, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Classes from images or vectors: softmax cross-entropy, accuracy; both blended under mixup."""

    input: str = "image"
    """Name of the input feature; uint8 is scaled to [0, 1]."""
    label: str = "label"
    """Name of the class-index feature."""
    label_smoothing: float = 0.0
    """Mass spread evenly over the classes."""

    def __post_init__(self) -> None:
        check(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing={self.label_smoothing} must be in [0, 1)",
        )

    def build(self, model: Any, param_dtype: str = "float32") -> Task:
        """The task of a model that maps [B, ...] to logits [B, C]."""
        net = network(model, param_dtype)
        real = tree.at_least_float32(jnp.dtype(param_dtype))

        def sums(logits_BC: jax.Array, batch: Batch, smoothing: float) -> Sums:
            self._check(batch, logits_BC)

            def against(label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
                label_B = batches.wide_indices(label_B)
                loss_B = losses.cross_entropy(logits_BC, label_B, smoothing)
                return loss_B, (logits_BC.argmax(-1).astype(label_B.dtype) == label_B).astype(
                    loss_B.dtype
                )

            loss_B, right_B = against(batch[self.label])
            if "mix" in batch:  # mixup: the loss of a blend is the blend of the losses
                share_B = batch["mix"].astype(loss_B.dtype)
                other = against(batch[f"{self.label}_b"])
                loss_B, right_B = (
                    share_B * a + (1 - share_B) * b
                    for a, b in zip((loss_B, right_B), other, strict=True)
                )
            weight_B = batch["weight"].astype(loss_B.dtype)
            weight = weight_B.sum()
            return {
                "loss": (jnp.sum(loss_B * weight_B), weight),
                "accuracy": (jnp.sum(right_B * weight_B), weight),
            }

        def loss(params, model_state, batch, step_key, scale):
            with training(batch, step_key):
                logits_BC, model_state = net.apply(
                    params, model_state, self._input(batch, real), train=True
                )
            metrics = sums(logits_BC, batch, self.label_smoothing)
            return scaled_loss(metrics, scale), (metrics, model_state)

        def finish(module, x, batch, scale):
            metrics = sums(module.logits(x), batch, self.label_smoothing)
            return scaled_loss(metrics, scale), metrics

        def predict(params, model_state, batch):
            return net.apply(params, model_state, self._input(batch, real), train=False)[0]

        def ranges(batch, logits):
            self._check(batch, logits)
            labels = Ids(logits.shape[-1], "classes of the model's output", target=True)
            return dict.fromkeys(self._labels(batch), labels)

        return Task(
            init=net.init,
            dims=net.dims,
            coefficients={"loss": 1.0},
            weigh=lambda batch: {"loss": jnp.sum(batch["weight"].astype(real))},
            loss=loss,
            predict=predict,
            call=net.evaluated,
            whole_batch=net.whole_batch,
            evaluate=lambda p, s, batch: sums(predict(p, s, batch), batch, 0.0),
            ranges=ranges,
            staged=lambda: stages_of(net, lambda batch: [self._input(batch, real)], finish),
        )

    def _labels(self, batch: Batch) -> list[str]:
        """The label, and under mixup that of the other image."""
        return [self.label, f"{self.label}_b"] if "mix" in batch else [self.label]

    def _check(self, batch: Batch, logits_BC: Any) -> None:
        """ValueError for shapes or types that this task does not take."""
        for name in self._labels(batch):
            batches.check_indices(batch, name, "B", "one class for each example")
        batches.check_logits(logits_BC, batch[self.label], self.label, "classes")

    def _input(self, batch: Batch, real: Any) -> jax.Array:
        """The feature in floating point, as wide as `real` at least."""
        x = feature(batch, self.input)
        if x.dtype == jnp.uint8:
            return x.astype(real) / 255
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < real.itemsize
        return x.astype(real) if narrow else x
