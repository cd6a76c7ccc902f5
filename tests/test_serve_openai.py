"""OpenAI's older APIs, with OpenAI's own client: answers are those of Runtime.generate()."""

import numpy as np
import pytest
from bundles import REFERENCE, mask_routers_of, prunable

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.sampling import sampling_defaults
from edge_moe.runtime.score import log_softmax

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

TALK = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "import os"}]
PROMPT = "def main(argv):\n    return"


@pytest.fixture(scope="module")
def served(templated, tmp_path_factory):
    with serve(templated, tmp_path_factory.mktemp("log") / "log", "--sequences", "3", "--score-rows", "8") as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def runtime(templated):
    with Runtime(templated, "8GB", threads=1) as one:
        yield one


def test_models(client, served):
    assert [model.id for model in client.models.list()] == ["templated"] == [served.name]
    assert client.models.retrieve("templated").owned_by == "edge-moe"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-5")
    assert refused.value.code == "model_not_found"


def test_a_chat_answers_as_the_runtime_does(client, runtime):
    want = runtime.generate(TALK, 12, logprobs=True, top_logprobs=3)
    got = client.chat.completions.create(
        model="templated", messages=TALK, max_tokens=12, logprobs=True, top_logprobs=3, temperature=0
    )
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", want.text, "length")
    told = choice.logprobs.content
    assert [one.logprob for one in told] == [one.logprob for one in want.logprobs]
    assert b"".join(bytes(one.bytes) for one in told).decode() == want.text
    assert [[top.logprob for top in one.top_logprobs] for one in told] == [
        [logprob for _, logprob in one.top_logprobs] for one in want.logprobs
    ]
    usage = got.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (want.prompt_tokens, 12)
    assert usage.total_tokens == want.prompt_tokens + 12
    account = usage.edge_moe
    assert account["experts_used"] == account["top_k"] == want.top_k and account["dropped_routing_weight"] == 0
    assert account["peak_memory_bytes"] <= account["ram_bytes"]


def test_a_stream_has_the_same_text_and_then_the_usage(client, runtime):
    want = runtime.generate(TALK, 12)
    options = {"max_completion_tokens": 12, "stream": True, "temperature": 0}
    chunks = list(
        client.chat.completions.create(
            model="templated", messages=TALK, stream_options={"include_usage": True}, **options
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == want.text
    assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] == "length"
    assert [one.usage for one in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert not any(one.usage for one in client.chat.completions.create(model="templated", messages=TALK, **options))


def test_a_stream_has_log_probabilities(client, runtime):
    want = runtime.generate(TALK, 12, logprobs=True, top_logprobs=1)
    options = {"max_tokens": 12, "logprobs": True, "top_logprobs": 1, "temperature": 0, "stream": True}
    told = [
        one
        for chunk in client.chat.completions.create(model="templated", messages=TALK, **options)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.logprob for one in told] == [one.logprob for one in want.logprobs]
    assert [one.top_logprobs[0].logprob for one in told] == [one.top_logprobs[0][1] for one in want.logprobs]


def test_several_answers_have_seeds_of_their_own(client, runtime, templated):
    sampling = {**sampling_defaults(templated), "temperature": 0.9}
    seeds = [runtime.generate(TALK, 10, **sampling, seed=5 + place).text for place in range(4)]
    asked = {"model": "templated", "messages": TALK, "max_tokens": 10, "temperature": 0.9, "seed": 5, "n": 4}
    got = client.chat.completions.create(**asked)
    assert [one.message.content for one in got.choices] == seeds and len(set(seeds)) > 1
    texts = [""] * 4
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == seeds
    assert got.usage.completion_tokens == 40 and got.usage.prompt_tokens == runtime.generate(TALK, 1).prompt_tokens


def test_completions_of_texts_and_token_ids(client, runtime):
    ids = runtime.tokenizer.encode(PROMPT)
    want = [runtime.generate(prompt, 9).text for prompt in (PROMPT, "import")]
    for prompts in ([PROMPT, "import"], [ids, runtime.tokenizer.encode("import")]):
        got = client.completions.create(model="templated", prompt=prompts, max_tokens=9, temperature=0)
        assert [one.text for one in got.choices] == want and [one.index for one in got.choices] == [0, 1]
    assert (
        client.completions.create(model="templated", prompt=ids, max_tokens=9, temperature=0).choices[0].text == want[0]
    )
    streamed = client.completions.create(
        model="templated",
        prompt=PROMPT,
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, usage = streamed
    assert "".join(one.choices[0].text for one in parts) == want[0] and usage.usage.completion_tokens == 9


def test_sampling_options_are_those_of_the_runtime(client, runtime):
    own = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
    same = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    want = runtime.generate(PROMPT, 16, **same, **own, logit_bias={5: 2.0}).text
    got = client.completions.create(
        model="templated", prompt=PROMPT, max_tokens=16, **same, logit_bias={"5": 2}, extra_body=own
    )
    assert got.choices[0].text == want
    whole = runtime.generate(PROMPT, 30).text
    stop = whole[8:12]
    got = client.completions.create(model="templated", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "qqq"])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_prompt_that_is_echoed_has_the_log_probabilities_of_its_tokens(client, runtime):
    ids = runtime.tokenizer.encode(PROMPT)
    want = log_softmax(runtime.logits(ids))
    client.completions.create(model="templated", prompt=ids, max_tokens=1)  # leaves the prompt in a KV cache
    for most in (0, 1):
        got = client.completions.create(
            model="templated", prompt=ids, max_tokens=most, logprobs=2, echo=True, temperature=0
        )
        told = got.choices[0].logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert len(told.tokens) == len(told.text_offset) == len(ids) + most
        assert np.allclose(told.token_logprobs[1 : len(ids)], want[np.arange(len(ids) - 1), ids[1:]], atol=1e-9)
        for place, likeliest in enumerate(told.top_logprobs[1 : len(ids)]):  # greedy where the harness says so
            assert max(likeliest.values()) == want[place].max()
            assert 2 <= len(likeliest) <= 3
        assert got.choices[0].text.startswith(PROMPT) and got.usage.completion_tokens == most
        assert "".join(told.tokens) == got.choices[0].text
        assert all(
            got.choices[0].text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True)
        )
    *parts, _ = client.completions.create(
        model="templated", prompt=ids, max_tokens=2, logprobs=0, echo=True, stream=True
    )
    assert "".join(one.choices[0].text for one in parts).startswith(PROMPT)
    assert [len(one.choices[0].logprobs.tokens) for one in parts] == [len(ids) + 1]


def test_tokens_of_texts_and_messages(served, runtime):
    told = served.post("/tokenize", {"model": "templated", "prompt": PROMPT}).json()
    assert told["tokens"] == runtime.tokenizer.encode(PROMPT) and told["count"] == len(told["tokens"])
    assert served.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"] == PROMPT
    assert served.post("/tokenize", {"messages": TALK}).json()["tokens"] == runtime._prompt_ids(TALK)


def test_the_chat_template_gets_its_arguments(client, served):
    plain = client.chat.completions.create(model="templated", messages=TALK, max_tokens=1).usage.prompt_tokens
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    told = client.chat.completions.create(model="templated", messages=TALK, max_tokens=1, extra_body=extra)
    assert told.usage.prompt_tokens > plain
    told = client.chat.completions.create(model="templated", messages=TALK, max_tokens=1, reasoning_effort="none")
    assert told.usage.prompt_tokens > plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]}]
    want = client.chat.completions.create(
        model="templated", messages=[{"role": "user", "content": "import os"}], max_tokens=9, temperature=0
    )
    got = client.chat.completions.create(model="templated", messages=parts, max_tokens=9, temperature=0)
    assert got.choices[0].message.content == want.choices[0].message.content


