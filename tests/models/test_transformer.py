"""The decoder: published sizes, causality by gradients, packed documents, its forms against each other."""

# B batch, T time, V vocab

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import tasks
from spmd.core import tree
from spmd.models.attention import CACHE_DIMS
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.strategies.grads.pipeline import execute
from tests import cases
from tests.marks import slow_but

GPT2 = Transformer(
    vocab=50257,
    length=1024,
    layers=12,
    embed=768,
    heads=12,
    norm="layer",
    activation="gelu",
    position="learned",
    bias=True,
    tied=True,
)
LLAMA3 = Transformer(
    vocab=128256, length=8192, layers=32, embed=4096, heads=32, kv_heads=8, mlp=14336
)
PUBLISHED = {
    "gpt2": (GPT2, 124_439_808),
    "gpt2-xl": (dataclasses.replace(GPT2, layers=48, embed=1600, heads=25), 1_557_611_200),
    "llama3-8b": (LLAMA3, 8_030_261_248),
    "llama3-70b": (
        dataclasses.replace(LLAMA3, layers=80, embed=8192, heads=64, mlp=28672),
        70_553_706_496,
    ),
    "mixtral-8x7b": (
        dataclasses.replace(LLAMA3, vocab=32_000, experts=Experts(num=8, top_k=2)),
        46_702_792_704,
    ),
}

SMALL = {"vocab": 61, "length": 16, "layers": 2, "embed": 32, "heads": 4}
KINDS = {
    "gpt2": Transformer(
        **SMALL, norm="layer", activation="gelu", position="learned", bias=True, tied=True
    ),
    "llama": Transformer(**SMALL, kv_heads=2, mlp=48, init_std=0.0),
    "all": Transformer(
        **SMALL, kv_heads=1, head_dim=10, qk_norm=True, logit_cap=5.0, vocab_multiple=8
    ),
}


@pytest.fixture(params=slow_but(("gpt2", "all"), KINDS))
def kind(request):
    return KINDS[request.param]


@functools.cache
def initial(model):
    return jax.jit(tasks.LanguageModel().build(model).init)(jax.random.key(0))


def started(model, **task):
    """(task, params, model_state); what does not change the parameters does not draw them again."""
    built = tasks.LanguageModel(**task).build(model)
    built = built._replace(predict=jax.jit(built.predict), evaluate=jax.jit(built.evaluate))
    plain = {"dropout": 0.0, "dtype": "", "attention": "xla", "scan": True, "remat": "none"}
    return built, *initial(dataclasses.replace(model, **plain))


def packed(rows=3, time=16, vocab=61, seed=0):
    """Documents of different lengths, one after the other in each row, then padding."""
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": rng.integers(0, vocab, (rows, time)),
        "targets": rng.integers(0, vocab, (rows, time)),
        "segments": np.zeros((rows, time)),
        "positions": np.zeros((rows, time)),
    }
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(1, time + 1), 3, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            batch["segments"][row, start:end] = number
            batch["positions"][row, start:end] = np.arange(end - start)
            batch["targets"][row, end - 1] = -1
    batch["targets"][batch["segments"] == 0] = -1
    return {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()} | {
        "example_id": jnp.arange(rows, dtype=jnp.int32) + 7,
        "weight": jnp.asarray([1.0, 1.0, 0.0][:rows]),
    }


def gradient(task, params, batch):
    """(loss sum by name, gradient) of one step with dropout."""

    def loss(params):
        scale = task.scale(task.weigh(batch))
        total, (sums, _) = task.loss(params, {}, batch, jax.random.key(3), scale)
        return total, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def assert_close(a, b, rtol=1e-4):
    """Relative to the largest element of a leaf; a key's bias has none: softmax is blind to it."""
    for (name, x), y in zip(tree.named_leaves(a).items(), jax.tree.leaves(b), strict=True):
        atol = 1e-7 + rtol * float(abs(y).max())
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model, size = PUBLISHED[name]
    task = tasks.LanguageModel().build(model)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert tree.num_elements(params) == size
    for leaf, x in tree.named_leaves(params).items():
        assert len(task.dims[leaf]) == x.ndim, leaf
        assert (task.dims[leaf][0] == "layers") == leaf.startswith("blocks/"), leaf


