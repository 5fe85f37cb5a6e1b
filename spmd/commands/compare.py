"""run.py compare: strategies side by side, each trained with one budget."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from spmd import registry
from spmd.commands.verify import simulated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and on what network."""

    strategies: str = ""
    """Strategies with their options: auto,allreduce:reduction=ring,local:period=50:mesh.replica=8"""
    network: str = "10gbe"
    """What joins the devices: nvlink, ici, infiniband, 10gbe, wan, home; or one for each mesh axis:
    replica=wan,data=nvlink"""
    compute: float = 0.0
    """Seconds of computation of a step on one device; 0 measures it on this machine."""


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 when all were trained, 1 when one diverged, 128 + signal when stopped."""
    exp, options = registry.load(name, words, Options)
    from spmd import compare
    from spmd.runtime import EXIT_FAILED
    from spmd.train.checkpoint import SaveFailed
    from spmd.train.loop import Stopped

    entries = options.strategies.split(",")
    compare.parsed(exp, entries)  # a mistake is told before jax starts
    try:
        made = compare.run(
            simulated(exp), entries, network=options.network, compute=options.compute
        )
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except SaveFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"\n{made}")
    return 0 if made.complete else EXIT_FAILED
