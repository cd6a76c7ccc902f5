"""The plan: sizes are read, the cap is divided, and a cap below the floor is refused with one that works."""

import json
from dataclasses import replace

import pytest
from bundles import REFERENCE, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe import _core
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.engine_config import engine_config
from edge_moe.runtime.layers.mlp import Dense
from edge_moe.runtime.plan import READER_BYTES, READERS, make_plan, parse_bytes, resolve_ram
from edge_moe.runtime.plan_table import plan_text
from edge_moe.runtime.runtime import Runtime

CONFIG = load_config(REFERENCE)
SLOT, RECORDS = 110_592, 64
SIZES = {"trunk_bytes": 2_000_000, "all_experts_bytes": RECORDS * SLOT, "slot_bytes": SLOT}


def plan(ram_bytes: int, context: int = 512, **options):
    return make_plan(CONFIG, ram_bytes=ram_bytes, context=context, interpreter_bytes=40_000_000, **SIZES | options)


# ---- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("64k", 64_000),
        ("2T", 2_000_000_000_000),
        ("8gi", 8 * 2**30),
        ("8,000MB", 8_000_000_000),
        ("1,234,567.5 k", 1_234_567_500),
        ("750000B", 750_000),
        (" 1e6 ", 1_000_000),
        (4096000, 4_096_000),
        (4096000.0, 4_096_000),
    ],
)
def test_sizes_are_decimal_unless_spelled_with_an_i(text, nbytes):
    assert parse_bytes(text) == nbytes
    assert resolve_ram(text) == nbytes


@pytest.mark.parametrize(
    "size",
    ["8XB", "", "GB", "B8", "8 apples", "8,5GB", "8,00MB", ",800MB", "nan", "inf", "1e999GB", "0x10", None, True, [8]],
)
def test_a_size_that_is_not_understood_is_refused(size):
    with pytest.raises(ValueError) as caught:
        parse_bytes(size)
    assert str(caught.value) == f"size {size!r} is not understood; write 8GB, 8GiB, 500MB or a number of bytes"


@pytest.mark.parametrize("size", [0, -1, "0GB", "-8GB", "0.1B", "-0.5"])
def test_a_size_of_nothing_is_refused(size):
    with pytest.raises(ValueError) as caught:
        parse_bytes(size)
    assert str(caught.value) == f"size {size!r} must be above 0"


@pytest.mark.parametrize(
    ("size", "means", "meant"),
    [
        (8, "8", "8GB"),
        ("8", "8", "8GB"),
        ("8.5", "8", "8.5GB"),
        ("7B", "7", "7GB"),
        (512, "512", "512GB"),
        ("16384", "16,384", "16384MB"),
        (8192.0, "8,192", "8192MB"),
        (0.5, "0", "50%"),
        ("0.8", "1", "80%"),
    ],
)
def test_a_number_too_small_for_bytes_is_asked_about(size, means, meant):
    for take in (parse_bytes, resolve_ram):
        with pytest.raises(ValueError) as caught:
            take(size)
        assert str(caught.value) == f"size {size!r} means {means} bytes; did you mean {meant}?"


def test_auto_takes_most_of_what_is_free_and_max_all_of_it():
    half, auto, most = (resolve_ram(ram) for ram in ("50%", "auto", "MAX"))
    free = _core.free_bytes() + _core.resident_bytes()
    assert 0 < half < auto < most <= 1.1 * free  # what is free moves between two looks
    assert half == pytest.approx(most / 2, rel=0.1) and auto == pytest.approx(0.8 * most, rel=0.1)


@pytest.mark.parametrize("ram", ["0%", "-5%", "101%", "%", "half%", "nan%"])
def test_a_share_that_is_none_is_refused(ram):
    with pytest.raises(ValueError) as caught:
        resolve_ram(ram)
    assert str(caught.value) == f"size {ram!r} is not a share of memory; write 1% to 100%"


# ---- dividing the cap


