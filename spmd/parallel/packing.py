"""Complete tables in bins of equal size, each of which a device can own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WASTE = 1.25  # rows of all bins, at most, for each row of the tables


class TableBins(NamedTuple):
    """Tables in bins. size: ids of a bin. bins: of each table. starts: first id of each within its bin.
    num_bins: a power of two.
    """

    num_bins: int
    size: int
    bins: tuple[int, ...]
    starts: tuple[int, ...]


def pack_tables(sizes: Sequence[int], most: int) -> TableBins:
    """Pack tables into as many bins as their sizes allow: the largest first, each into the emptiest bin
    (Graham 1969). It depends on the sizes alone, so that a checkpoint fits any mesh.

    Args:
        sizes: ids of each table.
        most: number of bins, at most.

    Returns:
        The packing with the most bins that takes at most WASTE times the rows of the tables; one bin always
        fits.
    """
    num = 1
    while 2 * num <= min(len(sizes), most):
        num *= 2
    packed = _pack_into(sizes, num)
    while packed.num_bins > 1 and packed.num_bins * packed.size > WASTE * sum(sizes):
        packed = _pack_into(sizes, packed.num_bins // 2)
    return packed


def _pack_into(sizes: Sequence[int], num: int) -> TableBins:
    filled, bins, starts = [0] * num, [0] * len(sizes), [0] * len(sizes)
    for table in sorted(range(len(sizes)), key=lambda table: (-sizes[table], table)):
        bin_ = filled.index(min(filled))
        bins[table], starts[table] = bin_, filled[bin_]
        filled[bin_] += sizes[table]
    return TableBins(num, max(filled), tuple(bins), tuple(starts))
