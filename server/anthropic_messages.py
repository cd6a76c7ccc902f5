"""Anthropic's /v1/messages and count_tokens: the fields of a request, and an answer as blocks, whole and streamed."""

import json
from typing import TYPE_CHECKING, Any

from ..runtime.answer import Generation
from ..runtime.prompt import PromptTooLong
from .asked import Asked, Shape, refuse_media, stops_of
from .errors import invalid, too_long, unsupported
from .fields import Field, array, flag, number, object_, read, text, value_of, whole
from .messages import called, check_schema, check_tools_known, tool_of
from .reader import Event, Told
from .usage import account_of

if TYPE_CHECKING:
    from .service import Service

TEXT = Field((str, list))
COUNTED = {
    "model": text(required=True),
    "messages": array(required=True),
    "system": TEXT,
    "tools": array(),
    "tool_choice": object_(),
    "thinking": object_(),
}
FIELDS = {
    **COUNTED,
    "max_tokens": whole(None, 1, required=True),
    "stop_sequences": array(),
    "stream": flag(False),
    "temperature": number(None, 0, 1),
    "top_p": number(None, 0, 1),
    "top_k": whole(None, 0),
    "metadata": object_(),
    "output_config": object_(),
    "output_format": object_(),
    # not in Anthropic's API
    "prune": Field((float, str)),
    "seed": whole(None, 0, 2**63 - 1),
    "min_p": number(None, 0, 1),
    "grammar": text(),
    "chat_template_kwargs": object_(),
}
IGNORED = frozenset(
    {
        "service_tier",
        "context_management",
        "cache_control",
        "inference_geo",
        "speed",
        "diagnostics",
        "user_profile_id",
        "workspace_id",
    }
)
REFUSED = {
    "container": (bool, "this server runs no code"),
    "mcp_servers": (bool, "give tools, which the client calls"),
}
ROLES = ("user", "assistant")
MESSAGE = {
    "role": text(required=True, choices=("user", "assistant", "system")),
    "content": Field((str, list), required=True),
}
TOOL = {"name": text(required=True), "description": text(), "input_schema": object_(), "type": text("custom")}
TOOL_EXTRA = frozenset(
    {"cache_control", "strict", "eager_input_streaming", "defer_loading", "allowed_callers", "input_examples"}
)
CHOICE = {
    "type": text(required=True, choices=("auto", "any", "tool", "none")),
    "name": text(),
    "disable_parallel_tool_use": flag(False),
}
THINKING = {"type": text(required=True, choices=("enabled", "disabled", "adaptive", "between_tools"))}
FORMAT = {"type": text(required=True, choices=("json_schema",)), "schema": object_()}
REASONS = {"stop": "end_turn", "length": "max_tokens", "cancelled": "max_tokens"}


def parse(body: object, service: "Service") -> Asked:
    its = read(body, FIELDS, ignored=IGNORED, refused=REFUSED)
    messages, options, shape = conversation(its, service)
    options = {**service.sampling_defaults, **options}
    for name in ("temperature", "top_k", "min_p", "seed", "prune"):
        if its[name] is not None:
            options[name] = its[name]
    if its["top_p"] is not None:
        options["top_p"] = max(its["top_p"], 1e-9)
    if its["stop_sequences"]:
        options["stop"] = stops_of(its["stop_sequences"], "stop_sequences", service.limits)
    if its["grammar"]:
        shape = "grammar", its["grammar"], "grammar"
    choice, config = its["tool_choice"] or {}, its["output_config"] or {}
    form = its["output_format"] if its["output_format"] is not None else config.get("format")
    if form is not None:
        where = "output_format" if its["output_format"] is not None else "output_config.format"
        told = read(form, FORMAT, where=where)
        check_schema(told["schema"], f"{where}.schema", service.limits)
        shape = "json", told["schema"] or {}, where
    user = (its["metadata"] or {}).get("user_id")
    return Asked(
        [messages],
        options,
        messages=True,
        max_tokens=its["max_tokens"],
        stream=its["stream"],
        calls=options["tools"] is not None,
        one_call=bool(choice.get("disable_parallel_tool_use")),
        shape=shape,
        user=user if isinstance(user, str) else "",
    )


