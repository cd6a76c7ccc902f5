"""OpenAI's /v1/chat/completions: the fields of a request, and the forms of an answer, whole and in chunks."""

from typing import TYPE_CHECKING, Any

from ..runtime.answer import Generation
from .asked import SAMPLING, Asked, Shape, include_usage, sampling_options, shape_of
from .errors import invalid, unsupported
from .fields import Field, array, flag, object_, read, text, whole
from .limits import Limits
from .messages import check_schema, check_tools_known, messages_of, template_arguments, tools_of
from .reader import Event, Told
from .usage import openai_usage

if TYPE_CHECKING:
    from .service import Service

FIELDS = {
    **SAMPLING,
    "messages": array(required=True),
    "max_tokens": whole(None, 1),
    "max_completion_tokens": whole(None, 1),
    "logprobs": flag(False),
    "top_logprobs": whole(None, 0, 20),
    "tools": array(),
    "tool_choice": Field((str, dict)),
    "parallel_tool_calls": flag(True),
    "response_format": object_(),
    "reasoning_effort": text(choices=("none", "minimal", "low", "medium", "high", "xhigh", "max")),
    # not in OpenAI's API
    "chat_template_kwargs": object_(),
    "documents": array(),
    "continue_final_message": flag(False),
    "add_generation_prompt": flag(),
}
# They change no answer: where it is stored or billed, and hints for caches.
IGNORED = frozenset({
    "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "safety_identifier", "prediction", "verbosity", "moderation",
})  # fmt: skip
REFUSED = {
    "audio": (lambda value: True, "answers are text"),
    "modalities": (lambda value: value != ["text"], "answers are text: leave it out, or give ['text']"),
    "web_search_options": (lambda value: True, "give a function that searches"),
    "functions": (bool, "give them as 'tools'"),
    "function_call": (lambda value: value != "none", "give 'tool_choice'"),
}
FORMAT = {"type": text(required=True), "json_schema": object_()}
JSON_SCHEMA = {"name": text(required=True), "description": text(), "schema": object_(), "strict": flag()}
FINISH = {"cancelled": "length"}


def parse(body: object, service: "Service") -> Asked:
    its = read(body, FIELDS, ignored=IGNORED, refused=REFUSED)
    service.check_model(its["model"])
    tokenizer = service.tokenizer_for_messages()
    tools, choice = chosen_tools(tools_of(its["tools"], service.limits), its["tool_choice"], service)
    check_tools_known(tools, tokenizer)
    options = {**service.sampling_defaults, **sampling_options(its, service.limits)}
    if its["logprobs"]:
        options |= {"logprobs": True, "top_logprobs": its["top_logprobs"] or 0}
    elif its["top_logprobs"] is not None:
        raise invalid("The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs")
    options |= {"tools": tools, "documents": its["documents"], "continue_final_message": its["continue_final_message"]}
    options["chat_template_kwargs"] = template_arguments(
        tokenizer, its["reasoning_effort"], its["chat_template_kwargs"]
    )
    shape = format_of(its["response_format"], service.limits) or shape_of(its) or choice
    most = its["max_completion_tokens"] if its["max_completion_tokens"] is not None else its["max_tokens"]
    return Asked(
        [messages_of(its["messages"], tokenizer)],
        options,
        messages=True,
        n=its["n"],
        max_tokens=most,
        stream=its["stream"],
        include_usage=include_usage(its),
        calls=tools is not None,
        one_call=not its["parallel_tool_calls"],
        shape=shape,
        user=its["user"],
    )


def chosen_tools(
    tools: list[dict] | None, choice: str | dict | None, service: "Service"
) -> tuple[list[dict] | None, Shape | None]:
    """The tools for the template, and the shape of an answer that must call one of them."""
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return None, None
    if tools is None:
        raise invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    if isinstance(choice, dict):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        found = [tool for tool in tools if tool["function"]["name"] == name]
        if not found:
            raise invalid(f"Tool choice {name!r:.80} not found in 'tools' parameter.", "tool_choice")
        return found, ("call", found, "tool_choice")
    if choice != "required":
        raise invalid(
            f"Invalid value for 'tool_choice': {choice!r:.60}. Supported values are: 'none', 'auto', 'required'.",
            "tool_choice",
        )
    return tools, ("call", tools, "tool_choice")


def format_of(given: dict | None, limits: Limits, where: str = "response_format") -> Shape | None:
    if given is None:
        return None
    its = read(given, FORMAT, where=where)
    if its["type"] == "text":
        return None
    if its["type"] == "json_object":
        return "json", {"type": "object"}, where
    if its["type"] != "json_schema":
        raise unsupported(f"{where}.type {its['type']!r:.40}", "give text, json_object or json_schema", where)
    if its["json_schema"] is None:
        raise invalid(
            f"Missing required parameter: '{where}.json_schema'.", f"{where}.json_schema", "missing_required_parameter"
        )
    return schema_of(
        read(its["json_schema"], JSON_SCHEMA, where=f"{where}.json_schema"), f"{where}.json_schema", limits
    )


def schema_of(its: dict, where: str, limits: Limits) -> Shape:
    schema = its["schema"] if its["schema"] is not None else {}
    check_schema(schema, where, limits)
    return "json", schema, where


class Answer:
    """Gives the bodies of one request's answer."""

    named_events = False

    def __init__(self, asked: Asked, service: "Service", identity: str) -> None:
        self.asked, self.service = asked, service
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{identity}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": service.now(),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        self.calls = [0] * asked.n

    def whole(self, tolds: list[Told]) -> dict:
        choices = [self._choice(index, told) for index, told in enumerate(tolds)]
        return {**self.head, "choices": choices, "usage": openai_usage(tolds, self.asked.n)}

    def _choice(self, index: int, told: Told) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": told.text or (None if told.calls else "")}
        message["refusal"] = None
        if told.thought:
            message["reasoning_content"] = told.thought
        if told.calls:
            message["tool_calls"] = [self._call(call) for call in told.calls]
        logprobs = self._logprobs(told.logprobs) if self.asked.options.get("logprobs") else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_of(told.last, told.called),
        }

    def begin(self) -> list[dict]:
        return [
            self._chunk(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(self.asked.n)
        ]

    def add(self, index: int, piece: Generation, events: list[Event], called: bool) -> list[dict]:
        chunks = []
        for kind, value in events:
            if kind == "call":
                delta = {"tool_calls": [{"index": self.calls[index], **self._call(value)}]}
                self.calls[index] += 1
            else:
                delta = {"reasoning_content" if kind == "thought" else "content": value}
            chunks.append(self._chunk(index, delta))
        if piece.logprobs:
            chunks = chunks or [self._chunk(index, {})]
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(piece.logprobs)
        if piece.finish_reason is not None:
            chunks.append(self._chunk(index, {}, finish_of(piece, called)))
        return chunks

    def end(self, tolds: list[Told]) -> list[dict | str]:
        usage: dict[str, Any] = {**self.head, "choices": [], "usage": openai_usage(tolds, self.asked.n)}
        return [*([usage] if self.asked.include_usage else []), "[DONE]"]

    def _chunk(self, index: int, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "choices": [choice], **({"usage": None} if self.asked.include_usage else {})}

    def _call(self, call) -> dict:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": call.identity, "type": "function", "function": function}

    def _logprobs(self, told: list) -> dict:
        return {"content": self.service.texts.logprobs_of(told), "refusal": None}


def finish_of(last: Generation | None, called: bool) -> str:
    reason = last.finish_reason if last is not None and last.finish_reason else "length"
    return "tool_calls" if called and reason != "length" else FINISH.get(reason, reason)
