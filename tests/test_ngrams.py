"""Embeddings of n-grams: which rows a text needs, and a table that stays on disk, read row by row."""

import json

import numpy as np
import pytest
from bundles import ALL, make_engine, run_engine, same_bits, use, weights_of

from edge_moe import _core
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.layers.ngrams import NGrams, factors_of, primes_from
from edge_moe.runtime.runtime import Runtime

NAME = "qwen4_exp_text"


@pytest.fixture(scope="module")
def bundle(golden, tmp_path_factory):
    return compress(golden[NAME][0], tmp_path_factory.mktemp("ngrams") / "b.emoe", method="rtn", bits=8).path


# ---- which rows


def test_a_token_needs_a_row_for_each_hash_of_it_and_those_before():
    """By hand: 64-bit products with sign, exclusive or, and the rest of a division."""
    its = NGrams((3, 5, 7), ((11, 13), (17, 19)), 64, 4, end=0, conv_kernel=2)
    ids = np.array([[9, 4, 2]])
    first, second, third = 9 * 3, 4 * 3 ^ 9 * 5, 2 * 3 ^ 4 * 5
    pairs, triples = (first ^ 0, second, third), (first ^ 0 ^ 0, second ^ 0, third ^ 9 * 7)
    wanted = [[a % 11, a % 13 + 11, b % 17 + 24, b % 19 + 41] for a, b in zip(pairs, triples, strict=True)]
    np.testing.assert_array_equal(its.rows_of(ids)[0], wanted)


def test_no_ngram_reaches_beyond_the_end_of_a_text():
    its = NGrams((3, 5, 7), ((101,), (103,)), 204, 4, end=6, conv_kernel=2)
    whole, alone = its.rows_of(np.array([[8, 9, 6, 4, 2]])), its.rows_of(np.array([[4, 2]]))
    np.testing.assert_array_equal(whole[0, 3:], alone[0])
    assert (its.rows_of(np.array([[8, 9, 5, 4, 2]]))[0, 3:] != alone[0]).any()


def test_a_product_beyond_63_bits_wraps_around():
    factor = (1 << 62) + 1
    its = NGrams((factor, 1), ((1009,),), 1009, 4, end=0, conv_kernel=1)
    product = (5 * factor) & (1 << 64) - 1
    signed = product - (1 << 64) if product >> 63 else product
    assert its.rows_of(np.array([[5]]))[0, 0, 0] == signed % 1009


def test_factors_are_odd_numbers_of_splitmix64():
    """The first number of the generator with seed 0 is published: 0xE220A8397B1DCDAF."""
    half = ((1 << 63) - 1) // 2
    assert factors_of(1, 1, -0x9E3779B97F4A7C15, 0)[0] == 2 * (0xE220A8397B1DCDAF % half) + 1
    assert primes_from(20, 4) == [23, 29, 31, 37]


# ---- the table on disk


def test_a_row_is_what_rounding_to_nearest_makes_of_it(golden, bundle):
    checkpoint, made = Checkpoint(golden[NAME][0]), weights_of(bundle)
    for table in Bundle.open(bundle).tables:
        rows = np.array([0, 5, table.rows - 1, 5])
        wanted, got = checkpoint.rows(table.name, rows), made.rows(table.name, rows)
        step = (wanted.max(-1) - wanted.min(-1)) / 255
        assert table.encoding == ("affine", 8, 32)
        assert (np.abs(got - wanted).max(-1) <= 0.51 * step + 0.004 * np.abs(wanted).max(-1)).all()


def test_a_model_planned_for_a_context_has_its_embeddings(golden):
    source, ids, want = golden[NAME]
    checkpoint = Checkpoint(source)
    assert np.abs(reference.forward(checkpoint.config.planned(64), checkpoint, ids) - want).max() <= 1e-4


