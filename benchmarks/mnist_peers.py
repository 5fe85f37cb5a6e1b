"""MNIST training side by side: this project's loop, a hand-written JAX loop, PyTorch; images per second.

python benchmarks/mnist_peers.py [--data-dir DIR] [--rounds N] [--json FILE] [--quick]

DIR holds a prepared TFDS mnist; without it the data is synthetic, of MNIST's shape. All train the network of
the experiment `mnist` (784-256-10) on the CPU with a global batch of 128. Each contestant is a process that
trains without end and idles between its turns; a round lets them run one after another, and ratios are taken
within rounds, since machines drift. Start-up, compilation, evaluation and checkpoints are left out; reading,
shuffling, metrics and logging are in.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

FEATURES = {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}
EXAMPLES, BATCH, ENDLESS = 60_000, 128, 10**7
SCAN = 32  # steps per dispatch of the scanned contestants
REPORT = 50  # steps between reports, the default of --log.every
LEAD = REPORT  # untimed steps at the start of a turn: threads wake up, caches fill


# ---- contestants: name -> what its process runs


@dataclasses.dataclass(frozen=True)
class Contestant:
    """run: one of the functions below, handed `gate`, `data` and `options`. steps: timed in a turn."""

    title: str
    run: str
    options: dict[str, object]
    steps: int


def _ours(devices: int, steps: int, strategy: str = "auto") -> Contestant:
    where = f"{devices} simulated devices, {strategy}" if devices > 1 else "one device"
    words = ["--train.steps-per-dispatch", str(steps), "--strategy", strategy]
    words += ["--simulate", str(devices)] if devices > 1 else []
    return Contestant(
        f"spmd, {where}, {steps} per dispatch",
        "ours",
        {"words": words},
        600 if devices == 1 else 300,
    )


def _plain(steps: int) -> Contestant:
    return Contestant(f"JAX by hand, {steps} per dispatch", "plain_jax", {"scan": steps}, 600)


# Neighbours here are neighbours in time: what is compared stands close together.
CONTESTANTS = {
    "ours": _ours(1, 1),
    "plain": _plain(1),
    "plain_scan": _plain(SCAN),
    "ours_scan": _ours(1, SCAN),
    "ddp": Contestant("PyTorch DDP (Gloo), 2 workers", "pytorch", {"world": 2}, 150),
    "auto_scan": _ours(2, SCAN),
    "allreduce_scan": _ours(2, SCAN, "allreduce"),
    "auto": _ours(2, 1),
    "allreduce": _ours(2, 1, "allreduce"),
    "torch": Contestant("PyTorch, one process", "pytorch", {"world": 1}, 150),
}
QUICK = ("ours", "plain", "ddp", "allreduce_scan")  # each kind of process once
# (contestant, peer, figure to reach on two cores or None)
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


class Gate:
    """A contestant's side: called with the steps done so far, it times a turn, reports
    it, and idles until the parent lets it go on.
    """

    def __init__(self, steps: int):
        self._steps, self._timed_from = steps, LEAD
        self._began: tuple[int, float] | None = None
        self._replies = os.fdopen(os.dup(1), "w")  # whatever else is printed goes elsewhere

    def __call__(self, step: int) -> None:
        now = time.perf_counter()
        if self._began is None:
            if step >= self._timed_from:
                self._began = step, now
        elif step >= self._began[0] + self._steps:
            images = (step - self._began[0]) * BATCH
            print(json.dumps(images / (now - self._began[1])), file=self._replies, flush=True)
            if not sys.stdin.readline():
                sys.exit()
            self._began, self._timed_from = None, step + LEAD


def ours(gate: Gate, data: Path, options: dict) -> None:
    """The experiment `mnist` through its public door; the lines that the loop prints call the gate."""
    import spmd
    from spmd.data import Arrays

    class Lines(io.StringIO):
        def write(self, text: str) -> int:
            if found := re.match(r"step (\d+)/", text):
                gate(int(found[1]))
            return len(text)

    words = [*options["words"], "--train.steps", str(ENDLESS), "--run.dir", options["run_dir"]]
    words += ["--eval.every", str(ENDLESS), "--checkpoint.every", str(ENDLESS)]
    words += ["--data.dir", options["data_dir"]] if options["data_dir"] else []
    experiment = spmd.load("mnist", words).experiment
    if not options["data_dir"]:
        arrays = lambda: {name: np.load(data / f"{name}.npy") for name in FEATURES}
        in_memory = Arrays(batch_size=BATCH, features=FEATURES, train=arrays, eval=arrays)
        experiment = dataclasses.replace(experiment, data=in_memory)
    assert experiment.data.batch_size == BATCH and experiment.log.every == REPORT
    with contextlib.redirect_stdout(Lines()):
        experiment.train_run()


def plain_jax(gate: Gate, data: Path, options: dict) -> None:
    """What one would write by hand: a donating jitted step, metrics fetched once per report."""
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
    """One process, or the first of several workers, which starts the others."""
    import torch.multiprocessing as mp

    world = options["world"]
    for rank in range(1, world):
        context = mp.get_context("spawn")
        context.Process(target=_worker, args=(rank, world, data, None), daemon=True).start()
    _worker(0, world, data, gate)


def _worker(rank: int, world: int, data: Path, gate: Callable[[int], None] | None) -> None:
    """The article's program: DataLoader with DistributedSampler, DDP over Gloo, SGD with momentum."""
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