@given(
    cap=st.integers(1, 200_000_000), context=st.integers(1, 1024), rows=st.integers(1, 64), threads=st.integers(1, 8)
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_plan_never_exceeds_its_cap_and_works_from_the_floor_up(cap, context, rows, threads):
    options = {"logits_rows": min(rows, context), "threads": threads}
    floor = plan(cap, context, refuse=False, **options).floor_bytes
    if cap < floor:
        with pytest.raises(MemoryError):
            plan(cap, context, **options)
    p = plan(max(cap, floor), context, **options)
    assert p.floor_bytes == floor
    assert p.total_bytes <= p.ram_bytes
    assert p.resident or p.slots >= CONFIG.top_k
    assert p.resident == (p.ram_bytes >= p.resident_bytes)
    assert max(min(rows, context), min(16, context)) <= p.chunk <= context
    kv_cache, _, scratch = _core.engine_memory(engine_config(CONFIG, context, p.chunk, min(rows, context), threads))
    assert (p.kv_cache_bytes, p.scratch_bytes) == (kv_cache, scratch)
    assert p.resident or p.total_bytes == min(p.ram_bytes, p.total_bytes - p.experts_bytes + RECORDS * SLOT)
    assert p.experts_bytes // SLOT == (RECORDS if p.resident else p.slots)


def test_more_memory_never_means_fewer_slots_or_shorter_steps():
    floor = plan(1, refuse=False).floor_bytes
    plans = [plan(floor + extra) for extra in range(0, 12_000_000, 300_000)]
    paged = [p.slots for p in plans if not p.resident]
    assert paged[0] == 4
    assert max(paged) <= RECORDS
    assert [p.resident for p in plans] == sorted(p.resident for p in plans)
    assert plans[-1].resident


def test_every_expert_in_memory_comes_before_long_steps():
    first = plan(1, refuse=False)
    assert plan(first.resident_bytes - 1).resident is False
    just = plan(first.resident_bytes)
    assert (just.resident, just.chunk) == (True, 16)
    assert plan(10**9).chunk == 512


def test_slots_are_as_large_as_their_records():
    alike, mixed = plan(58_500_000), plan(58_500_000, all_experts_bytes=RECORDS * SLOT // 2)
    assert not alike.resident and mixed.experts_bytes == alike.experts_bytes
    assert mixed.slots in (2 * alike.slots, 2 * alike.slots + 1)
    assert mixed.floor_bytes == alike.floor_bytes


def test_where_all_experts_take_less_than_slots_the_floor_is_all_of_them():
    sizes = {**SIZES, "all_experts_bytes": 3 * SLOT}  # one large record and many small ones
    options = {"context": 64, "interpreter_bytes": 40_000_000}
    floor = make_plan(CONFIG, ram_bytes=1, refuse=False, **options, **sizes).floor_bytes
    assert make_plan(CONFIG, ram_bytes=floor, **options, **sizes).resident
    with pytest.raises(MemoryError):
        make_plan(CONFIG, ram_bytes=floor - 1, **options, **sizes)


def test_only_experts_that_are_there_count():
    kept = (tuple(range(16)), (1, 5, 9), tuple(range(0, 16, 2)), (0, 1))
    config = replace(CONFIG, kept=kept, layer_top_k=(2, 3, 1, 2))
    options = {"context": 512, "interpreter_bytes": 40_000_000, "trunk_bytes": 2_000_000, "slot_bytes": SLOT}
    assert config.expert_count == 29
    p = make_plan(config, ram_bytes=10**9, all_experts_bytes=29 * SLOT, **options)
    assert (p.resident, p.experts_bytes) == (True, 29 * SLOT)
    assert 26 <= make_plan(config, ram_bytes=p.resident_bytes - 1, all_experts_bytes=29 * SLOT, **options).slots < 29

    # the floor: what is needed anyway, the readers' stacks, and a slot for each of layer 1's three
    p = make_plan(config, ram_bytes=1, refuse=False, all_experts_bytes=29 * SLOT, **options)
    kv_cache, _, scratch = _core.engine_memory(engine_config(config, 512, 16))
    assert p.floor_bytes == 2_000_000 + kv_cache + scratch + p.interpreter_bytes + 4 * 65_536 + 3 * SLOT
    assert make_plan(config, ram_bytes=p.floor_bytes, all_experts_bytes=29 * SLOT, **options).slots == 3
    with pytest.raises(MemoryError):
        make_plan(config, ram_bytes=p.floor_bytes - 1, all_experts_bytes=29 * SLOT, **options)
    whole = engine_config(CONFIG, 512, 16)
    assert (kv_cache, 0, scratch) < _core.engine_memory(whole)  # fewer pairs of token and expert at once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [16] * 3}, "experts and top_k must have one value a layer"),
        ({"top_k": [4] * 5}, "experts and top_k must have one value a layer"),
        ({"experts": [16, 16, 3, 16]}, "top_k must be 1 to a layer's experts"),
        ({"top_k": [4, 4, 0, 4]}, "top_k must be 1 to a layer's experts"),
        ({"experts": [16, 16, 16, 0]}, "top_k must be 1 to a layer's experts"),
        ({"attention_of": [0] * 3}, "attention_of and dense must have one value a layer"),
        ({"dense": [0] * 3}, "attention_of and dense must have one value a layer"),
        ({"attention_of": [0, -2, 0, 0]}, "attention_of must be numbers of attentions, or -1"),
        ({"attention_of": [0, 0, 1, 0]}, "attention_of must be numbers of attentions"),
        ({"top_groups": 2}, "top_groups must be 1 to groups"),
        ({"groups": 2}, "expert_groups must have one list a layer"),
        ({"groups": 2, "expert_groups": [[0] * 16] * 3 + [[0] * 15]}, "expert_groups must have one value an expert"),
        ({"groups": 2, "expert_groups": [[0] * 15 + [2]] * 4}, "an expert's group is not one of groups"),
    ],
)
def test_the_engine_refuses_layers_that_cannot_be(changes, message):
    c = engine_config(CONFIG, 64, 16)
    for name, values in changes.items():
        setattr(c, name, values)
    with pytest.raises(ValueError, match=message):
        _core.engine_memory(c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_frequency": [1.0]}, "rope_frequency must have one value a pair of rope_dim, which is at most head_dim"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"query_context": 0}, "query_context must be at least 1"),
        ({"query_context": 32, "query_scales": [1.0]}, "query_scales must have a value for every position"),
    ],
)
def test_the_engine_refuses_attention_that_cannot_be(changes, message):
    c = engine_config(CONFIG, 64, 16)
    attention = c.attentions[0]
    for name, values in changes.items():
        setattr(attention, name, values)
    c.attentions = [attention]
    with pytest.raises(ValueError, match=message):
        _core.engine_memory(c)