def conversation(its: dict[str, Any], service: "Service") -> tuple[list[dict], dict[str, Any], Shape | None]:
    """The messages and the options of the chat template, and the shape of an answer that must be a call."""
    service.check_model(its["model"])
    tokenizer = service.tokenizer_for_messages()
    tools, shape = chosen_tools(its["tools"], its["tool_choice"], service)
    check_tools_known(tools, tokenizer)
    messages = messages_of(its["messages"])
    if its["system"]:
        messages.insert(0, {"role": "system", "content": _text(its["system"], "system")})
    told = dict(its.get("chat_template_kwargs") or {})
    if its["thinking"] is not None:
        thinks = read(its["thinking"], THINKING, where="thinking", ignored=frozenset({"budget_tokens", "display"}))
        variables = {"enable_thinking", "thinking"} & tokenizer.template_variables()
        told = {**dict.fromkeys(variables, thinks["type"] != "disabled"), **told}
    begun = messages[-1]["role"] == "assistant" and "content" in messages[-1]
    if begun and messages[-1]["content"] != messages[-1]["content"].rstrip():
        raise invalid("messages: final assistant content cannot end with trailing whitespace", "messages")
    return messages, {"tools": tools, "continue_final_message": begun, "chat_template_kwargs": told}, shape


def chosen_tools(given: list | None, choice: dict | None, service: "Service") -> tuple[list[dict] | None, Shape | None]:
    tools = []
    if given and len(given) > service.limits.tools:
        raise invalid(f"tools: {len(given)} tools, expected at most {service.limits.tools}", "tools")
    for place, one in enumerate(given or ()):
        where = f"tools[{place}]"
        kind = one.get("type") if isinstance(one, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise unsupported(f"{where}: a tool of type {kind!r:.40}", "give tools that the client calls", where)
        its = read(one, TOOL, where=where, ignored=TOOL_EXTRA)
        tools.append(tool_of({**its, "parameters": its["input_schema"]}, where, service.limits))
    its = read(choice, CHOICE, where="tool_choice") if choice is not None else {"type": "auto"}
    if its["type"] == "none" or not tools:
        if its["type"] in ("any", "tool"):
            raise invalid("tool_choice: there are no tools to choose from", "tool_choice")
        return None, None
    if its["type"] == "auto":
        return tools, None
    found = [tool for tool in tools if its["type"] == "any" or tool["function"]["name"] == its["name"]]
    if not found:
        raise invalid(f"tool_choice: there is no tool {its['name']!r:.80}", "tool_choice")
    return found, ("call", found, "tool_choice")


def messages_of(given: list) -> list[dict]:
    """The messages for the chat template; results of tools become messages of their own."""
    messages: list[dict] = []
    for place, one in enumerate(given):
        where = f"messages[{place}]"
        its = read(one, MESSAGE, where=where)
        if isinstance(its["content"], str):
            messages.append({"role": its["role"], "content": its["content"]})
            continue
        message: dict[str, Any] = {"role": its["role"]}
        texts = []
        for number_, block in enumerate(its["content"]):
            path = f"{where}.content[{number_}]"
            kind = value_of(block.get("type") if isinstance(block, dict) else None, text(required=True), f"{path}.type")
            if kind == "text":
                texts.append(value_of(block.get("text"), text(required=True), f"{path}.text"))
            elif kind == "tool_result":
                content = _text(block.get("content") or "", f"{path}.content")
                identity = value_of(block.get("tool_use_id"), text(required=True), f"{path}.tool_use_id")
                messages.append({"role": "tool", "tool_call_id": identity, "content": content})
            elif kind == "tool_use" and its["role"] == "assistant":
                name = value_of(block.get("name"), text(required=True), f"{path}.name")
                arguments = value_of(block.get("input"), object_({}), f"{path}.input")
                identity = value_of(block.get("id"), text(""), f"{path}.id")
                function = called(name, json.dumps(arguments))
                message.setdefault("tool_calls", []).append({"id": identity, "type": "function", "function": function})
            elif kind == "thinking" and its["role"] == "assistant":
                message["reasoning_content"] = value_of(block.get("thinking"), text(""), f"{path}.thinking")
            elif kind != "redacted_thinking":
                raise refuse_media(kind, path)
        if texts:
            message["content"] = "\n".join(texts) if its["role"] == "user" else "".join(texts)
        if len(message) > 1:
            messages.append(message)
    if not messages:
        raise invalid("messages: at least one message is required", "messages")
    return messages


def _text(content: object, where: str) -> str:
    """A text, or the texts of blocks."""
    if isinstance(content, str):
        return content
    texts = []
    for place, block in enumerate(value_of(content, array(required=True), where)):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise refuse_media(kind, f"{where}[{place}]")
        texts.append(value_of(block.get("text"), text(required=True), f"{where}[{place}].text"))
    return "\n".join(texts)


def count_tokens(body: object, service: "Service") -> dict:
    """The tokens of a conversation; takes the fields of a whole request."""
    its = read(body, {**FIELDS, "max_tokens": whole()}, ignored=IGNORED, refused=REFUSED)
    messages, options, _ = conversation(its, service)
    try:
        return {"input_tokens": len(service.runtime._prompt_ids(messages, **options))}
    except PromptTooLong as error:
        raise too_long(f"prompt is too long: {error}", "messages") from None
    except ValueError as error:
        raise invalid(service.told(error), "messages") from None


class Answer:
    """Gives the bodies of one request's answer."""

    def __init__(self, asked: Asked, service: "Service", identity: str) -> None:
        self.asked, self.service = asked, service
        self.head: dict[str, Any] = {
            "id": f"msg_{identity}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self.prompt_tokens = 0
        self.at, self.kind = -1, ""  # the block that is open

    def whole(self, tolds: list[Told]) -> dict:
        (told,) = tolds
        content = [self._block(kind, value) for kind, value in told.blocks]
        return {**self.head, "content": content, **self._ended(told), "usage": self._usage(told)}

    def begin(self) -> list[dict]:
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": 0}
        return [{"type": "message_start", "message": {**self.head, "usage": usage}}]

    def add(self, index: int, piece: Generation, events: list[Event], has_called: bool) -> list[dict]:
        bodies: list[dict] = []
        for kind, value in events:
            if kind == "call" or kind != self.kind:
                bodies += self._close()
                self.at, self.kind = self.at + 1, kind
                empty = self._block(kind, value if kind == "call" else "")
                if kind == "call":
                    empty["input"] = {}
                bodies.append({"type": "content_block_start", "index": self.at, "content_block": empty})
            bodies.append(self._delta(_DELTAS[kind], value.arguments if kind == "call" else value))
        return bodies

    def end(self, tolds: list[Told]) -> list[dict]:
        (told,) = tolds
        ended = {"type": "message_delta", "delta": self._ended(told), "usage": self._usage(told)}
        return [*self._close(), ended, {"type": "message_stop"}]

    def _close(self) -> list[dict]:
        if self.at < 0:
            return []
        signed = [self._delta(("signature_delta", "signature"), "")] if self.kind == "thought" else []
        return [*signed, {"type": "content_block_stop", "index": self.at}]

    def _delta(self, names: tuple[str, str], value: str) -> dict:
        kind, name = names
        return {"type": "content_block_delta", "index": self.at, "delta": {"type": kind, name: value}}

    def _block(self, kind: str, value: Any) -> dict:
        if kind == "call":
            return {"type": "tool_use", "id": value.identity, "name": value.name, "input": json.loads(value.arguments)}
        if kind == "thought":
            return {"type": "thinking", "thinking": value, "signature": ""}
        return {"type": "text", "text": value}

    def _ended(self, told: Told) -> dict:
        reason = told.last_finish() or "length"
        why = "tool_use" if told.called and reason == "stop" else "stop_sequence" if told.stop else REASONS[reason]
        return {"stop_reason": why, "stop_sequence": told.stop}

    def _usage(self, told: Told) -> dict:
        last = told.last
        cached = last.cached_tokens if last else 0
        return {
            "input_tokens": (last.prompt_tokens if last else 0) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": last.generation_tokens if last else 0,
            "output_tokens_details": {"thinking_tokens": told.reasoning_tokens},
            "edge_moe": account_of([last] if last else []),
        }


_DELTAS = {
    "text": ("text_delta", "text"),
    "thought": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
