"""GPT-2 124M on one NVIDIA GPU: this project's loop beside nanoGPT's model with torch.compile.

python benchmarks/gpu_gpt2.py [--rounds N] [--json FILE] [--quick]

1024 tokens, bfloat16, 16 sequences a step, random tokens; here with cuDNN attention and unrolled layers,
there with flash attention, fused AdamW and bfloat16 autocast. Both live on the GPU at once and take turns:
see _turns.py. --quick runs a tiny size on the CPU, with XLA's attention and without torch.compile.

Work of a token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B), N without the table of positions and
without padding, as nanoGPT counts; attention whole, although half of it is masked; nothing that is computed
twice. MFU is that over the vendor's dense bfloat16 peak (spmd/hardware/chips.py). Memory is the allocator's
peak.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, Run, Speeds, endless, train

QUICK = "--quick" in sys.argv
VOCAB, LENGTH, LAYERS, HEADS, EMBED = 50257, 1024, 12, 12, 768
if QUICK:
    VOCAB, LENGTH, LAYERS, HEADS, EMBED = 250, 64, 2, 2, 64
BATCH = 2 if QUICK else 16
ROWS = -(-VOCAB // 128) * 128  # of the embedding: padded
REPORT = 10  # steps between reports
SEQUENCES = 512


def work_of_token() -> float:
    """FLOPs; see above."""
    parameters = VOCAB * EMBED + LAYERS * (12 * EMBED**2 + 13 * EMBED) + 2 * EMBED
    return 6 * parameters + 12 * LAYERS * EMBED * LENGTH


def write_tokens(data_dir: str, scratch: Path) -> None:
    """train.bin, uint16, that all read."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, SEQUENCES * LENGTH + 1, dtype=np.uint16)
    tokens.tofile(scratch / "train.bin")


def ours(gate: Gate, scratch: Path, options: dict) -> None:
    """The experiment `gpt2_124m` through its public door."""
    import jax

    import spmd
    from spmd.data import Arrays

    size = {"vocab": VOCAB, "length": LENGTH, "layers": LAYERS, "heads": HEADS, "embed": EMBED}
    words = [word for k, v in size.items() for word in (f"--model.{k}", str(v))]
    words += ["--model.attention", "xla" if QUICK else "cudnn", "--model.no-scan"]
    experiment = spmd.load("gpt2_124m", [*words, *endless(options["run_dir"], REPORT)]).experiment

    def arrays() -> dict[str, np.ndarray]:
        text = np.fromfile(scratch / "train.bin", np.uint16).astype(np.int32)
        cut = lambda shift: text[shift : shift + SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH)
        return {"tokens": cut(0), "targets": cut(1)}

    row = ((LENGTH,), "int32")
    features = {"tokens": row, "targets": row}
    data = Arrays(batch_size=BATCH, features=features, train=arrays, eval=arrays)
    experiment = dataclasses.replace(experiment, data=data)

    def facts() -> dict[str, float]:
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"bytes": stats.get("peak_bytes_in_use", 0)}

    gate.facts = facts
    train(gate, experiment)


def pytorch(gate: Gate, scratch: Path, options: dict) -> None:
    """nanoGPT's train.py on one GPU, without its evaluation."""
    import torch
    from _nanogpt import GPT, get_batch, optimizer, rate_at
    from _nanogpt import train as nanogpt_train

    device = "cpu" if QUICK else "cuda"
    if not QUICK and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU; install its CUDA build, or leave it out with --only ours")
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    size = {"vocab": ROWS, "length": LENGTH, "layers": LAYERS, "heads": HEADS, "embed": EMBED}
    model: Any = GPT(**size, bias=True).to(device)
    adamw = optimizer(model, 6e-4, b2=0.95, fused=not QUICK)
    if not QUICK:
        model = torch.compile(model)
        gate.facts = lambda: {"bytes": torch.cuda.max_memory_allocated()}
    batch = lambda: get_batch(str(scratch / "train.bin"), BATCH, LENGTH, device)
    rate = lambda step: rate_at(step, 6e-4, 2000, ENDLESS)
    autocast = lambda: torch.autocast(device, dtype=torch.bfloat16)
    nanogpt_train(gate, model, adamw, batch, rate, REPORT, autocast)


def _contestant(title: str, run: Run) -> Contestant:
    return Contestant(title=title, run=run, per_step=BATCH * LENGTH, steps=50, report=REPORT)


def show(speeds: Speeds, facts: dict[str, dict[str, float]], kind: str) -> dict[str, Any]:
    """Prints TFLOP/s, MFU and memory; returns them."""
    from spmd.hardware import chips

    chip = chips.chip(kind)
    found: dict[str, Any] = {}
    print(f"\n{kind + ', medians':<52}{'TFLOP/s':>10}{'MFU':>10}{'GiB':>10}")
    for name, each in speeds.items():
        rate = statistics.median(each) * work_of_token()
        mfu = rate / chip.flops["bfloat16"] if chip else None
        size = facts[name].get("bytes", 0)
        found[name] = {"flops": rate, "mfu": mfu, "bytes": size}
        share = f"{mfu:.1%}" if mfu else "-"
        memory = f"{size / 2**30:.1f}" if size else "-"
        print(f"{CONTESTANTS[name].title:<52}{rate / 1e12:>10,.3g}{share:>10}{memory:>10}")
    print("6 N + 12 L H Q T FLOPs a token, attention whole; of the dense bfloat16 peak")
    return found


def device_kind() -> str:
    """The GPU's name; exits 2 without one. Asked in a process of its own, which then lets go of it."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    platform, _, kind = done.stdout.strip().partition(" ")
    if platform != "gpu":
        found = f"JAX found: {platform}" if platform else done.stderr.strip().splitlines()[-1]
        print(
            "error: this benchmark needs an NVIDIA GPU and requirements/cuda12.txt or cuda13.txt;"
            f" {found}. --quick runs a tiny size on the CPU",
            file=sys.stderr,
        )
        sys.exit(2)
    return kind


CONTESTANTS = {
    "ours": _contestant("spmd", ours),
    "nanogpt": _contestant("nanoGPT" if QUICK else "nanoGPT, torch.compile", pytorch),
}


def main() -> None:
    """Prints the tables."""
    match = Match(
        about=__doc__,
        unit="tokens/s",
        contestants=CONTESTANTS,
        ratios=(("ours", "nanogpt", None),),
        quick=tuple(CONTESTANTS),
        prepare=write_tokens,
        data_dir="not used: the tokens are random",
        env={"JAX_PLATFORMS": "cpu"} if QUICK else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    args = match.parse()
    if args.child:
        match.child(args)
        return
    kind = "CPU" if QUICK else device_kind()
    speeds, facts, compared = match.play(args)
    found = show(speeds, facts, kind)
    if args.json:
        numbers = {"device": kind, "tokens/s": speeds, "ratios": compared, "work": found}
        Path(args.json).write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
