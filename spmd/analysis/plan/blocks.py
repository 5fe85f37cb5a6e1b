"""The blocks of a model as closed forms count them: sizes, FLOPs and keys, from what its config declares."""

# T time, D embed, H query heads, G key and value heads, K head_dim, F mlp, V vocab

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from spmd.core.fields import check
from spmd.models.blocks import BlockConfig, BlockStack


class Blocks(NamedTuple):
    """Blocks of a stack that are alike but for their windows.

    stack: its name. config: their sizes. numbers: of the blocks in their stack. length: tokens of an example.
    memory: tokens of an example that cross-attention sees; 0 without it.
    """

    stack: str
    config: BlockConfig
    numbers: tuple[int, ...]
    length: int
    memory: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.numbers)

    @property
    def mixture(self) -> bool:
        """Whether they have experts."""
        return self.config.experts.num > 0

    @property
    def attentions(self) -> int:
        """Layers of attention of a block: 2 with cross-attention."""
        return 1 + (self.memory > 0)

    @property
    def layers(self) -> int:
        """Layers of a block that add to the residual stream."""
        return 1 + self.attentions

    @property
    def norms(self) -> int:
        """Norms of a block over the residual stream: one for each layer, or two."""
        return self.layers * (2 if self.config.norm_at == "both" else 1)

    def widths(self) -> dict[str, float]:
        """Elements per token of the activations of a block, by the names of model.saved, and of its residual.

        Keys and values of a memory count for the tokens that see them.
        """
        config = self.config
        query, key = config.heads * config.width, config.num_kv_heads * config.width
        hidden = config.mlp_width
        if (
            self.mixture
        ):  # the experts that a token is routed to; the router's matmul is not counted
            hidden *= config.experts.top_k + config.experts.shared
        gate = {"gate": hidden} if config.gated else {}
        query, key = query * self.attentions, key * (1 + self.memory / self.length)
        activations = {"query": query, "key": key, "value": key, "attended": query, "up": hidden}
        return {"residual": config.embed, **activations, **gate}

    def matmul_flops(self) -> dict[str, float]:
        """Forward FLOPs per token of the matmuls of a block, by the name of their output.

        attended: scores and their weighted sum, with the masked half included (the convention of PaLM); of a
        window only the keys in reach.
        """
        width, embed = self.widths(), self.config.embed
        matmuls = {name: 2.0 * embed * width[name] for name in width if name != "residual"}
        seen = [self.config.keys_seen(block, self.length) for block in self.numbers]
        matmuls["attended"] = self.flops_per_key * (statistics.fmean(seen) + self.memory)
        matmuls["out"] = 2.0 * width["query"] * embed
        matmuls["down"] = 2.0 * width["up"] * embed
        return matmuls

    @property
    def flops_per_key(self) -> float:
        """Forward FLOPs of a query's attention to one key."""
        return 4.0 * self.config.heads * self.config.width

    def computed_keys(self) -> float:
        """Mean number of keys per query that a fused kernel computes."""
        config, length = self.config, self.length
        seen = [config.keys_seen(block, length) for block in self.numbers]
        if config.mask == "full":
            skips = config.attention == "splash"  # cuDNN skips beyond windows to the left only
            computed: list[float] = [*seen] if skips else [length] * len(seen)
        else:  # the first queries of a row have fewer
            computed = [keys * (1 - keys / (2 * length)) for keys in seen]
        return statistics.fmean(computed) + self.memory


class BlockModel(NamedTuple):
    """A model made of stacks of blocks.

    stacks: as its config declares them. blocks: their blocks. lengths: tokens of an example in each stack.
    rows: logits at each token of the last stack; 0 without a vocabulary. tied: whether the head is the table.
    rotary: whether positions are angles. dtype: compute type. remat: whether it has this field. saved: the
    activations that remat=named keeps.
    """

    stacks: tuple[BlockStack, ...]
    blocks: tuple[Blocks, ...]
    lengths: tuple[int, ...]
    rows: int
    tied: bool
    rotary: bool
    dtype: str
    remat: bool
    saved: tuple[str, ...]

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.blocks[-1].config.embed

    @property
    def experts(self) -> bool:
        """Whether some blocks have experts."""
        return any(blocks.mixture for blocks in self.blocks)

    @property
    def layers(self) -> int:
        """Blocks of all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def logits_flops(self) -> float:
        """Forward FLOPs of the logits of a token."""
        return 2.0 * self.embed * self.rows

    def flops(self, batch_size: int) -> int:
        """Model FLOPs of a step, as hardware.flops counts them (frozen weights as if they were trained), but
        with attention included where a fused kernel hides it from the jaxpr, and without what XLA's attention
        computes beyond a window.
        """
        of_blocks = sum(
            b.length * b.num_blocks * sum(b.matmul_flops().values()) for b in self.blocks
        )
        return int(3 * batch_size * (of_blocks + self.lengths[-1] * self.logits_flops))


def declared_stacks(model: Any) -> tuple[BlockStack, ...]:
    """The stacks of blocks that a model's config declares; none for a model without closed forms."""
    stacks = () if isinstance(model, type) else getattr(model, "stacks", ())
    return tuple(stacks) if all(isinstance(stack, BlockStack) for stack in stacks) else ()


def block_model(model: Any, inputs: Sequence[Any], rows: int) -> BlockModel | None:
    """The model in closed forms; None for one that declares no stacks of blocks.

    Args:
        model: its config.
        inputs: shapes of what it is called with.
        rows: logits at each token.

    Raises:
        ValueError: a stack reads an input that is no sequence, or the memory of no stack.
    """
    stacks = declared_stacks(model)
    if not stacks:
        return None
    lengths: dict[str, int] = {}
    blocks: list[Blocks] = []
    for stack in stacks:
        read = inputs[stack.reads] if stack.reads < len(inputs) else None
        shape: Any = getattr(read, "shape", ())
        check(
            bool(stack.length) or len(shape) > 1,
            f"stack {stack.name} reads input {stack.reads} of the model, which is no sequence"
            f" [B, T, ...] but {list(shape)}; give the stack a length",
        )
        check(
            not stack.memory or stack.memory in lengths,
            f"stack {stack.name} attends to {stack.memory!r}, and the stacks before it are"
            f" {', '.join(lengths) or 'none'}",
        )
        length = lengths[stack.name] = stack.length or shape[1]
        memory = lengths[stack.memory] if stack.memory else 0
        kinds = stack.block.by_kind(stack.layers)
        blocks += [Blocks(stack.name, *kind, length, memory) for kind in kinds if kind[1]]
    return BlockModel(
        stacks=stacks,
        blocks=tuple(blocks),
        lengths=tuple(lengths.values()),
        rows=rows,
        tied=getattr(model, "tied", False),
        rotary=getattr(model, "position", "") == "rope",
        dtype=getattr(model, "dtype", "") or "float32",
        remat=hasattr(model, "remat"),
        saved=getattr(model, "saved", ()),
    )
