"""compile: the bytes of the experiment's own step are those of the closed forms, on simulated devices and
for a TPU slice; mistakes and compilers that give up are told apart.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

import spmd
from spmd.analysis.plan import collective, comms, compile, facts, isolated, layout, planner
from spmd.analysis.plan.compile import Compiled
from spmd.core import tree
from spmd.hardware import hlo, targets
from spmd.parallel import sharding
from tests.cases import pairs_experiment
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")

B, T, D, L, V = 16, 128, 128, 2, 512
WORDS = [
    *("--model.vocab", str(V), "--model.layers", str(L), "--model.embed", str(D)),
    *("--model.mlp", "512", "--model.heads", "8", "--model.length", str(T), "--model.scan"),
    *("--data.sequence-length", str(T), "--data.batch-size", str(B), "--mesh.data"),
]
LIBTPU = importlib.util.find_spec("libtpu") is not None
Bytes = dict[tuple[tuple[str, ...], str], float]


def build(words: list[str]):
    return spmd.load("lm_stdlib", [*WORDS, *words]).experiment.unread(8).build(source=())


def parameters(program) -> dict[str, int]:
    """Bytes by name of those that mesh.fsdp cuts."""
    leaves = tree.named_leaves(program.abstract_state().params)
    return {name: tree.num_bytes(leaf) for name, leaf in leaves.items() if leaf.size >= 1024}


# What one device takes part in, by (axes, kind). P: bytes of the parameters; A: of an activation [B, T, D] of
# one replica; two all-reduces of A in each block, forward and backward, one for the table and one for the
# head (Shoeybi et al. 2019, arXiv 1909.08053).


def dp(p: dict[str, int]) -> Bytes:
    return {(("data",), "all-reduce"): sum(p.values())}


def zero1(p: dict[str, int]) -> Bytes:
    return {(("fsdp",), kind): sum(p.values()) for kind in ("reduce-scatter", "all-gather")}


def fsdp(p: dict[str, int]) -> Bytes:
    """Blocks are gathered for the forward pass and again for the backward pass, table and head once."""
    again = sum(n for name, n in p.items() if name.startswith("blocks/"))
    return {
        (("fsdp",), "reduce-scatter"): sum(p.values()),
        (("fsdp",), "all-gather"): sum(p.values()) + again,
    }


def hsdp(p: dict[str, int]) -> Bytes:
    """FSDP, and the shards summed over the replicas; but the table's gradient is summed over both at once."""
    whole, table = fsdp(p), p["embed/table"]
    scattered = sum(p.values()) - table
    return whole | {
        (("fsdp",), "reduce-scatter"): scattered,
        (("replica",), "all-reduce"): scattered / 4,
        (("replica", "fsdp"), "all-reduce"): table,
    }


A = 4 * B * T * D
SOFTMAX = (
    4 * 4 * B * T
)  # over the vocabulary cut by tensor: maxima, sums, and what the target's logit is


def tp(p: dict[str, int]) -> Bytes:
    return {(("tensor",), "all-reduce"): (4 * L + 2) * A + SOFTMAX}


def sp(p: dict[str, int]) -> Bytes:
    """Each all-reduce is a reduce-scatter and an all-gather (Korthikanti et al. 2022, arXiv 2205.05198), but
    for the table's.
    """
    return {
        (("tensor",), "reduce-scatter"): (4 * L + 1) * A,
        (("tensor",), "all-gather"): (4 * L + 2) * A,
        (("tensor",), "all-reduce"): A + SOFTMAX,
    }


def dp_tp(p: dict[str, int]) -> Bytes:
    return {
        (("data",), "all-reduce"): sum(p.values()) / 2,
        (("tensor",), "all-reduce"): ((4 * L + 2) * A + SOFTMAX) / 4,
    }


def local(p: dict[str, int]) -> Bytes:
    """The parameters in every 50th step."""
    return {(("replica",), "all-reduce"): sum(p.values()) / 50}


def local_fsdp(p: dict[str, int]) -> Bytes:
    """FSDP inside of each replica, of which every 50th step brings the shards together."""
    return fsdp(p) | {(("replica",), "all-reduce"): sum(p.values()) / 4 / 50}


LOCAL = ["1", "--strategy", "local", "--strategy.replicas"]


