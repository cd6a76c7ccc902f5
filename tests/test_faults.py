"""Reads that fail, end early, come in pieces or slowly, and odd numbers of threads: one clear error or the same answer,
never a hang; and after an error all goes on as if nothing had been."""

import errno
import os
import re
import threading
import time

import numpy as np
import pytest
from bundles import flip, make_engine, paged_runtime, run_engine, run_python

from edge_moe import _core
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.runtime import Runtime

PROMPT = "def read_lines(path):"
TOKENS = 16  # of an answer
IDS = np.arange(1, 13, dtype=np.int32)  # of olmoe: its 8 experts of layer 0 are all used
TRY_AGAIN = "try again, and copy the bundle again if that does not help"
HANG_S = 60


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", width=4)


@pytest.fixture(scope="module")
def answer(path):
    with Runtime(path, "2GB", 64, threads=1) as runtime:
        return runtime.generate(PROMPT, TOKENS)


@pytest.fixture
def runtime(path):
    with paged_runtime(path) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def small(bundle_of):
    return bundle_of("olmoe", width=4)


@pytest.fixture(scope="module")
def logits(small):
    return run_engine(make_engine(small), IDS)


def in_time(call, *arguments):
    """The result of a call that must end, or what it raised."""
    found = []

    def target() -> None:
        try:
            found.append((call(*arguments), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive(), "the call hangs"
    result, error = found[0]
    if error:
        raise error
    return result


def record_of(path, layer: int, index: int):
    """The file, its place there, and the number of a record."""
    bundle = Bundle.open(path)
    return bundle.files[0], bundle.experts[layer, index], list(bundle.experts).index((layer, index))


# ---- what an error says, and that trying again works


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("error", 0, f"{{file}}: cannot read at byte {{begin}}: Input/output error; {TRY_AGAIN}"),
        ("error", errno.ENXIO, f"{{file}}: cannot read at byte {{begin}}: No such device or address; {TRY_AGAIN}"),
        ("end", 0, "{file}: ends at byte {begin}, expected at least {end}; copy the bundle again"),
        ("flip", 100, "{file}: expert 5 of layer 0 does not match its checksum; copy the bundle again"),
    ],
)
def test_a_failed_read_is_named_once_and_forgotten(small, logits, kind, value, message, threads):
    file, expert, record = record_of(small, 0, 5)
    engine = make_engine(small, slots=3, threads=threads)
    engine.inject(kind, record=record, times=1, value=value)
    with pytest.raises(OSError) as caught:
        in_time(run_engine, engine, IDS)
    assert str(caught.value) == message.format(file=file, begin=expert.offset, end=expert.offset + expert.nbytes)
    assert engine.faults_met == 1
    assert engine.position == 0
    np.testing.assert_array_equal(run_engine(engine, IDS), logits)


def test_an_error_in_the_middle_of_a_record_names_the_byte(path):
    file, expert, record = record_of(path, 0, 0)
    engine = make_engine(path, slots=4)
    engine.inject("short", record=record, value=8192, times=1)
    engine.inject("error", record=record, after=1)
    with pytest.raises(OSError, match=f"^{re.escape(str(file))}: cannot read at byte {expert.offset + 8192}: "):
        for at in range(0, 4000, 32):  # until the record is wanted
            in_time(run_engine, engine, range(at, at + 32))


@pytest.mark.parametrize("kind", ["error", "end", "flip"])
def test_whichever_read_of_an_answer_fails_the_next_call_gives_the_answer(runtime, answer, kind):
    engine, prompt, positions = runtime._engine, len(runtime.tokenizer.encode(PROMPT)), []
    file = re.escape(str(runtime.bundle.files[0]))
    engine.set_prefetch(False)  # a read ahead may fail and nobody wants it
    for after in range(1000):
        engine.clear_faults()
        engine.inject(kind, after=after, times=1)
        met = engine.faults_met
        runtime.reset()
        try:
            assert in_time(runtime.generate, PROMPT, TOKENS).tokens == answer.tokens
            assert engine.faults_met == met
            break
        except OSError as error:
            assert re.match(f"{file}: .* again", str(error))
        assert engine.faults_met == met + 1
        positions.append(engine.position)
        assert engine.position == len(runtime._session.sequences.all[0].tokens)  # what came before the error is kept
        again = in_time(runtime.generate, PROMPT, TOKENS)
        assert (again.text, again.tokens) == (answer.text, answer.tokens)
    assert min(positions) == 0
    assert max(positions) > prompt


