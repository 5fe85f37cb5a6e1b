"""Fields of config.json that change no output, and those of which one value is computed."""

from __future__ import annotations

from typing import Any

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
        "max_position_embeddings", "n_ctx", "cache_implementation",
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
    "position_embedding_type": ("absolute",),
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
SAME = {  # "gelu" is the exact one, by erf
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# Fields whose null means none; elsewhere it means the default.
NULLABLE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
