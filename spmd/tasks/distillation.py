"""Distillation: a language model learns the distributions of a larger one."""

# B batch, T time, V vocab

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check
from spmd.tasks import losses
from spmd.tasks.base import FrozenModel
from spmd.tasks.language import LanguageModel
from spmd.tasks.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(LanguageModel):
    """The teacher's distribution of the next token, mixed with the cross-entropy of the token itself.

    (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student), both at the temperature
    (Hinton et al. 2015, arXiv 1503.02531), over the tokens with a target.
    """

    teacher: FrozenModel = dataclasses.field(default_factory=FrozenModel)
    """The teacher: frozen, sharded as the trained model."""
    temperature: float = 1.0
    """Divides the logits of both in the divergence."""
    weight: float = 0.5
    """Share of the divergence, in [0, 1]."""
    metrics = (losses.TokenAccuracy(term="kl"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.temperature > 0, f"task.temperature={self.temperature} must be above 0")
        check(0 <= self.weight <= 1, f"task.weight={self.weight} must be in [0, 1]")
        check(
            self.teacher.model is not None,
            "task.teacher has no model: an experiment file says Distillation(teacher=FrozenModel(model=...))",
        )

    @property
    def frozen(self) -> Mapping[str, FrozenModel]:  # type: ignore[override]
        """The teacher."""
        return {"teacher": self.teacher}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """1 where there is a target."""
        found = super().weights(batch)
        return {"cross_entropy": found["loss"], "kl": found.pop("loss"), **found}

    def coefficients(self, model: Any) -> dict[str, float]:
        """The share of both terms."""
        found = super().coefficients(model)
        del found["loss"]  # the sum of the terms is logged
        return {"cross_entropy": 1 - self.weight, "kl": self.weight, **found}

    def values(self, outputs: Any, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
        """The cross-entropy of each token, and temperature^2 times the divergence of its distributions."""
        found = super().values(outputs, batch, train=train)
        teacher_BTV = batch["frozen/teacher"]
        check(
            teacher_BTV.shape == outputs.shape,
            f"the teacher's outputs are of shape {list(teacher_BTV.shape)} and the student's of"
            f" {list(outputs.shape)}: they need one vocabulary",
        )
        dtype = tree.at_least_float32(outputs.dtype)
        scaled = lambda x: jax.nn.log_softmax(x.astype(dtype) / self.temperature, axis=-1)
        log_p_BTV, log_q_BTV = scaled(teacher_BTV), scaled(outputs)
        p_BTV = jnp.exp(log_p_BTV)
        # A token that pads a vocabulary has a probability of 0.
        each_BTV = jnp.where(p_BTV > 0, p_BTV * (log_p_BTV - jnp.where(p_BTV > 0, log_q_BTV, 0)), 0)
        kl_BT = self.temperature**2 * jnp.sum(each_BTV, axis=-1)
        return {"cross_entropy": found.pop("loss"), "kl": kl_BT, **found}
