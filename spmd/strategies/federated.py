"""Federated averaging: each round a few of many clients train on their own examples, and are averaged.

FedAvg (McMahan et al. 2017, arXiv 1602.05629), FedProx (Li et al. 2020, arXiv 1812.06127), FedAdam (Reddi et
al. 2021, arXiv 2003.00295). A round is a period of strategy `local`, a sampled client one of its replicas: it
begins with the consensus and a new optimizer state, and weighs what it has trained on, which is its size
times the local epochs unless the period was too short. Who trains on what is the order of the data
(clients.py).
"""

from __future__ import annotations

import functools

import optax

from spmd.strategies import base, clients, local, merge, secure


def build(
    parts: base.Parts,
    num_slots: int,
    period: int,
    tx: optax.GradientTransformation,
    *,
    proximal: float,
    limit: float,
) -> base.Strategy:
    """num_slots: clients of a round. limit: of a parameter's change, for secure aggregation; 0 is without it.

    ValueError for data without a label, and as `local.build`.
    """
    clients.label_of(parts.batch)
    mean = merge.weighted_mean
    if limit:
        local.check_fits(parts, num_slots)
        rows = parts.batch["weight"].shape[0] // num_slots
        most = float(rows * period * len(parts.task.coefficients))
        mean = functools.partial(secure.mean, limit=limit, most=most)
    outer = local.Outer(period, tx, merge.stateless(mean), proximal=proximal, forget=True)
    return local.build(parts, num_slots, outer)
