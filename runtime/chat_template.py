"""Rendering chat messages to the text of a prompt with the model's Jinja template, as transformers does.

Templates run in template_environment.py, within limits.
"""

import gc
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from .. import _core
from .template_environment import Environment
from .template_meter import Meter

MOST_SOURCE = 200_000  # characters of a template; the longest in use have 20,000
LITTER = 1_000_000  # bytes asked for, above which garbage is collected at once
REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms; most templates read the first
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own, so that templates treat both alike


class ChatTemplate:
    """A compiled template.

    room_bytes: maximum memory for compiling it. Raises ValueError if it cannot be parsed or takes more.
    """

    def __init__(self, source: str, room_bytes: int | None = None):
        if len(source) > MOST_SOURCE:
            raise ValueError(f"the chat template has {len(source):,} characters, expected at most {MOST_SOURCE:,}")
        self.source = source
        self.environment = Environment(room_bytes)
        try:
            self.template = self.environment.from_string(source)
        except Exception as error:
            raise _refusal(error) from None

    def reads_reasoning(self) -> bool:
        """Whether it takes the reasoning of a message apart from its content."""
        return not self.environment.keys.isdisjoint(REASONING)

    def render(self, room_bytes: int | None = None, **variables) -> str:
        """Render the template with these variables.

        Raises ValueError if the template fails, or takes more than room_bytes of memory.
        """
        with self.environment.lock:
            self.environment.meter = meter = Meter(room_bytes)
            text, error = None, None
            try:
                text = self.environment.concat(self.template.root_render_func(self.template.new_context(variables)))
            except Exception as raised:  # a template is a program and can fail in any way
                error = _refusal(raised)
            if meter.asked > LITTER:  # garbage would add up over calls; not before the error's frames are released
                gc.collect()
                _core.return_freed_memory()
        if error is not None:
            raise error
        return text


def render(
    template: ChatTemplate,
    messages,
    *,
    tools: list[dict] | None,
    documents: list[dict] | None,
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    variables: dict,
    room_bytes: int | None,
) -> str:
    """Render a conversation as transformers does; the arguments are those of Tokenizer.apply_chat_template()."""
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other; give one of them")
    for name, values in (("tools", tools), ("documents", documents)):
        if values is not None and not (isinstance(values, list | tuple) and all(isinstance(v, dict) for v in values)):
            raise TypeError(f"{name} are expected as a list of dictionaries")
    try:
        messages = [_message(message) for message in getattr(messages, "messages", messages)]
        tools, documents, variables = plain(tools), plain(documents), plain(variables)
    except RecursionError:
        raise ValueError("the messages are nested too deeply") from None
    if not messages:
        raise ValueError("there are no messages; give at least one")
    last = _leave_open(template, messages, continue_final_message) if continue_final_message else None
    given = {"messages": messages, "tools": tools, "documents": documents}
    given["add_generation_prompt"] = add_generation_prompt
    text = template.render(room_bytes, **{**variables, **given})
    return text if last is None else _cut_open(text, last)


def _message(message) -> dict:
    """A message as templates get it: of plain types, without keys of None, with reasoning under each of its names."""
    message = plain(message)
    if not isinstance(message, dict):
        raise TypeError(f"a message is {message!r:.60}, expected a dictionary with 'role' and 'content'")
    if "role" not in message:
        raise ValueError("a message has no 'role'; give 'user', 'assistant', 'system' or what the model knows")
    message = {key: value for key, value in message.items() if value is not None}
    if not message.keys() & {"content", "tool_calls", *REASONING}:
        raise ValueError(f"the message of {message['role']!r:.40} has no 'content'")
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def plain(value):
    """The value rebuilt from JSON's types, so that a template cannot call methods of the caller's objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's
        return plain(dump())
    if callable(item := getattr(value, "item", None)) and type(value).__module__ == "numpy":
        return plain(item())
    return f"<{type(value).__name__}>"


def _leave_open(template: ChatTemplate, messages: list[dict], key: bool | str) -> str:
    """Mark the end of the last message's text, or of its field `key`; returns that text."""
    key = key if isinstance(key, str) else "content"
    message = messages[-1]
    text = message.get(key)
    names = [name for name in REASONING if message.get(name) == text] if key in REASONING else [key]
    if text is None:
        raise ValueError(f"continue_final_message: the last message has no {key!r} to continue")
    if not any(name in template.source for name in names):
        raise ValueError(f"continue_final_message: the chat template does not know {key!r}")
    if isinstance(text, str):
        message.update(dict.fromkeys(names, text + CONTINUE))
        return text
    parts = [part for part in text if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not parts:
        raise ValueError("continue_final_message: the last message has no text to continue")
    last = parts[-1]["text"]
    parts[-1]["text"] = last + CONTINUE
    return last


def _cut_open(text: str, last: str) -> str:
    """The text up to the mark; if the template stripped the mark's space, it also stripped the message's."""
    at = text.rfind(CONTINUE.strip())
    if at < 0 or last.strip() not in text:
        raise ValueError("continue_final_message: the chat template leaves out the last message, or a part of it")
    return text[:at] if text.startswith(CONTINUE, at) else text[:at].rstrip()


def _refusal(error: Exception) -> ValueError:
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return ValueError(f"the chat template cannot render these messages: {message}")
