"""Several answers at once: the tokens of each are those that it has alone, and accounts add up."""

import asyncio
import threading

import numpy as np
import pytest
from test_cli import succeeds

from edge_moe.compressor.choosing.estimate import estimate
from edge_moe.runtime.plan import MOST_SEQUENCES, BelowFloor
from edge_moe.runtime.runtime import Runtime

PROMPTS = ["import os", "def main(", "class A:\n    def", "for i in range(", "x = [", "return", "# The"]


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", bits=16)


@pytest.fixture(scope="module")
def alone(path):
    with Runtime(path, "2GB", 256, "cpu", threads=1) as runtime:
        return [runtime.generate(prompt, 20 + number) for number, prompt in enumerate(PROMPTS)]


def asked() -> list[dict]:
    return [{"prompt": prompt, "max_tokens": 20 + number} for number, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("sequences", [1, 2, 4, 8])
def test_answers_are_those_that_each_has_alone(path, alone, sequences):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=sequences) as runtime:
        before, got = runtime.stats, runtime.batch(asked())
        for one, want in zip(got, alone, strict=True):
            assert (one.text, one.tokens, one.finish_reason) == (want.text, want.tokens, want.finish_reason)
            assert one.prompt_tokens == want.prompt_tokens and one.generation_tokens == len(want.tokens)
        for key in ("expert_hits", "expert_misses", "bytes_read"):
            assert sum(getattr(one, key) for one in got) == runtime.stats[key] - before[key]
        # every token but an answer's last went through the model once
        steps = sum(one.prompt_tokens - one.cached_tokens + one.generation_tokens - 1 for one in got)
        assert runtime.stats["tokens"] - before["tokens"] == steps


def test_a_paged_bundle_reads_less_for_answers_at_once_and_gives_the_same(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=7) as runtime:
        with pytest.raises(BelowFloor) as refused:
            runtime.set_ram(1_000_000)
        runtime.set_ram(refused.value.plan.floor_bytes + 5_000_000)
        runtime._engine.set_prefetch(False)
        one_by_one = [runtime.generate(**request) for request in asked()]
        runtime.reset()
        got = runtime.batch(asked())
        assert [one.tokens for one in got] == [one.tokens for one in one_by_one] == [one.tokens for one in alone]
        assert 0 < sum(one.bytes_read for one in got) < 0.8 * sum(one.bytes_read for one in one_by_one)


def test_each_answer_has_its_own_sampling_stops_and_pruning(path):
    own = [
        {"prompt": "import os", "temperature": 0.8, "seed": 3},
        {"prompt": "import os", "temperature": 0.8, "seed": 4, "top_k": 5},
        {"prompt": "def main(", "stop": "\n"},
        {"prompt": [5, 6, 7], "max_tokens": 4, "logit_bias": {9: 100.0}},
    ]
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=3) as runtime:
        want = [runtime.generate(**{"max_tokens": 16, **request}) for request in own]
        got = runtime.batch(own, 16)
        assert [one.tokens for one in got] == [one.tokens for one in want]
        assert [one.finish_reason for one in got] == [one.finish_reason for one in want]
        assert got[3].tokens == [9] * 4 and "\n" not in got[2].text


def test_a_long_prompt_beside_short_ones_is_read_in_pieces(path, alone):
    long = np.random.default_rng(0).integers(5, 4000, 200).tolist()
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=3) as runtime:
        want = runtime.generate(long, 10).tokens
        runtime.reset()
        got = runtime.batch([PROMPTS[0], long, PROMPTS[1]], 10)
        assert [got[0].tokens, got[1].tokens, got[2].tokens] == [alone[0].tokens[:10], want, alone[1].tokens[:10]]


def test_an_answer_that_is_given_up_leaves_the_others_alone(path, alone):
    stop = threading.Event()
    stop.set()
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        requests = asked()
        requests[1]["stop_event"] = stop
        got = runtime.batch(requests)
        assert got[1].finish_reason == "cancelled" and len(got[1].tokens) < 21
        assert [one.tokens for one in got[2:]] == [one.tokens for one in alone[2:]]
        assert all(sequence.call is None for sequence in runtime._session.sequences.all)