def test_rows_with_a_wrong_byte_are_refused_and_then_read_again(golden, bundle, tmp_path):
    """An engine that has met a damaged row goes on once the file is whole again."""
    table = Bundle.open(bundle).tables[0]
    original, ids = table.path.read_bytes(), golden[NAME][1]
    engine = make_engine(bundle)
    want = run_engine(engine, ids)
    damaged = bytearray(original)
    for row in range(table.rows):
        damaged[table.offset + row * table.row_bytes] ^= 1
    engine.truncate(0)
    try:
        table.path.write_bytes(damaged)
        with pytest.raises(_core.DamagedFile, match=r"row \d+ does not match its checksum; copy the bundle again"):
            engine.forward(np.asarray(ids, np.int32), ALL)
        assert engine.position == 0
        with pytest.raises(ValueError, match="row 0 does not match its checksum"):
            list(verify(Bundle.open(bundle)))
    finally:
        table.path.write_bytes(original)
    assert same_bits(run_engine(engine, ids), want)


def test_a_row_in_another_rows_place_is_refused(bundle):
    table = Bundle.open(bundle).tables[0]
    original = table.path.read_bytes()
    first, size = table.offset, table.row_bytes
    swapped = original[:first] + original[first + size : first + 2 * size] + original[first : first + size]
    try:
        table.path.write_bytes(swapped + original[first + 2 * size :])
        with pytest.raises(ValueError, match="row 0 does not match its checksum"):
            table.read(0, 2)
    finally:
        table.path.write_bytes(original)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tables: tables.pop(), "has 1 tables, config.json has 2"),
        (lambda tables: tables[0].update(bytes=12), "expected 12; copy the bundle again"),
        (lambda tables: tables[0].update(width=4), "bundle.json makes it"),
        (lambda tables: tables[0].update(name="../x"), "is not a file name"),
        (lambda tables: tables.reverse(), "is missing"),
    ],
)
def test_an_edited_list_of_tables_is_refused(bundle, change, message):
    from edge_moe.runtime.bundle_table import table_checksum

    file = bundle / "bundle.json"
    original = file.read_text()
    table = json.loads(original)
    change(table["tables"])
    table["checksum"] = table_checksum(table)
    try:
        file.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=message):
            Bundle.open(bundle)
    finally:
        file.write_text(original)


def test_a_missing_shard_is_named(golden, tmp_path):
    source = golden[NAME][0]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = (source / "model.safetensors").read_bytes().replace(b"shard_3.weight", b"shard_9.weight")
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="the 3 tensors .*shard_N.weight have .* rows, config.json has"):
        Checkpoint(tmp_path)


def test_a_table_is_on_disk_and_not_in_the_plan(golden, bundle):
    opened = Bundle.open(bundle)
    with Runtime(bundle, context=32) as runtime:
        plan = runtime.plan
        assert plan.table_bytes == opened.table_bytes == sum(table.path.stat().st_size for table in opened.tables)
        assert plan.table_rows == 8
        assert "tables of n-grams, of which a token reads 8 rows" in str(plan)
    assert use(bundle, golden[NAME][1][:8]).shape[0] == 8


def test_a_run_that_ends_between_two_tables_goes_on_with_the_second(golden, tmp_path):
    source, begun, out = golden[NAME][0], [], tmp_path / "b.emoe"

    class Stopped(Exception):
        pass

    def stop_at_the_second(step: str, done: int, of: int) -> None:
        if step == "tables":
            begun.append(done)
            if done == of:
                raise Stopped

    options = {"bits": 6, "tokens": 512, "calibration": (calibration(tmp_path, golden),), "certificate": False}
    with pytest.raises(Stopped):
        compress(source, out, progress=stop_at_the_second, **options)
    phases, told = [], []
    made = compress(
        source,
        out,
        progress=lambda step, done, of: told.append((done, of)) if step == "tables" else None,
        on_phase=lambda name, names: phases.append((name, names)),
        **options,
    )
    rows = [table.rows for table in made.tables]
    assert begun == [rows[0], sum(rows)] and told == [(sum(rows), sum(rows))]
    assert phases[-1][0] == "tables" == phases[-1][1][-1]
    for _ in verify(made):
        pass


def calibration(tmp_path, golden):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, golden[NAME][2].shape[1], 4096))
    return tmp_path / "ids.npy"
