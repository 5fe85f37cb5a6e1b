"""plan: bytes per device equal those of real arrays, replication is explained, mistakes are one message."""

from __future__ import annotations

import json
import time

import jax
import pytest

import spmd
from spmd.analysis.plan import draw
from spmd.cli import main
from spmd.core import tree
from spmd.hardware import targets
from tests.rings import write

pytestmark = pytest.mark.usefixtures("devices")

LM = ["--model.layers", "2", "--model.embed", "64", "--model.mlp", "128"]
EMA = ["--optimizer.ema", "0.99"]
CUTS = {
    "digits": ("digits", ["--mesh.fsdp", "4", *EMA]),
    "digits_whole": ("digits", ["--strategy", "allreduce"]),
    "digits_muon": ("digits", ["--optimizer", "muon", "--mesh.fsdp", "8", "--mesh.data", "1"]),
    "lm": ("lm_stdlib", [*LM, "--mesh.fsdp", "2", "--mesh.tensor", "2", *EMA]),
    "lm_zero1": (
        "lm_stdlib",
        [*LM, "--mesh.fsdp", "8", "--mesh.data", "1", "--strategy.zero", "1"],
    ),
    "lm_float64": ("lm_stdlib", [*LM, "--mesh.tensor", "4", "--param-dtype", "float64"]),
}


