"""Mixtures of experts in place of feed-forward layers: each token goes to a few experts, none is dropped."""

from spmd.models.moe.experts import Experts as Experts
from spmd.models.moe.mixture import ExpertLoad as ExpertLoad
from spmd.models.moe.mixture import ExpertMixture as ExpertMixture
