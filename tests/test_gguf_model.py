"""GGUF files of our families for llama.cpp: it gives our logits for the same weights, and chooses the same types."""

import ctypes
import json
import os

import numpy as np
import pytest
from bundles import logits_of, write_lossless

from bench.laboratory.engines import Child, LlamaCpp, Model
from bench.laboratory.gguf_model import MIXES, tensors, write_float32
from edge_moe.runtime.config import ModelConfig, trunk_shapes
from edge_moe.runtime.config_file import parse_config

TOKENS = 60
LLAMA_CPP_ROUNDS = {"gemma4_text": 2e-3}  # its GELU is a table of float16
COMMON = {"vocab_size": 128, "hidden_size": 256, "num_attention_heads": 8, "max_position_embeddings": 256}
CONFIGS = {
    "qwen3_moe": {
        **COMMON,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        **COMMON,
        "model_type": "gpt_oss",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 11,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,  # gpt-oss has false, but llama.cpp always rounds
        },
    },
    "qwen3_5_moe_text": {
        **COMMON,
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 5,
        "full_attention_interval": 4,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
    },
    "gemma4_text": {
        **COMMON,
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "head_dim": 32,
        "global_head_dim": 64,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 11,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_experts": 6,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.25},
        },
    },
    "lfm2_moe": {
        **COMMON,
        "model_type": "lfm2_moe",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "conv_L_cache": 3,
        "norm_eps": 1e-5,
        "rope_theta": 100.0,
    },
    "nemotron_h": {
        **COMMON,
        "model_type": "nemotron_h",
        "num_hidden_layers": 5,
        "hybrid_override_pattern": "MEM*E",
        "head_dim": 32,
        "num_key_value_heads": 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "time_step_min": 0.0,  # llama.cpp has no minimum
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 512,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
}


class RandomWeights:
    """Random weights of a model that bfloat16 holds exactly, with every bias, norm and scale away from its default."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config, self.seed = config, seed
        self.shapes = trunk_shapes(config)
        self.names = {name: number for number, name in enumerate(self.shapes)}

    def trunk(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        drawn = self._drawn(shape, 0, self.names[name])
        if name.endswith(("norm", "_scale", "decay_rate", "skip")):
            return exact(1 + 0.3 * drawn)
        if len(shape) == 1:
            return exact(0.3 * drawn)
        inputs = shape[0] if name.endswith(("conv", "conv.weights")) else shape[1]
        small = 0.3 if self.config.tied_head else 1.0
        return exact(small * drawn if name == "embedding" else drawn * inputs**-0.5)

    def expert(self, layer: int, index: int) -> tuple[np.ndarray, ...]:
        shapes = enumerate(self.config.expert_shapes)
        return tuple(exact(self._drawn(its, 1, layer, index, at) * its[1] ** -0.5) for at, its in shapes)

    def expert_bias(self, layer: int, index: int) -> tuple[np.ndarray, ...]:
        shapes = enumerate(self.config.expert_shapes)
        return tuple(exact(0.3 * self._drawn(its[:1], 2, layer, index, at)) for at, its in shapes)

    def _drawn(self, shape: tuple[int, ...], *key: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key]).standard_normal(shape).astype(np.float32)


def exact(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def llama_cpp_of(path, **options) -> LlamaCpp:
    """llama.cpp with a file, if it runs here: some builds end the process at their first prompt, see peers.py."""
    pytest.importorskip("llama_cpp")
    file = Model("llama.cpp", path.stem, str(path), 0, 0, vocab=128, context=256, threads=1, options=options)
    try:
        with Child(file) as child:
            child.run("pp", 4, 0)
    except OSError as error:
        pytest.skip(f"this build of llama.cpp does not run here: {error}")
    return LlamaCpp(file, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_gives_our_logits_for_the_same_weights(name, tmp_path):
    pytest.importorskip("gguf")
    raw = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    weights = RandomWeights(config)
    write_float32(raw, weights, tmp_path / "model.gguf")
    engine = llama_cpp_of(tmp_path / "model.gguf", repack=False, exact=True)
    ids = np.random.default_rng(1).integers(0, 128, TOKENS).tolist()
    ours = logits_of(write_lossless(tmp_path / "lossless.emoe", tmp_path, config, weights), ids)
    bound = LLAMA_CPP_ROUNDS.get(name, 3e-5) * ours.std()
    for count in (1, 2, 5, 12, 13, 40, TOKENS):  # before and after the windows are full
        engine.prompt(ids[:count])
        np.testing.assert_allclose(engine.logits(), ours[count - 1], rtol=0, atol=bound)
    engine.generate(ids)
    np.testing.assert_allclose(engine.logits(), ours[-1], rtol=0, atol=bound)


@pytest.mark.parametrize(
    "name, mix, changes",
    [(name, mix, {}) for name in CONFIGS for mix in MIXES]
    + [("gpt_oss", mix, {"hidden_size": 160, "intermediate_size": 96}) for mix in ("Q4_0", "Q4_K_M", "MXFP4")],
)
def test_llama_cpp_quantises_to_the_same_types(name, mix, changes, tmp_path):
    gguf = pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    raw = CONFIGS[name] | changes
    config = write_float32(raw, RandomWeights(parse_config(raw)), tmp_path / "model.gguf")
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = MIXES[mix].file_type, 1
    paths = [os.fsencode(tmp_path / file) for file in ("model.gguf", "quantised.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(how)) == 0
    found = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "quantised.gguf").tensors}
    assert found == {tensor.name: tensor.type for tensor in tensors(config, mix)}
