"""Measuring the time of compressing: of a whole run at default settings, and of one expert by its size."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from edge_moe.bench.conditions import processor, stolen
from edge_moe.compressor.choosing import targets
from edge_moe.compressor.pipeline import Compression, compress
from edge_moe.compressor.rounding.gptq import gptq
from edge_moe.compressor.rounding.inputs import Inputs
from edge_moe.compressor.rounding.quantise import dequantise
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.devices.probe import default_threads

from .study import Study

SIZES = (256, 512, 1024, 2048)  # inputs of an expert; its inner size is half of that
ROWS = 2048  # tokens of an expert, about as many as with the default calibration, 64 experts and top 4
WIDTHS, GROUP = (2, 4), 64


def whole_run(study: Study) -> dict:
    """Seconds of compress() at default settings, by step, with all threads; and the machine's load before."""
    out, steps = study.work / "timed.emoe", []
    for left in (out, *(out.with_name(out.name + suffix) for suffix in (".work", ".partial"))):
        shutil.rmtree(left, ignore_errors=True)
    busy = os.getloadavg()[0]
    began, cpu, before = time.monotonic(), time.process_time(), stolen()

    def tell(step: str, done: int, of: int) -> None:
        if not steps or steps[-1][0] != step:
            steps.append((step, time.monotonic() - began))

    options = {"calibration": study.calibration, "tokens": study.calibration_tokens}
    bits = compress(study.model, out, progress=tell, **options).bits_per_weight
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    shutil.rmtree(out)
    ends = [at for _, at in steps[1:]] + [seconds]
    return {
        "processor": processor(),
        "threads": default_threads(),
        "busy": busy,
        "bits": bits,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "stolen": stolen() - before,
        "steps": {"text": steps[0][1], **{step: end - at for (step, at), end in zip(steps, ends, strict=True)}},
    }


def by_size(study: Study, sizes=SIZES) -> list[dict]:
    """CPU seconds for an expert of each size: for second moments, measuring, and rounding.

    ROWS random inputs and random matrices go through the compressor's own curvature and GPTQ. Measuring covers every
    choice that pmq considers at its default bits, extrapolated from two of them; running the model is not counted.
    """
    with Checkpoint(study.model) as checkpoint:
        o = targets.check(targets.Options(), checkpoint.config)
        choices = len(Compression(checkpoint, Path(), o, None).measured_choices())
    with threadpool_limits(1):
        return [one_size(dim, dim // 2, choices) for dim in sizes]


def one_size(dim: int, hidden: int, choices: int) -> dict:
    random = np.random.default_rng(0)
    x, inner = (random.standard_normal((ROWS, cols), np.float32) for cols in (dim, hidden))
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
    matrices = [random.standard_normal(shape, np.float32) * np.float32(0.02) for shape in shapes]
    weights = np.full(ROWS, 1 / ROWS, np.float32)
    inputs = [Inputs() for _ in range(2)]

    def take() -> None:
        for its, values in zip(inputs, (x, inner), strict=True):
            its.add(values, weights, 0.1 * values)
            its.curvature  # noqa: B018 (computed once)

    moments, (of_x, of_inner) = seconds_of(take), inputs

    def measure(width: int) -> None:
        for matrix, its in zip(matrices, (of_x, of_x, of_inner), strict=True):
            dequantise(gptq(matrix, its.curvature, width, GROUP, sweeps=0), width, matrix.shape[1])

    def round_all() -> None:
        steps = [*np.split(of_x.step(np.concatenate(matrices[:2])), 2), of_inner.step(matrices[2])]
        for matrix, step, its in zip(matrices, steps, (of_x, of_x, of_inner), strict=True):
            gptq(matrix + step, its.curvature, 3, GROUP)

    measuring = choices * sum(seconds_of(lambda width=width: measure(width)) for width in WIDTHS) / len(WIDTHS)
    rounding = seconds_of(round_all)
    return {
        "dim": dim,
        "hidden": hidden,
        "choices": choices,
        "moments": 2 * moments,  # once for measuring and once for rounding
        "measuring": measuring,
        "rounding": rounding,
        "seconds": 2 * moments + measuring + rounding,
    }


def seconds_of(work: Callable[[], None]) -> float:
    """CPU seconds of this process on one core, independent of other load."""
    before = time.process_time()
    work()
    return time.process_time() - before
