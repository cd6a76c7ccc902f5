"""Sizes from shapes alone: weights are transformers', bytes are the bundle's, a published file's total comes out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import REFERENCE, write_bundle
from golden_checkpoints import ARCHITECTURES

from edge_moe.compressor.choosing.estimate import estimate, keep_experts_of
from edge_moe.compressor.choosing.sizes import (
    Sizes,
    at_edge,
    collaborative_bits,
    packed_sizes,
    sizes_by_bits,
    widths_by_kind,
)
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.config_file import load_config, parse_config, read_json
from edge_moe.runtime.engine_config import engine_memory
from edge_moe.runtime.plan import CHUNKS, TOKEN_BYTES

CONFIGS = REFERENCE.parent / "configs"
DEEPSEEK = CONFIGS / "deepseek-v3.json"
QWEN = CONFIGS / "qwen3-30b-a3b.json"
V3 = parse_config(read_json(DEEPSEEK))
TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
}


def weights_of(sizes: Sizes) -> int:
    return sum(part.weights for part in sizes.parts)


def bytes_of(sizes: Sizes) -> int:
    return sum(part.nbytes for part in sizes.parts)


def part_of(sizes: Sizes, name: str):
    return next(part for part in sizes.parts if part.name == name)


# ---- weights


def transformers_weights(raw: dict) -> int:
    """Numbers that transformers keeps of this model; nothing is allocated."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = raw["model_type"]
    config = transformers.AutoConfig.for_model(kind, **{key: raw[key] for key in raw if key != "model_type"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    kept = model.state_dict().keys()
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in kept)
    return sum(weight.numel() for weight in model.parameters()) + buffers


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 1, "tie_word_embeddings": True}])
def test_deepseeks_weights_are_as_many_as_transformers_has(changes):
    raw = {**TINY, **changes}
    assert weights_of(packed_sizes(parse_config(raw), widths_by_kind())) == transformers_weights(raw)


