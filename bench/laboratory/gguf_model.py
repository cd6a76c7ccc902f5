"""Making GGUF files of a model's shapes for llama.cpp: of random codes, or of given weights in full precision.

Random files are the counterpart of synthetic.py: the same shapes, no checkpoint. Their tensor types are those that
llama.cpp's llama-quant.cpp (2026-11) chooses without an importance matrix, for models whose number of experts is not 8.
Blocks are generated in the file's layout, one tensor at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_moe.bench.synthetic import random_bytes, raw_config, trunk_values
from edge_moe.runtime.config import Mixer, ModelConfig, trunk_shapes
from edge_moe.runtime.config_file import family_of, language_keys, parse_config
from edge_moe.runtime.layers.attention import Attention
from edge_moe.runtime.layers.delta_net import DeltaNet

from .gguf_tensors import ARCHITECTURES, metadata, parts

SAMPLE = 4096  # blocks whose deviation is measured


@dataclass(frozen=True, slots=True)
class BlockType:
    """The block layout of a tensor type: a scale (float16), for some a minimum (float16), and codes, which are random.

    Scales without a minimum have a random sign, as in real files. Otherwise the weights would have a mean below 0 (for
    Q4_0 a tenth of their deviation), which grows from matrix to matrix until all tokens are routed alike. A scale that
    is an exponent (one byte) has no sign, and needs none, as its codes have.
    """

    weights: int  # in a block; a row is a multiple of it
    nbytes: int
    scale_at: int  # byte offset in the block
    minimum_at: int | None = None
    minimum: float = 0.0  # times the scale, makes uniform codes zero-mean
    exponent: bool = False  # the scale is one byte, a power of two


BLOCKS = {
    "Q2_K": BlockType(256, 84, 80, 82, 1.5),
    "Q3_K": BlockType(256, 110, 108),
    "Q4_K": BlockType(256, 144, 0, 2, 7.5),
    "Q6_K": BlockType(256, 210, 208),
    "Q4_0": BlockType(32, 18, 0),
    "Q5_0": BlockType(32, 22, 0),
    "Q8_0": BlockType(32, 34, 0),
    "MXFP4": BlockType(32, 17, 0, exponent=True),
}
UNEVEN = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # used instead where rows are no multiples of 256
FLOAT_NAMES = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")  # matrices that stay float32


@dataclass(frozen=True, slots=True)
class Mix:
    """The tensor types of one file type, by part of the tensor's name."""

    file_type: int  # llama_ftype
    usual: str
    special: dict[str, str] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)  # used instead in layers that get more bits
    shared_values: str = ""  # used instead for values that fewer than 4 heads share


