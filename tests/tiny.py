"""Small random models of every type of transformers' causal-LM and classification mappings.

A wrong cut must not pass because a term is neutral, so nothing here is: multipliers differ from
one, soft caps bite, sliding windows are shorter than the input, layer types alternate, norms and
biases are re-drawn, and the dimensions differ from each other where the family allows it.

Run as a script, it tries every type and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import signal
import time
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

Task = Literal["causal-lm", "sequence-classification"]
Padding = Literal["none", "right", "left"]

CAUSAL_TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSIFICATION_TYPES: list[str] = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

VOCABULARY = 97
HIDDEN = 48
HEADS = 4
KV_HEADS = 2
NUM_LABELS = 3
PAD, BOS, EOS = 0, 1, 2
FIRST_ORDINARY_ID = 12  # ids below are special
LAST_ORDINARY_ID = 80  # ids above are placeholders of images, audio, ...


class NotBuildable(Exception):
    """A type that has no small random model here; the message is the reason, in one line."""


def _names(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Config field -> value, applied to every config that declares the field.
_GENERIC: dict[str, Any] = {
    **_names(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_names(HIDDEN, "hidden_size d_model n_embd dim emb_dim"),
    **_names(40, "embedding_size input_embedding_size"),
    **_names(44, "output_embedding_size prediction_head_size"),
    **_names(
        76,
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff "
        "hidden_dim n_inner feed_forward_size ffn_hidden_size",
    ),
    **_names(68, "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    **_names(28, "moe_intermediate_size expert_ffn_hidden_size"),
    **_names(
        36,
        "shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    ),
    **_names(
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads",
    ),
    **_names(KV_HEADS, "num_key_value_heads num_kv_heads"),
    **_names(16, "head_dim d_head d_kv kv_channels dim_head attention_head_size"),
    # latent attention and its indexers
    **_names(8, "qk_rope_head_dim"),
    **_names(10, "qk_nope_head_dim"),
    **_names(14, "v_head_dim"),
    **_names(22, "q_lora_rank"),
    **_names(18, "kv_lora_rank"),
    **_names(5, "index_topk"),
    **_names(20, "index_head_dim"),
    **_names(4, "index_n_heads"),
    # mixtures of experts
    **_names(10, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_names(3, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **_names(1, "first_k_dense_replace num_dense_layers"),
    **_names(2, "n_group"),
    **_names(2, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_names(1, "topk_group"),
    # state spaces and linear attention
    **_names(5, "mamba_d_state state_size ssm_state_size"),
    **_names(3, "mamba_d_conv conv_kernel linear_conv_kernel_dim conv1d_width conv_L_cache"),
    **_names(3, "short_conv_kernel_size ple_conv_kernel_size"),
    **_names(2, "mamba_expand expand"),
    **_names(12, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_names(8, "mamba_d_head mamba_head_dim"),
    **_names(3, "mamba_n_groups n_groups mamba_ngroups"),
    **_names(4, "mamba_chunk_size chunk_size"),
    **_names(7, "mamba_dt_rank time_step_rank"),
    **_names(2, "linear_num_key_heads"),
    **_names(4, "linear_num_value_heads linear_num_heads"),
    **_names(10, "linear_key_head_dim linear_head_dim"),
    **_names(14, "linear_value_head_dim"),
    # windows
    **_names(4, "sliding_window attention_window_size window_size sliding_window_size"),
    **_names(6, "local_attention keep_window_size"),
    **_names(4, "attention_chunk_size"),
    **_names(True, "use_sliding_window"),
    **_names(1, "max_window_layers"),
    # positions
    **_names(
        71,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_source_positions max_target_positions original_max_position_embeddings",
    ),
    **_names(8, "relative_attention_num_buckets num_buckets position_bias_num_buckets"),
    **_names(
        20, "relative_attention_max_distance relative_max_distance position_bias_max_distance"
    ),
    **_names(3, "type_vocab_size"),
    **_names(8, "rotary_dim"),
    **_names(100.0, "rope_theta"),
    # multipliers
    **_names(1.7, "embedding_multiplier"),
    **_names(1.3, "logits_scaling"),
    **_names(0.7, "residual_multiplier"),
    **_names(0.3, "attention_multiplier"),
    **_names(0.6, "logit_scale"),
    **_names(4.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    **_names(3.0, "attn_logit_softcapping"),
    **_names(13, "query_pre_attn_scalar"),
    **_names(1.4, "routed_scaling_factor route_scale moe_routed_scaling_factor"),
    **_names(1.4, "router_scaling_factor"),
    **_names(True, "scale_embedding mup_enabled"),
    **_names(0.8, "lm_head_multiplier"),
    **_names(1.2, "key_multiplier"),
    **_names(0.9, "attention_out_multiplier"),
    **_names(1.1, "attention_in_multiplier"),
    **_names(1.15, "ssm_in_multiplier"),
    **_names(0.85, "ssm_out_multiplier"),
    **_names((0.9, 1.2), "mlp_multipliers"),
    **_names((0.9, 1.1, 1.2, 0.8, 1.3), "ssm_multipliers"),
    **_names(1.7, "scale_emb"),
    **_names(1.4, "scale_depth"),
    **_names(32, "dim_model_base"),
    **_names(0.6, "attention_value_scale"),
    **_names(2.0, "clip_qkv"),
    **_names(3, "log_scaling_n_floor floor_scale"),
    **_names(0.3, "log_scaling_alpha attn_scale"),
}


def _overrides(model_type: str, task: Task, layers: int) -> dict[str, Any]:
    """Returns the fields that the generic rule cannot guess.

    Args:
        model_type: A model type of transformers.
        task: The task of the model.
        layers: How many layers the model has.
    """
    half = layers // 2
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    dense_sparse = ["sparse" if i % 3 else "dense" for i in range(layers)]
    linear_full = _alternate("linear_attention", "full_attention", layers)
    full_sliding = _alternate("full_attention", "sliding_attention", layers)
    sliding_full = _alternate("sliding_attention", "full_attention", layers)
    hybrid_linear = _alternate("hybrid", "linear_attention", layers)
    if layers < 3:  # the shared block must be shared
        hybrid_linear = ["hybrid"] * layers
    gemma4 = {
        "hidden_size_per_layer_input": 11,
        "num_kv_shared_layers": 2 if layers >= 4 else 0,
        "global_head_dim": 20,
        "use_double_wide_mlp": True,
    }
    inkling = {
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 10,
        "d_rel": 6,
        "rel_extent": 5,
        "conv_kernel_size": 3,
        "unpadded_vocab_size": 91,
    }
    gemma3n = {
        "hidden_size_per_layer_input": 11,
        "num_kv_shared_layers": 2 if layers >= 4 else 0,
        "laurel_rank": 9,
        "altup_num_inputs": 3,
        "activation_sparsity_pattern": [0.0 if i % 3 else 0.5 for i in range(layers)],
    }
    qwen4_exp = {
        "layer_types": _alternate("linear_attention", "indexed_attention", layers),
        "hc_count": 3,
        "hc_lowrank": 9,
        "ple_layer_ids": [1, 3] if layers >= 3 else [1],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 20,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    }
    llama4 = {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2}
    layout = {"coordinate_size": 7, "shape_size": 10, "max_2d_position_embeddings": 30}
    deberta = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 9,
    }
    dots3_note = {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 26,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 10,
        "swa_v_head_dim": 12,
    }
    deepseek_v4_types = (
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "sliding_attention",
    )
    table: dict[str, dict[str, Any]] = {
        "albert": {"num_hidden_groups": 3},
        "bailing_hybrid": {"head_dim": 10, "layer_types": linear_full},
        "bamba": {"attn_layer_indices": list(range(1, layers, 2))},
        "big_bird": {"attention_type": "original_full"},
        "bigbird_pegasus": {"attention_type": "original_full"},
        "blt": {
            "use_cache": False,
            "patching_threshold": 4.0,
            "local_attention_window_len": 4,
            "encoder_hash_byte_group_size": [3, 4],
            "encoder_hash_byte_group_vocab": 31,
            "encoder_config": {"hidden_size": 40, "hidden_size_global": HIDDEN},
            "decoder_config": {"hidden_size": 40, "hidden_size_global": HIDDEN},
            "patcher_config": {"hidden_size": 32},
        },
        "canine": {
            "num_hash_buckets": 101,
            "num_hash_functions": 4,
            "local_transformer_stride": 4,
        },
        "cohere2_moe": {
            "num_shared_experts": 2,
            "rope_theta": 100.0,
            "mlp_layer_types": dense_sparse,
        },
        "cohere_compass_text": {
            "layer_types": sliding_full,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "default", "rope_theta": 150.0},
            },
        },
        "convbert": {"conv_kernel_size": 3},
        "cpmant": {"prompt_length": 5, "prompt_types": 7, "segment_types": 9},
        "dbrx": {
            "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 2.0, "rope_theta": 100.0},
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": 28,
                "moe_num_experts": 10,
                "moe_top_k": 3,
            },
        },
        "deberta": deberta,
        "deberta-v2": deberta,
        "deepseek_v4": {
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
            "layer_types": [deepseek_v4_types[i % 3] for i in range(layers)],
            "mlp_layer_types": ["moe" if i % 3 else "hash_moe" for i in range(layers)],
            "partial_rotary_factor": 0.5,
            "compress_rope_theta": 200.0,
            "hc_mult": 3,
            "o_groups": 2,
            "o_lora_rank": 9,
            "index_topk": 2,
            "swiglu_limit": 1.5,
            "num_key_value_heads": 1,
        },
        "dots1": {"layer_types": full_sliding},
        "dots3_note": {"text_config": dots3_note},
        "dots3_note_text": dots3_note,
        "ernie": {"use_task_id": True},
        "esm": {"position_embedding_type": "rotary", "emb_layer_norm_before": True},
        "esmc": {"num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS},
        "falcon_h1": {
            "mamba_d_ssm": 96,
            "mlp_multipliers": [0.9, 1.2],
            "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.3],
        },
        "flaubert": {"pad_index": PAD, "bos_index": BOS, "eos_index": EOS},
        "flint": {"layer_types": full_sliding, "mlp_only_layers": [2]},
        "funnel": {"block_sizes": [layers - 2 * (layers // 3), layers // 3, layers // 3]},
        "gemma3n": {"text_config": gemma3n},
        "gemma3n_text": gemma3n,
        "gemma4": {"text_config": gemma4 | {"enable_moe_block": True}},
        "gemma4_text": gemma4 | {"enable_moe_block": True},
        "git": {"num_image_with_embedding": 0},
        "glm4_moe": {"use_qk_norm": True},
        "gpt_neo": {"attention_types": [[["global", "local"], half], [["global"], layers % 2]]},
        "granite_swa": {
            "layer_types": sliding_full,
            "layer_rope_theta": [50.0 + 20 * i for i in range(layers)],
        },
        "granitemoe_swa": {
            "layer_types": sliding_full,
            "layer_rope_theta": [50.0 + 20 * i for i in range(layers)],
        },
        "granitemoehybrid": {"layer_types": linear_full, "position_embedding_type": "rope"},
        "helium": {"head_dim": HIDDEN // HEADS},
        "hy_v4": {"hc_mult": 3, "swiglu_limit": 1.5, "learnable_sink_init": 0.3},
        "inkling2_text": inkling
        | {
            "n_layers_per_attn_res_block": 2,
            "qk_l2_clip_threshold": 2.0,
            "rel_l2_clip_threshold": 1.5,
            "mlp_gate_softcap": 1.5,
            "mlp_up_softcap": 2.0,
        },
        "inkling_text": inkling
        | {"logits_mup_width_multiplier": 1.7, "mlp_layer_types": dense_sparse},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        | {"expert_layer_period": 3, "expert_layer_offset": 1},
        "kimi_linear": {"layer_types": linear_full},
        "laguna": {
            "layer_types": full_sliding,
            "num_attention_heads_per_layer": [8 if i % 2 else 4 for i in range(layers)],
            "moe_router_logit_softcapping": 2.0,
        },
        "layoutlm": {"max_2d_position_embeddings": 30},
        "layoutlmv2": layout,
        "layoutlmv3": layout | {"visual_embed": False},
        "lfm2": {
            "layer_types": _alternate("conv", "full_attention", layers),
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
        },
        "lfm2_moe": {"layer_types": _alternate("conv", "full_attention", layers)},
        "lfm3": {
            "layer_types": [
                ("full_attention", "conv", "sliding_attention")[i % 3] for i in range(layers)
            ],
        },
        "lilt": {"max_2d_position_embeddings": 30},
        "llama4": {"text_config": llama4},
        "llama4_text": llama4,
        "longcat_flash": {"zero_expert_num": 4},
        "longformer": {"attention_window": [4] * layers},
        "luke": {"entity_vocab_size": 23, "entity_emb_size": 20},
        "mamba2": {"num_heads": 12, "head_dim": 8},
        "markuplm": {
            "max_xpath_tag_unit_embeddings": 13,
            "max_xpath_subs_unit_embeddings": 17,
            "tag_pad_id": 3,
            "subs_pad_id": 5,
            "xpath_unit_hidden_size": 7,
            "max_depth": 5,
        },
        "mellum": {"layer_types": sliding_full, "mlp_layer_types": dense_sparse},
        "ministral": {"layer_types": sliding_full},
        "minimax": {
            "block_size": 4,
            "full_attn_alpha_factor": 1.2,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.3,
            "linear_attn_beta_factor": 0.7,
            "mlp_alpha_factor": 1.1,
            "mlp_beta_factor": 0.9,
        },
        "minimax_m3_vl_text": {
            "layer_types": _alternate("full_attention", "minimax_m3_sparse", layers),
            "mlp_layer_types": dense_sparse,
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "swiglu_limit": 1.5,
        },
        "mllama": {"text_config": {"cross_attention_layers": [3]}},
        "mobilebert": {
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 2,
            "normalization_type": "layer_norm",  # without, its pooler saturates: no gradients
        },
        "mpnet": {"relative_attention_num_buckets": 32},
        "mpt": {"attn_config": {"softmax_scale": 0.3}},
        "nemotron_h": {
            "layers_block_type": [
                ("full_attention", "moe", "linear_attention", "mlp")[i % 4] for i in range(layers)
            ],
            "use_mamba_kernels": False,
            "moe_latent_size": 20,
        },
        "nystromformer": {"conv_kernel_size": 3},
        "olmo_hybrid": {"linear_num_key_heads": 4},
        "perceiver": {
            "num_latents": 13,
            "d_latents": 40,
            "num_self_attends_per_block": layers,
            "num_self_attention_heads": HEADS,
            "num_cross_attention_heads": HEADS,
        },
        "phimoe": {"lm_head_bias": True},
        "qwen2_moe": {"mlp_only_layers": [2]},
        "qwen3_moe": {"mlp_only_layers": [2]},
        "qwen3_5": {"text_config": {"layer_types": linear_full}},
        "qwen3_5_moe": {"text_config": {"layer_types": linear_full}},
        "qwen3_5_moe_text": {"layer_types": linear_full},
        "qwen3_5_text": {"layer_types": linear_full},
        "qwen3_next": {"layer_types": linear_full, "mlp_only_layers": [2]},
        "qwen4_exp": {"text_config": qwen4_exp},
        "qwen4_exp_text": qwen4_exp,
        "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 56},
        "reformer": {
            "attn_layers": _alternate("local", "lsh", layers),
            "axial_pos_embds": False,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "hash_seed": 0,
            "num_buckets": 2,
        },
        "roc_bert": {
            "pronunciation_embed_dim": 20,
            "pronunciation_vocab_size": 101,
            "shape_embed_dim": 24,
            "shape_vocab_size": 103,
        },
        "rwkv": {"rescale_every": 2},
        "smollm3": {"no_rope_layer_interval": 2},
        "squeezebert": {"embedding_size": HIDDEN},
        "stablelm": {"rope_parameters": rope},
        "t5": {"decoder_start_token_id": PAD},
        "xlm": {"causal": task == "causal-lm"},
        "xlnet": {"d_head": HIDDEN // HEADS},
        "xlstm": {"hidden_size": 128, "ffn_round_up_to_multiple_of": 8, "use_cache": False},
        "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
        "zamba": {
            "layers_block_type": hybrid_linear,
            "use_mamba_kernels": False,
            "num_key_value_heads": HEADS,
        },
        "zamba2": {
            "layers_block_type": hybrid_linear,
            "use_mamba_kernels": False,
            "num_key_value_heads": HEADS,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 9,
            "use_mem_rope": True,
        },
        "zaya": {
            "layer_types": _alternate("hybrid", "hybrid_sliding", layers),
            "num_experts_per_tok": 1,
            "router_hidden_size": 20,
        },
    }
    return table.get(model_type, {})


def _alternate(first: str, second: str, layers: int) -> list[str]:
    return [second if i % 2 else first for i in range(layers)]


def _is_dropout(name: str, default: Any) -> bool:
    words = ("dropout", "pdrop", "layerdrop", "jitter")
    numeric = default is None or (isinstance(default, int | float) and default is not True)
    return any(word in name for word in words) and numeric and default is not False


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _layer_counts(layers: int) -> dict[str, int]:
    return _names(
        layers,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers",
    )


def _special_id(name: str, next_id: int) -> int:
    if name.startswith("pad"):
        return PAD
    if name.startswith("bos"):
        return BOS
    if name.startswith("eos"):
        return EOS
    return next_id


def _fields(config_class: type[PreTrainedConfig], layers: int) -> dict[str, Any]:
    """Returns the constructor arguments of a small config, by the generic rule.

    Args:
        config_class: The config class.
        layers: How many layers the model has.
    """
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    arguments: dict[str, Any] = {}
    text_id, media_id = 3, LAST_ORDINARY_ID + 1
    counts = _layer_counts(layers)
    names = {field.name for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(config_class):
        name, default = field.name, _default(field)
        if name in base or name in _sub_configs(config_class):
            continue
        if name in counts:
            arguments[name] = counts[name]
        elif name == "num_key_value_heads" and "kv_lora_rank" in names:
            arguments[name] = HEADS
        elif name == "head_dim" and "qk_rope_head_dim" in names:
            arguments[name] = _GENERIC["qk_rope_head_dim"]
        elif name in ("n_group", "topk_group") and default is None:
            continue
        elif name in _GENERIC:
            arguments[name] = _GENERIC[name]
        elif name.endswith(("_token_id", "_token_index")):
            media = not name.startswith(("pad", "bos", "eos", "sep", "cls", "mask", "decoder"))
            arguments[name] = _special_id(name, media_id if media else text_id)
            text_id, media_id = text_id + (not media), media_id + media
        elif _is_dropout(name, default):
            arguments[name] = 0.0
    for name, spec in _sub_configs(config_class).items():
        if spec.optional:
            continue
        arguments[name] = _construct(_sub_class(spec), layers, {})
    return arguments


def _sub_configs(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Returns the configs within a config; the oldest supported transformers knows classes only."""
    found: dict[str, Any] | None = getattr(config_class, "sub_configs_defaults", None)
    if found is not None:
        return found
    return {
        name: SimpleNamespace(
            config_class=cls, model_type=getattr(cls, "model_type", ""), optional=False
        )
        for name, cls in config_class.sub_configs.items()
    }


