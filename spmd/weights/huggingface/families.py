"""The families of decoders at Hugging Face: a row for each, config.json against a Transformer's fields."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from spmd.core.fields import check
from spmd.models.transformer import Transformer

Windows = Literal["none", "all", "layers"]
FREE = object()  # a field that config.json gives

# Fields of a Transformer with the values that most families compute.
COMMON: dict[str, Any] = {
    "norm": "rms",
    "norm_at": "input",
    "norm_offset": 0.0,
    "activation": "swiglu",
    "position": "rope",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
    "qk_norm_over": "head",
    "score_width": 0,
    "score_cap": 0.0,
    "logit_cap": 0.0,
    "embed_scale": False,
    "rope_theta_window": 0.0,
    "mask": "causal",
    "experts.num": 0,
    "experts.shared": 0,
    "experts.bias_rate": 0.0,
    "experts.every": 1,
}
# Field of config.json -> field of a Transformer.
SIZES = {
    "vocab_size": "vocab",
    "tie_word_embeddings": "tied",
    "max_position_embeddings": "length",
    "hidden_size": "embed",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp",
    "rms_norm_eps": "norm_epsilon",
}
DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders."""

    architecture: str
    """Name of the class at Hugging Face."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of a Transformer with the value that the family computes where it is not that of COMMON."""
    sizes: Mapping[str, str] = dataclasses.field(default_factory=lambda: SIZES)
    """Fields of config.json, with the field of a Transformer that each gives."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    """Further fields of config.json, with the value that is computed."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Defaults of the class for fields that config.json does not have, beside DEFAULTS."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names that transformers reads as the first."""
    ignored: Sequence[str] = ()
    """Fields of config.json that change nothing in this family."""
    windows: Windows = "none"
    """Layers with a window, if config.json has one: none, all, or those of layer_types."""
    window_period: int = 0
    """Default pattern: each last one of this many layers has no window."""
    window_theta: float = 0.0
    """Default base of the rotary angles of layers with a window; 0 is that of all layers."""
    theta: float = 10_000.0
    """Default base of the rotary angles; 0 is no rotary positions."""
    experts: tuple[str, Mapping[str, str]] | None = None
    """Name of the mixture in a layer's tensors, and names of the matrices of its experts."""

    def field(self, name: str) -> Any:
        """The value of a field of Transformer in this family, or FREE."""
        return {**COMMON, **self.model}.get(name, FREE)


