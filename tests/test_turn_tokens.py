"""The tokens that end turns, by the template: answers end there, and prompts go on from there."""

import json
import shutil
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from edge_moe.compressor.pipeline import compress
from edge_moe.conversation import Conversation, Thoughts, Turn
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.tokenizer import Tokenizer
from edge_moe.runtime.turn_tokens import end_tokens

FAMILY_TEMPLATES = Path(__file__).parent / "chat_templates" / "families"
# By family: after an answer, if no other token is declared, and after a user's message.
MARKS = {
    "qwen3_moe": ("<|im_end|>", "<|im_end|>"),
    "qwen3_5_moe": ("<|im_end|>", "<|im_end|>"),
    "gpt_oss": (None, "<|end|>"),  # also after a thought, so it ends no answer
    "gemma4": (None, "<turn|>"),  # a template that may hide what is after a thought
    "glm4_moe": ("<|user|>", "<|assistant|>"),
    "minimax_m2": ("[e~[", "[e~["),
    "mixtral": ("</s>", "[/INST]"),
    "ernie4_5_moe": ("<|end_of_sentence|>", None),
    "hunyuan_v1_moe": ("<|eos|>", "<|extra_0|>"),
    "granite": ("<|end_of_text|>", "<|end_of_text|>"),
    "lfm2_moe": ("<|im_end|>", "<|im_end|>"),
    "nemotron_h": ("<|im_end|>", "<|im_end|>"),
}


@pytest.mark.parametrize("family", MARKS)
def test_a_template_tells_what_ends_turns(family, tmp_path):
    pytest.importorskip("transformers")
    from family_tokenizers import write_tokenizer

    path = write_tokenizer(family, tmp_path) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    special = config["eos_token"]  # which the template may write for eos_token
    path.write_text(json.dumps({**config, "eos_token": "<unk>", "pad_token": special}))
    template = (tmp_path / "chat_template.jinja").read_text().replace("eos_token", "pad_token")
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(tmp_path)
    answer, message = ({tokenizer.special_token(mark)} - {None} for mark in MARKS[family])
    unknown = tokenizer.end_token
    assert end_tokens(tokenizer, []) == ({unknown} | answer, {unknown} | answer | message)
    declared = answer or {unknown}
    assert end_tokens(tokenizer, declared) == ({unknown} | declared, {unknown} | declared | message)


@pytest.mark.parametrize("template", ["", "{{ messages[9].content }}", "{% for", "{{ messages[0].content }}<|im_end|>"])
def test_a_template_may_tell_nothing(tmp_path, template):
    write_letters(tmp_path, ["<|im_end|>"], template)
    assert end_tokens(Tokenizer(tmp_path), [3]) == ({3}, {3})
    assert end_tokens(None, [3]) == ({3}, {3})


def write_letters(directory: Path, special: list[str], template: str) -> None:
    """A tokenizer whose tokens are ASCII's letters and signs, beside special ones: it fits a vocabulary of 128."""
    letters = [*string.printable[:95], "\n", "?unknown"]
    backend = Backend(models.BPE({text: index for index, text in enumerate(letters)}, [], unk_token="?unknown"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %} f<|call|>{% else %}"
    "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}"
    "<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("architecture", "template", "mark", "special", "declared"),
    [
        ("gpt_oss", HARMONY, "<|end|>", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"], "<|call|>"),
        ("qwen3_next", CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),
    ],
)
def test_only_a_turn_whose_thought_is_left_out_is_computed_again(
    golden, tmp_path, architecture, template, mark, special, declared, monkeypatch
):
    monkeypatch.setattr("edge_moe.runtime.plan.CHUNKS", (16,))  # with longer steps the windows hold the whole context
    source = tmp_path / "source"
    shutil.copytree(golden[architecture][0], source)
    write_letters(source, special, template)
    ids = {text: Tokenizer(source).special_token(text) for text in special}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[declared]}))
    path = compress(source, tmp_path / "letters.emoe", width=4, method="rtn", threads=1).path
    used = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "20"},
    ]
    talk, before = Conversation(True, thoughts=Thoughts.LEFT_OUT), 0
    unending = {"logit_bias": dict.fromkeys([1, *ids.values()], -100.0)}  # 1: of config.json
    with Runtime(path, threads=1) as runtime:
        for question in ("Why is the sky blue?", "And the sea?", "What is there at night?"):
            messages = used + talk.prompt(question)
            answer = runtime.generate(messages, 40, **unending)
            assert answer.cached_tokens >= before
            prompt = runtime.tokenizer.apply_chat_template(messages)
            before = len(prompt) - prompt[::-1].index(ids[mark])  # up to the end of the user's message
            talk.turns.append(Turn(question, f"<think>{question}</think>Because", [], True))
            with Runtime(path, threads=1) as fresh:
                assert fresh.generate(messages, 40, **unending).tokens == answer.tokens
        assert before > 100
        last = runtime.generate(messages, 4, logit_bias={ids[mark]: 100.0})
        assert last.finish_reason == ("length" if template is HARMONY else "stop")