def ring(p: dict[str, int]) -> Bytes:
    """In each block keys and values go round: forward and backward n - 1 times, their gradients n times.
    Before that three arrays, and after it one, change their order (zigzag), and so do their gradients.
    """
    n, segments = 8, 4 * B * T // 8
    each = 2 * (3 * n - 2) + 2 * 4
    return {
        (("context",), "all-reduce"): sum(p.values()),
        (("context",), "collective-permute"): L * (each * A / n + 2 * (n - 1) * segments),
    }


def ulysses(p: dict[str, int]) -> Bytes:
    """In each block an all-to-all of four arrays, and of their gradients."""
    return {
        (("context",), "all-reduce"): sum(p.values()),
        (("context",), "all-to-all"): L * 2 * 4 * A / 8,
        (("context",), "all-gather"): 4 * B * T,
    }


def experts(p: dict[str, int]) -> Bytes:
    """Experts stay where they are; in each block the rows of top_k experts travel there and back, again where
    the backward pass computes them anew, and their gradients. The text has as many rounds as can be: 8.
    """
    rows, names = 4 * B * T // 8 * 2 * D, 4 * B * T // 8 * 2
    here = sum(n for name, n in p.items() if "/mlp/" not in name or "router" in name)
    return {
        (("expert",), "all-reduce"): here,
        (("expert",), "all-to-all"): L * 8 * (6 * rows + 2 * names),
    }


CASES = {
    "dp": (["8"], dp),
    "zero1": (["1", "--mesh.fsdp", "8", "--strategy.zero", "1"], zero1),
    "fsdp": (["1", "--mesh.fsdp", "8"], fsdp),
    "hsdp": (["1", "--mesh.replica", "2", "--mesh.fsdp", "4"], hsdp),
    "tp": (["1", "--mesh.tensor", "8"], tp),
    "sp": (["1", "--mesh.tensor", "8", "--strategy.sequence-parallel"], sp),
    "dp_tp": (["4", "--mesh.tensor", "2"], dp_tp),
    "ring": (["1", "--mesh.context", "8"], ring),
    "ulysses": (["1", "--mesh.context", "8", "--model.context", "ulysses"], ulysses),
    "experts": (["1", "--mesh.expert", "8", "--model.experts.num", "8"], experts),
    "explicit": (["8", "--strategy", "allreduce"], dp),
    "local": ([*LOCAL, "8", "--mesh.replica", "8"], local),
    "local_fsdp": ([*LOCAL, "2", "--mesh.replica", "2", "--mesh.fsdp", "4"], local_fsdp),
}
# Scalars of metrics and clipping, norms below MIN_FSDP_ELEMENTS.
SMALL = 0.02
SCALARS = 512  # bytes of the former, beside what is small itself


@pytest.mark.parametrize("case", slow_but(("zero1", "fsdp", "sp", "local"), CASES))
def test_bytes_are_those_of_the_closed_form(case):
    words, form = CASES[case]
    program = build(words)
    made = compile.compile_step(program, targets.parse("cpu:8"))
    assert made.how == "estimated" and made.program.endless == 0
    wanted = form(parameters(program))
    found = {key: total.bytes for key, total in hlo.ledger(made.program).items()}
    largest = max(wanted.values())
    for key in found | wanted:
        assert abs(found.get(key, 0) - wanted.get(key, 0)) <= SMALL * wanted.get(key, largest), key
    state = program.abstract_state()
    placed = program.strategy.state_shardings
    held = sum(
        tree.bytes_per_device(leaf, place)
        for leaf, place in zip(
            tree.named_leaves(state).values(), tree.named_leaves(placed).values(), strict=True
        )
    )
    ways = program.mesh.shape["tensor"] * program.mesh.shape["context"]  # they do not cut the batch
    batch = (4 * T + 1) * 4 * B * ways // 8
    knobs = 4 * len(program.strategy.step.knobs)
    # Without example_id, of which nothing is drawn.
    assert made.memory.arguments == held + batch + knobs
    assert made.memory.aliased == pytest.approx(held, rel=0.01)


