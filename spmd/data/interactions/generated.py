"""A generated log of ratings: low-rank tastes and noise, in an order that can be learned."""

# U users, I items, F factors of taste

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from spmd.core.fields import check
from spmd.data.interactions.events import Events

FACTORS, KINDS = 6, 8
_BEGIN = 874_724_710  # seconds
_FIRST = ("Silent", "Golden", "Last", "Broken", "Distant", "Crimson", "Hidden", "Winter")
_SECOND = ("River", "Harbour", "Letter", "Garden", "Station", "Mirror", "Island", "Orchard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A log that is generated where no files are given; ids are 1, 2, ... as in MovieLens.

    A user of taste p watches films of taste q, more likely those that are popular and fit (p q), one kind
    after the other, and rates by p q, the biases of both, and noise.
    """

    users: int = 943
    """Users of the generated log."""
    items: int = 1682
    """Items of the generated log."""
    events: int = 100_000
    """Events of the generated log; a user has from 20 on, and at most half of the items."""
    seed: int = 0
    """Seed of the generated log; that of the run is another."""

    def __post_init__(self) -> None:
        for name, least in (("users", 2), ("items", 8), ("events", 1)):
            value = getattr(self, name)
            check(value >= least, f"data.generated.{name}={value} must be at least {least}")

    def draw(self) -> Events:
        """The events, in the order of time."""
        return _draw(self)

    def titles(self) -> dict[str, str]:
        """A made-up title for each item, with its kind."""
        name = lambda i: (
            f"{_FIRST[i % 8]} {_SECOND[i // 8 % 8]} {i // 64 + 1} (kind {i % KINDS + 1})"
        )
        return {str(i + 1): name(i) for i in range(self.items)}


@functools.lru_cache(maxsize=2)
def _draw(config: Generated) -> Events:
    rng = np.random.default_rng(config.seed)
    kind_I = np.arange(config.items) % KINDS
    centre_KF = rng.normal(size=(KINDS, FACTORS))
    item_IF = (centre_KF[kind_I] + rng.normal(size=(config.items, FACTORS))) / np.sqrt(2 * FACTORS)
    user_UF = rng.normal(size=(config.users, FACTORS))
    popularity_I = -0.9 * np.log(1 + rng.permutation(config.items))
    bias_U, bias_I = rng.normal(0, 0.4, config.users), rng.normal(0, 0.4, config.items)
    share_U = rng.gamma(1.2, size=config.users)
    most = max(1, config.items // 2)
    spare = max(0, config.events - 20 * config.users)
    num_U = np.minimum(20 + spare * share_U / share_U.sum(), most).astype(np.int64)
    parts = []
    for user, num in enumerate(num_U):
        fit_I = item_IF @ user_UF[user]
        chosen = np.argsort(-(popularity_I + fit_I + rng.gumbel(size=config.items)))[:num]
        turn = (kind_I[chosen] - rng.integers(KINDS)) % KINDS
        chosen = chosen[np.argsort(turn + 0.6 * rng.normal(size=num))]
        mean = 3.5 + bias_U[user] + bias_I[chosen] + 0.6 * fit_I[chosen]
        rating = np.clip(np.rint(mean + rng.normal(0, 0.6, num)), 1, 5)
        time = _BEGIN + int(rng.integers(10**7)) + 60 * np.arange(num)
        parts.append((np.full(num, user + 1), chosen + 1, rating, time))
    user, item, rating, time = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(time, kind="stable")
    events = Events(user.astype(np.int64), item, rating.astype(np.float32), time)
    return events.take(order)
