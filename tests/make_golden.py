"""Makes tests/golden/*.npz: a small random checkpoint of each architecture and the logits transformers gives,
and in dropped.npz its logits without some of the experts.

Run it by hand (`python tests/make_golden.py [NAME ...]`, needs torch and transformers). The logits are float32
arithmetic on the bfloat16 weights, eager attention. Weights are drawn wide, biases and norms away from 0 and
1, so that a part left out or out of order shows. golden_checkpoints.py reads the files without torch.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from golden_checkpoints import DROPPED

COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GEMMA4 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 11,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "global_head_dim": 36,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 12.0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "top_k_experts": 3,
}
SMALL_IN_GEMMA4 = (  # what scales the products of queries and keys, and what a layer adds to the residual stream
    *("q_norm.weight", "k_norm.weight"),
    *("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
)
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 16}  # of the smaller ones
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
QWEN4_INDEX = {  # with enough heads that no block has a score of 0, as two such would be a tie
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
CONFIGS = {
    "mixtral": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
    },
    "olmoe": {
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "clip_qkv": 1.0,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "vocab_size": 160,
        "moe_intermediate_size": 96,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 5,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 6.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
    },
    "moonlight": {  # the same architecture as Moonlight-16B-A3B has it: queries without a latent, one group, no YaRN
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "rope_interleave": False,
    },
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        **LATENT,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 3.0,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "head_dim": 24,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "glm4_moe_lite": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        **LATENT,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
    },
    "deepseek_v32": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        **LATENT,
        "index_n_heads": 10,
        "index_head_dim": 28,
        "index_topk": 13,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 6.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
    "glm_moe_dsa": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        **LATENT,
        "index_n_heads": 7,
        "index_head_dim": 20,
        "index_topk": 14,
        "indexer_types": ["full", "shared", "full", "shared"],
        "first_k_dense_replace": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "deepseek_v4": {
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 48,
        "sliding_window": 7,
        "layer_types": [
            "sliding_attention",
            *("compressed_sparse_attention", "heavily_compressed_attention") * 2,
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_n_heads": 9,
        "index_head_dim": 20,
        "index_topk": 3,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 5,
        "hc_eps": 1e-3,
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "swiglu_limit": 1.5,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
            "compress": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 6.0,
                "beta_slow": 1.0,
                "attention_factor": 1.1,
            },
        },
    },
    "gpt_oss": {
        "hidden_size": 96,
        "head_dim": 24,
        "intermediate_size": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 11,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 6.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "minimax_m2": {
        "head_dim": 24,
        "rotary_dim": 12,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "tie_word_embeddings": True,
    },
    "mistral4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        **LATENT,
        "first_k_dense_replace": 1,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 6.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "granitemoe": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "phimoe": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.45,  # with less, what rounding does to random weights moves more experts in and out
        "attention_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0],
            "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
            "short_mscale": 1.2,
            "long_mscale": 1.4,
        },
    },
    "hunyuan_v1_moe": {
        "head_dim": 24,
        "intermediate_size": 32,
        "num_experts": 8,
        "moe_topk": 3,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "num_dense_layers": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"],
        "head_dim": 24,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 20,
        "chunk_size": 8,
        "time_step_min": 0.6,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "mlp_only_layers": [2],
        "head_dim": 24,
        "linear_key_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3_5_moe": {
        "tie_word_embeddings": False,
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "head_dim": 32,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_value_head_dim": 40,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": VISION,
    },
    "qwen3_5_moe_text": {
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    "qwen4_exp": {
        "text_config": {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 24,
            "linear_key_head_dim": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 40,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "hc_count": 2,
            "hc_lowrank": 12,
            "ple_layer_ids": [3],
            **QWEN4_INDEX,
            "output_gate_type": "sigmoid",
            "ngram_size": 2,
            "heads_per_ngram": 4,
            "ngram_vocab_size_base": 50,
            "split_ngram_parts": 2,
            "make_ngram_vocab_size_divisible_by": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": VISION,
    },
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "head_dim": 32,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "hc_count": 3,
        "hc_lowrank": 32,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 128,
        **QWEN4_INDEX,
        "indexer_head_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "split_ngram_parts": 4,
        "make_ngram_vocab_size_divisible_by": 16,
        "tie_word_embeddings": True,
    },
    "mistral3": {
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "mistral4",
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            **LATENT,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "rope_interleave": False,
        },
        "vision_config": {
            "model_type": "pixtral",
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
        },
    },
    "gemma4_text": {
        **GEMMA4,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.5,
                "factor": 1.5,
            },
        },
    },
    "gemma4": {  # whose global layers have values of their own, and as many KV heads as the others
        "text_config": {
            "model_type": "gemma4_text",
            **GEMMA4,
            "attention_k_eq_v": False,
            "final_logit_softcapping": None,
            "sliding_window": 7,
            "pad_token_id": 0,
        },
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
    },
    "qwen3_vl_moe": {
        "text_config": {
            "head_dim": 24,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "kimi_k25": {
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            **LATENT,
            "first_k_dense_replace": 0,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
        },
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 16,
    },
}
TOKENS = 32


def random_model(architecture: str, seed: int, **changes):
    """A transformers model with wide random weights, in bfloat16."""
    import torch
    from transformers import AutoConfig

    values = CONFIGS[architecture]
    if "text_config" in values:
        values = {**values, "text_config": {**COMMON, **values["text_config"], **changes}}
        config = AutoConfig.for_model(architecture, **values)
    else:
        config = AutoConfig.for_model(**{"model_type": architecture, **COMMON, **values, **changes})
    model = model_class(config)(config)
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=random)
        if ("norm" in name and not name.endswith("bias")) or name.endswith("scale"):
            drawn = weight.data.mean() + 0.3 * drawn  # around what changes nothing: 1, or 0 where 1 is added
            if architecture.startswith("gemma4") and name.endswith(SMALL_IN_GEMMA4):
                drawn *= 0.4
        elif "embed" in name:
            small = config.get_text_config().tie_word_embeddings or architecture.startswith("gemma4")
            drawn *= 0.3 if small else 1.0
        elif name.endswith("router.proj.weight"):
            drawn *= 1.6  # the router's logits are scaled by hidden_size ** -0.5
        else:
            drawn *= 0.2
        weight.data.copy_(drawn)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=random))
        elif name.endswith("layer_scalar"):
            buffer.copy_(1 + 0.3 * torch.randn(buffer.shape, generator=random))
        elif name.endswith("tid2eid"):  # different experts for each token
            drawn = torch.rand(len(buffer), config.n_routed_experts, generator=random)
            buffer.copy_(drawn.argsort(dim=-1)[:, : buffer.shape[1]])
    return model.to(torch.bfloat16)


def model_class(config):
    """transformers' class of a configuration: not every family has an automatic one."""
    import transformers

    task = "ForConditionalGeneration" if hasattr(config, "text_config") else "ForCausalLM"
    return getattr(transformers, type(config).__name__.removesuffix("Config").removesuffix("Text") + task)


