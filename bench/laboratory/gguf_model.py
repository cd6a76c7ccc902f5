"""Making a random GGUF file with the tensor types that llama-quantize chooses for a Mixture-of-Experts model.

This is the counterpart of synthetic.py for llama.cpp: the same shapes, random codes, no checkpoint. The types are those
of llama.cpp's llama-quant.cpp (2026-11) without an importance matrix, for models whose number of experts is not 8 and
with at least 4 heads per KV head. Blocks are generated in the file's layout, one tensor at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_moe.bench.synthetic import random_bytes, raw_config
from edge_moe.runtime.config import ModelConfig
from edge_moe.runtime.config_file import parse_config

SAMPLE = 4096  # blocks whose deviation is measured


@dataclass(frozen=True, slots=True)
class BlockType:
    """The block layout of a tensor type: a scale (float16), for some a minimum (float16), and codes, which are random.

    Scales without a minimum have a random sign, as in real files. Otherwise the weights would have a mean below 0 (for
    Q4_0 a tenth of their deviation), which grows from matrix to matrix until all tokens are routed alike.
    """

    weights: int  # in a block; a row is a multiple of it
    nbytes: int
    scale_at: int  # byte offset in the block
    minimum_at: int | None = None
    minimum: float = 0.0  # times the scale, makes uniform codes zero-mean


BLOCKS = {
    "Q2_K": BlockType(256, 84, 80, 82, 1.5),
    "Q3_K": BlockType(256, 110, 108),
    "Q4_K": BlockType(256, 144, 0, 2, 7.5),
    "Q6_K": BlockType(256, 210, 208),
    "Q4_0": BlockType(32, 18, 0),
}


@dataclass(frozen=True, slots=True)
class Mix:
    """The tensor types of one file type, by part of the tensor's name."""

    file_type: int  # llama_ftype
    usual: str
    special: dict[str, str] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)  # used instead in layers that get more bits