def _sub_class(spec: Any) -> type[PreTrainedConfig]:
    known = issubclass(spec.config_class, PreTrainedConfig)
    return spec.config_class if known else CONFIG_MAPPING[spec.model_type]


def _head_dim(config: PreTrainedConfig) -> int:
    try:
        return getattr(config, "head_dim", None) or HIDDEN // HEADS
    except (AttributeError, RuntimeError):  # it varies across layers
        return 2 * HIDDEN


def _small_theta(rope: Any, head_dim: int) -> Any:
    """Returns RoPE parameters with small bases, a different one for each kind of layer.

    Args:
        rope: The RoPE parameters, nested or not.
        head_dim: Size of a head, of which the rotated part must be even.
    """
    if not isinstance(rope, dict):
        return rope
    changed, base = dict(rope), 50.0
    for name, value in rope.items():
        if isinstance(value, dict):
            changed[name] = _small_theta(value, head_dim)
            if "rope_theta" in value:
                changed[name]["rope_theta"] = base
                base *= 3
        elif name == "rope_theta":
            changed[name] = 100.0
        elif name == "partial_rotary_factor" and int(head_dim * (value or 1)) % 2:
            changed[name] = 0.5
    return changed


def _construct(
    config_class: type[PreTrainedConfig], layers: int, overrides: dict[str, Any]
) -> PreTrainedConfig:
    """Constructs a small config: once to learn its derived fields, then with them changed.

    Args:
        config_class: The config class.
        layers: How many layers the model has.
        overrides: Fields on top of the generic rule.
    """
    overrides = dict(overrides)
    for name, spec in _sub_configs(config_class).items():
        if isinstance(overrides.get(name), dict):
            overrides[name] = _construct(_sub_class(spec), layers, overrides[name])
    config = config_class(**(_fields(config_class, layers) | overrides))
    declared = {field.name for field in dataclasses.fields(config_class)}
    changed: dict[str, Any] = {}
    types = getattr(config, "layer_types", None)
    if "layer_types" in declared and "layer_types" not in overrides and types:
        kinds = list(dict.fromkeys(types))
        if len(kinds) == 2:
            changed["layer_types"] = _alternate(kinds[0], kinds[1], layers)
    kinds_of_mlp = getattr(config, "mlp_layer_types", None)
    mixed = set(kinds_of_mlp or ()) == {"dense", "sparse"}
    if "mlp_layer_types" in declared and "mlp_layer_types" not in overrides and mixed:
        changed["mlp_layer_types"] = ["sparse" if i % 3 else "dense" for i in range(layers)]
    rope = getattr(config, "rope_parameters", None)
    if "rope_parameters" in declared and "rope_parameters" not in overrides and rope:
        changed["rope_parameters"] = _small_theta(rope, _head_dim(config))
    if not changed:
        return config
    return config_class(**(_fields(config_class, layers) | overrides | changed))


