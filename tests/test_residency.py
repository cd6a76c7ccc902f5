"""Records in memory for a client that is not the engine: it reads, counts, evicts, keeps an epoch and gives back."""

from pathlib import Path

import numpy as np
import pytest

from edge_moe import _core

RECORDS, PAGE = 40, 4096
SIZES = [PAGE * (1 + i % 4) for i in range(RECORDS)]  # of four sizes, 1 to 4 pages
LARGEST = max(SIZES)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two files of random records: their paths, the table of records, and each record's bytes."""
    random, directory = np.random.default_rng(3), tmp_path_factory.mktemp("records")
    data = [random.integers(0, 256, size, np.uint8) for size in SIZES]
    paths, rows, written = [directory / "a.bin", directory / "b.bin"], [], [b"", b""]
    for number, values in enumerate(data):
        file = number % 2
        rows.append((file, len(written[file]), len(values), _core.crc32c(values.tobytes())))
        written[file] += values.tobytes()
    for path, text in zip(paths, written, strict=True):
        path.write_bytes(text)
    return [str(path) for path in paths], np.array(rows, np.int64), data


def residency(stored, nbytes: int, **options) -> "_core.Residency":
    files, rows, _ = stored
    return _core.Residency(files, rows, np.zeros(RECORDS, np.float32), nbytes, **options)


def wait_for(client, record: int) -> np.ndarray:
    while (data := client.bytes(record)) is None:
        assert client.wait(10)
    return data


def take(client, record: int) -> np.ndarray:
    """A record's bytes, which stay; what is read ahead may be in the way for a while."""
    while not client.acquire(record):
        assert client.wait(10)
    return wait_for(client, record)


def ready(client) -> set[int]:
    return set(np.flatnonzero(client.table >= 0).tolist())


def test_a_client_finds_each_record_whatever_leaves_for_it(stored):
    random, data, memory = np.random.default_rng(0), stored[2], 9 * LARGEST
    client, uses = residency(stored, memory), np.zeros(RECORDS, int)
    for _ in range(300):
        wanted = random.choice(RECORDS, 4, replace=False, p=np.arange(1, RECORDS + 1) / (RECORDS * (RECORDS + 1) / 2))
        assert all(client.acquire(int(record)) for record in wanted)
        for record in map(int, wanted):
            np.testing.assert_array_equal(wait_for(client, record), data[record])
            offset, nbytes, held = client.slot(client.table[record])
            assert held == record and nbytes == SIZES[record] and offset + nbytes <= memory
        for record in map(int, wanted):
            client.release(record)
        client.tick()
        uses[wanted] += 1
    counters = client.counters
    assert counters["hits"] + counters["misses"] == uses.sum() == 1200
    assert min(SIZES) * counters["misses"] <= counters["bytes_read"] <= LARGEST * counters["misses"]
    held = ready(client)
    assert counters["records_held"] == len(held)
    assert sum(SIZES[record] for record in held) <= memory
    assert uses[list(held)].mean() > uses.mean()  # what is wanted often stays


def test_what_is_pinned_stays_and_more_than_there_is_memory_for_is_refused(stored):
    client = residency(stored, 3 * LARGEST)
    large = [record for record in range(RECORDS) if SIZES[record] == LARGEST]
    first = take(client, large[0])
    take(client, large[1]), take(client, large[2])
    assert not client.acquire(large[3])
    client.release(large[1])
    take(client, large[3])
    assert ready(client) == {large[0], large[2], large[3]}
    np.testing.assert_array_equal(first, stored[2][large[0]])
    with pytest.raises(ValueError, match="this record is not acquired"):
        client.bytes(large[1])


def test_within_an_epoch_nothing_leaves_that_was_there_when_it_began(stored):
    client = residency(stored, 3 * LARGEST)
    large = [record for record in range(RECORDS) if SIZES[record] == LARGEST]
    for record in large[:2]:
        take(client, record), client.release(record)
    before = client.table
    client.begin_epoch()
    for record in large[2:6]:  # they take one another's place, in the memory that was free
        take(client, record), client.release(record)
        np.testing.assert_array_equal(client.table[large[:2]], before[large[:2]])
    assert ready(client) == {large[0], large[1], large[5]}
    client.end_epoch()
    take(client, large[6]), take(client, large[7])
    assert len(ready(client) & set(large[:2])) <= 1