MIXES = {
    "Q2_K": Mix(10, "Q2_K", {"attn_v": "Q4_K", "attn_output": "Q3_K", "ffn_down_exps": "Q3_K"}),
    "Q4_0": Mix(2, "Q4_0"),
    "Q4_K_M": Mix(15, "Q4_K", wide={"attn_v": "Q6_K", "ffn_down_exps": "Q6_K"}),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # inputs last
    type: str  # of BLOCKS, or F32

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        return 4 * count if self.type == "F32" else count // BLOCKS[self.type].weights * BLOCKS[self.type].nbytes


def tensors(model: ModelConfig, mix: str) -> list[Tensor]:
    """The tensors of a model in a file of type `mix`, in the file's order.

    Raises ValueError for an unknown mix and for models whose types follow other rules.
    """
    if mix not in MIXES:
        raise ValueError(f"type {mix!r} is not known here; use one of {', '.join(MIXES)}")
    its = model.attention
    if model.architecture != "qwen3_moe" or model.experts == 8 or its.heads < 4 * its.kv_heads:
        raise ValueError(
            f"{model.architecture}, {model.experts} experts, {its.heads} heads, {its.kv_heads} KV heads: the types "
            "are known for qwen3_moe with at least 4 heads to a KV head and not 8 experts"
        )
    if model.dense_layers or any(n % 256 for n in (model.dim, its.heads * its.head_dim, model.expert_hidden)):
        raise ValueError("the types are known where all layers have experts and rows are multiples of 256 inputs")
    dim, hidden, experts = model.dim, model.expert_hidden, model.experts
    q_rows, kv_rows = its.heads * its.head_dim, its.kv_heads * its.head_dim
    shapes = {"token_embd": (model.vocab, dim)}
    for layer in range(model.layer_count):
        parts = {
            "attn_norm": (dim,),
            "attn_q": (q_rows, dim),
            "attn_q_norm": (its.head_dim,),
            "attn_k": (kv_rows, dim),
            "attn_k_norm": (its.head_dim,),
            "attn_v": (kv_rows, dim),
            "attn_output": (dim, q_rows),
            "ffn_norm": (dim,),
            "ffn_gate_inp": (experts, dim),
            "ffn_gate_exps": (experts, hidden, dim),
            "ffn_up_exps": (experts, hidden, dim),
            "ffn_down_exps": (experts, dim, hidden),
        }
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    shapes |= {"output_norm": (dim,)} | ({} if model.tied_head else {"output": (model.vocab, dim)})
    return [Tensor(f"{name}.weight", shape, _type(name, shape, model, mix)) for name, shape in shapes.items()]


def bytes_per_token(model: ModelConfig, mix: str) -> float:
    """Bytes of the weights used for one token: all but other rows of the embedding and experts not chosen."""
    total = 0.0
    for tensor in tensors(model, mix):
        if "_exps" in tensor.name:
            total += tensor.nbytes * model.top_k / model.experts
        elif tensor.name != "token_embd.weight" or model.tied_head:
            total += tensor.nbytes
    return total


def make_gguf(
    config: str | Path, out: str | Path, mix: str, layers: int | None = None, vocab: int | None = None, seed: int = 0
) -> ModelConfig:
    """Write a random GGUF file with the shapes of `config` (as for make_synthetic), and return its config.

    layers, vocab: override the config's. The file has no tokenizer. Raises ValueError like tensors(), and ImportError
    without the package gguf.
    """
    import gguf

    raw = raw_config(Path(config), layers, vocab)
    model = parse_config(raw, where=str(config))
    contents, its = tensors(model, mix), model.attention
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_file_type(MIXES[mix].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(model.vocab)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.dim)
    writer.add_block_count(model.layer_count)
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(its.heads)
    writer.add_head_count_kv(its.kv_heads)
    writer.add_key_length(its.head_dim)
    writer.add_value_length(its.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(its.rope.theta)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.top_k)
    writer.add_expert_feed_forward_length(model.expert_hidden)
    for tensor in contents:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    deviations = {kind: _deviation(kind) for kind in {tensor.type for tensor in contents} - {"F32"}}
    for number, tensor in enumerate(contents):
        random = np.random.Generator(np.random.SFC64([seed, number]))
        writer.write_tensor_data(_random_tensor(random, tensor, deviations))
    writer.close()
    return model


def _type(name: str, shape: tuple[int, ...], model: ModelConfig, mix: str) -> str:
    """The type of a tensor: norms and routers are float32, the head has 6 bits, the rest is as the mix says."""
    part = name.rpartition(".")[2]
    if len(shape) == 1 or part == "ffn_gate_inp":
        return "F32"
    if part == ("token_embd" if model.tied_head else "output"):
        return "Q6_K"
    its = MIXES[mix]
    if part in its.wide and int(name.split(".")[1]) in set(_wide_layers(model.layer_count)):
        return its.wide[part]
    return its.special.get(part, its.usual)


def _wide_layers(layers: int) -> Iterator[int]:
    """The layers that "M" mixes give more bits: the first and the last eighth, and every third of the others."""
    eighth = layers // 8
    return (n for n in range(layers) if n < eighth or n >= 7 * layers // 8 or (n - eighth) % 3 == 2)


def _random_tensor(random: np.random.Generator, tensor: Tensor, deviations: dict[str, float]) -> np.ndarray:
    """A random tensor: norms are one, the router spreads tokens evenly, matrices have deviation 1/sqrt(inputs)."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    deviation = 1.0 if tensor.name == "token_embd.weight" else 1 / math.sqrt(tensor.shape[-1])
    if tensor.type == "F32":
        return random.standard_normal(tensor.shape, np.float32) * np.float32(deviation)
    return _blocks(random, tensor.type, tensor.nbytes, deviation / deviations[tensor.type])


def _blocks(random: np.random.Generator, kind: str, nbytes: int, scale: float) -> np.ndarray:
    """Random blocks, uint8 (blocks, bytes of a block), whose scales have one magnitude."""
    block = BLOCKS[kind]
    data = random_bytes(random, nbytes).reshape(-1, block.nbytes)
    low, high = np.float16([scale]).view(np.uint8)
    sign = data[:, block.scale_at + 1] & 0x80 if block.minimum_at is None else 0
    data[:, block.scale_at], data[:, block.scale_at + 1] = low, high | sign
    if block.minimum_at is not None:
        data[:, block.minimum_at : block.minimum_at + 2] = np.float16([scale * block.minimum]).view(np.uint8)
    return data


def _deviation(kind: str) -> float:
    """The standard deviation of the weights of random blocks whose scale is 1."""
    import gguf

    random = np.random.Generator(np.random.SFC64(0))
    sample = _blocks(random, kind, SAMPLE * BLOCKS[kind].nbytes, 1.0)
    return float(gguf.quants.dequantize(sample, gguf.GGMLQuantizationType[kind]).std())
