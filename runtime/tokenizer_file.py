"""Reading and validating a directory's tokenizer: tokenizer.json, and the tokens that other files declare.

The result is that of transformers: added_tokens.json, special_tokens_map.json and tokenizer_config.json add tokens and
mark them as special; only tokenizer.json determines the special tokens around a text.
"""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .config_file import read_json
from .files import read_bounded
from .text_cuts import parts

LOADING = 13  # upper bound of the library's memory in bytes per byte of tokenizer.json; 12 were measured
LIBRARY, TEMPLATES = 6_500_000, 4_000_000  # the library's own memory, and Jinja's before it compiles a template
MOST_TEMPLATE_BYTES = 4_000_000  # the longest seen have 30 kB
MOST_AROUND = 100  # tokens that may be put around a text
MOST_GROWTH = 64  # maximum factor by which a normalizer or decoder may lengthen a text
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 12, "NFKD": 12, "Precompiled": 12, "Lowercase": 2, "BertNormalizer": 3}
ESCAPED = re.compile(rb"\\u00[2-7]")
LOADING_PANICS = {
    rb'"continuing_subword_prefix"\s*:\s*(?!\s|null|"").{1,20}': "a prefix within words",
    rb'"precompiled_charsmap"\s*:\s*(?!\s|null).{1,20}': "a Precompiled normalizer",
}


@dataclass(slots=True)
class TokenizerFile:
    """The tokenizer files of a directory."""

    backend: object  # tokenizers.Tokenizer
    named: dict[str, str] = field(default_factory=dict)  # text of bos_token and other named tokens, for chat templates
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" for the unnamed one
    growth: int = 1  # maximum factor by which the normalizer lengthens a text


@contextmanager
def library_errors(what: str):
    """Convert all errors of the library, including panics, to ValueError with a message that begins with `what`."""
    try:
        yield
    except (ValueError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split())[:200]})") from None


def reading_bytes(directory: Path) -> int:
    """Upper bound of the memory for reading a directory's tokenizer and compiling its chat template."""
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not path.is_file():
        return 0
    templates = [directory / "chat_template.jinja", *(directory / "additional_chat_templates").glob("*.jinja")]
    templated = any(file.is_file() for file in templates) or (
        config.is_file() and b"chat_template" in config.read_bytes()
    )
    libraries = LIBRARY * ("tokenizers" not in sys.modules) + TEMPLATES * (templated and "jinja2" not in sys.modules)
    return libraries + LOADING * path.stat().st_size


def read_tokenizer(directory: Path) -> TokenizerFile:
    """Read a directory's tokenizer.

    Raises ValueError, naming the file, for one that is damaged or could grow a text without bound.
    """
    path = directory / "tokenizer.json"
    backend = _read_backend(path)
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    growth = _growth(parts(backend.normalizer, "normalizers"), path, "normalizer")
    _growth(parts(backend.decoder, "decoders"), path, "decoder")
    _check_steps(backend, path)
    with library_errors(f"{config_path}: its tokens cannot be added to those of tokenizer.json"):
        named = _add_tokens(backend, directory, config, config_path)
    with library_errors(f"{path}: cannot be used"):
        backend.encode("a", add_special_tokens=True)
        backend.encode_special_tokens = config.get("split_special_tokens") is True
    return TokenizerFile(backend, named, _chat_templates(directory, config), growth)


def _read_backend(path: Path):
    from tokenizers import Tokenizer

    with library_errors(f"{path}: cannot be read"):
        _check_text(path)
        backend = Tokenizer.from_file(str(path))
        backend.no_truncation()  # some files enable truncation or padding, for training
        backend.no_padding()
        if hasattr(backend.model, "_resize_cache"):
            backend.model._resize_cache(0)  # the cache of words would grow by megabytes with every new text
    return backend


def _check_text(path: Path) -> None:
    """Refuse files that make the library panic while it reads, which takes 50 MB for the message and may end the
    process.

    These have a merge whose second half does not begin with the model's prefix, or is split inside a character by it,
    or an invalid table of characters. Models that are not mixtures of experts use these features.
    """
    data = path.read_bytes()
    if ESCAPED.search(data):  # unnecessary escapes would evade the search below
        data = json.dumps(json.loads(data), ensure_ascii=False).encode("utf-8", "surrogatepass")
    for pattern, fault in LOADING_PANICS.items():
        if found := re.search(pattern, data):
            raise ValueError(f"{path}: has {found[0].decode(errors='replace')!r}, and {fault} is not supported")


def _check_steps(backend, path: Path) -> None:
    """Refuse steps that make the library panic in use."""
    processors_ = parts(backend.post_processor, "processors")
    for step in [*parts(backend.pre_tokenizer, "pretokenizers"), *parts(backend.decoder, "decoders"), *processors_]:
        kind, fault = step["type"], None
        if kind == "FixedLength" and not step.get("length"):
            fault = "pieces of length 0"
        elif kind == "Strip" and step.get("stop"):
            fault = "stripping at the end"
        elif kind == "TemplateProcessing":
            wanted = [part["SpecialToken"]["id"] for part in step["single"] if "SpecialToken" in part]
            others = [part for part in step["single"] if part.get("Sequence", {}).get("id", "A") != "A"]
            special = {token: len(value["ids"]) for token, value in step["special_tokens"].items()}
            if others or set(wanted) - special.keys():
                fault = "a template that names what it does not have"
            elif sum(special[token] for token in wanted) > MOST_AROUND:
                fault = f"more than {MOST_AROUND} tokens around a text"
        if fault:
            raise ValueError(f"{path}: its {kind} has {fault}, which is not supported")