# ---- a token's working set


def test_a_working_set_is_top_k_records_of_mean_size_in_every_layer():
    p = plan(10**9)
    assert p.working_set_experts == 4 * 4  # layers of top 4
    assert p.working_set_bytes == 16 * SLOT
    kept = (tuple(range(16)), (1, 5, 9), tuple(range(0, 16, 2)), (0, 1))
    config = replace(CONFIG, kept=kept, layer_top_k=(2, 3, 1, 2))
    sizes = {"trunk_bytes": 2_000_000, "slot_bytes": SLOT, "all_experts_bytes": 29 * 100_000 + 7}
    p = make_plan(config, ram_bytes=10**9, context=512, interpreter_bytes=40_000_000, **sizes)
    assert p.working_set_experts == 2 + 3 + 1 + 2
    assert p.working_set_bytes == 800_002  # 8/29 of 2,900,007, rounded


def test_layers_without_experts_are_no_part_of_a_working_set():
    p = make_plan(
        replace(CONFIG, layers=(*[replace(CONFIG.layers[0], mlp=Dense(512))] * 2, *CONFIG.layers[2:])),
        ram_bytes=10**9, context=512, interpreter_bytes=40_000_000, **SIZES,
    )  # fmt: skip
    assert p.working_set_experts == 2 * 4


