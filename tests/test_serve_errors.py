"""What a server refuses: with the statuses and bodies that the APIs' owners document, and the field's name."""

import json
import shutil
import socket

import pytest
from bundles import edit_copy

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

KEY = "sk-of-this-test"
TALK = [{"role": "user", "content": "import os"}]
CHAT, TEXT = {"model": "templated", "messages": TALK}, {"model": "templated", "prompt": "import"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
DEEP: dict = {}
for _ in range(60):
    DEEP = {"properties": {"a": DEEP}}


@pytest.fixture(scope="module")
def served(templated, tmp_path_factory):
    options = ("--api-key", KEY, "--context", "256", "--body-limit", "200kB", "--name", "templated", "--name", "other")
    with serve(templated, tmp_path_factory.mktemp("log") / "log", *options) as one:
        yield one


@pytest.fixture(scope="module")
def open_door(templated, tmp_path_factory):
    """A server without a key, for whoever is on this machine."""
    with serve(
        templated, tmp_path_factory.mktemp("log") / "log", "--sequences", "1", "--queue", "3", "--timeout", "60"
    ) as one:
        yield one


def post(served, path: str, body, **headers) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    return httpx.post(served.address + path, content=content, headers=headers, timeout=60)


def test_a_wrong_key(served):
    for key, says in (
        ("sk-wrong-wrong-wrong", "Incorrect API key provided: sk-***ng."),
        ("", "You didn't provide an API key."),
    ):
        got = httpx.get(f"{served.address}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        assert got.status_code == 401 and got.json()["error"]["message"].startswith(says)
        assert got.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{served.address}/v1", api_key="sk-wrong", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    assert served.get("/health").status_code == 200
    assert served.get("/metrics").status_code == 401
    for right in ({"Authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
        assert [one["id"] for one in served.get("/v1/models", headers=right).json()["data"]] == ["templated", "other"]


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_an_unknown_model(served, path, body):
    got = post(served, path, {**body, "model": "gpt-5"})
    assert got.status_code == 404
    message = "The model `gpt-5` does not exist; this server has `templated`."
    want = {"message": message, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert got.json() == {"error": want}
    assert post(served, path, {**body, "model": "other", "max_tokens": 1}).json()["model"] == "templated"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1,", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"]
)
def test_what_is_not_json(served, data):
    got = post(served, "/v1/completions", data)
    assert got.status_code == 400
    assert got.json()["error"]["message"].startswith("We could not parse the JSON body of your request")


BAD = {  # by what is wrong: the path's end, the fields, the field that the error names, and words of its message
    "no object": ("completions", [], None, "expected an object, but got an array"),
    "no model": ("completions", {"model": None}, "model", "Missing required parameter: 'model'."),
    "no prompt": ("completions", {"prompt": None}, "prompt", "Missing required parameter: 'prompt'."),
    "an empty prompt": ("completions", {"prompt": ""}, "prompt", "empty"),
    "an empty list": ("completions", {"prompt": []}, "prompt", "empty"),
    "a prompt of numbers": ("completions", {"prompt": [1.5]}, "prompt", "'prompt[0]'"),
    "a token that there is not": ("completions", {"prompt": [4096]}, None, "token id 4096 is outside the vocabulary"),
    "half a character": ("completions", {"prompt": "\ud800"}, None, "cannot be encoded"),
    "an unknown field": ("completions", {"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
    "a wrong type": ("completions", {"max_tokens": "5"}, "max_tokens", "expected an integer, but got a string"),
    "a boolean number": ("completions", {"temperature": True}, "temperature", "expected a number, but got a boolean"),
    "too hot": ("completions", {"temperature": 2.5}, "temperature", "above the maximum of 2"),
    "a bad bias": ("completions", {"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
    "a bias that is too large": ("completions", {"logit_bias": {"5": 101}}, "logit_bias.5", "above the maximum of 100"),
    "a bias of no token": ("completions", {"logit_bias": {"5000": 1}}, None, "5000, expected 0 to 4,095"),
    "too many stops": ("completions", {"stop": ["a"] * 17}, "stop", "17 texts, expected at most 16"),
    "a stop of a number": ("completions", {"stop": [1]}, "stop[0]", "expected a string"),
    "no answers": ("completions", {"n": 0}, "n", "below the minimum of 1"),
    "too many answers": ("completions", {"n": 100, "prompt": ["a", "b"]}, "n", "are 200 answers, expected at most 128"),
    "best of more": ("completions", {"best_of": 3}, "best_of", "not ranked"),
    "a suffix": ("completions", {"suffix": "end"}, "suffix", "suffix is not supported"),
    "too many logprobs": ("completions", {"logprobs": 21}, "logprobs", "above the maximum of 20"),
    "no tokens": ("completions", {"max_tokens": 0}, "max_tokens", "without 'echo'"),
    "options of a stream": ("completions", {"stream_options": {}}, "stream_options", "only allowed when 'stream'"),
    "an unknown one of them": (
        "completions",
        {"stream": True, "stream_options": {"a": 1}},
        "stream_options.a",
        "Unknown parameter",
    ),
    "a pruning that there is not": ("completions", {"prune": 0.2}, None, "this bundle is not calibrated for it"),
    "no messages": ("chat/completions", {"messages": []}, "messages", "empty array"),
    "messages of texts": (
        "chat/completions",
        {"messages": ["hi"]},
        "messages[0]",
        "expected an object, but got a string",
    ),
    "no role": ("chat/completions", {"messages": [{"content": "a"}]}, "messages[0].role", "Missing required"),
    "a wrong role": ("chat/completions", {"messages": [{"role": "me", "content": "a"}]}, "messages[0].role", "'me'"),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "Missing required"),
    "a content of a number": (
        "chat/completions",
        {"messages": [{"role": "user", "content": 1}]},
        "messages[0].content",
        "an array",
    ),
    "a picture": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "a content part of type 'image_url' is not supported; this model reads text alone",
    ),
    "logprobs not asked for": ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "when 'logprobs' is enabled"),
    "sound": ("chat/completions", {"audio": {"voice": "a"}}, "audio", "audio is not supported; answers are text"),
    "modalities": ("chat/completions", {"modalities": ["audio"]}, "modalities", "answers are text"),
    "old functions": ("chat/completions", {"functions": [{"name": "f"}]}, "functions", "give them as 'tools'"),
    "another tool": (
        "chat/completions",
        {"tools": [{"type": "web_search"}]},
        "tools[0]",
        "a tool of type 'web_search'",
    ),
    "a tool without a name": (
        "chat/completions",
        {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name",
        "Missing",
    ),
    "a bad name": (
        "chat/completions",
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "1 to 64",
    ),
    "too many tools": ("chat/completions", {"tools": [TOOL] * 129}, "tools", "129 tools, expected at most 128"),
    "a deep schema": (
        "chat/completions",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
        "tools[0].function.parameters",
        "nested deeper than 32",
    ),
    "a choice without tools": (
        "chat/completions",
        {"tool_choice": "required"},
        "tool_choice",
        "when 'tools' are specified",
    ),
    "a choice of another tool": (
        "chat/completions",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "'g' not found in 'tools'",
    ),
    "another format": (
        "chat/completions",
        {"response_format": {"type": "xml"}},
        "response_format",
        "'xml' is not supported",
    ),
    "no schema": (
        "chat/completions",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "Missing",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_by_its_fields_name(served, what):
    path, fields, param, says = BAD[what]
    base = CHAT if path.startswith("chat") else TEXT
    got = post(served, f"/v1/{path}", {**base, **fields} if isinstance(fields, dict) else fields)
    error = got.json()["error"]
    assert (got.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert says in error["message"]
    assert "/" not in error["message"].replace("/v1/completions", ""), "no path of this machine is told"


def test_context_overflow(served):
    for path, body in (
        ("completions", {**TEXT, "prompt": "import os\n" * 200}),
        ("chat/completions", {**CHAT, "messages": TALK * 200}),
    ):
        error = post(served, f"/v1/{path}", body).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["message"].startswith(
            "This model's maximum context length is 256 tokens; the prompt has more than 256 tokens"
        )
    got = post(served, "/v1/completions", {**TEXT, "max_tokens": 10_000, "logit_bias": {"0": -100}}).json()
    assert (
        got["choices"][0]["finish_reason"] == "length" and got["usage"]["total_tokens"] == 257
    )  # the last has no place


def test_large_requests(served):
    got = post(served, "/v1/completions", {**TEXT, "prompt": "a" * 200_000})
    assert got.status_code == 413 and got.json()["error"]["code"] == "request_too_large"

    def parts():
        while True:
            yield b" " * 10_000

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    got = httpx.post(f"{served.address}/v1/completions", content=parts(), headers=headers)
    assert got.status_code == 413


def test_heads_of_requests(served):
    host, port = served.address.removeprefix("http://").split(":")
    for sent in (
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
        b"\x16\x03\x01\x02\x00" * 100,
        b"GET /" + b"a" * 100_000,
    ):
        with socket.create_connection((host, int(port)), 20) as one:
            try:
                one.sendall(sent)
                answer = one.recv(1000)
            except ConnectionError:
                continue
            assert answer.startswith(b"HTTP/1.1 400")
    assert served.get("/health").status_code == 200


def test_other_paths_and_methods(served):
    for path in ("/page/../app.py", "/v1", "/v1/models/../../etc/passwd", "/v1/assistants"):
        got = httpx.get(served.address + path)
        assert got.status_code == 404 and got.json()["error"]["message"].startswith("Invalid URL (GET /")
    assert httpx.get(f"{served.address}/v1/completions").status_code == 405
    got = post(served, "/v1/embeddings", {"model": "templated", "input": "a"})
    assert got.status_code == 501 and "not trained as embeddings" in got.json()["error"]["message"]


def test_a_page_of_another_origin_cannot_ask(open_door):
    """Neither with a form, which needs no permission, nor by a name that it points to this machine."""
    got = httpx.post(
        f"{open_door.address}/v1/completions", content=json.dumps(TEXT), headers={"Content-Type": "text/plain"}
    )
    assert got.status_code == 415
    assert httpx.options(f"{open_door.address}/v1/completions", headers={"Origin": "http://evil"}).status_code == 405
    got = open_door.get("/v1/models", headers={"Host": "evil.example:8080"})
    assert got.status_code == 403 and got.json()["error"]["code"] == "wrong_host"
    for host in ("localhost", "localhost:80", "[::1]:80", "127.0.0.1"):
        assert open_door.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_full_queue(open_door):
    """One answer at a time, and three wait: another one is told when to come again."""
    asked = {**TEXT, "n": 4, "max_tokens": 1000, "stream": True, "logit_bias": {"0": -100}}
    with open_door.client.stream("POST", "/v1/completions", json=asked) as running:
        lines = running.iter_lines()  # the connection is closed with it
        assert next(lines).startswith("data: ")
        got = open_door.post("/v1/completions", TEXT)
        assert got.status_code == 429 and int(got.headers["Retry-After"]) > 0
        assert got.json()["error"]["code"] == "rate_limit_exceeded"
    client = openai.OpenAI(base_url=f"{open_door.address}/v1", api_key="any")  # tries again after Retry-After
    assert client.completions.create(**TEXT, max_tokens=2).usage.completion_tokens == 2
    got = open_door.post("/v1/completions", {**TEXT, "n": 5, "max_tokens": 1})
    assert got.status_code == 429


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
    ],
)
def test_a_template_without_end_is_an_error(templated, tmp_path, template):
    path = shutil.copytree(templated, tmp_path / "bomb.emoe")
    edit_copy(path, "chat_template.jinja", template.encode())
    with serve(path, tmp_path / "log") as one:
        got = one.post("/v1/chat/completions", {"model": "bomb", "messages": TALK})
        assert got.status_code == 400
        assert got.json()["error"]["message"].startswith("the chat template cannot render these messages: ")
        assert one.post("/v1/completions", {"model": "bomb", "prompt": "import", "max_tokens": 3}).status_code == 200


def test_a_bundle_without_a_template_has_no_conversations(bundle_of, tmp_path):
    with serve(bundle_of("reference", width=8), tmp_path / "log") as one:
        body = {"model": one.name, "messages": TALK}
        got = one.post("/v1/chat/completions", body)
        assert got.status_code == 400 and "This model has no chat template" in got.json()["error"]["message"]
        assert one.post("/v1/completions", {"model": one.name, "prompt": "import", "max_tokens": 3}).status_code == 200