@pytest.mark.gate
@pytest.mark.parametrize("case", slow_but(("zero1",), ("dp", "zero1", "fsdp", "explicit")))
def test_narrow_parameters_are_gathered_narrow_and_their_gradients_summed_wide(case):
    words, form = CASES[case]
    program = build([*words, "--param-dtype", "bfloat16"])
    made = compile.compile_step(program, targets.parse("cpu:8"))
    wanted = form(parameters(program))
    wanted = {key: n * (1 if key[1] == "all-gather" else 2) for key, n in wanted.items()}
    found = {key: total.bytes for key, total in hlo.ledger(made.program).items()}
    for key in found | wanted:
        largest = max(wanted.values())
        assert abs(found.get(key, 0) - wanted.get(key, 0)) <= SMALL * wanted.get(key, largest), key
    large = [c for c in made.program.collectives if c.bytes > SCALARS]
    assert {c.dtype for c in large if c.kind in ("all-reduce", "reduce-scatter")} == {"f32"}
    assert {c.dtype for c in large if c.kind == "all-gather"} <= {"bf16"}


def test_the_plan_counts_narrow_parameters():
    """Half the bytes of parameters; optimizer state and gradients of float32."""
    plan = lambda *words: planner.plan(
        spmd.load("lm_stdlib", [*WORDS, "1", "--mesh.fsdp", "8", *words]).experiment,
        "v5e:2x4",
        compiled=False,
    )
    wide, narrow = plan("--model.dtype", "bfloat16"), plan("--param-dtype", "bfloat16")
    assert narrow.memory.parameters == wide.memory.parameters // 2
    for part in ("optimizer", "gradients", "activations", "batch"):
        assert getattr(narrow.memory, part) == getattr(wide.memory, part), part
    assert narrow.facts.flops == wide.facts.flops
    gradients = lambda plan: sum(
        c.bytes * c.count for c in plan.collectives if c.payload == "gradients"
    )
    assert gradients(narrow) == gradients(wide)


# Held to the planner's own forms, which count a pipeline's ticks and a mixture's rounds as they run. A
# table's gradient is summed over time apart on CPUs, so no other axis that cuts rows stands beside context.
PIPE = ["--model.layers", "4", "--train.accumulate", "4", "--mesh.stage"]
GQA = ["1", "--model.kv-heads", "4", "--mesh.context"]
ULYSSES = [*GQA, "4", "--model.context", "ulysses"]
MIXED = ["--model.experts.num", "8", "--mesh.expert"]
PLANNED = {
    "stage": ["2", *PIPE, "4"],
    "gpipe": ["2", *PIPE, "2", "--train.pipeline", "gpipe"],
    "interleaved": ["2", *PIPE, "2", "--train.pipeline", "interleaved"],
    "stage_fsdp": ["2", *PIPE, "2", "--mesh.fsdp", "2", "--model.remat", "full"],
    "stage_zero1": ["1", *PIPE, "2", "--mesh.fsdp", "4", "--strategy.zero", "1"],
    "stage_tensor": ["1", *PIPE, "2", "--mesh.tensor", "2", "--model.remat", "named"],
    "stage_chunks": ["1", *PIPE, "4", "--mesh.fsdp", "2", "--task.chunks", "4"],
    "stage_ring": [*GQA, "2", *PIPE, "2"],
    "stage_experts": ["1", *MIXED, "2", *PIPE, "2"],
    "ring": [*GQA, "4", "--model.dtype", "bfloat16"],
    "ring_anew": [*GQA, "2", "--model.remat", "full", "--mesh.tensor", "2"],
    "ulysses": ULYSSES,
    "ulysses_anew": [*ULYSSES, "--model.remat", "named"],
    "experts": ["2", *MIXED, "4"],
    "experts_fsdp": ["1", *MIXED, "2", "--mesh.fsdp", "2"],
    "experts_tensor": ["1", *MIXED, "4", "--mesh.tensor", "2"],
    "experts_anew": ["4", *MIXED, "2", "--model.remat", "full"],
}


# Two stacks of unlike lengths, and cross-attention. (Of a pipeline's branches for several stacks, the text of
# a program has the largest only: there, no other axis has collectives in them.)
PAIRS = {
    "pairs_tensor": ({"tensor": 4}, 1, {}),
    "pairs_ring": ({"context": 4}, 1, {}),
    "pairs_ulysses": ({"context": 4}, 1, {"context": "ulysses", "remat": "full"}),
    "pairs_stage": ({"data": 2, "stage": 2}, 4, {}),
}


