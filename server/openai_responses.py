"""OpenAI's /v1/responses: the fields of a request, and an answer as items, whole and streamed.

Responses are not stored: a conversation is sent whole each time.
"""

import secrets
from typing import TYPE_CHECKING, Any

from ..runtime.answer import Generation
from .asked import SAMPLING, Asked, sampling_options
from .errors import invalid, unsupported
from .fields import Field, array, flag, number, object_, read, text, value_of, whole
from .limits import Limits
from .messages import check_tools_known, content_of, messages_of, template_arguments, tool_of
from .openai_chat import chosen_tools, schema_of
from .reader import Event, Told
from .usage import account_of

if TYPE_CHECKING:
    from .service import Service

FIELDS = {
    "model": text(required=True),
    "input": Field((str, list), required=True),
    "instructions": text(),
    "max_output_tokens": whole(None, 1),
    "temperature": number(None, 0, 2),
    "top_p": number(None, 0, 1),
    "tools": array(),
    "tool_choice": Field((str, dict)),
    "parallel_tool_calls": flag(True),
    "text": object_(),
    "reasoning": object_(),
    "stream": flag(False),
    "metadata": object_(),
    "user": text(""),
    "top_logprobs": whole(None, 0, 20),
    "truncation": text("disabled", choices=("disabled", "auto")),
    # not in OpenAI's API
    **{name: SAMPLING[name] for name in ("seed", "top_k", "min_p", "repetition_penalty", "prune", "grammar")},
    "chat_template_kwargs": object_(),
}
IGNORED = frozenset({
    "store", "include", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "max_tool_calls", "stream_options", "access_programs", "background_options", "context_management", "moderation",
    "prompt_cache_options",
})  # fmt: skip
REFUSED = {
    "image": (bool, "answers are text"),
    "previous_response_id": (bool, "responses are not stored: send the whole conversation as 'input'"),
    "conversation": (bool, "conversations are not stored: send the whole one as 'input'"),
    "background": (bool, "answers are given at once"),
    "prompt": (bool, "prompts are not stored: send 'instructions' and 'input'"),
}
TEXT = {"format": object_(), "verbosity": text()}
FORMAT = {
    "type": text(required=True, choices=("text", "json_object", "json_schema")),
    "name": text(),
    "description": text(),
    "schema": object_(),
    "strict": flag(),
}
REASONING = {"effort": text(), "summary": text(), "generate_summary": text()}
TOOL = {"type": text(required=True), "name": text(required=True), "description": text(), "parameters": object_()}
ITEM_EXTRA = frozenset({"id", "status", "phase", "created_by", "namespace"})
MESSAGE = {
    "type": text("message"),
    "role": text(required=True, choices=("system", "developer", "user", "assistant")),
    "content": Field((str, list), required=True),
}
CALL = {"type": text(), "call_id": text(""), "name": text(required=True), "arguments": text("")}
OUTPUT = {"type": text(), "call_id": text(required=True), "output": Field((str, list), required=True)}
THOUGHT = {"type": text(), "summary": array([]), "content": array([]), "encrypted_content": text()}


def parse(body: object, service: "Service") -> Asked:
    its = read(body, FIELDS, ignored=IGNORED, refused=REFUSED)
    service.check_model(its["model"])
    tokenizer = service.tokenizer_for_messages()
    tools, choice = chosen_tools(tools_of(its["tools"], service.limits), its["tool_choice"], service)
    check_tools_known(tools, tokenizer)
    messages = items_of(its["input"])
    if its["instructions"]:
        messages.insert(0, {"role": "system", "content": its["instructions"]})
    reasoning = read(its["reasoning"], REASONING, where="reasoning") if its["reasoning"] else {"effort": None}
    options = {**service.sampling_defaults, **sampling_options(its, service.limits), "tools": tools}
    options["chat_template_kwargs"] = template_arguments(tokenizer, reasoning["effort"], its["chat_template_kwargs"])
    if its["top_logprobs"]:
        options |= {"logprobs": True, "top_logprobs": its["top_logprobs"]}
    shape, form = None, {"type": "text"}
    if its["text"] and (given := read(its["text"], TEXT, where="text")["format"]):
        told = read(given, FORMAT, where="text.format")
        form = {name: value for name, value in told.items() if value is not None}
        if told["type"] == "json_object":
            shape = "json", {"type": "object"}, "text.format"
        elif told["type"] == "json_schema":
            shape = schema_of(told, "text.format", service.limits)
    grammar = ("grammar", its["grammar"], "grammar") if its["grammar"] else None
    more = {
        "instructions": its["instructions"],
        "max_output_tokens": its["max_output_tokens"],
        "metadata": its["metadata"] or {},
        "parallel_tool_calls": its["parallel_tool_calls"],
        "reasoning": {"effort": reasoning["effort"], "summary": None},
        "temperature": options.get("temperature", 1.0),
        "text": {"format": form},
        "tool_choice": its["tool_choice"] or "auto",
        "tools": its["tools"] or [],
        "top_p": options.get("top_p", 1.0),
        "top_logprobs": its["top_logprobs"] or 0,
        "truncation": its["truncation"],
        "user": its["user"] or None,
    }
    return Asked(
        [messages_of(messages, tokenizer)],
        options,
        messages=True,
        max_tokens=its["max_output_tokens"],
        stream=its["stream"],
        calls=tools is not None,
        one_call=not its["parallel_tool_calls"],
        shape=shape or grammar or choice,
        user=its["user"],
        more=more,
    )