def test_a_token_sees_its_document_up_to_itself(kind):
    task, params, _ = started(kind)
    batch = packed()
    tables = task.call(params, {}, lambda m: m.embed.table.shape)
    segments = np.asarray(batch["segments"])

    def logits(nudge_BTD, row, time):
        """A logit as a function of a nudge to each token's embedding."""

        def run(module):
            class Nudged(type(module.embed)):
                def __call__(self, index, dtype):
                    return super().__call__(index, dtype) + nudge_BTD

            module.embed.__class__ = Nudged
            return module(*(batch[k] for k in ("tokens", "positions", "segments")))

        return task.call(params, {}, run)[row, time, 0]

    zero = jnp.zeros((*batch["tokens"].shape, tables[1]))
    gradient = jax.jit(jax.grad(logits))
    for row, time in ((0, 5), (1, 11), (2, 15)):
        reached = np.abs(gradient(zero, row, time)).sum(-1) > 0
        want = np.zeros_like(reached)
        want[row, : time + 1] = segments[row, : time + 1] == segments[row, time]
        np.testing.assert_array_equal(reached, want)


def test_packed_documents_are_as_if_alone(kind):
    task, params, _ = started(kind)
    batch = packed()
    together = task.predict(params, {}, batch)
    for number in range(1, 4):  # alone: at the start of the row, what follows is not seen
        (where,) = np.nonzero(np.asarray(batch["segments"][0]) == number)
        alone = {
            "tokens": jnp.zeros((1, 16), jnp.int32)
            .at[0, : len(where)]
            .set(batch["tokens"][0, where])
        }
        got = task.predict(params, {}, alone)[0, : len(where)]
        np.testing.assert_allclose(together[0, where], got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name,changes",
    [
        pytest.param("gpt2", ({"scan": False, "remat": "dots"},), marks=pytest.mark.slow),
        pytest.param(
            "all", ({"remat": "full"}, {"remat": "named", "scan": False}), marks=pytest.mark.gate
        ),
    ],
)
def test_scanned_unrolled_and_remat_agree(name, changes):
    model = dataclasses.replace(KINDS[name], dropout=0.2)
    task, params, _ = started(model)
    batch = packed()
    want = gradient(task, params, batch)
    plain = started(KINDS[name])[0].evaluate(params, {}, batch)["loss"]["sum"]
    assert abs(float(plain - want[0][1]["loss"][0])) > 1e-4  # dropout does something
    for change in changes:
        other = started(dataclasses.replace(model, **change))[0]
        assert_close(gradient(other, params, batch), want)


@pytest.mark.parametrize("layers", slow_but((), (1, 4, 5)))
def test_a_pattern_of_windows_in_any_form(layers):
    """Scanned by periods of two blocks, with one left of five; its remat; all blocks unrolled."""
    model = dataclasses.replace(KINDS["llama"], layers=layers, window=(3, 0), dropout=0.2)
    task, params, _ = started(model)
    want = gradient(task, params, packed())
    for change in ({"scan": False}, {"remat": "full"}):
        other = started(dataclasses.replace(model, **change))[0]
        assert_close(gradient(other, params, packed()), want)
    losses = {float(want[0][0])}
    for window in ((), (3,), (0, 3)):
        other = started(dataclasses.replace(model, window=window))[0]
        losses.add(float(gradient(other, params, packed())[0][0]))
    assert len(losses) == (4 if layers > 1 else 2)


def test_a_stage_holds_whole_periods():
    message = (
        r"2 does not divide the 6 layers of the model, which repeat every 2 \(model.window\); use"
    )
    with pytest.raises(ValueError, match=message + r" mesh.stage=3, or 8 layers"):
        execute.check_layers(stacks(window=(3, 0)), 2, 1)
    both = stacks(window=(3, 0), experts=Experts(num=4, every=3))
    with pytest.raises(ValueError, match=r"every 6 \(model.window and model.experts.every\); use"):
        execute.check_layers(both, 2, 1)


