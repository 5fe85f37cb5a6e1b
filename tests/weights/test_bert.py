"""BERT at Hugging Face: logits of both sides, published sizes, old names, what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd.core import tree
from spmd.models.encoder import Encoder
from spmd.models.functional import functionalize
from spmd.weights.huggingface import bert, config, names, read, write
from spmd.weights.huggingface import model as directory_model
from tests.foreign import drawn, needs_transformers, read_onto_a_mesh, wanted_of

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
HEADS = {
    "text": {"output": "text", "pool": "tanh", "classes": 5},
    "tokens": {"output": "tokens", "classes": 5},
    "vocab": {"output": "vocab"},
}
# What config.json of bert-base-uncased says beside the tokens.
BASE = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "vocab_size": 30522,
}
BASE |= {"gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}
BASE |= {
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "model_type": "bert",
}
BASE |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12}
BASE |= {"num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute"}
BASE |= {"transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True}

draws = np.random.default_rng(0)
TOKENS, TYPES = draws.integers(0, 60, (3, 16)), draws.integers(0, 2, (3, 16))
COUNTED = (np.arange(16) < np.array([[16], [9], [1]])).astype(np.int32)


def logits_of_ours(model, params):
    inputs = (jnp.asarray(x, jnp.int32) for x in (TOKENS, COUNTED, TYPES))
    return np.asarray(functionalize(model).call(params, {}, lambda m: m(*inputs), train=False)[0])


def logits_of_theirs(made):
    import torch

    tokens, counted, types = (torch.tensor(x) for x in (TOKENS, COUNTED, TYPES))
    with torch.no_grad():
        out = made(input_ids=tokens, attention_mask=counted, token_type_ids=types)
    return (out.prediction_logits if "prediction_logits" in out else out.logits).numpy()


def assert_close(got, want, limit):
    """Equal at the tokens that count; others see what each library lets padding see."""
    weight = COUNTED[..., None] if want.ndim == 3 else 1
    assert want.std() > 0.1
    np.testing.assert_allclose(got * weight, want * weight, atol=limit)


@needs_transformers
@pytest.mark.parametrize("head", [*HEADS, "pretraining"])
def test_logits_both_ways(head, tmp_path, devices):
    import torch
    import transformers

    torch.manual_seed(0)
    options = HEADS.get(head, HEADS["vocab"])
    name = bert.CLASSES[options["output"]]
    kind = getattr(transformers, "BertForPreTraining" if head == "pretraining" else name)
    made = kind(transformers.BertConfig(**TINY, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    fields = json.loads((tmp_path / "theirs/config.json").read_text())
    model = bert.from_fields(fields, **options)
    params = read_onto_a_mesh(tmp_path / "theirs", model)
    want = logits_of_theirs(made)
    assert_close(logits_of_ours(model, params), want, 1e-4)
    write.write(str(tmp_path / "ours"), model, params, shard=20_000)
    back = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    assert_close(logits_of_theirs(back), want, 1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_written_and_read_onto_a_mesh(head, tmp_path, devices):
    model = bert.from_fields(TINY, **HEADS[head])
    params = drawn(model, 0.3)
    write.write(str(tmp_path / "out"), model, params, shard=20_000)
    got = tree.named_leaves(read_onto_a_mesh(tmp_path / "out", model))
    for name, leaf in tree.named_leaves(params).items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert {"fsdp", "tensor"} <= {*got["blocks/mlp/up/kernel"].sharding.spec}


def test_bert_base_has_the_published_number_of_parameters():
    """BertModel has 109,482,240 (with its pooler), BertForPreTraining 110,106,428 (and two heads)."""
    count = lambda model, skip=(): sum(
        leaf.size
        for name, leaf in tree.named_leaves(
            jax.eval_shape(functionalize(model).init, jax.random.key(0))[0]
        ).items()
        if not name.startswith(skip)
    )
    pooled = bert.from_fields(BASE, output="text", pool="tanh", classes=2)
    masked = bert.from_fields(BASE, output="vocab")
    assert count(pooled, ("head",)) == 109_482_240
    # Their pretraining model is our masked one, the pooler and the head of the next sentence.
    assert count(masked) + 768 * 768 + 768 + 768 * 2 + 2 == 110_106_428
    for model in (pooled, masked):
        assert config.find_differences(model, names.family_of(model), BASE) == []


def test_the_files_of_2018(tmp_path, devices):
    """bert-base-uncased: gamma and beta, two heads, a copy of the table; read as a text's model too."""
    from safetensors.numpy import load_file, save_file

    model = bert.from_fields(TINY, **HEADS["vocab"])
    params = drawn(model, 0.3)
    write.write(str(tmp_path / "out"), model, params)
    file = tmp_path / "out/model.safetensors"
    old = {".weight": ".gamma", ".bias": ".beta"}
    tensors = {}
    for name, array in load_file(file).items():
        end = name[name.rindex(".") :]
        tensors[name.removesuffix(end) + old[end] if "LayerNorm" in name else name] = array
    tensors["cls.predictions.decoder.weight"] = tensors[
        "bert.embeddings.word_embeddings.weight"
    ].copy()
    tensors["cls.seq_relationship.weight"] = np.ones((2, 32), np.float32)
    tensors["bert.pooler.dense.weight"] = np.eye(32, dtype=np.float32)
    tensors["bert.pooler.dense.bias"] = np.arange(32, dtype=np.float32)
    save_file(tensors, file)
    got = tree.named_leaves(read_onto_a_mesh(tmp_path / "out", model))
    for name, leaf in tree.named_leaves(params).items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    pooled = bert.from_fields(TINY, **HEADS["text"])
    source = read.find(tmp_path / "out", pooled)
    wanted = tree.named_leaves({"params": wanted_of(pooled)})
    with pytest.raises(ValueError, match=r"classifier\.weight: absent in the checkpoint"):
        source.check(wanted)
    wanted = {name: leaf for name, leaf in wanted.items() if "/head/" not in name}
    source.check(wanted, {"head/kernel", "head/bias"})
    np.testing.assert_array_equal(source.read(wanted)["params/pooler/bias"], np.arange(32))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "relu"}, "hidden_act: relu in config.json, gelu in the model"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: relative_key in config",
        ),
        ({"type_vocab_size": 4}, "type_vocab_size: 4 in config.json, 2 in the model"),
        (
            {"is_decoder": True, "add_cross_attention": True},
            "add_cross_attention: True in config.json",
        ),
    ],
)
def test_another_function_is_refused_by_name(fields, message, tmp_path):
    model = bert.from_fields(TINY, **HEADS["vocab"])
    write.write(str(tmp_path / "out"), model, drawn(model, 0.3))
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        read.find(tmp_path / "out", model)


def test_an_experiment_that_builds_decoders_names_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ValueError, match=r"'bert' is read into the model .* names \(Encoder\)"):
        directory_model.from_directory(str(tmp_path))


def test_encoders_that_hugging_face_lacks_are_named():
    model = bert.from_fields(TINY, **HEADS["text"])
    for change in ({"pool": "mean"}, {"types": 0}, {"bigrams": 8}, {"norm_at": "input"}):
        (name, value), *_ = change.items()
        with pytest.raises(ValueError, match=f"no Encoder with model.{name}={value}"):
            names.family_of(dataclasses.replace(model, **change))


def test_every_field_of_an_encoder_is_exported_or_of_no_output():
    """A field added to Encoder is given a place here, or exports would lose it."""
    written = "vocab length embed heads kv_heads head_dim mlp norm_epsilon types classes layers activation"
    checked = (
        "norm norm_at norm_offset bias qk_norm score_width score_cap mask bigrams experts window"
    )
    checked += " output pool qk_norm_over qkv_bias"
    training = "dropout init_std attention context scan remat saved"
    known = {*written.split(), *checked.split(), *training.split()}
    assert {f.name for f in dataclasses.fields(Encoder)} <= known
