"""Configuration of initial weights, frozen arrays and low-rank adapters."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from spmd.core.fields import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Source of the weights, and which of them are trained.

    Patterns are those of a shell, on names like `layers/1/kernel`; `*` matches `/` too.
    """

    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Directory to take the weights from: a run, a step of it (RUN/checkpoints/300), or Hugging Face
    safetensors; empty draws them at random."""
    skip: tuple[str, ...] = ()
    """Patterns of arrays that are drawn at random nevertheless, as 'head/*' for other classes."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained: no gradient, no optimizer state, no decay."""
    lora: int = 0
    """Rank of adapters, which are then the only trained parameters (LoRA, Hu et al. 2021, arXiv 2106.09685);
    0 is off."""
    lora_alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0 is alpha = rank."""
    lora_match: tuple[str, ...] = ()
    """Patterns of matrices with adapters; empty: all but embeddings, heads and first layers."""

    quantize: Literal["none", "int8"] = "none"
    """Type in which frozen hidden matrices under adapters are stored (QLoRA's storage): int8 has a scale for
    each output."""

    def __post_init__(self) -> None:
        check(
            self.quantize == "none" or bool(self.lora),
            f"init.quantize={self.quantize} stores the frozen matrices under adapters: give init.lora",
        )
        check(self.lora >= 0, f"init.lora={self.lora} must not be negative")
        check(self.lora_alpha >= 0, f"init.lora_alpha={self.lora_alpha} must not be negative")
        check(
            not (self.lora and self.freeze),
            f"init.lora={self.lora} freezes all parameters but its adapters, so init.freeze has no effect:"
            " give one of them",
        )
        check(
            bool(self.lora) or not (self.lora_match or self.lora_alpha),
            "init.lora_match and init.lora_alpha are options of adapters: give init.lora, their rank",
        )
        check(
            bool(self.from_) or not self.skip,
            "init.skip leaves out arrays of init.from, which is not given",
        )
