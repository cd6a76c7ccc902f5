"""Text to token ids and back, and chat messages to a prompt, from the files that lie in a bundle.

Uses `tokenizers` and `jinja2`; transformers is never imported here.
"""

import json
from datetime import datetime
from pathlib import Path

from edge_moe.runtime.config import read_json

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


class Tokenizer:
    """The tokenizer of a bundle or checkpoint directory; `chat_template` is None where it has none."""

    def __init__(self, directory: str | Path):
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        try:
            self.backend = Backend.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{directory / 'tokenizer.json'}: cannot be read ({error})") from None
        self.backend.no_truncation()  # some files ask for either, meant for training
        self.backend.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        self.special = {  # for the chat template: bos_token and its like, as text
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, dict | str)
        }
        template = directory / "chat_template.jinja"
        self.chat_template = (
            template.read_text(encoding="utf-8") if template.is_file() else _template(config.get("chat_template"))
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included. Raises ValueError for text with half a surrogate pair."""
        return self._encode(text, special=True)

    def decode(self, ids) -> str:
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def apply_chat_template(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "user", "content": "..."}, ...]. Raises ValueError when there is no template or the
        template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; pass a prompt as text")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(  # what templates are written for: transformers' settings
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        try:
            text = environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the chat template cannot render these messages: {error}") from None
        return self._encode(text, special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text cannot be encoded: {error.reason} at character {error.start}") from None
        return self.backend.encode(text, add_special_tokens=special).ids


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer of a bundle or checkpoint directory, where it has one."""
    return Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None


class Detokenizer:
    """Turns tokens into text one at a time, holding back what is not yet a whole character.

    A token's text may depend on the one before it, so a short window is decoded each time and compared with the
    window without the new tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # of the window
        self.shown = 0  # tokens whose text is out

    def add(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith(REPLACEMENT):
            return ""
        if len(now) > len(before):  # else the window keeps its start: a special token alone is no context
            self.start = self.shown
        self.shown = len(self.tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back, as it is."""
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        self.start = self.shown = len(self.tokens)
        return now[len(before) :]


def _template(value) -> str | None:
    """tokenizer_config.json has one template or a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        return named.get("default")
    return value if isinstance(value, str) else None


def _raise(message: str):
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
