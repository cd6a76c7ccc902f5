"""GGUF files of families whose tensors llama.cpp's converter changes: they are read as the checkpoints they were."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of
from golden_checkpoints import write_checkpoint
from test_checkpoint import assert_same_tensors, read_file, refusal, write_file

pytest.importorskip("gguf")
import gguf_files

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint

CHANGED = {  # keys of config.json whose values the released models have, as no metadata does
    "qwen3_next": {},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {},
    "gemma4": {},
    "gemma4_text": {
        "attention_bias": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.25},
        },
    },
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "nemotron_h": {"time_step_min": 0.001},
    "deepseek_v2": {},
    "deepseek_v3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 6.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "moonlight": {"rope_interleave": True},
    "glm4_moe_lite": {},
}


def source_of(kind: str, directory: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A golden checkpoint, with the keys of CHANGED, and without biases if these say so."""
    source, *golden = write_checkpoint(kind, directory / "source")
    if CHANGED[kind].get("attention_bias") is False:
        tensors = read_file(source / "model.safetensors")
        left = {key: its for key, its in tensors.items() if not key.endswith("_proj.bias")}
        write_file(source / "model.safetensors", left)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config).update(CHANGED[kind])
    (source / "config.json").write_text(json.dumps(config))
    return source, *golden


@pytest.mark.parametrize("kind", CHANGED)
def test_a_gguf_file_is_the_checkpoint_it_was_made_of(tmp_path, kind):
    source, token_ids, logits = source_of(kind, tmp_path)
    gguf_files.write(source, tmp_path / "model.gguf")
    checkpoint, wanted = Checkpoint(tmp_path / "model.gguf"), Checkpoint(source)
    assert checkpoint.config == replace(wanted.config, architecture=checkpoint.config.architecture)
    assert checkpoint.unused == []
    assert_same_tensors(checkpoint, wanted)
    if not CHANGED[kind]:
        compress(tmp_path / "model.gguf", tmp_path / "out.emoe", bits=16, threads=1)
        found = logits_of(tmp_path / "out.emoe", token_ids, ram="2GB", threads=1)
        np.testing.assert_allclose(found, logits, atol=1e-3)


@pytest.mark.parametrize(
    "kind, spelling",
    [("qwen3_next", "old"), ("qwen3_next", "joined"), ("qwen3_5_moe_text", "joined"), ("deepseek_v3", "old")],
)
def test_other_spellings_are_read(tmp_path, kind, spelling):
    source = source_of(kind, tmp_path)[0]
    gguf_files.write(source, tmp_path / "model.gguf", **{spelling: True})
    checkpoint, wanted = Checkpoint(tmp_path / "model.gguf"), Checkpoint(source)
    assert checkpoint.unused == []
    assert_same_tensors(checkpoint, wanted)


def test_a_layer_without_tensors_is_refused(tmp_path):
    gguf_files.write(source_of("qwen3_next", tmp_path)[0], tmp_path / "model.gguf", changes={"block_count": 5})
    assert refusal(ValueError, lambda: Checkpoint(tmp_path / "model.gguf")) == (
        f"{tmp_path}/model.gguf: layer 4 has none of the tensors attn_q, ssm_out; download it again"
    )
