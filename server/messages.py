"""Messages, tools and reasoning effort of OpenAI's chat API, as the chat template gets them."""

import json
import re
from typing import Any

from ..runtime.tokenizer import Tokenizer
from .asked import refuse_media
from .errors import invalid, unsupported
from .fields import array, depth_of, object_, read, text, value_of
from .limits import Limits

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE = {
    "role": text(required=True, choices=ROLES),
    "name": text(),
    "tool_call_id": text(),
    "tool_calls": array(),
    "reasoning_content": text(),
    "reasoning": text(),
}
NOT_READ = frozenset({"content", "refusal", "annotations", "audio", "function_call", "prefix"})
CALL = {"id": text(), "type": text("function", choices=("function",)), "function": object_()}
FUNCTION_CALL = {"name": text(required=True), "arguments": text("")}
TOOL = {"type": text(required=True), "function": object_()}
FUNCTION = {"name": text(required=True), "description": text(), "parameters": object_()}
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def messages_of(given: list, tokenizer: Tokenizer) -> list[dict]:
    """The messages for the chat template. Raises ApiError."""
    if not given:
        raise invalid("Invalid 'messages': empty array. Expected at least one message.", "messages", "empty_array")
    knows_developer = "developer" in tokenizer.template_keys()
    messages = []
    for place, one in enumerate(given):
        where = f"messages[{place}]"
        its = read(one, MESSAGE, where=where, ignored=NOT_READ)
        message: dict[str, Any] = {name: value for name, value in its.items() if value is not None}
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
        if "reasoning" in message:
            message.setdefault("reasoning_content", message.pop("reasoning"))
        if (content := one.get("content")) is not None:
            message["content"] = content_of(content, f"{where}.content")
        if "tool_calls" in message:
            message["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(message["tool_calls"])
            ]
        elif "content" not in message:
            raise invalid(
                f"Missing required parameter: '{where}.content'.", f"{where}.content", "missing_required_parameter"
            )
        messages.append(message)
    return messages


def content_of(content: object, where: str) -> str:
    """The text of a content: of a text, or of parts that are texts."""
    if isinstance(content, str):
        return content
    parts = value_of(content, array(required=True), where)
    texts = []
    for place, part in enumerate(parts):
        path = f"{where}[{place}]"
        if not isinstance(part, dict):
            raise invalid(f"Invalid type for '{path}': expected an object.", path, "invalid_type")
        kind = value_of(part.get("type"), text(required=True), f"{path}.type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise refuse_media(kind, path)
        name = "refusal" if kind == "refusal" else "text"
        texts.append(value_of(part.get(name), text(required=True), f"{path}.{name}"))
    return "".join(texts)


def _call(call: object, where: str) -> dict:
    its = read(call, CALL, where=where, ignored=frozenset({"index"}))
    function = read(its["function"], FUNCTION_CALL, where=f"{where}.function")
    return {"id": its["id"] or "", "type": "function", "function": called(function["name"], function["arguments"])}


def called(name: str, arguments: str) -> dict:
    """A call as templates take it: with its arguments as an object, where they are one."""
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    return {"name": name, "arguments": parsed if isinstance(parsed, dict) else arguments}


def tools_of(given: list | None, limits: Limits, where: str = "tools") -> list[dict] | None:
    """The tools for the chat template. Raises ApiError."""
    if not given:
        return None
    if len(given) > limits.tools:
        raise invalid(
            f"Invalid '{where}': {len(given)} tools, expected at most {limits.tools}.", where, "array_above_max_length"
        )
    tools = []
    for place, one in enumerate(given):
        path = f"{where}[{place}]"
        kind = one.get("type") if isinstance(one, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"{path}: a tool of type {kind!r:.40}", "give functions, which the client calls", path)
        its = read(one, TOOL, where=path)
        function = read(its["function"], FUNCTION, where=f"{path}.function", ignored=frozenset({"strict"}))
        tools.append(tool_of(function, f"{path}.function", limits))
    return tools


def check_tools_known(tools: list[dict] | None, tokenizer: Tokenizer) -> None:
    """Raise ApiError where a chat template has no place for tools."""
    if tools and "tools" not in tokenizer.template_variables() and "tool_use" not in tokenizer.chat_templates:
        raise unsupported("This model's chat template has no tools: 'tools'", "leave them out", "tools")


def tool_of(function: dict, path: str, limits: Limits) -> dict:
    """A tool for the chat template of a function's name, description and parameters."""
    if not NAME.fullmatch(function["name"]):
        raise invalid(f"Invalid '{path}.name': expected 1 to 64 letters, digits, '_', '-', '.' or ':'.", f"{path}.name")
    check_schema(function.get("parameters"), f"{path}.parameters", limits)
    its = {name: function[name] for name in ("name", "description", "parameters") if function.get(name) is not None}
    return {
        "type": "function",
        "function": {"parameters": {"type": "object", "properties": {}}, "description": "", **its},
    }


def check_schema(schema: object, path: str, limits: Limits) -> None:
    """Raise ApiError for a schema that is too large or too deep."""
    if depth_of(schema, limits.schema_depth) > limits.schema_depth:
        raise invalid(f"Invalid schema for '{path}': nested deeper than {limits.schema_depth}.", path, "invalid_schema")
    if len(json.dumps(schema)) > limits.schema_bytes:
        raise invalid(f"Invalid schema for '{path}': more than {limits.schema_bytes:,} bytes.", path, "invalid_schema")


def template_arguments(tokenizer: Tokenizer, effort: str | None, own: dict | None) -> dict:
    """The template's other variables: those of the request, and the effort of reasoning where the template has it."""
    told = dict(own or {})
    variables = tokenizer.template_variables() if effort else set()
    if effort and "reasoning_effort" in variables and effort != "none":
        told.setdefault("reasoning_effort", effort)
    elif effort in ("none", "minimal"):
        told |= {name: False for name in ("enable_thinking", "thinking") if name in variables and name not in told}
    return told
