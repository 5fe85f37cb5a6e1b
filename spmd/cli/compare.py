"""run.py compare: train strategies with the same budget and compare them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from spmd.cli.verify import simulate_devices
from spmd.experiment import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Strategies to compare, and the network."""

    strategies: str = ""
    """Strategies with their options: auto,allreduce:reduction=ring,local:period=50:mesh.replica=8"""
    network: str = "10gbe"
    """Network between the devices: nvlink, ici, infiniband, 10gbe, wan, home; or one per mesh axis:
    replica=wan,data=nvlink"""
    compute: float = 0.0
    """Seconds of a step's computation on a device; 0 measures it on this machine."""


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 if all strategies trained, 1 if one diverged, 128 + signal if stopped."""
    exp, options = registry.load(name, words, CompareOptions)
    from spmd.analysis import compare
    from spmd.runtime import EXIT_FAILED
    from spmd.train.checkpoint.failures import SaveFailed
    from spmd.train.trainer import Stopped

    entries = options.strategies.split(",")
    compare.parse_entries(exp, entries)  # reports mistakes before jax starts
    try:
        comparison = compare.run(
            simulate_devices(exp), entries, network=options.network, compute=options.compute
        )
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except SaveFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command resumes it", file=sys.stderr)
        return 130
    print(f"\n{comparison}")
    return 0 if comparison.complete else EXIT_FAILED
