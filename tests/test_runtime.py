"""Runtime: what comes out of generate, stream and logits, what is refused, and calls that come at once."""

import json
from dataclasses import fields

import numpy as np
import pytest
from bundles import REFERENCE, edit_copy

from edge_moe import _core
from edge_moe.runtime.runtime import Generation, Runtime
from edge_moe.runtime.sampling import Sampler
from edge_moe.runtime.tokenizer import Tokenizer

PROMPT = "def read_lines(path):"


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", width=4)


@pytest.fixture
def runtime(path):
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        yield runtime


@pytest.fixture
def plain(bundle_of):
    """A bundle without a tokenizer; its end token is 1."""
    with Runtime(bundle_of("mixtral", width=8), "2GB", threads=1) as runtime:
        yield runtime


def refused(call, *arguments, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


# ---- generate and stream


def test_pieces_of_a_stream_add_up_to_the_answer(runtime):
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}):
        answer = runtime.generate(PROMPT, 60, **options)
        pieces = list(runtime.stream(PROMPT, 60, **options))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert [token for piece in pieces for token in piece.tokens] == answer.tokens
        assert [piece.generation_tokens for piece in pieces] == list(range(1, len(pieces) + 1))
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert answer.finish_reason == pieces[-1].finish_reason == "length"
        assert answer.text == runtime.tokenizer.decode(answer.tokens)


def test_greedy_tokens_are_the_largest_logits(runtime):
    ids = runtime.tokenizer.encode(PROMPT)
    tokens = runtime.generate(PROMPT, 12).tokens
    logits = runtime.logits(ids + tokens)
    assert tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()


