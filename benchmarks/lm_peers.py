"""A small language model side by side: this project's loop, nanoGPT's in PyTorch; tokens per second.

python benchmarks/lm_peers.py [--data-dir DIR] [--rounds N] [--json FILE] [--quick]

DIR holds a prepared TFDS tiny_shakespeare; without it the text is synthetic, of its size and alphabet.
nanoGPT's small CPU setting (4 layers, 4 heads, 128 wide, 12 windows of 64 characters, --compile=False) in
float32, its model and loop in _nanogpt.py. Then what the loop costs: the experiment with 10.6M parameters
beside a hand-written step of the same module. On the CPU, in turns: see _turns.py.

What bounds the first ratio (1.12 to 1.16 on two cores; aim: 1.2): 35 of a step's 38 ms are products, which
XLA's Eigen kernels run at 72 to 127 GFLOP/s and PyTorch's at 122 to 164, on the same shapes. Query, key and
value in one product, two simulated devices with half the batch each, ReLU for GELU: slower, or within 1 ms.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, Run, endless, train

if TYPE_CHECKING:
    from spmd.data.text import Text
    from spmd.experiment.base import Experiment
    from spmd.optim import AdamW

CHARACTERS = 1_115_394  # of tiny_shakespeare
ALPHABET = "\n !$&',-.3:;?" + "".join(map(chr, [*range(65, 91), *range(97, 123)]))
LENGTH = 64
LARGE = ["--model.layers", "6", "--model.heads", "6", "--model.embed", "384"]  # 10.6M parameters
LARGE_BATCH = 4
REPORT = 10  # steps between reports; as nanoGPT's log_interval


def write_text(data_dir: str, scratch: Path) -> None:
    """text.txt, when it is synthetic; train.bin, the training tokens as nanoGPT reads them."""
    if not data_dir:
        letters = np.random.default_rng(0).integers(0, len(ALPHABET), CHARACTERS)
        (scratch / "text.txt").write_text("".join(np.array([*ALPHABET])[letters]))
    source: Any = _experiment(scratch, data_dir, []).data.open("train")
    np.asarray(source.tokens).astype(np.uint16).tofile(scratch / "train.bin")


def _experiment(scratch: Path, data_dir: str, words: list[str]) -> Experiment:
    """`lm_shakespeare`, on the text that all share."""
    import spmd

    words = [*words, "--data.cache-dir", str(scratch / "cache")]
    words += ["--data.dir", data_dir] if data_dir else []
    experiment = spmd.load("lm_shakespeare", words).experiment
    if data_dir:
        return experiment
    files = (str(scratch / "text.txt"),)
    data = dataclasses.replace(cast("Text", experiment.data), name="", eval_split="", files=files)
    return dataclasses.replace(experiment, data=data)


def ours(gate: Gate, scratch: Path, options: dict) -> None:
    """The experiment through its public door."""
    words = [*options["words"], *endless(options["run_dir"], REPORT)]
    train(gate, _experiment(scratch, options["data_dir"], words))


def plain_jax(gate: Gate, scratch: Path, options: dict) -> None:
    """A hand-written loop around the module: a donating jitted step, metrics fetched late."""
    import jax
    import optax
    from flax import nnx

    experiment = _experiment(scratch, options["data_dir"], options["words"])
    batch_size, config = experiment.data.batch_size, cast("AdamW", experiment.optimizer)
    source = experiment.data.open("train")
    graph, params = nnx.split(experiment.model.build(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, ENDLESS, config.learning_rate / 10
    )
    matrices = jax.tree_util.tree_map_with_path(
        lambda path, x: not any("norm" in str(key) for key in path), params
    )
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )

    def loss_of(params, batch):
        logits = nnx.merge(graph, params)(*batch[:3])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[3]).mean()
        return loss, (logits.argmax(-1) == batch[3]).mean()

    def step(state, batch):
        params, opt_state = state
        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

    dispatch = jax.jit(step, donate_argnums=0)
    state = params, tx.init(params)
    rng, pending = np.random.default_rng(0), []
    names = ("tokens", "positions", "segments", "targets")
    order = rng.permutation(len(source))
    for done in range(1, ENDLESS):
        take = order[np.arange(done * batch_size, (done + 1) * batch_size) % len(order)]
        found = source.take(take)
        state, metrics = dispatch(state, tuple(found[name] for name in names))
        pending.append(metrics)
        if done % REPORT == 0:
            # The newest stays on the device, so that it has work while the host looks at the rest.
            for values in zip(*pending[:-1], strict=True):
                np.mean([np.asarray(x) for x in values])
            del pending[:-1]
            gate(done)


def pytorch(gate: Gate, scratch: Path, options: dict) -> None:
    """nanoGPT's train.py on a CPU, without its evaluation."""
    import torch
    from _nanogpt import GPT, get_batch, optimizer, rate_at
    from _nanogpt import train as nanogpt_train

    torch.manual_seed(1337)
    size = {"vocab": len(ALPHABET), "length": LENGTH, "layers": 4, "heads": 4, "embed": 128}
    model = GPT(**size, bias=False)
    adamw = optimizer(model, 1e-3, b2=0.99, fused=False)
    batch = lambda: get_batch(str(scratch / "train.bin"), 12, LENGTH, "cpu")
    rate = lambda step: rate_at(step, 1e-3, 100, ENDLESS)
    nanogpt_train(gate, model, adamw, batch, rate, REPORT)


def _small(title: str, run: Run, options: dict[str, Any]) -> Contestant:
    per_step = 12 * LENGTH
    return Contestant(
        title=title, run=run, options=options, per_step=per_step, steps=200, report=REPORT
    )


def _ours(title: str, *words: str) -> Contestant:
    return _small(title, ours, {"words": words})


def _large(title: str, run: Run) -> Contestant:
    words = [*LARGE, "--data.batch-size", str(LARGE_BATCH)]
    return Contestant(
        title=title,
        run=run,
        options={"words": words},
        per_step=LARGE_BATCH * LENGTH,
        steps=20,
        report=REPORT,
    )


LEARNED = ("--model.position", "learned")
# Neighbours here are neighbours in time: what is compared stands close together.
CONTESTANTS = {
    "ours": _ours("spmd, 1 per dispatch", *LEARNED),
    "nanogpt": _small("nanoGPT, PyTorch", pytorch, {}),
    "ours_scan": _ours("spmd, 10 per dispatch", *LEARNED, "--train.steps-per-dispatch", "10"),
    "rotary": _ours("spmd, rotary positions, 1 per dispatch"),
    "large": _large("spmd, 10.6M parameters", ours),
    "large_plain": _large("the same module by hand, 10.6M parameters", plain_jax),
}
# Figures: to reach on two cores.
RATIOS = (
    ("ours", "nanogpt", 1.2),
    ("ours_scan", "nanogpt", None),
    ("rotary", "nanogpt", None),
    ("large", "large_plain", 0.98),
)

if __name__ == "__main__":
    Match(
        about=__doc__,
        unit="tokens/s",
        contestants=CONTESTANTS,
        ratios=RATIOS,
        quick=("ours", "nanogpt", "large", "large_plain"),
        prepare=write_text,
        data_dir="a prepared TFDS tiny_shakespeare",
    ).main()