def test_conversations_keep_a_cache_of_their_own(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        streams = [runtime.stream(PROMPTS[number], 20 + number) for number in range(2)]
        before, got = runtime.stats["tokens"], [[], []]
        for _ in range(10):
            for stream, tokens in zip(streams, got, strict=True):
                tokens += next(stream).tokens
        for stream, tokens in zip(streams, got, strict=True):
            tokens += [token for piece in stream for token in piece.tokens]
        assert got == [one.tokens for one in alone[:2]]
        steps = sum(one.prompt_tokens + len(one.tokens) - 1 for one in alone[:2])
        assert runtime.stats["tokens"] - before == steps  # nothing was computed twice
        again = runtime.generate(PROMPTS[1], 21)
        assert again.tokens == alone[1].tokens and again.cached_tokens == again.prompt_tokens - 1


class Steps:
    """Counts a Runtime's steps, and the most answers that one had."""

    def __init__(self, runtime: Runtime, monkeypatch):
        self.count, self.most, compute = 0, 0, runtime._session.step_of

        def step_of(parts, unwanted=lambda: False):
            self.count, self.most = self.count + 1, max(self.most, len(parts))
            return compute(parts, unwanted)

        monkeypatch.setattr(runtime._session, "step_of", step_of)


def read_in_threads(runtime: Runtime, numbers) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}

    def run(number: int) -> None:
        got[number] = [t for piece in runtime.stream(PROMPTS[number], 20 + number) for t in piece.tokens]

    threads = [threading.Thread(target=run, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_streams_of_several_threads_share_steps(path, alone, monkeypatch):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=4) as runtime:
        steps = Steps(runtime, monkeypatch)
        got = read_in_threads(runtime, range(4))
        assert [got[number] for number in range(4)] == [one.tokens for one in alone[:4]]
        assert steps.most == 4 and steps.count <= 0.6 * sum(map(len, got.values()))


def test_streams_of_asyncio_share_steps_and_a_cancelled_task_ends_its_answer(path, alone, monkeypatch):
    async def read(runtime, number, most=1000):
        tokens = []
        async with runtime.stream_async(PROMPTS[number], 20 + number) as stream:
            async for piece in stream:
                tokens += piece.tokens
                if len(tokens) >= most:
                    break
        return tokens

    async def run(runtime):
        tasks = [asyncio.create_task(read(runtime, number)) for number in range(3)]
        tasks.append(asyncio.create_task(read(runtime, 3, 5)))
        forever = asyncio.create_task(read(runtime, 4))
        short = await tasks[3]
        forever.cancel()
        got = await asyncio.gather(*tasks[:3])
        with pytest.raises(asyncio.CancelledError):
            await forever
        return got, short

    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=5) as runtime:
        steps = Steps(runtime, monkeypatch)
        got, short = asyncio.run(run(runtime))
        assert got == [one.tokens for one in alone[:3]] and short == alone[3].tokens[: len(short)]
        assert steps.most > 1
        assert not runtime._session._joined and all(one.call is None for one in runtime._session.sequences.all)


def test_a_stream_that_nobody_reads_gives_its_sequence_to_those_who_wait(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        idle = runtime.stream(PROMPTS[0], 20)
        first = list(next(idle).tokens)
        assert read_in_threads(runtime, range(1, 5)) == {number: alone[number].tokens for number in range(1, 5)}
        assert first + [token for piece in idle for token in piece.tokens] == alone[0].tokens


def test_a_stream_that_is_closed_frees_its_sequence_at_once(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        streams = [runtime.stream(prompt, 50) for prompt in PROMPTS[:2]]
        for stream in streams:
            next(stream)
        assert all(one.call is not None for one in runtime._session.sequences.all)
        streams[0].close()
        assert [one.call is None for one in runtime._session.sequences.all].count(True) == 1
        assert runtime.generate(PROMPTS[2], 22).tokens == alone[2].tokens
        rest = list(streams[1])
        assert rest[-1].finish_reason in ("stop", "length")


def test_a_read_that_fails_once_is_nobodys_error_and_one_that_fails_for_good_is_everybodys(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=3) as runtime:
        with pytest.raises(BelowFloor) as refused:
            runtime.set_ram(1_000_000)
        runtime.set_ram(refused.value.plan.floor_bytes + 4_000_000)
        runtime._engine.inject("error", times=1)
        got = runtime.batch(asked()[:3])
        assert [one.tokens for one in got] == [one.tokens for one in alone[:3]]
        runtime._engine.clear_faults()
        runtime._engine.inject("error")
        with pytest.raises(OSError):
            runtime.batch(asked()[3:6])
        runtime._engine.clear_faults()
        assert [one.tokens for one in runtime.batch(asked())] == [one.tokens for one in alone]


def test_an_error_of_one_answer_is_its_own(path, alone):
    def stop_at(most):
        def progress(name, done, of):
            if done >= most:
                raise LookupError("progress")

        return progress

    bad = [{"logit_bias": dict.fromkeys(range(4096), float("-inf"))}, {"progress": stop_at(1)}]
    for own, error in zip(bad, ((ValueError, "leaves no token possible"), (LookupError, "progress")), strict=True):
        with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=4) as runtime:
            streams = [runtime.stream(prompt, 20 + number) for number, prompt in enumerate(PROMPTS[:3])]
            streams.insert(1, runtime.stream("import sys", 20, **own))
            got = [[] for _ in streams]
            for stream, tokens in zip(streams, got, strict=True):
                if stream is streams[1]:
                    with pytest.raises(error[0], match=error[1]):
                        next(stream)
                else:
                    tokens += next(stream).tokens
            for stream, tokens in zip(streams, got, strict=True):
                tokens += [token for piece in stream for token in piece.tokens]
            assert [got[0], *got[2:]] == [one.tokens for one in alone[:3]] and not got[1]
            assert not runtime._session._joined


def test_the_cap_changes_under_answers_that_are_computed_together(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=4) as runtime:
        with pytest.raises(BelowFloor) as refused:
            runtime.set_ram(1_000_000)
        floor, done, got = refused.value.plan.floor_bytes, threading.Event(), {}

        def run():
            got.update(read_in_threads(runtime, range(4)))
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        for turn in range(1000):
            runtime.set_ram(floor + (turn % 7) * 3_000_000)
            if done.is_set():
                break
        thread.join()
        assert got == {number: alone[number].tokens for number in range(4)}


def test_what_two_prompts_begin_with_is_computed_once(path):
    random = np.random.default_rng(4)
    system, ends = random.integers(5, 4000, 100).tolist(), random.integers(5, 4000, (3, 7)).tolist()
    with Runtime(path, "2GB", 256, "cpu", threads=1) as runtime:
        want = [runtime.generate(system + end, 8).tokens for end in ends]
    for kv in ("float16", "float32"):
        with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=3, kv=kv) as runtime:
            first = runtime.stream(system + ends[0], 8)
            tokens = list(next(first).tokens)
            before = runtime.stats["tokens"]
            second = runtime.generate(system + ends[1], 8)
            assert second.cached_tokens == len(system)
            third = runtime.generate(system + ends[2], 8, prune="off")
            tokens += [token for piece in first for token in piece.tokens]
            assert [tokens, second.tokens, third.tokens] == want
            assert runtime.stats["tokens"] - before < 2 * (7 + 8) + 8 + 8


