"""The reference forward pass against transformers: golden logits, and live where torch is installed.

Tolerance: two float32 evaluations of these models differ by 1e-5 to 2e-5 in logits of up to 10.
"""

from dataclasses import replace

import numpy as np
import pytest
from bundles import Kept, changed
from golden_checkpoints import ARCHITECTURES, CHECKPOINTS, DROPPED, dropped_logits, write_checkpoint

from edge_moe.bench import EMBEDDED
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.layers.indexer import Choice
from edge_moe.runtime.layers.mlp import RouterConfig
from edge_moe.runtime.layers.past import Past

TOLERANCE = 1e-4


@pytest.fixture(params=CHECKPOINTS)
def golden(request, tmp_path):
    directory, token_ids, logits = write_checkpoint(request.param, tmp_path / request.param)
    return Checkpoint(directory), token_ids, logits


def assert_agree(logits, wanted) -> None:
    logits = np.asarray(logits)
    assert logits.dtype == np.float32 and logits.shape == wanted.shape
    assert np.abs(logits - wanted).max() <= TOLERANCE
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))


def test_numpy_gives_the_logits_of_transformers(golden):
    checkpoint, token_ids, logits = golden
    assert_agree(reference.forward(checkpoint.config, checkpoint, token_ids), logits)


def test_mlx_gives_the_logits_of_transformers(golden):
    mx = pytest.importorskip("mlx.core")
    checkpoint, token_ids, logits = golden
    assert_agree(reference.forward(checkpoint.config, checkpoint, token_ids, mx), logits)


class Remembered(Past):
    """The tokens of one sequence, which is computed in parts."""

    def __init__(self):
        self.kept, self.position = {}, 0

    def all(self, name, x, before=None):
        if x is not None:
            assert self.kept.get(name, x[:, :0]).shape[1] == (self.position if before is None else before)
            self.kept[name] = np.concatenate([self.kept.get(name, x[:, :0]), x], axis=1)
        return self.kept.get(name)

    def latest(self, name, x, count, xp=np):
        whole = np.concatenate([self.kept.get(name, np.zeros_like(x, shape=(1, count, x.shape[2]))), x], axis=1)
        self.kept[name] = whole[:, whole.shape[1] - count :]
        return whole

    def state(self, shape, xp=np):
        return self.kept.get("state", np.zeros(shape, np.float32))

    def keep_state(self, state):
        self.kept["state"] = state


@pytest.mark.parametrize("chunk", [1, 7])
def test_a_sequence_in_parts_has_the_logits_of_transformers(golden, chunk):
    checkpoint, token_ids, logits = golden
    config, ids, found = checkpoint.config, token_ids[None], []
    pasts = [Remembered() for _ in range(config.layer_count)]
    for first in range(0, len(token_ids), chunk):
        part = ids[:, first : first + chunk]
        x, choice = reference.embed(config, checkpoint, part), Choice()
        for layer, past in enumerate(pasts):
            x = reference.with_ngrams(config, checkpoint, layer, x, ids[:, : first + chunk], past=past)
            x = reference.layer(config, checkpoint, layer, x, choice=choice, ids=part[0], past=past)
            past.position += part.shape[1]
        found.append(reference.head(config, checkpoint, x)[0])
    assert_agree(np.concatenate(found), logits)


@pytest.mark.parametrize("architecture", DROPPED)
def test_without_the_dropped_experts_the_logits_are_those_of_transformers(tmp_path, architecture):
    directory, token_ids, _ = write_checkpoint(architecture, tmp_path)
    checkpoint = Checkpoint(directory)
    kept, layer_top_k = DROPPED[architecture]
    config = replace(checkpoint.config, kept=kept, layer_top_k=layer_top_k)
    assert_agree(reference.forward(config, Kept(checkpoint, config), token_ids), dropped_logits(architecture))


def test_a_batch_gives_each_sequence_its_own_logits(golden):
    checkpoint, token_ids, logits = golden
    other = token_ids[::-1].copy()
    batch = reference.forward(checkpoint.config, checkpoint, np.stack([other, token_ids]))
    assert_agree(batch[1], logits)
    assert_agree(batch[0], reference.forward(checkpoint.config, checkpoint, other))


