"""MNIST training side by side: this project's loop, a hand-written JAX loop, PyTorch; images per second.

python benchmarks/mnist_peers.py [--data-dir DIR] [--rounds N] [--json FILE] [--quick]

DIR holds a prepared TFDS mnist; without it the data is synthetic, of MNIST's shape. All train the network of
the experiment `mnist` (784-256-10) on the CPU with a global batch of 128, in turns: see _turns.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, endless, train

FEATURES = {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}
EXAMPLES, BATCH = 60_000, 128
SCAN = 32  # steps per dispatch of the scanned contestants
REPORT = 50  # steps between reports, the default of --log.every


def ours(gate: Gate, data: Path, options: dict) -> None:
    """The experiment `mnist` through its public door."""
    import spmd
    from spmd.data import Arrays

    words = [*options["words"], *endless(options["run_dir"], REPORT)]
    words += ["--data.dir", options["data_dir"]] if options["data_dir"] else []
    experiment = spmd.load("mnist", words).experiment
    if not options["data_dir"]:
        arrays = lambda: {name: np.load(data / f"{name}.npy") for name in FEATURES}
        in_memory = Arrays(batch_size=BATCH, features=FEATURES, train=arrays, eval=arrays)
        experiment = dataclasses.replace(experiment, data=in_memory)
    assert experiment.data.batch_size == BATCH
    train(gate, experiment)


def plain_jax(gate: Gate, data: Path, options: dict) -> None:
    """A hand-written JAX loop: a donating jitted step, metrics fetched once per report."""
    import jax
    import jax.numpy as jnp
    import optax

    image, label = (np.load(data / f"{name}.npy") for name in FEATURES)
    scan = options["scan"]
    tx = optax.sgd(optax.cosine_decay_schedule(0.2, ENDLESS), momentum=0.9, nesterov=True)

    def loss_of(params, image, label):
        x = image.reshape(len(image), -1).astype(jnp.float32) / 255
        x = jax.nn.relu(x @ params["w1"] + params["b1"])
        logits = x @ params["w2"] + params["b2"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, (logits.argmax(-1) == label).mean()

    def step(state, batch):
        params, opt_state = state
        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

    many = lambda state, batches: jax.lax.scan(step, state, batches)
    dispatch = jax.jit(many if scan > 1 else step, donate_argnums=0)

    he = jax.nn.initializers.he_normal()
    key1, key2 = jax.random.split(jax.random.key(0))
    params = {
        "w1": he(key1, (784, 256)),
        "b1": jnp.zeros(256),
        "w2": he(key2, (256, 10)),
        "b2": jnp.zeros(10),
    }
    state = params, tx.init(params)
    rng, shape = np.random.default_rng(0), (scan, BATCH) if scan > 1 else (BATCH,)
    order = np.empty(0, np.int64)
    done, reported, pending = 0, 0, []
    while True:
        if len(order) < scan * BATCH:  # epochs follow one another without a gap
            order = np.concatenate([order, rng.permutation(len(label))])
        take, order = order[: scan * BATCH], order[scan * BATCH :]
        batch = image[take].reshape(*shape, 28, 28, 1), label[take].reshape(shape)
        state, metrics = dispatch(state, batch)
        pending.append(metrics)
        done += scan
        if done - reported >= REPORT:
            reported = done
            # The newest stays on the device, so that it has work while the host looks at the rest.
            for values in zip(*pending[:-1], strict=True):
                np.mean([np.asarray(x) for x in values])
            del pending[:-1]
            gate(done)


def pytorch(gate: Gate, data: Path, options: dict) -> None:
    """Train in one process, or as the first of several workers, which starts the others."""
    import torch.multiprocessing as mp

    world = options["world"]
    for rank in range(1, world):
        context = mp.get_context("spawn")
        context.Process(target=_worker, args=(rank, world, data, None), daemon=True).start()
    _worker(0, world, data, gate)


def _worker(rank: int, world: int, data: Path, gate: Callable[[int], None] | None) -> None:
    """Train as PyTorch's tutorials of data parallelism do: DataLoader, DistributedSampler, DDP over Gloo.

    Source: PyTorch's tutorial "Getting Started with Distributed Data Parallel"
    (docs.pytorch.org/tutorials/intermediate/ddp_tutorial.html), and Li et al. 2020, "PyTorch Distributed:
    Experiences on Accelerating Data Parallel Training" (arXiv 2006.15704).
    """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from torch.utils.data.distributed import DistributedSampler

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    image, label = (np.load(data / f"{name}.npy") for name in FEATURES)
    examples = TensorDataset(
        torch.from_numpy(image.reshape(-1, 784).astype(np.float32) / 255),
        torch.from_numpy(label.astype(np.int64)),
    )
    model: nn.Module = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    if world > 1:
        dist.init_process_group("gloo", f"file://{data}/rendezvous", rank=rank, world_size=world)
        model = nn.parallel.DistributedDataParallel(model)
    sampler = DistributedSampler(examples, world, rank, shuffle=True)
    loader = DataLoader(examples, BATCH // world, sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    criterion = nn.CrossEntropyLoss()
    done = 0
    for epoch in range(ENDLESS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            done += 1
            if gate and done % REPORT == 0:
                gate(done)


def write_data(data_dir: str, scratch: Path) -> None:
    """image.npy and label.npy, the training split that all contestants hold in memory."""
    if data_dir:
        from spmd.data import TFDS

        source = TFDS(name="mnist", dir=data_dir, features=FEATURES).open("train")
        arrays = source.take(np.arange(len(source)))
    else:
        rng = np.random.default_rng(0)
        arrays = {
            "image": rng.integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8),
            "label": rng.integers(0, 10, EXAMPLES, dtype=np.int32),
        }
    for name, values in arrays.items():
        np.save(scratch / f"{name}.npy", values)


def _ours(devices: int, steps: int, strategy: str = "auto") -> Contestant:
    where = f"{devices} simulated devices, {strategy}" if devices > 1 else "one device"
    words = ["--train.steps-per-dispatch", str(steps), "--strategy", strategy]
    words += ["--simulate", str(devices)] if devices > 1 else []
    return Contestant(
        title=f"spmd, {where}, {steps} per dispatch",
        run=ours,
        options={"words": words},
        per_step=BATCH,
        steps=600 if devices == 1 else 300,
    )


def _plain(scan: int) -> Contestant:
    title = f"JAX by hand, {scan} per dispatch"
    return Contestant(title=title, run=plain_jax, options={"scan": scan}, per_step=BATCH, steps=600)


def _torch(title: str, world: int) -> Contestant:
    return Contestant(title=title, run=pytorch, options={"world": world}, per_step=BATCH, steps=150)


# Neighbours here are neighbours in time: what is compared stands close together.
CONTESTANTS = {
    "ours": _ours(1, 1),
    "plain": _plain(1),
    "plain_scan": _plain(SCAN),
    "ours_scan": _ours(1, SCAN),
    "ddp": _torch("PyTorch DDP (Gloo), 2 workers", 2),
    "auto_scan": _ours(2, SCAN),
    "allreduce_scan": _ours(2, SCAN, "allreduce"),
    "auto": _ours(2, 1),
    "allreduce": _ours(2, 1, "allreduce"),
    "torch": _torch("PyTorch, one process", 1),
}

# Figures: to reach on two cores.
RATIOS = (
    ("ours", "plain", 0.95),
    ("ours_scan", "plain_scan", 1.0),
    ("ours_scan", "ddp", 3.0),
    ("auto_scan", "ddp", 1.5),
    ("allreduce_scan", "ddp", 1.5),
    ("auto", "ddp", None),
    ("allreduce", "ddp", None),
    ("ours", "torch", None),
)


if __name__ == "__main__":
    Match(
        about=__doc__,
        unit="images/s",
        contestants=CONTESTANTS,
        ratios=RATIOS,
        quick=("ours", "plain", "ddp", "allreduce_scan"),  # each kind of process once
        prepare=write_data,
        data_dir="a prepared TFDS mnist",
    ).main()
