"""The fixture `slurm`: a running two-node cluster, one for each test module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cluster.py, under any name of this folder
import cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Cluster]:
    """A running cluster; `slurm.env` is the environment of its commands."""
    if program := cluster.missing():
        pytest.skip(f"needs Slurm and munge: {program} is not installed (apt install slurm-wlm)")
    with cluster.start() as running:
        yield running
