"""A mixture of experts in the place of a feed-forward layer: each token goes to a few, none is lost."""

# B batch, T time, N tokens of a device, M = N * k rows, D embed, E experts, F mlp, k experts of a token,
# W devices that share the experts

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spmd.core import tree
from spmd.core.fields import check
from spmd.models.layers import contract
from spmd.parallel import scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """How feed-forward layers are made of experts (Shazeer et al. 2017, arXiv 1701.06538)."""

    num: int = 0
    """Experts of each layer; 0 is one dense layer."""
    top_k: int = 2
    """Experts that a token goes to."""
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
        check(
            bool(self.num) or not self.shared,
            f"model.experts.shared={self.shared} needs experts to stand beside: set model.experts.num",
        )


class Load(NamedTuple):
    """What routing tells of each sequence. balance: its load-balance loss, 1 where loads are even; counts:
    how often each expert was chosen, by tokens that are no padding.
    """

    balance_B: jax.Array
    counts_BE: jax.Array


class Offset(nnx.Variable):
    """What is added to the scores of the experts where they are chosen; state, not trained."""


class MixtureOfExperts(nnx.Module):
    """Router and experts; up, gate, down: layers with kernels [E, D, F] and [E, F, D], gate None without."""

    def __init__(
        self, experts: Experts, layers: int, router: Any, up: Any, gate: Any, down: Any, shared: Any
    ):
        self.router, self.up, self.gate, self.down, self.shared = router, up, gate, down, shared
        zeros = lambda: Offset(jnp.zeros((layers, experts.num)), dims=("layers", "choice"))
        self.offset = zeros() if experts.bias_rate else None
        self.experts, self.layers = experts, layers
        self.use_running_average = False  # nnx's name: model.eval() sets it

    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, Load]:
        wide, time = tree.wide(x_BTD.dtype), "time" if x_BTD.shape[1] > 1 else None
        kernel_DE = scope.constrain(self.router.kernel[...], None, None)
        logits_BTE = contract("btd,de->bte", wide, x_BTD.astype(wide), kernel_DE)
        logits_BTE = scope.constrain(logits_BTE, "batch", time, None)
        scores_BTE = jax.nn.softmax(logits_BTE)
        offset = None if self.offset is None else self.offset[...]
        choice_BTk, share_BTk = route(scores_BTE, self.experts.top_k, offset)
        kernels = [self.up.kernel[...], self.down.kernel[...]]
        into = ("experts", "embed", "mlp")
        dims = [into, ("experts", "mlp", "embed")]
        if self.gate is not None:
            kernels, dims = [*kernels, self.gate.kernel[...]], [*dims, into]
        row = ("batch", time, "embed")
        chosen = ("batch", time, None)
        run = scope.blockwise(_block, (row, chosen, chosen, *dims), row)
        y_BTD = run(x_BTD, choice_BTk, share_BTk, *kernels)
        if self.shared is not None:
            y_BTD += self.shared(x_BTD)
        return y_BTD, _load(scores_BTE, choice_BTk, segments_BT)

    def tell(self, load_L: Load) -> None:
        """Of layers, stacked: the loss, how full each expert is (1: as the mean), and new offsets. What a
        stage of a pipeline tells of some layers is their part of the mean over all.
        """
        num, top_k = self.experts.num, self.experts.top_k
        counts_BE = load_L.counts_BE.sum(0) / self.layers
        tokens_B = counts_BE.sum(-1) / top_k
        share_B = jnp.full_like(tokens_B, load_L.balance_B.shape[0] / self.layers)
        scope.note("balance", load_L.balance_B.sum(0) / self.layers, share_B)
        for i in range(num):
            scope.note(f"load/{i}", counts_BE[:, i] * (num / top_k), tokens_B)
        self._learn(load_L.counts_BE)

    def _learn(self, counts_LBE: jax.Array) -> None:
        """Moves the offsets against the loads of the global batch."""
        if self.offset is None or self.use_running_average:
            return
        old = self.offset[...]
        weight_B = scope.current().weight
        if weight_B is not None:  # padded examples have no load
            counts_LBE *= (weight_B > 0).astype(counts_LBE.dtype).reshape(1, -1, 1)
        counts_LE = scope.batch_sum(counts_LBE.sum(1)).astype(old.dtype)
        under_LE = jnp.sign(counts_LE.mean(1, keepdims=True) - counts_LE)
        self.offset[...] = old + self.experts.bias_rate * under_LE


