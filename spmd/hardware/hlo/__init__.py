"""Read a compiled program from its HLO text: collectives by mesh axis, bytes, FLOPs, cycles; loops expanded.

Two kinds of text can be read: the optimised module of a TPU program, and a module after spmd-partitioning. In
the latter, two rewrites that the compilers for TPUs and GPUs apply later are assumed: an all-reduce of which
each device keeps only its own slice is a reduce-scatter, and a sum of all-reduces is an all-reduce of the
sum.
"""

from spmd.hardware.hlo.kernels import Kernel, rank
from spmd.hardware.hlo.program import (
    KINDS,
    Collective,
    CompiledProgram,
    Key,
    Total,
    ledger,
    merge_alike,
    sum_totals,
)
from spmd.hardware.hlo.reader import read

__all__ = [
    "KINDS",
    "Collective",
    "CompiledProgram",
    "Kernel",
    "Key",
    "Total",
    "ledger",
    "merge_alike",
    "rank",
    "read",
    "sum_totals",
]