def test_memory_that_is_given_up_is_the_systems_and_what_is_left_is_right(tmp_path):
    size, records = 1 << 20, 48
    data = np.random.default_rng(1).integers(0, 256, (records, size), np.uint8)
    (tmp_path / "records.bin").write_bytes(data.tobytes())
    rows = np.array([(0, i * size, size, _core.crc32c(data[i].tobytes())) for i in range(records)], np.int64)
    client = _core.Residency([str(tmp_path / "records.bin")], rows, np.zeros(records, np.float32), records * size)

    def read_all():
        for record in range(records):
            np.testing.assert_array_equal(take(client, record), data[record])
            client.release(record)

    read_all()
    assert len(ready(client)) == records
    whole = _core.resident_bytes()
    client.resize(4 * size)
    assert _core.resident_bytes() <= whole - 40 * size
    assert client.counters["bytes"] == 4 * size and len(ready(client)) == 4
    read_all()
    assert len(ready(client)) == 4
    assert _core.resident_bytes() <= whole - 40 * size
    client.resize(20 * size)
    read_all()
    assert len(ready(client)) == 20
    client.resize(records * size)
    read_all()
    misses = client.counters["misses"]
    read_all()
    assert client.counters["misses"] == misses


def test_memory_cannot_change_under_whoever_uses_it(stored):
    client = residency(stored, 8 * LARGEST)
    with pytest.raises(ValueError, match="the slots must hold the largest record"):
        client.resize(LARGEST - 1)
    data = take(client, 3)
    with pytest.raises(RuntimeError, match="a record is in use"):
        client.resize(4 * LARGEST)
    np.testing.assert_array_equal(data, stored[2][3])
    client.release(3)
    client.begin_epoch()
    with pytest.raises(RuntimeError, match="an epoch is open"):
        client.resize(4 * LARGEST)
    client.end_epoch()
    client.resize(4 * LARGEST)


def test_memory_that_cannot_be_had_is_refused_and_as_much_is_there_as_before(stored):
    client = residency(stored, 8 * LARGEST)
    take(client, 3), client.release(3)
    with pytest.raises(MemoryError, match="more memory for experts: .*; ask for a lower cap"):
        client.resize(10**12)
    assert client.counters["bytes"] == 8 * LARGEST
    client.read_ahead(np.arange(5, dtype=np.int32))
    np.testing.assert_array_equal(take(client, 3), stored[2][3])


def test_memory_of_any_size_in_turn_serves_records_of_any_size(stored):
    random, client = np.random.default_rng(7), residency(stored, 8 * LARGEST)
    for _ in range(400):
        client.resize(int(random.integers(LARGEST, 14 * LARGEST)))
        for record in random.integers(0, RECORDS, 6).tolist():
            np.testing.assert_array_equal(take(client, record), stored[2][record])
            client.release(record)
        if random.random() < 0.5:
            client.read_ahead(random.integers(0, RECORDS, 3).astype(np.int32))
        held = ready(client)
        assert sum(SIZES[record] for record in held) <= client.counters["bytes"]


def test_a_record_that_is_damaged_is_named_and_tried_again(stored, tmp_path):
    files, rows, data = stored
    damaged = tmp_path / "b.bin"
    text = bytearray(Path(files[1]).read_bytes())
    at = rows[1][1]
    text[at] ^= 1
    damaged.write_bytes(text)
    client = _core.Residency([files[0], str(damaged)], rows, np.zeros(RECORDS, np.float32), 4 * LARGEST)
    for _ in range(2):
        assert client.acquire(1)
        with pytest.raises(_core.DamagedFile, match=r"b\.bin"):
            wait_for(client, 1)
        client.release(1)
    np.testing.assert_array_equal(take(client, 2), data[2])
    text[at] ^= 1
    damaged.write_bytes(text)
    np.testing.assert_array_equal(take(client, 1), data[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda client: client.acquire(RECORDS), "no such record"),
        (lambda client: client.release(0), "this record is not acquired"),
        (lambda client: client.bytes(0), "this record is not acquired"),
        (lambda client: client.read_ahead(np.array([-1], np.int32)), "no such record"),
    ],
)
def test_what_a_client_gets_wrong_is_said(stored, call, message):
    with pytest.raises(ValueError, match=message):
        call(residency(stored, 4 * LARGEST))
