"""GGUF files as sources: config.json, names, order of rows, values and tokenizer are those of the model they are of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of
from golden_checkpoints import write_checkpoint
from test_checkpoint import assert_same_tensors, bf16, read_file, refusal
from test_cli import error_of, object_of

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.source.gguf_architectures import ARCHITECTURES
from edge_moe.compressor.source.gguf_tokenizer import SPLITS, files

gguf = pytest.importorskip("gguf")
REFERENCE = Path(__file__).parent.parent / "bench" / "reference_moe"
KINDS = {
    "mixtral": "LLAMA",
    "olmoe": "OLMOE",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "glm4_moe": "GLM4_MOE",
    "minimax_m2": "MINIMAXM2",
    "gpt_oss": "GPT_OSS",
}


def write_gguf(source: Path, out: Path, quantise: str = "", split: int = 0, tokenizer: dict | None = None) -> dict:
    """Write a checkpoint as llama.cpp's converter does, with gguf's names; gives what quantised tensors stand for.

    quantise: the type of matrices that have whole blocks. split: tensors of each file of a split model. tokenizer:
    fields below tokenizer.ggml, and chat_template.
    """
    raw = json.loads((source / "config.json").read_text())
    kind, layers = raw["model_type"], raw["num_hidden_layers"]
    architecture = gguf.MODEL_ARCH[KINDS[kind]]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=split)
    rope = raw.get("rope_parameters") or raw
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(
        next(raw[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in raw)
    )
    writer.add_expert_used_count(raw["num_experts_per_tok"])
    writer.add_eos_token_id(1)
    if raw.get("clip_qkv"):
        writer.add_clamp_kqv(raw["clip_qkv"])
    if rope.get("factor"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if original := rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "minimax_m2":
        writer.add_rope_dimension_count(raw["rotary_dim"])
    if kind == "gpt_oss":
        writer.add_sliding_window(raw["sliding_window"])
    if "moe_intermediate_size" in raw:
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(raw["shared_expert_intermediate_size"])
    if kind == "glm4_moe":
        writer.add_expert_shared_count(raw["n_shared_experts"])
        writer.add_leading_dense_block_count(raw["first_k_dense_replace"])
        writer.add_expert_weights_scale(raw["routed_scaling_factor"])
        writer.add_expert_weights_norm(raw["norm_topk_prob"])
    for key, value in (tokenizer or {}).items():
        add = {list: writer.add_array, str: writer.add_string, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}", value)

    tensors, experts = {}, {}
    for key, (_, shape, data) in read_file(source / "model.safetensors").items():
        before, _, rest = key.partition(".experts.")
        if kind == "gpt_oss" and rest:
            whole, end = bf16(data).reshape(shape), "bias" if rest.endswith("_bias") else "weight"
            whole = whole if end == "bias" else whole.swapaxes(1, 2)
            parts = {"down": whole} if rest.startswith("down") else {"gate": whole[:, ::2], "up": whole[:, 1::2]}
            tensors |= {f"{before}.experts.{part}_proj.{end}": np.ascontiguousarray(its) for part, its in parts.items()}
        elif rest:
            number, part, end = rest.split(".")
            experts.setdefault(f"{before}.experts.{part}.{end}", {})[int(number)] = bf16(data).reshape(shape)
        else:
            tensors[key] = bf16(data).reshape(shape)
    tensors |= {key: np.stack([its[number] for number in sorted(its)]) for key, its in experts.items()}
    names, values = gguf.get_tensor_name_map(architecture, layers), {}
    of_dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for key, tensor in tensors.items():
        if kind == "mixtral" and key.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of RoPE next to each other
            tensor = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        end = ".bias" if key.endswith(("bias",)) else ".weight"
        ends = {"try_suffixes": (".weight", ".bias")}
        name = names.get_name(key, **ends) or of_dense.get_name(key, **ends)
        name = f"{name}.weight" if key.endswith("sinks") else name
        if key.endswith("e_score_correction_bias"):
            name = f"blk.{key.split('.')[2]}.exp_probs_b.bias"
        if key.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        assert name and name.endswith(end)
        if quantise and tensor.ndim > 1 and tensor.shape[-1] % 32 == 0:
            its = gguf.GGMLQuantizationType[quantise]
            stored = gguf.quants.quantize(tensor, its)
            values[key] = gguf.quants.dequantize(stored, its)
            writer.add_tensor(name, stored, raw_dtype=its)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("architecture", KINDS)
def test_a_gguf_file_is_the_checkpoint_it_was_made_of(tmp_path, architecture):
    source, token_ids, logits = write_checkpoint(architecture, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    exact = len(token_ids)  # tokens before which nothing differs from what the metadata say
    if architecture == "mixtral":  # no metadata for a window: the released models have none
        exact, config["sliding_window"] = config["sliding_window"], None
    elif architecture == "gpt_oss":  # nor for these
        exact, config["swiglu_limit"], config["rope_parameters"]["beta_fast"] = 0, 7.0, 32.0
    (source / "config.json").write_text(json.dumps(config))
    write_gguf(source, tmp_path / "model.gguf")
    checkpoint, wanted = Checkpoint(tmp_path / "model.gguf"), Checkpoint(source)
    assert checkpoint.config == wanted.config
    assert checkpoint.unused == []
    assert_same_tensors(checkpoint, wanted)
    compress(tmp_path / "model.gguf", tmp_path / "out.emoe", bits=16, threads=1)
    found = logits_of(tmp_path / "out.emoe", token_ids, ram="2GB", threads=1)
    np.testing.assert_allclose(found[:exact], logits[:exact], atol=1e-3)
    if architecture == "gpt_oss":
        for got, want in zip(checkpoint.expert_bias(1, 2), wanted.expert_bias(1, 2), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_blocks_are_what_gguf_dequantises(tmp_path, kind):
    source, _, _ = write_checkpoint("qwen3_moe", tmp_path / "source")
    values = write_gguf(source, tmp_path / "model.gguf", kind)
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert checkpoint.dtype("layers.1.experts.3.up") == kind and checkpoint.has_codes == (kind == "MXFP4")
    key = "model.layers.1.mlp.experts.{}_proj.weight"
    for part, found in zip(("gate", "up", "down"), checkpoint.expert(1, 4), strict=True):
        np.testing.assert_array_equal(found, values[key.format(part)][4])
    np.testing.assert_array_equal(checkpoint.trunk("layers.0.q"), values["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(checkpoint.trunk("embedding"), values["model.embed_tokens.weight"])


def test_mxfp4_of_a_gguf_file_is_kept_without_loss(tmp_path):
    source, _, _ = write_checkpoint("qwen3_moe", tmp_path / "source")
    values = write_gguf(source, tmp_path / "model.gguf", "MXFP4")
    made = compress(tmp_path / "model.gguf", tmp_path / "out.emoe", method="keep", threads=1)
    weights = BundleWeights(made)
    for part, found in zip(("gate", "up", "down"), weights.expert(1, 4), strict=True):
        np.testing.assert_array_equal(found, values[f"model.layers.1.mlp.experts.{part}_proj.weight"][4])


@pytest.mark.parametrize("mix", ["Q2_K", "Q4_K_M"])
def test_llama_cpps_mixes_are_read(tmp_path, mix):
    from bench.laboratory.gguf_model import make_gguf

    config = json.loads((REFERENCE / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_hidden_layers": 2, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    made = make_gguf(tmp_path / "config.json", tmp_path / "out" / "model.gguf", mix, vocab=64)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.layers == made.layers
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    down = reader["blk.1.ffn_down_exps.weight"]
    wanted = gguf.quants.dequantize(down.data, down.tensor_type)
    np.testing.assert_array_equal(checkpoint.expert(1, 5)[2], wanted[5])
    assert checkpoint.source_bytes("layers.1.experts.5.down") == down.n_bytes // config["num_experts"]


def test_a_split_model_is_named_by_any_of_its_files_or_their_directory(tmp_path):
    source, _, _ = write_checkpoint("olmoe", tmp_path / "source")
    (tmp_path / "split").mkdir()
    write_gguf(source, tmp_path / "split" / "model.gguf", split=8)
    files = sorted((tmp_path / "split").iterdir())
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.gguf"
    for path in (files[0], files[1], tmp_path / "split"):
        assert_same_tensors(Checkpoint(path), Checkpoint(source))
    files[1].unlink()
    assert refusal(FileNotFoundError, lambda: Checkpoint(files[0])) == (
        f"{files[1]}: no such file, one of the {len(files)} of {files[0]}; download it"
    )


def test_the_tokenizer_and_the_chat_template_come_with_the_file(tmp_path):
    """The embedded model's tokenizer splits words as GPT-2; here they are split as Qwen's, on the same merges."""
    tokenizers = pytest.importorskip("tokenizers")
    own = json.loads((REFERENCE / "tokenizer.json").read_text())["model"]
    tokens = sorted(own["vocab"], key=own["vocab"].get)
    fields = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [3] + [1] * (len(tokens) - 1),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in own["merges"]],
        "chat_template": "{{ messages[0].content }}",
    }
    write_gguf(REFERENCE, tmp_path / "model.gguf", "Q8_0", tokenizer=fields)
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    made = tokenizers.Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json"))
    words = tokenizers.pre_tokenizers
    text = "def f(x):\n    return x + 1234  # don't é\n\n"
    assert made.decode(made.encode(text).ids) == text
    assert [word for word, _ in made.pre_tokenizer.pre_tokenize_str("f(x1234)\n\n  don't")] == (
        ["f", "(x", "1", "2", "3", "4", ")ĊĊ", "Ġ", "Ġdon", "'t"]
    )
    assert isinstance(made.pre_tokenizer, words.Sequence)
    out = compress(tmp_path / "model.gguf", tmp_path / "out.emoe", bits=8, method="rtn", threads=1)
    assert json.loads((out.path / "tokenizer_config.json").read_text())["chat_template"] == fields["chat_template"]
    directory = checkpoint.directory
    checkpoint.close()
    assert not directory.exists()


@pytest.mark.parametrize("pre", ["qwen2", "qwen35", "lfm2", "gpt-4o", "minimax-m2"])
def test_texts_are_split_into_words_as_by_transformers(pre):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tokenizers = pytest.importorskip("tokenizers")
    text = "I'll DON'T camelCase  HTMLParser x=12345;\r\n\n\t// a/b\n été naïve cafe\u0301 日本語 ３４ end  "
    words = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(one), behavior="isolated").pre_tokenize_str(text)
        for one in (SPLITS[pre], mapping.GGUF_PRE_TOKENIZER_SPLITS[pre])
    ]
    assert words[0] == words[1] and len(words[0]) > 15


def test_gemma_4s_tokenizer_is_that_of_transformers():
    tokenizers = pytest.importorskip("tokenizers")
    gemma = pytest.importorskip("transformers.models.gemma.tokenization_gemma").GemmaTokenizer
    text = "the cat sat on the mat\n\nthe  cats   sat, 12345 times\t\u00e9t\u00e9 <bos>the <tool>\U0001f600"
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pairs = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "t"), ("c", "at"), ("\u2581", "\u2581"), ("\n", "\n")]
    pairs += [("\u2581the", "\u2581"), ("\u2581the\u2581", "cat"), ("1", "2")]
    tokens += [*dict.fromkeys([*"the cas onm\n,12345it".replace(" ", "\u2581"), *map("".join, pairs)])]
    kinds = [3] * 5 + [4] + [6] * 256 + [1] * (len(tokens) - 262)
    fields = {"model": "gemma4", "tokens": tokens, "token_type": kinds, "merges": list(map(" ".join, pairs))}
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    made = tokenizers.Tokenizer.from_str(json.dumps(files(fields)["tokenizer.json"]()))
    theirs = gemma(vocab={token: at for at, token in enumerate(tokens)}, merges=pairs)
    theirs.add_tokens(["<tool>"])
    found = made.encode(text).ids
    assert found == theirs.encode(text, add_special_tokens=False) and 2 in found and 5 in found and max(found) > 270
    assert made.decode(found, skip_special_tokens=False) == text


def test_files_beside_a_gguf_file_are_used_instead_of_its_metadata(tmp_path):
    write_gguf(REFERENCE, tmp_path / "model.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, tmp_path)
    config = json.loads((REFERENCE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    checkpoint = Checkpoint(tmp_path / "model.gguf")
    assert not checkpoint.config.router.renormalise
    assert (checkpoint.directory / "tokenizer.json").read_bytes() == (REFERENCE / "tokenizer.json").read_bytes()


def test_a_bundle_is_compared_with_a_gguf_file(tmp_path):
    write_gguf(REFERENCE, tmp_path / "model.gguf")
    compress(REFERENCE, tmp_path / "out.emoe", bits=16, threads=1)
    (tmp_path / "text.txt").write_text("def double(x):\n    return 2 * x\n" * 4)
    options = ("--text", tmp_path / "text.txt", "--tokens", "32", "--against", tmp_path / "model.gguf")
    assert object_of("eval", tmp_path / "out.emoe", *options)["kld_mean"] < 0.001


def test_plan_reads_the_header_of_a_gguf_file(tmp_path):
    write_gguf(REFERENCE, tmp_path / "model.gguf")
    as_file = object_of("plan", tmp_path / "model.gguf", "--json")
    as_directory = object_of("plan", REFERENCE, "--json")
    assert as_file["parts"] == as_directory["parts"] and as_file["floor_bytes"] > 0


def test_what_is_no_model_of_a_known_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "qwen3")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert error_of("compress", tmp_path / "dense.gguf", tmp_path / "out.emoe") == (
        f"{tmp_path}/dense.gguf: GGUF architecture 'qwen3' is not supported; supported are "
        f"{', '.join(ARCHITECTURES)}; for others use the checkpoint in safetensors format"
    )
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "dense.gguf").read_bytes()[:30])
    assert error_of("plan", tmp_path / "cut.gguf").startswith(
        f"{tmp_path}/cut.gguf: is not a GGUF file, or is cut short"
    )
    assert error_of("plan", tmp_path) == (f"{tmp_path}: has several GGUF models, cut.gguf and others; name one of them")