@pytest.mark.parametrize("layers", slow_but((), (4, 5)))
def test_a_pattern_of_unlike_blocks_in_any_form(layers):
    """Experts in every second block, dense ones between; a window pattern beside it; remat; unrolled."""
    experts = Experts(num=4, top_k=2, every=2)
    model = dataclasses.replace(
        KINDS["llama"], layers=layers, experts=experts, window=(3, 0), dropout=0.2
    )
    task, params, _ = started(model)
    named = tree.named_leaves(params)
    assert named["blocks/0/mlp/up/kernel"].shape[0] == layers - layers // 2
    assert named["blocks/1/mlp/up/kernel"].shape[:2] == (layers // 2, 4)
    want = gradient(task, params, packed())
    for change in ({"scan": False}, {"remat": "full"}):
        other = started(dataclasses.replace(model, **change))[0]
        assert_close(gradient(other, params, packed()), want)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(want[1]))


def stacks(**changes):
    model = dataclasses.replace(KINDS["llama"], layers=6, **changes)
    return tasks.LanguageModel().build(model).staged().stacks


def test_unrolled_layers_give_one_concatenation():
    task, params, _ = started(dataclasses.replace(KINDS["llama"], scan=False))
    text = str(jax.make_jaxpr(lambda p: gradient(task, p, packed()))(params))
    assert " concatenate[" in text and " pad[" not in text.replace("padding", "")


@pytest.mark.parametrize("remat", ["none", "full", "dots", "named"])
def test_remat_computes_anew_what_its_policy_says(remat):
    """Products with weights in the jaxpr of the gradient, against one forward and two backward."""
    model = dataclasses.replace(KINDS["llama"], remat=remat, scan=False, layers=1)
    task, params, _ = started(model)
    jaxpr = jax.make_jaxpr(lambda p: gradient(task, p, packed()))(params)
    count = weight_products(jaxpr.jaxpr)
    in_block = 7  # query, key, value, out, up, gate, down
    # named keeps query, key, value and what attention gives; the last product is never needed again
    again = {"full": in_block - 1, "dots": 0, "none": 0, "named": 3}[remat]
    assert count == 3 * (in_block + 1) + again


