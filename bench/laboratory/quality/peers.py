"""Forms of the same checkpoint by other tools, in the same bundle format and harness.

mlx_lm's own code makes its forms; only the experts are taken from it, the trunk is as in every other row. Its packed
codes are copied, so nothing is rounded twice. llama.cpp's types are in llama_types.py.
"""

import contextlib
import importlib.util
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.compressor.passes.calibrate import load_calibration
from edge_moe.compressor.rounding.quantise import dequantise, trunk_packing
from edge_moe.compressor.rounding.round_layers import PackedTrunk
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import BundleWriter, Packing, Quantised
from edge_moe.runtime import reference
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.tokenizer import Tokenizer

from .forms import Form
from .study import Study

GROUP = 64
CONVERT_WIDTHS = (2, 3, 4)
GPTQ_WIDTHS = (2, 4)  # widths below 8 that mlx_lm's GPTQ packs
SENSITIVITY_TOKENS = 8192  # calibration tokens for dynamic_quant, at ten seconds of one core per 512
NEAR = 0.01  # maximum difference in bits between a row and the size at which it is shown
MATRIX = re.compile(r"layers\.(\d+)\..*switch_mlp\.(gate|up|down)_proj$")


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def mlx_forms(bits: float) -> list[Form]:
    """The forms that mlx_lm can make at `bits` true bits; none if its sizes are not close."""
    forms = []
    for name, widths, make in (("convert", CONVERT_WIDTHS, convert), ("gptq", GPTQ_WIDTHS, gptq)):
        for width in widths:
            if abs(width + 32 / GROUP - bits) < NEAR:
                forms.append(Form(f"mlx_lm {name}", bits, {}, make=partial(make, width=width)))
    low = int(bits - 32 / GROUP)  # dynamic_quant gives a part of the matrices the next width
    if low in CONVERT_WIDTHS and not any(form.name == "mlx_lm convert" for form in forms):
        forms.append(Form("mlx_lm dynamic_quant", bits, {}, make=partial(dynamic_quant, low=low)))
    return forms


def convert(study: Study, form: Form, out: Path, width: int) -> None:
    """mlx_lm.convert with a predicate that selects only the experts."""
    from mlx_lm import convert, load

    converted = out.with_suffix(".mlx")
    shutil.rmtree(converted, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        convert(
            str(study.model),
            str(converted),
            quantize=True,
            q_bits=width,
            q_group_size=GROUP,
            quant_predicate=lambda path, module: MATRIX.search(path) is not None,
        )
        model, _ = load(str(converted))
    write(study, model, out)
    shutil.rmtree(converted)


def gptq(study: Study, form: Form, out: Path, width: int) -> None:
    """mlx_lm.quant.gptq: all experts of a layer share the second moment over all tokens."""
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize

    ids = mx.array(calibration_ids(study, study.calibration_tokens))
    with contextlib.redirect_stdout(sys.stderr):
        model, _ = gptq_quantize(load_float32(study), ids, width, GROUP, fallback_bits=8, fallback_group_size=GROUP)
    write(study, model, out)


def dynamic_quant(study: Study, form: Form, out: Path, low: int) -> None:
    """mlx_lm.quant.dynamic_quant: one more bit for the most sensitive matrices (all experts of a layer together)."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    ids = mx.array(calibration_ids(study, SENSITIVITY_TOKENS))
    with contextlib.redirect_stdout(sys.stderr):
        found = estimate_sensitivities(load_float32(study), ids, low, GROUP, low + 1, GROUP)
        model, _ = load(str(study.model))
    ranked = sorted((value, path) for path, value in found if MATRIX.search(path))
    wide = round((form.bits - 32 / GROUP - low) * len(ranked))  # all matrices have the same size
    widths = {path: low + (place >= len(ranked) - wide) for place, (_, path) in enumerate(ranked)}
    nn.quantize(
        model,
        class_predicate=lambda path, module: path in widths and {"bits": widths[path], "group_size": GROUP},
    )
    write(study, model, out)


def load_float32(study: Study):
    """The model as mlx_lm loads it, in float32, the only type in which MLX multiplies gathered matrices on a CPU."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(study.model))
    model.set_dtype(mx.float32)
    return model


def calibration_ids(study: Study, tokens: int) -> np.ndarray:
    """Calibration ids (sequences, tokens): those of every other row if `tokens` is the study's number."""
    files = [Path(file) for file in study.calibration]
    return load_calibration(Tokenizer(study.model), study.config, files, tokens, 0).ids


def write(study: Study, model, out: Path) -> None:
    """Write a bundle with the packed experts of an mlx_lm model, and with the trunk that every row has."""
    import mlx.core as mx

    packed, widths = {}, {}
    for path, module in model.named_modules():
        if found := MATRIX.search(path):
            layer, part = int(found[1]), ("gate", "up", "down").index(found[2])
            # float32 scales, which mlx_lm gives on a CPU, are rounded as they would be in a bfloat16 model
            scales, biases = (values.astype(mx.bfloat16) for values in (module.scales, module.biases))
            read = mx.dequantize(
                module.weight, scales.astype(mx.float32), biases.astype(mx.float32), module.group_size, module.bits
            )
            arrays = [np.array(a.view(mx.uint8)) for a in (module.weight, scales, biases)]
            for expert, (codes, scale, bias) in enumerate(zip(*arrays, strict=True)):
                one = Quantised(codes, scale.view(np.uint16), bias.view(np.uint16))
                if not np.array_equal(dequantise(one, module.bits, read.shape[-1]), np.array(read[expert])):
                    raise AssertionError(f"{path}: expert {expert} is not what mx.dequantize reads")
                packed.setdefault((layer, expert), [None] * 3)[part] = one
                widths.setdefault((layer, expert), [None] * 3)[part] = module.bits
    experts = {key: Packing(tuple(its), GROUP) for key, its in sorted(widths.items())}
    write_bundle(study, out, "mlx_lm", experts, lambda checkpoint, key: packed[key])


def write_bundle(study: Study, out: Path, tool: str, experts: dict, record_of) -> None:
    """Write a bundle with another tool's experts and the checkpoint's trunk.

    experts: packings by key. record_of(checkpoint, key): the matrices of one expert."""
    with Checkpoint(study.model) as checkpoint:
        config = checkpoint.config
        trunk = trunk_packing(trunk_shapes(config), study.trunk_width, GROUP)
        with BundleWriter(out, study.model, config, trunk, experts, extra={"method": {"name": tool}}) as writer:
            packed_trunk = PackedTrunk(checkpoint, config, trunk, writer, 1)
            for name in trunk:
                packed_trunk.trunk(name)
            for key in experts:
                bias = reference.expert_bias(config, checkpoint, *key)
                writer.write_expert(*key, record_of(checkpoint, key), bias)
            writer.finish()
