"""Calibration: where its tokens come from, what is held out of them, and what is refused."""

import hashlib

import numpy as np
import pytest
from bundles import REFERENCE

from edge_moe.compressor.passes.calibrate import domains_of, load_calibration
from edge_moe.compressor.passes.texts import WHOLE_BYTES, open_text, stdlib_files
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.tokenizer import Tokenizer

CONFIG = load_config(REFERENCE)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(REFERENCE)


def load(tokenizer, *files, tokens=2048, seed=0):
    return load_calibration(tokenizer, CONFIG, list(files), tokens, seed)


def save(path, ids):
    np.save(path, ids)
    return path


def refused(call, *arguments, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


# ---- tokens


def test_text_gives_windows_spread_over_all_of_it(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i}" for i in range(4000)))
    ids = tokenizer.encode(file.read_text())
    found = load(tokenizer, file)
    assert found.ids.shape == (8, 256)
    assert found.source == "text.txt"
    assert found.ids[0].tolist() == ids[:256]
    held_out = len(ids) // 8  # from the end
    assert found.ids[-1].tolist() == ids[: len(ids) - held_out][-256:]
    assert found.held_out[0].tolist() == ids[-held_out:][:256]
    assert found.held_out[-1].tolist() == ids[-256:]
    assert found.held_out_source == "the last part of text.txt"


def test_files_give_equal_shares_and_short_ones_what_they_have(tokenizer, tmp_path):
    long = save(tmp_path / "long.npy", np.full(5000, 7))
    other = save(tmp_path / "other.npy", np.full((10, 500), 8, np.uint16))
    short = save(tmp_path / "short.npy", np.full(600, 9))
    found = load(None, long, other, short, tokens=256 * 12)
    assert [int((found.ids == token).all(1).sum()) for token in (7, 8, 9)] == [4, 4, 1]
    assert found.source == "long.npy, other.npy, short.npy"


def test_without_files_the_standard_library_is_read(tokenizer):
    found = load(tokenizer, tokens=1024)
    assert found.source == "Python standard library"
    assert found.ids.shape == (4, 256)
    text = stdlib_files(0)[0].read_text(encoding="utf-8", errors="ignore")
    assert found.ids[0].tolist() == tokenizer.encode(text[:5000])[:256]
    assert stdlib_files(0) == stdlib_files(0) != stdlib_files(1)
    assert sorted(stdlib_files(0)) == sorted(stdlib_files(1))


def test_the_provenance_tells_tokens_and_their_hash(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, 1280)
    found = load(None, save(tmp_path / "ids.npy", ids), tokens=1024)
    assert found.provenance == {
        "source": "ids.npy",
        "sequences": 4,
        "tokens": 1024,
        "domains": 1,
        "sha256": hashlib.sha256(ids[:1024].astype("<i8").tobytes()).hexdigest(),
    }
    assert found.held_out_provenance == {
        "source": "the last part of ids.npy",
        "sequences": 1,
        "tokens": 256,
        "sha256": hashlib.sha256(ids[1024:].astype("<i8").tobytes()).hexdigest(),
    }


def test_kinds_of_text_are_told_apart():
    rng = np.random.default_rng(1)
    kinds = np.repeat([0, 1, 2], 10)
    # Three vocabularies that share a fifth of their words.
    ids = np.stack([np.where(rng.random(256) < 0.2, 0, 1000 * kind) + rng.integers(0, 300, 256) for kind in kinds])
    found = domains_of(ids, seed=0)
    assert found.min() == 0
    assert len({(kind, domain) for kind, domain in zip(kinds, found, strict=True)}) == len(set(found)) == 3
    np.testing.assert_array_equal(found, domains_of(ids, seed=0))


@pytest.mark.parametrize("sequences", [1, 15, 16, 40])
def test_text_of_one_kind_or_little_text_is_no_difficulty(sequences):
    for ids in (np.full((sequences, 64), 5), np.tile(np.arange(64), (sequences, 1))):
        found = domains_of(ids, seed=0)
        assert found.shape == (sequences,)
        assert set(found) == set(range(found.max() + 1))


# ---- what is refused


def test_files_that_cannot_serve_are_named(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "text.npy").write_text("not numpy")
    (tmp_path / "empty.npy").touch()
    save(tmp_path / "floats.npy", np.zeros(600))
    save(tmp_path / "none.npy", np.zeros(0, np.int64))
    save(tmp_path / "large.npy", np.full(600, 4096))
    save(tmp_path / "negative.npy", np.full(600, -1))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    short = "tokens, at least 512 are needed; use a longer text"
    for name, message in {
        "short.txt": f"has {len(tokenizer.encode('too short'))} {short}",
        "none.npy": f"has 0 {short}",
        "floats.npy": "holds float64, expected whole numbers (token ids)",
        "large.npy": "has token ids outside the vocabulary of 4,096",
        "negative.npy": "has token ids outside the vocabulary of 4,096",
    }.items():
        assert refused(load, tokenizer, tmp_path / name) == f"{tmp_path / name}: {message}"
    for name in ("text.npy", "empty.npy", "objects.npy"):
        assert refused(load, tokenizer, tmp_path / name).startswith(
            f"{tmp_path / name}: not a NumPy file of token ids ("
        )
    assert refused(load, tokenizer, tmp_path / "gone.txt", error=FileNotFoundError) == (
        f"{tmp_path / 'gone.txt'}: no such file of calibration or held-out text"
    )


def test_a_folder_and_the_name_of_a_data_set_are_called_so(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(load, tokenizer, ".") == (
        ".: is a folder; name the text files in it, each with an option of its own"
    )
    assert refused(load, tokenizer, "wikitext", error=FileNotFoundError) == (
        "wikitext: no such file of calibration or held-out text; "
        "calibration is read from text files, not from the name of a data set"
    )


def numbered_lines(file, lines: int):
    with open(file, "w") as handle:
        handle.writelines(f"line {number:08} of a text, which has no end\n" for number in range(lines))
    return file


def test_of_a_large_text_the_places_are_read_that_windows_are_drawn_from(tokenizer, tmp_path):
    file = numbered_lines(tmp_path / "large.txt", 2_000_000)

    class Counting:
        characters = 0

        def encode(self, text: str) -> list[int]:
            self.characters += len(text)
            return tokenizer.encode(text)

    counting = Counting()
    found = load_calibration(counting, CONFIG, [file], 4096, 0)
    assert found.ids.shape == (16, 256) and found.held_out.shape == (32, 256)
    assert counting.characters < 400_000 < file.stat().st_size // 200
    numbers = [int(tokenizer.decode(ids).split()[1]) for ids in (*found.ids, *found.held_out)]
    np.testing.assert_allclose(numbers[:16], np.arange(16) * 1_750_000 / 16, atol=1)
    np.testing.assert_allclose(numbers[16:], 1_750_000 + np.arange(32) * 250_000 / 32, atol=1)
    assert tokenizer.decode(found.ids[1]).startswith(f"line {numbers[1]:08} of a text, which has no end\nline ")


def test_a_text_that_is_encoded_in_blocks_has_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_moe.compressor.passes.texts.WHOLE_BYTES", 10_000)
    file = numbered_lines(tmp_path / "text.txt", 1000)
    found = open_text(file, tokenizer, tokens=1_000_000)
    np.testing.assert_array_equal(found.ids, tokenizer.encode(file.read_text()))


def test_a_text_in_which_a_token_is_a_whole_line_of_spaces_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"\xff" * 3 * WHOLE_BYTES)
    assert refused(load, tokenizer, tmp_path / "empty.txt") == (
        f"{tmp_path / 'empty.txt'}: has too few tokens for its size to calibrate on; use another text"
    )


def test_text_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 10_000)
    assert refused(load, None, tmp_path / "text.txt") == (
        f"{tmp_path / 'text.txt'}: the checkpoint has no tokenizer.json; pass token ids as .npy"
    )
    assert refused(load, None) == (
        "the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method rtn"
    )


def test_a_tokenizer_of_another_model_is_refused(tokenizer, golden, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 500)
    small = load_config(golden["olmoe"][0])
    assert refused(load_calibration, tokenizer, small, [tmp_path / "text.txt"], 1024, 0) == (
        f"{tmp_path / 'text.txt'}: has token ids outside the vocabulary of 128"
    )
