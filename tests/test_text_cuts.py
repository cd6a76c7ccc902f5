"""Long texts are encoded in pieces: only where the tokens are those of the whole, and no further than asked for."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from bundles import REFERENCE
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from edge_moe import _core
from edge_moe.runtime.text_cuts import Cuts, alternatives
from edge_moe.runtime.tokenizer import Tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def split(pattern: str):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(*steps, regex: bool = False):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


KINDS = {  # how the tokenizers of supported models split, under the normalizers that they have
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": (None, byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True)),
    "qwen": (normalizers.NFC(), byte_level(split(QWEN))),
    "llama": (None, byte_level(split(LLAMA))),
    "o200k": (normalizers.NFKC(), byte_level(split(O200K))),
    "deepseek": (normalizers.NFD(), byte_level(*map(split, DEEPSEEK))),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace whole": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "mixtral": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "mixtral bare": (normalizers.Replace(" ", "▁"), None),
}


def source() -> str:
    return (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")[:20_000]


def make(kind: str) -> Backend:
    normalizer, pre_tokenizer = KINDS[kind]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    training = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    training.normalizer = normalizer or normalizers.Sequence([])
    # Without splitting, merges would join words: vocabularies of such models are trained word by word.
    words = kind.startswith(("mixtral", "metaspace"))
    training.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never") if words else pre_tokenizer
    special = ["<unk>", "<s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    training.train_from_iterator([source(), "naïve Ελλάδα слово 漢字かな １２３"], trainer)
    merged = json.loads(training.to_str())["model"]
    backend.model = models.BPE(merged["vocab"], list(map(tuple, merged["merges"])), unk_token="<unk>", fuse_unk=True)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens(
        [AddedToken("a,b", normalized=True), AddedToken("end ", rstrip=True), AddedToken(" <x>", lstrip=True)]
    )
    return backend


def texts():
    rng = random.Random(7)
    signs = [
        *"ab Z09 \n\t.,;'’-_<|>()é漢字か가ñ\u0301\u200d😀ﬁ½²٣",
        "a,b",
        "end ",
        " <x>",
        "<|im_end|>",
        "don't ",
        "  ",
        "a b",
        "x\n\n",
    ]
    yield source()
    for _ in range(40):
        yield "".join(rng.choices(signs, k=rng.randrange(1, 300)))
    for _ in range(10):
        yield "".join(chr(rng.randrange(32, 0x3000)) if rng.random() < 0.7 else rng.choice(" ,\na") for _ in range(300))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind):
    backend = make(kind)
    cuts, pieces = Cuts(backend), 0
    for text in texts():
        want = backend.encode(text, add_special_tokens=False).ids
        for length in (1, 5, 40):
            found = list(cuts.pieces(text, length))
            pieces += len(found)
            assert [token for piece in found for token in backend.encode(piece, add_special_tokens=False).ids] == want
    assert pieces > 1000  # it does cut


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "pre_tokenizer", split(r"\w+,|.")),
        lambda backend: setattr(backend, "pre_tokenizer", split(r"(?m:.{5})")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("a,", "x")),
        lambda backend: backend.add_tokens([AddedToken("word", single_word=True)]),
    ],
)
def test_nothing_is_cut_without_a_proof(change):
    backend = make("gpt2")
    change(backend)
    text = source()
    assert list(Cuts(backend).pieces(text, 100)) == [text]


def test_a_vocabulary_that_joins_words_is_not_cut():
    backend = make("mixtral bare")
    joined = json.loads(backend.to_str())["model"]
    vocab = {**joined["vocab"], "e▁": len(joined["vocab"]), "e▁t": len(joined["vocab"]) + 1}
    backend.model = models.BPE(vocab, [("e", "▁"), ("e▁", "t"), *map(tuple, joined["merges"])], unk_token="<unk>")
    assert len(list(Cuts(backend).pieces("the tree the tree", 2))) == 1


def test_alternatives_are_split_outside_of_brackets():
    assert alternatives(r"(?i:'s|'t)|[^|\]]?\|+|a") == [r"(?i:'s|'t)", r"[^|\]]?\|+", "a"]


def test_a_text_of_more_tokens_than_asked_for_is_left_off():
    tokenizer = Tokenizer(REFERENCE)
    text = source() * 50
    whole = tokenizer.encode(text[:40_000])
    ids = tokenizer.encode(text, most=100)
    assert 100 < len(ids) < 4000
    assert ids == whole[: len(ids)]
    assert tokenizer.encode(source(), most=10**6) == tokenizer.backend.encode(source()).ids


def test_encoding_a_megabyte_takes_no_more_memory_than_a_piece():
    tokenizer = Tokenizer(REFERENCE)
    tokenizer.encode(source())
    text = source() * 50  # 1 MB, of which encoding at once takes 174 MB
    before = _core.resident_bytes()
    ids = tokenizer.encode(text)
    assert _core.resident_bytes() - before < 64 * len(ids) + 4_000_000


def test_a_text_without_a_place_to_cut_is_refused_where_it_takes_too_much():
    tokenizer = Tokenizer(REFERENCE)
    assert len(tokenizer.encode("=" * 50_000, room_bytes=30_000_000)) > 100
    with pytest.raises(ValueError) as caught:
        tokenizer.encode("word " * 1000 + "=" * 50_000, room_bytes=6_000_000)
    assert str(caught.value) == (
        "50,901 bytes of the prompt have no place where they could be cut, and encoding them takes up to 23 MB, where "
        "the cap leaves 6; shorten them or raise the cap"
    )


def test_no_token_is_longer_than_the_longest():
    tokenizer = Tokenizer(REFERENCE)
    longest = tokenizer.longest_token_bytes
    lengths = [len(tokenizer.backend.decode([token], skip_special_tokens=False).encode()) for token in range(4096)]
    assert max(lengths) <= longest <= 2 * max(lengths)
