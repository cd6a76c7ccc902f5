"""A program that computes all answers with one thread: Session.advance(), how a step is shared, a prompt's scores."""

import numpy as np
import pytest

from edge_moe.runtime.answer import whole_of
from edge_moe.runtime.prompt_scores import PromptScores
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import log_softmax
from edge_moe.runtime.session import LEAST_SHARE, STEP_S

PROMPTS = ["import os", "def main(", "class A:\n    def", "for i in range("]
LONG = np.random.default_rng(0).integers(5, 4000, 700).tolist()


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", width=8)


def finished(runtime, requests) -> list:
    pieces = {request: [] for request in requests}
    while any(not its or its[-1].finish_reason is None for its in pieces.values()):
        for request, piece in runtime._session.advance(lambda: True):
            pieces[request].append(piece)
    return [whole_of(its) for its in pieces.values()]


@pytest.mark.parametrize("sequences", [1, 3])
def test_answers_are_those_that_each_has_alone(path, sequences):
    with Runtime(path, "8GB", 256, "cpu", threads=1, sequences=sequences) as runtime:
        want = [runtime.generate(prompt, 9 + place) for place, prompt in enumerate(PROMPTS)]
        requests = [runtime._request(prompt, 9 + place, {}) for place, prompt in enumerate(PROMPTS)]
        for request in requests:
            runtime._session.join(request)
        got = finished(runtime, requests)
        assert [one.tokens for one in got] == [one.tokens for one in want]
        assert runtime._session.advance(lambda: True) == []
        assert runtime.generate(PROMPTS[0], 9).tokens == want[0].tokens  # other calls get their turns


def test_a_cancelled_answer_leaves_its_sequence_with_the_next_step(path):
    with Runtime(path, "8GB", 256, "cpu", threads=1, sequences=1) as runtime:
        first, second = (runtime._request(prompt, 9, {}) for prompt in PROMPTS[:2])
        for request in (first, second):
            runtime._session.join(request)
        runtime._session.advance(lambda: True)
        first.wanted.cancel()
        ((request, piece),) = runtime._session.advance(lambda: True)
        assert (request, piece.finish_reason) == (first, "cancelled")
        ((request, piece),) = runtime._session.advance(lambda: True)
        assert request is second and len(piece.tokens) == 1


def test_a_long_prompt_delays_running_answers_by_a_bounded_time(path):
    """A step has as many of its tokens as are computed in STEP_S at the speed of the steps before."""
    with Runtime(path, "8GB", 1024, "cpu", threads=1, sequences=2) as runtime:
        session = runtime._session
        short, long = runtime._request(PROMPTS[0], 50, {}), runtime._request(LONG, 5, {})
        session.join(short)
        session.advance(lambda: True)
        session.join(long)
        steps = []
        for token_s in (STEP_S, STEP_S / 40, STEP_S / 10_000):
            session._token_s = token_s
            assert len(session.advance(lambda: True)) == 1  # a token of the short one in each
            steps.append(len(session.sequences.of(long.wanted).tokens) - sum(steps))
        assert steps == [LEAST_SHARE, 40, min(runtime.plan.chunk - 1, 700 - LEAST_SHARE - 40)]
        with Runtime(path, "8GB", 1024, "cpu", threads=1) as alone:
            want = [alone.generate(PROMPTS[0], 50).tokens, alone.generate(LONG, 5).tokens]
        for request in (short, long):
            while not request.tokens or request in session._joined:
                session.advance(lambda: True)
        assert [short.tokens, long.tokens] == want


def test_prompts_share_a_step_equally(path):
    with Runtime(path, "8GB", 1024, "cpu", threads=1, sequences=3) as runtime:
        requests = [runtime._request(ids, 2, {}) for ids in (LONG, LONG[300:], LONG[10:30])]
        for request in requests:
            runtime._session.join(request)
        runtime._session.advance(lambda: True)
        done = [len(runtime._session.sequences.of(request.wanted).tokens) for request in requests]
        room = runtime.plan.chunk
        assert done == [room - 20 - (room - 20) // 2, (room - 20) // 2, 20] or done == [
            (room - 20) // 2,
            room - 20 - (room - 20) // 2,
            20,
        ]


@pytest.mark.parametrize("rows", [1, 7])
def test_scores_of_a_prompt_beside_other_answers(path, rows):
    ids = LONG[:90]
    with Runtime(path, "8GB", 256, "cpu", threads=1, sequences=2, logits_rows=rows) as runtime:
        want = log_softmax(runtime.logits(ids))
        tokens = [runtime.generate(prompt, 5).tokens for prompt in (ids, PROMPTS[0])]
        requests = [runtime._request(prompt, 5, {}) for prompt in (ids, PROMPTS[0], ids)]
        requests[0].scores, requests[2].scores, requests[2].max_tokens = PromptScores(3), PromptScores(), 0
        for request in requests:
            runtime._session.join(request)
        got = finished(runtime, requests)
        assert [one.tokens for one in got] == [*tokens, []]
    for request in (requests[0], requests[2]):
        first, *found = request.scores.found
        assert first is None and [one.token for one in found] == ids[1:]
        assert [one.logprob for one in found] == want[np.arange(89), ids[1:]].tolist()
    for place, one in enumerate(requests[0].scores.found[1:]):
        assert [token for token, _ in one.top_logprobs] == np.argsort(-want[place], kind="stable")[:3].tolist()


def test_memory_that_the_program_takes_is_left_to_it(path):
    with Runtime(path, "8GB", 64, threads=1) as plain:
        plan = plain.plan
    with Runtime(path, "8GB", 64, threads=1, reserve_bytes=50_000_000) as runtime:
        assert runtime.plan.spare_bytes == plan.spare_bytes + 50_000_000
        assert 49e6 < runtime.plan.floor_bytes - plan.floor_bytes < 60e6