def test_a_seed_repeats_an_answer_and_another_changes_it(runtime):
    answers = [runtime.generate(PROMPT, 30, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_penalties_and_cuts_change_an_answer_as_the_sampler_alone_would(runtime):
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "top_k": 5, "min_p": 0.05, "logit_bias": {10: 1.5}}
    ids = runtime.tokenizer.encode(PROMPT)
    answer = runtime.generate(PROMPT, 20, temperature=0.9, seed=3, **options)
    sampler = Sampler(0.9, seed=3, prompt=ids, **options)
    logits = runtime.logits(ids + answer.tokens)[len(ids) - 1 : -1]
    assert answer.tokens == [sampler(row) for row in logits]
    assert answer.tokens != runtime.generate(PROMPT, 20, temperature=0.9, seed=3).tokens


def test_without_a_limit_an_answer_fills_the_context(runtime):
    answer = runtime.generate([5, 6, 7], None, logit_bias={0: float("-inf")})  # never the end token
    assert (answer.prompt_tokens + answer.generation_tokens, answer.finish_reason) == (128 + 1, "length")


def test_the_account_has_the_fields_of_the_command_line(runtime):
    answer = runtime.generate(PROMPT, 10)
    assert [field.name for field in fields(Generation)] == [
        *("text", "tokens", "finish_reason", "prompt_tokens", "cached_tokens", "generation_tokens"),
        *("prompt_tps", "generation_tps", "time_to_first_token"),
        *("ram_bytes", "peak_memory_bytes", "expert_hits", "expert_misses", "bytes_read", "experts_used", "top_k"),
        *("dropped_routing_weight", "device", "logprobs"),
    ]
    assert (answer.prompt_tokens, answer.generation_tokens) == (len(runtime.tokenizer.encode(PROMPT)), 10)
    assert answer.prompt_tps > 0
    assert 0 < answer.time_to_first_token < 60
    assert answer.cached_tokens == 0
    assert runtime.generate(PROMPT, 10).cached_tokens == answer.prompt_tokens - 1  # the last one gives the logits
    assert answer.generation_tps > 0
    assert answer.ram_bytes == 2_000_000_000
    assert 0 < answer.peak_memory_bytes <= _core.peak_bytes()  # of this process, whatever it did before
    assert (answer.expert_hits > 0, answer.expert_misses, answer.bytes_read) == (True, 0, 0)
    assert (answer.experts_used, answer.top_k, answer.dropped_routing_weight, answer.device) == (4.0, 4, 0.0, "cpu")


def test_statistics_are_totals_since_loading(runtime):
    assert runtime.stats["tokens"] == 0
    runtime.generate([5, 6, 7], 4)
    stats = runtime.stats
    assert stats["tokens"] == 3 + 3  # the last token is not computed
    assert stats["moe_tokens"] == 6 * 4
    assert stats["experts_used"] == 6 * 4 * 4
    assert stats["expert_hits"] > 0
    assert stats.keys() == {
        *("expert_hits", "expert_misses", "bytes_read", "tokens", "experts_used", "moe_tokens", "dropped_weight"),
        *("records_held", "read_ahead", "read_ahead_used", "ram_bytes", "peak_memory_bytes", "uncounted_bytes"),
    }
    assert stats["uncounted_bytes"] == 0  # but on a GPU


# ---- where an answer ends


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(runtime):
    whole = runtime.generate(PROMPT, 60).text
    for begin in range(3, len(whole) - 6, 5):
        stop = whole[begin : begin + 4]  # across tokens more often than not
        want = whole[: whole.index(stop)]
        for stops in (stop, ["never there", stop, ""]):
            answer = runtime.generate(PROMPT, 60, stop=stops)
            assert (answer.text, answer.finish_reason) == (want, "stop")
        pieces = list(runtime.stream(PROMPT, 60, stop=stop))
        assert "".join(piece.text for piece in pieces) == want


def test_of_two_stop_strings_the_first_in_the_text_counts(runtime):
    whole = runtime.generate(PROMPT, 60).text
    early, late = whole[10:13], whole[30:33]
    cut = min(whole.index(early), whole.index(late))
    assert runtime.generate(PROMPT, 60, stop=[late, early]).text == whole[:cut]


def test_a_stop_string_that_only_begins_is_given_out_in_the_end(runtime):
    whole = runtime.generate(PROMPT, 20)
    answer = runtime.generate(PROMPT, 20, stop=whole.text[-2:] + "\0")
    assert (answer.text, answer.finish_reason) == (whole.text, "length")


def test_the_end_token_ends_the_answer(copy_of):
    path = copy_of("reference", width=4)
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        tokens = runtime.generate(PROMPT, 20).tokens
    end = next(token for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    edit_copy(path, "generation_config.json", json.dumps({"eos_token_id": [4095, end]}).encode())
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        answer = runtime.generate(PROMPT, 20)
        assert answer.tokens == tokens[: tokens.index(end) + 1]
        assert answer.finish_reason == "stop"
        assert answer.text == runtime.tokenizer.decode(answer.tokens[:-1])


def test_a_full_context_ends_the_answer(path):
    with Runtime(path, "2GB", 16, threads=1) as runtime:
        answer = runtime.generate(list(range(5, 15)), 100)
        assert (answer.generation_tokens, answer.finish_reason) == (7, "length")
        assert runtime.generate(list(range(5, 21)), 100).generation_tokens == 1


# ---- the KV cache between calls


def test_a_shared_beginning_is_not_computed_again(runtime):
    first = runtime.generate(list(range(5, 45)), 8)
    before = runtime.stats["tokens"]
    longer = runtime.generate([*range(5, 45), *first.tokens, 9], 2)
    assert longer.prompt_tokens == 49
    assert runtime.stats["tokens"] - before == (49 - 47) + 1  # the cache had the prompt and 7 of the 8 tokens
    before = runtime.stats["tokens"]
    runtime.generate(list(range(5, 45)), 1)
    assert runtime.stats["tokens"] - before == 1  # the last token is computed for its logits
    runtime.reset()
    before = runtime.stats["tokens"]
    runtime.generate(list(range(5, 45)), 1)
    assert runtime.stats["tokens"] - before == 40


def test_logits_do_not_depend_on_calls_before(runtime):
    ids = list(range(100, 130))
    fresh = runtime.logits(ids)
    runtime.generate(PROMPT, 5)
    np.testing.assert_array_equal(runtime.logits(ids), fresh)
    assert fresh.shape == (30, 4096)
    assert fresh.dtype == np.float32


@pytest.mark.parametrize("rows", [1, 7, 64, 10_000])
def test_rows_of_logits_a_step_change_nothing(path, runtime, rows):
    ids = list(range(100, 140))
    with Runtime(path, "2GB", 128, threads=2, logits_rows=rows) as other:
        np.testing.assert_array_equal(other.logits(ids), runtime.logits(ids))


# ---- closing


def test_a_closed_runtime_says_so(path):
    runtime = Runtime(path, "2GB", 64)
    stream = runtime.stream(PROMPT, 10)
    next(stream)
    runtime.close()
    runtime.close()
    calls = [lambda: runtime.generate("x"), lambda: runtime.logits([1]), runtime.reset, lambda: runtime.stats]
    assert refused(next, stream) == "this Runtime is closed"
    for call in calls:
        assert refused(call) == "this Runtime is closed"


# ---- kinds of prompt


def test_without_a_tokenizer_token_ids_go_in_and_come_out(plain):
    answer = plain.generate(np.array([3, 4, 5]), 6)
    assert answer.text == ""
    assert answer.tokens == plain.generate([3, 4, 5], 6).tokens
    assert len(answer.tokens) == 6 or answer.tokens[-1] == 1
    assert refused(plain.generate, "text") == f"{plain.bundle.path}: this bundle has no tokenizer; pass token ids"
    assert refused(plain.generate, [{"role": "user", "content": "x"}]) == (
        f"{plain.bundle.path}: this bundle has no tokenizer; pass token ids"
    )
    assert refused(plain.generate, [3], stop="x") == (
        f"{plain.bundle.path}: this bundle has no tokenizer; stop strings need one"
    )


def test_messages_go_through_the_chat_template(copy_of):
    path = copy_of("reference", width=4)
    config = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    edit_copy(path, "tokenizer_config.json", json.dumps({**config, "chat_template": template}).encode())
    messages = [{"role": "user", "content": "hello"}]
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        ids = Tokenizer(REFERENCE).encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>")
        assert runtime.generate(messages, 5).tokens == runtime.generate(ids, 5).tokens


def test_messages_without_a_chat_template_are_refused(runtime):
    message = "this model has no chat template; pass a prompt as text"
    assert refused(runtime.generate, [{"role": "user", "content": "hello"}]) == message


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; give at least one token"),
        ([], "the prompt is empty; give at least one token"),
        ([1] * 129, "the prompt has 129 tokens, the context 128; shorten it or raise context"),
        ([1, 4096], "token id 4096 is outside the vocabulary of 4,096 tokens"),
        ([-1], "token id -1 is outside the vocabulary of 4,096 tokens"),
        ([2**40], "token id 1099511627776 is outside the vocabulary of 4,096 tokens"),
        ("\udcff", "the text cannot be encoded: surrogates not allowed at character 0"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(runtime, prompt, message):
    assert refused(runtime.generate, prompt) == message
    assert runtime.generate([1], 1).generation_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is NoneType; give a text, a list of messages or a list of token ids"),
        (5, "the prompt is int; give a text, a list of messages or a list of token ids"),
        (b"abc", "the prompt is bytes; decode them to a text first"),
        (["a", "b"], "the prompt is a list of texts; generate for one text at a time"),
        ({"role": "user", "content": "x"}, "the prompt is one message; give a list of messages"),
        ([5, "x"], "the prompt has 'x' among its token ids; give a text, a list of messages or a list of token ids"),
    ],
)
def test_what_is_no_prompt_is_called_by_its_name(runtime, prompt, message):
    assert refused(runtime.generate, prompt, error=TypeError) == message


def test_ids_may_come_from_any_iterable_and_no_more_are_taken_than_the_context_holds(runtime):
    want = runtime.generate([5, 6, 7], 4).tokens
    for prompt in ((5, 6, 7), np.array([5, 6, 7]), range(5, 8), iter([5, 6, 7])):
        assert runtime.generate(prompt, 4).tokens == want
    assert refused(runtime.generate, range(5, 10**12)).startswith(
        "the prompt has 999,999,999,995 tokens, the context 128;"
    )


def test_a_text_too_long_for_the_context_is_not_encoded_to_its_end(runtime):
    assert refused(runtime.generate, "a word " * 10**6) == (
        "the prompt has more than 128 tokens, the context 128; shorten it or raise context"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "many"}, "max_tokens is 'many', expected a whole number"),
        ({"stop": [5]}, "stop is [5], expected a text or a list of texts"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
    ],
)
def test_options_of_another_type_are_refused(runtime, options, message):
    assert refused(runtime.generate, PROMPT, error=TypeError, **options) == message


