"""Text to tokens and back: streaming gives the same text, chat templates render as in transformers and do no harm."""

import json
import re
import shutil
from functools import cache

import pytest
from bundles import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.runtime.tokenizer import Detokenizer, Tokenizer

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- bos_token if loop.first }}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{- '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
MESSAGES = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "naïve 😀 <|im_end|> {{ 7 * 7 }}"},
]
TEXT = st.text(max_size=60) | st.text("aé漢😀👩\u200d💻🇨🇦 \n\t\u0301\ufffd", max_size=40)


@cache
def embedded() -> Tokenizer:
    return Tokenizer(REFERENCE)


@pytest.fixture
def tokenizer():
    return embedded()


@pytest.fixture
def with_template(tmp_path):
    """with_template(template, ...) is a tokenizer with that chat template, in a directory `tmp_path/model`."""

    def make(template, file: bool = False, **config) -> Tokenizer:
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(REFERENCE / name, directory)
        config = {**json.loads((REFERENCE / "tokenizer_config.json").read_text()), **config}
        if file:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        else:
            config["chat_template"] = template
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer(directory)

    return make


def streamed(tokenizer: Tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def metaspace(directory) -> Tokenizer:
    """A tokenizer that drops the space before the first word, as Llama's and Mixtral's do."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    words = ["<unk>", "▁a", "▁b", "c", "▁"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


# ---- streaming


@given(TEXT)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_text_comes_back_whole_and_piece_by_piece(text):
    tokenizer = embedded()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


@given(st.lists(st.integers(0, 4095), max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_tokens_stream_to_what_they_decode_to(ids):
    tokenizer = embedded()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_out_when_it_is_whole(tokenizer):
    ids = tokenizer.encode("a😀b")
    pieces = streamed(tokenizer, ids)
    assert len(ids) > 3
    assert "".join(pieces) == "a😀b"
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    pieces = streamed(tokenizer, ids)
    assert pieces[-1].startswith("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("ids", [[1, 5, 2], [5, 1, 3, 5, 5, 2, 3], [1, 2, 3, 4, 4, 1], [5, 5], [4, 1, 5, 4, 2]])
def test_special_tokens_in_between_do_not_cost_a_space(tmp_path, ids):
    tokenizer = metaspace(tmp_path)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_read_but_not_shown(tokenizer):
    ids = tokenizer.encode("<|im_start|>user")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "user"


# ---- damaged and unusual files


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path, tokenizer):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(REFERENCE / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six"
    assert Tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/tokenizer.json: cannot be read (")):
        Tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError) as caught:
        tokenizer.encode("ab\ud800")
    assert str(caught.value) == "the text cannot be encoded: surrogates not allowed at character 2"


# ---- chat templates


@pytest.mark.parametrize("file", [False, True])
def test_chat_templates_render_as_in_transformers(with_template, tmp_path, file):
    transformers = pytest.importorskip("transformers")
    ours = with_template(CHATML, file=file)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    want = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert want.startswith("<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nna")
    ids = ours.apply_chat_template(MESSAGES)
    assert ours.backend.decode(ids, skip_special_tokens=False) == want
    assert ids == theirs(want, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ [1, 2] | tojson(separators=(',', ':')) }}",
        "{{ strftime_now('%Y') if strftime_now is defined }}{{ messages[0].content }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% if tools %}tools{% endif %}{{ eos_token }}{{ messages[-1]['role'] }}",
    ],
)
def test_what_templates_use_renders_as_in_transformers(with_template, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    ours = with_template(template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    want = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert ours.backend.decode(ours.apply_chat_template(MESSAGES), skip_special_tokens=False) == want


def test_of_named_templates_the_default_is_taken(with_template):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].role }}"}]
    tokenizer = with_template(named)
    assert tokenizer.decode(tokenizer.apply_chat_template(MESSAGES)) == "system"
    with pytest.raises(ValueError, match="this model has no chat template"):
        with_template(named[:1]).apply_chat_template(MESSAGES)


def test_special_tokens_may_be_objects(with_template):
    tokenizer = with_template("{{ bos_token }}{{ pad_token }}x", bos_token={"content": "<|im_end|>"}, pad_token={})
    assert tokenizer.apply_chat_template(MESSAGES)[0] == 2


def test_a_model_without_a_template_says_so(tokenizer):
    with pytest.raises(ValueError) as caught:
        tokenizer.apply_chat_template(MESSAGES)
    assert str(caught.value) == "this model has no chat template; pass a prompt as text"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ missing.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for",
        "{{ messages | nofilter }}",
    ],
)
def test_a_hostile_or_broken_template_is_refused(with_template, template):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="^the chat template cannot render these messages: "):
        with_template(template).apply_chat_template(messages)
    assert messages == MESSAGES


def test_a_template_may_refuse_messages_in_its_own_words(with_template):
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError) as caught:
        tokenizer.apply_chat_template(MESSAGES)
    assert str(caught.value) == "the chat template cannot render these messages: roles must alternate"
