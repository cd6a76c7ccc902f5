"""DeepSeek-V4's attention: a window of rows, and compressed rows of which an index may choose."""

import numpy as np
import pytest
from bundles import ALL, make_engine, run_engine, same_bits, write_lossless
from mutated_bundles import sign
from test_sequences import alone, requests

from edge_moe import _core
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.bundle_records import TRUNK_FILE
from edge_moe.runtime.engine_config import KV_TYPES, engine_config, engine_memory
from edge_moe.runtime.reference import forward
from edge_moe.runtime.tensorfile import read_header

NAME, CONTEXT = "deepseek_v4", 160  # 40 rows of 4 tokens, 20 of 8; an index chooses 3; the window has 7


@pytest.fixture(scope="module")
def bundle(golden, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "b.emoe"
    return compress(golden[NAME][0], out, method="rtn", bits=8, trunk_width=8).path


@pytest.fixture(scope="module")
def run(bundle, golden):
    """150 token ids and their logits, in one step."""
    ids = np.random.default_rng(2).integers(0, golden[NAME][2].shape[1], 150).astype(np.int32)
    return ids, run_engine(make_engine(bundle, context=CONTEXT, chunk=CONTEXT), ids, CONTEXT)


def run_forward(engine, ids, step: int = 16, sequence: int = 0) -> np.ndarray:
    steps = range(0, len(ids), step)
    return np.concatenate([engine.forward(ids[at : at + step], ALL, sequence=sequence) for at in steps])


@pytest.mark.parametrize("kv", KV_TYPES)
def test_no_chunk_kernel_or_thread_changes_a_bit(bundle, run, kv):
    ids, want = run
    if kv == "float16":
        want = run_engine(make_engine(bundle, context=CONTEXT, chunk=CONTEXT, kv=kv), ids, CONTEXT)
    for kernels in _core.kernel_names():
        for chunk, threads in ((16, 1), (7, 2), (1, 2), (33, 3)):
            engine = make_engine(bundle, context=CONTEXT, chunk=chunk, threads=threads, kv=kv, kernels=kernels)
            assert same_bits(run_engine(engine, ids, chunk), want)


def test_a_context_that_needs_no_index_gives_the_bits_of_one_that_has_it(bundle, run):
    """In 12 tokens there are 3 rows of 4, as many as an index chooses."""
    ids, want = run
    config = Bundle.open(bundle).config
    assert {its.index_heads for its in engine_config(config, 15, 4).attentions} == {0}
    assert {its.index_heads for its in engine_config(config, 16, 4).attentions} == {0, 9}
    assert same_bits(run_engine(make_engine(bundle, context=15, chunk=4), ids[:15], 4), want[:15])


def test_random_steps_rewinds_and_snapshots_change_no_bit(bundle, run):
    ids, want = run
    for seed in range(4):
        random, at = np.random.default_rng(seed), 0
        engine = make_engine(bundle, context=CONTEXT, chunk=16, snapshots=seed)
        for _ in range(60):
            if random.random() < 0.25 or at == len(ids):
                wanted = max(0, at - int(random.integers(0, 60 if random.random() < 0.5 else 8)))
                left = engine.restorable(wanted)
                at = engine.truncate(wanted)
                assert at == left <= wanted
                continue
            count = int(random.integers(1, 1 + min(16, len(ids) - at)))
            assert same_bits(engine.forward(ids[at : at + count], ALL), want[at : at + count])
            at += count
            if random.random() < 0.2:
                engine.snapshot()


def test_a_prefix_is_copied_with_its_rows_and_their_sums(bundle, run):
    ids, want = run
    engine = make_engine(bundle, context=CONTEXT, chunk=16, snapshots=1, sequences=2)
    run_forward(engine, ids[:79])  # a row of 4 and one of 8 are not whole
    engine.snapshot()
    run_forward(engine, ids[79:131])
    run_forward(engine, ids[::-1][:90], sequence=1)
    for positions in (131, 79, 0):
        engine.copy_positions(0, 1, positions)
        assert same_bits(run_forward(engine, ids[positions:], sequence=1), want[positions:])
    assert same_bits(run_forward(engine, ids[131:]), want[131:])


def test_a_step_that_fails_leaves_rows_and_sums_as_they_were(bundle, run):
    ids, want = run
    engine = make_engine(bundle, context=CONTEXT, chunk=16, slots=Bundle.open(bundle).config.top_k)
    run_forward(engine, ids[:70])
    for after in range(0, 9, 2):
        engine.inject("error", after=after)
        with pytest.raises(OSError):
            engine.forward(ids[70:86], ALL)
        engine.clear_faults()
    assert same_bits(run_forward(engine, ids[70:]), want[70:])


def test_several_sequences_have_rows_of_their_own(bundle):
    asked = requests(128, 3, seed=5)
    engine = make_engine(bundle, context=CONTEXT, chunk=16, sequences=3)
    got: list[list[np.ndarray]] = [[], [], []]
    for at in range(0, max(len(request.ids) for request in asked), 5):
        its = [np.asarray(request.ids[at : at + 5], np.int32) for request in asked]
        parts = [(sequence, ids, ALL) for sequence, ids in enumerate(its) if len(ids)]
        rows = engine.step(parts)
        for sequence, ids, _ in parts:
            got[sequence].append(rows[: len(ids)])
            rows = rows[len(ids) :]
    for request, rows in zip(asked, got, strict=True):
        assert same_bits(np.concatenate(rows), alone(bundle, request, context=CONTEXT, chunk=CONTEXT))


def test_the_engine_agrees_with_the_reference_where_an_index_chooses(golden, tmp_path, run):
    """With matrices of floats, at 150 tokens: 37 rows of 4, of which 3 are chosen."""
    ids, _ = run
    checkpoint = Checkpoint(golden[NAME][0])
    path = write_lossless(tmp_path / "b.emoe", golden[NAME][0], checkpoint.config, checkpoint)
    want = forward(checkpoint.config, checkpoint, ids[None])[0]
    got = run_engine(make_engine(path, context=CONTEXT, chunk=16), ids, 16)
    assert np.abs(got - want).max() < 1e-4
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def test_the_cache_grows_with_compressed_rows_alone(bundle):
    """By hand, in values, with steps of 16 tokens; rows and keys are in whole blocks of 16."""
    config = Bundle.open(bundle).config
    windows = 5 * 32 * 28  # 7 - 1 + 16 rows of each layer
    rows, keys = 2 * (48 + 32) * 28, 2 * 48 * 20  # two layers for 40 rows of 4 tokens, two for 20 of 8
    assert engine_memory(config, 160, 16)[0] == 2 * (windows + rows + keys)
    rows, keys = 2 * (80 + 48) * 28, 2 * 80 * 20  # 80 and 40
    assert engine_memory(config, 320, 16)[0] == 2 * (windows + rows + keys)


def test_a_table_that_names_no_expert_is_refused(copy_of):
    path = copy_of(NAME, bits=8)
    trunk = path / TRUNK_FILE
    at = read_header(trunk)["layers.0.router_table"].offset
    data = bytearray(trunk.read_bytes())
    data[at : at + 4] = np.float32(8).tobytes()
    trunk.write_bytes(data)
    sign(path)
    with pytest.raises(_core.DamagedFile, match="router_table has 8.000000, not an expert"):
        make_engine(path, context=CONTEXT, chunk=16)