RULES = [
    ("mixtral", {"window": 0}),
    ("mixtral", {"window": 10}),
    ("mixtral", {"router": RouterConfig(renormalise=False)}),
    ("mixtral", {"rope": {"theta": 1e4}}),
    ("mixtral", {"top_k": 1}),
    ("olmoe", {"clip": 0.0}),
    ("olmoe", {"qk_norm": "none"}),
    ("olmoe", {"router": RouterConfig(renormalise=True)}),
    ("qwen2_moe", {"bias": False}),
    ("qwen2_moe", {"shared_hidden": 0}),
    ("qwen2_moe", {"activation": "gelu_tanh"}),
    ("qwen3_moe", {"qk_norm": "none"}),
    ("qwen3_moe", {"rope": {"factor": 1.0}}),
    ("qwen3_moe", {"norm_eps": 1e-2}),
    ("deepseek_v3", {"rope": {"yarn": None}}),
    ("deepseek_v3", {"rope": {"yarn": {"mscale": 0.0}}}),
    ("deepseek_v3", {"rope": {"softmax_factor": 1.0}}),
    ("deepseek_v3", {"rope": {"yarn": {"beta_fast": 32.0}}}),
    ("deepseek_v3", {"rope": {"interleaved": False}}),
    ("deepseek_v3", {"attention": {"norm_eps": 1e-2}}),
    ("deepseek_v3", {"shared_hidden": 0}),
    ("deepseek_v3", {"router": {"score": "softmax"}}),
    ("deepseek_v3", {"router": {"selection_bias": False}}),
    ("deepseek_v3", {"router": {"groups": 1, "top_groups": 1}}),
    ("deepseek_v3", {"router": {"top_groups": 3}}),
    ("deepseek_v3", {"router": {"group_score": "max"}}),
    ("deepseek_v3", {"router": {"renormalise": False}}),
    ("deepseek_v3", {"router": {"scale": 1.0}}),
    ("moonlight", {"rope": {"interleaved": True}}),
    ("moonlight", {"router": {"renormalise": True}}),
    ("gemma4_text", {"attention": {"window": 0}}),
    ("gemma4_text", {"v_norm": False}),
    ("gemma4_text", {"qk_norm": "none"}),
    ("gemma4_text", {"attention": {"scale": 0.0}}),
    ("gemma4_text", {"rope": {"of": 0}}),
    ("gemma4_text", {"embedding_scale": 1.0}),
    ("gemma4_text", {"logits_cap": 0.0}),
    ("gemma4_text", {"post_norms": False}),
    ("gemma4_text", {"own_norms": False}),
    ("gemma4_text", {"layer_scale": False}),
    ("gemma4_text", {"router": {"expert_scale": False}}),
    ("gemma4_text", {"router": {"logits_scale": 1.0}}),
    ("gemma4", {"keys_as_values": True}),
    ("deepseek_v4", {"attention": {"window": 8}}),
    ("deepseek_v4", {"attention": {"index": None}}),
    ("deepseek_v4", {"rope": {"interleaved": False}}),
    ("deepseek_v4", {"rope": {"yarn": None}}),
    ("deepseek_v4", {"streams": {"iterations": 1}}),
    ("deepseek_v4", {"streams": {"eps": 1e-6}}),
    ("deepseek_v4", {"swiglu_shift": 1.0}),
    ("deepseek_v4", {"swiglu_limit": 3.0}),
    ("deepseek_v4", {"swiglu_alpha": 1.702}),
    ("deepseek_v4", {"router": {"score": "sigmoid"}}),
    ("deepseek_v4", {"router": {"selection_bias": False}}),
    ("phimoe", {"norm": "rms"}),
    ("phimoe", {"head_bias": False}),
    ("phimoe", {"router": {"score": "softmax"}}),
    ("phimoe", {"router": {"threshold": 0.02}}),
    ("phimoe", {"rope": {"long": None}}),
    ("phimoe", {"rope": {"long": {"original_context": 31}}}),
    ("phimoe", {"rope": {"long": {"short": {"scale": 1.0}}}}),
]


