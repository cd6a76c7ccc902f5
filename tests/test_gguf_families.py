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
from edge_moe.compressor.source.gguf_architectures import ARCHITECTURES

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
    "granitemoe": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "alpha": 1.0, "factor": 1.0}},
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


SPELLINGS = [
    *(("qwen3_next", "old"), ("qwen3_next", "joined"), ("qwen3_5_moe_text", "joined")),
    *(("deepseek_v3", "old"), ("deepseek_v3", "joined")),
]


@pytest.mark.parametrize("kind, spelling", SPELLINGS)
def test_other_spellings_are_read(tmp_path, kind, spelling):
    source = source_of(kind, tmp_path)[0]
    gguf_files.write(source, tmp_path / "model.gguf", **{spelling: True})
    checkpoint, wanted = Checkpoint(tmp_path / "model.gguf"), Checkpoint(source)
    assert checkpoint.unused == []
    assert_same_tensors(checkpoint, wanted)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("qwen3_next", {"block_count": 5}, "layer 4 has none of the tensors attn_q, ssm_out; download it again"),
        (
            "gemma4",
            {"attention.sliding_window_pattern": [True]},
            "attention.sliding_window_pattern is [True], expected a value for each of the 3 layers",
        ),
        (
            "gemma4",
            {"rope.dimension_count_swa": 10},
            "rope.dimension_count_swa is 10, expected all of a head's dimensions",
        ),
        (
            "gemma4",
            {"expert_count": None},
            f"GGUF architecture 'gemma4' without experts is not supported; supported are {', '.join(ARCHITECTURES)}; "
            "for others use the checkpoint in safetensors format",
        ),
        (
            "deepseek_v3",
            {"expert_gating_func": 1},
            "expert_gating_func 1 with exp_probs_b is not supported; supported are 1 (softmax) without it and 2 "
            "(sigmoid) with it",
        ),
        (
            "deepseek_v2",
            {"expert_weights_norm": True},
            "expert_weights_norm true is not supported with expert_gating_func 1",
        ),
        (
            "deepseek_v3",
            {"expert_group_count": None},
            "expert_group_count is missing, as in older files; put the model's config.json beside the file",
        ),
        (
            "deepseek_v3",
            {"attention.temperature_scale": 0.1},
            "attention.temperature_scale is not supported for deepseek2",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, kind, changes, message):
    gguf_files.write(source_of(kind, tmp_path)[0], tmp_path / "model.gguf", changes=changes)
    assert refusal(ValueError, lambda: Checkpoint(tmp_path / "model.gguf")) == f"{tmp_path}/model.gguf: {message}"


def test_older_files_of_deepseek_do_not_tell_their_router(tmp_path):
    for kind in ("deepseek_v2", "deepseek_v3"):
        source = source_of(kind, tmp_path / kind)[0]
        gguf_files.write(source, tmp_path / f"{kind}.gguf", changes={"expert_gating_func": None})
        assert Checkpoint(tmp_path / f"{kind}.gguf").config == Checkpoint(source).config


def test_what_older_files_lack_is_beside_them(tmp_path):
    source = source_of("deepseek_v3", tmp_path)[0]
    gguf_files.write(source, tmp_path / "model.gguf", old=True, changes={"expert_group_count": None})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    checkpoint, wanted = Checkpoint(tmp_path / "model.gguf"), Checkpoint(source)
    assert checkpoint.config == wanted.config
    assert_same_tensors(checkpoint, wanted)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    source = source_of("qwen3_5_moe_text", tmp_path)[0]
    with (tmp_path / "source" / "config.json").open() as file:
        layers = json.load(file)["num_hidden_layers"]
    changes = {"block_count": layers + 1, "nextn_predict_layers": 1}
    gguf_files.write(source, tmp_path / "model.gguf", changes=changes)
    assert Checkpoint(tmp_path / "model.gguf").config == Checkpoint(source).config