def tools_of(given: list | None, limits: Limits) -> list[dict] | None:
    if given and len(given) > limits.tools:
        raise invalid(f"Invalid 'tools': {len(given)} tools, expected at most {limits.tools}.", "tools")
    tools = []
    for place, one in enumerate(given or ()):
        where = f"tools[{place}]"
        kind = one.get("type") if isinstance(one, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"{where}: a tool of type {kind!r:.40}", "give functions, which the client calls", where)
        its = read(one, TOOL, where=where, ignored=frozenset({"strict", "defer_loading"}))
        tools.append(tool_of(its, where, limits))
    return tools or None


def items_of(given: str | list) -> list[dict]:
    """The messages of a text or of items; a thought and calls join the assistant's message that they belong to."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict] = []

    def assistant(fresh: str) -> dict:
        """The assistant's message to which a part is added; `fresh`: a key that it must not have yet."""
        if not messages or messages[-1]["role"] != "assistant" or fresh in messages[-1]:
            messages.append({"role": "assistant"})
        return messages[-1]

    for place, one in enumerate(given):
        where = f"input[{place}]"
        kind = one.get("type", "message") if isinstance(one, dict) else "message"
        if kind == "message":
            its = read(one, MESSAGE, where=where, ignored=ITEM_EXTRA)
            content = content_of(its["content"], f"{where}.content")
            if its["role"] == "assistant":
                assistant("content")["content"] = content
            else:
                messages.append({"role": its["role"], "content": content})
        elif kind == "function_call":
            its = read(one, CALL, where=where, ignored=ITEM_EXTRA)
            function = {"name": its["name"], "arguments": its["arguments"]}
            call = {"id": its["call_id"], "type": "function", "function": function}
            assistant("").setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            its = read(one, OUTPUT, where=where, ignored=ITEM_EXTRA)
            output = content_of(its["output"], f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": its["call_id"], "content": output})
        elif kind == "reasoning":
            its = read(one, THOUGHT, where=where, ignored=ITEM_EXTRA)
            parts = its["content"] or its["summary"]
            texts = [value_of(part.get("text") if isinstance(part, dict) else None, text(""), where) for part in parts]
            messages.append({"role": "assistant", "reasoning_content": "".join(texts)})
        else:
            raise unsupported(f"{where}: an item of type {kind!r:.40}", "give messages, calls and their outputs", where)
    return [message for message in messages if message.keys() & {"content", "tool_calls"}]


class Answer:
    """Gives the bodies of one request's answer."""

    def __init__(self, asked: Asked, service: "Service", identity: str) -> None:
        self.asked, self.service = asked, service
        self.head: dict[str, Any] = {
            "id": f"resp_{identity}",
            "object": "response",
            "created_at": service.now(),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": service.name,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "usage": None,
            **asked.more,
        }
        self.number = 0  # of the next event
        self.items: list[dict] = []  # that are complete
        self.open: dict[str, Any] | None = None  # the item that is written

    def whole(self, tolds: list[Told]) -> dict:
        (told,) = tolds
        self.items = []
        for kind, value in told.blocks:
            item = self._item(kind, value)
            self.items.append(self._done(item, kind, value.arguments if kind == "call" else value))
        if told.logprobs and self.items and self.items[-1]["type"] == "message":
            self.items[-1]["content"][0]["logprobs"] = self.service.texts.logprobs_of(told.logprobs)
        return self._ended(told)

    def begin(self) -> list[dict]:
        return [
            self._event("response.created", response=self.head),
            self._event("response.in_progress", response=self.head),
        ]

    def add(self, index: int, piece: Generation, events: list[Event], has_called: bool) -> list[dict]:
        bodies: list[dict] = []
        for kind, value in events:
            if self.open is None or kind == "call" or self.open["kind"] != kind:
                bodies += self._close()
                bodies += self._begin_item(kind, value)
            assert self.open is not None
            delta = value.arguments if kind == "call" else value
            self.open["value"] += delta
            more = {"logprobs": self.service.texts.logprobs_of(piece.logprobs or [])} if kind == "text" else {}
            bodies.append(self._event(f"{NAMES[kind]}.delta", **self._place(), delta=delta, **more))
        return bodies

    def end(self, tolds: list[Told]) -> list[dict]:
        (told,) = tolds
        bodies = self._close()
        response = self._ended(told)
        return [*bodies, self._event(f"response.{response['status']}", response=response)]

    def failed(self, code: str | None, message: str, param: str | None) -> dict:
        return self._event("error", code=code, message=message, param=param)

    def _begin_item(self, kind: str, value: Any) -> list[dict]:
        item = self._item(kind, value)
        self.open = {"kind": kind, "item": item, "value": ""}
        bodies = [self._event("response.output_item.added", output_index=len(self.items), item=item)]
        if kind != "call":
            part = _part(kind, "")
            bodies.append(self._event("response.content_part.added", **self._place(), part=part))
        return bodies

    def _close(self) -> list[dict]:
        if self.open is None:
            return []
        kind, value, place = self.open["kind"], self.open["value"], self._place()
        item = self._done(self.open["item"], kind, value)
        ended = {"arguments": value, "name": item["name"]} if kind == "call" else {"text": value}
        ended |= {"logprobs": []} if kind == "text" else {}
        bodies = [self._event(f"{NAMES[kind]}.done", **place, **ended)]
        if kind != "call":
            bodies.append(self._event("response.content_part.done", **place, part=_part(kind, value)))
        bodies.append(self._event("response.output_item.done", output_index=len(self.items), item=item))
        self.items.append(item)
        self.open = None
        return bodies

    def _place(self) -> dict:
        assert self.open is not None
        place = {"item_id": self.open["item"]["id"], "output_index": len(self.items)}
        return place if self.open["kind"] == "call" else {**place, "content_index": 0}

    def _item(self, kind: str, value: Any) -> dict:
        identity = secrets.token_hex(12)
        if kind == "call":
            its = {"call_id": value.identity, "name": value.name, "arguments": "", "status": "in_progress"}
            return {"type": "function_call", "id": f"fc_{identity}", **its}
        if kind == "thought":
            return {"type": "reasoning", "id": f"rs_{identity}", "summary": [], "content": [], "status": "in_progress"}
        return {"type": "message", "id": f"msg_{identity}", "role": "assistant", "content": [], "status": "in_progress"}

    def _done(self, item: dict, kind: str, value: str) -> dict:
        its = {"arguments": value} if kind == "call" else {"content": [_part(kind, value)]}
        return {**item, **its, "status": "completed"}

    def _ended(self, told: Told) -> dict:
        last = told.last
        cut = told.last_finish() != "stop"
        usage = {
            "input_tokens": last.prompt_tokens if last else 0,
            "input_tokens_details": {"cached_tokens": last.cached_tokens if last else 0},
            "output_tokens": last.generation_tokens if last else 0,
            "output_tokens_details": {"reasoning_tokens": told.reasoning_tokens},
            "total_tokens": last.prompt_tokens + last.generation_tokens if last else 0,
            "edge_moe": account_of([last] if last else []),
        }
        status = {"status": "incomplete" if cut else "completed"}
        details = {"incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        return {**self.head, **status, **details, "output": self.items, "usage": usage}

    def _event(self, kind: str, **its: Any) -> dict:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **its}


NAMES = {
    "text": "response.output_text",
    "thought": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def _part(kind: str, value: str) -> dict:
    if kind == "thought":
        return {"type": "reasoning_text", "text": value}
    return {"type": "output_text", "text": value, "annotations": [], "logprobs": []}
