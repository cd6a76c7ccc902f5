"""Several calls of one Runtime: each gets its own answer, none waits for ever, and any can be ended, by any thread."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from bundles import mask_routers_of, paged_runtime, prunable

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.runtime import Runtime

PROMPT = "def read_lines(path):"
PROMPTS = [PROMPT, "import os\n", "class Node:\n", "for i in range("]
LONG = list(range(5, 60))  # a prompt of several steps, where little is in memory
HANG_S = 60


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", width=4)


@pytest.fixture
def runtime(path):
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def want(path) -> list[list[int]]:
    """Of each prompt, what it is answered when nobody else asks."""
    with Runtime(path, "2GB", 128, threads=1) as runtime:
        return [runtime.generate(prompt, 20).tokens for prompt in PROMPTS]


@pytest.fixture(scope="module")
def begun(path) -> dict[str, list[int]]:
    """Of two prompts, the first tokens of an answer."""
    with Runtime(path, "2GB", 64, threads=1) as runtime:
        return {str(prompt): runtime.generate(prompt, 4).tokens for prompt in (PROMPT, LONG)}


@pytest.fixture
def slow(path):
    """A Runtime with most experts on storage, which gives 10 kB a second: a step does not end by itself."""
    with paged_runtime(path) as runtime:
        runtime._engine.inject("slow", value=10_000)
        yield runtime
        runtime._engine.clear_faults()


def tokens_of(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


# ---- whose turn it is


def test_threads_that_call_at_once_get_their_own_answers(runtime, want):
    found = [[] for _ in PROMPTS]

    def ask(index: int) -> None:
        found[index] += [runtime.generate(PROMPTS[index], 20).tokens for _ in range(4)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [[tokens] * 4 for tokens in want]


def test_streams_that_a_pool_of_fewer_threads_advances_all_end_with_their_own_answers(runtime, want):
    """As a web server does: whoever is free asks for a stream's next piece, and a thread that waits is not free."""
    streams = [runtime.stream(prompt, 20) for prompt in PROMPTS]
    pieces = [[] for _ in PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        asked = {pool.submit(next, stream, None): index for index, stream in enumerate(streams)}
        while asked:
            done, _ = wait(asked, HANG_S, "FIRST_COMPLETED")
            assert done, "the streams wait for one another"
            for future in done:
                index, piece = asked.pop(future), future.result()
                if piece is not None:
                    pieces[index].append(piece)
                    asked[pool.submit(next, streams[index], None)] = index
    assert [tokens_of(parts) for parts in pieces] == want
    assert [[piece.generation_tokens for piece in parts] for parts in pieces] == [[*range(1, 21)]] * 4


def test_streams_and_calls_of_one_thread_may_be_mixed(runtime, want):
    streams = [runtime.stream(prompt, 20) for prompt in PROMPTS[:2]]
    pieces = [[], []]
    for first, second in zip(*streams, strict=True):
        pieces[0].append(first)
        pieces[1].append(second)
        if len(pieces[0]) == 3:
            assert runtime.generate(PROMPTS[2], 20).tokens == want[2]
            runtime.reset()
    assert [tokens_of(parts) for parts in pieces] == want[:2]


@pytest.mark.parametrize("rule", ["odp", "loss"])
def test_a_pruned_stream_that_lost_the_kv_cache_goes_on_as_if_it_had_not(golden, tmp_path, rule):
    source, ids, _ = golden["mixtral"]
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(Checkpoint(source).config))
    with Runtime(path, "2GB", 64, threads=1, prune=rule) as runtime:
        ids = [int(token) for token in ids]
        alone = runtime.generate(ids, 12).tokens
        stream = runtime.stream(ids, 12)
        pieces = [next(stream) for _ in range(5)]
        runtime.generate(ids[3:], 3, prune="off")
        assert tokens_of([*pieces, *stream]) == alone


def test_a_stream_begun_in_one_thread_goes_on_in_another(runtime, want):
    stream = runtime.stream(PROMPT, 20)
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(next, stream).result(HANG_S)
    assert tokens_of([first, second, *stream]) == want[0]


def test_two_threads_that_ask_one_stream_at_once_get_each_piece_once(runtime, want):
    stream, pieces = runtime.stream(PROMPT, 20), []
    threads = [threading.Thread(target=lambda: pieces.extend(stream)) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join(HANG_S) for thread in threads]
    assert tokens_of(sorted(pieces, key=lambda piece: piece.generation_tokens)) == want[0]


