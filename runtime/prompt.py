"""Converting a prompt, given as text, messages or token ids, to token ids, with errors for invalid prompts."""

import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from .tokenizer import Tokenizer

Message = Mapping[str, Any]  # "role" and "content", and other keys that the model's chat template reads
Prompt = str | Sequence[Message] | Sequence[int]
_one_at_a_time = threading.Lock()  # otherwise several threads would each use the same free memory
KINDS = "give a text, a list of messages or a list of token ids"


class PromptTooLong(ValueError):
    """A prompt of more tokens than the context holds."""


def prompt_ids(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    *,
    context: int,
    vocab: int,
    room_bytes: Callable[[], int] | None,
    where: object = "this bundle",
    **chat,
) -> list[int]:
    """The token ids of a prompt, 1 to `context`, each below `vocab`.

    room_bytes: returns the memory that encoding may take now; the process encodes one text at a time. chat: keywords of
    Tokenizer.apply_chat_template(), only for messages. Raises TypeError for a value that is not a prompt, and
    ValueError for a prompt that is empty, too long or outside the vocabulary.
    """
    kind, items = _kind_of(prompt)
    if kind == "ids":
        _refuse_chat(chat, "token ids")
        ids = [_token_id(token) for token in islice(items, context + 1)]
        count = len(items) if hasattr(items, "__len__") else None
    else:
        if tokenizer is None:
            raise ValueError(f"{where}: this bundle has no tokenizer; pass token ids")
        if kind == "text":
            _refuse_chat(chat, "text")
        with _one_at_a_time:
            limits = {"most": context, "room_bytes": room_bytes() if room_bytes else None}
            if kind == "text":
                ids = tokenizer.encode(prompt, **limits)
            else:
                ids = tokenizer.apply_chat_template(items, **limits, **chat)
        count = None
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(ids) > context:
        has = f"{count:,}" if count else f"more than {context:,}"
        raise PromptTooLong(f"the prompt has {has} tokens, the context {context:,}; shorten it or raise context")
    outside = next((token for token in ids if not 0 <= token < vocab), None)
    if outside is not None:
        raise ValueError(f"token id {outside} is outside the vocabulary of {vocab:,} tokens")
    return ids


def _refuse_chat(chat: dict, kind: str) -> None:
    for name, value in chat.items():
        if value:
            raise ValueError(f"{name} needs messages, but the prompt is {kind}")


def _kind_of(prompt: Prompt) -> tuple[str, Any]:
    """The kind of a prompt, "text", "messages" or "ids", and the prompt, with messages as a list."""
    if isinstance(prompt, str):
        return "text", prompt
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise TypeError("the prompt is bytes; decode them to a text first")
    if isinstance(prompt, Mapping):
        raise TypeError("the prompt is one message; give a list of messages")
    if not isinstance(prompt, Iterable):
        raise TypeError(f"the prompt is {type(prompt).__name__}; {KINDS}")
    if not hasattr(prompt, "__getitem__"):
        prompt = list(prompt)
    first = next(iter(prompt), None)
    if isinstance(first, str):
        raise TypeError("the prompt is a list of texts; generate for one text at a time")
    if first is None or not isinstance(first, Mapping):
        if callable(getattr(first, "model_dump", None)):
            return "messages", list(prompt)
        return "ids", prompt
    return "messages", list(prompt)


def _token_id(token) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"the prompt has {token!r:.60} among its token ids; {KINDS}") from None