def test_a_stream_raises_and_is_over_and_the_next_call_works(runtime, answer):
    stream = runtime.stream(PROMPT, TOKENS)
    pieces = [next(stream), next(stream)]
    runtime._engine.inject("error")
    with pytest.raises(OSError, match="Input/output error"):
        for piece in stream:
            pieces.append(piece)
    assert [token for piece in pieces for token in piece.tokens] == answer.tokens[: len(pieces)]
    assert list(stream) == []
    with pytest.raises(OSError, match="Input/output error"):
        runtime.logits(range(40))
    runtime._engine.clear_faults()
    assert in_time(runtime.generate, PROMPT, TOKENS).text == answer.text


@pytest.mark.parametrize("slots", [2, 3, 16])
def test_many_records_that_fail_at_once_and_for_good_give_one_error_a_call(small, logits, slots):
    engine = make_engine(small, slots=slots, threads=2)
    engine.inject("error")
    for chunk in (1, 5, 12) * 10:
        with pytest.raises(OSError, match="Input/output error"):
            in_time(run_engine, engine, IDS, chunk)
        assert engine.position == 0
    engine.clear_faults()
    for chunk in (1, 5, 12):
        np.testing.assert_array_equal(in_time(run_engine, engine, IDS, chunk), logits)


@pytest.mark.parametrize("good", range(6))
def test_records_that_still_load_when_another_fails_are_waited_for(small, logits, good):
    engine = make_engine(small, slots=3, threads=2)
    engine.inject("slow", value=500_000)  # 8 ms a record
    engine.inject("error", after=good, times=1)
    with pytest.raises(OSError, match="Input/output error"):
        in_time(run_engine, engine, IDS)
    np.testing.assert_array_equal(in_time(run_engine, engine, IDS), logits)


@pytest.mark.parametrize("kind", ["error", "end", "flip"])
def test_a_read_that_a_failed_call_left_behind_fails_no_other_call(small, logits, kind):
    _, _, failing = record_of(small, 0, 0)
    _, _, left = record_of(small, 0, 1)
    engine = make_engine(small, slots=4)
    engine.inject("slow", record=failing, times=1, value=40_000)  # 0.1 s
    engine.inject("error", record=failing, times=1)
    engine.inject("slow", record=left, times=1, value=8_000)  # 0.5 s
    engine.inject(kind, record=left, times=1)
    with pytest.raises(OSError, match="Input/output error"):
        run_engine(engine, IDS)
    np.testing.assert_array_equal(in_time(run_engine, engine, IDS), logits)
    assert engine.faults_met == 2


def test_threads_that_wait_for_their_turn_get_it_when_the_one_before_fails(runtime, answer):
    runtime._engine.inject("slow", value=1_000_000, times=1)  # 0.1 s
    runtime._engine.inject("error", after=1, times=1)
    found = []

    def ask() -> None:
        try:
            found.append(runtime.generate(PROMPT, TOKENS).text)
        except OSError as error:
            found.append(error.__class__)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(HANG_S) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(map(str, found)) == sorted(map(str, [OSError, *[answer.text] * 3]))


# ---- closing


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["error", "end", "flip"])
def test_an_engine_that_met_errors_ends_with_all_its_threads(small, kind):
    before = set(os.listdir("/proc/self/task"))
    engine = make_engine(small, slots=3, threads=3)
    its_own = set(os.listdir("/proc/self/task")) - before
    assert len(its_own) == 2 + 2
    engine.inject("slow", value=500_000)
    engine.inject(kind, after=3)
    with pytest.raises(OSError):
        run_engine(engine, IDS)
    del engine
    deadline = time.monotonic() + HANG_S
    while (
        its_own & set(os.listdir("/proc/self/task")) and time.monotonic() < deadline
    ):  # the system is some moments late
        os.sched_yield()
    assert not its_own & set(os.listdir("/proc/self/task"))


