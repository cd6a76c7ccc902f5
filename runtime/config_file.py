"""Finding, checking and reading a model's config.json, with the parser of the family that `model_type` names.

Both spellings are read: the hub's (`num_experts`, `rope_theta`) and transformers 5's (`num_local_experts`,
`rope_parameters`). Layers for multi-token prediction, which a checkpoint may have after the model's own, are ignored,
and so is the vision part of a multimodal model.
"""

from pathlib import Path

from .config import ModelConfig
from .config_keys import COMMON_DEFAULTS, Keys
from .files import MOST_JSON_BYTES, parse_json, read_bounded
from .model_path import check_pointer, utf8_path, what_it_is
from .models import FAMILIES
from .models.family import Family, tokens

ARCHITECTURES = tuple(FAMILIES)
OUTER_KEYS = ("tie_word_embeddings", "eos_token_id")  # read from outside the language model's object if it is nested
NEW_KINDS = {  # prefixes of keys that no supported family has, and their meaning
    "linear_": "linear attention",
    "mamba_": "Mamba layers",
    "ssm_": "state-space layers",
    "conv_": "short convolutions",
    "index_": "an indexer of attention",
    "attn_logit_softcapping": "soft-capped attention",
    "hidden_size_per_layer_input": "inputs of each layer",
    "attention_chunk_size": "chunked attention",
    "no_rope_layers": "layers without position",
    "encoder": "an encoder",
}


def load_config(directory: str | Path) -> ModelConfig:
    """Read DIRECTORY/config.json (and the end tokens of generation_config.json, if it is there).

    Raises like parse_config(), and ValueError for a path that is not UTF-8, which reading weights requires.
    """
    directory = utf8_path(directory)
    path = directory / "config.json"
    raw = read_json(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            family = _known(raw)
            own = language_keys(raw, family, str(path)).get("eos_token_id") if family else None
            raw = {**raw, "eos_token_id": [*tokens(eos), *tokens(own)]}  # each of them ends a turn
    return parse_config(raw, where=str(path))


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict:
    """Read one JSON object of at most `most_bytes`. Raises FileNotFoundError or ValueError, both naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model directory has a config.json")
    content = read_bounded(path, most_bytes, "copy the file again")
    check_pointer(path, content)
    return parse_json(path, content, "copy the file again")


def parse_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Turn the keys of a Hugging Face config.json into a ModelConfig.

    Raises ValueError, naming the key, if the architecture is not supported or a required key is missing or out of
    range. Unused keys are ignored.
    """
    family = family_of(raw, where)
    keys = language_keys(raw, family, where)
    return family.parse(Keys(keys, where, {**COMMON_DEFAULTS, **family.defaults}, family.model_type))


def family_of(raw: dict, where: str = "config.json") -> Family:
    """The family that a config.json names. Raises ValueError if it is not supported, naming its new features."""
    if family := _known(raw):
        return family
    kind, inner = raw.get("model_type"), raw.get("text_config")
    keys = raw if not isinstance(inner, dict) else inner
    new = dict.fromkeys(what for start, what in NEW_KINDS.items() if any(key.startswith(start) for key in keys))
    raise ValueError(
        f"{where}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        + (f"; new about this one: {', '.join(new)}" if new else "")
        + what_it_is(raw)
    )


def _known(raw: dict) -> Family | None:
    kind = raw.get("model_type")  # may be of any type in a hostile file
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def language_keys(raw: dict, family: Family, where: str) -> dict:
    """The keys that describe the language model."""
    if not family.text:
        return raw
    inner = raw.get(family.text)
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: {family.text} is {inner!r}, expected an object")
    return {**inner, **{key: raw[key] for key in OUTER_KEYS if raw.get(key) is not None}}


def with_language_key(raw: dict, key: str, value) -> dict:
    """A config.json with another value for one of OUTER_KEYS."""
    family = _known(raw)
    if family and family.text:
        raw = {**raw, family.text: {**raw[family.text], key: value}}
    return {**raw, key: value}