PUBLISHED = {  # billions of weights
    "deepseek-v3": 671,
    "deepseek-v3.2": 671,
    "deepseek-v4-flash": 284,
    "gemma-4-26b-a4b": 25.2,
    "glm-4.5-air": 107,
    "glm-4.7-flash": 30,
    "glm-5": 744,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 117,
    "kimi-k2": 1026,
    "lfm2-8b-a1b": 8.3,
    "minimax-m2": 229,
    "nemotron-3-nano-30b-a3b": 31.6,
    "qwen3-235b-a22b": 235,
    "qwen3-30b-a3b": 30.5,
    "qwen3-next-80b-a3b": 80,
    "qwen3.6-35b-a3b": 35,
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_a_published_models_weights_are_as_many_as_are_published_and_as_transformers_has(file):
    raw = read_json(file)
    found = weights_of(packed_sizes(parse_config(raw), widths_by_kind()))
    assert found / 1e9 == pytest.approx(PUBLISHED[file.stem], rel=0.01)
    assert found == transformers_weights(raw.get("text_config", raw))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_supported_architectures_weights_are_those_of_their_checkpoints(architecture, golden):
    directory = golden[architecture][0]
    raw = (directory / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    config = load_config(directory)
    assert weights_of(packed_sizes(config, widths_by_kind(16))) == stored
    assert stored == transformers_weights(read_json(directory / "config.json"))


def test_deepseek_v3_has_671_billion_weights_of_which_a_token_uses_37():
    total = weights_of(packed_sizes(V3, widths_by_kind()))
    unused = len(V3.moe_layers) * (V3.experts - V3.top_k) * V3.expert_weights
    assert round(total / 1e9) == 671
    assert round((total - unused - V3.vocab * V3.dim) / 1e9) == 37  # the embedding is looked up, not multiplied


# ---- bytes


def test_the_parts_are_the_bytes_of_a_bundle_with_the_same_widths(golden, tmp_path):
    directory = golden["qwen2_moe"][0]
    checkpoint = Checkpoint(directory)
    # Experts of 64 x 32: more than groups of 32 do not fit. Three layers have no first and last eighth.
    widths = widths_by_kind(3, 5, {"gate": 1, "down": 8, "edge_up": 6, "embedding": 4, "shared": 16})
    config, by_name = checkpoint.config, {"embedding": 4, **dict.fromkeys(["gate", "up", "down"], 16)}
    trunk = {}
    for name, shape in trunk_shapes(config).items():
        part = name.split(".")[-1] if ".shared." in name else name
        trunk |= trunk_packing({name: shape}, by_name.get(part, 5), 64)
    experts = {
        (layer, e): Packing((1, 3, 8), 32) for layer in config.moe_layers for e in range(config.experts_of(layer))
    }
    bundle = Bundle.open(write_bundle(tmp_path / "x.emoe", directory, config, checkpoint, trunk, experts))
    with open(bundle.path / TRUNK_FILE, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    sizes = packed_sizes(config, widths)
    assert sizes.trunk_bytes == bundle.trunk_bytes - header
    assert sizes.all_experts_bytes == bundle.expert_bytes
    assert sizes.slot_bytes == max(expert.nbytes for expert in bundle.experts.values())
    assert bytes_of(sizes) == sizes.trunk_bytes + sizes.all_experts_bytes
    assert part_of(sizes, "gate").bits_per_weight == 1 + 2 * 16 / 32
    assert part_of(sizes, "shared").bits_per_weight == 16
    assert part_of(sizes, "float32").bits_per_weight == 32
    weights = 16 * 32 * 64  # of one projection of the 16 experts
    assert part_of(sizes, "padding").nbytes == bundle.expert_bytes - weights * (1 + 3 + 8 + 3) // 8


def test_the_edges_are_the_first_and_last_eighth_of_the_layers():
    assert [at for at in range(58) if at_edge(at, 58)] == [*range(7), *range(51, 58)]
    assert not any(at_edge(at, 7) for at in range(7))
    plain, edges = (packed_sizes(V3, widths_by_kind(2, 4, changes)) for changes in ({}, {"edge_down": 3}))
    matrix = 256 * 2048 * 7168  # of one layer
    assert part_of(edges, "down").nbytes - part_of(plain, "down").nbytes == 14 * matrix // 8
    assert edges.slot_bytes - plain.slot_bytes == 2048 * 7168 // 8
    assert edges.trunk_bytes == plain.trunk_bytes


def test_dropped_experts_take_their_records_and_their_rows_of_the_routers_along():
    widths = widths_by_kind(4)
    whole, left = packed_sizes(V3, widths), packed_sizes(keep_experts_of(V3, 0.75), widths)
    assert left == packed_sizes(keep_experts_of(V3, 192), widths)
    assert left.all_experts_bytes * 4 == whole.all_experts_bytes * 3
    assert whole.trunk_bytes - left.trunk_bytes == 58 * 64 * (7168 + 1) * 4
    uneven = replace(V3, kept=tuple(() if layer < 3 else tuple(range(8 + layer)) for layer in range(61)))
    assert packed_sizes(uneven, widths).all_experts_bytes == sum(range(11, 69)) * whole.slot_bytes


def test_experts_that_cannot_be_grouped_are_counted_at_width_16_only():
    config = parse_config({**TINY, "moe_intermediate_size": 40})
    weights = 8 * 3 * 3 * 40 * 64
    assert (
        sum(part_of(packed_sizes(config, widths_by_kind(16)), x).nbytes for x in ("gate", "up", "down")) == 2 * weights
    )
    with pytest.raises(ValueError) as error:
        packed_sizes(config, widths_by_kind(16, changes={"edge_up": 4}), "x.json")
    assert str(error.value) == "x.json: experts are 40 x 64, not multiples of 32; use width 16"


# ---- Collaborative Compression


def test_collaborative_compressions_file_is_reproduced_from_the_config_alone():
    sizes = sizes_by_bits(keep_experts_of(V3, 192), collaborative_bits)
    total, weights = bytes_of(sizes), weights_of(sizes)
    assert abs(total / 110.75e9 - 1) < 0.01
    assert f"{(total - part_of(sizes, 'head').nbytes) / 1e9:.2f}" == "110.75"  # so that figure has no output head
    assert int(total / 2**30) == 103  # the paper's "103GB"
    assert f"{8 * total / weights:.2f}" == "1.76"
    assert (sizes.trunk_bytes, sizes.all_experts_bytes, weights) == (8_377_925_120, 103_010_009_088, 507_522_615_168)


def test_collaborative_compressions_parts_are_those_of_its_types():
    """The types by hand: of 58 layers 14 are edges, 29 have more bits; of all 61, 30 have, the first 7 of kv_b most."""
    sizes = sizes_by_bits(keep_experts_of(V3, 192), collaborative_bits)
    dim, experts = 7168, 192 * 2048 * 7168
    by_layer = {  # bits of one layer's weights
        "q_a": 61 * 4.5 * 1536 * dim,
        "q_b": 61 * 2.625 * 128 * 192 * 1536,
        "kv_a": 61 * 4.5 * 576 * dim,
        "kv_b": (7 * 4.5 + 23 * 2.625 + 31 * 1.5625) * 128 * 256 * 512,
        "o": (30 * 4.25 + 31 * 3.4375) * 128 * 128 * dim,
    }
    expected = {
        "gate": (14 * 1.75 + 44 * 1.5625) * experts,
        "up": (14 * 1.75 + 44 * 1.5625) * experts,
        "down": (14 * 2.0625 + 44 * 1.75) * experts,
        "shared": (29 * 5.5 + 29 * 4.25 + 2 * (29 * 4.25 + 29 * 3.4375)) * 2048 * dim,
        "attention": sum(by_layer.values()),
        "dense": 3 * (4.5 + 4.5 + 6.5625) * 18432 * dim,
        "embedding": 2.625 * 129280 * dim,
        "head": 5.5 * 129280 * dim,
        "float32": 32 * (61 * (2 * dim + 1536 + 512) + dim + 58 * 192 * (dim + 1)),
    }
    assert {part.name: 8 * part.nbytes for part in sizes.parts} == expected


# ---- the estimate


def test_a_latent_is_all_that_the_cache_holds():
    for kv, each in (("float16", 2), ("float32", 4)):
        for model, a_token in ((DEEPSEEK, 61 * (512 + 64)), (QWEN, 48 * 2 * 4 * 128)):
            plan = estimate(model, "128GB", context=1000, threads=1, kv=kv).plan
            assert plan.kv_cache_bytes == 1008 * a_token * each  # in whole blocks of 16 tokens


@pytest.mark.parametrize("ram", ["10GB", "113GB", "120GB"])
@pytest.mark.parametrize("recipe, keep", [("collaborative", 192), (None, 0.5)])
def test_the_cap_holds_the_largest_context_and_not_one_token_more(ram, recipe, keep):
    result = estimate(DEEPSEEK, ram, context=64, keep_experts=keep, recipe=recipe, threads=1)
    plan = result.plan

    def needed(context: int, at_64: int) -> int:
        """Bytes with another context, all else as it was: each call finds the interpreter grown a little."""
        before, after = (sum(engine_memory(V3, n, min(CHUNKS[-1], n))) for n in (64, context))
        return at_64 - before + after + TOKEN_BYTES * (context - 64)

    for most, at_64 in (
        (result.largest_context, plan.floor_bytes),
        (result.largest_resident_context, plan.resident_bytes),
    ):
        assert 0 <= most <= V3.context
        assert most == 0 or needed(most, at_64) <= plan.ram_bytes
        assert most == V3.context or needed(most + 1, at_64) > plan.ram_bytes
    assert result.largest_resident_context <= result.largest_context


def test_the_largest_contexts_end_at_the_models_own_and_at_none():
    assert estimate(DEEPSEEK, "1TB", width=1).largest_resident_context == V3.context
    roomy = estimate(DEEPSEEK, "116GB", keep_experts=192, recipe="collaborative")
    assert 0 < roomy.largest_resident_context < roomy.largest_context == V3.context
    below = estimate(DEEPSEEK, "1GB", width=1)
    assert below.largest_context == below.largest_resident_context == 0
    assert below.plan.floor_bytes > below.plan.ram_bytes


def test_an_estimate_says_what_it_assumed(tmp_path):
    (tmp_path / "config.json").write_bytes(QWEN.read_bytes())
    result = estimate(tmp_path, "8GB", width=2, widths={"edge_down": 3, "head": 6}, keep_experts=96)
    assert result.assumed == (
        "computed from the config: widths gate 2, up 2, down 2, attention 8, embedding 8, head 6, edge_down 3; "
        "96 of 128 experts a layer"
    )
    assert estimate(DEEPSEEK, "8GB", recipe="collaborative").assumed == (
        "computed from the config: the bits a weight of the published mix 'collaborative', which is another format; "
        "256 of 256 experts a layer"
    )


KNOWN = "gate, up, down, edge_gate, edge_up, edge_down, "
KNOWN += "shared, attention, delta, conv, mamba, dense, streams, embedding, head"
WIDTHS = "1, 2, 3, 4, 5, 6, 8, 16"
KEPT = "expected 8, which a token uses, to 128, or a share of them such as 0.75"
REFUSED = [
    ({"width": 7}, f"width is 7, expected one of {WIDTHS}"),
    ({"trunk_width": 0}, f"trunk_width is 0, expected one of {WIDTHS}"),
    ({"widths": {"up": 7}}, f"width of up is 7, expected one of {WIDTHS}"),
    ({"widths": {"router": 4}}, f"widths has 'router', expected some of {KNOWN}"),
    ({"keep_experts": 7}, f"keep_experts is 7, {KEPT}"),
    ({"keep_experts": 129}, f"keep_experts is 129, {KEPT}"),
    ({"keep_experts": 0.05}, f"keep_experts is 0.05, {KEPT}"),
    ({"keep_experts": 1.5}, f"keep_experts is 1.5, {KEPT}"),
    ({"keep_experts": math.inf}, f"keep_experts is inf, {KEPT}"),
    ({"keep_experts": math.nan}, f"keep_experts is nan, {KEPT}"),
    ({"recipe": "mine"}, "recipe is 'mine', expected one of collaborative"),
    ({"recipe": "collaborative"}, "recipe 'collaborative' is for deepseek_v3, the model is qwen3_moe"),
    (
        {"recipe": "collaborative", "widths": {"up": 2}},
        "recipe 'collaborative' has its own widths; leave widths out",
    ),
    ({"context": 0}, "context is 0, expected 1 to 40960, the model's own"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError) as error:
        estimate(QWEN, "8GB", **options)
    assert str(error.value) == message


@pytest.mark.parametrize("options", [{"width": 4}, {"widths": {"up": 4}}, {"trunk_width": 8}, {"keep_experts": 8}])
def test_a_bundle_has_its_widths_and_experts_already(options, bundle_of):
    path: Path = bundle_of("olmoe", width=4)
    with pytest.raises(ValueError) as error:
        estimate(path, "1GB", **options)
    assert str(error.value) == f"{path}: a bundle has its widths and experts already; leave {next(iter(options))} out"
