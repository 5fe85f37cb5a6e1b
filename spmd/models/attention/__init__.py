"""Attention under a mask, by any implementation, on sequences that may be sharded."""

from spmd.models.attention.cache import CACHE_DIMS as CACHE_DIMS
from spmd.models.attention.cache import Cache as Cache
from spmd.models.attention.dispatch import attend as attend
from spmd.models.attention.mask import Mask as Mask
from spmd.models.attention.positions import RopeScaling as RopeScaling
from spmd.models.attention.positions import TokenPositions as TokenPositions