@pytest.mark.gate
@pytest.mark.parametrize(
    "case", slow_but(("stage", "ring", "experts", "pairs_ring"), [*PLANNED, *PAIRS])
)
def test_what_is_planned_is_what_the_program_sends(case):
    if case in PAIRS:
        sizes, accumulate, changes = PAIRS[case]
        exp = pairs_experiment(sizes, accumulate, **changes)
    else:
        exp = spmd.load("lm_stdlib", [*WORDS, *PLANNED[case]]).experiment
    num = math.prod(exp.mesh.sizes().values())
    made = compile.compile_step(exp.unread(num).build(source=()), targets.parse(f"cpu:{num}"))
    cut = layout.from_experiment(exp, num)
    found = collective.ledger(comms.from_program(made.program, cut))
    wanted = collective.ledger(comms.step_collectives(facts.from_experiment(exp), cut))
    largest = max(total.bytes for total in wanted.values())
    for key in found | wanted:
        has, wants = (each[key].bytes if key in each else 0 for each in (found, wanted))
        assert abs(has - wants) <= SMALL * (wants or largest) + SCALARS, key


# Two replicas, whose devices share a model: what crosses `replica` is each device's own part of it.
SHARED = {
    "local": [*LOCAL, "2", "--mesh.stage", "2", "--mesh.context", "2", "--train.accumulate", "2"],
    "local_experts": [*LOCAL, "4", *MIXED, "2", "--mesh.tensor", "2"],
    "psum": ["1", "--strategy", "allreduce", *PIPE, "2", "--mesh.tensor", "2"],
    "ring": ["1", "--strategy", "allreduce", "--strategy.reduction", "ring", *MIXED, "4"],
    "server": ["1", "--strategy", "server", "--mesh.context", "2", "--mesh.tensor", "2"],
    "psum_fsdp": ["1", "--strategy", "allreduce", "--mesh.fsdp", "4"],
    "ring_fsdp": [
        "1",
        "--strategy",
        "allreduce",
        "--strategy.reduction",
        "ring",
        "--mesh.fsdp",
        "4",
    ],
    "server_fsdp": ["1", "--strategy", "server", "--mesh.fsdp", "4"],
}


KIND, BLOCK, KEEP = "--strategy.compress.kind", 64, 0.02
COMPRESSED = {
    f"{kind}_{axis}": (kind, ["1", "--strategy", strategy, KIND, kind, f"--mesh.{axis}", "4"])
    for kind in ("int8", "top-k")
    for strategy, axis in (("allreduce", "fsdp"), ("allreduce", "tensor"), ("server", "context"))
}


@pytest.mark.parametrize("case", slow_but((), COMPRESSED, gate=("int8_fsdp",)))
def test_devices_that_share_a_replica_send_a_part_of_what_is_compressed(case):
    """Each a fourth, there and (int8 under allreduce) back."""
    kind, words = COMPRESSED[case]
    words = [*words, "--strategy.compress.block", str(BLOCK), "--strategy.compress.keep", str(KEEP)]
    program = build([*words, "--mesh.replica", "2"])
    found = compile.compile_step(program, targets.parse("cpu:8")).program.collectives
    assert {c.axes for c in found if "replica" in c.axes} == {("replica",)}
    of = {"int8": "s8", "top-k": "s32"}[kind]  # the places of the entries
    sent = sum(c.count * c.wire_bytes for c in found if c.dtype == of and "replica" in c.axes)
    elements = sum(x.size for x in jax.tree.leaves(program.abstract_state().params))
    both = {"int8": 1 if "allreduce" in words else 0.5, "top-k": 4 * KEEP}[kind]
    assert sent == pytest.approx(both * elements / 4, rel=0.02)


@pytest.mark.parametrize("case", slow_but((), SHARED, gate=("local",)))
def test_devices_that_share_a_replica_send_their_part(case):
    program = build([*SHARED[case], "--mesh.replica", "2"])
    found = hlo.ledger(compile.compile_step(program, targets.parse("cpu:8")).program)
    params = program.abstract_state().params
    placed = sharding.param_shardings(params, program.task.dims, program.mesh, fsdp=True)
    each = sum(map(tree.bytes_per_device, jax.tree.leaves(params), jax.tree.leaves(placed)))
    across = [(axes, total.wire_bytes) for (axes, _), total in found.items() if "replica" in axes]
    assert {axes for axes, sent in across if sent > SCALARS} == {("replica",)}
    sent = sum(sent for _, sent in across)
    wanted = each / 50 if "local" in case else each
    assert abs(sent - wanted) <= SMALL * wanted + SCALARS


AXES_OF_A_STAGE = [
    "fsdp 2 tensor 2", "fsdp 2 expert 2", "expert 2 tensor 2", "data 2 fsdp 2", "data 2 tensor 2",
    "data 2 expert 2", "fsdp 4", "tensor 4", "expert 4",
]  # fmt: skip


