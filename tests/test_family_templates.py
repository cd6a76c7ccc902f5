"""Conversations in the format of each family, with tokenizers of its structure: text and ids are transformers'."""

import json
from pathlib import Path

import pytest

from edge_moe.runtime.tokenizer import Detokenizer, Tokenizer

transformers = pytest.importorskip("transformers")
from family_tokenizers import FAMILIES, FAMILY_TEMPLATES, write_tokenizer  # noqa: E402 (needs tokenizers)

CONVERSATIONS = json.loads(
    (Path(__file__).parent / "chat_templates" / "conversations.json").read_text(encoding="utf-8")
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather\'s "now" <é>',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Città 漢字"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "maybe": {"type": ["string", "null"], "nullable": True},
                    "deep": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
                    "either": {"oneOf": [{"type": "string"}, {"type": "number", "default": 2}]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}},
]
OPTIONS = {
    "defaults": {},
    "no answer begun": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "thinking": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    "no thinking": {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"},
    "former thoughts kept": {
        "clear_thinking": False, "truncate_history_thinking": False, "keep_past_thinking": True, "drop_thinking": False,
    },
    "documents": {"documents": [{"title": "t", "text": "some text"}], "controls": {"length": "short"}, "tools": TOOLS},
    "tools of the model's own": {"builtin_tools": ["browser", "python"], "model_identity": "I am.", "tools": []},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
}  # fmt: skip
# The conversations that a family's format has no place for, with some options at least.
REFUSED = {
    "qwen3_moe": {"parts", "a picture"},
    "qwen3_5_moe": {"parts that are thoughts", "another role"},
    "glm4_moe": {"arguments as a text"},
    "deepseek_v3": {"parts", "a picture"},
    "deepseek_v4": {"a picture"},
    "minimax_m2": {"arguments as a text"},
    "mixtral": {"a call without an id", "parts", "a picture", "another role"},
    "mistral": {"a call without an id", "another role"},
    "hunyuan_v1_moe": {"parts", "parts that are thoughts", "a picture"},
}
KEYWORDS = ("tools", "documents", "add_generation_prompt", "continue_final_message")


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_have_the_text_and_ids_of_transformers(name, tmp_path):
    directory = write_tokenizer(name, tmp_path)
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    refused = set()
    for talk, messages in CONVERSATIONS.items():
        for named, options in OPTIONS.items():
            options = {"add_generation_prompt": True, **options}
            own = {key: value for key, value in options.items() if key in KEYWORDS}
            own["chat_template_kwargs"] = {key: value for key, value in options.items() if key not in KEYWORDS}
            try:
                text = theirs.apply_chat_template(messages, tokenize=False, **options)
            except Exception:  # of the template, in any of its ways
                with pytest.raises(ValueError):
                    ours.apply_chat_template(messages, **own)
                refused.add(talk)
                continue
            ids = theirs.apply_chat_template(messages, return_dict=False, **options)
            assert ours.render_chat(messages, **own) == text, (talk, named)
            assert ours.apply_chat_template(messages, **own) == ids, (talk, named)
            if not options.keys() - {"add_generation_prompt"}:
                detokenizer = Detokenizer(ours)
                streamed = "".join([*map(detokenizer.add, ids), detokenizer.finish()])
                assert streamed == theirs.decode(ids, skip_special_tokens=True), (talk, named)
    assert refused == REFUSED.get(name, set())


def test_every_template_has_a_tokenizer():
    assert {file.stem for file in FAMILY_TEMPLATES.glob("*.jinja")} == FAMILIES.keys()
