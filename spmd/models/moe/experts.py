"""The configuration of a mixture of experts."""

from __future__ import annotations

import dataclasses

from spmd.core.fields import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """How feed-forward layers are made of experts (Shazeer et al. 2017, arXiv 1701.06538)."""

    num: int = 0
    """Experts of each layer; 0 is one dense layer."""
    top_k: int = 2
    """Experts that a token goes to."""
    every: int = 1
    """A mixture is in every n-th block, the last of n (GShard, arXiv 2006.16668: 2); the others are dense."""
    shared: int = 0
    """Experts that see every token beside these (DeepSeekMoE, arXiv 2401.06066)."""
    balance: float = 0.01
    """Weight of the load-balance loss of each sequence; 0 is off."""
    bias_rate: float = 0.0
    """Step of the biases that balance loads without a loss (Wang et al. 2024: 0.001); 0 is off."""

    def __post_init__(self) -> None:
        for name in ("num", "shared", "balance", "bias_rate"):
            value = getattr(self, name)
            check(value >= 0, f"model.experts.{name}={value} must not be negative")
        check(
            not self.num or 1 <= self.top_k <= self.num,
            f"model.experts.top_k={self.top_k} must be from 1 to model.experts.num={self.num}",
        )
        check(self.every >= 1, f"model.experts.every={self.every} must be at least 1")
        check(
            bool(self.num) or self.every == 1,
            f"model.experts.every={self.every} needs experts: set model.experts.num",
        )
        check(
            bool(self.num) or not self.shared,
            f"model.experts.shared={self.shared} needs experts to stand beside: set model.experts.num",
        )