def test_an_abandoned_stream_holds_up_nobody_and_can_still_be_taken_up(runtime, want):
    abandoned = runtime.stream(PROMPT, 20)
    first = next(abandoned)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(runtime.generate, PROMPTS[1], 20).result(HANG_S).tokens == want[1]
    assert tokens_of([first, *abandoned]) == want[0]


def test_blocks_of_logits_are_the_same_when_others_come_between(runtime):
    ids = list(range(100, 110))
    whole, blocks = runtime.logits(ids), []
    for block in runtime.logits_blocks(ids):
        runtime.generate(PROMPT, 1)
        blocks.append(block)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_an_account_has_its_own_calls_alone(runtime):
    runtime.generate(PROMPT, 6)  # from now on the prompt is in the KV cache
    alone = list(runtime.stream(PROMPT, 6))[-1]
    stream = runtime.stream(PROMPT, 6)
    next(stream)
    last = list(stream)[-1]
    assert last.expert_hits == alone.expert_hits
    stream = runtime.stream(PROMPT, 6)
    next(stream)
    runtime.generate(PROMPTS[2], 100)
    computed_again = len(runtime.tokenizer.encode(PROMPT)) + 1
    assert list(stream)[-1].expert_hits <= alone.expert_hits + computed_again * 16


def test_statistics_are_read_while_another_thread_computes(runtime):
    stop, seen = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            seen.append(runtime.stats)

    thread = threading.Thread(target=look)
    thread.start()
    runtime.generate(PROMPT, 60)
    stop.set()
    thread.join()
    for name in ("tokens", "expert_hits", "experts_used", "moe_tokens", "dropped_weight"):
        values = [stats[name] for stats in seen]
        assert values == sorted(values)


# ---- ending a call


def test_a_cancelled_stream_gives_one_more_piece_and_ends(runtime, want):
    stream = runtime.stream(PROMPT, 20)
    pieces = [next(stream) for _ in range(4)]
    stream.cancel()
    last = next(stream)
    assert (last.finish_reason, last.tokens, last.generation_tokens) == ("cancelled", [], 4)
    assert tokens_of(pieces) == want[0][:4]
    assert "".join(piece.text for piece in [*pieces, last]) == runtime.tokenizer.decode(want[0][:4])
    assert list(stream) == []
    assert runtime.generate(PROMPT, 20).tokens == want[0]


def test_a_stream_cancelled_before_it_began_computes_nothing(runtime):
    stream, before = runtime.stream(PROMPT, 20), runtime.stats["tokens"]
    stream.cancel()
    pieces = list(stream)
    assert [(piece.finish_reason, piece.text, piece.generation_tokens) for piece in pieces] == [("cancelled", "", 0)]
    assert runtime.stats["tokens"] == before


def test_a_stream_as_a_context_manager_is_closed_at_its_end(runtime, want):
    with runtime.stream(PROMPT, 20) as stream:
        next(stream)
    assert list(stream) == []
    for _ in runtime.stream(PROMPT, 50):
        break
    assert runtime.generate(PROMPT, 20).tokens == want[0]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_a_step_that_does_not_end_is_cancelled_from_another_thread(begun, slow, prompt):
    stream = slow.stream(prompt, 20)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(list, stream)
        while not slow.stats["expert_misses"]:  # it is in the middle of a step
            assert not asked.done()
            os.sched_yield()
        stream.cancel()
        pieces = asked.result(HANG_S)
    assert [(piece.finish_reason, piece.tokens) for piece in pieces] == [("cancelled", [])]
    assert slow.stats["tokens"] == 0
    slow._engine.clear_faults()
    assert slow.generate(prompt, 4).tokens == begun[str(prompt)]


def test_a_timeout_and_an_event_end_an_answer_that_waits_for_storage(slow):
    assert slow.generate(PROMPT, 20, timeout=0.2).finish_reason == "cancelled"
    event = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(slow.generate, PROMPT, 20, stop_event=event)
        event.set()
        answer = asked.result(HANG_S)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", [], "cancelled")


