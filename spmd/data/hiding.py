"""Transforms of tokens: some are hidden and predicted (mask_tokens), or left out (drop_tokens)."""

# N examples of this process, T tokens

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from spmd.core.fields import check
from spmd.data.transform import Batch, Draws, Transform, mix_bits

if TYPE_CHECKING:
    from spmd.data import Features

TOKENS, SEGMENTS = "tokens", "segments"


@dataclasses.dataclass(frozen=True)
class MaskTokens(Transform):
    """Hides tokens that a masked language model predicts (Devlin et al. 2019, arXiv 1810.04805).

    As in its section 3.1: each token is chosen by itself; of those chosen 80 % become the mask token, 10 % a
    random token, 10 % stay. `targets` [N, T] are the tokens that were chosen, -1 elsewhere. Padding (segment
    0) and the tokens below `first` are never chosen. What is hidden is a function of the seed and of the
    example's place in the stream.
    """

    name: ClassVar[str] = "mask_tokens"

    mask: int
    """Index of the mask token (1 in a tokenizer bpe:N; 103 in BERT's)."""
    vocab: int
    """Number of tokens; random ones are drawn from `first` on."""
    rate: float = 0.15
    """Share of the tokens that are chosen."""
    first: int = 3
    """Tokens below are special and stay (3 in a tokenizer bpe:N; 999 in BERT's)."""

    def __post_init__(self) -> None:
        check(0 < self.rate < 1, f"mask_tokens: rate={self.rate} must be in (0, 1)")
        check(
            0 <= self.first < self.vocab and 0 <= self.mask < self.vocab,
            f"mask_tokens: mask={self.mask} and first={self.first} must be tokens, of vocab={self.vocab}",
        )

    def features(self, features: Features) -> Features:
        """With `targets`, shaped as the tokens."""
        return {**features, "targets": _tokens_of(self, features)}

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with tokens hidden, and targets."""
        tokens_NT = batch[TOKENS]
        chosen_NT = (_uniform(draws, tokens_NT) < self.rate) & (tokens_NT >= self.first)
        if SEGMENTS in batch:
            chosen_NT &= batch[SEGMENTS] > 0
        fate_NT, drawn_NT = _uniform(draws, tokens_NT), _uniform(draws, tokens_NT)
        random_NT = self.first + (drawn_NT * (self.vocab - self.first)).astype(tokens_NT.dtype)
        hidden_NT = np.where(fate_NT < 0.8, np.asarray(self.mask, tokens_NT.dtype), random_NT)
        changed_NT = chosen_NT & (fate_NT < 0.9)
        targets_NT = np.where(chosen_NT, tokens_NT, np.asarray(-1, tokens_NT.dtype))
        tokens_NT = np.where(changed_NT, hidden_NT, tokens_NT)
        return {**batch, TOKENS: tokens_NT, "targets": targets_NT}


@dataclasses.dataclass(frozen=True)
class DropTokens(Transform):
    """Leaves out random tokens (word dropout, Iyyer et al. 2015): their segment is 0, as that of padding."""

    name: ClassVar[str] = "drop_tokens"

    rate: float = 0.1
    """Share of the tokens that are left out."""

    def __post_init__(self) -> None:
        check(0 < self.rate < 1, f"drop_tokens: rate={self.rate} must be in (0, 1)")

    def features(self, features: Features) -> Features:
        """The same."""
        _tokens_of(self, features)
        check(SEGMENTS in features, "drop_tokens needs data with `segments`, 0 at padding")
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with segments of 0 at the tokens that are left out."""
        kept_NT = _uniform(draws, batch[TOKENS]) >= self.rate
        return {**batch, SEGMENTS: batch[SEGMENTS] * kept_NT.astype(batch[SEGMENTS].dtype)}


def _tokens_of(transform: Transform, features: Features) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of the tokens; ValueError without."""
    shape, dtype = features.get(TOKENS, ((), ""))
    check(
        len(shape) == 1 and np.issubdtype(np.dtype(dtype or "float32"), np.integer),
        f"{transform.name} needs a feature 'tokens' [T] of integers; the data have {', '.join(features)}",
    )
    return tuple(shape), dtype


def _uniform(draws: Draws, like_NT: np.ndarray) -> np.ndarray:
    """[N, T] float64 in [0, 1): of one draw for each row, its bits mixed with the token's place."""
    bits_N = (draws.uniform() * 2.0**53).astype(np.uint64)
    places_T = mix_bits(np.arange(1, like_NT.shape[1] + 1, dtype=np.uint64) << np.uint64(53))
    return (mix_bits(bits_N[:, None] ^ places_T[None]) >> np.uint64(11)) * 2.0**-53
