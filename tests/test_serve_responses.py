"""OpenAI's Responses API with OpenAI's own client, and LangChain's over both of OpenAI's APIs."""

import json
import re

import pytest

from edge_moe.runtime.runtime import Runtime

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

TALK = [{"role": "user", "content": "import os"}]
ASK = {"model": "m", "input": "import os", "temperature": 0, "max_output_tokens": 12}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "name": "weather", "description": "of a city", "parameters": PARAMETERS, "strict": True}]
THOUGHT = "start: /<think>[a-f]{3}<\\/think>[g-k]{3}/"


@pytest.fixture(scope="module")
def served(templated_with_tools, tmp_path_factory):
    with serve(templated_with_tools, tmp_path_factory.mktemp("log") / "log", "--name", "m") as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def runtime(templated_with_tools):
    with Runtime(templated_with_tools, "8GB", threads=1) as one:
        yield one


def test_a_response(client, runtime):
    want = runtime.generate([{"role": "system", "content": "Python."}, *TALK], 12)
    got = client.responses.create(**ASK, instructions="Python.")
    assert got.output_text == want.text and got.object == "response"
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (got.usage.input_tokens, got.usage.output_tokens) == (want.prompt_tokens, 12)
    items = [
        {"role": "developer", "content": "Python."},
        {"role": "user", "content": [{"type": "input_text", "text": "import os"}]},
    ]
    assert client.responses.create(**{**ASK, "input": items}).output_text == want.text


def test_a_stream(client):
    want = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert [event.type for event in events][-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want.output_text
    assert events[-1].response.output_text == want.output_text
    ends = {**ASK, "max_output_tokens": 60, "extra_body": {"grammar": "start: /[a-f]{3}/"}}
    with client.responses.stream(**ends) as stream:  # which knows no end but response.completed
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == client.responses.create(**ends).output_text


def test_a_thought_is_an_item_of_its_own(client):
    asked = {**ASK, "max_output_tokens": 60, "extra_body": {"grammar": THOUGHT, "seed": 1}}
    got = client.responses.create(**asked)
    thought, message = got.output
    assert got.status == "completed" and (thought.type, message.type) == ("reasoning", "message")
    assert re.fullmatch("[a-f]{3}", thought.content[0].text) and re.fullmatch("[g-k]{3}", got.output_text)
    assert got.usage.output_tokens_details.reasoning_tokens > 0
    *_, last = client.responses.create(**asked, stream=True)
    assert [item.content[0].text for item in last.response.output] == [item.content[0].text for item in got.output]
    back = [*TALK, *(item.to_dict() for item in got.output), *TALK]
    assert client.responses.create(**{**ASK, "input": back}).usage.output_tokens == 12


def test_tools(client):
    asked = {
        **ASK,
        "max_output_tokens": 300,
        "temperature": 1,
        "tools": TOOLS,
        "tool_choice": "required",
        "extra_body": {"seed": 2},
    }
    got = client.responses.create(**asked)
    (call,) = got.output
    assert (got.status, call.type, call.name) == ("completed", "function_call", "weather")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    events = list(client.responses.create(**asked, stream=True))
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments == events[-1].response.output[0].arguments
    answered = [
        *TALK,
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"},
    ]
    after = client.responses.create(**{**ASK, "input": answered}, tools=TOOLS)
    assert after.usage.output_tokens == 12 and after.output[0].type == "message"
    chosen = client.responses.create(**{**asked, "tool_choice": {"type": "function", "name": "weather"}})
    assert chosen.output[0].name == "weather"


def test_structured_output(client):
    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        city: str = Field(max_length=9)
        days: int = Field(le=9)

    got = client.responses.parse(
        **{**ASK, "max_output_tokens": 300, "temperature": 1}, text_format=Weather, extra_body={"seed": 1}
    )
    assert isinstance(got.output_parsed, Weather)


BAD = {
    "what is not stored": ({"previous_response_id": "resp_1"}, "previous_response_id", "responses are not stored"),
    "a conversation": ({"conversation": "c"}, "conversation", "conversations are not stored"),
    "in the background": ({"background": True}, "background", "answers are given at once"),
    "another tool": ({"tools": [{"type": "web_search"}]}, "tools[0]", "a tool of type 'web_search'"),
    "a file": (
        {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        "input[0].content[0]",
        "reads text alone",
    ),
    "a reference": ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]", "an item of type 'item_reference'"),
    "no input": ({"input": []}, "messages", "empty array"),
    "no text": ({"input": [{"role": "user"}]}, "input[0].content", "Missing required"),
    "a form": ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
    "a deep schema": (
        {"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
        "text.format",
        "type must be",
    ),
    "another model": ({"model": "gpt"}, "model", "does not exist"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request(served, what):
    fields, param, says = BAD[what]
    got = served.post("/v1/responses", {**ASK, **fields})
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (404 if what == "another model" else 400, param), error
    assert says in error["message"]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(served, runtime, responses):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        """The weather of a city."""

        city: str = Field(max_length=9)
        days: int = Field(le=9)

    def model(tokens: int = 12, **more):
        options = {"base_url": f"{served.address}/v1", "api_key": "any", "model": "m", "max_retries": 0}
        return langchain.ChatOpenAI(**options, max_tokens=tokens, use_responses_api=responses, **more)

    want = runtime.generate(TALK, 12).text
    assert model(temperature=0).invoke([HumanMessage("import os")]).text == want
    assert "".join(chunk.text for chunk in model(temperature=0).stream("import os")) == want
    assert [one.text for one in model(temperature=0).batch(["import os", "import os"])] == [want, want]
    hot = model(300, temperature=1, extra_body={"seed": 5})
    assert isinstance(hot.with_structured_output(Weather).invoke("import os"), Weather)
    called = hot.bind_tools([Weather], tool_choice="Weather").invoke("import os")
    (call,) = called.tool_calls
    assert call["name"] == "Weather" and set(call["args"]) == {"city", "days"}
    talk = [HumanMessage("import os"), called, ToolMessage("12 degrees", tool_call_id=call["id"])]
    assert model(temperature=0).bind_tools([Weather]).invoke(talk).text
