"""A dense model split into experts: it computes what the dense one does, and no weight leaves its step of the grid."""

import json

import numpy as np
import pytest

from bench.laboratory.quality import smollm2
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIM, FFN, HEADS, KV_HEADS, LAYERS = 64, 256, 4, 2, 2


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def write_gguf(model, path, quantised: bool) -> None:
    """As llama.cpp's conversion does: pairs that turn together lie side by side."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "!!", *(chr(33 + i) for i in range(125))])
    writer.add_token_types([3, 3] + [1] * 126)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")

    def add(name: str, values: np.ndarray) -> None:
        if quantised and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
        return values.reshape(heads, 2, -1, DIM).swapaxes(1, 2).reshape(values.shape)

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    for layer in range(LAYERS):
        its, into = f"model.layers.{layer}", f"blk.{layer}"
        for name, to in smollm2.NORMS.items():
            add(f"{into}.{to}.weight", state[f"{its}.{name}.weight"])
        for name, to in smollm2.ATTENTION.items():
            values = state[f"{its}.self_attn.{name}.weight"]
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name)
            add(f"{into}.{to}.weight", interleaved(values, heads) if heads else values)
        for part in ("gate", "up", "down"):
            add(f"{into}.ffn_{part}.weight", state[f"{its}.mlp.{part}_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_computes_what_the_dense_model_does(dense, tmp_path):
    write_gguf(dense, tmp_path / "dense.gguf", quantised=False)
    smollm2.write(smollm2.Source(tmp_path / "dense.gguf"), tmp_path / "split")
    ids = np.random.default_rng(0).integers(0, 128, 40)
    with torch.no_grad():
        wanted = dense(torch.tensor(ids[None])).logits[0].numpy()
    with Checkpoint(tmp_path / "split") as checkpoint:
        assert (checkpoint.config.experts, checkpoint.config.top_k) == (8, 8)
        found = reference.forward(checkpoint.config, checkpoint, ids)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    about = json.loads((tmp_path / "split" / "tokenizer_config.json").read_text())
    assert (about["bos_token"], about["eos_token"], about["chat_template"]) == ("<s>", "</s>", "{{ messages }}")


def test_weights_leave_the_grid_but_not_their_step(dense, tmp_path):
    write_gguf(dense, tmp_path / "dense.gguf", quantised=True)
    source = smollm2.Source(tmp_path / "dense.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "dense.gguf").tensors}
    tensor = tensors["blk.0.ffn_up.weight"]
    grid = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    steps = np.repeat((grid.reshape(-1, 32).max(1) - grid.reshape(-1, 32).min(1)) / 15, 32).reshape(grid.shape)
    moved = source.tensor("blk.0.ffn_up.weight") - grid
    assert (np.abs(moved) <= 0.501 * steps + 1e-6).all()
    assert 0.2 < np.abs(moved).mean() / steps.mean() < 0.3  # evenly over the step