def _growth(steps: list[dict], path: Path, what: str) -> int:
    """Upper bound of the characters that these steps make of one. Raises ValueError if it exceeds MOST_GROWTH."""
    growth = 1
    for step in steps:
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            short = len(pattern) if pattern else 1  # a regular expression may match one character or none
            growth *= max(1, -(-len(step["content"]) // short) + (0 if pattern else 1))
        elif step["type"] == "Prepend":
            growth *= 1 + len(step["prepend"])
        else:
            growth *= GROWTH.get(step["type"], 1)
        if growth > MOST_GROWTH:
            raise ValueError(f"{path}: its {what} may make one character into more than {MOST_GROWTH}; not supported")
    return growth


def _add_tokens(backend, directory: Path, config: dict, config_path: Path) -> dict[str, str]:
    """Add the tokens declared outside tokenizer.json, in transformers' order; returns the named tokens as text."""
    from tokenizers import AddedToken

    def token_of(value, where: Path, **flags) -> AddedToken:
        if isinstance(value, str):
            return AddedToken(value, **{"special": True, **flags})
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise ValueError(f"{where}: a token is {str(value)[:60]!r}, expected text or an object with 'content'")
        known = {
            key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value
        }
        for key, flag in known.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{where}: {key!r} of token {value['content']!r} is {flag!r}, expected true or false")
        return AddedToken(value["content"], **{**known, **flags})

    def list_of(value, where: Path) -> list:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{where}: tokens are {type(value).__name__}, expected a list")
        return value or []

    present = dict(backend.get_added_tokens_decoder())
    named = {key: value for key, value in config.items() if _is_named(key, value)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    declared: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        if not isinstance(config["added_tokens_decoder"], dict):
            raise ValueError(f"{config_path}: 'added_tokens_decoder' is not an object")
        for index, value in config["added_tokens_decoder"].items():
            declared[_index(index, config_path)] = token_of(value, config_path)
    else:
        map_path, added_path = directory / "special_tokens_map.json", directory / "added_tokens.json"
        for key, value in (read_json(map_path) if map_path.is_file() else {}).items():
            if key == "extra_special_tokens" and isinstance(value, list):
                extra = [*(extra if isinstance(extra, list) else []), *value]
            elif key == "additional_special_tokens":
                extra = extra or value
            elif value is None:
                named.pop(key, None)
            elif _is_named(key, value):
                named[key] = {**value, "special": True} if isinstance(value, dict) else value
        special = {_content(value) for value in (*named.values(), *(extra if isinstance(extra, list) else ()))}
        for content, index in (read_json(added_path) if added_path.is_file() else {}).items():
            is_special = content in special
            declared[_index(index, added_path)] = AddedToken(content, normalized=not is_special, special=is_special)
        declared |= present
    if isinstance(extra, dict):
        named |= {key: value for key, value in extra.items() if isinstance(value, str | dict)}
        extra = None
    by_content = {token.content: token for token in declared.values()}
    texts = {key: _content(value) for key, value in named.items()}
    known = {repr(token) for token in present.values()}
    to_add = [token for _, token in sorted(declared.items()) if repr(token) not in known]
    there = {token.content for token in present.values()} | {token.content for token in to_add}
    for value in (*named.values(), *list_of(extra, config_path)):
        token = token_of(value, config_path)
        if token.content not in there:
            to_add.append(by_content.get(token.content, token))
            there.add(token.content)
    for token in to_add:
        if token.content in texts.values():
            token.special = True
    if any(not token.content for token in to_add):
        raise ValueError(f"{config_path}: a token is empty")
    if to_add:
        backend.add_tokens(to_add)
    return texts


def _chat_templates(directory: Path, config: dict) -> dict[str, str]:
    """The chat templates by name: files take precedence over tokenizer_config.json, which has one or a list of them."""
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files.setdefault("default", directory / "chat_template.jinja")
    found = {name: read_template(file) for name, file in files.items()}
    given = config.get("chat_template")
    if found or given is None:
        return found
    if isinstance(given, list):
        pairs = [(item.get("name"), item.get("template")) for item in given if isinstance(item, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {"default": given} if isinstance(given, str) else {}


def read_template(file: Path) -> str:
    try:
        return read_bounded(file, MOST_TEMPLATE_BYTES, "copy the file again").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); copy the file again") from None


def _is_named(key: str, value) -> bool:
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and bool(_content(value))))


def _content(value) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _index(value, where: Path) -> int:
    try:
        index = int(value)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < 2**31 or isinstance(value, bool | float):
        raise ValueError(f"{where}: a token's id is {str(value)[:40]!r}, expected a whole number")
    return index
