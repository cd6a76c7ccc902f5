"""Gated delta nets and short convolutions: kernels, and states that are rewound, shared, kept across failures and
counted by the plan."""

import json
import shutil

import numpy as np
import pytest
from bundles import ALL, LAST, make_engine, run_engine, same_bits
from golden_checkpoints import write_checkpoint
from test_checkpoint import read_file, write_file

from edge_moe import _core
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import load_config, parse_config
from edge_moe.runtime.layers.delta_net import convolve, delta_rule
from edge_moe.runtime.runtime import Runtime

NAMES = ("qwen3_next", "qwen3_5_moe", "lfm2_moe", "nemotron_h", "qwen4_exp_text")
SIZES = [(1, 4, 8), (3, 24, 16), (9, 16, 40), (70, 128, 128), (5, 7, 3), (2, 33, 65)]  # tokens, head_dim, v_dim


def head(tokens: int, head_dim: int, v_dim: int):
    random = np.random.default_rng(tokens)
    q, k, v = (random.standard_normal((tokens, size), np.float32) for size in (head_dim, head_dim, v_dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    write, decay = random.random((2, tokens), np.float32)
    return q, k, v, write, decay, random.standard_normal((head_dim, v_dim), np.float32)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", _core.kernel_names())
def test_the_recurrence_has_the_same_bits_in_every_kernel_set_and_split(name, sizes):
    q, k, v, write, decay, state = head(*sizes)
    for before in (state, state[:0]):
        want, after = _core.delta_rule("scalar", q, k, v, write, decay, before)
        got, its = _core.delta_rule(name, q, k, v, write, decay, before)
        assert same_bits(got, want) and same_bits(its, after)
        parts, at = [], before
        for t in range(len(q)):
            one = slice(t, t + 1)
            part, at = _core.delta_rule(name, q[one], k[one], v[one], write[one], decay[one], at)
            parts.append(part)
        assert same_bits(np.concatenate(parts), want) and same_bits(at, after)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_recurrence_is_the_reference_s(sizes):
    q, k, v, write, decay, state = head(*sizes)
    want = delta_rule(*(x[None, :, None].astype(np.float64) for x in (q, k, v, write, decay)))[0, :, 0]
    got, _ = _core.delta_rule("scalar", q, k, v, write, decay, state[:0])
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", _core.kernel_names())
@pytest.mark.parametrize(
    ("tokens", "channels", "kernel"), [(1, 5, 4), (2, 48, 4), (40, 100, 3), (6, 16, 1), (4, 33, 2)]
)
def test_the_convolution_has_the_same_bits_in_every_kernel_set_and_split(name, tokens, channels, kernel):
    random = np.random.default_rng(7)
    x, weights = random.standard_normal((tokens, channels), np.float32), random.standard_normal((kernel, channels))
    weights, none = weights.astype(np.float32), np.zeros((0, channels), np.float32)
    y = convolve(x[None].astype(np.float64), weights)[0]
    want, after = _core.convolve("scalar", x, weights, none, 0, channels)
    np.testing.assert_allclose(want, y / (1 + np.exp(-y)), rtol=0, atol=1e-5)
    linear, _ = _core.convolve("scalar", x, weights, none, 0, channels, silu=False)
    np.testing.assert_allclose(linear, y, rtol=0, atol=1e-5)
    assert same_bits(_core.convolve(name, x, weights, none, 0, channels, silu=False)[0], linear)
    assert same_bits(after, np.concatenate([np.zeros((kernel, channels), np.float32), x])[-(kernel - 1) or 99 :])
    got, its = _core.convolve(name, x, weights, none, 0, channels)
    assert same_bits(got, want) and same_bits(its, after)
    past, parts = none, []
    for t in range(tokens):
        part, past = _core.convolve(name, x[t : t + 1], weights, past, 0, channels)
        parts.append(part)
    assert same_bits(np.concatenate(parts), want) and same_bits(past, after)
    some, _ = _core.convolve(name, x, weights, none, 2, channels - 1)
    assert same_bits(some[:, 2:-1], want[:, 2:-1])
    assert same_bits(some[:, :2], x[:, :2]) and same_bits(some[:, -1:], x[:, -1:])


@pytest.fixture(params=NAMES)
def bundle(request, mixed, golden):
    """A bundle, 32 token ids, and the logits of these in one pass."""
    path, ids = mixed(request.param), golden[request.param][1].astype(np.int32)
    return path, ids, run_engine(make_engine(path), ids)


def test_a_sequence_is_rewound_to_the_latest_snapshot_before(bundle):
    path, ids, want = bundle
    engine = make_engine(path, snapshots=2)
    for first, last in ((0, 5), (5, 12), (12, 20)):
        engine.forward(ids[first:last], LAST)
        engine.snapshot()
    assert [engine.restorable(n) for n in (20, 19, 12, 11, 1)] == [20, 12, 12, 0, 0]  # 5 was the least recently used
    engine.forward(ids[20:25], LAST)
    assert engine.truncate(24) == 20
    assert same_bits(engine.forward(ids[20:], ALL), want[20:])
    assert engine.truncate(15) == 12 == engine.position
    assert engine.restorable(11) == 0
    assert same_bits(engine.forward(ids[12:20], ALL), want[12:20])
    assert engine.truncate(3) == 0 == engine.position
    assert same_bits(engine.forward(ids, ALL), want)
    assert engine.restorable(20) == 0  # the snapshots were of other positions' future


def test_without_snapshots_a_sequence_starts_over(bundle):
    path, ids, want = bundle
    engine = make_engine(path)
    engine.forward(ids[:9], LAST)
    engine.snapshot()
    assert engine.restorable(9) == 9
    engine.forward(ids[9:12], LAST)
    assert engine.truncate(10) == 0
    assert same_bits(engine.forward(ids, ALL), want)


def test_a_prefix_is_copied_with_its_state(bundle):
    path, ids, want = bundle
    engine = make_engine(path, sequences=3, snapshots=2)
    engine.forward(ids[:10], LAST, sequence=1)
    engine.snapshot(sequence=1)
    engine.forward(ids[10:20], LAST, sequence=1)
    engine.forward(ids[::-1][:7].copy(), LAST, sequence=2)
    engine.snapshot(sequence=2)
    for positions in (20, 10, 0):
        engine.copy_positions(1, 2, positions)
        assert same_bits(engine.forward(ids[positions:], ALL, sequence=2), want[positions:])
        assert engine.restorable(7, sequence=2) == 0
    with pytest.raises(ValueError, match="the state of that position is not there any more"):
        engine.copy_positions(1, 2, 15)
    assert same_bits(engine.forward(ids[20:], ALL, sequence=1), want[20:])


def test_a_step_that_fails_leaves_the_states_as_they_were(bundle):
    path, ids, want = bundle
    top_k = Bundle.open(path).config.top_k
    engine = make_engine(path, slots=top_k, sequences=2)
    engine.step([(0, ids[:6], LAST), (1, ids[:4], LAST)])
    for after in range(0, 12, 3):
        engine.inject("error", after=after)
        with pytest.raises(OSError):
            engine.step([(0, ids[6:], ALL), (1, ids[4:8], LAST)])
        engine.clear_faults()
    assert same_bits(engine.forward(ids[6:], ALL), want[6:])
    assert same_bits(engine.forward(ids[4:], ALL, sequence=1), want[4:])


def test_many_sequences_and_snapshots_share_the_buffers(bundle):
    path, ids, want = bundle
    engine, random = make_engine(path, sequences=3, snapshots=3), np.random.default_rng(3)
    at = [0, 0, 0]
    for _ in range(60):
        sequence = int(random.integers(3))
        if random.random() < 0.3 or at[sequence] == len(ids):
            wanted = int(random.integers(at[sequence] + 1))
            assert engine.restorable(wanted, sequence=sequence) <= wanted
            at[sequence] = engine.truncate(wanted, sequence=sequence)
            continue
        count = int(random.integers(1, 1 + min(6, len(ids) - at[sequence])))
        rows = engine.forward(ids[at[sequence] : at[sequence] + count], ALL, sequence=sequence)
        assert same_bits(rows, want[at[sequence] : at[sequence] + count])
        at[sequence] += count
        if random.random() < 0.5:
            engine.snapshot(sequence=sequence)


def test_tokens_cannot_be_protected_where_no_attention_is_received(bundle):
    engine = make_engine(bundle[0])
    with pytest.raises(ValueError, match="only attention with keys in every layer tells"):
        engine.set_prune("ratio", [0.5] * Bundle.open(bundle[0]).config.layer_count, 0.0, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_answers_after_other_turns_are_those_of_a_fresh_run(mixed, golden, name):
    path, ids = mixed(name), golden[name][1].tolist() * 4
    end = load_config(golden[name][0]).eos_tokens[0]
    ids = [token for token in ids if token != end]
    first = [*ids[:40], end, *ids[40:44]]  # a turn that has ended, and what opens the answer
    prompts = [first, first, [*ids[:40], end, *ids[50:90]], [*ids[:20], *ids[60:100]], [*ids[:20], *ids[30:70]], first]

    def fresh(prompt):
        with Runtime(path, context=128) as runtime:
            return runtime.generate(prompt, 8).tokens

    with Runtime(path, context=128) as runtime:
        found = []
        for prompt in prompts:
            answer = runtime.generate(prompt, 8)
            assert answer.tokens == fresh(prompt)
            found.append(answer.cached_tokens)
    # the end of the first turn serves the next two prompts; then the place where others depart from it
    assert found == [0, 41, 41, 0, 20, 20]
    with Runtime(path, context=128, sequences=2) as runtime:
        answers = runtime.batch(prompts, 8)
    assert [answer.tokens for answer in answers] == [fresh(prompt) for prompt in prompts]


def test_the_plan_counts_states_that_do_not_grow(mixed, golden):
    path = mixed("qwen3_next")
    with Runtime(path, context=64) as short, Runtime(path, context=128) as long:
        plans = short.plan, long.plan
        # Of three layers: six heads of (24, 16), and three inputs of 2 * 2 * 24 + 6 * 16 channels; two of each, and two
        # snapshots.
        assert plans[0].state_bytes == plans[1].state_bytes == 3 * 4 * 4 * (6 * 24 * 16 + 3 * 192)
        assert plans[1].kv_cache_bytes == 2 * plans[0].kv_cache_bytes == 128 * 2 * 2 * 24 * 2
        assert plans[1].state_saves_bytes == 3 * plans[1].kv_cache_bytes
    with Runtime(mixed("lfm2_moe"), context=128) as runtime:  # three layers with two inputs of 64 channels
        assert runtime.plan.state_bytes == 3 * 4 * 4 * 2 * 64
        assert runtime.plan.state_saves_bytes == 3 * runtime.plan.kv_cache_bytes
    assert "in place of 36.9 kB of KV cache; 2 to go on from; the same for any context" in str(plans[0])


def test_projections_that_are_stored_together_or_apart_are_the_same(tmp_path):
    """qwen3_next has in_proj_qkvz and in_proj_ba; apart, as qwen3_5_moe has them."""
    source, _, _ = write_checkpoint("qwen3_next", tmp_path / "together")
    apart = tmp_path / "apart"
    shutil.copytree(source, apart)
    tensors = read_file(source / "model.safetensors")

    def split(name: str, sizes: dict[str, int]) -> None:
        """Split a tensor by its rows, so many of each part in turn for each key head."""
        dtype, (_, dim), data = tensors.pop(name)
        of_heads = np.frombuffer(data, "<u2").reshape(2, -1, dim)
        ends = np.cumsum(list(sizes.values()))[:-1]
        for part, rows in zip(sizes, np.split(of_heads, ends, axis=1), strict=True):
            its = rows.reshape(-1, dim)
            tensors[name.replace("qkvz", part).replace("ba", part)] = dtype, list(its.shape), its.tobytes()

    for layer in (0, 2, 3):
        at = f"model.layers.{layer}.linear_attn.in_proj_"
        split(f"{at}qkvz.weight", {"q": 24, "k": 24, "v": 48, "z": 48})
        split(f"{at}ba.weight", {"b": 3, "a": 3})
        parts = [tensors.pop(f"{at}{part}.weight") for part in "qkv"]
        tensors[f"{at}qkv.weight"] = parts[0][0], [192, 64], b"".join(data for _, _, data in parts)
    write_file(apart / "model.safetensors", tensors)
    ours, theirs = Checkpoint(source), Checkpoint(apart)
    assert ours.trunk_names() == theirs.trunk_names()
    for name in ours.trunk_names():
        assert same_bits(ours.trunk(name), theirs.trunk(name))


def test_an_interval_or_a_list_tells_the_kinds_of_layers(golden):
    raw = json.loads((golden["qwen3_5_moe_text"][0] / "config.json").read_text())
    del raw["layer_types"]
    assert parse_config({**raw, "full_attention_interval": 2}).recurrent_layers == (0,)
    assert parse_config({**raw, "full_attention_interval": 1}).recurrent_layers == ()
    assert parse_config({**raw, "num_hidden_layers": 8}).recurrent_layers == (0, 1, 2, 4, 5, 6)