@pytest.mark.parametrize("name, change", RULES)
def test_a_rule_left_out_shows_in_the_golden_logits(tmp_path, name, change):
    directory, token_ids, logits = write_checkpoint(name, tmp_path)
    checkpoint = Checkpoint(directory)
    wrong = reference.forward(changed(checkpoint.config, **change), checkpoint, token_ids)
    assert np.abs(wrong - logits).max() > 100 * TOLERANCE


def test_a_later_token_never_changes_an_earlier_ones_logits(golden):
    checkpoint, token_ids, logits = golden
    assert_agree(reference.forward(checkpoint.config, checkpoint, token_ids[:9]), logits[:9])


def test_a_pruned_expert_adds_nothing(golden):
    checkpoint, _, _ = golden
    config, layer = checkpoint.config, checkpoint.config.moe_layers[-1]  # the first may look experts up by token
    h = np.random.default_rng(0).standard_normal((5, config.dim), dtype=np.float32)
    chosen, routing_weights = reference.route(config, checkpoint, layer, h)
    pruned = chosen.copy()
    pruned[:, 0] = -1
    got = reference.experts(config, checkpoint, layer, h, pruned, routing_weights)
    wanted = reference.experts(config, checkpoint, layer, h, chosen[:, 1:], routing_weights[:, 1:])
    np.testing.assert_array_equal(got, wanted)


def test_of_experts_with_equal_scores_the_lower_number_goes_first(golden):
    checkpoint, _, _ = golden
    config = changed(checkpoint.config, router={"selection_bias": False, "logit_bias": False, "expert_scale": False})
    router = config.router
    h = np.zeros((2, config.dim), np.float32)
    chosen, routing_weights = reference.route(config, checkpoint, config.moe_layers[-1], h)
    if router.score == "sparsemixer":  # 0 is taken first, of all, and 1 of the rest, so it weighs more
        assert chosen.tolist() == [[1, 0]] * 2
        np.testing.assert_allclose(routing_weights, [[1 / (config.experts - 1), 1 / config.experts]] * 2, rtol=1e-6)
        return
    assert chosen.tolist() == [list(range(config.top_k))] * 2
    score = 1 / config.experts if router.score == "softmax" else 0.5
    weight = config.routing_scale * (1 / config.top_k if router.renormalise else score)
    np.testing.assert_allclose(routing_weights, weight, rtol=1e-6)


@pytest.mark.parametrize("token", [-1, 128])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, token):
    checkpoint = Checkpoint(write_checkpoint("olmoe", tmp_path)[0])
    with pytest.raises(ValueError) as error:
        reference.forward(checkpoint.config, checkpoint, [3, token])
    assert str(error.value) == f"token id {token} is outside the vocabulary of 128 tokens"


def test_the_embedded_model_gives_finite_logits():
    checkpoint = Checkpoint(EMBEDDED)
    logits = reference.forward(checkpoint.config, checkpoint, [0, 17, 300, 4095])
    assert logits.shape == (4, 4096) and np.isfinite(logits).all()


LIVE = {
    "mixtral": {"sliding_window": None, "hidden_act": "gelu_pytorch_tanh"},
    "olmoe": {"clip_qkv": None, "norm_topk_prob": True, "num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
    "qwen3_moe": {"tie_word_embeddings": True, "norm_topk_prob": False, "num_key_value_heads": 1},
    "deepseek_v3": {"tie_word_embeddings": True, "norm_topk_prob": False, "n_shared_experts": 1, "topk_group": 3},
}


@pytest.mark.parametrize("hub_layout", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_sharded_checkpoint_gives_the_logits_of_transformers(tmp_path, architecture, hub_layout):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of, random_model

    model = random_model(architecture, seed=11, num_hidden_layers=2, **LIVE[architecture])
    model.save_pretrained(tmp_path, max_shard_size="100KB", save_original_format=hub_layout)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    token_ids = np.random.default_rng(11).integers(0, 128, 24)
    checkpoint = Checkpoint(tmp_path)
    assert_agree(reference.forward(checkpoint.config, checkpoint, token_ids), logits_of(tmp_path, token_ids))
