"""config.json of Hugging Face: written from a model, and compared with it.

A field is compared with the model, or has a supported value, or changes no output. Any other is refused by
name, since it may belong to a model with another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spmd.core.fields import closest
from spmd.models.transformer import Transformer
from spmd.weights.huggingface import vision

# Fields that change no output of the model.
HARMLESS = frozenset(
    {
        # Names, versions, types of storage, how it is executed.
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "torch_dtype",
        "dtype", "torchscript", "use_bfloat16", "use_cache", "_attn_implementation",
        "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled",
        "gradient_checkpointing", "unsloth_version", "unsloth_fixed", "chunk_size_feed_forward",
        "pretraining_tp", "reorder_and_upcast_attn", "is_decoder", "tf_legacy_loss",
        # Tokens and labels.
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
        "decoder_start_token_id", "prefix", "tokenizer_class", "tokenizer_type", "id2label",
        "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task",
        "task_specific_params",
        # What a forward pass returns beside the logits.
        "output_attentions", "output_hidden_states", "output_past", "output_router_logits",
        "output_scores", "return_dict", "return_dict_in_generate", "remove_invalid_values",
        "keys_to_ignore_at_inference",
        # Training: dropout, initialisation, losses.
        "initializer_range", "hidden_dropout", "hidden_dropout_prob", "attention_dropout",
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "router_aux_loss_coef", "router_jitter_noise", "attention_probs_dropout_prob",
        # Of encoders of images: their other uses, the pooler, which a classifier does not have.
        "encoder_stride", "pooler_act", "pooler_output_size", "out_features", "out_indices",
        "stage_names",
        # The longest sequence: rotary angles do not depend on it, a learned table has its length.
        "max_position_embeddings", "n_ctx",
        # Generation.
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
        "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
        "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip

# Fields with the values that the model computes; any other value is another function.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_sliding_window": (False,),
}

# Other names that transformers reads as the first.
ALIASES = {
    "gpt2": {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
    },
    "llama": {},
    "mixtral": {"num_local_experts": "num_experts"},
    **{family: {} for family in vision.FAMILIES},
}

# Defaults of the classes at Hugging Face for fields that config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mixtral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    **vision.DEFAULTS,
}
SAME = {  # "gelu" is the exact one, by erf
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
ROTARY = ("llama", "mixtral")
ROPE = ("rope_parameters", "rope_scaling")
APART = {"architectures", "sliding_window", *ROPE}  # compared separately


def build_config(model: Any, family: str, dtype: str) -> dict[str, Any]:
    """The fields of config.json that determine the output of the model, as transformers reads them."""
    if family in vision.FAMILIES:
        return vision.build_config(model, dtype)
    common = {
        "model_type": family,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        return common | _gpt2_config(model)
    common |= _llama_config(model)
    if family == "mixtral":
        return common | {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": model.experts.num,
            "num_experts_per_tok": model.experts.top_k,
            "router_aux_loss_coef": model.experts.balance,
            "sliding_window": None,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
    }


def _gpt2_config(model: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": model.length,
        "n_embd": model.embed,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.mlp or 4 * model.embed,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def _llama_config(model: Transformer) -> dict[str, Any]:
    """The fields that llama and mixtral share."""
    return {
        "max_position_embeddings": model.length,
        "hidden_size": model.embed,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.width,
        "intermediate_size": model.mlp or 4 * model.embed,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,  # where older versions look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }


def find_differences(model: Any, family: str, foreign: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json that the model contradicts, or whose meaning is unknown.

    Returns a line for each field. A field that is null is one that is absent, as in transformers.
    """
    if foreign.get("model_type", family) != family:
        return [f"model_type: {foreign['model_type']} in config.json, {family} in the model"]
    fields = {name: value for name, value in foreign.items() if value is not None}
    return [
        *_compare_sizes(model, family, fields),
        *_compare_rope(family, fields),
        *_compare_others(model, family, fields),
    ]


