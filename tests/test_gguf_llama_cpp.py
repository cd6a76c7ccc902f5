"""The GGUF files that tests write are what llama.cpp reads: it gives transformers' logits for random checkpoints, and
its tokens of a text are those of the tokenizer that is made of a file's metadata."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")
import gguf
import gguf_files
import llama_cpp
from make_golden import logits_of, random_model

from edge_moe.compressor.source.gguf_tokenizer import SPLITS, tokenizer

REFERENCE = Path(__file__).parent.parent / "bench" / "reference_moe"
TEXT = """I'll DON'T camelCase  HTMLParser x=12345;\r\n\n\t// a/b\n été naïve 日本語ひらがな ３４ end
def f(x):
    return x.y + [1, 22, 333, 4444]  # it's $5.00 (or 10%)!?  — “quoted”  """

TOKENS = 40
ROUNDS = {"gemma4_text": 1e-2}  # its GELU is a table of float16
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA4_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.25},
}
MODELS = [  # with sizes and layers that llama.cpp has
    (
        "qwen3_next",
        {
            "linear_value_head_dim": 24,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mlp_only_layers": [],
        },
    ),
    ("qwen3_5_moe_text", {"linear_num_value_heads": 6, "full_attention_interval": 3, "num_hidden_layers": 4}),
    (
        "gemma4_text",
        {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "head_dim": 32,
            "global_head_dim": 64,
            "rope_parameters": GEMMA4_ROPES,
        },
    ),
    ("lfm2_moe", {"routed_scaling_factor": 1.0}),
    (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
            "time_step_min": 0.001,
        },
    ),
    (
        "deepseek_v3",
        {
            "rms_norm_eps": 1e-6,
            "rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    ("glm4_moe_lite", {}),
    ("granitemoe", {}),
    ("ernie4_5_moe", {"intermediate_size": 128}),
    ("hunyuan_v1_moe", {}),
]


@pytest.mark.parametrize("kind, changes", MODELS, ids=[kind for kind, _ in MODELS])
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path, kind, changes):
    random_model(kind, seed=5, **changes).save_pretrained(tmp_path)
    gguf_files.write(tmp_path, tmp_path / "model.gguf")
    token_ids = np.random.default_rng(5).integers(0, 128, TOKENS)
    wanted = logits_of(tmp_path, token_ids)
    found = llama_cpp_logits(tmp_path / "model.gguf", token_ids)
    np.testing.assert_allclose(found, wanted, atol=ROUNDS.get(kind, 1e-3))


def llama_cpp_logits(path, token_ids: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocab), with keys and values in float32."""
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    assert model
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 64, 1, 1
    options.type_k = options.type_v = options.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
    batch.n_tokens = len(token_ids)
    for at, token in enumerate(token_ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = int(token), at, 1, 1
        batch.seq_id[at][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, at) for at in range(len(token_ids))]
    logits = np.stack([np.ctypeslib.as_array(row, (vocab,)).copy() for row in rows])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@pytest.mark.parametrize("pre", SPLITS)
def test_llama_cpp_gives_the_tokens_of_the_tokenizer(tmp_path, pre):
    tokenizers = pytest.importorskip("tokenizers")
    own = json.loads((REFERENCE / "tokenizer.json").read_text())["model"]
    tokens = sorted(own["vocab"], key=own["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in own["merges"]]
    kinds = [3] + [1] * (len(tokens) - 1)
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    for key, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_array)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    found = tokenizers.Tokenizer.from_str(json.dumps(made)).encode(TEXT).ids
    assert found == llama_cpp_tokens(tmp_path / "words.gguf", TEXT) and len(set(found)) > 60


def llama_cpp_tokens(path: Path, text: str) -> list[int]:
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    assert model
    data, room = text.encode(), 2 * len(text.encode())
    tokens = (llama_cpp.llama_token * room)()
    vocab = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, room, False, False)
    llama_cpp.llama_model_free(model)
    return list(tokens[:count])
