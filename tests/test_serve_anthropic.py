"""Anthropic's Messages API, with Anthropic's own client: blocks, events, tools, errors."""

import json
import re

import pytest

from edge_moe.runtime.runtime import Runtime

anthropic = pytest.importorskip("anthropic")
pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

TALK = [{"role": "user", "content": "import os"}]
ASK = {"model": "m", "max_tokens": 12, "messages": TALK, "extra_body": {"temperature": 0}}
SENT = {"model": "m", "max_tokens": 12, "messages": TALK}
TOOLS = [
    {
        "name": "weather",
        "description": "of a city",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    }
]
THOUGHT = "start: /<think>[a-f]{3}<\\/think>[g-k]{3}/"


@pytest.fixture(scope="module")
def served(templated_with_tools, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with serve(templated_with_tools, log, "--name", "m", "--sequences", "1", "--queue", "2") as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return anthropic.Anthropic(base_url=served.address, api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def runtime(templated_with_tools):
    with Runtime(templated_with_tools, "8GB", threads=1) as one:
        yield one


def test_a_message(client, runtime):
    system = {"role": "system", "content": "You write Python."}
    want = runtime.generate([system, *TALK], 12)
    got = client.messages.create(**ASK, system="You write Python.")
    assert (got.type, got.role, got.model, got.stop_reason, got.stop_sequence) == (
        "message",
        "assistant",
        "m",
        "max_tokens",
        None,
    )
    assert [block.text for block in got.content] == [want.text]
    assert (got.usage.input_tokens + got.usage.cache_read_input_tokens, got.usage.output_tokens) == (
        want.prompt_tokens,
        12,
    )
    blocks = [{"type": "text", "text": "import os", "cache_control": {"type": "ephemeral"}}]
    again = client.messages.create(
        **{**ASK, "messages": [{"role": "user", "content": blocks}]},
        system=[{"type": "text", "text": "You write Python."}],
    )
    assert again.content[0].text == want.text
    assert again.usage.cache_read_input_tokens == want.prompt_tokens - 1
    counted = client.messages.count_tokens(model="m", messages=TALK, system="You write Python.")
    assert counted.input_tokens == want.prompt_tokens


def test_a_stream(client):
    want = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        assert "".join(block.text for block in stream.get_final_message().content) == want.content[0].text
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-3:] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    with client.messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == want.content[0].text


def test_stops_and_what_the_answer_begins_with(client, runtime):
    whole = client.messages.create(**{**ASK, "max_tokens": 30}).content[0].text
    stop = whole[9:12]
    got = client.messages.create(**{**ASK, "max_tokens": 30}, stop_sequences=["zzz", stop])
    assert (got.stop_reason, got.stop_sequence, got.content[0].text) == (
        "stop_sequence",
        stop,
        whole[: whole.index(stop)],
    )
    begun = [*TALK, {"role": "assistant", "content": "import sys, "}]
    with pytest.raises(anthropic.BadRequestError, match="cannot end with trailing whitespace"):
        client.messages.create(**{**ASK, "messages": begun})
    begun[-1]["content"] = "import sys,"
    want = runtime.generate(begun, 12, continue_final_message=True).text
    assert client.messages.create(**{**ASK, "messages": begun}).content[0].text == want


def test_a_thought_is_a_block_of_its_own(client):
    asked = {**ASK, "max_tokens": 60, "extra_body": {"grammar": THOUGHT, "seed": 1}}
    got = client.messages.create(**asked)
    assert [block.type for block in got.content] == ["thinking", "text"] and got.stop_reason == "end_turn"
    assert re.fullmatch("[a-f]{3}", got.content[0].thinking) and re.fullmatch("[g-k]{3}", got.content[1].text)
    with client.messages.stream(**asked) as stream:
        assert [block.to_dict() for block in stream.get_final_message().content] == [
            block.to_dict() for block in got.content
        ]
    back = [*TALK, {"role": "assistant", "content": [block.to_dict() for block in got.content]}, *TALK]
    assert client.messages.create(**{**ASK, "messages": back}).usage.output_tokens == 12
    told = client.messages.count_tokens(model="m", messages=TALK, thinking={"type": "enabled", "budget_tokens": 1024})
    assert (
        told.input_tokens
        > client.messages.count_tokens(model="m", messages=TALK, thinking={"type": "disabled"}).input_tokens
    )


def test_tools(client):
    asked = {
        **ASK,
        "max_tokens": 300,
        "tools": TOOLS,
        "tool_choice": {"type": "any"},
        "extra_body": {"seed": 3},
    }
    got = client.messages.create(**asked)
    (block,) = got.content
    assert (got.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert set(block.input) == {"city", "days"} and isinstance(block.input["days"], int)
    with client.messages.stream(**asked) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_message().content
    assert streamed.input == block.input and stream.get_final_message().stop_reason == "tool_use"
    assert any(event.type == "input_json" for event in events)
    talk = [*TALK, {"role": "assistant", "content": [block.to_dict()]}]
    talk.append(
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "12"}]}],
        }
    )
    after = client.messages.create(**{**ASK, "messages": talk}, tools=TOOLS)
    assert after.stop_reason == "max_tokens"
    text = client.messages.count_tokens(model="m", messages=talk, tools=TOOLS).input_tokens
    assert text == after.usage.input_tokens + after.usage.cache_read_input_tokens
    none = client.messages.count_tokens(model="m", messages=talk, tools=TOOLS, tool_choice={"type": "none"})
    assert none.input_tokens < text


