"""Layers: parameters carry logical dims; randomness and statistics do not depend on the mesh."""

from spmd.models.layers.conv import Conv as Conv
from spmd.models.layers.conv_norm import ConvConfig as ConvConfig
from spmd.models.layers.conv_norm import ConvNorm as ConvNorm
from spmd.models.layers.dropout import Dropout as Dropout
from spmd.models.layers.embedding import Embedding as Embedding
from spmd.models.layers.initial import he_normal as he_normal
from spmd.models.layers.initial import lecun_normal as lecun_normal
from spmd.models.layers.initial import param as param
from spmd.models.layers.linear import Dense as Dense
from spmd.models.layers.linear import Linear as Linear
from spmd.models.layers.matmul import contract as contract
from spmd.models.layers.norm import BatchNorm as BatchNorm
from spmd.models.layers.norm import GroupNorm as GroupNorm
from spmd.models.layers.norm import Norm as Norm
from spmd.models.layers.pool import max_pool as max_pool
