"""nanoGPT's model and the pieces of its loop, written anew after github.com/karpathy/nanoGPT (MIT)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    """With an optional bias."""

    def __init__(self, size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """Attention and feed-forward, norms first."""

    def __init__(self, heads: int, embed: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = LayerNorm(embed, bias), LayerNorm(embed, bias)
        self.attn = nn.Linear(embed, 3 * embed, bias=bias)
        self.attn_proj = nn.Linear(embed, embed, bias=bias)
        self.fc = nn.Linear(embed, 4 * embed, bias=bias)
        self.fc_proj = nn.Linear(4 * embed, embed, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, embed = x.shape
        parts = self.attn(self.ln_1(x)).split(embed, dim=2)
        q, k, v = (y.view(batch, time, self.heads, -1).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(batch, time, embed))
        return x + self.fc_proj(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """Tokens and targets [B, T] -> mean loss."""

    def __init__(self, *, vocab: int, length: int, layers: int, heads: int, embed: int, bias: bool):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, embed), nn.Embedding(length, embed)
        self.blocks = nn.ModuleList(Block(heads, embed, bias) for _ in range(layers))
        self.ln_f = LayerNorm(embed, bias)
        self.head = nn.Linear(embed, vocab, bias=False)
        self.wte.weight = self.head.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                gain = (2 * layers) ** -0.5 if name.endswith("proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 * gain)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def optimizer(model: nn.Module, rate: float, b2: float, fused: bool) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, b2), fused=fused)


def rate_at(step: int, peak: float, warmup: int, last: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = min((step - warmup) / (last - warmup), 1.0)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def get_batch(path: str, batch: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of a file of uint16; mapped anew each time, as nanoGPT does against a memory leak."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - length, (batch,))
    cut = lambda first: torch.from_numpy(data[first : first + length].astype(np.int64))
    x, y = (torch.stack([cut(i + shift) for i in starts.tolist()]) for shift in (0, 1))
    if device == "cpu":
        return x, y
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in (x, y))  # type: ignore


def train(
    gate: Callable[[int], None],
    model: Any,
    adamw: torch.optim.Optimizer,
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    rate: Callable[[int], float],
    report: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """nanoGPT's loop, without end: the next batch is read while the model runs, the loss every `report`."""
    x, y = batch()
    for step in itertools.count(1):
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        with autocast():
            loss = model(x, y)
        x, y = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if step % report == 0:
            loss.item()
            gate(step)
