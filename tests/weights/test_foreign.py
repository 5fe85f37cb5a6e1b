"""Foreign directories: every field of a config.json, and which file a tensor is read from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from spmd.models.attention import RopeScaling
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import config, families, files, model, names

SIZES = {"vocab": 60, "length": 16, "layers": 1, "embed": 32, "heads": 4}
MODELS = {
    "gpt2": Transformer(
        **SIZES, norm="layer", activation="gelu", position="learned", bias=True, tied=True
    ),
    "llama": Transformer(**SIZES, kv_heads=2, mlp=48),
    "mixtral": Transformer(**SIZES, kv_heads=2, mlp=48, experts=Experts(num=4)),
}
GEMMA = {
    "norm_at": "both",
    "norm_offset": 1.0,
    "activation": "geglu",
    "embed_scale": True,
    "tied": True,
    "head_dim": 10,
}
LAYERS = {**SIZES, "layers": 4}
MODELS |= {
    "mistral": Transformer(**SIZES, kv_heads=2, window=(5,)),
    "qwen2": Transformer(**SIZES, kv_heads=2, qkv_bias=True, tied=True),
    "qwen3": Transformer(**SIZES, qk_norm=True, rope_scaling=RopeScaling(kind="linear")),
    "qwen3_moe": Transformer(**SIZES, qk_norm=True, experts=Experts(num=4, top_k=1)),
    "gemma2": Transformer(**LAYERS, **GEMMA, window=(4, 0), score_cap=50.0, score_width=6),
    "gemma3_text": Transformer(
        **LAYERS, **GEMMA, window=(4, 4, 0), qk_norm=True, rope_theta=1e6, rope_theta_window=1e4
    ),
    "olmo2": Transformer(
        **SIZES,
        norm_at="output",
        qk_norm=True,
        qk_norm_over="all",
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    ),
}
OTHER = {  # field -> a value that is another function, or unknown
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "add_cross_attention": True,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-12,
        "n_head": 8,
        "num_attention_heads": 8,
        "n_inner": 64,
        "pruned_heads": {"0": [1]},
        "rope_theta": 1e4,
        "n_ctz": 16,
    },
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0},
        "partial_rotary_factor": 0.5,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"],
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "quantization_config": {"bits": 4},
        "final_logit_softcapping": 30.0,
    },
    "mixtral": {
        "num_experts_per_tok": 1,
        "num_experts": 8,
        "sliding_window": 8,
        "attention_bias": True,
        "norm_topk_prob": False,
    },
    "mistral": {"sliding_window": None, "layer_types": ["sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "layer_types": ["sliding_attention"]},
    "qwen3": {
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "head_dim": 4,
    },
    "qwen3_moe": {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    "gemma2": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 10,
        "sliding_window": 5,
        "hidden_activation": "gelu",
    },
    "gemma3_text": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "yarn"}},
        "rope_theta": 1e5,
        "layer_types": ["full_attention"] * 4,
        "use_bidirectional_attention": True,
    },
    "olmo2": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "clip_qkv": 8.0},
}
NAMED = {  # by which the line names a field that config.json has beside another
    "layer_types": "sliding_window",
    "rope_parameters": "rope_",
}
SAME = {  # fields that change nothing
    "_name_or_path": "there/model",
    "transformers_version": "5.0.0",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "eos_token_id": [1, 2],
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
    "some_new_field": None,
    "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]},
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("family", MODELS)
def test_what_is_exported_and_what_changes_nothing_agree(family):
    own = config.build_config(MODELS[family], family, "float32")
    assert config.find_differences(MODELS[family], family, own) == []
    assert config.find_differences(MODELS[family], family, own | SAME) == []
    if families.FAMILIES[family].windows == "none":
        window = {"sliding_window": 4096, "layer_types": ["full_attention"]}
        assert config.find_differences(MODELS[family], family, own | window) == []


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_the_one_of_its_config_json(family):
    """A checkpoint needs no file: read back, the model has the same function."""
    own = config.build_config(MODELS[family], family, "float32")
    assert names.family_of(MODELS[family], family) == family
    built, lines = model.from_fields(family, own)
    assert not lines
    assert config.build_config(built, family, "float32") == own
    assert {f: x for f, x in vars(built).items() if f not in ("kv_heads", "head_dim", "mlp")} == {
        f: x
        for f, x in vars(dataclasses.replace(MODELS[family], score_width=built.score_width)).items()
        if f not in ("kv_heads", "head_dim", "mlp")
    }


@pytest.mark.parametrize("family, field", [(f, name) for f in OTHER for name in OTHER[f]])
def test_another_function_is_refused_by_name(family, field):
    own = config.build_config(MODELS[family], family, "float32")
    lines = config.find_differences(MODELS[family], family, own | {field: OTHER[family][field]})
    seen = (field.removeprefix("rope_scaling"), NAMED.get(field, field))
    assert any(name in line for line in lines for name in seen), lines


def test_an_absent_field_is_the_default_there():
    own = config.build_config(MODELS["gpt2"], "gpt2", "float32")
    del own["n_head"]
    assert config.find_differences(MODELS["gpt2"], "gpt2", own) == [
        "n_head: 12 (the default) in config.json, 4 in the model"
    ]
    assert config.find_differences(MODELS["gpt2"], "gpt2", own | {"num_attention_heads": 4}) == []
    own = config.build_config(MODELS["llama"], "llama", "float32")
    own["rope_parameters"] = None
    assert config.find_differences(MODELS["llama"], "llama", own) == []
    bases = own | {"rope_scaling": {"rope_theta": 5e5}, "rope_theta": 1e4}
    (line,) = config.find_differences(MODELS["llama"], "llama", bases)
    assert (
        line
        == "rope_theta: 10000.0; rope_scaling.rope_theta: 500000.0 in config.json, which disagree"
    )


def test_every_field_of_a_model_is_exported_or_of_no_output():
    """A field added to Transformer is given a place here, or exports would lose it."""
    written = (
        "vocab length layers embed heads kv_heads head_dim mlp norm_epsilon rope_theta tied bias"
    )
    written += " score_width score_cap logit_cap rope_theta_window rope_scaling window"
    by_family = (
        "norm norm_at norm_offset activation position qkv_bias qk_norm qk_norm_over embed_scale"
    )
    by_family += " experts mask"
    training = "vocab_multiple dropout init_std dtype attention context scan remat saved"
    fields = {f.name for f in dataclasses.fields(Transformer)}
    assert fields == {*written.split(), *by_family.split(), *training.split()}


@pytest.mark.parametrize("change", [{"mask": "full"}, {"window": (4, 0)}])
def test_a_mask_of_another_kind_is_of_no_family(change):
    with pytest.raises(ValueError, match=r"not llama for model\.(mask=full|window=\(4, 0\))"):
        names.family_of(dataclasses.replace(MODELS["llama"], **change))


# ---- files


@pytest.fixture
def place(tmp_path):
    return tmp_path / "theirs"


def tensors(shift=0.0):
    return {
        t.name: np.full(t.shape(SHAPES), shift, np.float32)
        for t in names.tensors(MODELS["llama"], "llama")
    }


SHAPES = {
    "embed/table": (60, 32),
    "norm/scale": (32,),
    "head/kernel": (32, 60),
    "blocks/attention_norm/scale": (32,),
    "blocks/mlp_norm/scale": (32,),
    "blocks/attention/query/kernel": (32, 4, 8),
    "blocks/attention/key/kernel": (32, 2, 8),
    "blocks/attention/value/kernel": (32, 2, 8),
    "blocks/attention/out/kernel": (4, 8, 32),
    "blocks/mlp/gate/kernel": (32, 48),
    "blocks/mlp/up/kernel": (32, 48),
    "blocks/mlp/down/kernel": (48, 32),
}
PARTS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def sharded(place, *, index=True):
    place.mkdir()
    every = tensors()
    half = len(every) // 2
    where = {}
    for file, chosen in zip(PARTS, ([*every][:half], [*every][half:]), strict=True):
        save_file({name: every[name] for name in chosen}, place / file)
        where |= dict.fromkeys(chosen, file)
    if index:
        (place / files.INDEX).write_text(json.dumps({"weight_map": where}))
    return where


def refused(place):
    with pytest.raises(ValueError) as error:
        files.read_tensors(place, "llama")
    return str(error.value)


def test_a_single_file_wins_over_an_index_and_its_parts(place):
    sharded(place)
    save_file(tensors(1.0), place / files.SINGLE)
    found, aside = files.read_tensors(place, "llama")
    assert {entry.file for entry in found.values()} == {files.SINGLE}
    assert files.INDEX in aside and PARTS[0] in aside and aside.endswith("left aside")


def test_parts_without_an_index_are_all_there_or_refused(place):
    sharded(place, index=False)
    assert {entry.file for entry in files.read_tensors(place, "llama")[0].values()} == {*PARTS}
    (place / PARTS[1]).unlink()
    assert f"lacks {PARTS[1]} of its 2 parts" in refused(place)
    save_file(tensors(), place / "other.safetensors")
    message = refused(place)
    assert f"{PARTS[0]}, other.safetensors" in message and "which of them is the model?" in message


def test_two_sources_for_a_tensor_are_named(place):
    where = sharded(place)
    name = "model.norm.weight"
    (home,) = {where[name]}
    (other,) = {*PARTS} - {home}
    index = json.dumps({"weight_map": where | {name: other}})
    (place / files.INDEX).write_text(index)
    message = refused(place)
    assert f"says that {name} is in {other}, but {home} holds it" in message

    (place / files.INDEX).unlink()
    some = {n: x for n, x in tensors().items() if where[n] == other}
    save_file(some | {name: tensors()[name]}, place / other)
    message = refused(place)
    assert all(f"{name} in {file}" in message for file in PARTS)


def test_two_names_of_a_tensor_in_a_file(place):
    place.mkdir()
    save_file(tensors() | {"norm.weight": np.ones(32, np.float32)}, place / files.SINGLE)
    message = refused(place)
    assert "model.norm.weight in model" in message and "norm.weight in model" in message


def test_an_index_and_its_parts_disagree(place):
    where = sharded(place)
    (place / files.INDEX).write_text(json.dumps({"weight_map": where | {"model.gone": PARTS[0]}}))
    assert f"says that model.gone is in {PARTS[0]}, which does not hold it" in refused(place)
    del where["model.norm.weight"]
    (place / files.INDEX).write_text(json.dumps({"weight_map": where}))
    assert "holds model.norm.weight, which" in refused(place)
    (place / files.INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "it has the key 'a' twice" in refused(place)


def test_other_formats_adapters_and_runs_beside(place):
    import spmd

    sharded(place)
    (place / files.ADAPTER).write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refused(place)
    (place / files.ADAPTER).unlink()
    (place / "checkpoints").mkdir()
    assert "holds safetensors and a run's checkpoints" in refused(place)
    only = place.parent / "pickled"
    only.mkdir()
    (only / "pytorch_model.bin").write_bytes(b"")
    words = ["--init.from", str(only), "--simulate", "1", "--run.dir", str(place.parent / "run")]
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, which is not read"):
        spmd.load("digits", words).init()
