"""The encoder-decoder of `translate_help` in PyTorch: its model, its training step, its greedy decoding.

As spmd/models/encoder_decoder.py, layer by layer: norms first, LayerNorm and linear layers without biases,
GELU in its tanh form, sinusoids (sines, then cosines), one table for both sides and the head, packed pairs.
Attention is torch's scaled_dot_product_attention; keys and values are one product, also in cross-attention.
"""

# B batch, S time of the source, T time of the target, D width, H heads

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

EPSILON = 1e-5
Cache = dict[str, torch.Tensor]


def linear(inputs: int, outputs: int, *, gain: float = 1.0) -> nn.Linear:
    """Without bias, of standard deviation gain / sqrt(fan-in), truncated (LeCun)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    std = gain * inputs**-0.5 / 0.87962566103423978  # of a normal truncated at 2
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPSILON, bias=False)


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a memory."""

    def __init__(self, width: int, heads: int, gain: float):
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.out = linear(width, width, gain=gain)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, H, T, D / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of x."""
        key, value = self.key_value(x).chunk(2, -1)
        return self.split(key), self.split(value)

    def forward(self, x: torch.Tensor, keys: Any, mask: torch.Tensor | None) -> torch.Tensor:
        y = F.scaled_dot_product_attention(self.split(self.query(x)), *keys, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, cross-attention in a decoder, and a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, gain: float, cross: bool):
        super().__init__()
        self.norm, self.attention = norm(width), Attention(width, heads, gain)
        self.cross_norm = norm(width) if cross else None
        self.cross = Attention(width, heads, gain) if cross else None
        self.mlp_norm = norm(width)
        self.up, self.down = linear(width, hidden), linear(hidden, width, gain=gain)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        memory: Any = None,
        seen: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """x [B, T, D] after the block.

        memory: keys and values of the source, of which `seen` [B, 1, T, S] are. cache: those of earlier
        tokens, to which this one's are added.
        """
        y = self.norm(x)
        keys = self.attention.project(y)
        if cache is not None:
            if cache:
                pairs = zip((cache["key"], cache["value"]), keys, strict=True)
                keys = tuple(torch.cat(pair, 2) for pair in pairs)
            cache["key"], cache["value"] = keys
        x = x + self.attention(y, keys, mask)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory, seen)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Translator(nn.Module):
    """config: an EncoderDecoder, whose sizes are taken."""

    def __init__(self, config: Any):
        super().__init__()
        width, self.width = config.embed, config.embed
        self.embed = nn.Embedding(config.vocab, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        sizes = width, config.heads, config.mlp_width
        stack = lambda n, cross: nn.ModuleList(
            Block(*sizes, (2 * n) ** -0.5, cross) for _ in range(n)
        )
        self.encoder, self.encoder_norm = stack(config.encoder_layers, False), norm(width)
        self.decoder, self.decoder_norm = stack(config.layers, True), norm(width)

    def read(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings and sinusoids [B, T, D]."""
        rates = 10_000.0 ** -(torch.arange(self.width // 2) / (self.width // 2))
        angles = positions[..., None] * rates
        signal = torch.cat([angles.sin(), angles.cos()], -1)
        return self.embed(tokens) * self.width**0.5 + signal

    def encode(self, source: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> Any:
        """The encoded source [B, S, D]."""
        x = self.read(source, positions)
        mask = (segments[:, None, :, None] == segments[:, None, None]).contiguous()
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B, T, V] of packed pairs."""
        of = lambda name: (batch[f"{name}positions"], batch[f"{name}segments"])
        memory = self.encode(batch["source"], *of("source_"))
        segments, others = batch["segments"], batch["source_segments"]
        x = self.read(batch["tokens"], batch["positions"])
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = (segments[:, None, :, None] == segments[:, None, None]) & causal
        seen = segments[:, None, :, None] == others[:, None, None]
        seen = (
            seen | (segments == 0)[:, None, :, None]
        )  # padding sees all: a row without keys is NaN
        for block in self.decoder:
            assert isinstance(block, Block) and block.cross is not None
            x = block(x, mask, block.cross.project(memory), seen)
        return self.decoder_norm(x) @ self.embed.weight.T

    @torch.no_grad()
    def greedy(self, source: np.ndarray, limit: np.ndarray, end: int, vocab: int) -> np.ndarray:
        """The most likely token each time, [B, T], filled with `end`.

        Args:
            source: tokens [B, S], -1 for padding.
            limit: most tokens of each target.
            end: token that ends a target, and stands before its first.
            vocab: number of tokens.
        """
        tokens, seen = torch.from_numpy(source).long(), torch.from_numpy(source >= 0)
        memory = self.encode(tokens.clamp(min=0), torch.arange(tokens.shape[1])[None], seen)
        crosses = [block.cross.project(memory) for block in self.decoder]
        caches: list[Cache] = [{} for _ in self.decoder]
        token = torch.full((len(tokens), 1), end)
        going, most, found = torch.ones(len(tokens), dtype=torch.bool), torch.from_numpy(limit), []
        while going.any():
            x = self.read(token, torch.full_like(token, len(found)))
            for block, keys, cache in zip(self.decoder, crosses, caches, strict=True):
                x = block(x, None, keys, seen[:, None, None], cache)
            logits = (self.decoder_norm(x) @ self.embed.weight.T)[:, 0, :vocab]
            chosen = torch.where(going, logits.argmax(-1), end)
            found.append(chosen)
            going &= (chosen != end) & (len(found) < most)
            token = chosen[:, None]
        return torch.stack(found, 1).numpy()


def optimizer(model: nn.Module, config: Any, steps: int) -> tuple[Any, Any]:
    """(AdamW, its schedule) as an AdamW of spmd.optim sets them: warm-up and cosine, matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas, warmup = (config.b1, config.b2), config.warmup_steps
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
    cosine = lambda i: (1 + math.cos(math.pi * (i - warmup) / max(steps - warmup, 1))) / 2
    factor = lambda i: i / warmup if i < warmup else cosine(i)
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, factor)


def trainer(model: Translator, config: Any, smoothing: float, steps: int) -> Callable[..., Any]:
    """The step: a batch of the data -> its loss, as a tensor."""
    adamw, schedule = optimizer(model, config, steps)
    weights = list(model.parameters())

    def step(batch: dict[str, np.ndarray]) -> torch.Tensor:
        tensors = {name: torch.from_numpy(x).long() for name, x in batch.items()}
        logits = model(tensors)
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            tensors["targets"].flatten(),
            ignore_index=-1,
            label_smoothing=smoothing,
        )
        adamw.zero_grad()
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(weights, config.clip_norm)
        adamw.step()
        schedule.step()
        return loss.detach()

    return step


def translate(
    model: Translator, sources: Sequence[np.ndarray], *, end: int, vocab: int, extra: int
) -> list[np.ndarray]:
    """Greedy targets of sources, in their order, decoded in batches of similar length."""
    model.eval()
    order = np.argsort([len(s) for s in sources], kind="stable")
    results: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sources)
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        sizes = np.array([len(sources[i]) for i in chosen])
        padded = np.full((len(chosen), sizes.max()), -1, np.int32)
        for row, i in enumerate(chosen):
            padded[row, : sizes[row]] = sources[i]
        found = model.greedy(padded, sizes + extra, end, vocab)
        for i, tokens in zip(chosen, found, strict=True):
            ends = np.flatnonzero(tokens == end)
            results[i] = tokens[: ends[0]] if len(ends) else tokens
    return results
