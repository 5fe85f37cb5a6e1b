"""run.py recommend --experiment NAME --user ID: items for users, by the model of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spmd.core.fields import check
from spmd.experiment import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecommendOptions:
    """Options of `run.py recommend`."""

    user: tuple[str, ...] = ()
    """Raw ids of users, all in one batch."""
    k: int = 10
    """Items for each user."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Print the k items of highest score for each user, and how long the queries took."""
    exp, options = registry.load(name, words, RecommendOptions)
    check(
        bool(options.user),
        "give users by the ids of the log: run.py recommend --experiment NAME --user 42",
    )
    from spmd.runtime import agree

    snapshot = exp.restore(None if options.step < 0 else options.step, same=())
    found = snapshot.recommend(options.user, options.k)
    width = max(len(item) for row in found.items for item in row)
    for i, user in enumerate(found.users):
        agree.say(f"user {user}")
        ranked = zip(found.items[i], found.titles[i], found.scores[i], strict=True)
        for item, title, score in ranked:
            if item:
                agree.say(f"  {item:>{width}}  {score:8.4f}  {title}".rstrip())
    agree.say(
        f"{len(found.users)} users, {snapshot.retriever.num_items:,} items on"
        f" {snapshot.program.mesh.size} devices: {1000 * found.seconds:.1f} ms (index and compilation aside)"
    )
    return 0
