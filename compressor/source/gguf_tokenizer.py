"""Making a tokenizer.json, and what belongs beside it, of a GGUF file's metadata.

Byte-pair encodings of bytes are made where the way of splitting a text into words, `tokenizer.ggml.pre`, is known, and
Gemma 4's, of characters. Others are left out, and the model's own tokenizer.json must be put beside the file.
"""

import json
from collections.abc import Callable

_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS: dict[str, str | tuple[str, ...]] = {  # regular expressions of words, in turn, by the name in the metadata
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "glm4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _END + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _END + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # ideographs, Hiragana, Katakana
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+",
    ),
    "kimi-k2": r"[\p{Han}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+" + _END + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*" + _END + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "smollm": "",  # single digits, then as GPT-2
}
SPLITS["lfm2"] = SPLITS["glm4"]
SPLITS["minimax-m2"] = SPLITS["gpt-4o"]
SPLITS["refact"] = SPLITS["smollm"]  # Granite's
NORMALISED = ("qwen2", "qwen35")  # to NFC
SPACE = "\u2581"  # stands for a space
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def files(fields: dict) -> dict[str, Callable[[], dict]]:
    """What makes tokenizer.json, tokenizer_config.json and generation_config.json, as far as the metadata has them."""

    def field(name: str):
        return fields.get(f"tokenizer.ggml.{name}")

    made = {}
    known = field("model") == "gemma4" or (field("model") == "gpt2" and field("pre") in SPLITS)
    if known and field("merges") and field("tokens"):
        made["tokenizer.json"] = lambda: tokenizer(fields)
        made["tokenizer_config.json"] = lambda: about(fields)
    ends = [field(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    if ends := [end for end in dict.fromkeys(ends) if isinstance(end, int)]:
        made["generation_config.json"] = lambda: {"eos_token_id": ends}
    return made


def tokenizer(fields: dict) -> dict:
    """The content of tokenizer.json."""
    from tokenizers import AddedToken

    tokens, kinds = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    made = _of_characters(fields) if fields["tokenizer.ggml.model"] == "gemma4" else _of_bytes(fields)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, normalized=False) for token in added])
    return json.loads(made.to_str())


def _of_bytes(fields: dict):
    """A byte-pair encoding within words, as GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = fields["tokenizer.ggml.pre"]
    made, splits = Tokenizer(models.BPE(**_vocabulary(fields))), SPLITS[pre]
    if pre in NORMALISED:
        made.normalizer = normalizers.NFC()
    if splits:
        splits = (splits,) if isinstance(splits, str) else splits
        words = [
            *(pre_tokenizers.Split(Regex(one), behavior="isolated") for one in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(words), decoders.ByteLevel()
    return made


def _of_characters(fields: dict):
    """A byte-pair encoding of characters across words, as Gemma's; bytes where there is no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    made = Tokenizer(models.BPE(**_vocabulary(fields), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _vocabulary(fields: dict) -> dict[str, object]:
    tokens, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    return {
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [tuple(merge.split(" ")) for merge in merges],
    }


def about(fields: dict) -> dict:
    """The content of tokenizer_config.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    found = {f"{name}_token": tokens[number] for name, number in named.items() if number is not None}
    found |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    template = fields.get("tokenizer.chat_template")
    return found | ({"chat_template": template} if template else {})
