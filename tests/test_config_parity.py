"""What config.json means is what transformers takes it to mean: defaults, both spellings, weights that it names."""

import json

import numpy as np
import pytest
from bundles import logits_of, write_lossless
from make_golden import logits_of as transformers_logits
from make_golden import random_model
from test_checkpoint import read_file, write_file

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.config import ARCHITECTURES, parse_config
from edge_moe.runtime.config_keys import COMMON_DEFAULTS, DEFAULTS

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINEAR = {"type": "linear", "factor": 4.0}


def set_config(directory, without=(), **changes) -> None:
    path = directory / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**raw, **changes}))


def assert_same_logits(directory) -> None:
    """The reference and a lossless bundle give transformers' logits for what lies in `directory`."""
    ids = np.random.default_rng(5).integers(0, 128, 60)
    want = transformers_logits(directory, ids)
    checkpoint = Checkpoint(directory)
    path = write_lossless(directory / "lossless.emoe", directory, checkpoint.config, checkpoint)
    for got in (reference.forward(checkpoint.config, checkpoint, ids), logits_of(path, ids)):
        assert np.abs(got - want).max() <= 1e-4
        assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_absent_key_means_what_it_means_to_transformers(kind):
    theirs = type(transformers.AutoConfig.for_model(kind))()
    for key, value in {**COMMON_DEFAULTS, **DEFAULTS[kind]}.items():
        assert (theirs.rope_parameters[key] if key == "rope_theta" else getattr(theirs, key)) == value, key
    defaults = theirs.to_dict()
    whole = parse_config(defaults)
    for key in defaults.keys() - {"model_type"}:
        without = {name: value for name, value in defaults.items() if name != key}
        try:
            assert parse_config(without) == whole, key
        except ValueError as error:
            assert f"{key!r}" in str(error) and str(error).endswith("is missing")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mixtral", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3_moe", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("olmoe", {"rope_scaling": LINEAR, "rope_parameters": {}, "rope_theta": 500.0}),
        ("qwen2_moe", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 500.0}),
        ("deepseek_v3", {"rope_parameters": {**LINEAR, "mscale_all_dim": 1.5, "rope_theta": 1e4}}),
        ("deepseek_v3", {"rope_parameters": {"type": "default", "factor": 4.0, "mscale_all_dim": 1.5}}),
        ("deepseek_v3", {"rope_parameters": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.5}}),
        ("qwen3_moe", {"rope_parameters": {**LINEAR, "mscale_all_dim": 1.5, "rope_theta": 1e4}}),
    ],
)
def test_rotary_position_in_every_spelling_is_that_of_transformers(tmp_path, kind, changes):
    random_model(kind, seed=23).save_pretrained(tmp_path)
    set_config(tmp_path, without=("rope_parameters",), **changes)
    assert_same_logits(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v3", {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
                         "num_hidden_layers": 4}),
        ("mixtral", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("qwen2_moe", {"num_attention_heads": 16, "num_key_value_heads": 16, "mlp_only_layers": []}),
    ],
)  # fmt: skip
def test_weights_of_keys_that_are_left_out_are_used(tmp_path, kind, changes):
    random_model(kind, seed=29, **changes).save_pretrained(tmp_path)
    set_config(tmp_path, without=changes.keys() - {"num_hidden_layers", "num_attention_heads"})
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
def test_a_head_that_is_stored_beside_a_tied_embedding_is_used_where_it_differs(tmp_path, kind, own):
    random_model(kind, seed=31, tie_word_embeddings=not own).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if not own:
        tensors = read_file(path)
        write_file(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    set_config(tmp_path, tie_word_embeddings=True)
    assert_same_logits(tmp_path)
    assert Checkpoint(tmp_path).config.tied_head is not own
    assert json.loads((tmp_path / "lossless.emoe" / "config.json").read_text())["tie_word_embeddings"] is not own


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_names_without_the_models_prefix_are_read(tmp_path, kind):
    random_model(kind, seed=37, tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    write_file(path, {name.removeprefix("model."): tensor for name, tensor in read_file(path).items()})
    assert_same_logits(tmp_path)