def test_a_plan_knows_whether_its_slots_hold_a_working_set():
    floor = plan(1, refuse=False).floor_bytes
    for extra in range(0, 9_000_000, 100_000):
        p = plan(floor + extra)
        assert p.holds_working_set == (p.resident or p.slots >= 16)
    mixed = plan(floor + 5 * SLOT, all_experts_bytes=RECORDS * SLOT // 2)
    assert mixed.working_set_bytes == 8 * SLOT and mixed.holds_working_set  # 16 of half the largest's size
    assert not plan(floor).holds_working_set and plan(10**9).holds_working_set


@given(
    cap=st.integers(1, 80_000_000),
    context=st.integers(1, 1024),
    rows=st.integers(1, 64),
    more=st.integers(0, 10**7),
    mean=st.integers(SLOT // 8, SLOT),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_cap_that_a_plan_names_holds_a_working_set_and_so_does_every_larger_one(cap, context, rows, more, mean):
    options = {"logits_rows": min(rows, context), "all_experts_bytes": RECORDS * mean}
    named = plan(cap, context, refuse=False, **options).working_set_cap_bytes
    assert plan(named, context, **options).holds_working_set
    assert plan(named + more, context, **options).holds_working_set


def test_the_cap_named_is_not_far_above_the_least():
    p = plan(1, refuse=False)
    least = p.floor_bytes + 12 * SLOT  # the floor has 4 of the 16 slots
    assert least <= p.working_set_cap_bytes <= least + 16 * SLOT / 7


def test_slots_below_a_working_set_are_a_warning_that_names_a_cap():
    p = plan(plan(1, refuse=False).floor_bytes + 3 * SLOT)
    cap = p.working_set_cap_bytes
    text = plan_text(p)
    assert "working set      1.8 MB  the 16 experts that one token uses\n" in text
    assert text.endswith(
        "\n\nwarning: slots for about 7 experts do not hold a token's working set of 16,\n"
        f"so every token reads from storage; a cap of {cap / 1e6:.1f} MB holds it"
    )
    for quiet in (plan(cap), plan(10**9), plan(1, refuse=False)):
        assert "warning" not in plan_text(quiet)


def test_a_plan_as_a_dictionary_has_its_total():
    p = plan(10**9)
    assert (
        p.as_dict()["total_bytes"]
        == p.total_bytes
        == sum(
            p.as_dict()[f"{part}_bytes"]
            for part in ("trunk", "kv_cache", "scratch", "io_buffers", "interpreter", "experts")
        )
    )


# ---- refusing


def test_a_cap_below_the_floor_is_refused_with_one_that_works():
    with pytest.raises(MemoryError) as caught:
        plan(48_999_999)
    p = plan(1, refuse=False)
    named = -(-p.floor_bytes // 1_000_000)
    assert str(caught.value) == (
        f"a cap of 48 MB is below the floor of {named} MB (trunk 2, KV cache 1, interpreter 52, scratch 1 MB, "
        "the rest for slots); raise the cap, or lower the context (512 tokens) or the widths"
    )
    assert plan(named * 1_000_000).slots >= 4


def test_a_cap_below_what_loading_already_took_is_refused():
    loaded = plan(10**9).resident_bytes + 5_000_000
    assert plan(loaded, loading_bytes=loaded).floor_bytes == loaded
    with pytest.raises(MemoryError) as caught:
        plan(loaded - 1, loading_bytes=loaded)
    assert f"below the floor of {-(-loaded // 1_000_000)} MB" in str(caught.value)


TRY = """
import json, sys
from edge_moe import Runtime
try:
    with Runtime(sys.argv[1], int(sys.argv[2]), 256) as runtime:
        answer = runtime.generate([1, 2, 3], 8)
    print(json.dumps([runtime.plan.slots, answer.peak_memory_bytes, answer.tokens]))
except MemoryError as error:
    print(json.dumps(str(error)))
"""


def test_the_floor_that_a_refusal_names_runs_in_a_new_process(bundle_of):
    path = bundle_of("reference", bits=16)
    refusal = json.loads(run_python(TRY, path, 1_000_000).stdout)
    assert refusal.startswith("a cap of 1 MB is below the floor of ")
    named = int(refusal.split("floor of ")[1].split(" MB")[0]) * 1_000_000
    cap = named + 1_000_000  # by so much does one start of the interpreter differ from the next
    slots, peak, tokens = json.loads(run_python(TRY, path, cap).stdout)
    assert 4 <= slots <= 9
    assert peak <= cap
    with Runtime(path, "8GB", 256) as runtime:
        assert tokens == runtime.generate([1, 2, 3], 8).tokens


@pytest.mark.parametrize("ram_bytes", [60_000_000, 10**9])
def test_a_gpu_has_a_buffer_for_each_reader_even_where_all_fits(ram_bytes):
    cpu, cuda = plan(ram_bytes), plan(ram_bytes, device="cuda")
    assert cpu.resident == cuda.resident == (ram_bytes == 10**9)
    assert cuda.io_buffers_bytes == READERS * (READER_BYTES + SLOT)
    assert cuda.total_bytes <= ram_bytes
    assert plan(cuda.floor_bytes, device="cuda").total_bytes <= cuda.floor_bytes
    with pytest.raises(MemoryError):
        plan(cuda.floor_bytes - 1, device="cuda")