# Types that cannot be built or run from ids alone, and why.
_IMPOSSIBLE: dict[tuple[str, Task], str] = {
    ("gemma4_assistant", "causal-lm"): "needs the embeddings and keys of the model it assists",
    ("gemma4_unified_assistant", "causal-lm"): (
        "needs the embeddings and keys of the model it assists"
    ),
    ("musicgen", "causal-lm"): "AutoModelForCausalLM hands its decoder the composite config",
    ("musicgen_melody", "causal-lm"): "AutoModelForCausalLM hands its decoder the composite config",
    ("layoutlmv2", "sequence-classification"): "needs detectron2 and images",
}


def _model_class(config_class: type[PreTrainedConfig], task: Task) -> type[PreTrainedModel]:
    """Returns the model class of a config class, which may be the text config of a mapped one."""
    causal = task == "causal-lm"
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if config_class not in mapping:
        for whole in mapping:
            spec = _sub_configs(whole).get("text_config")
            if spec is not None and spec.config_class is config_class:
                config_class = whole
                break
    found: Any = mapping[config_class]
    return found[0] if isinstance(found, list | tuple) else found


def _text_type(model_type: str) -> str:
    """Returns the type that stands for a type of AutoModelForCausalLM: itself, or its text model.

    Args:
        model_type: A model type of the causal-LM mapping.

    Raises:
        NotBuildable: The type is multimodal, and its text model belongs to another type.
    """
    config_class = CONFIG_MAPPING[model_type]
    spec = _sub_configs(config_class).get("text_config")
    if spec is None:
        return model_type
    model_class = _model_class(config_class, "causal-lm")
    own = spec.model_type.startswith(model_type) and spec.model_type in CAUSAL_TYPES
    if getattr(model_class, "config_class", None) is spec.config_class:
        return spec.model_type if own else model_type  # the automatic class takes the text config
    if not model_class.__name__.endswith("ForConditionalGeneration"):
        return model_type
    if own:
        return spec.model_type
    raise NotBuildable(f"multimodal; its text model is of type {spec.model_type}")