@pytest.mark.parametrize("axes", slow_but((), AXES_OF_A_STAGE, gate=("fsdp 2 tensor 2",)))
def test_only_stages_permute_in_a_pipeline(axes):
    """A permutation waits for all devices on CPUs, and in a branch that not all run it would for ever."""
    words = [f"--mesh.{w}" if w.isalpha() else w for w in axes.split()]
    program = build(["1", *PIPE, "2", *MIXED[:2], "--model.experts.shared", "1", *words])
    found = compile.compile_step(program, targets.parse("cpu:8")).program.collectives
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert permutes and {c.axes for c in permutes} == {("stage",)}, permutes


@pytest.mark.gate
def test_a_process_of_its_own_finds_the_same_and_remembers_it():
    exp = spmd.load("lm_stdlib", [*WORDS, *CASES["dp_tp"][0]]).experiment
    apart = isolated.compile_step(exp, "cpu:8")
    here = compile.compile_step(exp.unread(8).build(source=()), targets.parse("cpu:8"))
    assert hlo.ledger(here.program) == hlo.ledger(apart.program)
    assert (here.memory, here.mesh) == (apart.memory, apart.mesh)
    assert Compiled.from_json(json.loads(json.dumps(here.json()))) == here
    again = isolated.compile_step(exp, "cpu:8")
    assert again == apart  # to the second that it took
    sources = {c.source.split(":")[0] for c in apart.program.collectives if c.bytes > 10_000}
    assert "spmd/models/transformer.py" in sources
    assert all(source.startswith("spmd/models/") for source in sources), sources


def test_mistakes_reach_the_caller_as_one_message():
    exp = spmd.load("lm_stdlib", [*WORDS, "1", "--mesh.tensor", "3"]).experiment
    with pytest.raises(ValueError, match=r"mesh sizes .* multiply to 3, but there are 8 devices"):
        isolated.compile_step(exp, "cpu:8")
    with pytest.raises(ValueError, match="comes from no file"):
        isolated.compile_step(dataclasses.replace(exp, name="inline"), "cpu:8")


def test_a_missing_tpu_compiler_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    without = lambda name, *package: None if name == "libtpu" else found(name, *package)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    exp = spmd.load("lm_stdlib").experiment
    with pytest.raises(ValueError, match=r'not installed; .* pip install "jax\[tpu\]=='):
        isolated.compile_step(exp, "v5e:2x4")


@pytest.mark.gate
@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -r requirements/tpu.txt")
def test_the_tpu_compiler_sends_what_the_closed_form_says():
    words = ["1", "--mesh.fsdp", "4", "--mesh.tensor", "2", "--model.dtype", "bfloat16"]
    exp = spmd.load("lm_stdlib", [*WORDS, *words]).experiment
    made = isolated.compile_step(exp, "v5e:2x4")
    assert made.how == "compiled" and made.memory.peak >= made.memory.arguments
    estimated = isolated.compile_step(exp, "cpu:8")
    assert made.program.flops == pytest.approx(estimated.program.flops, rel=0.01)
    gathered = sum(c.count * c.bytes for c in made.program.collectives if c.kind == "all-gather")
    weights = fsdp(parameters(build(["8"])))[(("fsdp",), "all-gather")]
    # In bfloat16, and each device the half that tensor leaves it.
    assert gathered == pytest.approx(weights / 2 / 2, rel=0.2)
    assert any(c.overlapped for c in made.program.collectives)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -r requirements/tpu.txt")
def test_a_mesh_that_does_not_lie_on_the_slice_is_told_its_axes():
    exp = spmd.load("lm_stdlib", [*WORDS, "32", "--mesh.tensor", "2"]).experiment
    exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, batch_size=64))
    with pytest.raises(
        ValueError, match=r"slice of 4 x 4 x 4 chips: .* possible sizes: 1, 4, 16, 64"
    ):
        isolated.compile_step(exp, "v5p:4x4x4")


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -r requirements/tpu.txt")
def test_a_program_too_large_for_the_chip_is_told_apart():
    words = [*WORDS, "8", "--data.batch-size", "65536"]
    with pytest.raises(compile.TooLarge) as caught:
        isolated.compile_step(spmd.load("lm_stdlib", words).experiment, "v5e:2x4")
    assert caught.value.used > caught.value.limit > 10 * 2**30
