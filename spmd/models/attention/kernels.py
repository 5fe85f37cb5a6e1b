"""Features of attention that each kernel can compute, and the refusal of the others by name."""

from __future__ import annotations

from spmd.core.fields import check
from spmd.models.attention.mask import Kind

# Beside the scale, and segments that queries and keys share, which all take. "cross-attention": the number of
# keys is not that of queries.
KERNELS = {
    "model.attention=xla": {
        "a causal mask",
        "a full mask",
        "a window mask",
        "a window on both sides",
        "a prefix mask",
        "separate segments of keys",
        "cross-attention",
        "a soft cap",
        "a bias",
    },
    "model.attention=splash": {
        "a causal mask",
        "a full mask",
        "a window mask",
        "a window on both sides",
        "cross-attention",
        "a soft cap",
    },
    "model.attention=cudnn": {
        "a causal mask",
        "a full mask",
        "a window mask",
        "a window on both sides",
        "a prefix mask",
        "separate segments of keys",
        "cross-attention",
        "a bias",
    },
    "model.context=ring": {
        "a causal mask",
        "a window mask",
        "a full mask",
        "a soft cap",
    },
    "model.context=ring with a full mask": {
        "a full mask",
        "separate segments of keys",
        "cross-attention",
        "a soft cap",
    },
}


def check_kernel(kernel: str, needs: set[str]) -> None:
    """Refuse what a kernel cannot compute.

    Args:
        kernel: a key of KERNELS.
        needs: features of the attention that is asked for, of those in KERNELS.

    Raises:
        ValueError: the kernel lacks some; the message names them, and the kernels that have all.
    """
    missing = sorted(needs - KERNELS[kernel])
    field = kernel.partition("=")[0]
    able = [name for name in KERNELS if " " not in name and needs <= KERNELS[name]]
    able = [name for name in able if name.startswith(field)]
    if field == "model.context":
        able = ["model.context=ulysses"]  # each device runs model.attention on complete sequences
    check(
        not missing,
        f"{kernel} cannot compute {' and '.join(missing)}; {' and '.join(able)} can: use"
        f" --{able[0].replace('=', ' ')}",
    )


def check_ring(kind: Kind, *, windows: bool = False) -> None:
    """Refuse a mask of self-attention that model.context=ring cannot compute; windows: within it."""
    causal = {"a window mask"} | ({"a window on both sides"} if kind == "full" else set())
    check_kernel("model.context=ring", causal if windows else {f"a {kind} mask"})
