"""Makes quantised versions of small checkpoints, as the hub has them, with neither torch nor transformers.

write_fp8(), write_mxfp8(), write_mxfp4(), write_nvfp4() and write_ints() give back what every quantised tensor stands
for, exactly, and write_plain() a checkpoint that holds just these values and is not quantised: reading one must give
what reading the other gives.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
from test_checkpoint import bf16, read_file, write_file

NOT_LINEAR = ("embed_tokens.weight", "lm_head.weight", "norm.weight", ".gate.weight", "shared_expert_gate.weight")
V4_QUANTISED = r"(?<!compressor)\.(wq_a|wq_b|wkv|wo_a|wo_b|w1|w2|w3)\.weight$"  # compressors are plain
E4M3 = np.array([f * 2.0**-9 for f in range(8)] + [(8 + f) * 2.0 ** (e - 10) for e in range(1, 16) for f in range(8)])
E4M3 = E4M3[:-1]  # the last code is NaN
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ENCODE = {
    "F32": lambda x: x.astype("<f4"),
    "F16": lambda x: x.astype("<f2"),
    "BF16": lambda x: (x.astype("<f4").view("<u4") >> 16).astype("<u2"),
    "F8_E8M0": lambda x: (np.log2(x) + 127).astype("u1"),
}
DECODE = {
    "F32": lambda x: x,
    "F16": lambda x: x.astype("<f4"),
    "BF16": lambda x: (x.astype("<u4") << 16).view("<f4"),
    "F8_E8M0": lambda x: np.exp2(x.astype("<f4") - 127),
}


def write_fp8(
    source: Path,
    out: Path,
    block: tuple[int, int | None] | None = (128, 128),
    *,
    scales: str = "F32",
    method: str = "fp8",
    powers_of_two: bool = False,
) -> dict[str, np.ndarray]:
    """Write an FP8 version of the checkpoint `source` (one file, bfloat16); gives the quantised tensors' values.

    block: rows and columns that share a scale; (1, None) is one scale a row, None one scale a tensor, without a shape.
    scales: their type, F32, BF16, F16 or F8_E8M0; powers_of_two: they are rounded to such, as F8_E8M0 always are, so
    that bfloat16 holds the values exactly. method: fp8, as DeepSeek and Qwen have it, or compressed-tensors.
    """
    tensors, values = read_file(_copy(source, out)), {}
    for key, weights in _linear(tensors).items():
        rows, cols = weights.shape
        height, width = block or (rows, None)
        width = width or cols
        largest = np.maximum.reduceat(np.abs(weights), np.arange(0, rows, height), axis=0)
        factors = np.maximum.reduceat(largest, np.arange(0, cols, width), axis=1) / np.float32(448)
        if powers_of_two or scales == "F8_E8M0":
            factors = np.exp2(np.ceil(np.log2(factors)))
        stored = ENCODE[scales](factors)
        each = DECODE[scales](stored).repeat(height, axis=0)[:rows].repeat(width, axis=1)[:, :cols]
        codes = nearest(weights / each, E4M3)
        values[key] = np.copysign(E4M3[codes], weights).astype(np.float32) * each
        tensors[key] = "F8_E4M3", [rows, cols], (codes | np.signbit(weights) << 7).astype("u1").tobytes()
        scale_key = f"{key}_scale_inv" if method == "fp8" else f"{key}_scale"
        tensors[scale_key] = scales, list(stored.shape) if block else [], stored.tobytes()
    blocks = list(block) if block and block[1] else None
    if method == "fp8":
        about = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": blocks}
    else:
        weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
        if blocks and height == 1:
            weights |= {"strategy": "group", "group_size": width}
        elif blocks:
            weights |= {"strategy": "block", "block_structure": blocks}
        about = {"format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}
    _finish(out, tensors, {"quant_method": method, **about})
    return values


def write_mxfp4(source: Path, out: Path, *, scales: str = "U8") -> dict[str, np.ndarray]:
    """Write an MXFP4 version as compressed-tensors does; as write_fp8(). Columns must be multiples of 32.

    scales: U8, or F8_E8M0, which are the same bytes.
    """
    tensors, values = read_file(_copy(source, out)), {}
    for key, weights in _linear(tensors).items():
        blocks = weights.reshape(len(weights), -1, 32)
        factors = np.exp2(np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2)
        codes = nearest(blocks / factors, E2M1)
        values[key] = (np.copysign(E2M1[codes], blocks) * factors).astype(np.float32).reshape(weights.shape)
        nibbles = (codes | np.signbit(blocks) << 3).astype("u1").reshape(weights.shape)
        packed, stored = nibbles[:, 0::2] | nibbles[:, 1::2] << 4, ENCODE["F8_E8M0"](factors[..., 0])
        del tensors[key]
        tensors[f"{key}_packed"] = "U8", list(packed.shape), packed.tobytes()
        tensors[f"{key}_scale"] = scales, list(stored.shape), stored.tobytes()
    form = "mxfp4-pack-quantized"
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"weights": weights, "format": form}}
    _finish(out, tensors, {"quant_method": "compressed-tensors", "format": form, "config_groups": groups})
    return values


def write_gpt_oss(source: Path, out: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write gpt-oss's own MXFP4 version of its bfloat16 checkpoint `source`, with random codes and exponents; gives the
    values of the tensors that `source` has instead, (experts, inputs, outputs)."""
    tensors, values, random = read_file(_copy(source, out)), {}, np.random.default_rng(seed)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        _, (experts, inputs, outputs), _ = tensors.pop(key)
        blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        exponents = random.integers(120, 126, blocks.shape[:3], np.uint8)
        tensors[f"{key}_blocks"] = "U8", list(blocks.shape), blocks.tobytes()
        tensors[f"{key}_scales"] = "U8", list(exponents.shape), exponents.tobytes()
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32)
        found = np.where(codes & 8, -1, 1) * E2M1[codes & 7] * np.exp2(exponents[..., None] - 127.0)
        values[key] = found.astype(np.float32).reshape(experts, outputs, inputs).transpose(0, 2, 1).copy()
    _finish(out, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return values


def write_deepseek_v4(
    source: Path, out: Path, *, experts: str = "I8", block: tuple[int, int] = (128, 128), seed: int = 0
) -> dict[str, np.ndarray]:
    """Write DeepSeek-V4's bfloat16 checkpoint `source` as the hub has such models; gives the values of what is
    quantised: attention and the shared expert in FP8 with powers of two as scales, and experts in FP4.

    The names are those of `source`. experts: I8, two random codes in a byte; F4, whose shape counts codes; or F8_E4M3,
    as attention.
    """
    tensors, values, random = read_file(_copy(source, out)), {}, np.random.default_rng(seed)
    for key in [key for key in tensors if re.search(V4_QUANTISED, key)]:
        _, (rows, cols), data = tensors.pop(key)
        if ".experts." in key and experts != "F8_E4M3":
            packed = random.integers(0, 256, (rows, cols // 2), np.uint8)
            exponents = random.integers(120, 126, (rows, cols // 32), np.uint8)
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, cols)
            found = np.where(codes & 8, -1, 1) * E2M1[codes & 7] * np.exp2(exponents - 127.0).repeat(32, axis=1)
            tensors[key] = experts, [rows, cols // (2 if experts == "I8" else 1)], packed.tobytes()
        else:
            height, width = block
            weights = bf16(data).reshape(rows, cols)
            largest = np.maximum.reduceat(np.abs(weights), np.arange(0, rows, height), axis=0)
            factors = np.maximum.reduceat(largest, np.arange(0, cols, width), axis=1) / np.float32(448)
            factors = np.exp2(np.ceil(np.log2(factors)))
            each, exponents = factors.repeat(height, axis=0)[:rows].repeat(width, axis=1)[:, :cols], factors
            codes = nearest(weights / each, E4M3)
            found = np.copysign(E4M3[codes], weights) * each
            tensors[key] = "F8_E4M3", [rows, cols], (codes | np.signbit(weights) << 7).astype("u1").tobytes()
            exponents = ENCODE["F8_E8M0"](factors)
        scale_key = f"{key.removesuffix('.weight')}.scale"
        tensors[scale_key] = "F8_E8M0", list(exponents.shape), exponents.tobytes()
        values[key] = found.astype(np.float32)
    about = {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0", "weight_block_size": list(block)}
    about["expert_dtype"] = "fp8" if experts == "F8_E4M3" else "fp4"
    _finish(out, tensors, {"quant_method": "fp8", **about})
    return values


def write_mxfp8(source: Path, out: Path, *, method: str = "mxfp8", scales: str = "U8") -> dict[str, np.ndarray]:
    """Write an MXFP8 version; as write_fp8(). Columns must be multiples of 32.

    method: mxfp8, as MiniMax-M3 has it, compressed-tensors or modelopt. scales: U8, or F8_E8M0, the same bytes.
    """
    tensors, values = read_file(_copy(source, out)), {}
    for key, weights in _linear(tensors).items():
        blocks = weights.reshape(len(weights), -1, 32)
        factors = np.exp2(np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True) / 448)))
        codes = nearest(blocks / factors, E4M3)
        values[key] = (np.copysign(E4M3[codes], blocks) * factors).astype(np.float32).reshape(weights.shape)
        data = (codes | np.signbit(blocks) << 7).astype("u1").tobytes()
        tensors[key] = "F8_E4M3", list(weights.shape), data
        stored = ENCODE["F8_E8M0"](factors[..., 0])
        tensors[f"{key}_scale_inv" if method == "mxfp8" else f"{key}_scale"] = (
            scales,
            list(stored.shape),
            stored.tobytes(),
        )
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    about = {
        "mxfp8": {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        "compressed-tensors": {"format": "mxfp8-quantized", "config_groups": {"group_0": {"weights": weights}}},
        "modelopt": {"quant_algo": "MXFP8", "ignore": ["lm_head"]},
    }
    _finish(out, tensors, {"quant_method": method, **about[method]})
    return values


def write_nvfp4(source: Path, out: Path, *, method: str = "compressed-tensors") -> dict[str, np.ndarray]:
    """Write an NVFP4 version; as write_fp8(). Columns must be multiples of 16. method: compressed-tensors or modelopt,
    which say the same of a tensor's scale by its inverse and by itself."""
    tensors, values, modelopt = read_file(_copy(source, out)), {}, method == "modelopt"
    for key, weights in _linear(tensors).items():
        blocks = weights.reshape(len(weights), -1, 16)
        whole = np.float32(np.abs(weights).max() / (448 * 6))
        whole = whole if modelopt else 1 / whole
        largest = np.abs(blocks).max(-1) / 6
        scale_codes = np.maximum(nearest(largest / whole if modelopt else largest * whole, E4M3), 1)
        stored = E4M3[scale_codes].astype(np.float32)
        factors = (stored * whole if modelopt else stored / whole)[..., None]
        codes = nearest(blocks / factors, E2M1)
        values[key] = (np.copysign(E2M1[codes].astype(np.float32), blocks) * factors).reshape(weights.shape)
        nibbles = (codes | np.signbit(blocks) << 3).astype("u1").reshape(weights.shape)
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        del tensors[key]
        tensors[key if modelopt else f"{key}_packed"] = "U8", list(packed.shape), packed.tobytes()
        tensors[f"{key}_scale"] = "F8_E4M3", list(stored.shape), scale_codes.astype("u1").tobytes()
        shape, name = ([], f"{key}_scale_2") if modelopt else ([1], f"{key}_global_scale")
        tensors[name] = "F32", shape, whole.astype("<f4").tobytes()
        of_inputs = key.removesuffix("weight") + ("input_scale" if modelopt else "input_global_scale")
        tensors[of_inputs] = "F32", shape, np.float32(0.5).tobytes()
    form, weights = "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
    groups = {"group_0": {"weights": {**weights, "group_size": 16}, "format": form}}
    about = {"format": form, "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    if modelopt:
        about = {"quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.mlp.gate"], "producer": {}}
    _finish(out, tensors, {"quant_method": method, **about})
    return values


def write_ints(
    source: Path, out: Path, *, bits: int = 4, group: int | None = 32, scales: str = "BF16"
) -> dict[str, np.ndarray]:
    """Write a version in integers of 4 or 8 bits as compressed-tensors does; as write_fp8(). group: None is a row."""
    tensors, values, zero = read_file(_copy(source, out)), {}, 1 << bits - 1
    for key, weights in _linear(tensors).items():
        rows, cols = weights.shape
        groups = weights.reshape(rows, -1, group or cols)
        stored = ENCODE[scales](np.abs(groups).max(-1) / np.float32(zero - 1))
        factors = DECODE[scales](stored)[..., None]
        codes = np.clip(np.rint(groups / factors), -zero, zero - 1)
        values[key] = (codes * factors).astype(np.float32).reshape(rows, cols)
        words = (codes.astype(np.int64).reshape(rows, -1, 32 // bits) + zero) << np.arange(0, 32, bits)  # first lowest
        packed = words.sum(-1).astype("<u4")
        del tensors[key]
        tensors[f"{key}_packed"] = "I32", list(packed.shape), packed.tobytes()
        tensors[f"{key}_scale"] = scales, list(stored.shape), stored.tobytes()
        tensors[f"{key}_shape"] = "I32", [2], np.array([rows, cols], "<i4").tobytes()
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    groups = {"group_0": {"weights": {**weights, "group_size": group}, "format": "pack-quantized"}}
    about = {"format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head", "re:.*self_attn.*"]}
    _finish(out, tensors, {"quant_method": "compressed-tensors", **about})
    return values


def write_plain(source: Path, out: Path, values: dict[str, np.ndarray], dtype: str) -> None:
    """Write the checkpoint `source` with these tensors instead, as F32 or BF16, which must hold them exactly."""
    tensors = read_file(_copy(source, out))
    for key, value in values.items():
        stored = ENCODE[dtype](value)
        assert DECODE[dtype](stored).tobytes() == value.tobytes()
        tensors[key] = dtype, list(value.shape), stored.tobytes()
    write_file(out / "model.safetensors", tensors)


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Code of the magnitude nearest to each |x|, the even code where two are as near, the last for all beyond."""
    x = np.abs(x).astype(np.float64)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    low, high = np.searchsorted(middles, x, side="left"), np.searchsorted(middles, x, side="right")
    return np.where(low % 2 == 0, low, high)


def _linear(tensors: dict) -> dict[str, np.ndarray]:
    """The matrices that are usually quantised, float32: not the embedding, the head or the routers."""
    return {
        key: bf16(data).reshape(shape)
        for key, (_, shape, data) in tensors.items()
        if len(shape) == 2 and not key.endswith(NOT_LINEAR)
    }


def _copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out / "model.safetensors"


def _finish(out: Path, tensors: dict, quantisation: dict) -> None:
    write_file(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