def tiny_config(
    model_type: str,
    *,
    task: Task = "causal-lm",
    num_layers: int = 6,
    composite: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Returns a small config without neutral constants.

    A multimodal causal type gives the config of its text model, where the causal mapping has it.

    Args:
        model_type: A model type of the task's mapping.
        task: The task of the model.
        num_layers: How many layers the model has.
        composite: Give the whole config of a multimodal causal type instead.
        fields: Fields of the config that are to be other than they would be.

    Raises:
        NotBuildable: No small model of this type can be built.
    """
    causal = task == "causal-lm"
    if model_type not in (CAUSAL_TYPES if causal else CLASSIFICATION_TYPES):
        raise NotBuildable(f"{model_type} is not in the {task} mapping")
    if (model_type, task) in _IMPOSSIBLE:
        raise NotBuildable(_IMPOSSIBLE[model_type, task])
    if causal and not composite:
        model_type = _text_type(model_type)
    config_class = CONFIG_MAPPING[model_type]
    overrides = _overrides(model_type, task, num_layers) | dict(fields or {})
    overrides.setdefault("num_labels", NUM_LABELS)
    declared = {field.name for field in dataclasses.fields(config_class)}
    if causal and "is_decoder" in declared:
        overrides.setdefault("is_decoder", True)
    try:
        return _construct(config_class, num_layers, overrides)
    except Exception as error:
        raise NotBuildable(f"config: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]


def _redraw(model: PreTrainedModel, seed: int) -> None:
    """Draws every parameter anew, so that no norm, bias or gate is neutral.

    Args:
        model: The model, changed in place.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        value = parameter.detach().float()
        leaf = name.rsplit(".", 1)[-1]
        constant = value.numel() > 0 and bool((value == value.flatten()[0]).all())
        if constant:
            new = value + noise(value, 0.1 if leaf.endswith("bias") else 0.2)
        elif value.ndim < 2 or any(word in leaf for word in ("A_log", "dt_bias", "decay")):
            new = value + noise(value, 0.1)
        else:
            new = noise(value, 0.2)
        parameter.data.copy_(new)
    if model.config.model_type in ("funnel", "youtu"):  # loading one zeroes this row
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data[PAD] = 0
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in persistent or not buffer.is_floating_point() or buffer.numel() == 0:
            continue
        value = buffer.detach().float()
        first = value.flatten()[0]
        if bool((value == first).all()) and abs(first) <= 1:
            buffer.data.copy_(value + noise(value, 0.1))


def tiny_model(
    model_type: str,
    *,
    task: Task = "causal-lm",
    num_layers: int = 6,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    seed: int = 0,
    composite: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Builds a small random model, in evaluation mode.

    Args:
        model_type: A model type of the task's mapping.
        task: The task of the model.
        num_layers: How many layers the model has.
        dtype: The type of its parameters.
        attn_implementation: The attention implementation; the model's default if None.
        seed: Seed of its parameters.
        composite: Build the whole model of a multimodal causal type.
        fields: Fields of its config that are to be other than they would be.

    Raises:
        NotBuildable: No small model of this type can be built.
    """
    given: Any = {"composite": composite, "fields": fields}
    config = tiny_config(model_type, task=task, num_layers=num_layers, **given)
    causal = task == "causal-lm"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = auto.from_config(config, **options)
    except Exception as error:
        raise NotBuildable(_one_line(error)) from error
    _redraw(model, seed)
    return model.eval()


def tiny_batch(
    config: PreTrainedConfig,
    *,
    task: Task,
    padding: Padding,
    batch: int = 3,
    tokens: int = 11,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns a batch for a model of `tiny_model`.

    Args:
        config: The config of the model.
        task: The task of the model.
        padding: "none" (no attention mask), or the side that is padded: the first row is full,
            the second is padded by four tokens, the third by two, and so on.
        batch: How many rows.
        tokens: How many tokens a row has.
        seed: Seed of the ids and of the labels.
    """
    if config.model_type == "reformer":
        tokens += -tokens % 4  # it trains on whole chunks only
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ORDINARY_ID, LAST_ORDINARY_ID, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padding != "none":
        for row in range(batch):
            count = (0, 4, 2)[row % 3]
            if count:
                mask[row, slice(-count, None) if padding == "right" else slice(0, count)] = 0
    if task != "causal-lm":
        last = (mask * torch.arange(tokens)).argmax(1)
        ids[torch.arange(batch), last] = EOS
    ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"input_ids": ids}
    if padding != "none":
        inputs["attention_mask"] = mask
    accepted = inspect.signature(_model_class(type(config), task).forward).parameters
    if padding == "left" and "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if task == "causal-lm":
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    else:
        inputs["labels"] = torch.randint(0, NUM_LABELS, (batch,), generator=generator)
    return inputs


def _losses_and_gradients(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients


def check(model_type: str, task: Task) -> tuple[str, float]:
    """Builds one type and trains it one step on every padding.

    Args:
        model_type: A model type of the task's mapping.
        task: The task of the model.

    Returns:
        "ok", or what went wrong in one line; and the seconds that building took.
    """
    start = time.perf_counter()
    try:
        model = tiny_model(model_type, task=task).train()
    except NotBuildable as error:
        return f"not buildable: {error}", time.perf_counter() - start
    seconds = time.perf_counter() - start
    findings: list[str] = []
    for padding in ("none", "right", "left"):
        try:
            inputs = tiny_batch(model.config, task=task, padding=padding)
            loss, gradients = _losses_and_gradients(model, inputs)
        except Exception as error:
            findings.append(f"{padding}: {_one_line(error)}")
            continue
        bad = [name for name, grad in gradients.items() if not bool(torch.isfinite(grad).all())]
        if not bool(torch.isfinite(loss)):
            findings.append(f"{padding}: loss {loss}")
        elif bad:
            findings.append(f"{padding}: gradient of {bad[0]} is not finite ({len(bad)})")
        elif not gradients:
            findings.append(f"{padding}: no gradients")
        else:
            again, gradients_again = _losses_and_gradients(model, inputs)
            same = bool(again == loss) and gradients.keys() == gradients_again.keys()
            if not same or any(
                not torch.equal(grad, gradients_again[name]) for name, grad in gradients.items()
            ):
                findings.append(f"{padding}: not deterministic")
    return "; ".join(findings) or "ok", seconds


def _alarm(*_: Any) -> None:
    raise TimeoutError("took longer than 30 s")


def main() -> None:
    """Prints what becomes of every type, for both tasks or for the types that are named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--task", choices=("causal-lm", "sequence-classification"))
    parser.add_argument("types", nargs="*", help="model types; every type if none")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _alarm)
    tasks: dict[Task, list[str]] = {
        "causal-lm": CAUSAL_TYPES,
        "sequence-classification": CLASSIFICATION_TYPES,
    }
    for task, types in tasks.items():
        if arguments.task not in (None, task):
            continue
        chosen = [name for name in types if not arguments.types or name in arguments.types]
        good = 0
        for name in chosen:
            start = time.perf_counter()
            signal.alarm(30)
            try:
                verdict, seconds = check(name, task)
            except Exception as error:
                verdict, seconds = _one_line(error), time.perf_counter() - start
            finally:
                signal.alarm(0)
            total = time.perf_counter() - start
            good += verdict == "ok"
            print(f"{task:<24} {name:<28} {seconds:6.2f} {total:6.2f}  {verdict}", flush=True)
        print(f"{task}: {good} of {len(chosen)} ok", flush=True)


if __name__ == "__main__":
    main()
