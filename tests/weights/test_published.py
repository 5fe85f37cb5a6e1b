"""Published checkpoints: their config.json gives the model, which has the published number of parameters."""

from __future__ import annotations

import jax
import pytest

from spmd import tasks
from spmd.core import tree
from spmd.weights.huggingface import model

# What config.json at Hugging Face says beside the tokens, and the parameters of the safetensors there.
LLAMA_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_ROPE |= {"factor": 32.0, "original_max_position_embeddings": 8192}
CHECKPOINTS = {
    "Llama-3.2-1B": (
        "llama",
        1_235_814_400,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "pretraining_tp": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA_ROPE,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "attention_dropout": 0.0,
        },
    ),
    "Mistral-7B-v0.1": (
        "mistral",
        7_241_732_096,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        494_032_768,
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "use_mrope": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "hidden_act": "silu",
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        596_049_920,
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "hidden_act": "silu",
            "max_window_layers": 28,
            "sliding_window": None,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        30_532_122_624,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "mlp_only_layers": [],
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "rope_scaling": None,
        },
    ),
    "gemma-2-2b": (
        "gemma2",
        2_614_341_888,
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
            "cache_implementation": "hybrid",
            "attention_bias": False,
        },
    ),
    "gemma-3-1b-pt": (
        "gemma3_text",
        999_885_952,
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "use_cache": True,
        },
    ),
    "OLMo-2-1124-7B": (
        "olmo2",
        7_298_617_344,
        {
            "vocab_size": 100352,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000,
            "attention_bias": False,
            "hidden_act": "silu",
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
        },
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_checkpoint_has_its_number_of_parameters(name):
    family, size, fields = CHECKPOINTS[name]
    built, lines = model.from_fields(family, {"model_type": family, **fields})
    assert built is not None and not lines, lines
    params, _ = jax.eval_shape(tasks.LanguageModel().build(built).init, jax.random.key(0))
    assert tree.num_elements(params) == size
    if name == "gemma-3-1b-pt":
        assert built.window == (512,) * 5 + (0,) and built.rope_theta_window == 1e4
        assert built.windows[25 % 6] == 512 and built.score_width == 256
    if name == "Llama-3.2-1B":
        assert built.rope_scaling.factor == 32.0 and built.rope_scaling.length == 8192
