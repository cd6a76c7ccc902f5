"""Streams of hidden states: what is in a file is the same as what is in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.compressor.passes.streams import BLOCK_ROWS, Stream

ROWS, DIM = 57, 6


def values(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIM), np.float32)


@pytest.fixture(params=["memory", "file"])
def make(request, tmp_path):
    """make(rows) is an empty stream of that many rows."""

    def make(rows: int = ROWS) -> Stream:
        return Stream(rows, DIM, tmp_path / "scratch" if request.param == "file" else None)

    (tmp_path / "scratch").touch()  # of a run before, to be overwritten
    return make


@pytest.mark.parametrize(
    "rows",
    [[], [0], [ROWS - 1], [3, 4, 5], [0, 2, 4], [5, 6, 9, 10, 11, 56], list(range(ROWS)), [9, 8, 30, 2]],
    ids=str,
)
def test_scattered_rows_are_read_and_added_to(make, rows):
    stream, want = make(), values()
    stream.write(0, want)
    rows = np.array(rows, np.int64)
    np.testing.assert_array_equal(stream.take(rows), want[rows])
    more = values(len(rows), seed=1)
    stream.add(rows, more)
    want[rows] += more
    np.testing.assert_array_equal(stream.read(0, ROWS), want)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "add"]),
            st.lists(st.integers(0, ROWS - 1), unique=True, max_size=20),
            st.integers(0, 2**32 - 1),
        ),
        max_size=6,
    )
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_file_holds_what_memory_would(tmp_path_factory, steps):
    streams = Stream(ROWS, DIM), Stream(ROWS, DIM, tmp_path_factory.mktemp("stream") / "scratch")
    for step, rows, seed in steps:
        for stream in streams:
            if step == "write":
                start = min(rows, default=0)
                stream.write(start, values(ROWS - start, seed))
            else:
                stream.add(np.array(sorted(rows), np.int64), values(len(rows), seed))
    np.testing.assert_array_equal(*(stream.read(0, ROWS) for stream in streams))


def test_what_is_read_is_a_copy(make):
    stream = make()
    stream.write(0, values())
    for taken in (stream.read(2, 9), stream.take(np.arange(2, 9))):
        taken[:] = 0
    np.testing.assert_array_equal(stream.read(0, ROWS), values())


def test_a_new_stream_is_zero_and_one_that_is_closed_leaves_no_file(make, tmp_path):
    stream = make()
    assert not stream.read(0, ROWS).any()
    stream.close()
    stream.close()
    assert stream.file is None or not stream.file.exists()


def test_other_types_and_strides_are_written_as_float32(make):
    stream, want = make(), values(2 * ROWS)
    stream.write(0, want.astype(np.float64)[::2])
    np.testing.assert_array_equal(stream.read(0, ROWS), want[::2])


@pytest.mark.parametrize("rows", [1, ROWS, BLOCK_ROWS + 3])
def test_what_was_saved_is_loaded(make, tmp_path, rows):
    stream, want = make(rows), values(rows)
    stream.write(0, want)
    stream.save(tmp_path / "saved")
    stream.close()
    for file in (None, tmp_path / "other"):
        loaded = Stream.load(tmp_path / "saved", rows, DIM, file)
        np.testing.assert_array_equal(loaded.read(0, rows), want)
        loaded.close()
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "scratch") == ["saved"]
    assert (tmp_path / "saved").read_bytes() == want.tobytes()


def test_a_saved_stream_of_another_size_is_refused(tmp_path):
    stream = Stream(ROWS, DIM)
    stream.save(tmp_path / "saved")
    (tmp_path / "saved").write_bytes((tmp_path / "saved").read_bytes()[:-4])
    with pytest.raises(ValueError) as caught:
        Stream.load(tmp_path / "saved", ROWS, DIM)
    assert str(caught.value) == f"{tmp_path / 'saved'}: has 1,364 bytes, expected 1,368; start again"


def test_a_file_that_gets_shorter_while_in_use_is_an_error(tmp_path):
    stream = Stream(ROWS, DIM, tmp_path / "scratch")
    with open(tmp_path / "scratch", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(OSError) as caught:
        stream.read(0, ROWS)
    assert str(caught.value) == f"{tmp_path / 'scratch'}: ended early; the file changed while in use, start again"
    stream.close()


@pytest.mark.parametrize(("rows", "of"), [(1, 1), (BLOCK_ROWS, 1), (3 * 500, 500), (40 * 256, 256), (9000, 3000)])
def test_blocks_cover_all_rows_in_whole_sequences(rows, of):
    blocks = list(Stream(rows, 1).blocks(of))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == rows
    assert all((stop - start) % of == 0 for start, stop in blocks)
    assert all(stop - start <= max(BLOCK_ROWS, of) for start, stop in blocks)
