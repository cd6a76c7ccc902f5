"""Slots and a trunk in MLX's memory, filled in place by the core's readers: what MLX then computes with."""

import numpy as np
import pytest
from bundles import make_engine, run_engine

from edge_moe import _core
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle

mx = pytest.importorskip("mlx.core")
from edge_moe.devices.mlx.experts import PAGE_BYTES, PAGE_WORDS, RecordKind  # noqa: E402
from edge_moe.devices.mlx.memory import SlotMemory, allocate  # noqa: E402
from edge_moe.devices.mlx.plain import records_at  # noqa: E402


class Slots:
    """The records of a bundle in slots of MLX's memory."""

    def __init__(self, bundle: Bundle, nbytes: int, **options):
        self.bundle, self.memory = bundle, SlotMemory()
        experts = [bundle.config.experts_of(layer) for layer in range(bundle.config.layer_count)]
        _, records, frequency = bundle.record_table()
        self.client = _core.Residency(
            [str(file) for file in bundle.files],
            records,
            frequency,
            nbytes,
            experts=experts,
            memory=self.memory,
            **options,
        )

    @property
    def arena(self):
        return self.memory.arena

    def record(self, number: int) -> np.ndarray:
        """A record's bytes, as MLX sees them."""
        nbytes = list(self.bundle.experts.values())[number].nbytes
        offset = int(self.client.offsets(number, 1)[0])
        assert offset >= 0 and offset % PAGE_BYTES == 0
        words = records_at(self.arena, mx.array([offset // PAGE_BYTES]), RecordKind((), {}, nbytes))
        return np.array(words).view(np.uint8).reshape(-1)


def stored(bundle: Bundle, number: int) -> np.ndarray:
    expert = list(bundle.experts.values())[number]
    return np.fromfile(bundle.files[expert.file], np.uint8, expert.nbytes, offset=expert.offset)


@pytest.fixture
def bundle(mixed) -> Bundle:
    return Bundle.open(mixed("olmoe"))


def test_memory_begins_at_a_page_and_can_be_written_where_mlx_reads():
    arena, memory = allocate(3 * PAGE_BYTES - 5)
    assert memory.ctypes.data % PAGE_BYTES == 0 and memory.size == 3 * PAGE_BYTES
    later = records_at(arena, mx.array([1]), RecordKind((), {}, PAGE_BYTES)) + 1
    memory[PAGE_BYTES : 2 * PAGE_BYTES] = np.arange(PAGE_BYTES) % 251
    assert np.array_equal(np.array(later).reshape(-1), memory.view(np.uint32)[PAGE_WORDS : 2 * PAGE_WORDS] + 1)


def test_readers_fill_the_memory_that_mlx_computes_with(bundle):
    records = len(bundle.experts)
    largest = max(expert.nbytes for expert in bundle.experts.values())
    slots, random = Slots(bundle, 5 * largest), np.random.default_rng(0)
    for _ in range(30):
        wanted = random.choice(records, 3, replace=False).tolist()
        taken = slots.client.take([(record, 2) for record in wanted])
        assert sorted(record for record, _ in taken) == sorted(wanted)
        for record, _ in taken:
            assert np.array_equal(slots.record(record), stored(bundle, record))
            slots.client.release(record)
        slots.client.tick()
    counters = slots.client.counters
    assert counters["hits"] + counters["misses"] == 90 and counters["hits"] > 0


def test_what_does_not_fit_at_once_is_taken_in_turn(bundle):
    largest = max(expert.nbytes for expert in bundle.experts.values())
    slots = Slots(bundle, 3 * largest)
    left, held = list(range(len(bundle.experts))), []
    while left:
        taken = slots.client.take([(record, 1) for record in left])
        assert bool(taken) != bool(held)
        if not taken:  # what is pinned leaves no memory
            for record in held:
                slots.client.release(record)
            held = []
            continue
        for record, _ in taken:
            assert np.array_equal(slots.record(record), stored(bundle, record))
        held = [record for record, _ in taken]
        left = [record for record in left if record not in held]


def test_a_damaged_record_is_named_and_leaves_nothing_pinned(bundle):
    slots = Slots(bundle, bundle.expert_bytes)
    slots.client.inject("flip", record=9, times=1)
    with pytest.raises(_core.DamagedFile, match=f"expert {list(bundle.experts)[9][1]} of layer 1 does not match"):
        slots.client.take([(8, 1), (9, 1)])
    assert slots.client.faults_met == 1
    slots.client.resize(bundle.expert_bytes)  # nothing is pinned
    assert slots.client.take([(8, 1), (9, 1)]) == [(8, False), (9, False)]
    assert np.array_equal(slots.record(9), stored(bundle, 9))


def test_what_queued_work_may_use_is_not_evicted_for_reads_ahead(bundle):
    largest = max(expert.nbytes for expert in bundle.experts.values())
    slots = Slots(bundle, 4 * largest)

    def read_all_ahead() -> set[int]:
        """The records of the first layer that are left when reads ahead have taken what they may."""
        for record in (1, 2):
            slots.client.take([(record, 1)])
            slots.client.release(record)
        slots.client.read_ahead(np.arange(9, 16, dtype=np.int32))
        while slots.client.wait(0.2):
            pass
        return {1, 2} & set(np.flatnonzero(slots.client.table >= 0).tolist())

    slots.client.protect(0, 8)
    assert read_all_ahead() == {1, 2} and slots.client.counters["read_ahead"] > 0
    slots.client.protect(8, 8)
    for _ in range(40):  # until the worths of two uses are small
        slots.client.tick()
    slots.client.take([(record, 1) for record in (1, 2)])  # which evict others, protected or not
    assert {1, 2} <= set(np.flatnonzero(slots.client.table >= 0).tolist())


def test_reads_have_been_asked_for_when_the_client_is_told(bundle):
    slots, told = Slots(bundle, bundle.expert_bytes), []
    slots.client.inject("slow", value=200_000)  # bytes a second

    def begun() -> None:
        told.append((slots.client.counters["misses"], slots.client.table[[3, 4]].max()))

    slots.client.take([(3, 1), (4, 1)], None, begun)
    assert told == [(2, -1)]
    slots.client.clear_faults()


def test_a_wait_for_a_slow_disk_ends_when_it_is_no_longer_wanted(bundle):
    slots = Slots(bundle, bundle.expert_bytes)
    slots.client.inject("slow", value=1000)
    with pytest.raises(_core.Interrupted):
        slots.client.take([(0, 1)], lambda: True)
    slots.client.clear_faults()
    assert [record for record, _ in slots.client.take([(0, 1)])] == [0]


def test_a_new_size_is_new_memory_with_the_same_worths(bundle):
    slots = Slots(bundle, bundle.expert_bytes)
    slots.client.take([(3, 5)]), slots.client.release(3)
    worths, arena = slots.client.worths, slots.arena
    slots.client.resize(bundle.expert_bytes // 2)
    assert slots.arena is not arena and slots.client.counters["bytes"] <= bundle.expert_bytes // 2
    assert slots.client.take([(3, 1)]) == [(3, False)]
    assert np.array_equal(slots.record(3), stored(bundle, 3))
    assert slots.client.worths[3] == worths[3] + 1


def test_the_cpu_engine_and_a_client_of_ours_keep_the_same_records(bundle, golden):
    """The records that the engine used, in its order, taken one layer after the other."""
    ids = golden["olmoe"][1]
    largest = max(expert.nbytes for expert in bundle.experts.values())
    engine = make_engine(bundle.path, slots=6)
    engine.set_prefetch(False)
    per_token = [run_one(engine, bundle, token) for token in ids.tolist()]
    slots = Slots(bundle, 6 * largest, half_life=32.0 * bundle.config.layer_count, readers=2)
    for layers in per_token:
        for records in layers:
            taken = slots.client.take([(record, 1) for record in records])
            for record, _ in taken:
                slots.client.release(record)
            slots.client.tick()
    ours, theirs = slots.client.counters, engine.counters
    assert (ours["hits"], ours["misses"]) == (theirs["expert_hits"], theirs["expert_misses"])
    assert ours["bytes_read"] == theirs["bytes_read"] and ours["misses"] > 0


def run_one(engine, bundle: Bundle, token: int) -> list[list[int]]:
    """The records that a token uses, by layer: those whose worths grow."""
    before = engine.worths
    run_engine(engine, np.array([token]))
    grown = np.flatnonzero(engine.worths != before)
    return [
        [int(r) for r in grown if r // bundle.config.experts == layer] for layer in range(bundle.config.layer_count)
    ]


# ---- the trunk


def test_a_trunk_is_read_into_mlx(bundle):
    path = bundle.path / TRUNK_FILE
    arena, memory = allocate(_core.trunk_room(bundle.trunk_bytes))
    _core.read_trunk(str(path), bundle.trunk_bytes, bundle.trunk_checksum, bundle.trunk_table(), memory)
    words = np.array(arena.words).reshape(-1)[arena.base :].view(np.uint8)
    assert np.array_equal(words[: bundle.trunk_bytes], np.fromfile(path, np.uint8))


def test_a_trunk_that_is_damaged_or_has_no_room_is_refused(bundle):
    path, tensors = str(bundle.path / TRUNK_FILE), bundle.trunk_table()
    _, memory = allocate(_core.trunk_room(bundle.trunk_bytes) + PAGE_BYTES)
    with pytest.raises(_core.DamagedFile, match="does not match its checksum"):
        _core.read_trunk(path, bundle.trunk_bytes, bundle.trunk_checksum ^ 1, tensors, memory)
    with pytest.raises(ValueError, match="memory must have at least"):
        _core.read_trunk(path, bundle.trunk_bytes, bundle.trunk_checksum, tensors, memory[: bundle.trunk_bytes // 2])
    with pytest.raises(ValueError, match="memory must begin at a multiple of 4096"):
        _core.read_trunk(path, bundle.trunk_bytes, bundle.trunk_checksum, tensors, memory[64:])
