"""Drawing windows of tokens from one calibration text, with no more of the text in memory than they need.

A text of a few megabytes is encoded whole, and a file of token ids is mapped. Of a larger text only the parts that
windows are drawn from are read and encoded: 49,152 tokens of a gigabyte are a few hundred kilobytes.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WHOLE_BYTES = 4_000_000  # maximum of a text file that is encoded whole
TOKEN_BYTES = 16  # read at first for each token of a window; most texts have 3 to 5 bytes a token
MOST_TOKEN_BYTES = 256  # the maximum read for each token of a window
STDLIB = "Python standard library"
STDLIB_BYTES = 4_000_000  # read from the standard library


@dataclass(frozen=True, slots=True)
class Ids:
    """A text that is encoded whole."""

    source: str
    ids: np.ndarray  # (tokens,) integers

    def parts(self, of: int, least: int) -> tuple["Ids", "Ids"]:
        """Split off the end: 1 / `of` of the tokens, at least `least`."""
        cut = len(self.ids) - max(len(self.ids) // of, least)
        return Ids(self.source, self.ids[:cut]), Ids(self.source, self.ids[cut:])

    def windows(self, count: int, length: int) -> list[np.ndarray]:
        """Up to `count` windows of `length` tokens, spread evenly; fewer if they would overlap."""
        starts = np.linspace(0, len(self.ids) - length, min(count, len(self.ids) // length), dtype=np.int64)
        return [np.asarray(self.ids[start : start + length], np.int64) for start in starts]

    def check_length(self, least: int) -> None:
        if len(self.ids) < least:
            raise _too_short(self.source, f"{len(self.ids):,}", least)


@dataclass(frozen=True, slots=True)
class LargeText:
    """A text file, or a part of one, that is read and encoded only where windows are drawn."""

    source: str
    file: Path
    tokenizer: object
    begin: int  # bytes
    end: int

    def parts(self, of: int, least: int) -> tuple["LargeText", "LargeText"]:
        cut = self.end - (self.end - self.begin) // of
        first = LargeText(self.source, self.file, self.tokenizer, self.begin, cut)
        return first, LargeText(self.source, self.file, self.tokenizer, cut, self.end)

    def windows(self, count: int, length: int) -> list[np.ndarray]:
        """As Ids.windows(); a window starts at the beginning of a line if the text has lines."""
        found, room = [], (self.end - self.begin) // max(count, 1)
        with open(self.file, "rb") as file:
            for number in range(count):
                at = self.begin + number * room
                for token_bytes in (TOKEN_BYTES, MOST_TOKEN_BYTES):
                    file.seek(at)
                    ids = self._encode(file.read(min(token_bytes * length, room)), at > 0)
                    if len(ids) >= length:
                        found.append(np.array(ids[:length], np.int64))
                        break
        return found

    def check_length(self, least: int) -> None:
        pass  # open_text() makes a LargeText only if the windows are a small part of the text

    def _encode(self, data: bytes, inside: bool) -> list[int]:
        """The tokens of a piece of the text, without special tokens, from the first line that starts in it."""
        begin = data.find(b"\n", 0, len(data) // 2) + 1 if inside else 0
        # A character that is cut at either end is dropped.
        return self.tokenizer.encode(data[begin:].decode("utf-8", errors="ignore"))[len(self.tokenizer.encode("")) :]


def open_text(file: Path, tokenizer, tokens: int) -> Ids | LargeText:
    """Open a file of calibration or held-out text, or of token ids (.npy), from which up to `tokens` are drawn.

    Raises FileNotFoundError if the file does not exist, and ValueError for a file of another kind or text without a
    tokenizer.
    """
    check_file(file)
    if file.suffix == ".npy":
        return Ids(str(file), _load(file))
    if tokenizer is None:
        raise ValueError(f"{file}: the checkpoint has no tokenizer.json; pass token ids as .npy")
    size = file.stat().st_size
    if size > max(WHOLE_BYTES, 4 * TOKEN_BYTES * tokens):
        return LargeText(str(file), file, tokenizer, 0, size)
    return Ids(str(file), _encode_whole(file, tokenizer))


def check_file(file: Path) -> None:
    """Raise ValueError for a folder, and FileNotFoundError if there is no such file."""
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; name the text files in it, each with an option of its own")
    if not file.is_file():
        hint = "" if file.suffix else "; calibration is read from text files, not from the name of a data set"
        raise FileNotFoundError(f"{file}: no such file of calibration or held-out text{hint}")


def stdlib_text(tokenizer, seed: int) -> Ids:
    """The source of the standard library, with modules shuffled by `seed`. Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method rtn")
    text, size = [], 0
    for file in stdlib_files(seed):
        text.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(text[-1])
        if size >= STDLIB_BYTES:
            break
    return Ids(STDLIB, np.array(tokenizer.encode("\n".join(text)), np.int32))


def stdlib_files(seed: int) -> list[Path]:
    """The modules of the running interpreter's standard library, shuffled by `seed`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))]


def content_hash(file: Path) -> tuple[int, bytes] | None:
    """The size and digest of a file, equal for equal content; None if there is no file."""
    if not file.is_file():
        return None
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return file.stat().st_size, digest.digest()


def _encode_whole(file: Path, tokenizer) -> np.ndarray:
    """All tokens of a text, (tokens,); a text longer than WHOLE_BYTES is encoded in blocks of whole lines."""
    special, blocks, rest = len(tokenizer.encode("")), [], ""
    with open(file, encoding="utf-8", errors="replace", newline="") as handle:
        while text := handle.read(WHOLE_BYTES):
            text = rest + text
            cut = text.rfind("\n") + 1 if len(text) > WHOLE_BYTES // 2 and handle.buffer.peek(1) else len(text)
            text, rest = text[: cut or len(text)], text[cut or len(text) :]
            blocks.append(np.array(tokenizer.encode(text)[special if blocks else 0 :], np.int32))
    if rest:
        blocks.append(np.array(tokenizer.encode(rest)[special if blocks else 0 :], np.int32))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)


def _load(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a NumPy file of token ids ({error})") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{file}: holds {getattr(ids, 'dtype', 'an archive')}, expected whole numbers (token ids)")
    return ids.reshape(-1)


def _too_short(source: str, tokens: str, least: int) -> ValueError:
    return ValueError(f"{source}: has {tokens} tokens, at least {least:,} are needed; use a longer text")
