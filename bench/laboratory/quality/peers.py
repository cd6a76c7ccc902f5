"""Other tools' forms of the same checkpoint, in the same bundle format and harness.

mlx_lm's come from its own code, run here; only its experts are taken, the trunk is as in every other row. Its packed
codes are read as MLX reads them, so nothing is rounded twice. llama.cpp's types are in llama_types.py.
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
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.tokenizer import Tokenizer

from .forms import Form
from .study import Study

GROUP = 64
CONVERT_WIDTHS = (2, 3, 4)
GPTQ_WIDTHS = (2, 4)  # those below 8 that its GPTQ packs
SENSITIVITY_TOKENS = 8192  # of calibration for dynamic_quant: ten seconds of one core for 512
NEAR = 0.01  # bits by which a row may miss the size it is shown at
MATRIX = re.compile(r"layers\.(\d+)\..*switch_mlp\.(gate|up|down)_proj$")


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def mlx_forms(bits: float) -> list[Form]:
    """What mlx_lm can make of the experts at these true bits; nothing where none of its sizes is near."""
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
    """mlx_lm.convert with a predicate that takes the experts alone."""
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
    """mlx_lm.quant.gptq: all experts of a layer share one second moment, of all tokens."""
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize

    ids = mx.array(calibration_ids(study, study.calibration_tokens))
    with contextlib.redirect_stdout(sys.stderr):
        model, _ = gptq_quantize(load_float32(study), ids, width, GROUP, fallback_bits=8, fallback_group_size=GROUP)
    write(study, model, out)


def dynamic_quant(study: Study, form: Form, out: Path, low: int) -> None:
    """mlx_lm.quant.dynamic_quant: one more bit for the matrices (of a layer's experts together) of most sensitivity."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    ids = mx.array(calibration_ids(study, SENSITIVITY_TOKENS))
    with contextlib.redirect_stdout(sys.stderr):
        found = estimate_sensitivities(load_float32(study), ids, low, GROUP, low + 1, GROUP)
        model, _ = load(str(study.model))
    ranked = sorted((value, path) for path, value in found if MATRIX.search(path))
    wide = round((form.bits - 32 / GROUP - low) * len(ranked))  # they are equally large
    widths = {path: low + (place >= len(ranked) - wide) for place, (_, path) in enumerate(ranked)}
    nn.quantize(
        model,
        class_predicate=lambda path, module: path in widths and {"bits": widths[path], "group_size": GROUP},
    )
    write(study, model, out)


def load_float32(study: Study):
    """The model as mlx_lm loads it, in float32: MLX multiplies by gathered matrices on a CPU in no other type."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(study.model))
    model.set_dtype(mx.float32)
    return model


def calibration_ids(study: Study, tokens: int) -> np.ndarray:
    """(sequences, tokens), those that every other row calibrates on where `tokens` is theirs."""
    files = [Path(file) for file in study.calibration]
    return load_calibration(Tokenizer(study.model), study.config, files, tokens, 0).ids


def write(study: Study, model, out: Path) -> None:
    """The bundle of an mlx_lm model's packed experts and of the checkpoint's trunk, as every row has it."""
    import mlx.core as mx

    packed, widths = {}, {}
    for path, module in model.named_modules():
        if found := MATRIX.search(path):
            layer, part = int(found[1]), ("gate", "up", "down").index(found[2])
            # float32 scales, as its tools give on a CPU, are rounded as they would be for a bfloat16 model
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
    """Another tool's bundle, with the checkpoint's trunk. experts: their packings; record_of(checkpoint, key): one."""
    with Checkpoint(study.model) as checkpoint:
        config = checkpoint.config
        trunk = trunk_packing(trunk_shapes(config), study.trunk_width, GROUP)
        with BundleWriter(out, study.model, config, trunk, experts, extra={"method": {"name": tool}}) as writer:
            packed_trunk = PackedTrunk(checkpoint, config, trunk, writer, 1)
            for name in trunk:
                packed_trunk.trunk(name)
            for key in experts:
                writer.write_expert(*key, record_of(checkpoint, key))
            writer.finish()