def test_what_belongs_to_messages_is_refused_with_a_text(runtime):
    tools = [{"type": "function"}]
    assert refused(runtime.generate, PROMPT, tools=tools) == "tools needs messages, but the prompt is text"
    assert refused(runtime.generate, [5], tools=tools) == "tools needs messages, but the prompt is token ids"


def test_any_declared_end_and_a_special_token_as_stop_string_end_the_answer(copy_of):
    path = copy_of("reference", width=4)
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        tokens = runtime.generate(PROMPT, 20).tokens
        # A token that the answer has, made special, so that it has no text to search.
        end = next(token for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
        text = runtime.tokenizer.backend.id_to_token(end)
    config = json.loads((path / "tokenizer_config.json").read_text())
    edit_copy(path, "tokenizer_config.json", json.dumps({**config, "pad_token": text}).encode())
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        answer = runtime.generate(runtime.tokenizer.encode(PROMPT), 20, stop=text)
        assert (answer.tokens, answer.finish_reason) == (tokens[: tokens.index(end) + 1], "stop")
    edit_copy(path, "tokenizer_config.json", json.dumps({**config, "eos_token": text}).encode())
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        assert runtime.generate(runtime.tokenizer.encode(PROMPT), 20).tokens == answer.tokens


def test_numbers_that_are_no_token_ids_are_refused(runtime):
    for call in (runtime.generate, runtime.logits):
        assert "among its token ids; give a text" in refused(call, [1.5], error=TypeError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"temperature": -1}, "temperature is -1, expected 0 or more"),
        ({"top_p": 0}, "top_p is 0, expected above 0 and at most 1"),
        ({"seed": -3}, "seed is -3, expected 0 or more"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_runs(runtime, options, message):
    assert refused(runtime.stream, "x", **options) == message
    assert runtime.stats["tokens"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram": "8XB"}, "size '8XB' is not understood; write 8GB, 8GiB, 500MB or a number of bytes"),
        ({"ram": 0}, "size 0 must be above 0"),
        ({"ram": 8}, "size 8 means 8 bytes; did you mean 8GB?"),
        ({"ram": 0.5}, "size 0.5 means 0 bytes; did you mean 50%?"),
        ({"ram": -5}, "size -5 must be above 0"),
        ({"context": 0}, "context is 0, expected 1 to 1024, the model's own"),
        ({"context": 1025}, "context is 1025, expected 1 to 1024, the model's own"),
        ({"threads": 0}, "threads is 0, expected 1 to 1024"),
        ({"threads": 5000}, "threads is 5000, expected 1 to 1024"),
        ({"device": "vulkan"}, "device is 'vulkan', expected one of auto, cpu, cuda, mlx"),
        (
            {"device": "metal"},
            "device is 'metal', expected one of auto, cpu, cuda, mlx; on a Mac's GPU, mlx computes",
        ),
        ({"logits_rows": 0}, "logits_rows is 0, expected at least 1"),
        ({"kernels": "sse9"}, "no kernel set 'sse9' on this machine"),
    ],
)
def test_an_option_of_the_runtime_out_of_range_is_refused(path, options, message):
    assert refused(Runtime, path, **options) == message


