"""Groups of parameters: the group that claims each parameter, and the transformation of all groups."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check, match_names

if TYPE_CHECKING:
    import optax

    from spmd.optim.base import Dims, Group, Optimizer

FIELD = "optimizer.groups"
REST = "rest"  # label of the parameters that no group claims


def claim(groups: Sequence[Group], names: Iterable[str]) -> dict[str, int]:
    """Position of the group that claims a parameter, by name; parameters of no group are absent.

    Raises:
        ValueError: a pattern matches nothing, or two groups claim one parameter.
    """
    names, claimed = list(names), dict[str, int]()
    for i, group in enumerate(groups):
        for name in sorted(match_names(names, [group.match], FIELD)):
            check(
                name not in claimed,
                f"{FIELD}: {groups[claimed.get(name, 0)].match!r} and {group.match!r} both claim {name};"
                " narrow one of the patterns",
            )
            claimed[name] = i
    return claimed


def frozen_names(groups: Sequence[Group], names: Collection[str]) -> tuple[str, ...]:
    """Names of the parameters that a group freezes; ValueError as in `claim`. names: of all parameters."""
    if not any(group.freeze for group in groups):
        return ()
    return tuple(name for name, i in claim(groups, names).items() if groups[i].freeze)


def partition(
    optimizer: Optimizer, num_steps: int, decay_mask: Any, dims: Dims, batch_size: int
) -> optax.GradientTransformation:
    """Each group's transformation of its own parameters, and the optimizer's of the rest.

    optimizer: the one with the groups; the other arguments are those of `Optimizer.transformation`. Frozen
    parameters are none by now: they are part of the model state (weights.adapters).
    """
    import optax

    from spmd.core import tree

    groups = [group for group in optimizer.groups if not group.freeze]
    claimed = claim(groups, tree.named_leaves(decay_mask))
    labels = tree.map_named(lambda name, _: str(claimed.get(name, REST)), decay_mask)

    def build(label: str, group: Group | None) -> optax.GradientTransformation:
        chosen = group.optimizer if group and group.optimizer else optimizer
        schedule, factor = chosen.rate(num_steps, batch_size), group.rate if group else 1.0
        rate = schedule if factor == 1 else lambda count: factor * schedule(count)
        decay = group.decay if group and group.decay is not None else chosen.weight_decay
        # Structured as the updates of a group are: optax masks the parameters of other groups.
        matrices = tree.map_named(
            lambda _, matrix, other: matrix if other == label else optax.MaskedNode(),
            decay_mask,
            labels,
        )
        return optax.chain(*chosen.rule(rate, decay, matrices, dims))

    transformations: dict[Hashable, optax.GradientTransformation] = {
        str(i): build(str(i), group) for i, group in enumerate(groups)
    }
    return optax.partition(transformations | {REST: build(REST, None)}, labels)
