"""What config.json says about quantised weights: methods that are known, and sizes of blocks.

The tensors tell their formats, which formats.py finds; this is for the sizes that they leave open, and for errors that
name a method that is not supported.
"""

from pathlib import Path

from ...runtime.config_file import read_json
from ...runtime.model_path import check_quantised, quantisation_in

PLAIN = ("BF16", "F16", "F32")
WHOLE = 0  # a block as high or wide as the matrix
FP8_BLOCK, MX_BLOCK = (128, 128), (1, 32)  # rows and columns that share a scale, unless config.json says otherwise
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8", "MIXED_PRECISION")  # quant_algo of NVIDIA ModelOpt
EXPERT_DTYPES = ("fp8", "fp4")  # of method fp8; the tensors tell which
MLX_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
SUPPORTED = (
    f"{', '.join(PLAIN)}; with scales FP8 and MXFP8 (quant_method fp8, mxfp8, modelopt or compressed-tensors), NVFP4 "
    "(modelopt or compressed-tensors), MXFP4 (mxfp4, compressed-tensors, or fp8 with expert_dtype fp4), "
    "symmetric INT4 and INT8 (compressed-tensors); and MLX's modes "
    f"{', '.join(MLX_MODES)}"
)

Block = tuple[int, int]


def quantisation_of(directory: Path, raw: dict) -> dict | None:
    """What a model's config.json, or its hf_quant_config.json, says of quantised weights; None if they are not."""
    found = quantisation_in(raw)
    file = directory / "hf_quant_config.json"
    if found is None and file.is_file():  # written by ModelOpt, whose config.json may say nothing
        found = {"quant_method": "modelopt", **{k: v for k, v in read_json(file).items() if k == "quantization"}}
    return found


def scale_blocks(quantisation, where: str) -> tuple[Block, ...]:
    """The possible block sizes of FP8, given config.json's `quantization_config` or None.

    Raises ValueError for an unsupported method or an invalid size.
    """
    if quantisation is None:
        return _any_block([])
    if not isinstance(quantisation, dict):
        raise ValueError(f"{where}: quantization_config is {quantisation!r}, expected an object")
    check_quantised(quantisation, where)
    method = quantisation.get("quant_method")
    if method is None and {"bits", "group_size"} <= quantisation.keys():
        if (mode := quantisation.get("mode", "affine")) not in MLX_MODES:
            raise unsupported(where, f"MLX's quantisation mode {mode!r}")
        return _any_block([])
    if method == "mxfp4":
        return _any_block([])
    if method in ("fp8", "mxfp8"):
        if (dtype := quantisation.get("expert_dtype", "fp8")) not in EXPERT_DTYPES:
            raise unsupported(where, f"expert_dtype {dtype!r}")
        size = quantisation.get("weight_block_size")
        if size is not None:
            return (_block(size, "weight_block_size", where),)
        return _any_block([]) if method == "fp8" else (MX_BLOCK,)
    if method == "modelopt":
        inner = quantisation.get("quantization", quantisation)
        algorithm = inner.get("quant_algo") if isinstance(inner, dict) else inner
        if algorithm not in MODELOPT:
            raise unsupported(where, f"ModelOpt's quant_algo {algorithm!r}")
        return _any_block([])
    if method != "compressed-tensors":
        raise unsupported(where, f"quantisation method {method!r}")
    if quantisation.get("transform_config"):
        raise unsupported(where, "transform_config (rotated weights)")
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise ValueError(f"{where}: config_groups is {groups!r}, expected an object")
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        if weights.get("block_structure") is not None:
            found.append(_block(weights["block_structure"], "block_structure", where))
        elif type(weights.get("group_size")) is int and weights["group_size"] > 0:  # -1 is a whole row
            found.append((1, weights["group_size"]))
    return _any_block(found)


def unsupported(where, what: str) -> ValueError:
    return ValueError(
        f"{where}: {what} is not supported; supported are {SUPPORTED}; "
        "use such a checkpoint, best the one that is not quantised"
    )


def _any_block(found: list[Block]) -> tuple[Block, ...]:
    """The candidates that the shape of the scales decides between: one scale per tensor, per row, or per block."""
    return ((WHOLE, WHOLE), (1, WHOLE), *(dict.fromkeys(found) or (FP8_BLOCK, MX_BLOCK)))


def _block(size, what: str, where: str) -> Block:
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise ValueError(f"{where}: {what} is {size!r}, expected two numbers of rows and columns above 0")
    return size[0], size[1]