def test_a_runtime_closes_while_a_read_fails_for_good(path):
    runtime = paged_runtime(path)
    runtime._engine.inject("error")
    with pytest.raises(OSError, match="Input/output error"):
        runtime.generate(PROMPT, TOKENS)
    in_time(runtime.close)
    with pytest.raises(ValueError, match="this Runtime is closed"):
        runtime.generate(PROMPT, TOKENS)


# ---- reads in pieces, and slow ones


@pytest.mark.parametrize(
    ("kind", "value"), [("short", 4096), ("short", 5000), ("short", 100_000), ("error", errno.EINTR)]
)
def test_reads_in_pieces_and_interrupted_ones_change_nothing(runtime, answer, kind, value):
    runtime._engine.inject(kind, value=value, times=-1 if kind == "short" else 100)
    assert in_time(runtime.generate, PROMPT, TOKENS).tokens == answer.tokens
    assert runtime._engine.faults_met >= 100


@pytest.mark.parametrize("rate", [1_000_000, 10_000_000, 40_000_000])
def test_a_slow_disk_changes_nothing_but_the_time(path, rate, stdlib_ids):
    want = run_engine(make_engine(path), stdlib_ids[:8])
    engine = make_engine(path, slots=20, threads=2)
    engine.inject("slow", value=rate, times=20)
    np.testing.assert_array_equal(in_time(run_engine, engine, stdlib_ids[:8]), want)
    assert engine.faults_met == 20


def test_a_slow_read_goes_on_when_the_fault_is_cleared(small, logits):
    engine = make_engine(small, slots=3)
    engine.inject("slow", value=1)  # 4096 s
    thread = threading.Thread(target=run_engine, args=(engine, IDS), daemon=True)
    thread.start()
    while not engine.faults_met:
        os.sched_yield()
    engine.clear_faults()
    thread.join(HANG_S)
    assert not thread.is_alive()
    np.testing.assert_array_equal(run_engine(engine, IDS), logits)


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[2])
from bundles import paged_runtime
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
with paged_runtime(sys.argv[1]) as runtime:
    engine, prompt = runtime._engine, sys.argv[3]
    want = runtime.generate(prompt, 16).tokens
    def interrupt(met):
        while engine.faults_met < met + 2:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGINT)
    for times in range(3):
        runtime.reset()
        engine.clear_faults()
        engine.inject("slow", value=2_000_000, times=4)
        thread = threading.Thread(target=interrupt, args=(engine.faults_met,))
        thread.start()
        try:
            runtime.generate(prompt, 16)
            print("not interrupted")
        except KeyboardInterrupt:
            print("interrupted")
        thread.join()
        engine.clear_faults()
        assert runtime.generate(prompt, 16).tokens == want