def test_health_and_metrics(served, client):
    assert served.get("/health").json() == {"status": "ok"}
    before = served.metric("generated_tokens_total")
    client.completions.create(model="templated", prompt="import", max_tokens=7)
    assert served.metric("generated_tokens_total") == before + 7
    assert 0 < served.metric("peak_memory_bytes") <= served.metric("ram_bytes")
    assert served.metric("sequences") == 3 and served.metric("answers_running") == served.metric("answers_waiting") == 0
    text = served.get("/metrics").text
    assert 'edge_moe_requests_total{path="/v1/completions",status="200"}' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and all(f"\n{name}" in text for name in names)


def test_pruning_and_its_account(tmp_path):
    source = Checkpoint(REFERENCE)
    path = prunable(tmp_path / "pruned.emoe", REFERENCE, mask_routers_of(source.config))
    with Runtime(path, "8GB", threads=1) as runtime:
        want = runtime.generate(PROMPT, 12, prune="share:0.3")
    with serve(path, tmp_path / "log") as one:
        asked = {"model": "pruned", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        got = one.post("/v1/completions", {**asked, "prune": "share:0.3"}).json()
        account = got["usage"]["edge_moe"]
        assert got["choices"][0]["text"] == want.text
        assert (
            account["experts_used"] == pytest.approx(want.experts_used, abs=1e-5)
            and account["experts_used"] < account["top_k"]
        )
        assert account["dropped_routing_weight"] == pytest.approx(want.dropped_routing_weight, abs=1e-5)
        whole = one.post("/v1/completions", {**asked, "prune": "off"}).json()["usage"]["edge_moe"]
        assert (whole["experts_used"], whole["dropped_routing_weight"]) == (whole["top_k"], 0)
        refused = one.post("/v1/completions", {**asked, "prune": 0.9})
        assert refused.status_code == 400 and "is calibrated for" in refused.json()["error"]["message"]


def test_a_bundle_without_a_tokenizer_takes_token_ids(bundle_of, tmp_path):
    path = bundle_of("olmoe", width=8)
    with Runtime(path, "8GB", threads=1) as runtime:
        want = runtime.generate([5, 6, 7], 6).tokens
        scores = log_softmax(runtime.logits([5, 6, 7]))
    with serve(path, tmp_path / "log") as one:
        asked = {"model": one.name, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "logprobs": 0}
        got = one.post("/v1/completions", {**asked, "echo": True}).json()["choices"][0]
        assert got["logprobs"]["tokens"] == [f"<{token}>" for token in (5, 6, 7, *want)] and got["text"] == ""
        assert got["logprobs"]["token_logprobs"][1:3] == pytest.approx([scores[0, 6], scores[1, 7]], abs=1e-9)
        for body in ({**asked, "prompt": "a text"}, {**asked, "stop": "a"}, {**asked, "guided_regex": "a"}):
            refused = one.post("/v1/completions", body)
            assert (
                refused.status_code == 400
                and "this bundle has no tokenizer" in refused.json()["error"]["message"].lower()
            )