@pytest.mark.parametrize("case", CUTS)
def test_bytes_are_those_of_the_arrays_on_the_devices(case):
    name, words = CUTS[case]
    words = [*words, "--train.steps", "1000"]
    with jax.enable_x64("float64" in words):
        report = spmd.load(name, words).plan()
        state = spmd.load(name, ["--simulate", "8", *words]).experiment.build(source=()).init()
    real = tree.named_leaves(state)
    assert [array.name for array in report.arrays] and {a.name for a in report.arrays} == set(real)
    for array in report.arrays:
        leaf = real[array.name]
        assert array.sharding == leaf.sharding and array.dtype == str(leaf.dtype)
        held = {s.data.nbytes for s in leaf.addressable_shards}
        assert held == {array.bytes_per_device}, array.name
        assert array.bytes == leaf.nbytes
        assert array.dims is None or len(array.dims) == len(array.shape), array.name
    on_first = sum(
        shard.data.nbytes
        for leaf in real.values()
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert report.bytes_per_device == on_first
    assert report.totals["parameters"][0] == tree.num_bytes(state.params)
    assert "moving average" in report.totals or "--optimizer.ema" not in words


def test_moments_and_averages_have_the_dims_of_their_parameter():
    report = spmd.load("lm_stdlib", [*LM, "--optimizer", "adafactor", *EMA]).plan()
    dims = {array.name: array.dims for array in report.arrays}
    up = "blocks/mlp/up/kernel"
    assert dims[f"params/{up}"] == dims[f"ema/{up}"] == ("layers", "embed", "mlp")
    moments = {n: d for n, d in dims.items() if n.startswith("opt_state") and n.endswith(up)}
    # 64 x 128 is not factored: rows and columns are placeholders, the whole second moment is kept.
    assert set(moments.values()) == {None, ("layers", "embed", "mlp")}


def test_a_factored_moment_lacks_the_reduced_dim():
    words = ["--model.embed", "128", "--model.mlp", "256", "--model.layers", "2"]
    report = spmd.load("lm_stdlib", [*words, "--optimizer", "adafactor"]).plan()
    found = {a.name.split("/", 2)[-1]: a for a in report.arrays if a.name.endswith("mlp/up/kernel")}
    shapes = {(a.shape, a.dims) for a in found.values()}
    assert ((2, 128), ("layers", "embed")) in shapes and ((2, 256), ("layers", "mlp")) in shapes


# Of the two hidden layers only the second's kernel is over 1 MiB, and its moment.
@pytest.mark.parametrize(
    "words,num,reason",
    [
        ("", 2, "no mesh axis shards it; mesh.fsdp=8 would"),
        ("--strategy allreduce", 2, "no mesh axis shards it; mesh.fsdp=8 and strategy auto would"),
        (
            "--mesh.fsdp 8 --mesh.data 1 --strategy.zero 1",
            1,
            "strategy auto zero=1 replicates it; the rules of auto shard it",
        ),
        (
            "--mesh.fsdp 8 --mesh.data 1 --model.hidden 1030 1034",
            2,
            "mesh.fsdp=8 divides none of its dims; mesh.fsdp=2 would",
        ),
        ("--mesh.fsdp 8 --mesh.data 1 --model.hidden 1027 1027", 0, ""),  # nothing divides it
        ("--mesh.fsdp 8 --mesh.data 1", 0, ""),
        ("--mesh.tensor 2", 0, ""),
    ],
)
def test_a_replicated_array_has_a_reason(words, num, reason):
    report = spmd.load("digits", ["--model.hidden", "1024", "1030", *words.split()]).plan()
    kernels = {"params/layers/1/kernel", "opt_state/0/trace/layers/1/kernel"}
    reasons = {array.name: array.replicated for array in report.arrays if array.replicated}
    assert set(reasons) <= kernels and list(reasons.values()) == [reason] * num
    shown = str(report)
    assert shown.count("replicated (1)") == num
    assert (f"per device: {reason}" in shown) == bool(num)


def test_a_model_without_dims_is_shown(tmp_path):
    write(tmp_path)
    words = ["--mesh.fsdp", "8", "--mesh.data", "1"]
    report = spmd.load(str(tmp_path / "rings.py"), words).plan()
    specs = {array.name: (array.dims, array.spec) for array in report.arrays}
    assert specs["params/outer/kernel"] == (None, "P('fsdp', None)")


def test_llama_in_seconds_without_memory_devices_or_data(run_cli, tmp_path):
    start = time.monotonic()
    done = run_cli(
        *("plan", "--experiment", "llama3_70b", "--target", "h100:64", "--json", "plan.json"),
        *("--show", "shardings"),
        *("--mesh.data", "1", "--mesh.fsdp", "16", "--mesh.tensor", "4", "--plot", "cut.html"),
        env={"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # alone, also on a node of a job
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    found = json.loads((tmp_path / "plan.json").read_text())
    parameters = found["groups"]["parameters"]
    assert parameters["bytes"] == 70_553_706_496 * 4
    # all but the norms, which fsdp alone cuts, over 64 devices
    norms = (2 * 80 + 1) * 8192 * 4
    assert parameters["bytes_per_device"] == (parameters["bytes"] - norms) // 64 + norms // 16
    assert found["memory_per_device"] == 80 * 2**30 and found["devices"] == 64
    (up,) = (a for a in found["arrays"] if a["name"] == "params/blocks/mlp/up/kernel")
    assert up["sharding"] == [None, "fsdp", "tensor"] and up["dims"] == ["layers", "embed", "mlp"]
    assert "(1)" not in done.stdout and "state: " in done.stdout
    page = (tmp_path / "cut.html").read_text()
    assert "mlp 28672 / tensor 4" in page and "http" not in page


def test_data_that_are_not_prepared_are_not_needed(run_main, tmp_path):
    plan = ("plan", "--experiment", "mnist", "--show", "shardings")
    done = run_main(*plan, "--target", "a100:4", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == "data=4" and found["bytes_per_device"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_drawing_shows_the_devices_of_each_block(capsys):
    words = ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--data.batch-size", "16"]
    draw.plot(spmd.load("digits", words).plan(), "terminal")
    shown = capsys.readouterr().out
    first = shown[shown.index("params/layers/1/kernel") :].splitlines()
    assert first[1] == "down mlp 256 / tensor 2, across embed 128 / fsdp 2"
    assert [line.split() for line in first[2:4]] == [["0", "4", "2", "6"], ["1", "5", "3", "7"]]


def test_targets():
    assert targets.parse("cpu:8")[:3] == ("cpu:8", 8, None)
    slice_ = targets.parse("v5p:4x4x8")
    assert slice_.num_devices == 128 and slice_.topology == (4, 4, 8)
    assert slice_.chip is not None and slice_.chip.memory == 95 * 2**30
    assert targets.parse("7x:2x2x1").num_devices == 8  # JAX sees two devices of each chip
    assert targets.parse("A100:16").chip == targets.parse("a100-80:16").chip
    assert targets.parse("v5e:16x16").num_devices == 256


MISTAKES = {
    "unknown": ("--target h10:64", "unknown target 'h10:64'. Did you mean 'h100'?"),
    "no_size": ("--target h100", "must be a number of devices, for example h100:8"),
    "zero": ("--target cpu:0", "must be a number of devices, for example cpu:8"),
    "no_topology": ("--target v5p:64", "must be a slice of 3 dims in chips, for example v5p:4x4x4"),
    "topology_dims": ("--target v5e:4x4x4", "a slice of 2 dims in chips, for example v5e:4x4"),
    "no_such_slice": ("--target v5p:2x2x3", "no such slice; v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4"),
    "falling": ("--target v5p:8x4x4", "larger ones of multiples of 4, in rising order"),
    "no_such_square": ("--target v5e:3x4", "no such slice; v5e has 1x1, 2x2, 2x4, 4x4, 4x8"),
    "topology_of_gpu": ("--target h100:8x8", "must be a number of devices"),
    "too_many": ("--target v5p:16x20x28", "has 8960 devices; at most 4096"),
    "both": ("--simulate 4 --target cpu:8", "both say how many devices there are"),
    "mesh": ("--mesh.data 3", "multiply to 3, but there are 8 devices"),
    "divides": (
        "--mesh.tensor 8 --model.hidden 36",
        "dim 'mlp' of size 36 does not divide by mesh.tensor=8; it divides by 1, 2, 3, 4, 6",
    ),
    "plot": ("--plot cut.png", "plot='cut.png' must be terminal, or a file that ends in .html"),
    "plot_folder": ("--plot gone/cut.html", "plot=gone/cut.html: there is no directory gone"),
    "json_folder": ("--json gone/plan.json", "json=gone/plan.json: there is no directory gone"),
    "both_print": ("--json - --plot terminal", "both print"),
    "show": ("--show chart", "not 'chart'"),
    "scaling": ("--show scaling", "--show scaling and --targets v5p:2x2x2 v5p:4x4x4 go together"),
    "one_target": ("--show scaling --targets h100:8", "needs at least two targets"),
    "plot_of": ("--show comms --plot cut.html", "plot draws the shards of arrays"),
    "html": ("--show memory --html plan.pdf", "must be a file that ends in .html"),
    "html_of": ("--html plan.html", "html shows a plan or a search, not --show shardings"),
    "no_budget": ("--show comms --check", "the experiment has no budget"),
    "check": ("--show comms --check --no-compile", "--check reads the compiled program"),
    "budget_kind": ("--budget.forbid all-reduc", "Did you mean 'all-reduce'?"),
    "budget_axis": ("--budget.max-bytes dat 5", "Did you mean 'data'?"),
    "budget_size": (
        "--budget.max-bytes data 5XB",
        "must be a number of bytes, for example '50 MB'",
    ),
    "best": ("--best 3", "best is the number of layouts of --search to compile"),
    "speed": ("--show summary --search", "no speed is known for cpu:8"),
    "batch": ("--show memory --target h100:48", "does not divide"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[case]
    show = [] if "--show" in words else ["--show", "shardings"]
    code = main(["plan", "--experiment", "digits", *show, *words.split()])
    shown = capsys.readouterr()
    text = " ".join((shown.err + shown.out).split())
    assert code == 2 and message in text and "Traceback" not in text, text
    assert list(tmp_path.iterdir()) == []


FIGHT = '''"""Two dims of one kernel want one axis."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from spmd.experiment.registry import find, from_file


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Param(jnp.ones((64, 64)), dims=("mlp", "heads"))
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(x.reshape(x.shape[0], -1) @ self.inner)


def config():
    return dataclasses.replace(from_file(find("digits")), model=Net)
'''


def test_rules_that_fight_over_one_axis(run_cli, tmp_path):
    (tmp_path / "fight.py").write_text(FIGHT)
    plan = ("plan", "--experiment", "fight.py", "--target", "h100:16", "--show", "shardings")
    done = run_cli(*plan, "--mesh.tensor", "4")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == "error: inner: dims 'mlp' and 'heads' both want mesh axis 'tensor'"
    assert run_cli(*plan, "--mesh.fsdp", "4").returncode == 0


def test_a_dim_that_no_axis_divides(run_main):
    gpt2 = ("plan", "--experiment", "gpt2_124m", "--target", "v5p:2x2x2", "--mesh.tensor", "4")
    gpt2 = (*gpt2, "--show", "shardings")
    done = run_main(*gpt2, "--model.vocab-multiple", "1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "dim 'vocab' of size 50257 does not divide by mesh.tensor=4; it divides by 1" in line
    assert run_main(*gpt2).returncode == 0  # padded to a multiple of 128
