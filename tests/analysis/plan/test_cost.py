"""The planner's closed forms: memory against real cuts and traces, collectives, networks, published runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from jax._src import mesh_utils  # the assignment of axes that jax.make_mesh makes: an oracle

import spmd
from spmd.analysis.plan import (
    activations,
    collective,
    comms,
    cost,
    facts,
    memory,
    network,
    scaling,
    work,
)
from spmd.analysis.plan.layout import REMATS, Layout, check_mesh
from spmd.analysis.plan.shardings import GROUPS
from spmd.core import tree
from spmd.hardware import flops, targets
from spmd.models.transformer import Transformer
from spmd.parallel.mesh import AXES
from spmd.strategies.grads.pipeline import schedules
from tests.analysis.plan import published
from tests.cases import facts_of, mesh_words, pairs_experiment
from tests.command import REPOSITORY

pytestmark = pytest.mark.usefixtures("devices")

LM = ["--model.layers", "2", "--model.embed", "64", "--model.mlp", "128"]
EMA = ["--optimizer.ema", "0.99"]


# ---- memory

CUTS = {
    "lm": ("lm_stdlib", [*LM, *EMA], Layout({"data": 2, "fsdp": 2, "tensor": 2})),
    "lm_zero1": ("lm_stdlib", [*LM, *EMA], Layout({"fsdp": 8}, zero=1)),
    "lm_adafactor": (
        "lm_stdlib",
        ["--model.embed", "256", "--model.mlp", "512", "--optimizer", "adafactor"],
        Layout({"fsdp": 4, "tensor": 2}),
    ),
    "lm_muon": ("lm_stdlib", [*LM, "--optimizer", "muon"], Layout({"replica": 2, "fsdp": 4})),
    "lm_lora": ("lm_stdlib", ["--init.lora", "4"], Layout({"fsdp": 4, "tensor": 2})),
    "lm_frozen_zero1": (
        "lm_stdlib",
        ["--init.freeze", "blocks/attention/*"],
        Layout({"fsdp": 8}, zero=1),
    ),
    "digits": ("digits", EMA, Layout({"data": 2, "fsdp": 4})),
}


@pytest.mark.parametrize("case", CUTS)
def test_state_is_that_of_the_real_cut(case):
    name, words, layout = CUTS[case]
    held = memory.step_memory(facts_of(name, *words), layout)
    report = spmd.load(name, [*words, "--train.steps", "10", *mesh_words(layout)]).plan()
    real = {group: each for group, (_, each) in report.totals.items()}
    assert held.parameters == real[GROUPS["params"]]
    assert held.optimizer == real[GROUPS["opt_state"]]
    assert held.average == real.get(GROUPS["ema"], 0)
    assert held.state == report.bytes_per_device


BLOCKS = {
    "llama": {"kv_heads": 2},
    "gpt": {"activation": "gelu", "norm": "layer", "bias": True, "position": "learned"},
    "gemma": {
        "kv_heads": 2,
        "norm_at": "both",
        "norm_offset": 1.0,
        "activation": "geglu",
        "qk_norm": True,
        "score_cap": 5.0,
        "rope_theta_window": 1e4,
    },
    "olmo": {"kv_heads": 2, "norm_at": "output", "qk_norm": True, "qk_norm_over": "all"},
}


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_saved_activations_are_what_the_backward_pass_keeps(kind, remat):
    layers, rows, length = 3, 5, 16
    shape = {"vocab": 64, "length": length, "layers": layers, "heads": 4, "embed": 32, "mlp": 96}
    model = Transformer(**shape, **BLOCKS[kind], dtype="bfloat16", remat=remat)
    program = published.program(model, length, rows)
    kept = [
        leaf
        for leaf in published.residuals(program)
        if leaf.ndim > 2 and leaf.shape[:1] == (layers,) and rows in leaf.shape[1:]
    ]
    saved = memory.step_memory(
        facts.from_program(program, model), Layout({}, remat=remat)
    ).activations
    real = sum(tree.num_bytes(leaf) for leaf in kept)
    # Newer jax keeps one step less of GELU.
    step = layers * rows * length * 96 * 2 if (kind, remat) == ("gpt", "none") else 0
    assert saved in (real, real + step)


def test_activations_are_cut_as_the_batch_the_heads_and_the_time_are():
    fact = facts_of("lm_stdlib", "--model.remat", "full")
    one = memory.step_memory(fact, Layout({}, remat="full")).activations
    assert memory.step_memory(fact, Layout({"fsdp": 4}, remat="full")).activations == one / 4
    assert memory.step_memory(fact, Layout({"tensor": 4}, remat="full")).activations == one
    parallel = Layout({"tensor": 4}, sequence_parallel=True, remat="full")
    assert memory.step_memory(fact, parallel).activations == one / 4
    assert memory.step_memory(fact, Layout({}, accumulate=2, remat="full")).activations == one / 2
    named = memory.step_memory(fact, Layout({}, remat="named", saved=("up",))).activations
    cut = memory.step_memory(fact, Layout({"tensor": 2}, remat="named", saved=("up",))).activations
    assert (named - one) / 2 == cut - one > 0


# The peak by the compiler (libtpu 0.0.42.1, jax 0.10.2) of programs for v5p, in GB: llama3_8b with splash
# attention, so many rows. All of them: tests/analysis/plan/test_peak.py.
COMPILED = {
    "fsdp": (Layout({"fsdp": 8}, remat="full"), 16, 25.74),
    "dots": (Layout({"fsdp": 8}, remat="dots"), 16, 65.99),
    "fsdp_tensor": (Layout({"fsdp": 4, "tensor": 2}, remat="full"), 16, 29.92),
    "sequence_parallel": (
        Layout({"fsdp": 4, "tensor": 4}, sequence_parallel=True, remat="full"),
        *(16, 13.65),
    ),
    "named": (Layout({"data": 4, "fsdp": 4}, remat="named"), 16, 44.63),
    "stage": (Layout({"data": 2, "stage": 4}, accumulate=8, remat="full"), 16, 59.87),
    "stage_fsdp": (Layout({"fsdp": 4, "stage": 2}, accumulate=4, remat="full"), 32, 30.37),
    "stage_zero1": (
        Layout({"fsdp": 4, "stage": 2}, zero=1, accumulate=4, remat="full"),
        *(32, 54.76),
    ),
    "ulysses": (Layout({"fsdp": 2, "context": 4}, remat="full", context="ulysses"), 4, 73.08),
}


@pytest.mark.parametrize("case", COMPILED)
def test_peak_is_near_the_compiled_one(case):
    layout, rows, peak = COMPILED[case]
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", str(rows))
    assert memory.step_memory(fact, layout).peak == pytest.approx(peak * 1e9, rel=0.1)


# ---- FLOPs


@pytest.mark.parametrize("kind", BLOCKS)
def test_flops_of_the_transformer_are_those_of_its_jaxpr(kind):
    model = Transformer(vocab=64, length=16, layers=3, heads=4, embed=32, **BLOCKS[kind])
    program = published.program(model, 16, 5)
    counted = flops.count_step(program.task, program.abstract_batch())
    assert {"float32": published.flops_of(model, 5, 16)} == dict(counted)


def test_flops_of_unlike_blocks_and_of_several_stacks_are_those_of_their_jaxpr():
    experts = {"num": 4, "top_k": 1, "every": 2}
    words = [f"--model.experts.{name.replace('_', '-')}={n}" for name, n in experts.items()]
    mixed = spmd.load("lm_stdlib", [*words, "--train.steps", "10"]).experiment
    for exp in (pairs_experiment({}), mixed):
        program = exp.unread(1).build(source=())
        counted = flops.count_step(program.task, program.abstract_batch())
        fact = facts.from_experiment(exp)
        assert fact.model
        router = sum(leaf.size for leaf in fact.params if "router" in leaf.name)
        assert fact.flops == {"float32": counted["float32"] - 6 * router * fact.tokens}
    assert len(fact.model.blocks) == 2 and fact.model.experts


def test_a_mask_changes_the_flops_of_attention():
    """Keys per query: model FLOPs with the causal half, and what each kernel executes."""
    T, W, one = 8192, 1024, Layout({}, remat="full")

    def flops(*words: str, layout: Layout = one) -> tuple[float, float]:
        fact = facts_of("llama3_8b", *words)
        assert fact.model and fact.length == T
        (blocks,) = fact.model.blocks
        attended = blocks.matmul_flops()["attended"] / blocks.flops_per_key
        return attended, work.attention_flops(blocks, layout)[0] / blocks.flops_per_key

    full, window, splash = (
        ["--model.mask", "full"],
        ["--model.window", str(W)],
        ["--model.attention"],
    )
    splash += ["splash"]
    assert flops() == (T, T) and flops(*splash) == (T, T / 2)
    assert flops(*full) == flops(*full, *splash) == (T, T)
    assert flops(*window) == (W, T) and flops(*window, *splash) == (W, W - W * W / T / 2)
    assert flops(*full, *window, *splash) == (2 * W - 1, 2 * W - 1)
    assert flops(*full, *window, "--model.attention", "cudnn") == (2 * W - 1, T)
    ring = Layout({"context": 4}, remat="full")
    assert flops(*window, layout=ring) == (W, T * 9 / 16)  # a ring masks, and skips nothing
    assert flops(layout=ring) == (T, T * 9 / 16) and flops(*full, layout=ring) == (T, T)


def test_a_ring_has_no_windows_on_both_sides():
    ring = Layout({"context": 4})
    check_mesh(facts_of("llama3_8b", "--model.window", "1024"), ring)
    fact = facts_of("llama3_8b", "--model.window", "1024", "--model.mask", "full")
    with pytest.raises(ValueError, match=r"ring cannot compute a window on both sides; .*=ulysses"):
        check_mesh(fact, ring)


def test_remat_executes_more_and_a_fused_kernel_less():
    rows = {"data": 8}
    target = targets.parse("v5p:2x2x2")

    def executed(attention: str, remat: str) -> float:
        words = ["--model.attention", attention, "--data.batch-size", "8"]
        return cost.estimate(
            facts_of("llama3_8b", *words), target, Layout(rows, remat=remat)
        ).executed_flops

    fact = facts_of("llama3_8b", "--data.batch-size", "8")
    model = sum(fact.flops.values())
    assert fact.model
    head = fact.tokens * fact.model.logits_flops  # the chunks' second one
    assert executed("xla", "none") == pytest.approx(model + head)
    order = [executed("splash", remat) for remat in ("none", "dots", "named", "full")]
    assert order == sorted(order) and order[0] < model
    down = fact.model.blocks[0].matmul_flops()["down"] * fact.tokens * fact.model.layers
    assert executed("xla", "full") == pytest.approx(4 / 3 * model - down)


# ---- collectives

MATRICES = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # two layers: attention, gated feed-forward
TABLE = 256 * 64  # and the head as well
NORMS = 5 * 64
P = MATRICES + 2 * TABLE + NORMS
BF16 = [*LM, "--model.dtype", "bfloat16", "--model.kv-heads", "4"]


def summed(layout: Layout, *words: str) -> dict[tuple[str, str], float]:
    found = collective.ledger(comms.step_collectives(facts_of("lm_stdlib", *BF16, *words), layout))
    return {(" x ".join(axes), kind): total.bytes for (axes, kind), total in found.items()}


def test_data_parallel_sums_every_gradient_once():
    assert summed(Layout({"data": 8})) == {("data", "all-reduce"): 4 * P}
    assert summed(Layout({"replica": 2, "data": 4})) == {("replica x data", "all-reduce"): 4 * P}
    twice = summed(Layout({"data": 4}, accumulate=2))
    assert twice == {("data", "all-reduce"): 2 * 4 * P}
    chunks = summed(Layout({"data": 4}), "--task.chunks", "4")
    assert chunks == {("data", "all-reduce"): 4 * (P + 3 * TABLE)}


def test_fsdp_gathers_twice_in_the_compute_type_and_scatters_in_the_parameters_own():
    found = summed(Layout({"fsdp": 8}))
    # Norms of a block, 2 x 64, are too small to be cut; the table and the head are gathered once.
    assert found == {
        ("fsdp", "all-gather"): 2 * (2 * MATRICES + 2 * TABLE),
        ("fsdp", "reduce-scatter"): 4 * (MATRICES + TABLE),
        ("fsdp", "all-reduce"): 4 * (TABLE + NORMS),
    }
    twice = summed(Layout({"fsdp": 8}, accumulate=2))
    # The table is gathered once in a step, however many microbatches there are.
    assert twice[("fsdp", "all-gather")] == 2 * (2 * 2 * MATRICES + 3 * TABLE)
    assert twice[("fsdp", "reduce-scatter")] == 2 * found[("fsdp", "reduce-scatter")]


def test_zero_1_gathers_new_parameters_once():
    assert summed(Layout({"fsdp": 8}, zero=1, accumulate=2)) == {
        ("fsdp", "all-gather"): 4 * (P - NORMS),
        ("fsdp", "all-reduce"): 2 * 4 * P,
    }


def test_frozen_weights_are_gathered_and_have_no_gradient():
    attention, layout = 2 * 4 * 64 * 64, Layout({"fsdp": 8})
    found = summed(layout, "--init.freeze", "blocks/attention/*")
    whole = summed(layout)
    assert found[("fsdp", "all-gather")] == whole[("fsdp", "all-gather")]
    scattered = ("fsdp", "reduce-scatter")
    assert found[scattered] == whole[scattered] - 4 * attention


def test_hsdp_sums_shards_between_replicas():
    found = summed(Layout({"replica": 2, "fsdp": 4}))
    assert found[("replica", "all-reduce")] == 4 * (MATRICES + TABLE) / 4
    assert found[("replica x fsdp", "all-reduce")] == 4 * (TABLE + NORMS)


def test_tensor_parallel_sums_activations():
    layers, size = 2, 16 / 2 * 128 * 64 * 2  # bytes of [rows of a device, time, embed]
    numbers = 3 * 16 / 2 * 128 * 4
    at = {remat: summed(Layout({"data": 2, "tensor": 4}, remat=remat)) for remat in REMATS}
    sums = {remat: found[("tensor", "all-reduce")] for remat, found in at.items()}
    assert sums["none"] == sums["dots"] == size * (4 * layers + 2) + numbers
    assert sums["named"] == sums["full"] == size * (5 * layers + 2) + numbers
    # Weights that tensor cuts are summed as shards; norms are whole.
    assert at["none"][("data", "all-reduce")] == 4 * ((P - NORMS) / 4 + NORMS)


def test_sequence_parallelism_moves_no_more_than_the_sums_did():
    layers, size = 2, 16 / 2 * 128 * 64 * 2
    found = summed(Layout({"data": 2, "tensor": 4}, sequence_parallel=True, remat="none"))
    assert found[("tensor", "reduce-scatter")] == size * (4 * layers + 2)
    assert found[("tensor", "all-gather")] == size * (4 * layers + 2)


def test_traffic_of_zero_is_that_of_its_paper():
    """2 P for data parallelism, 3 P for ZeRO-3 (section 7 of arXiv 1910.02054), in elements of one type."""
    fact = published.known(
        Transformer(vocab=64, length=16, layers=24, heads=4, embed=64, mlp=256), 16, 64
    )

    def sent(layout: Layout) -> float:
        wire = sum(each.wire_bytes for each in comms.step_collectives(fact, layout))
        return wire / 4 / fact.num_params / ((64 - 1) / 64)

    assert sent(Layout({"data": 64})) == pytest.approx(2)
    assert sent(Layout({"fsdp": 64})) == pytest.approx(3, rel=0.02)


# ---- networks


@pytest.mark.parametrize("name", ["v5p:4x4x8", "v4:4x8x8", "v5e:8x16", "7x:2x2x4"])
def test_axes_lie_where_jax_lays_them(name):
    target = targets.parse(name)
    shape = network._shape(target)
    physical = np.arange(math.prod(shape)).reshape(shape)
    tried = 0
    for tensor in (1, 2, 4, 8, 16):
        for fsdp in (1, 2, 4, 8, 16, 32, 64):
            if target.num_devices % (tensor * fsdp):
                continue
            rest = target.num_devices // tensor // fsdp
            sizes = dict.fromkeys(AXES, 1) | {"data": rest, "fsdp": fsdp, "tensor": tensor}
            try:
                _, matrix = mesh_utils._create_device_mesh_for_nd_torus(
                    physical, tuple(sizes.values())
                )
            except NotImplementedError:
                with pytest.raises(ValueError, match="is not a product of the dims"):
                    network.assign(target, sizes)
                continue
            tried += 1
            for axis, dims in network.assign(target, sizes).items():
                column = matrix[:, AXES.index(axis)]
                assert [d for d in range(len(shape)) if column[d] > 1] == [
                    d for d in dims if shape[d] > 1
                ]
    assert tried > 2


def test_a_gather_on_a_torus_uses_both_directions_of_all_its_dims():
    cube = targets.parse("v5p:4x4x4")
    levels = network.levels(cube, {"fsdp": 16, "tensor": 4})
    dim = network.Dim(4, 2 * 90e9, 90e9)
    assert levels["fsdp"] == (network.Level("ICI", 16, 4 * 90e9, (dim, dim)),)
    assert levels["tensor"] == (network.Level("ICI", 4, 2 * 90e9, (dim,)),)
    assert network.seconds(levels["fsdp"], "all-gather", 16e9) == pytest.approx(
        15e9 / 360e9, rel=1e-3
    )
    # Half a cube, or half a pod's side, is a line.
    line = network.levels(targets.parse("v5p:2x4x4"), {"fsdp": 2, "tensor": 4})
    assert line["tensor"][0].bandwidth == 90e9
    pod = network.levels(targets.parse("v5e:8x16"), {"fsdp": 8, "tensor": 16})
    assert (pod["fsdp"][0].bandwidth, pod["tensor"][0].bandwidth) == (45e9, 90e9)


def test_gpu_axes_leave_the_host_where_it_ends():
    levels = network.levels(targets.parse("h100:64"), {"data": 2, "fsdp": 16, "tensor": 2})
    near, far = 0.8 * 450e9, 0.8 * 50e9
    assert levels["tensor"] == (network.Level("NVLink", 2, near),)
    assert levels["fsdp"] == (
        network.Level("NVLink", 4, near),
        network.Level("scale-out", 4, far),
    )
    assert levels["data"] == (network.Level("scale-out", 2, far),)
    took = network.seconds(levels["fsdp"], "all-gather", 4e9)
    assert took == pytest.approx(3e9 / near + 0.75e9 / far, rel=1e-2)
    double = network.seconds(levels["fsdp"], "all-reduce", 4e9)
    assert double == pytest.approx(2 * took)


def test_slices_are_joined_by_the_slow_network():
    pod = targets.parse("v5p:4x4x4")
    assert network.levels(pod, {"replica": 2, "fsdp": 64}, slices=2)["replica"] == (
        network.Level("DCN", 2, 0.8 * 50e9 / 8),
    )
    levels = network.levels(pod, {"replica": 8, "fsdp": 16}, slices=2)
    assert [level.network for level in levels["replica"]] == ["ICI", "DCN"]
    assert network.join(levels, ["replica", "fsdp"])[-1].network == "DCN"
    with pytest.raises(ValueError, match=r"set --mesh\.replica 3"):
        network.levels(pod, {"fsdp": 64}, slices=3)


# ---- published runs

DOC = REPOSITORY / "docs" / "plan.md"


def predicted(row: published.Row) -> cost.Estimate:
    fact = published.known(row.model, row.length, row.rows * row.layout.num_devices)
    return cost.estimate(fact, targets.parse(row.target), row.layout)


def test_published_step_times_of_maxtext_are_met():
    """Within 25 % for at least four of six; the table in the docs says what is computed here."""
    text, near = DOC.read_text("utf-8"), 0
    for row in published.MAXTEXT:
        took = predicted(row).step_seconds
        off = took / row.seconds - 1
        near += abs(off) <= 0.25
        assert f"| {row.seconds:.2f} | {took:.2f} | {100 * off:+.0f} % |" in text, row.name
    assert near >= 4


def test_published_scaling_is_met():
    """Within 7 points."""
    text = DOC.read_text("utf-8")
    for row in published.SCALING:
        share = published.share(row, row.num_devices)
        if row.base > 1:
            share /= published.share(row, row.base)
        assert abs(share - row.share) < 0.07, row.name
        assert f"| {100 * row.share:.0f} % | {100 * share:.0f} % |" in text, row.name


# ---- estimates


def test_an_estimate_adds_up_and_is_json():
    fact = facts_of("llama3_8b", "--model.attention", "splash")
    target = targets.parse("v5p:4x4x4")
    made = cost.estimate(
        fact, target, Layout({"fsdp": 16, "tensor": 4}, accumulate=4, remat="full")
    )
    plain = json.loads(json.dumps(made.json()))
    assert plain["step_seconds"] == pytest.approx(sum(made.seconds.values()))
    assert made.mfu == pytest.approx(made.model_flops / 64 / 459e12 / made.step_seconds)
    assert made.tokens_per_second == pytest.approx(fact.tokens / made.step_seconds)
    assert all(0 <= shown <= spent for spent, shown in made.networks.values())
    activations = made.networks["activations over tensor (ICI)"]
    assert activations[0] == activations[1]  # nothing hides them
    assert made.bottleneck.startswith("matmuls take")
    assert made.bottleneck.endswith(".")


def test_the_bottleneck_follows_the_layout():
    target = targets.parse("h100:64")
    shape = {"vocab": 32_000, "layers": 32, "embed": 4096, "heads": 32, "mlp": 11008}

    def says(layout: Layout, length: int, attention: str = "cudnn") -> str:
        model = Transformer(**shape, length=length, attention=attention, dtype="bfloat16")
        return cost.estimate(published.known(model, length, 64), target, layout).bottleneck

    sharded = Layout({"fsdp": 64}, remat="full")
    assert says(sharded, 4096).startswith("matmuls take")
    assert says(sharded, 256).startswith("gradients over fsdp (NVLink + scale-out) take")
    assert says(Layout({"fsdp": 2, "tensor": 32}, remat="full"), 4096).startswith(
        "activations over tensor"
    )
    assert says(sharded, 16384, "xla").startswith("elementwise take")
    assert says(Layout({"data": 64}), 4096).startswith("It does not fit: ")


def test_what_cannot_be_is_one_message():
    fact = facts_of("llama3_8b")
    cube = targets.parse("v5p:4x4x4")
    for layout, message in (
        (Layout({"fsdp": 16}), "mesh of 16 devices for 64"),
        (Layout({"fsdp": 4, "tensor": 16}), r"mesh\.tensor=16 does not divide the 32 heads and 8"),
        (
            Layout({"fsdp": 8, "tensor": 8}),
            r"mesh\.tensor=8 is not a product of the dims of v5p:4x4x4",
        ),
        (
            Layout({"fsdp": 64}, accumulate=16),
            "does not divide over 64 batch shards x train.accumulate=16",
        ),
        (Layout({"fsdp": 1, "stage": 64}), r"mesh\.stage=64 does not divide the 32 layers"),
        (
            Layout({"fsdp": 4, "context": 16}, context="ulysses"),
            r"ulysses: mesh\.context=16 does not divide the 32 heads and 8 key",
        ),
        (
            Layout({"data": 16, "stage": 4}, accumulate=2, pipeline="interleaved", virtual=2),
            r"train\.accumulate in multiples of mesh\.stage=4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cost.estimate(fact, cube, layout)
    splash = facts_of("llama3_8b", "--model.attention", "splash")
    with pytest.raises(
        ValueError, match=r"splash needs complete sequences, and model\.context=ring"
    ):
        cost.estimate(splash, cube, Layout({"fsdp": 16, "context": 4}))
    lora = facts_of("llama3_8b", "--init.lora", "4")
    with pytest.raises(ValueError, match="a pipeline takes no frozen parameters or adapters"):
        cost.estimate(lora, cube, Layout({"data": 16, "stage": 4}, accumulate=8))
    mixture = facts_of("lm_stdlib", "--model.experts.num", "6")
    with pytest.raises(ValueError, match=r"mesh\.expert=4 does not divide the 6 experts"):
        cost.estimate(mixture, targets.parse("h100:8"), Layout({"data": 2, "expert": 4}))
    with pytest.raises(ValueError, match="no speed is known for cpu:8"):
        cost.estimate(fact, targets.parse("cpu:8"), Layout({"fsdp": 8}))
    with pytest.raises(ValueError, match="links between devices of l4:8 are not known"):
        cost.estimate(fact, targets.parse("l4:8"), Layout({"fsdp": 8}))
    with pytest.raises(ValueError, match="knows its cost for models that declare their stacks"):
        cost.estimate(facts_of("digits"), targets.parse("h100:8"), Layout({"data": 4, "tensor": 2}))


# ---- pipelines, contexts, experts


@pytest.mark.parametrize("virtual", [1, 2])
def test_a_pipeline_waits_as_its_schedule_says(virtual):
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", "64")
    kind = "interleaved" if virtual > 1 else "1f1b"
    layout = Layout({"stage": 8}, accumulate=16, remat="full", pipeline=kind, virtual=virtual)
    seconds = cost.estimate(fact, targets.parse("h100:8"), layout).seconds
    work = seconds["matmuls"] + seconds["elementwise"]
    waits = schedules.bubble(8, 16, virtual)
    assert seconds["bubble"] / (seconds["bubble"] + work) == pytest.approx(waits)


def test_what_a_pipeline_does_once_a_step_is_no_part_of_its_bubble():
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", "64")
    layout = Layout({"data": 2, "fsdp": 2, "stage": 2}, accumulate=4, remat="full")
    found = {
        (each.payload, each.axes): each.ticking for each in comms.step_collectives(fact, layout)
    }
    assert found == {
        ("parameters", ("fsdp",)): True,
        ("gradients", ("fsdp",)): True,
        ("activations", ("fsdp",)): True,
        ("gradients", ("data",)): False,
        ("gradients", ("data", "stage")): False,
        ("microbatches", ("stage",)): False,
    }


def test_a_pipeline_computes_its_layers_once_more_but_for_the_last_stage():
    fact = facts_of("llama3_8b", "--data.batch-size", "64")
    target, layout = targets.parse("h100:8"), Layout({"stage": 8}, accumulate=16)
    assert fact.model
    head = fact.tokens * fact.model.logits_flops
    block = sum(fact.model.blocks[0].matmul_flops().values())
    forward = fact.tokens * fact.model.layers * block
    executed = cost.estimate(fact, target, layout).executed_flops
    assert executed == pytest.approx((3 + 7 / 8) * forward + 4 * head)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved"])
def test_kept_inputs_are_those_of_the_schedule(kind):
    virtual = 2 if kind == "interleaved" else 1
    for stages, micro in ((2, 4), (4, 8), (4, 32), (8, 32)):
        _, *kept = schedules.program(schedules.make(kind, stages, micro, virtual))
        assert memory.slots(kind, stages, micro, virtual) == sum(kept)


def test_stages_share_layers_and_1f1b_keeps_less_than_gpipe():
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", "64")
    layout = Layout({"data": 2, "stage": 4}, accumulate=16, remat="full")
    held = memory.step_memory(fact, layout)
    stack = sum(leaf.size for leaf in fact.params if leaf.stacked)
    assert held.parameters == 4 * (stack / 4 + fact.num_params - stack)
    row = 2 * 8192 * 4096 * 2  # bytes of a microbatch between stages
    more = (
        memory.step_memory(fact, layout._replace(pipeline="gpipe")).activations - held.activations
    )
    slots = [memory.slots(kind, 4, 16, 1) for kind in ("gpipe", "1f1b")]
    assert more == row * (slots[0] - slots[1]) > 0


def test_a_ring_hides_its_keys_and_values_behind_attention():
    words = ("--data.batch-size", "8", "--data.sequence-length", "32768")
    fact = facts_of("llama3_8b", *words, "--model.length", "32768")
    layout = Layout({"fsdp": 2, "context": 4}, remat="full")
    networks = cost.estimate(fact, targets.parse("h100:8"), layout).networks
    spent, shown = networks["keys and values over context (NVLink)"]
    assert spent > 0 and shown == 0
    order, exposed = networks["activations over context (NVLink)"]
    assert order == exposed > 0
    short = facts_of("llama3_8b", "--data.batch-size", "64", "--data.sequence-length", "256")
    networks = cost.estimate(short, targets.parse("h100:8"), layout).networks
    spent, shown = networks["keys and values over context (NVLink)"]
    assert 0 < shown < spent


def test_a_cut_sequence_is_held_in_parts():
    fact = facts_of("lm_stdlib", "--model.remat", "full")
    one = memory.step_memory(fact, Layout({}, remat="full")).activations
    assert memory.step_memory(fact, Layout({"context": 4}, remat="full")).activations == one / 4


def test_rows_of_experts_travel_in_rounds():
    words = ("--model.experts.num", "8", "--model.remat", "full")
    fact, layout = facts_of("lm_stdlib", *BF16, *words), Layout({"data": 2, "expert": 4})
    rows = [each for each in comms.step_collectives(fact, layout) if each.payload == "rows"]
    here = 16 * 128 / 8 * 2 * 64 * 2  # bytes: tokens of a device, each to two experts
    assert [(each.bytes, each.count) for each in rows] == [(here, 2 * 6 * activations.ROUNDS)]
    gradients = {
        each.axes for each in comms.step_collectives(fact, layout) if each.payload == "gradients"
    }
    assert gradients == {("data", "expert"), ("data",)}  # the experts' own: where they are


def test_an_exchange_on_a_torus_takes_as_long_as_its_longest_dim():
    cube = targets.parse("v5p:4x4x8")
    levels = network.levels(cube, {"fsdp": 4, "expert": 32})
    took = network.seconds(levels["expert"], "all-to-all", 16e9)
    line = 90e9  # 8 of these dims' links: no ring, but 4x4x8 is made of cubes
    assert took == pytest.approx(8 / 4 * 16e9 / (2 * line), rel=1e-2)
    ring = network.levels(targets.parse("v5p:4x4x4"), {"fsdp": 16, "context": 4})
    took = network.seconds(ring["context"], "collective-permute", 9e9)
    assert took == pytest.approx(9e9 / 90e9, rel=1e-2)  # one link of two
    switch = network.levels(targets.parse("h100:16"), {"expert": 16})
    took = network.seconds(switch["expert"], "all-to-all", 16e9)
    assert took == pytest.approx(14e9 / (0.8 * 450e9) + 8e9 / (0.8 * 50e9), rel=1e-2)


# ---- scaling


def test_weak_scaling_keeps_and_strong_scaling_shrinks_the_work_of_a_device():
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", "64")
    sizes = [targets.parse(name) for name in ("h100:8", "h100:16", "h100:64")]
    choose = lambda fact, target: Layout({"data": target.num_devices // 8, "fsdp": 8}, remat="full")
    weak = scaling.curve(fact, sizes, "weak", choose)
    strong = scaling.curve(fact, sizes, "strong", choose)
    assert [point.batch_size for point in weak] == [64, 128, 512]
    assert [point.batch_size for point in strong] == [64] * 3
    matmuls = [point.estimate.seconds["matmuls"] for point in weak]
    assert matmuls == pytest.approx([matmuls[0]] * 3)
    for curve in (weak, strong):
        rates = [point.efficiency for point in curve]
        assert rates[0] == 1 and rates == sorted(rates, reverse=True)
    assert strong[-1].efficiency < weak[-1].efficiency


def test_an_axis_is_bound_below_its_limit_of_tokens():
    fact = facts_of("llama3_8b", "--model.attention", "splash", "--data.batch-size", "64")
    target, layout = targets.parse("h100:64"), Layout({"data": 8, "fsdp": 8}, remat="full")
    found = {bound.axis: bound for bound in scaling.bounds(fact, target, layout)}
    assert set(found) == {"data", "fsdp"}
    here = fact.tokens / 64
    for bound in found.values():
        assert bound.bound == (here < bound.limit)
        assert json.loads(json.dumps(bound.json()))["axis"] == bound.axis
        grown = scaling.scale_batch(fact, 64)
        again = {b.axis: b for b in scaling.bounds(grown, target, layout)}[bound.axis]
        assert again.limit == pytest.approx(
            bound.limit, rel=0.01
        )  # a matter of layout, not of the batch
        assert not again.bound and str(again).startswith(f"{bound.axis}: bound by communication")


def test_an_axis_that_does_not_cut_the_batch_is_bound_beyond_a_size():
    fact = facts_of("llama3_8b", "--data.batch-size", "64")
    target, layout = targets.parse("h100:64"), Layout({"fsdp": 16, "context": 4}, remat="full")
    found = {bound.axis: str(bound) for bound in scaling.bounds(fact, target, layout)}
    assert "with a larger size than mesh.context=" in found["context"]
    assert "with fewer tokens on a device than" in found["fsdp"]
