"""The base of models that are one stack of blocks: run, sharded, planned and pipelined by its parts."""

# B batch, T time, D embed

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import nnx
from jax import Array

from spmd.models.attention import Cache, TokenPositions
from spmd.models.attention.positions import token_positions
from spmd.models.blocks import Block, BlockConfig, BlockStack, build_blocks
from spmd.models.stack import ALL_LAYERS, Chunk, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackedConfig(BlockConfig):
    """The base of configs of models of one stack of blocks."""

    layers: int = 4
    """Number of blocks."""

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks; they see the first of the model's inputs."""
        return (self.stack_of(self.layers),)


class StackedBlocks(nnx.Module):
    """A model of one stack of blocks.

    A subclass has `enter`, the input of the first block [B, T, D] from the model's inputs, `leave`, what the
    head takes from the output of the last one (and the inputs), and `logits`, the outputs. A pipeline runs
    enter, through and leave on its stages.

    Args:
        config: a BlockConfig with one of `stacks`; its fields scan, remat and saved are read where it has
            them.
        rngs: source of the initial values.
    """

    stream = ("batch", "residual_time", "embed")  # logical dims of the activations between stages

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.config = config
        (stack,) = config.stacks
        self.blocks = build_blocks(stack.block, rngs, stack.layers)
        options = {name: getattr(config, name, None) for name in ("scan", "remat", "saved")}
        self.stack = Stack(**{name: x for name, x in options.items() if x is not None})

    def __call__(self, *inputs: Any) -> Any:
        """The outputs."""
        own: Any = self  # with the subclass's methods
        return own.logits(self.hidden(*inputs))

    def hidden(self, *inputs: Any) -> Array:
        """The argument of `logits`."""
        own: Any = self
        return own.leave(self.through(own.enter(*inputs), *inputs), *inputs)

    @property
    def stacks(self) -> tuple[BlockStack, ...]:
        """The blocks."""
        return self.config.stacks

    def positions(self, x_BTD: Array, *inputs: Any) -> TokenPositions:
        """Positions and segments of the tokens; by default a row is one segment, without rotary angles."""
        return token_positions(x_BTD[..., 0], rotary=None, dtype=x_BTD.dtype)

    def through(self, x_BTD: Array, *inputs: Any, chunk: Chunk = ALL_LAYERS) -> Array:
        """Output [B, T, D] of the blocks that a stage holds.

        Args:
            x_BTD: residual stream.
            inputs: the model's inputs.
            chunk: stack and first layer of these blocks.

        Returns:
            [B, T, D].
        """
        positions = self.positions(x_BTD, *inputs)
        return self.run_blocks(x_BTD, positions, first=chunk.first)[0]

    def run_blocks(
        self,
        x_BTD: Array,
        positions: TokenPositions,
        cache: Cache | None = None,
        *,
        first: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """(output [B, T, D] of the blocks at hand, their cache with these tokens).

        Args:
            x_BTD: input of the first of them.
            positions: of the tokens.
            cache: keys and values of earlier tokens, stacked [L, ...]; None without.
            first: number of the first block.
        """
        config = self.config.stacks[0].block
        apply = lambda block, x_BTD, cache, window: block(x_BTD, positions, cache, window=window)
        windows = [config.window_of(block) for block in range(config.period)]
        pattern = [functools.partial(apply, window=window) for window in windows]
        blocks = [self.blocks] if isinstance(self.blocks, Block) else list(self.blocks)
        x_BTD, outputs = self.stack(blocks, x_BTD, pattern, cache, kinds=config.kinds, first=first)
        for kind in blocks if "load" in outputs else ():
            kind.record_load(outputs["load"])
        return x_BTD, outputs.get("cache")
