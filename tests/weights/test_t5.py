"""T5 at Hugging Face: logits of both sides, published sizes, mistakes; decoding with a relative bias."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd.core import tree
from spmd.models.attention.relative import bucket_of_distance
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.models.functional import functionalize
from spmd.weights.huggingface import config, names, read, t5, write
from tests.foreign import drawn, needs_transformers, read_onto_a_mesh

TINY = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
KINDS = {
    "tied relu": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "gated untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
draws = np.random.default_rng(0)
SOURCE, TARGET = draws.integers(0, 60, (3, 20)), draws.integers(0, 60, (3, 16))
COUNTED = (np.arange(20) < np.array([[20], [9], [3]])).astype(np.int32)


def call(model, params, run):
    params = jax.tree.map(jnp.asarray, params)
    return functionalize(model).call(params, {}, run, train=False)[0]


def logits_of_ours(model, params):
    target, source, counted = (jnp.asarray(x, jnp.int32) for x in (TARGET, SOURCE, COUNTED))
    run = lambda module: module(target, source, None, None, None, counted)
    return np.asarray(call(model, params, run))


def logits_of_theirs(made):
    import torch

    source, counted, target = (torch.tensor(x) for x in (SOURCE, COUNTED, TARGET))
    with torch.no_grad():
        out = made(input_ids=source, attention_mask=counted, decoder_input_ids=target)
    return out.logits.numpy()


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_logits_both_ways(kind, tmp_path, devices):
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY, **KINDS[kind]))
    if "untied" in kind:
        made.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(60, 32))
    with torch.no_grad():
        for parameter in made.eval().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    fields = json.loads((tmp_path / "theirs/config.json").read_text())
    model = t5.from_fields(fields)
    assert model.tied == ("untied" not in kind)
    params = read_onto_a_mesh(tmp_path / "theirs", model)
    want = logits_of_theirs(made)
    assert want.std() > 0.1
    np.testing.assert_allclose(logits_of_ours(model, params), want, atol=1e-4)
    write.write(str(tmp_path / "ours"), model, params, shard=20_000)
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of_theirs(back), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_written_read_onto_a_mesh_and_decoded_with_a_cache(kind, tmp_path, devices):
    model = t5.from_fields(TINY | KINDS[kind])
    params = drawn(model, 0.2)
    write.write(str(tmp_path / "out"), model, params, shard=20_000)
    got = tree.named_leaves(read_onto_a_mesh(tmp_path / "out", model))
    for name, leaf in tree.named_leaves(params).items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert "tensor" in got["encoder_bias"].sharding.spec
    target, source, counted = (jnp.asarray(x, jnp.int32) for x in (TARGET, SOURCE, COUNTED))

    def decode(module):
        cache, logits = module.encode(source, counted, length=16, rows=1), []
        for t in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 16))):
            places = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None, t], target[:, t].shape)
            part, cache = module.decode(target[:, t], places, cache)
            logits.append(part)
        return jnp.concatenate(logits, 1)

    full = logits_of_ours(model, params)
    np.testing.assert_allclose(np.asarray(call(model, params, decode)), full, atol=1e-4, rtol=1e-5)


def test_t5_small_has_the_published_number_of_parameters():
    """t5-small: 60,506,624; google/t5-v1_1-small: 76,961,152."""
    count = lambda fields: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(functionalize(t5.from_fields(fields)).init, jax.random.key(0))[0]
        )
    )
    small = {"model_type": "t5", "n_positions": 512, "num_layers": 6, "d_ff": 2048}
    assert count(small) == 60_506_624
    newer = {"num_layers": 8, "num_decoder_layers": 8, "num_heads": 6, "d_ff": 1024}
    newer |= KINDS["gated untied"]
    assert count(newer) == 76_961_152
    for fields in (small, newer):
        model = t5.from_fields(fields)
        assert config.find_differences(model, names.family_of(model), fields) == []


def test_buckets_of_distances():
    """T5's own: single distances up to a half, then wider by a logarithm, the last for all beyond."""
    got = bucket_of_distance(16, 128)
    assert got[:9].tolist() == [*range(9)] and got[[16, 32, 64, 128]].tolist() == [10, 12, 14, 15]
    assert (np.diff(got) >= 0).all() and {*got.tolist()} == {*range(16)}


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"feed_forward_proj": "gated-gelu"},
            "feed_forward_proj: gated-gelu in config.json, relu in",
        ),
        (
            {"relative_attention_max_distance": 64},
            "max_distance: 64 in config.json, 12 in the model",
        ),
        ({"scale_decoder_outputs": False}, "tie_word_embeddings: False in config.json, True in"),
        ({"num_decoder_layers": None}, "num_decoder_layers: 2"),
    ],
)
def test_another_function_is_refused_by_name(fields, message, tmp_path):
    model = t5.from_fields(TINY | KINDS["tied relu"])
    write.write(str(tmp_path / "out"), model, drawn(model, 0.2))
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        read.find(tmp_path / "out", model)


def test_encoder_decoders_that_hugging_face_lacks_are_named():
    model = t5.from_fields(TINY | KINDS["tied relu"])
    for name, value in (("position", "rope"), ("score_width", 0), ("head_scale", False)):
        with pytest.raises(ValueError, match=f"no EncoderDecoder with model.{name}={value}"):
            names.family_of(dataclasses.replace(model, **{name: value}))
    for change, message in (
        ({"buckets": 6}, "multiple of 4"),
        ({"distance": 4}, "must be more than"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(model, **change)


def test_every_field_of_an_encoder_decoder_is_exported_or_of_no_output():
    """A field added to EncoderDecoder is given a place here, or exports would lose it."""
    written = "vocab embed heads kv_heads head_dim mlp norm_epsilon encoder_layers layers activation buckets"
    written += " distance tied head_scale"
    checked = (
        "norm norm_at norm_offset bias qkv_bias qk_norm qk_norm_over position score_width score_cap"
    )
    checked += " mask experts window"
    training = "dropout init_std dtype attention context scan remat saved rope_theta"
    known = {*written.split(), *checked.split(), *training.split()}
    assert {f.name for f in dataclasses.fields(EncoderDecoder)} <= known