def test_a_schema(client):
    form = {"type": "json_schema", "schema": TOOLS[0]["input_schema"]}
    for body in ({"output_format": form}, {"output_config": {"format": form, "effort": "low"}}):
        got = client.messages.create(**{**ASK, "max_tokens": 300, "extra_body": {**body, "seed": 1}})
        assert got.stop_reason == "end_turn" and set(json.loads(got.content[0].text)) == {"city", "days"}


BAD = {
    "no max_tokens": ({"max_tokens": None}, "Missing required parameter: 'max_tokens'."),
    "too hot": ({"temperature": 1.5}, "above the maximum of 1"),
    "no messages": ({"messages": []}, "at least one message is required"),
    "a wrong role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "this model reads text alone",
    ),
    "an unknown field": ({"max_token": 5}, "Did you mean 'max_tokens'?"),
    "code": (
        {"tools": [{"type": "code_execution_20250522", "name": "code_execution"}]},
        "a tool of type 'code_execution",
    ),
    "a choice of nothing": ({"tool_choice": {"type": "any"}}, "no tools to choose from"),
    "another tool": ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "there is no tool 'f'"),
    "a result without an id": ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    "a container": ({"container": "a"}, "runs no code"),
    "a prompt that is too long": ({"messages": TALK * 500}, "maximum context length"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request(served, what):
    fields, says = BAD[what]
    got = served.post("/v1/messages", {**SENT, **fields})
    body = got.json()
    assert (got.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert says in body["error"]["message"]


def test_other_errors(served, client, templated_with_tools, tmp_path):
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.messages.create(**{**ASK, "model": "claude"})
    assert refused.value.body["error"]["type"] == "not_found_error"
    got = served.post("/v1/messages", {**SENT, "messages": [{"role": "user", "content": "a" * 4_100_000}]})
    assert (got.status_code, got.json()["error"]["type"]) == (413, "request_too_large")
    busy = {"model": "m", "prompt": "import", "n": 3, "max_tokens": 1000, "logit_bias": {"0": -100}, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=busy) as running:
        lines = running.iter_lines()
        next(lines)
        with pytest.raises(anthropic.RateLimitError) as refused:
            client.messages.create(**ASK)
        assert (
            refused.value.body["error"]["type"] == "rate_limit_error"
            and "Retry-After" in refused.value.response.headers
        )
    with serve(templated_with_tools, tmp_path / "log", "--api-key", "right", "--name", "m") as locked:
        asks = {
            key: anthropic.Anthropic(base_url=locked.address, api_key=key, max_retries=0) for key in ("right", "wrong")
        }
        assert asks["right"].messages.create(**ASK).usage.output_tokens == 12
        with pytest.raises(anthropic.AuthenticationError) as refused:
            asks["wrong"].messages.create(**ASK)
        assert refused.value.body["error"]["type"] == "authentication_error"