VALUES, DOWN = ("attn_v", "attn_qkv"), ("ffn_down_exps", "ffn_down_shexp", "ffn_down")
MIXES = {
    "Q2_K": Mix(
        *(10, "Q2_K", {**dict.fromkeys(VALUES, "Q4_K"), **dict.fromkeys((*DOWN, "attn_output"), "Q3_K")}),
        shared_values="Q3_K",
    ),
    "Q4_0": Mix(2, "Q4_0"),
    "Q4_K_M": Mix(15, "Q4_K", wide=dict.fromkeys((*VALUES, *DOWN), "Q6_K")),
    "MXFP4": Mix(38, "Q8_0", dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", DOWN[0]), "MXFP4")),
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
    if model.experts == 8:
        raise ValueError("a model with 8 experts has other types than are known here")
    return [Tensor(part.name, part.shape, _type(part.name, part.shape, model, mix)) for part in parts(model)]


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

    layers, vocab: override the config's. The file has no tokenizer. Raises ValueError like tensors() and for a family
    that is not known here, and ImportError without the package gguf.
    """
    raw = raw_config(Path(config), layers, vocab)
    model = parse_config(raw, where=str(config))
    contents = tensors(model, mix)
    deviations = {kind: _deviation(kind) for kind in {tensor.type for tensor in contents} - {"F32"}}

    def values():
        for number, (part, tensor) in enumerate(zip(parts(model), contents, strict=True)):
            random = np.random.Generator(np.random.SFC64([seed, number]))
            yield (
                part.read(Plain(model, random)) if tensor.type == "F32" else _random_tensor(random, tensor, deviations)
            )

    _write(Path(out), model, raw, contents, MIXES[mix].file_type, values())
    return model


def write_float32(raw: dict, weights, out: str | Path) -> ModelConfig:
    """Write a GGUF file that has the given weights in full precision, and return its config.

    raw: config.json; weights: trunk(name), expert(layer, index) and expert_bias(layer, index), by canonical names.
    Raises ValueError for a family that is not known here, ImportError without the package gguf.
    """
    model = parse_config(raw)
    contents = [Tensor(part.name, part.shape, "F32") for part in parts(model)]
    values = (np.ascontiguousarray(part.read(weights), np.float32) for part in parts(model))
    _write(Path(out), model, raw, contents, 0, values)
    return model


@dataclass(frozen=True, slots=True)
class Plain:
    """Tensors that stay float32, with the values that make_synthetic gives them."""

    model: ModelConfig
    random: np.random.Generator

    def trunk(self, name: str) -> np.ndarray:
        return trunk_values(self.random, name, trunk_shapes(self.model)[name])

    def expert_bias(self, _layer: int, _index: int) -> list[np.ndarray]:
        return [np.zeros(rows, np.float32) for rows, _ in self.model.expert_shapes]


def _write(
    out: Path, model: ModelConfig, raw: dict, contents: list[Tensor], file_type: int, values: Iterator[np.ndarray]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(out, ARCHITECTURES[model.architecture])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    for key, value in metadata(model, language_keys(raw, family_of(raw), str(out))).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{writer.arch}.{key}", value)
    for tensor in contents:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, data in zip(contents, values, strict=True):
        if data.nbytes != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {data.nbytes} bytes, expected {tensor.nbytes}")
        writer.write_tensor_data(data)
    writer.close()


def _type(name: str, shape: tuple[int, ...], model: ModelConfig, mix: str) -> str:
    """The type of a tensor: vectors, routers and convolutions are float32, the rest is as the mix says."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    if len(shape) == 1 or not name.endswith(".weight") or part.endswith("_norm") or name.endswith(FLOAT_NAMES):
        return "F32"
    its = MIXES[mix]
    if part == ("token_embd" if model.tied_head else "output"):
        kind = "Q8_0" if its.usual == "Q8_0" else "Q6_K"
    elif part in its.wide and _is_wide(model, int(name.split(".")[1]), part):
        kind = its.wide[part]
    elif part in VALUES and its.shared_values and _sharing(model) < 4:
        kind = its.shared_values
    else:
        kind = its.special.get(part, its.usual)
    if shape[-1] % BLOCKS[kind].weights and kind not in UNEVEN:
        raise ValueError(
            f"{name} has {shape[-1]} inputs, no multiple of the {BLOCKS[kind].weights} in a block of {kind}"
        )
    return UNEVEN[kind] if shape[-1] % BLOCKS[kind].weights else kind


def _sharing(model: ModelConfig) -> int:
    """How many heads share a KV head in the first layer; 0 if it has none, and its kind is stored by layer."""
    its = model.layers[0].attention
    if isinstance(its, DeltaNet):  # whose models have one number of KV heads
        its = model.attention
    return its.heads // its.kv_heads if isinstance(its, Attention) else 0


def _is_wide(model: ModelConfig, layer: int, part: str) -> bool:
    """Whether a mix gives more bits to this part of a layer. Values are counted among the layers that have them."""
    layers = list(range(model.layer_count))
    if part in VALUES:
        layers = [n for n in layers if _has_values(model.layers[n].attention)]
    return layers.index(layer) in set(_wide_layers(len(layers)))


def _has_values(mixer: Mixer | None) -> bool:
    return isinstance(mixer, DeltaNet) or (isinstance(mixer, Attention) and not mixer.keys_as_values)


def _wide_layers(layers: int) -> Iterator[int]:
    """The layers that "M" mixes give more bits: the first and the last eighth, and every third of the others."""
    eighth = layers // 8
    return (n for n in range(layers) if n < eighth or n >= 7 * layers // 8 or (n - eighth) % 3 == 2)


def _random_tensor(random: np.random.Generator, tensor: Tensor, deviations: dict[str, float]) -> np.ndarray:
    """A random matrix, or several, of deviation 1/sqrt(inputs); that of the embedding is 1."""
    deviation = 1.0 if tensor.name == "token_embd.weight" else 1 / math.sqrt(tensor.shape[-1])
    return _blocks(random, tensor.type, tensor.nbytes, deviation / deviations[tensor.type])


def _blocks(random: np.random.Generator, kind: str, nbytes: int, scale: float) -> np.ndarray:
    """Random blocks, uint8 (blocks, bytes of a block), whose scales have one magnitude."""
    block = BLOCKS[kind]
    data = random_bytes(random, nbytes).reshape(-1, block.nbytes)
    if block.exponent:
        data[:, block.scale_at] = 127 + round(math.log2(scale))
        return data
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
