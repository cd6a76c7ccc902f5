"""Measures compressing experts of DeepSeek-V3's shapes under a memory cap: peak, speed, and resuming after kills.

It writes a random FP8 checkpoint with experts of 7168 x 2048 (the rest of the model is small), compresses it with
`edge-moe compress --ram CAP`, and then again in runs that are killed at random moments and resumed.
Run: python -m bench.laboratory.large_experts --work DIR
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from edge_moe.runtime.tensorfile import make_header

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 7168,
    "intermediate_size": 2048,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
BLOCK = 128
EXPERT_BYTES = 3 * 7168 * 2048  # of FP8


def write_checkpoint(directory: Path, layers: int, experts: int, top_k: int, seed: int = 0) -> int:
    """Write a random checkpoint, one file per layer; returns its bytes."""
    directory.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    random_ = np.random.default_rng(seed)
    index = {}

    def write(name: str, tensors: dict[str, np.ndarray | tuple]) -> None:
        kinds = {"uint8": "F8_E4M3", "uint16": "BF16", "float32": "F32"}
        entries = [(key, kinds[str(v.dtype)], v.shape, v.nbytes) for key, v in tensors.items()]
        with open(directory / name, "wb") as file:
            file.write(make_header(entries, 64))
            for value in tensors.values():
                file.write(value.data)
        index.update(dict.fromkeys(tensors, name))

    def bfloat16(*shape: int, scale: float = 0.02) -> np.ndarray:
        return (random_.standard_normal(shape, np.float32) * scale).view(np.uint32).__rshift__(16).astype(np.uint16)

    def fp8(rows: int, cols: int) -> dict[str, np.ndarray]:
        # sign, exponents 4 to 10, mantissa: values of about 0.1 to 15; a scale brings them to the size of weights
        bits = random_.integers(0, 256, (rows, cols), np.uint8)
        codes = (bits & 0x80) | (((bits >> 3 & 0x0F) % 7 + 4) << 3) | (bits & 7)
        scales = random_.uniform(0.002, 0.006, (-(-rows // BLOCK), -(-cols // BLOCK))).astype(np.float32)
        return {"weight": codes, "weight_scale_inv": scales}

    dim, hidden, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    kv, head_dim = config["num_key_value_heads"], config["head_dim"]
    ones = np.full(dim, 0x3F80, np.uint16)
    write(
        "trunk.safetensors",
        {"model.embed_tokens.weight": bfloat16(config["vocab_size"], dim, scale=1.0), "model.norm.weight": ones},
    )
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.input_layernorm.weight": ones, f"{at}.post_attention_layernorm.weight": ones}
        for part, rows, cols in (
            ("q", heads * head_dim, dim),
            ("k", kv * head_dim, dim),
            ("v", kv * head_dim, dim),
            ("o", dim, heads * head_dim),
        ):
            tensors[f"{at}.self_attn.{part}_proj.weight"] = bfloat16(rows, cols)
        for part in "qk":
            tensors[f"{at}.self_attn.{part}_norm.weight"] = np.full(head_dim, 0x3F80, np.uint16)
        tensors[f"{at}.mlp.gate.weight"] = bfloat16(experts, dim)
        for expert in range(experts):
            for part, rows, cols in (("gate", hidden, dim), ("up", hidden, dim), ("down", dim, hidden)):
                for key, value in fp8(rows, cols).items():
                    tensors[f"{at}.mlp.experts.{expert}.{part}_proj.{key}"] = value
        write(f"layer-{layer}.safetensors", tensors)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(file.stat().st_size for file in directory.iterdir())


def start(model: Path, out: Path, options: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "edge_moe", "compress", str(model), str(out), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, int, str]:
    """Wait for a process; returns (exit status, peak bytes as the kernel counted them, output)."""
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), said


def digest(bundle: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(bundle.iterdir()):
        total.update(file.name.encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory on the disk to use")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--ram", default="3.5GB")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of compress, after --")
    arguments = parser.parse_args()
    model, out = arguments.work / "model", arguments.work / "once.emoe"
    if not model.exists():
        size = write_checkpoint(model, arguments.layers, arguments.experts, arguments.top_k)
        print(f"checkpoint: {size / 1e9:.2f} GB, {arguments.layers} layers of {arguments.experts} experts", flush=True)
    ids = arguments.work / "ids.npy"
    np.save(ids, np.random.default_rng(arguments.seed).integers(0, CONFIG["vocab_size"], 16_384))
    options = ["--ram", arguments.ram, "--calibration", str(ids), *arguments.options]

    began = time.monotonic()
    status, peak, said = finish(start(model, out, options))
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"compress failed: {said}")
    source = arguments.layers * arguments.experts * EXPERT_BYTES
    print(
        f"one run: {seconds:.0f} s, {seconds / (arguments.layers * arguments.experts):.1f} s an expert, "
        f"{source / 1e6 / seconds:.2f} MB/s of FP8 weights, peak {peak / 1e6:,.0f} MB of {arguments.ram}",
        flush=True,
    )

    killed, at, random_ = arguments.work / "killed.emoe", [], random.Random(arguments.seed)
    for _ in range(arguments.kills):
        process = start(model, killed, [*options, "--resume"])
        moment = random_.uniform(0.05, 1) * seconds / arguments.kills
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            at.append(round(moment))
        finish(process)
    status, peak, said = finish(start(model, killed, [*options, "--resume"]))
    if status:
        raise SystemExit(f"resuming failed: {said}")
    same = digest(killed) == digest(out)
    print(
        f"killed {len(at)} times, after {at} s of work each; peak of the last run {peak / 1e6:,.0f} MB; "
        f"identical: {same}"
    )
    shutil.rmtree(killed)
    if not same:
        raise SystemExit("the bundle of the resumed runs differs")


if __name__ == "__main__":
    main()