def test_progress_tells_how_much_of_a_prompt_is_read(path):
    told, ids = [], list(range(600))
    with Runtime(path, "2GB") as runtime:
        assert runtime.plan.chunk == 512
        runtime.generate(ids, 1, progress=lambda *where: told.append(where))
        assert told == [("prompt", at, 600) for at in (0, 512, 600)]
        told.clear()
        runtime.generate([*ids, 7], 1, progress=lambda *where: told.append(where))
        assert told == [("prompt", 600, 601), ("prompt", 601, 601)]  # the rest is in the KV cache


def test_an_option_that_is_not_there_is_refused(path, runtime):
    assert "unexpected keyword argument 'rams'" in refused(Runtime, path, rams=1, error=TypeError)
    for call in (runtime.generate, runtime.stream, runtime.stream_async):
        assert refused(call, "x", topp=1, error=TypeError) == "there is no option 'topp'; did you mean 'top_p'?"
    batch = [{"prompt": "x", "beams": 1}]
    message = "there is no option 'beams'; help(Runtime.generate) names them"
    assert refused(runtime.batch, batch, error=TypeError) == message
    assert refused(runtime.batch, [{"max_tokens": 3}]) == "a request has no prompt"


@pytest.mark.parametrize("context", [None, 1, 1024])
def test_the_context_is_the_models_own_unless_given(path, context):
    with Runtime(path, "2GB", context) as runtime:
        assert runtime.plan.context == (context or 1024)
        assert runtime.generate([7], 1).generation_tokens == 1
