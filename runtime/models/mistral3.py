"""Mistral 4's multimodal wrapper as a text model; the vision part is ignored."""

from ..config import ModelConfig
from ..config_keys import Keys
from . import mistral4
from .family import Family


def parse(keys: Keys) -> ModelConfig:
    if (kind := keys.raw.get("model_type")) != "mistral4":
        raise ValueError(
            f"{keys.where}: a language model {kind!r} in {keys.kind} is not supported; supported is mistral4"
        )
    return mistral4.parse(keys)


FAMILY = Family(
    "mistral3",
    parse,
    mistral4.FAMILY.defaults,
    text="text_config",
    prefixes=("language_model.model.", "model.language_model."),
    heads=("language_model.lm_head.weight", "lm_head.weight"),
)