def logits_of(directory: Path, token_ids: np.ndarray, kept=(), layer_top_k=(), bias=-np.inf) -> np.ndarray:
    """What transformers gives for token_ids (tokens,) in float32: logits (tokens, vocab).

    kept, layer_top_k: by layer, the experts that may be chosen and how many are; () is the model's own. bias: of the
    others, as mask_router() takes it.
    """
    import torch
    from transformers import AutoConfig

    model = model_class(AutoConfig.from_pretrained(directory)).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for layer, experts in enumerate(kept):
        if experts:
            mask_router(model.model.layers[layer].mlp.gate, experts, bias)
    for layer, top_k in enumerate(layer_top_k):
        if top_k:
            model.model.layers[layer].mlp.gate.top_k = top_k
    with torch.no_grad():
        return model(torch.from_numpy(token_ids)[None]).logits[0].numpy()


def mask_router(gate, experts: tuple[int, ...], bias: float) -> None:
    """Give every other expert of a router the logit -inf: it is never chosen and has no part in the softmax.

    bias: what is added to their scores for the choice, where there is such a thing. With -inf each group must keep two
    experts or none, as it could not be chosen with one, and groups together enough for top_k: beyond these the choice
    is arbitrary. With 0 all others' must be positive: then a dropped one comes last, and counts nothing.
    """
    from unittest.mock import patch

    import torch

    forward, linear = gate.forward, torch.nn.functional.linear
    others = torch.tensor([index for index in range(len(gate.weight)) if index not in experts], dtype=torch.long)

    def masked(*arguments):
        return linear(*arguments).index_fill(-1, others, -torch.inf)

    def forward_masked(*arguments):
        with patch("torch.nn.functional.linear", masked):
            return forward(*arguments)

    gate.forward = forward_masked
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias[others] = bias


def main() -> None:
    dropped = {}
    for architecture in sys.argv[1:] or CONFIGS:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            model = random_model(architecture, seed=7)
            model.save_pretrained(directory)
            token_ids = np.random.default_rng(7).integers(0, model.config.get_text_config().vocab_size, TOKENS)
            logits = logits_of(directory, token_ids)
            if architecture in DROPPED:
                dropped[architecture] = logits_of(directory, token_ids, *DROPPED[architecture])
            path = Path(__file__).parent / "golden" / f"{architecture}.npz"
            np.savez_compressed(
                path,
                config=(directory / "config.json").read_text(),
                weights=np.fromfile(directory / "model.safetensors", np.uint8),
                token_ids=token_ids,
                logits=logits,
            )
        print(f"{path.name}: {path.stat().st_size:,} bytes, logits sd {logits.std():.2f}")
    if len(dropped) == len(DROPPED):
        np.savez_compressed(path.with_name("dropped.npz"), **dropped)


if __name__ == "__main__":
    main()
