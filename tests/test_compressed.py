"""DeepSeek-V4's attention, a window of rows and compressed rows of which an index may choose, and its mixed streams."""

import math

import numpy as np
import pytest
from bundles import ALL, check_rewinds, logits_of, make_engine, run_engine, run_on, same_bits, write_lossless
from mutated_bundles import sign
from test_sequences import alone, requests

from edge_moe import _core
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.bundle_records import TRUNK_FILE
from edge_moe.runtime.engine_config import KV_TYPES, engine_config, engine_memory
from edge_moe.runtime.layers.hyper import HyperConnections
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
        check_rewinds(make_engine(bundle, context=CONTEXT, chunk=16, snapshots=seed), ids, want, seed, 60)


def test_a_prefix_is_copied_with_its_rows_and_their_sums(bundle, run):
    ids, want = run
    engine = make_engine(bundle, context=CONTEXT, chunk=16, snapshots=1, sequences=2)
    run_on(engine, ids[:79])  # a row of 4 and one of 8 are not whole
    engine.snapshot()
    run_on(engine, ids[79:131])
    run_on(engine, ids[::-1][:90], sequence=1)
    for positions in (131, 79, 0):
        engine.copy_positions(0, 1, positions)
        assert same_bits(run_on(engine, ids[positions:], sequence=1), want[positions:])
    assert same_bits(run_on(engine, ids[131:]), want[131:])


def test_a_step_that_fails_leaves_rows_and_sums_as_they_were(bundle, run):
    ids, want = run
    engine = make_engine(bundle, context=CONTEXT, chunk=16, slots=Bundle.open(bundle).config.top_k)
    run_on(engine, ids[:70])
    for after in range(0, 9, 2):
        engine.inject("error", after=after)
        with pytest.raises(OSError):
            engine.forward(ids[70:86], ALL)
        engine.clear_faults()
    assert same_bits(run_on(engine, ids[70:]), want[70:])


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
    windows = 5 * 32 * 24  # 7 - 1 + 16 rows of each layer
    rows, keys = 2 * (48 + 32) * 24, 2 * 48 * 20  # two layers for 40 rows of 4 tokens, two for 20 of 8
    assert engine_memory(config, 160, 16)[0] == 2 * (windows + rows + keys)
    rows, keys = 2 * (80 + 48) * 24, 2 * 80 * 20  # 80 and 40
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


@pytest.mark.parametrize("weight", [0.0, -0.0])
def test_ties_go_to_the_lower_row(golden, tmp_path, weight):
    """If the index's heads weigh nothing, all rows score alike, and the first ones are chosen."""
    directory = golden[NAME][0]

    class Indifferent(Checkpoint):
        def trunk(self, name):
            values = super().trunk(name)
            return np.full_like(values, weight) if name.endswith("index.weights") else values

    weights, ids = Indifferent(directory), np.random.default_rng(3).integers(0, 128, 60)
    path = write_lossless(tmp_path / "lossless.emoe", directory, weights.config, weights)
    want = forward(weights.config, weights, ids)
    assert np.abs(logits_of(path, ids) - want).max() <= 1e-4


# ---- the definitions


@pytest.mark.parametrize(("layer", "name", "size"), [(1, "pool", 24), (1, "index", 20), (2, "pool", 24)])
def test_a_compressed_row_is_a_mean_weighted_by_a_softmax_in_each_dimension(golden, layer, name, size):
    """Value by value, for 27 tokens, of which the last three are in no whole stretch."""
    checkpoint = Checkpoint(golden[NAME][0])
    its, h = checkpoint.config.layers[layer].attention, np.random.default_rng(1).standard_normal((1, 27, 64))
    whole = 27 // its.rate

    def trunk(part):
        return checkpoint.trunk(f"layers.{layer}.{part}").astype(np.float64)

    got = its.compressed(trunk, lambda part, x: x @ trunk(part).T, h, name, size, 1e-3)[0]
    kv, gate, bias = (trunk(f"{name}.{part}") for part in ("kv", "gate", "bias"))
    norm, (cos, sin) = trunk("pool.norm" if name == "pool" else "index.k_norm"), its.rope.tables(27)
    for row in range(whole):
        mean = np.zeros(size)
        for column in range(size):
            logits, values = [], []
            for token in range((row - its.overlapped) * its.rate, (row + 1) * its.rate):
                if token < 0:
                    continue
                at = column + size * (its.overlapped and token >= row * its.rate)
                logits.append(h[0, token] @ gate[at] + bias[token % its.rate, at])
                values.append(h[0, token] @ kv[at])
            share = np.exp(np.array(logits) - max(logits))
            mean[column] = share @ values / share.sum()
        wanted = mean / math.sqrt((mean**2).mean() + 1e-3) * norm
        for pair in range(6):  # of the last 12 dimensions
            a, b = wanted[size - 12 + 2 * pair : size - 10 + 2 * pair]
            c, s = cos[row * its.rate, pair], sin[row * its.rate, pair]
            wanted[size - 12 + 2 * pair : size - 10 + 2 * pair] = a * c - b * s, b * c + a * s
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-6)


