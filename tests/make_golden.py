"""Makes tests/golden/*.npz: a small random checkpoint of each architecture and the logits transformers gives,
and in dropped.npz its logits without some of the experts.

Run it by hand (`python tests/make_golden.py`, needs torch and transformers). The logits are float32
arithmetic on the bfloat16 weights, eager attention. Weights are drawn wide, biases and norms away from 0 and
1, so that a part left out or out of order shows. golden_checkpoints.py reads the files without torch.
"""

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
}
TOKENS = 32


def random_model(architecture: str, seed: int, **changes):
    """A transformers model with wide random weights, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**COMMON, **CONFIGS[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=random)
        if "norm" in name:
            drawn = 1 + 0.3 * drawn
        elif "embed_tokens" in name:
            drawn *= 0.3 if config.tie_word_embeddings else 1.0
        else:
            drawn *= 0.2
        weight.data.copy_(drawn)
    return model.to(torch.bfloat16)


def logits_of(directory: Path, token_ids: np.ndarray, kept=(), layer_top_k=()) -> np.ndarray:
    """What transformers gives for token_ids (tokens,) in float32: logits (tokens, vocab).

    kept, layer_top_k: by layer, the experts that may be chosen and how many are; () is the model's own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for layer, experts in enumerate(kept):
        if experts:
            mask_router(model.model.layers[layer].mlp.gate, experts)
    for layer, top_k in enumerate(layer_top_k):
        if top_k:
            model.model.layers[layer].mlp.gate.top_k = top_k
    with torch.no_grad():
        return model(torch.from_numpy(token_ids)[None]).logits[0].numpy()


def mask_router(gate, experts: tuple[int, ...]) -> None:
    """Give every other expert of a router the logit -inf: it is never chosen and has no part in the softmax."""
    from unittest.mock import patch

    import torch

    forward, linear = gate.forward, torch.nn.functional.linear
    others = torch.tensor([index for index in range(len(gate.weight)) if index not in experts], dtype=torch.long)

    def masked(*arguments):
        return linear(*arguments).index_fill(-1, others, -torch.inf)

    def forward_masked(hidden_states):
        with patch("torch.nn.functional.linear", masked):
            return forward(hidden_states)

    gate.forward = forward_masked


def main() -> None:
    dropped = {}
    for architecture in CONFIGS:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            model = random_model(architecture, seed=7)
            model.save_pretrained(directory)
            token_ids = np.random.default_rng(7).integers(0, model.config.vocab_size, TOKENS)
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
    np.savez_compressed(path.with_name("dropped.npz"), **dropped)


if __name__ == "__main__":
    main()