def test_a_call_that_waits_for_its_turn_can_be_ended(slow):
    first = slow.stream(PROMPT, 20)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(next, first)
        while not slow.stats["expert_misses"]:
            os.sched_yield()
        assert slow.generate(PROMPTS[1], 5, timeout=0.2).finish_reason == "cancelled"
        first.cancel()
        asked.result(HANG_S)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_cannot_be_is_refused(runtime, timeout):
    with pytest.raises(ValueError, match=f"^timeout is {timeout}, expected above 0 seconds$"):
        runtime.stream(PROMPT, timeout=timeout)


def test_closing_ends_a_step_of_another_thread(path):
    runtime = paged_runtime(path)
    runtime._engine.inject("slow", value=100_000)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(runtime.generate, PROMPT, 20)
        while not runtime.stats["expert_misses"]:
            os.sched_yield()
        runtime.close()
        assert str(asked.exception(HANG_S)) == "this Runtime is closed"


def test_an_interrupt_from_the_keyboard_ends_a_step(slow):
    def press() -> None:
        while not slow.stats["expert_misses"]:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        slow.generate(PROMPT, 20)
    thread.join()
    slow._engine.clear_faults()
    assert slow.generate(PROMPT, 2).generation_tokens == 2


def test_a_step_that_computes_alone_is_interrupted_too(path, want):
    """No read to wait for: 64 tokens at a time of a resident model, again and again until the signal comes."""
    with Runtime(path, "2GB", 1024, threads=2, logits_rows=64) as runtime:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                runtime.logits(range(1, 1000))
        timer.join()
        assert runtime.generate(PROMPT, 20).tokens == want[0]


# ---- other processes, copies, the end of Python


def test_a_runtime_or_a_stream_is_not_copied_and_not_pickled(runtime):
    stream = runtime.stream(PROMPT, 2)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match="^a Runtime cannot be copied or pickled; make another one from its bundle$"
        ):
            call(runtime)
        with pytest.raises(TypeError, match="^a stream cannot be copied or pickled; it is one answer of one Runtime$"):
            call(stream)


FORK = """
import json, os, sys, threading
from edge_moe import Runtime
path, cap = sys.argv[1], int(sys.argv[2])
runtime = Runtime(path, cap, 64, threads=2)
answer = runtime.generate([5, 6, 7], 4).tokens
stream = runtime.stream([5, 6, 7], 4)
next(stream)
read, write = os.pipe()
if os.fork() == 0:
    errors = []
    for call in (lambda: runtime.generate([5, 6, 7], 4), lambda: next(stream), lambda: runtime.logits([1]),
                 runtime.reset, lambda: runtime.stats):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    del stream
    runtime.close()
    del runtime
    with Runtime(path, cap, 64, threads=2) as another:
        errors.append(another.generate([5, 6, 7], 4).tokens)
    os.write(write, json.dumps([os.getpid(), errors]).encode())
    sys.exit()
os.close(write)
child, errors = json.loads(os.fdopen(read).read())
os.wait()
print(json.dumps([os.getpid(), child, errors, answer, runtime.generate([5, 6, 7], 4).tokens]))
"""


def test_a_forked_child_is_told_at_once_and_can_make_a_runtime_of_its_own(path):
    with paged_runtime(path) as runtime:
        cap = runtime.plan.ram_bytes
    done = subprocess.run([sys.executable, "-c", FORK, path, str(cap)], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    parent, child, errors, answer, after = json.loads(done.stdout)
    message = (
        f"this Runtime was made in process {parent}, of which this one, {child}, is a forked child without its "
        "threads; make a Runtime here"
    )
    assert errors == [*[message] * 5, answer]
    assert after == answer


EXIT = """
import sys, threading, time
from edge_moe import Runtime
runtime = Runtime(sys.argv[1], "2GB", 512, threads=2)
begun = threading.Event()
def ask():
    while True:
        begun.set()
        runtime.logits(range(1, 400)) if sys.argv[2] == "logits" else runtime.generate("def ", 100)
for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize("call", ["logits", "generate"])
@pytest.mark.parametrize("seconds", [0.0, 0.013, 0.1])
def test_python_ends_while_a_daemon_generates(path, call, seconds):
    done = subprocess.run(
        [sys.executable, "-c", EXIT, path, call, str(seconds)], capture_output=True, text=True, timeout=HANG_S
    )
    assert (done.returncode, done.stderr) == (0, "")
