"""Groups of parameters: the group that claims each parameter, and the transformation of all groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check, match_names

if TYPE_CHECKING:
    import optax

    from spmd.optim.base import Dims, Group, Optimizer

FIELD = "optimizer.groups"
TABLES = "tables/"  # begins the patterns of groups of sparse tables
REST = "rest"  # label of the parameters that no group claims


def claim(groups: Sequence[Group], names: Iterable[str]) -> dict[str, int]:
    """Position of the group that claims a parameter, by name; parameters of no group are absent.

    Args:
        groups: those of an optimizer.
        names: of all parameters.

    Raises:
        ValueError: a pattern matches nothing, or two groups claim one parameter.
    """
    names, claimed = list(names), dict[str, int]()
    for i, group in enumerate(groups):
        if group.match.startswith(TABLES):
            continue
        for name in sorted(match_names(names, [group.match], FIELD)):
            check(
                name not in claimed,
                f"{FIELD}: {groups[claimed.get(name, 0)].match!r} and {group.match!r} both claim {name};"
                " narrow one of the patterns",
            )
            claimed[name] = i
    return claimed


def frozen_names(groups: Sequence[Group], names: Collection[str]) -> tuple[str, ...]:
    """Names of the parameters that a group freezes.

    Args:
        groups: those of an optimizer.
        names: of all parameters.

    Raises:
        ValueError: as in `claim`.
    """
    if not any(group.freeze and not group.match.startswith(TABLES) for group in groups):
        return ()
    return tuple(name for name, i in claim(groups, names).items() if groups[i].freeze)


def trained(groups: Sequence[Group]) -> list[Group]:
    """The groups of parameters that are not frozen; the position here is the label of a group."""
    return [group for group in groups if not group.freeze and not group.match.startswith(TABLES)]


def row_rates(groups: Sequence[Group], names: Iterable[str]) -> dict[str, float]:
    """Factors of the learning rate of sparse tables, by table, from the groups whose pattern begins with
    `tables/`; a table of no group is absent.

    Args:
        groups: those of an optimizer.
        names: of all tables.

    Raises:
        ValueError: a pattern matches no table, two groups claim one, or a group has more than a rate.
    """
    chosen = [group for group in groups if group.match.startswith(TABLES)]
    rates, names = dict[str, float](), [TABLES + name for name in names]
    for group in chosen:
        check(
            group.decay is None and group.optimizer is None,
            f"{FIELD}: {group.match!r} is of sparse tables, which take a rate (or freeze); their optimizer"
            " is optimizer.rows",
        )
        for name in match_names(names, [group.match], FIELD):
            table = name.removeprefix(TABLES)
            check(
                table not in rates, f"{FIELD}: two groups claim {name}; narrow one of the patterns"
            )
            rates[table] = 0.0 if group.freeze else group.rate
    return rates


def decay_of(optimizer: Optimizer, group: Group | None) -> float:
    """Weight decay of a group; of None that of the parameters that no group claims."""
    if group is None:
        return optimizer.weight_decay
    chosen = group.optimizer or optimizer
    return chosen.weight_decay if group.decay is None else group.decay


def knobs(optimizer: Optimizer, batch_size: int) -> dict[str, float]:
    """The scalars of the groups that are arguments of the step, as `LABEL/NAME`: the factor of the learning
    rate where it is not 1, the weight decay, and what a group's own optimizer has.
    """
    values = dict[str, float]()
    for label, group in enumerate(trained(optimizer.groups)):
        own = group.optimizer.knobs(batch_size) if group.optimizer else {}
        own |= {"rate": group.rate} if group.rate != 1 else {}
        own |= {"decay": decay_of(optimizer, group)}
        values |= {f"{label}/{name}": value for name, value in own.items()}
    return values


def without_knobs(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with the same value for each knob of all runs that may share a step."""
    return tuple(
        dataclasses.replace(
            group,
            rate=2.0 if group.rate not in (0, 1) else group.rate,
            decay=1.0 if group.decay else group.decay,
            optimizer=group.optimizer and group.optimizer.without_knobs(),
        )
        if not group.match.startswith(TABLES)  # whose rates are constants of the step
        else group
        for group in groups
    )


def partition(
    optimizer: Optimizer, num_steps: int, decay_mask: Any, dims: Dims, batch_size: int
) -> optax.GradientTransformation:
    """Each group's transformation of its own parameters, and the optimizer's of the rest.

    Frozen parameters are none by now: they are part of the model state (weights.adapters).

    Args:
        optimizer: the one with the groups.
        num_steps, decay_mask, dims, batch_size: as `Optimizer.transformation` takes them.
    """
    import optax

    from spmd.core import tree
    from spmd.optim.knobs import value, within

    groups = trained(optimizer.groups)
    claimed = claim(groups, tree.named_leaves(decay_mask))
    labels = tree.map_named(lambda name, _: str(claimed.get(name, REST)), decay_mask)

    def build(label: str, group: Group | None) -> optax.GradientTransformation:
        chosen = group.optimizer if group and group.optimizer else optimizer
        prefix = f"{label}/" if group else ""
        with within(prefix if chosen is not optimizer else ""):
            schedule = chosen.rate(num_steps, batch_size)
        factor = group.rate if group else 1.0
        scaled = lambda count: value(f"{prefix}rate", factor) * schedule(count)
        rate = schedule if factor == 1 else scaled
        decay = decay_of(optimizer, group)
        # Structured as the updates of a group are: optax masks the parameters of other groups.
        matrices = tree.map_named(
            lambda _, matrix, other: matrix if other == label else optax.MaskedNode(),
            decay_mask,
            labels,
        )
        with within(prefix):
            return optax.chain(*chosen.rule(rate, decay, matrices, dims))

    transformations: dict[Hashable, optax.GradientTransformation] = {
        str(i): build(str(i), group) for i, group in enumerate(groups)
    }
    return optax.partition(transformations | {REST: build(REST, None)}, labels)
