"""How likely tokens were, and functions that change logits: in an answer, a stream, a batch and on the command line."""

import json
import math

import numpy as np
import pytest
from test_cli import edge_moe, object_of

from edge_moe import Runtime, TokenLogprobs
from edge_moe.runtime.sampling import Sampler, processed
from edge_moe.runtime.score import log_softmax

PROMPT = [5, 9, 2, 40, 7]


@pytest.fixture(scope="module")
def runtime(bundle_of):
    with Runtime(bundle_of("olmoe", width=8), context=64, sequences=2) as opened:
        yield opened


@pytest.mark.parametrize("count", [0, 1, 5, 20_000, 30_000])
def test_logprobs_are_those_of_a_softmax_in_double(count):
    logits = np.random.default_rng(1).standard_normal(20_000).astype(np.float32) * 3
    token, told = Sampler(temperature=0.7, top_k=5, seed=3).with_logprobs(logits, count)
    want = logits.astype(np.float64) - logits.max()
    want -= np.log(np.exp(want).sum())
    assert token == Sampler(temperature=0.7, top_k=5, seed=3)(logits) == told.token
    assert told.logprob == pytest.approx(want[token], abs=1e-5)
    order = np.argsort(-logits, kind="stable")[:count]
    assert [one for one, _ in told.top_logprobs] == order.tolist()
    np.testing.assert_allclose([value for _, value in told.top_logprobs], want[order], atol=1e-5)


def test_logprobs_count_bias_and_penalties_and_a_forbidden_token_has_none():
    logits = np.zeros(4, np.float32)
    sampler = Sampler(logit_bias={0: -math.inf, 1: math.log(2)}, presence_penalty=math.log(4))
    first, told = sampler.with_logprobs(logits, 4)
    assert (first, told.logprob) == (1, pytest.approx(math.log(2 / 4)))
    assert told.top_logprobs[-1] == (0, -math.inf)
    second, told = sampler.with_logprobs(logits, 1)  # the first one's probability is a quarter of what it was
    assert (second, told.logprob) == (2, pytest.approx(math.log(1 / 2.5)))


def test_each_token_of_an_answer_has_the_logprob_that_its_logits_give(runtime):
    answer = runtime.generate(PROMPT, 6, logprobs=True, top_logprobs=3)
    assert [told.token for told in answer.logprobs] == answer.tokens
    rows = log_softmax(runtime.logits(PROMPT + answer.tokens))[len(PROMPT) - 1 : -1]
    for told, row in zip(answer.logprobs, rows, strict=True):
        assert isinstance(told, TokenLogprobs)
        assert told.logprob == pytest.approx(row[told.token], abs=1e-4)
        assert [token for token, _ in told.top_logprobs] == np.argsort(-row, kind="stable")[:3].tolist()
    assert runtime.generate(PROMPT, 6).logprobs is None
    assert [told.top_logprobs for told in runtime.generate(PROMPT, 2, logprobs=True).logprobs] == [(), ()]
    pieces = list(runtime.stream(PROMPT, 6, top_logprobs=3))
    assert [piece.logprobs for piece in pieces] == [[told] for told in answer.logprobs]


def test_a_processor_sees_all_tokens_and_changes_what_is_drawn(runtime):
    plain, seen = runtime.generate(PROMPT, 5).tokens, []

    def forbid_first(tokens, logits):
        seen.append(list(tokens))
        logits[plain[0]] = -np.inf
        return logits

    banned = runtime.generate(PROMPT, 5, logits_processors=[forbid_first]).tokens
    assert banned == runtime.generate(PROMPT, 5, logit_bias={plain[0]: -math.inf}).tokens
    assert seen == [PROMPT + banned[:i] for i in range(5)]
    assert runtime.generate(PROMPT, 5).tokens == plain  # nothing of it is kept

    def one_more(tokens, logits):
        return np.roll(logits, 1).astype(np.float64)

    shifted = runtime.generate(PROMPT, 1, logits_processors=(one_more, one_more)).tokens
    assert shifted == [(plain[0] + 2) % 128]


def test_answers_that_are_computed_together_have_processors_and_logprobs_of_their_own(runtime):
    def only(token):
        return lambda tokens, logits: np.where(np.arange(len(logits)) == token, logits, -np.inf).astype(np.float32)

    asked = [{"prompt": PROMPT, "logits_processors": [only(3)], "logprobs": True}, {"prompt": PROMPT}]
    first, second = runtime.batch(asked, 4)
    assert first.tokens == [3] * 4
    assert [told.logprob for told in first.logprobs] == [0.0] * 4
    assert second.tokens == runtime.generate(PROMPT, 4).tokens and second.logprobs is None


def bad_shape(tokens, logits):
    return logits[1:]


def bad_type(tokens, logits):
    return np.arange(len(logits))


def not_a_number(tokens, logits):
    return logits * np.nan


def nothing_left(tokens, logits):
    return np.full_like(logits, -np.inf)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits_processors": [bad_shape]}, ValueError, "logits processor bad_shape returned float32"),
        ({"logits_processors": [bad_type]}, ValueError, "logits processor bad_type returned int64"),
        ({"logits_processors": [not_a_number]}, ValueError, "logits processor not_a_number returned NaN"),
        ({"logits_processors": [nothing_left]}, ValueError, r"nothing_left returned NaN, \+inf, or -inf for every"),
        ({"logits_processors": bad_shape}, TypeError, "expected a list of functions"),
        ({"logits_processors": [1]}, TypeError, "expected a list of functions"),
        ({"logprobs": 5}, TypeError, "logprobs is 5, expected True or False; top_logprobs sets the number"),
        ({"top_logprobs": -1}, ValueError, "top_logprobs is -1, expected 0 to 1000"),
        ({"top_logprobs": 2.5}, TypeError, "top_logprobs is 2.5, expected a whole number"),
    ],
)
def test_what_is_no_processor_and_no_count_is_refused_by_name(runtime, options, error, message):
    with pytest.raises(error, match=message):
        runtime.generate(PROMPT, 2, **options)
    assert len(runtime.generate(PROMPT, 2).tokens) == 2


def test_an_error_of_a_processor_is_its_answers_alone(runtime):
    def fails(tokens, logits):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        runtime.batch([{"prompt": PROMPT, "logits_processors": [fails]}, {"prompt": PROMPT}], 3)
    assert len(runtime.generate(PROMPT, 3).tokens) == 3


def test_processors_get_an_array_of_their_own():
    logits = np.zeros(4, np.float32)
    got = processed([lambda tokens, logits: logits + 1, lambda tokens, logits: logits * 2], [1], logits)
    assert got.tolist() == [2.0] * 4 and logits.tolist() == [0.0] * 4


def test_the_command_line_prints_logprobs_as_json(bundle_of):
    path = bundle_of("olmoe", width=8)
    answer = object_of("generate", path, "--tokens", "5,9,2", "-n", 3, "--logprobs", 2, "--json")
    assert [told["token"] for told in answer["logprobs"]] == answer["tokens"]
    assert all(len(told["top_logprobs"]) == 2 for told in answer["logprobs"])
    assert json.dumps(answer["logprobs"][0]["top_logprobs"][0]).startswith(f"[{answer['tokens'][0]}, -")
    refused = edge_moe("generate", path, "--tokens", "5", "--logprobs", 2)
    assert refused.returncode == 2 and "--logprobs needs --json" in refused.stderr
    forbidden = object_of("generate", path, "--tokens", "5", "-n", 1, "--logprobs", 128, "-l", "3-inf")
    assert forbidden["logprobs"][0]["top_logprobs"][-1] == [3, -9999.0]