def route(
    scores_BTE: jax.Array, top_k: int, offset_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(experts of each token, their shares), each [B, T, k]; shares sum to 1, without the offset."""
    steered = scores_BTE
    if offset_E is not None:
        steered += jax.lax.stop_gradient(offset_E).astype(steered.dtype).reshape(1, 1, -1)
    dims = ("batch", "time" if scores_BTE.shape[1] > 1 else None, None)
    # On each device's tokens: the compiler would bring those of all together for a top_k.
    run = scope.blockwise(functools.partial(_best, top_k=top_k), (dims, dims), (dims, dims))
    return run(scores_BTE, steered)


def _best(scores_BTE: jax.Array, steered_BTE: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    choice_BTk = jax.lax.top_k(steered_BTE, top_k)[1]
    share_BTk = jnp.take_along_axis(scores_BTE, choice_BTk, axis=-1)
    return choice_BTk, share_BTk / share_BTk.sum(-1, keepdims=True)


def _load(scores_BTE: jax.Array, choice_BTk: jax.Array, segments_BT: jax.Array | None) -> Load:
    """Within each sequence, so that no cut of the batch changes the loss (DeepSeek-V3, arXiv 2412.19437)."""
    num, top_k = scores_BTE.shape[-1], choice_BTk.shape[-1]
    real_BT1 = jnp.ones((*choice_BTk.shape[:2], 1), scores_BTE.dtype)
    if segments_BT is not None:
        real_BT1 = (segments_BT[..., None] != 0).astype(scores_BTE.dtype)
    chosen_BTE = jax.nn.one_hot(choice_BTk, num, dtype=scores_BTE.dtype).sum(2)
    counts_BE = (chosen_BTE * real_BT1).sum(1)
    tokens_B1 = jnp.maximum(real_BT1.sum(1), 1)
    share_BE = (scores_BTE * real_BT1).sum(1) / tokens_B1
    return Load((counts_BE * share_BE / tokens_B1).sum(-1) * num / top_k, counts_BE)


# ---- on each device


def _block(x_BTD, choice_BTk, share_BTk, up, down, gate=None):
    """The tokens of a device through their experts, wherever these are."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    apply = functools.partial(feed_forward, up=up, down=down, gate=gate)
    if scope.cut("experts"):
        run = functools.partial(_exchanged, num_here=up.shape[0], apply=apply)
    else:
        run = functools.partial(_here, apply=apply)
    y_ND = run(flat(x_BTD), flat(choice_BTk), flat(share_BTk))
    if axes := tuple(scope.cut("mlp")):
        y_ND = jax.lax.psum(y_ND, axes)
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)


def feed_forward(
    rows_MD: jax.Array, expert_M: jax.Array, *, up: jax.Array, down: jax.Array, gate: Any
) -> jax.Array:
    """Each row through its expert [M, D], in any order; 0 for rows of an expert past the last."""
    num = up.shape[0]
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = _counts(expert_M, num)
    x_MD = rows_MD[order_M]
    y_MF = grouped(x_MD, up, sizes_E)
    if gate is None:
        y_MF = jax.nn.gelu(y_MF, approximate=True)
    else:
        y_MF = jax.nn.silu(grouped(x_MD, gate, sizes_E)) * y_MF
    y_MD = grouped(y_MF, down, sizes_E)
    return jnp.where((expert_M < num)[:, None], y_MD[jnp.argsort(order_M)], 0)


def _here(
    x_ND: jax.Array, choice_Nk: jax.Array, share_Nk: jax.Array, *, apply: Callable[..., jax.Array]
) -> jax.Array:
    (num, dim), top_k = x_ND.shape, choice_Nk.shape[1]
    y_MD = apply(jnp.repeat(x_ND, top_k, axis=0), choice_Nk.reshape(-1))
    y_NkD = y_MD.reshape(num, top_k, dim).astype(share_Nk.dtype)
    return (y_NkD * share_Nk[..., None]).sum(1)


