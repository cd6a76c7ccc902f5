"""The files that a bundle copies from the checkpoint, each checked to have the format of its name.

A checkpoint is untrusted, so a link in it may point at any file of this machine, and bundles are meant to be shared:
links out of the checkpoint are not followed.
"""

import json
from pathlib import Path

from ...runtime.bundle import COPIED, TEMPLATES
from ...runtime.config_file import parse_config, with_language_key
from ...runtime.files import read_bounded, real_path
from ...runtime.model_path import check_pointer
from ...runtime.tokenizer_file import MOST_TEMPLATE_BYTES

MISSING = "; put the file itself there"


def there(directory: Path) -> list[str]:
    """The files of COPIED that the checkpoint has, by name."""
    return [name for name in COPIED if (directory / name).exists() or (directory / name).is_symlink()]


def contents(directory: Path, tied_head: bool) -> dict[str, bytes]:
    """The contents of the copied files by name: those of COPIED that the checkpoint has, unchanged.

    Exceptions: chat templates in a directory of their own, and then chat_template.jinja too, are merged into
    tokenizer_config.json by name; and if config.json ties the output head but the weights have their own (tied_head is
    False), the bundle's config.json unties it. Raises ValueError for a file that does not have the format of its name.
    """
    found = {name: _content(directory, name, COPIED[name]) for name in there(directory)}
    raw = json.loads(found["config.json"])
    if parse_config(raw, str(directory / "config.json")).tied_head and not tied_head:
        found["config.json"] = _json(with_language_key(raw, "tie_word_embeddings", False))
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))
    if templates:
        texts = {file.stem: _content(directory, f"{TEMPLATES}/{file.name}", MOST_TEMPLATE_BYTES) for file in templates}
        if (own := found.pop("chat_template.jinja", None)) is not None:
            texts["default"] = own
        raw = json.loads(found.get("tokenizer_config.json", "{}"))
        raw["chat_template"] = [{"name": name, "template": text.decode()} for name, text in texts.items()]
        found["tokenizer_config.json"] = _json(raw)
    return found


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def copied_bytes(directory: Path) -> int:
    """Bytes of the copied files."""
    return sum(map(len, contents(directory, tied_head=False).values()))


def _content(directory: Path, name: str, most_bytes: int) -> bytes:
    path = directory / name
    real_path(directory, name, MISSING)
    data = read_bounded(path, most_bytes, "download it again")
    check_pointer(path, data)
    try:
        text = data.decode("utf-8")
        value = json.loads(text) if name.endswith(".json") else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not what its name says ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    if name == "merges.txt" and (bad := _bad_merge(text)) is not None:
        raise ValueError(f"{path}: line {bad} is not two symbols with a space between; download it again")
    return data


def _bad_merge(text: str) -> int | None:
    """The number of the first line that is not a merge of a byte-pair encoding, or None."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#version") and " " not in line.strip():
            return number
    return None