def test_more_streams_than_sequences_take_turns_and_lose_nothing(path, alone):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        got = read_in_threads(runtime, range(5))
        assert [got[number] for number in range(5)] == [one.tokens for one in alone[:5]]


def test_the_plan_counts_a_cache_for_each_sequence(path):
    with Runtime(path, "2GB", 256, "cpu", threads=1) as runtime:
        one = runtime.plan
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=4) as runtime:
        plan = runtime.plan
        assert plan.kv_cache_bytes == 4 * one.kv_cache_bytes and plan.sequences == 4
        assert "256 tokens of context, 4 times" in str(plan)
        answers = runtime.batch(asked())
        assert max(one.peak_memory_bytes for one in answers) <= plan.ram_bytes


@pytest.mark.parametrize(
    "requests, message",
    [
        ([{"prompt": "a", "temperature": -1}], "temperature is -1, expected 0 or more"),
        (["a", ""], "the prompt is empty"),
        ([{"prompt": "a", "max_tokens": 0}], "max_tokens is 0, expected at least 1"),
    ],
)
def test_what_one_request_gets_wrong_is_said_before_anything_is_computed(path, requests, message):
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=2) as runtime:
        before = runtime.stats["tokens"]
        with pytest.raises(ValueError, match=message):
            runtime.batch(requests)
        assert runtime.stats["tokens"] == before
        assert runtime.batch([]) == []


@pytest.mark.parametrize("sequences", [0, -1, MOST_SEQUENCES + 1])
def test_a_number_of_sequences_that_is_none_is_refused(path, sequences):
    with pytest.raises(ValueError, match=f"sequences is {sequences}, expected 1 to {MOST_SEQUENCES}"):
        Runtime(path, sequences=sequences)
    with pytest.raises(ValueError, match=f"sequences is {sequences}, expected 1 to {MOST_SEQUENCES}"):
        estimate(path, sequences=sequences)


def test_a_plan_is_that_of_a_runtime_with_as_many_sequences(path):
    options = {"context": 256, "threads": 1}
    one, three = (estimate(path, "2GB", **options, sequences=count).plan for count in (1, 3))
    with Runtime(path, "2GB", 256, "cpu", threads=1, sequences=3) as runtime:
        assert three.kv_cache_bytes == 3 * one.kv_cache_bytes == runtime.plan.kv_cache_bytes
        assert (three.scratch_bytes, three.sequences) == (runtime.plan.scratch_bytes, 3)
    said = succeeds("plan", path, "--ram", "2GB", "--context", 256, "--sequences", 3).stdout
    assert "256 tokens of context, 3 times" in said
