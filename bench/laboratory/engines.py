"""Inference engines to compare, each in its own process, which times the runs that its parent requests.

    python -m bench.laboratory.engines '{"engine": "llama.cpp", "path": "model.gguf", ...}'    (the fields of Model)

The child loads its model once, reports that, and answers lines of JSON on stdin: {"kind": "pp", "tokens": 128,
"seed": 0} with {"seconds": ...}. So a parent can let engines take turns, and a machine that slows down affects all of
them. The runs are llama-bench's: pp reads a prompt of random tokens into an empty context, tg decodes them one by one.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from edge_moe.bench.bench import generate_run, prompt_run
from edge_moe.bench.conditions import process_seconds
from edge_moe.bench.synthetic import GROUP
from edge_moe.runtime.config_file import read_json

from .cgroup import Cgroup

BATCH = 512  # llama.cpp's n_batch and n_ubatch: the default of the latter


@dataclass(frozen=True, slots=True)
class Model:
    """A model file and the engine that runs it."""

    engine: str  # of ENGINES
    label: str  # a description of the file
    path: str
    file_bytes: int
    token_bytes: float  # bytes of the weights used for one generated token
    vocab: int
    context: int  # tokens
    threads: int
    clock: str = "wall"  # of CLOCKS: what the seconds of a run are
    options: dict = field(default_factory=dict)  # of the engine


class EdgeMoe:
    """Our own engine. ram: the cap; without it, every expert must fit in memory."""

    def __init__(self, model: Model, ram: int | str | None = None, device: str = "auto"):
        from edge_moe.runtime.runtime import Runtime

        self.runtime = Runtime(model.path, ram or "auto", model.context, device, model.threads, prune="off")
        if ram is None and not self.runtime.plan.resident:
            raise MemoryError(f"{model.path}: its experts do not fit into the memory that is free")

    def prompt(self, ids: list[int]) -> None:
        prompt_run(self.runtime, ids, "off")

    def generate(self, ids: list[int]) -> None:
        generate_run(self.runtime, ids, "off")


class LlamaCpp:
    """llama.cpp by its C API, on the CPU.

    repack: its default, makes a second copy of the weights at load. exact: keys, values and attention in float32.
    """

    def __init__(self, model: Model, repack: bool = True, exact: bool = False):
        import llama_cpp

        self.api = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, None)
        LlamaCpp.quiet = quiet  # the library calls it for as long as the process runs
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        loading.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(model.path), loading)
        if not self.model:
            raise OSError(f"{model.path}: llama.cpp cannot load this file")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = model.context
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = model.threads
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise OSError(f"{model.path}: llama.cpp cannot make a context of {model.context} tokens")
        self.vocab = model.vocab

    def prompt(self, ids: list[int]) -> None:
        self._clear()
        for at in range(0, len(ids), BATCH):
            self._decode(ids[at : at + BATCH])

    def generate(self, ids: list[int]) -> None:
        self._clear()
        for token in ids:
            self._decode([token])

    def logits(self) -> np.ndarray:
        """float32 (vocab,), after the last token."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def _decode(self, ids: list[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise OSError(f"llama_decode of {len(ids)} tokens failed with {code}")
        self.api.llama_synchronize(self.context)


class MlxLm:
    """mlx_lm on MLX's default device, with random weights of a bundle's shapes, quantised here with float32 scales."""

    def __init__(self, model: Model, bits: int):
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten
        from mlx_lm.models import cache, qwen3_moe

        self.mx, self.cache = mx, cache
        args = qwen3_moe.ModelArgs.from_dict(read_json(Path(model.path) / "config.json"))
        self.model = qwen3_moe.Model(args)
        routers = re.compile(r"mlp\.gate$")
        nn.quantize(
            self.model,
            GROUP,
            bits,
            class_predicate=lambda path, module: hasattr(module, "to_quantized") and not routers.search(path),
        )
        for _, array in tree_flatten(self.model.parameters()):
            mx.eval(array)  # one at a time: the unquantised array is eight times as large

    def prompt(self, ids: list[int]) -> None:
        self._clear()
        self._decode(ids)

    def generate(self, ids: list[int]) -> None:
        self._clear()
        for token in ids:
            self._decode([token])

    def logits(self) -> np.ndarray:
        """float32 (vocab,), after the last token."""
        return np.array(self.last)

    def _clear(self) -> None:
        self.state = self.cache.make_prompt_cache(self.model)

    def _decode(self, ids: list[int]) -> None:
        self.last = self.model(self.mx.array([ids]), cache=self.state)[0, -1]
        self.mx.eval(self.last)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second sums over threads, waiting ones included
ENGINES = {"edge-moe": EdgeMoe, "llama.cpp": LlamaCpp, "mlx-lm": MlxLm}


class Child:
    """A context manager that loads a model in a child process, in a cgroup if one is given.

    Raises OSError if the process ends early, as when the kernel kills it at the cgroup's limit.
    """

    def __init__(self, model: Model, cgroup: Cgroup | None = None):
        self.model = model
        command = [sys.executable, "-m", "bench.laboratory.engines", json.dumps(asdict(model))]
        join = {"preexec_fn": cgroup.join} if cgroup else {}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **join)
        try:
            self._answer()
        except OSError:
            self.close()
            raise

    def run(self, kind: str, tokens: int, seed: int) -> float:
        """Seconds of one run of `tokens` random tokens. kind: pp, a prompt; tg, tokens decoded one by one."""
        with suppress(BrokenPipeError):  # reading the answer raises the error
            print(json.dumps({"kind": kind, "tokens": tokens, "seed": seed}), file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds on all cores since the child started; 0 if not known."""
        return process_seconds(self._process.pid)

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = signal.strsignal(-code).lower() if code < 0 else f"exit code {code}"
            raise OSError(f"{self.model.engine} ended while it was running {Path(self.model.path).name} ({said})")
        return json.loads(line)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # an engine's own output must not mix with the answers
    model = Model(**json.loads(sys.argv[1]))
    engine, clock = ENGINES[model.engine](model, **model.options), CLOCKS[model.clock]
    runs = {"pp": engine.prompt, "tg": engine.generate}
    print(json.dumps({"loaded": True}), file=out, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        ids = np.random.default_rng(wanted["seed"]).integers(0, model.vocab, wanted["tokens"]).tolist()
        began = clock()
        runs[wanted["kind"]](ids)
        print(json.dumps({"seconds": clock() - began}), file=out, flush=True)


if __name__ == "__main__":
    main()