"""


def test_an_interrupt_during_a_slow_read_is_raised_and_the_next_call_gives_the_answer(path):
    found = run_python(INTERRUPTED, path, os.path.dirname(__file__), PROMPT).stdout.split()
    assert found == ["interrupted"] * 3


# ---- a file that changes under a paged engine


@pytest.fixture
def mine(copy_of):
    return copy_of("reference", width=4)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_file_cut_short_while_it_is_paged_is_named(mine, answer, keep):
    with paged_runtime(mine) as runtime:
        file = runtime.bundle.files[0]
        whole = file.read_bytes()
        assert runtime.generate(PROMPT, 2).tokens == answer.tokens[:2]
        left = int(keep * len(whole))
        os.truncate(file, left)
        with pytest.raises(OSError) as caught:
            for at in range(0, 4000, 40):  # until a record is wanted that is no longer there
                in_time(runtime.logits, range(at, at + 40))
        found = re.fullmatch(
            rf"{re.escape(str(file))}: ends at byte (\d+), expected at least (\d+); .*", str(caught.value)
        )
        assert left <= int(found[1]) < int(found[2])
        file.write_bytes(whole)
        assert in_time(runtime.generate, PROMPT, TOKENS).text == answer.text


def test_a_file_replaced_while_it_is_paged_is_read_on_as_it_was(mine, answer):
    with paged_runtime(mine) as runtime:
        file = runtime.bundle.files[0]
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        os.replace(other, file)
        assert in_time(runtime.generate, PROMPT, TOKENS).text == answer.text
        assert runtime.stats["expert_misses"] > 0


def test_a_file_overwritten_while_it_is_paged_does_not_match_its_checksum(mine, answer):
    with paged_runtime(mine) as runtime:
        file = runtime.bundle.files[0]
        places = [expert.offset + 1000 for expert in runtime.bundle.experts.values()]
        [flip(file, at) for at in places]
        with pytest.raises(OSError, match=r"expert \d+ of layer 0 does not match its checksum; copy the bundle again"):
            in_time(runtime.generate, PROMPT, TOKENS)
        [flip(file, at) for at in places]
        assert in_time(runtime.generate, PROMPT, TOKENS).text == answer.text


# ---- threads


@pytest.mark.parametrize("threads", [0, -1, -(2**31)])
def test_less_than_one_thread_is_refused(small, threads):
    with pytest.raises(ValueError, match=f"^threads is {threads}, expected 1 to 1024$"):
        Runtime(small, "2GB", threads=threads)
    with pytest.raises(ValueError, match="^threads must be at least 1$"):
        make_engine(small, slots=3, threads=threads)


def test_more_threads_than_cores_change_nothing(path, answer):
    for make in (lambda: Runtime(path, "2GB", 64, threads=64), lambda: paged_runtime(path, threads=64)):
        with make() as runtime:
            assert runtime.threads == 64
            assert in_time(runtime.generate, PROMPT, TOKENS).tokens == answer.tokens


REFUSED = """
import os, resource, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a fork's threads would take the stacks of NumPy's own
sys.path.insert(0, sys.argv[2])
from bundles import Path, make_engine
path, threads = Path(sys.argv[1]), int(sys.argv[3])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room in map(int, sys.argv[4:]):
    if not os.fork():
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
        try:
            make_engine(path, slots=3, threads=threads)
            print("made")
        except MemoryError:
            print("no memory")
        except OSError as error:
            print(error)
        sys.stdout.flush()
        os._exit(0)
    if status := os.wait()[1]:
        print("ended by", status)
"""


@pytest.mark.skipif(not _core.peak_bytes(), reason="needs /proc")
@pytest.mark.parametrize(("threads", "refused"), [(1, 2), (1000, 999)])
def test_threads_that_the_system_refuses_are_an_error(small, threads, refused):
    rooms = range(10_000_000, 60_000_000, 3_000_000)  # a thread's stack takes 8 MB of address space
    found = run_python(REFUSED, small, os.path.dirname(__file__), threads, *rooms).stdout.splitlines()
    message = "threads: Resource temporarily unavailable; lower threads, or raise what this process may use"
    messages = {f"cannot start {count} {message}" for count in (2, refused)}
    assert f"cannot start {refused} {message}" in found
    assert set(found) <= {"made", "no memory", *messages}


# ---- kinds of errors


KINDS = """
import errno, os, resource, sys
sys.path.insert(0, sys.argv[2])
from bundles import Path, make_engine
path = Path(sys.argv[1])
make_engine(path)
file = path / "trunk.safetensors"
def kind(limit=None):
    before = limit and resource.getrlimit(limit[0])
    if limit:
        resource.setrlimit(limit[0], (limit[1], before[1]))
    try:
        make_engine(path)
    except Exception as error:
        return type(error).__name__
    finally:
        if limit:
            resource.setrlimit(limit[0], before)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
print(kind((resource.RLIMIT_AS, used + 100_000)))
print(kind((resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1)))
whole = file.read_bytes()
file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
print(kind())
file.write_bytes(whole)
print(kind())
"""


def test_memory_that_runs_out_a_system_that_refuses_and_damage_are_told_apart(copy_of):
    child = run_python(KINDS, copy_of("reference", width=4), os.path.dirname(__file__))
    assert child.stdout.split() == ["MemoryError", "OSError", "DamagedFile", "None"]