QWEN = (
    "sliding_window",
    "max_window_layers",
)  # read with use_sliding_window only, which is refused
GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
GEMMA = {
    "norm_at": "both",
    "norm_offset": 1.0,
    "activation": "geglu",
    "embed_scale": True,
    "score_width": FREE,
    "score_cap": FREE,
    "logit_cap": FREE,
}
GEMMA_SIZES = SIZES | {
    "query_pre_attn_scalar": "score_width",
    "attn_logit_softcapping": "score_cap",
    "final_logit_softcapping": "logit_cap",
}
GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA = SEVEN_B | {"intermediate_size": 11008, "num_key_value_heads": None}
QWEN_7B = SEVEN_B | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        model={
            "norm": "layer",
            "activation": "gelu",
            "position": "learned",
            "bias": True,
            "kv_heads": "heads",
        },
        sizes={
            "vocab_size": "vocab",
            "tie_word_embeddings": "tied",
            "n_positions": "length",
            "n_embd": "embed",
            "n_layer": "layers",
            "n_head": "heads",
            "n_inner": "mlp",
            "layer_norm_epsilon": "norm_epsilon",
            "embd_pdrop": "dropout",
            "resid_pdrop": "dropout",
        },
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "attn_pdrop": 0.0,
        },
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "tie_word_embeddings": True,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
        },
        aliases={
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
        },
        theta=0.0,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        model={"bias": FREE},
        sizes=SIZES | {"attention_bias": "bias", "mlp_bias": "bias"},
        defaults=LLAMA | {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=SEVEN_B | {"sliding_window": 4096},
        windows="all",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        model={"experts.num": FREE},
        sizes=SIZES
        | {
            "num_local_experts": "experts.num",
            "num_experts_per_tok": "experts.top_k",
            "router_aux_loss_coef": "experts.balance",
        },
        defaults=SEVEN_B | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
        aliases={"num_local_experts": "num_experts"},
        windows="all",
        theta=1_000_000.0,
        experts=("block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        model={"qkv_bias": True},
        defaults=QWEN_7B,
        ignored=QWEN,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model={"qk_norm": True},
        defaults=QWEN_7B | {"head_dim": 128},
        ignored=QWEN,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        model={"qk_norm": True, "experts.num": FREE},
        sizes={name: to for name, to in SIZES.items() if to != "mlp"}
        | {
            "moe_intermediate_size": "mlp",
            "num_experts": "experts.num",
            "num_experts_per_tok": "experts.top_k",
            "router_aux_loss_coef": "experts.balance",
        },
        fixed={
            "hidden_act": "silu",
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        aliases={"num_experts": "num_local_experts"},
        ignored=(*QWEN, "intermediate_size"),  # of dense layers, which these models do not have
        experts=("mlp", GATED),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        model=GEMMA,
        sizes=GEMMA_SIZES,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        defaults=GEMMA_DEFAULTS
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        ignored=("hidden_act", "sliding_window_size"),
        windows="layers",
        window_period=2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        model=GEMMA | {"qk_norm": True, "rope_theta_window": FREE},
        sizes=GEMMA_SIZES,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        defaults=GEMMA_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072},
        ignored=("hidden_act", "_sliding_window_pattern", "sliding_window_pattern"),
        windows="layers",
        window_period=6,
        window_theta=10_000.0,
        theta=1_000_000.0,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        model={"norm_at": "output", "qk_norm": True, "qk_norm_over": "all"},
        defaults=LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5},
    ),
}


def value_of(model: Transformer, name: str) -> Any:
    """The value of a field as config.json has it: the size that 0 stands for, None for no cap."""
    value = operator.attrgetter(name)(model)
    derived = {
        "kv_heads": model.num_kv_heads,
        "head_dim": model.width,
        "mlp": model.mlp_width,
        "score_width": model.score_width or model.width,
        "score_cap": model.score_cap or None,
        "logit_cap": model.logit_cap or None,
    }
    return derived.get(name, value)


def family_of(model: Transformer, preferred: str = "") -> str:
    """A family that a model belongs to: the preferred one, if it does, or the first.

    Raises:
        ValueError: it belongs to none; with the fields that do not fit the nearest ones.
    """
    differ = {name: find_unfit(model, family) for name, family in FAMILIES.items()}
    fitting = [name for name, fields in differ.items() if not fields]
    if preferred in fitting:
        return preferred
    nearest = sorted(differ, key=lambda name: len(differ[name]))[:3]
    reasons = "; ".join(f"not {name} for {', '.join(differ[name])}" for name in nearest)
    check(
        bool(fitting),
        f"the model is of no family that Hugging Face weights are known of: {reasons}",
    )
    return fitting[0]


def find_unfit(model: Transformer, family: Family) -> list[str]:
    """The fields of a model, as `model.name=value`, that a family does not have."""
    unfit = []
    for name, value in {**COMMON, **family.model}.items():
        actual = value_of(model, name) if name == "kv_heads" else operator.attrgetter(name)(model)
        if value is not FREE and actual != (model.heads if value == "heads" else value):
            unfit.append(f"model.{name}={actual}")
    if family.experts is not None and not model.experts.num:
        unfit.append("model.experts.num=0")
    sizes = {size for size in model.window if size}
    uniform = len({*model.window}) <= 1
    fits = {"none": not sizes, "all": uniform, "layers": len(sizes) <= 1}
    if not fits[family.windows]:
        unfit.append(f"model.window={model.window}")
    if not family.theta and model.width * model.heads != model.embed:
        unfit.append(f"model.head_dim={model.head_dim}")
    return unfit