def test_no_stretch_is_whole_in_fewer_tokens(golden):
    checkpoint = Checkpoint(golden[NAME][0])
    its = checkpoint.config.layers[2].attention
    h = np.zeros((1, 7, 64))
    assert its.compressed(None, lambda part, x: x @ checkpoint.trunk(f"layers.2.{part}").T, h, "pool", 24, 1e-3) is None


def test_a_query_sees_the_rows_whose_stretches_are_over(golden):
    checkpoint = Checkpoint(golden[NAME][0])
    heavy, sparse = (checkpoint.config.layers[at].attention for at in (2, 1))
    h = np.random.default_rng(4).standard_normal((2, 40, 64)).astype(np.float32)

    def weights_of(layer):
        def trunk(part):
            return checkpoint.trunk(f"layers.{layer}.{part}")

        return trunk, lambda part, x: x @ trunk(part).T

    every = heavy._visible(*weights_of(2), h, None, 1e-3, np)
    assert every.shape == (40, 5)
    assert every.sum(-1).tolist() == [(query + 1) // 8 for query in range(40)]
    latent = np.random.default_rng(5).standard_normal((2, 40, 32)).astype(np.float32)
    chosen = sparse._visible(*weights_of(1), h, latent, 1e-3, np)
    assert chosen.shape == (2, 40, 10)
    assert (chosen.sum(-1) == np.minimum((np.arange(40) + 1) // 4, 3)).all()
    assert not chosen[:, np.arange(40)[:, None] < 4 * np.arange(10) + 3].any()
    assert (chosen[0, 20:] != chosen[1, 20:]).any()


def test_the_weights_of_a_mix_are_balanced():
    """The sums of columns, which are balanced last, are one; those of rows nearly, after twenty times."""
    its, dim, random = HyperConnections(4, 20, 1e-6), 8, np.random.default_rng(3)
    shapes = its.shapes("attention", dim)
    assert shapes == {
        "attention_norm": (8,),
        "attention_mix.weights": (24, 32),
        "attention_mix.base": (24,),
        "attention_mix.scale": (3,),
    }
    assert its.shapes("output", dim, shares=False)["output_mix.weights"] == (4, 32)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights = type("", (), {"trunk": staticmethod(tensors.__getitem__)})
    x = random.standard_normal((5, 32)).astype(np.float32)
    mixing = its.mixing(weights, "attention", x, 1e-6)
    np.testing.assert_allclose(mixing.sum(-2), 1, atol=1e-5)
    np.testing.assert_allclose(mixing.sum(-1), 1, atol=1e-2)
    shares = its.shares(weights, "attention", x, 1e-6)
    assert ((shares > 0) & (shares < 2)).all()
    y = random.standard_normal((5, 8)).astype(np.float32)
    wanted = [
        [sum(mixing[t, j, k] * x[t, 8 * j : 8 * j + 8] for j in range(4)) + shares[t, k] * y[t] for k in range(4)]
        for t in range(5)
    ]
    np.testing.assert_allclose(
        its.added(weights, "attention", x, y, 1e-6).reshape(5, 4, 8), wanted, rtol=1e-4, atol=1e-5
    )