# ---- the parent: starts them, lets them run in turns, prints


class Child:
    """The process of a contestant, idle but for its turns."""

    def __init__(self, name: str, scratch: Path, args: argparse.Namespace):
        self.name, self._log = name, scratch / f"{name}.log"
        command = [sys.executable, __file__, "--child", name, "--scratch", str(scratch)]
        command += ["--data-dir", args.data_dir] + (["--quick"] if args.quick else [])
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )

    def wait(self) -> float:
        """Images/s of the turn under way (the first is only its warm-up)."""
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit(
                f"contestant {self.name} failed with status {self._process.wait()}:\n"
                + "\n".join(self._log.read_text().splitlines()[-15:])
            )
        return json.loads(line)

    def run(self) -> float:
        """Lets it take one turn; images/s."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.wait()

    def end(self) -> None:
        """Asks it to leave and sees it gone."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


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


def measure(names: list[str], scratch: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images/s of each round by contestant; every other round goes backwards, which cancels a drift."""
    children: list[Child] = []
    try:
        for name in names:
            children.append(Child(name, scratch, args))
        for child in children:
            child.wait()
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.rounds):
            for child in children[:: -1 if turn % 2 else 1]:
                speeds[child.name].append(child.run())
        return speeds
    finally:
        for child in children:
            child.end()


def ratios(speeds: dict[str, list[float]]) -> list[dict[str, object]]:
    """Ratios within rounds: median, least, largest, and the figure to reach."""
    found = []
    for name, peer, figure in RATIOS:
        if name in speeds and peer in speeds:
            each = [a / b for a, b in zip(speeds[name], speeds[peer], strict=True)]
            summary = {"median": statistics.median(each), "min": min(each), "max": max(each)}
            found.append({"contestant": name, "peer": peer, "figure": figure} | summary)
    return found


def show(speeds: dict[str, list[float]], compared: list) -> None:
    """The table."""
    title = lambda name: CONTESTANTS[name].title
    print(f"{'images/s':<52}{'median':>10}{'min':>10}{'max':>10}")
    for name, each in speeds.items():
        low, high = min(each), max(each)
        print(f"{title(name):<52}{statistics.median(each):>10,.0f}{low:>10,.0f}{high:>10,.0f}")
    print(f"\n{'ratio, within rounds':<86}{'median':>8}{'min':>7}{'max':>7}  figure")
    for r in compared:
        text = f"{title(r['contestant'])} / {title(r['peer'])}"
        figure = "" if r["figure"] is None else f"  >= {r['figure']}"
        missed = "" if r["figure"] is None or r["median"] >= r["figure"] else "  missed"
        print(f"{text:<86}{r['median']:>8.2f}{r['min']:>7.2f}{r['max']:>7.2f}{figure}{missed}")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="", help="a prepared TFDS mnist")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="", help="write the numbers there too")
    parser.add_argument(
        "--quick", action="store_true", help="one short round of a few: does it run?"
    )
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, help="only these contestants")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    if args.child:
        one = CONTESTANTS[args.child]
        places = {"run_dir": str(args.scratch / args.child), "data_dir": args.data_dir}
        gate = Gate(REPORT if args.quick else one.steps)
        globals()[one.run](gate, args.scratch, one.options | places)
        return
    if args.quick:
        args.rounds = 1
    names = list(args.only or (QUICK if args.quick else CONTESTANTS))
    if not importlib.util.find_spec("torch"):
        names = [name for name in names if CONTESTANTS[name].run != "pytorch"]
        print("without PyTorch; to measure it too: pip install -r requirements/peers.txt")
    with tempfile.TemporaryDirectory() as scratch:
        write_data(args.data_dir, Path(scratch))
        speeds = measure(names, Path(scratch), args)
    compared = ratios(speeds)
    show(speeds, compared)
    if args.json:
        Path(args.json).write_text(json.dumps({"images/s": speeds, "ratios": compared}, indent=1))


if __name__ == "__main__":
    main()
