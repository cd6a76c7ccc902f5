"""The comparison with other engines: GGUF files are what llama-quantize would make, and turns are counted right."""

import json
import math
import mmap
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench.laboratory import families, peers
from bench.laboratory.engines import Child, LlamaCpp, MlxLm, Model
from bench.laboratory.gguf_model import BLOCKS, MIXES, bytes_per_token, make_gguf, tensors
from bench.laboratory.peers import (
    CONFIG,
    VOCAB,
    Report,
    Row,
    cached_share,
    compare,
    forget,
    make_models,
    markdown,
    run_rounds,
)
from edge_moe.bench.bench import weight_bytes
from edge_moe.bench.synthetic import make_synthetic, raw_config
from edge_moe.runtime.config_file import parse_config

SMALL = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


def qwen(layers: int):
    return parse_config(raw_config(CONFIG, layers, VOCAB), where="")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A busy machine changes nothing about what is tested."""
    monkeypatch.setattr(peers, "WAIT_S", 0.0)
    monkeypatch.setattr(peers, "TRIES", 1)
    monkeypatch.setattr(peers, "FORGET_TRIES", 1)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "config.json"


@pytest.fixture
def bundle_model(small, tmp_path):
    bundle = make_synthetic(small, tmp_path / "small.emoe")
    return Model("edge-moe", "small", str(bundle.path), bundle.nbytes, 1e6, vocab=64, context=32, threads=1)


@pytest.mark.parametrize("mix, mebibytes", [("Q2_K", 875), ("Q4_0", 1352), ("Q4_K_M", 1451)])
def test_four_layers_of_qwen_take_what_llama_quantize_makes_of_them(mix, mebibytes):
    assert round(sum(tensor.nbytes for tensor in tensors(qwen(4), mix)) / 2**20) == mebibytes


def types(mix: str, layers: int) -> dict[str, str]:
    return {tensor.name.removesuffix(".weight"): tensor.type for tensor in tensors(qwen(layers), mix)}


@pytest.mark.parametrize(
    "mix, expected",
    [
        ("Q2_K", {"attn_q": "Q2_K", "attn_v": "Q4_K", "attn_output": "Q3_K", "ffn_up_exps": "Q2_K"}),
        ("Q2_K", {"ffn_down_exps": "Q3_K", "ffn_gate_inp": "F32", "attn_k_norm": "F32"}),
        ("Q4_0", {"attn_v": "Q4_0", "attn_output": "Q4_0", "ffn_down_exps": "Q4_0", "ffn_gate_inp": "F32"}),
        ("Q4_K_M", {"attn_k": "Q4_K", "attn_v": "Q4_K", "attn_output": "Q4_K", "ffn_down_exps": "Q4_K"}),
    ],
)
def test_sensitive_tensors_have_more_bits(mix, expected):
    found = types(mix, 4)
    assert {part: found[f"blk.0.{part}"] for part in expected} == expected
    assert (found["output"], found["token_embd"]) == ("Q6_K", MIXES[mix].usual)


@pytest.mark.parametrize("layers, wide", [(4, {2, 3}), (12, {0, 3, 6, 9, 10, 11})])
def test_a_medium_mix_widens_the_first_and_last_layers_and_every_third(layers, wide):
    found = types("Q4_K_M", layers)
    for part in ("attn_v", "ffn_down_exps"):
        assert {layer for layer in range(layers) if found[f"blk.{layer}.{part}"] == "Q6_K"} == wide


def test_a_token_reads_everything_but_the_embedding_and_the_experts_it_does_not_choose():
    model = qwen(4)
    sizes = {tensor.name: tensor.nbytes for tensor in tensors(model, "Q4_0")}
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    assert experts == 4 * 128 * 3 * 768 * 2048 * 18 // 32
    rest = sum(sizes.values()) - experts - sizes["token_embd.weight"]
    assert bytes_per_token(model, "Q4_0") == rest + experts * 8 / 128


@pytest.mark.parametrize(
    "change, mix, message",
    [
        ({}, "Q5_K", "type 'Q5_K' is not known here; use one of Q2_K, Q4_0, Q4_K_M, MXFP4"),
        ({"num_experts": 8}, "Q2_K", "a model with 8 experts has other types than are known here"),
        (
            {"moe_intermediate_size": 128},
            "Q2_K",
            "blk.0.ffn_down_exps.weight has 128 inputs, no multiple of the 256 in a block of Q3_K",
        ),
    ],
)
def test_models_whose_types_other_rules_choose_are_refused(change, mix, message):
    with pytest.raises(ValueError) as error:
        tensors(parse_config(SMALL | change, where=""), mix)
    assert str(error.value) == message


@pytest.mark.parametrize("width, group_bytes", [(4, 36), (8, 68)])
def test_the_trunks_width_is_that_of_attention_embedding_and_head(small, tmp_path, width, group_bytes):
    bundle = make_synthetic(small, tmp_path / "trunk.emoe", width=2, trunk_width=width)
    matrices = {tensor.name: tensor.width for tensor in bundle.trunk if tensor.cols > 1 and "norm" not in tensor.name}
    assert {name for name, its in matrices.items() if its == 32} == {"layers.0.router", "layers.1.router"}
    assert set(matrices.values()) == {32, width}
    attention, head, floats = 2 * (2 + 0.5) * 256 * 256, 64 * 256, 2 * (4 + 2) * 256 + 4 * 64 + 256
    read = (attention + head) / 64 * group_bytes + 4 * floats
    experts = 4 * bundle.expert_bytes / len(bundle.experts)
    assert 0 <= weight_bytes(bundle, 4) - read - experts < 64 * 1024  # padding and the file's header


def test_turns_are_counted_by_round_and_ratios_are_to_the_first_model(bundle_model):
    rows = run_rounds("Q2_K", [bundle_model, bundle_model], (("pp", 16), ("tg", 4)), rounds=3)
    assert [(row.test, len(row.tps), len(row.ratios)) for row in rows] == [
        ("pp16", 3, 0),
        ("pp16", 3, 3),
        ("tg4", 3, 0),
        ("tg4", 3, 3),
    ]
    for peer, other in (rows[:2], rows[2:]):
        assert other.ratios == pytest.approx([a / b for a, b in zip(other.tps, peer.tps, strict=True)])


def test_seconds_may_be_those_of_the_process(bundle_model):
    with Child(replace(bundle_model, clock="cpu")) as child:
        before = child.cpu_seconds
        seconds = child.run("pp", 16, 0)
        assert 0 < seconds < child.cpu_seconds - before + 0.1  # the system counts in steps of 0.01


def test_an_engine_that_ends_is_an_error_that_names_it(bundle_model, tmp_path, capfd):
    missing = Model("edge-moe", "none", str(tmp_path / "no.emoe"), 0, 0, vocab=64, context=32, threads=1)
    with pytest.raises(OSError) as error:
        Child(missing)
    assert str(error.value) == "edge-moe ended while it was running no.emoe (exit code 1)"
    with Child(bundle_model) as child:
        child._process.kill()
        with pytest.raises(OSError) as error:
            child.run("pp", 4, 0)
    assert str(error.value) == "edge-moe ended while it was running small.emoe (killed)"


def test_the_report_shows_medians_and_a_killed_engine():
    common = {"file_bytes": 917_000_000, "token_bytes": 95e6, "limit_bytes": None, "peak_bytes": None, "killed": False}
    common["others"] = 0.05
    paged = common | {"limit_bytes": 500_000_000, "peak_bytes": 499_000_000}
    rows = [
        Row("Q2_K", "llama.cpp", "Q2_K", "tg32", **common, tps=[80.0, 70.0, 90.0], ratios=[]),
        Row(
            "Q2_K", "edge-moe", "width 2, trunk 4", "tg32", **common, tps=[160.0, 175.0, 171.0], ratios=[2.0, 2.5, 1.9]
        ),
        Row("Q2_K", "llama.cpp", "Q2_K", "tg8", **paged | {"killed": True}, tps=[], ratios=[]),
    ]
    lines = markdown(Report(rows, CONFIG, 4, 2, "A processor", 20.0, {"edge-moe": "0"}, ["One note."])).split("\n")
    assert "| Q2_K | llama.cpp | Q2_K | 0.92 GB | 95.0 MB | 80.0 (70.0 to 90.0) |  | 7.6 |" in lines
    assert "| Q2_K | edge-moe | width 2, trunk 4 | 0.92 GB | 95.0 MB | 171 (160 to 175) | 2.00 | 16.2 |" in lines
    assert "| Q2_K | llama.cpp | Q2_K | 0.92 GB | 95.0 MB | killed at load |  |  | 499 MB |" in lines
    assert "In a memory cgroup of 500 MB, starting with a cold page cache:" in lines and "One note." in lines


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's page cache")
def test_forgotten_files_are_not_in_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(1 << 20))
    with open(tmp_path / "file", "rb") as opened:
        if cached_share(opened.fileno()) < 1:
            pytest.skip("this file system has no page cache that can be asked")
        forget(tmp_path)
        assert cached_share(opened.fileno()) == 0
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        assert len(set(mapped)) == 256  # every page is read in
        with pytest.raises(OSError, match=r"file: 100% of it stays in the page cache; end what uses it$"):
            forget(tmp_path / "file")
        mapped.close()


def test_a_type_without_a_width_of_ours_is_refused():
    with pytest.raises(ValueError, match="type 'Q3_K_M' is not compared here; use some of Q2_K, Q4_0, Q4_K_M$"):
        compare(["Q3_K_M"])


def test_missing_peers_are_named_with_the_extra_that_installs_them(monkeypatch):
    monkeypatch.setattr(peers, "NEEDED", ("no_such_peer",))
    monkeypatch.setattr(sys, "argv", ["peers"])
    with pytest.raises(SystemExit) as exit:
        peers.main()
    assert exit.value.code == "no_such_peer not found; pip install 'edge-moe[peers]'"


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_laid_out_as_gguf_reads_them(kind):
    gguf = pytest.importorskip("gguf")
    from bench.laboratory.gguf_model import _blocks

    its = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[its] == (BLOCKS[kind].weights, BLOCKS[kind].nbytes)
    random = np.random.Generator(np.random.SFC64(1))
    weights = [gguf.quants.dequantize(_blocks(random, kind, 4000 * BLOCKS[kind].nbytes, s), its) for s in (0.25, 1)]
    assert weights[1].std() / weights[0].std() == pytest.approx(4, rel=0.05)  # only the scale was set
    assert abs(weights[1].mean()) < 0.02 * weights[1].std()


@pytest.mark.parametrize("mix", MIXES)
def test_a_random_file_decodes_in_llama_cpp_with_finite_logits(mix, small, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    model = make_gguf(small, tmp_path / "small.gguf", mix)
    size = (tmp_path / "small.gguf").stat().st_size
    assert 0 < size - sum(tensor.nbytes for tensor in tensors(model, mix)) < 16384  # the header
    file = Model("llama.cpp", mix, str(tmp_path / "small.gguf"), size, 0, vocab=64, context=64, threads=1)
    try:  # some builds end the process at their first prompt: see peers.py
        with Child(file) as child:
            child.run("pp", 4, 0)
    except OSError as error:
        pytest.skip(f"this build of llama.cpp does not run here: {error}")
    engine = LlamaCpp(file)
    others = []
    for first in range(8):
        engine.prompt([first, 10 + first])
        others.append(engine.logits())
    alike = np.corrcoef(others)[np.triu_indices(8, 1)]
    assert abs(alike.mean()) < 0.1  # tokens keep their own states, so they are not all routed alike
    engine.prompt([5, 6, 7, 8])
    prompt = engine.logits()
    engine.generate([5, 6, 7, 8])
    assert prompt.shape == (64,) and np.isfinite(prompt).all() and 0.01 < prompt.std() < 100
    np.testing.assert_allclose(engine.logits(), prompt, atol=0.2 * prompt.std())  # another kernel for one token


def test_mlx_lm_runs_a_random_model_of_a_bundles_shapes(bundle_model):
    pytest.importorskip("mlx_lm")
    engine = MlxLm(bundle_model, bits=4)
    engine.prompt([5, 6, 7, 8])
    prompt = engine.logits()
    engine.generate([5, 6, 7, 8])
    assert prompt.shape == (64,) and np.isfinite(prompt).all() and prompt.std() > 0
    np.testing.assert_allclose(engine.logits(), prompt, rtol=1e-3, atol=1e-4)


def test_models_that_are_kept_are_used_again(small, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(peers, "CONFIG", small)
    first = make_models("Q2_K", tmp_path / "kept", 1, threads=1)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*")}
    assert make_models("Q2_K", tmp_path / "kept", 1, threads=1) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*")} == written
    assert [model.engine for model in first] == ["llama.cpp", "edge-moe", "edge-moe"]
    assert all(model.file_bytes > math.prod((4, 3, 256, 256)) / 4 for model in first)


def test_a_comparison_of_families_pairs_each_of_our_models_with_its_peer():
    common = {"file_bytes": 1, "token_bytes": 1e8, "limit_bytes": None, "peak_bytes": None, "killed": False}

    def rows(kind, label, engine, prompt, generated, ratio):
        tests = (("pp512", prompt), ("tg128", generated))
        ratios = {test: [value * ratio] if ratio else [] for test, value in tests}
        return [
            Row(kind, engine, label, test, **common, tps=[value], ratios=ratios[test], others=0.0)
            for test, value in tests
        ]

    found = [
        *rows("Q4_0", "Q4_0", "llama.cpp", 50.0, 100.0, 0),
        *rows("Q4_0", "width 4, trunk 4", "edge-moe", 90.0, 120.0, 0.01),
        *rows("MXFP4", "MXFP4", "llama.cpp", 60.0, 80.0, 0),
        *rows("MXFP4", "mxfp4, trunk 8", "edge-moe", 30.0, 40.0, 0.02),
    ]
    report = Report(found, CONFIG, 4, 2, "A processor", 20.0, {"edge-moe": "0"}, [])
    assert "CPU time" in families.markdown([report], cpu_seconds=True)
    assert "CPU time" not in families.markdown([report])
    lines = families.markdown([report]).split("\n")
    assert "| qwen3-30b-a3b | Q4_0 | width 4, trunk 4 | 0.90 | 1.20 | 50% | 60% |" in lines
    assert "| qwen3-30b-a3b | MXFP4 | mxfp4, trunk 8 | 0.60 | 0.80 | 40% | 20% |" in lines


def test_a_comparison_by_cpu_seconds_runs_at_any_load(small, monkeypatch):
    for needed in peers.NEEDED:
        pytest.importorskip(needed)
    monkeypatch.setattr(families, "CONFIGS", small.parent)
    monkeypatch.setattr(families, "TESTS", (("pp", 16), ("tg", 4)))
    monkeypatch.setattr(peers, "CONTEXT", SMALL["max_position_embeddings"])
    try:
        report = families.compare("config", 1, ("MXFP4",), rounds=2, cpu_seconds=True)
    except OSError as error:
        if not str(error).startswith("llama.cpp"):
            raise
        pytest.skip(f"this build of llama.cpp does not run here: {error}")
    assert [row.label for row in report.rows[:3]] == ["MXFP4", "mxfp4, trunk 4", "mxfp4, trunk 8"]
    assert report.threads == 1 and all(len(row.tps) == 2 and min(row.tps) > 0 for row in report.rows)
    assert families.markdown([report], cpu_seconds=True).count("| config | MXFP4 |") == 2


@pytest.mark.parametrize("name", families.MODELS)
def test_the_models_of_families_have_every_kind_of_layer_and_known_types(name):
    layers, kinds = families.MODELS[name]
    few, all_of_it = (parse_config(raw_config(families.CONFIGS / f"{name}.json", n, VOCAB), "") for n in (layers, None))
    assert set(few.layers) == set(all_of_it.layers)
    for kind in kinds:
        assert {tensor.type for tensor in tensors(few, kind)} <= {*BLOCKS, "F32"}
        assert 1e9 < sum(tensor.nbytes for tensor in tensors(few, kind)) < 3e9
