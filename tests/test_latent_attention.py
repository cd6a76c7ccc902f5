"""Attention over a latent: DeepSeek-V3 in its variants is transformers', and nothing but the tokens changes a bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bundles import LAST, logits_of, make_engine, run_engine, run_python, same_bits, write_bundle, write_lossless
from golden_checkpoints import write_checkpoint

from edge_moe import _core
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.compressor.rounding.quantise import dequantise, largest_group, quantise, trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime import reference
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.config_file import parse_config
from edge_moe.runtime.engine_config import engine_memory
from edge_moe.runtime.layers.attention import Attention
from edge_moe.runtime.layers.rope import Rope

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 64,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2048,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory):
    """A random bundle of CONFIG, experts of 2 bits and the rest of 8."""
    directory = tmp_path_factory.mktemp("latent")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return make_synthetic(directory, directory / "random.emoe", width=2).path


# ---- the same logits as transformers


@pytest.mark.parametrize(
    "change",
    [
        {"q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_parameters": YARN, "rope_interleave": False},
        {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 2, "norm_topk_prob": False},
        {"kv_lora_rank": 40, "v_head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"kv_lora_rank": 80, "qk_nope_head_dim": 7, "qk_rope_head_dim": 2, "v_head_dim": 9, "q_lora_rank": 24},
        {"rms_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ],
)
def test_a_fresh_checkpoint_gives_the_logits_of_transformers(tmp_path, change):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits
    from make_golden import random_model

    random_model("deepseek_v3", seed=17, **change).save_pretrained(tmp_path)
    ids = np.random.default_rng(17).integers(0, 128, 70)
    want = transformers_logits(tmp_path, ids)
    checkpoint = Checkpoint(tmp_path)
    config = checkpoint.config
    path = write_lossless(tmp_path / "lossless.emoe", tmp_path, config, checkpoint)
    for got in (reference.forward(config, checkpoint, ids), logits_of(path, ids)):
        assert np.abs(got - want).max() <= 1e-4
        assert np.array_equal(got.argmax(-1), want.argmax(-1))


class Rounded:
    """A checkpoint's weights but for one kind of trunk tensor, which is as a width has it."""

    def __init__(self, checkpoint: Checkpoint, part: str, width: int, group: int):
        self.expert, self._checkpoint, self._part, self._packing = checkpoint.expert, checkpoint, part, (width, group)

    def trunk(self, name: str) -> np.ndarray:
        weights = self._checkpoint.trunk(name)
        if not name.endswith(f".{self._part}"):
            return weights
        return dequantise(quantise(weights, *self._packing), self._packing[0], weights.shape[1])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("part", ["q_a", "q_b", "kv_a", "kv_b", "o"])
def test_each_of_its_matrices_may_be_packed(tmp_path, part, width):
    directory, ids, _ = write_checkpoint("deepseek_v3", tmp_path / "checkpoint")
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    trunk = trunk_packing(trunk_shapes(config), 16, 32)
    group = largest_group(64, *{shape[1] for name, shape in trunk_shapes(config).items() if name.endswith(f".{part}")})
    trunk |= {name: Packing((width,), group) for name in trunk if name.endswith(f".{part}")}
    experts = {(layer, index): Packing((16,) * 3, 32) for layer in config.moe_layers for index in range(16)}
    path = write_bundle(tmp_path / "packed.emoe", directory, config, checkpoint, trunk, experts)
    want = reference.forward(config, Rounded(checkpoint, part, width, group), ids)
    miss = np.sqrt(np.square(logits_of(path, ids) - want).mean(-1))
    # Inputs rounded to 8 bits make 0.01 to 0.04; at single tokens the router falls the other way.
    assert np.median(miss) < 0.05 * want.std()


# ---- where experts come from, threads and chunks change nothing


def test_no_bit_depends_on_chunks_threads_slots_or_kernels(random_bundle):
    ids = np.random.default_rng(5).integers(0, 256, 150)
    want = run_engine(make_engine(random_bundle, context=160, chunk=150), ids, 150)
    assert np.isfinite(want).all() and want.std() > 0.1
    for slots, threads, chunk in ((None, 1, 1), (4, 2, 3), (None, 3, 16), (9, 1, 17), (32, 2, 64), (5, 4, 150)):
        engine = make_engine(random_bundle, slots=slots, threads=threads, chunk=chunk, context=160)
        assert same_bits(run_engine(engine, ids, chunk), want), (slots, threads, chunk)
    for name in _core.kernel_names():
        engine = make_engine(random_bundle, threads=2, chunk=40, context=160, kernels=name)
        assert same_bits(run_engine(engine, ids, 40), want), name


def test_what_came_before_in_the_cache_is_forgotten_with_truncate(random_bundle):
    first, second = np.random.default_rng(6).integers(0, 256, (2, 50)).astype(np.int32)
    want = run_engine(make_engine(random_bundle, chunk=50), np.concatenate([first[:20], second[20:]]), 50)
    engine = make_engine(random_bundle, chunk=50, threads=2)
    engine.forward(first, LAST)
    engine.truncate(20)
    assert same_bits(engine.forward(second[20:], LAST), want[-1:])


# ---- memory


def test_the_cache_holds_one_latent_and_one_turned_key_a_token_and_layer():
    config = parse_config(CONFIG)
    for context, chunk, threads, kv, each in ((96, 16, 1, "float32", 4), (2048, 512, 4, "float16", 2)):
        kv_cache, _, scratch = engine_memory(config, context, chunk, threads=threads, kv=kv)
        assert kv_cache == 3 * context * (96 + 12) * each
        # at the least what a chunk's streams, queries and attention's outputs are, and a row of scores a query at once
        streams, queries, outputs = 2 * chunk * 96, chunk * 5 * 32, chunk * 5 * 32
        assert scratch > 4 * (streams + queries + outputs + threads * 16 * context)
    grouped = Attention(5, 5, 32, Rope(12, 1e4))
    without = replace(config, layers=tuple(replace(layer, attention=grouped) for layer in config.layers))
    assert engine_memory(without, 96, 16)[0] == 2 * 3 * 96 * 5 * 32 * 2


CAPPED = """
import json, sys
from edge_moe import Runtime
path, cap = sys.argv[1], sys.argv[2]
with Runtime(path, "8GB" if cap == "0" else int(cap), 1024, threads=2) as runtime:
    plan = runtime.plan
    if cap != "0":
        runtime.generate(list(range(100)) * 10, 20)
with open("/proc/self/status") as status:
    peak = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")][0]
print(json.dumps([plan.floor_bytes, peak, plan.kv_cache_bytes, plan.resident]))
"""


@pytest.mark.skipif(not _core.peak_bytes(), reason="needs /proc")
def test_a_context_full_of_latents_stays_under_the_cap(tmp_path):
    config = {
        **CONFIG,
        "kv_lora_rank": 4096,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "n_routed_experts": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = make_synthetic(tmp_path, tmp_path / "wide.emoe", width=8).path
    floor, *_ = json.loads(run_python(CAPPED, path, 0).stdout)
    cap = floor + 1_000_000  # by so much does one start of the interpreter differ from the next
    _, peak, kv_cache, resident = json.loads(run_python(CAPPED, path, cap).stdout)
    assert kv_cache > 25_000_000
    assert not resident
    assert peak <= cap