def _compare_sizes(model: Any, family: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about fields that the model has too; missing ones have the defaults of the class."""
    model_fields = build_config(model, family, "")
    values = _with_defaults(model, family, fields)
    for name in sorted(model_fields.keys() & values.keys() - HARMLESS - APART):
        expected, value = model_fields[name], values[name]
        if SAME.get(str(expected), expected) != SAME.get(str(value), value):
            inside = name == "rope_theta" and any(
                name in value for value in _rope_dicts(fields).values()
            )
            default = "" if name in fields or inside else " (the default)"
            yield f"{name}: {value}{default} in config.json, {expected} in the model"
    for name, alias in ALIASES[family].items():
        if name in fields and fields.get(alias, fields[name]) != fields[name]:
            yield f"{name}: {fields[name]} in config.json, but {alias}: {fields[alias]}, which means the same"


def _with_defaults(model: Any, family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    aliases = {name: fields[alias] for name, alias in ALIASES[family].items() if alias in fields}
    values = {**DEFAULTS[family], **aliases, **fields}
    if family in vision.FAMILIES:
        return values
    if family == "gpt2":
        return {"n_inner": 4 * values["n_embd"], **values}
    heads = values["num_attention_heads"]
    head_dim = (
        values["hidden_size"] // heads if isinstance(heads, int) and heads > 0 else model.width
    )
    values = {"num_key_value_heads": heads, "head_dim": head_dim, **values}
    bases = [value["rope_theta"] for value in _rope_dicts(fields).values() if "rope_theta" in value]
    return values | {"rope_theta": bases[0] if bases else values["rope_theta"]}


def _rope_dicts(fields: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: fields[name] for name in ROPE if isinstance(fields.get(name), Mapping)}


def _compare_rope(family: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about scaled rotary angles, and contradicting bases."""
    names = [name for name in (*ROPE, "rope_theta") if name in fields]
    if family not in ROTARY:
        yield from (
            f"{name}: {fields[name]} in config.json, which {family} does not have" for name in names
        )
        return
    bases = {"rope_theta": fields["rope_theta"]} if "rope_theta" in fields else {}
    for name, value in _rope_dicts(fields).items():
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            yield f"rope_type: {kind} in config.json, which the model does not have"
            continue
        bases |= {f"{name}.rope_theta": value["rope_theta"]} if "rope_theta" in value else {}
        plain_fields = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
        for inner in sorted(value.keys() - plain_fields):
            if value[inner] is not None and (inner, value[inner]) != ("partial_rotary_factor", 1.0):
                yield f"{name}.{inner}: {value[inner]} in config.json, which the model does not have"
    for name in ROPE:
        if name in fields and not isinstance(fields[name], Mapping):
            yield f"{name}: {fields[name]} in config.json, which is no object"
    if len(set(bases.values())) > 1:
        yield (
            "; ".join(f"{name}: {base}" for name, base in bases.items())
            + " in config.json, which disagree"
        )


def _compare_others(model: Any, family: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Lines about fields without a counterpart in the model, unless their value is supported."""
    model_fields = build_config(model, family, "").keys()
    aliases = set(ALIASES[family].values())
    for name, value in sorted(fields.items()):
        if name in HARMLESS or name in aliases or name in ROPE or name == "rope_theta":
            continue
        if name == "architectures":
            yield from _compare_architectures(family, value)
        elif name == "auto_map":
            custom = [k for k in value if "Tokenizer" not in k and "Processor" not in k]
            if custom:
                yield f"auto_map: {', '.join(custom)} in config.json: code of its own, which is unknown"
        elif name == "sliding_window":
            if not (isinstance(value, int) and value >= getattr(model, "length", 0)):
                yield (
                    f"sliding_window: {value} in config.json, but the model attends to all of"
                    f" model.length={model.length}"
                )
        elif name == "layer_types":
            if set(value) != {"full_attention"}:
                yield f"layer_types: {value} in config.json, but every layer of the model is full_attention"
        elif name in model_fields:
            continue  # compared with the model
        elif name in SUPPORTED:
            if value not in SUPPORTED[name]:
                supported = " or ".join(map(str, SUPPORTED[name]))
                yield f"{name}: {value} in config.json, but the model computes that of {supported}"
        else:
            names = {*HARMLESS, *model_fields, *SUPPORTED}
            yield (
                f"{name}: {value} in config.json, a field that is unknown.{closest(name, names)} Take it out"
                " if the model computes the same without it"
            )


def _compare_architectures(family: str, value: Any) -> Iterator[str]:
    names = value if isinstance(value, list) else [value]
    foreign = [name for name in names if not str(name).lower().startswith(family)]
    if foreign:
        yield f"architectures: {', '.join(map(str, foreign))} in config.json, which is not of {family}"