def weight_products(jaxpr):
    """dot_generals without batch dims."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += not eqn.params["dimension_numbers"][1][0]
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                found += weight_products(inner) if hasattr(inner, "eqns") else 0
    return found


GEMMA = (
    "window",
    "norm_at",
    "norm_offset",
    "activation",
    "score_width",
    "score_cap",
    "embed_scale",
)
GEMMA += ("rope_theta_window", "rope_scaling")
OLMO = ("norm_at", "qk_norm", "qk_norm_over", "qkv_bias", "rope_scaling")
PATTERNS = {
    "none": {},
    "one": {"window": (4,)},
    "pattern": {"window": (4, 0)},
    "unlike": {"experts": Experts(num=4, every=2), "bias": False},
    "gemma": {name: getattr(cases.MODELS["gemma"], name) for name in GEMMA},
    "olmo": {name: getattr(cases.MODELS["olmo"], name) for name in OLMO},
}


@pytest.mark.parametrize("pattern", slow_but(("none",), PATTERNS, gate=("gemma",)))
def test_cached_logits_are_the_full_ones(kind, pattern):
    """Prompts of different lengths at once, then token by token."""
    task, params, _ = started(dataclasses.replace(kind, **PATTERNS[pattern]))
    tokens = packed()["tokens"]
    full = task.predict(params, {}, {"tokens": tokens})
    lengths = np.array([3, 7, 5])
    place = np.arange(7)[None].repeat(3, 0)
    place = np.where(place < lengths[:, None], place, -1).astype(np.int32)

    def decode(tokens, positions, cache):
        return task.call(params, {}, lambda m: m.decode(tokens, positions, cache))

    cache = task.call(params, {}, lambda m: m.cache(3, 16))
    assert all(x.ndim == len(CACHE_DIMS) for x in cache.values())
    logits, cache = jax.jit(decode)(tokens[:, :7], place, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], rtol=1e-5, atol=1e-5)
    step = jax.jit(decode)
    for _ in range(16 - max(lengths)):
        now = jnp.take_along_axis(tokens, lengths[:, None], 1)
        logits, cache = step(now, jnp.asarray(lengths[:, None], jnp.int32), cache)
        want = full[np.arange(3), lengths]
        np.testing.assert_allclose(logits[:, 0], want, rtol=1e-5, atol=1e-5)
        lengths = lengths + 1


def test_an_encoder_sees_both_sides_and_does_not_decode():
    task, params, _ = started(dataclasses.replace(KINDS["llama"], mask="full"))
    tokens = packed()["tokens"]
    first = task.predict(params, {}, {"tokens": tokens})[:, 0]
    changed = task.predict(params, {}, {"tokens": tokens.at[:, -1].add(-1)})[:, 0]
    assert (np.abs(first - changed) > 1e-6).any(-1).all()
    cache = task.call(params, {}, lambda m: m.cache(3, 16))
    with pytest.raises(ValueError, match="mask=full: a token sees later ones"):
        task.call(params, {}, lambda m: m.decode(tokens, tokens * 0, cache))


def test_bfloat16_computes_near_and_sums_in_float32():
    kind = KINDS["gpt2"]
    model = dataclasses.replace(kind, dtype="bfloat16")
    task, params, _ = started(model)
    batch = packed()
    (loss, sums), grads = gradient(task, params, batch)
    exact = started(kind)[0].evaluate(params, {}, batch)["loss"]
    assert loss.dtype == sums["loss"][0].dtype == jnp.float32
    assert float(loss) == pytest.approx(float(exact["sum"] / exact["weight"]), rel=2e-2)
    assert float(sums["loss"][0]) != float(exact["sum"])
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    # A sum of gradients over tokens in bfloat16 would show as a reduction with a result in it.
    jaxpr = str(jax.make_jaxpr(lambda p: gradient(task, p, batch))(params))
    scatters = [line for line in jaxpr.splitlines() if "scatter-add" in line or "add_any" in line]
    assert not [line for line in scatters if "bf16[61" in line or "bf16[64" in line]


def test_table_rows_beyond_the_vocabulary_are_never_predicted():
    task, params, _ = started(KINDS["all"])
    logits = task.predict(params, {}, packed())
    assert logits.shape[-1] == 64
    assert jax.nn.softmax(logits)[..., 61:].max() == 0


def test_the_loss_starts_at_that_of_chance(kind):
    task, params, _ = started(dataclasses.replace(kind, init_std=0.02))
    loss = task.evaluate(params, {}, packed())["loss"]
    assert float(loss["sum"] / loss["weight"]) == pytest.approx(np.log(61), rel=0.02)


def test_initial_weights():
    _, params, _ = started(dataclasses.replace(KINDS["llama"], embed=256, mlp=512))
    leaves = tree.named_leaves(params)
    std = lambda name: float(jnp.std(leaves[name]))
    assert std("blocks/attention/query/kernel") == pytest.approx(256**-0.5, rel=0.02)
    assert std("blocks/mlp/down/kernel") == pytest.approx((512 * 4) ** -0.5, rel=0.02)
    layers = leaves["blocks/mlp/up/kernel"]
    assert abs(layers[0] - layers[1]).max() > 0
    _, params, _ = started(KINDS["gpt2"])
    leaves = tree.named_leaves(params)
    assert std("blocks/mlp/up/kernel") == pytest.approx(0.02, rel=0.05)
    assert std("blocks/attention/out/kernel") == pytest.approx(0.02 / 2, rel=0.05)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"heads": 5}, "model.embed=32 does not divide by model.heads=5"),
        ({"kv_heads": 3}, "use one of 1, 2, 4"),
        ({"head_dim": 5}, "head dim must be even, given 5"),
        ({"experts": Experts(num=4, every=5)}, "every=5 leaves none of the 2 layers with experts"),
        ({"layers": 0}, "model.layers=0 must be at least 1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"logit_cap": -1.0}, "model.logit_cap=-1.0"),
    ],
)
def test_mistakes_in_the_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**SMALL | change)


def test_a_sequence_longer_than_the_model():
    task, params, _ = started(KINDS["gpt2"])
    with pytest.raises(ValueError, match=r"17 tokens is longer than model.length=16"):
        task.predict(params, {}, {"tokens": jnp.zeros((1, 17), jnp.int32)})


def test_a_token_outside_the_vocabulary_is_loud():
    task, params, _ = started(KINDS["llama"])
    batch = packed()
    bad = batch | {"tokens": batch["tokens"].at[0, 0].set(61)}
    assert np.isfinite(task.evaluate(params, {}, batch)["loss"]["sum"])
    assert np.isnan(task.evaluate(params, {}, bad)["loss"]["sum"])
