"""Tokens declared outside tokenizer.json get transformers' ids, and files that ask for too much are refused."""

import json
import shutil

import pytest
from bundles import REFERENCE

from edge_moe.runtime.tokenizer import Tokenizer

TEXT = "word<|eot|> next <tool>  x<|im_end|> é <|end|>word</s><|im_start|>a <mask> b"
NEW = {
    "content": "<tool>",
    "lstrip": False,
    "normalized": True,
    "rstrip": False,
    "single_word": False,
    "special": False,
}
END = {
    "content": "<|im_end|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": True,
    "single_word": False,
    "special": True,
}


@pytest.fixture
def make(tmp_path):
    """make(config={...}, **files) is a directory with these keys in tokenizer_config.json and these JSON files."""

    def directory(config=None, table=None, **files):
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(REFERENCE / name, tmp_path)
        base = json.loads((REFERENCE / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**base, **(config or {})}))
        if table:
            whole = json.loads((tmp_path / "tokenizer.json").read_text())
            table(whole)
            (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return directory


@pytest.mark.parametrize(
    "declared",
    [
        {"added_tokens": {"<|eot|>": 4096, "<tool>": 4097}},
        {"added_tokens": {"<|eot|>": 4099}, "special_tokens_map": {"eos_token": "<|eot|>"}},
        {"special_tokens_map": {"eos_token": {"content": "<|eot|>", "lstrip": True, "rstrip": True}}},
        {"special_tokens_map": {"additional_special_tokens": ["<|eot|>", "<tool>"], "bos_token": "</s>"}},
        {"config": {"additional_special_tokens": ["<|eot|>", "<tool>"]}},
        {"config": {"extra_special_tokens": ["<|end|>"], "eos_token": "<|eot|>"}},
        {"config": {"extra_special_tokens": {"tool_token": "<tool>"}, "image_token": "<|end|>"}},
        {"config": {"added_tokens_decoder": {"2": END, "4096": NEW}}},
        {"config": {"added_tokens_decoder": {"2": {**END, "special": False}}}, "added_tokens": {"<|eot|>": 4096}},
        {"config": {"mask_token": "<mask>", "unk_token": "</s>"}},
        {"config": {"bos_token": "<|im_start|>", "add_bos_token": True, "eos_token": "</s>", "add_eos_token": True}},
        {"config": {"add_bos_token": True, "bos_token": None}},
        {"config": {"split_special_tokens": True}},
    ],
)
def test_ids_and_text_are_those_of_transformers(make, declared):
    transformers = pytest.importorskip("transformers")
    directory = make(**declared)
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    ids = theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.end_token == theirs.eos_token_id
    template = "{{ bos_token }}|{{ eos_token }}|{{ mask_token }}|{{ tool_token }}|{{ image_token }}|{{ unk_token }}"
    (directory / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "x"}]
    want = theirs.apply_chat_template(messages, return_dict=False)
    assert ours.apply_chat_template(messages) == list(want)


def replaces(times: int, what: str):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    inner = {"normalizer": "normalizers", "decoder": "decoders"}[what]
    return lambda table: table.update({what: {"type": "Sequence", inner: [step] * times}})


def post(single, **special):
    parts = {"single": single, "pair": [], "special_tokens": special}
    return lambda table: table.update(post_processor={"type": "TemplateProcessing", **parts})


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (
            lambda table: table["model"].update(continuing_subword_prefix="x"),
            """has '"continuing_subword_prefix": "x", """,
        ),
        (
            lambda table: table.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            'has \'"precompiled_charsmap": "AAAA"',
        ),
        (replaces(1, "normalizer"), "its normalizer may make one character into more than 64; not supported"),
        (replaces(4, "decoder"), "its decoder may make one character into more than 64; not supported"),
        (
            lambda table: table.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
            "its FixedLength has pieces of length 0, which is not supported",
        ),
        (
            lambda table: table.update(decoder={"type": "Strip", "content": "a", "start": 1, "stop": 1}),
            "its Strip has stripping at the end, which is not supported",
        ),
        (
            post([{"SpecialToken": {"id": "z", "type_id": 0}}]),
            "its TemplateProcessing has a template that names what it does not have, which is not supported",
        ),
        (
            post(
                [{"SpecialToken": {"id": "z", "type_id": 0}}] * 3, z={"id": "z", "ids": [1] * 40, "tokens": ["z"] * 40}
            ),
            "its TemplateProcessing has more than 100 tokens around a text, which is not supported",
        ),
        (
            post([{"Sequence": {"id": "B", "type_id": 0}}]),
            "its TemplateProcessing has a template that names what it does not have, which is not supported",
        ),
    ],
)
def test_what_makes_the_library_panic_or_grow_is_refused_by_name(make, table, fault, capfd):
    directory = make(table=table)
    with pytest.raises(ValueError) as caught:
        Tokenizer(directory)
    assert str(caught.value).startswith(f"{directory}/tokenizer.json: {fault}")
    assert capfd.readouterr().err == ""  # the library says its panics there


def test_a_prefix_spelled_with_escapes_is_seen_too(make):
    directory = make(table=lambda table: table["model"].update(continuing_subword_prefix="é"))
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("continuing_subword_prefix", "continuing\\u005fsubword_prefix"))
    with pytest.raises(ValueError, match="a prefix within words is not supported"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    ("declared", "fault"),
    [
        ({"added_tokens": {"x": -1}}, "added_tokens.json: a token's id is '-1', expected a whole number"),
        ({"added_tokens": {"x": [1]}}, "added_tokens.json: a token's id is '[1]', expected a whole number"),
        ({"config": {"added_tokens_decoder": []}}, "tokenizer_config.json: 'added_tokens_decoder' is not an object"),
        ({"config": {"added_tokens_decoder": {"5": 3}}}, "tokenizer_config.json: a token is '3', expected text or an"),
        (
            {"config": {"added_tokens_decoder": {"5": {**NEW, "lstrip": "no"}}}},
            "tokenizer_config.json: 'lstrip' of token '<tool>' is 'no', expected true or false",
        ),
        ({"config": {"additional_special_tokens": "x"}}, "tokenizer_config.json: tokens are str, expected a list"),
        ({"added_tokens": {"": 4096}}, "tokenizer_config.json: a token is empty"),
    ],
)
def test_declarations_that_are_none_name_their_file(make, declared, fault):
    directory = make(**declared)
    with pytest.raises(ValueError) as caught:
        Tokenizer(directory)
    assert str(caught.value).startswith(f"{directory}/{fault}")