def _exchanged(
    x_ND: jax.Array,
    choice_Nk: jax.Array,
    share_Nk: jax.Array,
    *,
    num_here: int,
    apply: Callable[..., jax.Array],
) -> jax.Array:
    """The same, the experts cut over W devices: rows go there by all-to-all and their results come back.

    A round has room for M / W rows to each device. One is enough where loads are even; there are as many as
    the fullest device needs, W at most, so none is lost and no buffer is longer than the device's own M rows.
    """
    axes, ways = tuple(scope.cut("experts")), scope.ways("experts")
    flat_M = choice_Nk.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    room = -(-flat_M.size // ways)
    counts_W = _counts(flat_M // num_here, ways)
    ends_W = jnp.cumsum(counts_W, dtype=jnp.int32)
    needed = scope.highest(jax.lax.pmax(-(-counts_W.max() // room), axes))
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    none = jnp.zeros(x_ND.shape, share_Nk.dtype)

    def carried(number: jax.Array) -> jax.Array:
        """What the rows of one round add."""
        slot_Wr = (ends_W - counts_W)[:, None] + number * room
        slot_Wr += jnp.arange(room, dtype=jnp.int32).reshape(1, -1)
        taken_Wr = slot_Wr < ends_W[:, None]
        row_Wr = order_M[jnp.minimum(slot_Wr, flat_M.size - 1)]
        token_Wr = row_Wr // choice_Nk.shape[1]
        expert_Wr = jnp.where(taken_Wr, flat_M[row_Wr] % num_here, num_here)
        rows_WrD, there_Wr = exchange(x_ND[token_Wr]), exchange(expert_Wr)
        y_MD = apply(rows_WrD.reshape(-1, x_ND.shape[1]), there_Wr.reshape(-1))
        y_WrD = exchange(y_MD.reshape(rows_WrD.shape)).astype(none.dtype)
        share_Wr = jnp.where(taken_Wr, share_Nk.reshape(-1)[row_Wr], 0)
        return none.at[token_Wr].add(y_WrD * share_Wr[..., None])

    # Computed anew in the backward pass: what W rounds would keep is W times the tokens.
    @jax.checkpoint
    def turn(y_ND: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return y_ND + jax.lax.cond(number < needed, carried, lambda _: none, number), None

    return jax.lax.scan(turn, none, jnp.arange(ways, dtype=jnp.int32))[0]


def _counts(index_M: jax.Array, num: int) -> jax.Array:
    """How often each of 0 .. num - 1 comes."""
    return jnp.zeros(num, jnp.int32).at[index_M].add(1, mode="drop")


def grouped(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Consecutive rows, sizes[e] of them times kernel e: [M, F], in the type of x; past their sum 0.

    The kernel's gradient is summed in its own type, as layers.contract does it.
    """
    if len(kernel_EDF) == 1:  # a plain product, which a TPU's compiler does not always make of it
        real_M1 = (jnp.arange(len(x_MD), dtype=sizes_E.dtype) < sizes_E[0])[:, None]
        return contract("md,df->mf", x_MD.dtype, jnp.where(real_M1, x_MD, 0), kernel_EDF[0])
    product: Any = _grouped(x_MD, kernel_EDF, sizes_E)
    return product


@jax.custom_vjp
def _grouped(x_MD, kernel_EDF, sizes_E):
    return jax.lax.ragged_dot(
        x_MD, kernel_EDF.astype(x_MD.dtype), sizes_E, preferred_element_type=x_MD.dtype
    )


def _grouped_forward(x_MD, kernel_EDF, sizes_E):
    return _grouped(x_MD, kernel_EDF, sizes_E), (x_MD, kernel_EDF, sizes_E)


def _grouped_backward(kept, gradient_MF):
    x_MD, kernel_EDF, sizes_E = kept
    gradient_MF = gradient_MF.astype(x_MD.dtype)
    for_x = _grouped(gradient_MF, kernel_EDF.swapaxes(1, 2), sizes_E)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    for_kernel = jax.lax.ragged_dot_general(
        x_MD, gradient_MF, sizes_E, numbers, preferred_element_type=kernel_EDF.dtype
    )
    return for_x, for_kernel, None


_grouped.defvjp(_grouped_forward, _grouped_backward)
