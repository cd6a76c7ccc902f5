"""The CPU kernels: scalar against NumPy and MLX, every instruction set against scalar bit for bit."""

import ctypes
import mmap
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe import _core

PACKED_WIDTHS = [w for w in _core.WIDTHS if w < 16]
ALL_WIDTHS = [*_core.WIDTHS, 32]
SETS = _core.kernel_names()
FAST_SETS = [name for name in SETS if name != "scalar"]
BLOCK = 64  # inputs that share one activation scale


def bfloat16_bits(values):
    """Round float32 to bfloat16 (towards zero: any bfloat16 will do); the bits as uint16."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(codes, width):
    """codes (rows, cols) as one little-endian bit stream a row: uint8 (rows, cols*width/8)."""
    bits = (codes[..., None] >> np.arange(width)) & 1
    return np.packbits(bits.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


def random_matrix(rng, rows, cols, width, group):
    """A matrix as the kernels take it, and its values in float64: (codes, scales, biases), (rows, cols)."""
    if width >= 16:
        values = rng.standard_normal((rows, cols), np.float32)
        if width == 16:
            values = from_bfloat16(bfloat16_bits(values))
            codes = bfloat16_bits(values).view(np.uint8)
        else:
            codes = values.view(np.uint8)
        return (codes, np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.uint16)), values.astype(np.float64)
    codes = rng.integers(0, 2**width, (rows, cols))
    codes[0] = 2**width - 1  # the largest sums that a row can give
    scales = bfloat16_bits(rng.standard_normal((rows, cols // group)) / 2**width)
    biases = bfloat16_bits(rng.standard_normal((rows, cols // group)) / 2)
    spread = (np.repeat(from_bfloat16(part).astype(np.float64), group, axis=1) for part in (scales, biases))
    return (pack(codes, width), scales, biases), next(spread) * codes + next(spread)


def fma(a, b, c):
    """a * b + c of float32 values, rounded once."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    even = lambda value: int(value.view(np.uint32)) & 1  # noqa: E731
    return min(around, key=lambda value: (abs(Fraction(float(value)) - exact), even(value)))


def same_bits(a, b):
    """Equal bit for bit; all values that are not numbers count as one."""
    a, b = (np.where(np.isnan(y), np.float32(np.nan), y).view(np.uint32) for y in (a, b))
    return np.array_equal(a, b)


def spiky(rng, shape, factor=3000):
    """Random inputs (tokens, cols) of which one in a third of the blocks is `factor` times as large."""
    x = rng.standard_normal(shape, np.float32)
    for at in range(0, shape[1], BLOCK):
        x[rng.random(shape[0]) < 1 / 3, at + rng.integers(0, min(BLOCK, shape[1] - at))] *= np.float32(factor)
    return x


def rounded(x):
    """One vector by NumPy: codes and lows (blocks, 64), two_planes and scales (blocks,)."""
    blocks = np.zeros((-(-len(x) // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: len(x)] = x
    top = np.abs(blocks).max(1)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(top > 0, np.float32(127) / top, np.float32(0))[:, None]
    codes = np.rint(scaled)
    # The largest is more than 4 times the root mean square, both as codes.
    two_planes = (top > 0) & (4 * np.sqrt((codes**2).sum(1) / BLOCK) < 127)
    lows = np.where(two_planes[:, None], np.minimum(np.rint((scaled - codes) * 256), 127), 0)
    return codes, lows, two_planes, top / np.float32(127)


def activation_steps(x):
    """What one activation is rounded to a multiple of: (tokens, cols)."""
    steps = []
    for vector in x:
        _, _, two_planes, scales = rounded(vector)
        # With two planes 256 times as fine, but half a step of codes is 127 of those of the lows, not 128.
        steps.append(np.repeat(np.where(two_planes, scales / 128, scales), BLOCK)[: len(vector)])
    return np.array(steps, np.float64)


# ---- the format ----


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED_WIDTHS)
def test_dequantise_is_scale_times_code_plus_bias_in_float32(width, group):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 2**width, (5, 384))
    scales, biases = (bfloat16_bits(rng.standard_normal((5, 384 // group))) for _ in range(2))
    want = np.repeat(from_bfloat16(scales), group, 1) * codes.astype(np.float32)
    want = want + np.repeat(from_bfloat16(biases), group, 1)
    for name in SETS:
        got = _core.dequantise(name, pack(codes, width), scales, biases, width, 384)
        assert same_bits(got, want), name


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED_WIDTHS)
def test_dequantise_equals_mlx(width, group):
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(width)
    (codes, scales, biases), _ = random_matrix(rng, 6, 512, width, group)
    # With float32 scales that hold bfloat16 values MLX keeps the float32 result; with bfloat16 it rounds it.
    want = mx.dequantize(mx.array(codes.view(np.uint32)), mx.array(from_bfloat16(scales)),
                         mx.array(from_bfloat16(biases)), group_size=group, bits=width)  # fmt: skip
    assert same_bits(_core.dequantise("scalar", codes, scales, biases, width, 512), np.array(want))


@pytest.mark.parametrize("width", [16, 32])
def test_unpacked_widths_dequantise_to_their_values(width):
    matrix, values = random_matrix(np.random.default_rng(0), 3, 50, width, 32)
    for name in SETS:
        assert same_bits(_core.dequantise(name, *matrix, width, 50), values.astype(np.float32))


# ---- products ----


@pytest.mark.parametrize("width", ALL_WIDTHS)
def test_matmul_is_near_the_product_of_the_values(width):
    rng = np.random.default_rng(width)
    for group in _core.GROUPS if width < 16 else [32]:
        matrix, values = random_matrix(rng, 7, 384, width, group)
        x = np.concatenate([rng.standard_normal((2, 384), np.float32), spiky(rng, (4, 384), 30_000)])
        got = _core.matmul("scalar", *matrix, width, x).astype(np.float64)
        error = np.abs(got - x.astype(np.float64) @ values.T)
        # Every activation is at most half a step away. A float32 sum in 16 lanes is within (n/16 + 5)
        # roundings of the sum of its terms' sizes; so is one over blocks and their biases, 384/16 terms at the most.
        spread = np.abs(x) @ (np.abs(values).T + (8 if width < 16 else 0))
        bound = (384 / 16 + 5) * 2.0**-24 * spread
        if width < 16:
            bound += activation_steps(x) / 2 @ np.abs(values).T
        assert (error <= bound).all()


@pytest.mark.parametrize("width", PACKED_WIDTHS)
def test_matmul_is_exact_for_small_integers_times_a_power_of_two(width):
    rng = np.random.default_rng(width)
    x = rng.integers(-127, 128, (4, 256)).astype(np.float32) / 16
    x[:, ::BLOCK] = 127 / 16
    codes = rng.integers(0, 2**width, (20, 256))
    scales, biases = np.full((20, 4), 0.25, np.float32), np.full((20, 4), -2.0, np.float32)
    want = x.astype(np.float64) @ (0.25 * codes - 2.0).T
    for name in SETS:
        got = _core.matmul(name, pack(codes, width), bfloat16_bits(scales), bfloat16_bits(biases), width, x)
        assert np.array_equal(got, want), name


@pytest.mark.parametrize("width", PACKED_WIDTHS)
def test_matmul_is_the_sum_that_its_contract_says(width):
    rng = np.random.default_rng(width)
    for group in _core.GROUPS:
        x = spiky(rng, (3, 256), 30)
        codes = rng.integers(0, 2**width, (4, 256))
        codes[0] = 2**width - 1
        parts = [bfloat16_bits(rng.standard_normal((4, 256 // group))) for _ in range(2)]
        scales, biases = (from_bfloat16(part) for part in parts)
        want, planes = np.zeros((3, 4), np.float32), set()
        for t, vector in enumerate(x):
            inputs, lows, two_planes, x_scales = rounded(vector)
            planes |= set(two_planes.tolist())
            inputs, lows = inputs.reshape(-1).astype(int), lows.reshape(-1).astype(int)
            part = min(group, BLOCK)
            # in steps of the lows, and as exactly as float32 has them
            sums = np.float32((256 * inputs + lows).reshape(-1, part).sum(1)) / np.float32(256)
            sums *= np.repeat(x_scales, BLOCK // part)
            for row in range(4):
                total = np.float32(0)
                for at in range(0, 256, part):
                    if at % group == 0:
                        of_group = sums[at // part : (at + group) // part]
                        total = fma(biases[row, at // group], of_group.sum(dtype=np.float32), total)
                    here = slice(at, at + part)
                    dot = np.float32(codes[row, here] @ inputs[here])
                    if two_planes[at // BLOCK]:
                        dot = fma(np.float32(codes[row, here] @ lows[here]), np.float32(1 / 256), dot)
                    total = fma(dot, scales[row, at // group] * x_scales[at // BLOCK], total)
                want[t, row] = total
        assert planes == {False, True}
        for name in SETS:
            assert same_bits(_core.matmul(name, pack(codes, width), *parts, width, x), want), (name, group)


@pytest.mark.parametrize("name", FAST_SETS)
@pytest.mark.parametrize("width", ALL_WIDTHS)
def test_matmul_equals_scalar(name, width):
    rng = np.random.default_rng(width)
    for group in _core.GROUPS if width < 16 else [32]:
        for cols in (32, 96, 160, 256, 2048) if width < 16 else (1, 15, 32, 100, 160, 2048):
            if width < 16 and cols % group:
                continue
            rows = 19 if cols == 2048 else 37
            matrix, _ = random_matrix(rng, rows, cols, width, group)
            x = spiky(rng, (17 if cols > 100 else 70, cols)) * np.float32(np.exp(rng.standard_normal()))
            x[::3] = rng.standard_normal(x[::3].shape, np.float32)  # no token of a tile, some or all have two planes
            x[8:] = spiky(rng, x[8:].shape)
            want = _core.matmul("scalar", *matrix, width, x)
            for tokens in {1, 2, 3, 5, 17, len(x)}:
                got = _core.matmul(name, *matrix, width, x[:tokens])
                assert same_bits(got, want[:tokens]), (group, cols, tokens)


@given(width=st.sampled_from(ALL_WIDTHS), group=st.sampled_from(_core.GROUPS), groups=st.integers(1, 40),
       rows=st.integers(1, 50), tokens=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_any_rows_and_any_vectors_equal_scalar(width, group, groups, rows, tokens, seed):
    rng = np.random.default_rng(seed)
    matrix, _ = random_matrix(rng, rows, group * groups, width, group)
    x = spiky(rng, (4, group * groups), 10 ** (5 * rng.random()))
    vectors = rng.integers(0, 4, tokens, np.int32)
    begin, end = sorted(rng.integers(0, rows + 1, 2).tolist())
    whole = _core.matmul("scalar", *matrix, width, x)
    want = np.zeros((tokens, rows), np.float32)
    want[:, begin:end] = whole[vectors, begin:end]
    for name in SETS:
        got = _core.matmul(name, *matrix, width, x, vectors=vectors, row_begin=begin, row_end=end)
        assert same_bits(got, want), name


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("width", [2, 3, 8, 16])
def test_a_token_does_not_depend_on_the_other_tokens(name, width):
    rng = np.random.default_rng(5)
    matrix, _ = random_matrix(rng, 21, 192, width, 64)
    x = rng.standard_normal((7, 192), np.float32)
    together = _core.matmul(name, *matrix, width, x)
    x[3] = 1e30
    assert same_bits(np.delete(_core.matmul(name, *matrix, width, x), 3, 0), np.delete(together, 3, 0))
    for token in (0, 6):
        assert same_bits(_core.matmul(name, *matrix, width, x[token : token + 1])[0], together[token])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("width", ALL_WIDTHS)
@pytest.mark.parametrize("cols", [20480 + 128, 32768, 32768 + 128])
def test_wide_rows_give_the_same_bits(name, width, cols):
    matrix, _ = random_matrix(np.random.default_rng(9), 17, cols, width, 128)
    x = spiky(np.random.default_rng(10), (3, cols))
    want = _core.matmul("scalar", *matrix, width, x)
    for tokens in (1, 3):
        assert same_bits(_core.matmul(name, *matrix, width, x[:tokens]), want[:tokens])


SPECIAL = {
    "zeros": np.zeros(192, np.float32),
    "one block of zeros": np.where(np.arange(192) // 64 == 1, 0, 1.5).astype(np.float32),
    "huge": np.linspace(-3.4e38, 3.4e38, 192, dtype=np.float32),
    "denormal": np.linspace(-1e-39, 1e-39, 192, dtype=np.float32),
    "infinite": np.where(np.arange(192) == 70, np.inf, 1.0).astype(np.float32),
    "not a number": np.where(np.arange(192) % 97 == 3, np.nan, 1.0).astype(np.float32),
    "halves": (np.arange(192) % 128 - 63.5).astype(np.float32) * np.float32(2 / 127),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("width", [1, 3, 8, 16])
def test_special_inputs_equal_scalar(kind, width):
    for group in (32, 64):
        matrix, _ = random_matrix(np.random.default_rng(1), 21, 192, width, group)
        x = SPECIAL[kind][None]
        want = _core.matmul("scalar", *matrix, width, x)
        assert kind != "zeros" or not want.any()
        for name in FAST_SETS:
            assert same_bits(_core.matmul(name, *matrix, width, x), want), (name, group)


# ---- activations as int8 ----


def test_activations_round_to_the_nearest_of_127_steps():
    x = np.random.default_rng(0).standard_normal(160).astype(np.float32)
    codes, lows, two_planes, scales, sums32, sums64, sums128 = _core.quantise_activations("scalar", x)
    want, no_lows, _, want_scales = rounded(x)
    assert np.array_equal(scales, want_scales)
    assert np.array_equal(codes.reshape(3, BLOCK), want)
    assert not two_planes.any() and not lows.any() and not no_lows.any()
    assert np.array_equal(sums32, np.repeat(scales, 2) * want.reshape(6, 32).sum(1))
    assert np.array_equal(sums64, scales * want.sum(1))
    assert np.array_equal(sums128, [sums64[0] + sums64[1], sums64[2]])


@pytest.mark.parametrize("factor", [5, 30, 3000, 30_000])
def test_blocks_with_a_massive_activation_have_256_times_as_many_steps(factor):
    rng = np.random.default_rng(factor)
    x = rng.uniform(-1, 1, 640).astype(np.float32)
    massive = np.arange(0, 640, 3 * BLOCK)
    x[massive] = factor * np.float32([1, -1, 1, -1])
    codes, lows, two_planes, scales, sums32, sums64, _ = _core.quantise_activations("scalar", x)
    want = rounded(x)
    assert np.array_equal(np.flatnonzero(two_planes), massive // BLOCK)
    for got, part in zip((codes, lows, two_planes, scales), want, strict=True):
        assert np.array_equal(got, part.reshape(-1))
    error = np.abs(np.repeat(scales, BLOCK) * (codes + lows / 256) - x)
    assert (error <= activation_steps(x[None])[0] / 2 * (1 + 1e-4)).all()
    fine = 256 * want[0] + want[1]  # exact as float32
    assert np.array_equal(sums32, np.repeat(scales, 2) * (fine.reshape(-1, 32).sum(1) / 256))
    assert np.array_equal(sums64, scales * (fine.sum(1) / 256))


@pytest.mark.parametrize("name", SETS)
def test_a_second_plane_ends_where_the_largest_is_four_times_the_root_mean_square(name):
    block = np.zeros(BLOCK, np.float32)
    for numbers, want in [([], 0), ([127], 1), ([127] * 4, 0), ([127, 127, 127, 126, 15], 1), ([127] * 4 + [1], 0)]:
        block[:] = 0
        block[: len(numbers)] = numbers  # codes are these numbers; 4 times 127 is sqrt(64 * 127^2 / 16) on the edge
        assert _core.quantise_activations(name, block)[2][0] == want, numbers


@pytest.mark.parametrize("name", FAST_SETS)
def test_activations_equal_scalar(name):
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal(cols).astype(np.float32) for cols in (1, 31, 32, 64, 96, 100, 160, 2048)]
    inputs += [spiky(rng, (1, cols), factor)[0] for cols in (32, 100, 2048) for factor in (4, 5, 30, 30_000)]
    for x in [*inputs, *SPECIAL.values()]:
        want, got = _core.quantise_activations("scalar", x), _core.quantise_activations(name, x)
        assert all(np.array_equal(g, w) for g, w in zip(got[:3], want[:3], strict=True))
        assert all(same_bits(g, w) for g, w in zip(got[3:], want[3:], strict=True))


# ---- what every set compiles from one source ----


def test_exp_is_within_three_ten_millionths():
    x = np.concatenate([np.linspace(-87, 0, 20001), -np.geomspace(1e-7, 87, 2000)]).astype(np.float32)
    got = np.array([_core.softmax("scalar", np.array([0, v], np.float32)) for v in x], np.float64)
    # The two share a factor and each is rounded once after it.
    error = np.abs(got[:, 1] / got[:, 0] / np.exp(x.astype(np.float64)) - 1)
    assert error.max() <= 3e-7 + 2 * 2.0**-24
    gate = np.linspace(-88, -20, 20001).astype(np.float32)
    silu = _core.gate_up("scalar", gate, np.ones_like(gate), _core.Gate.silu).astype(np.float64)
    error = np.abs(gate / silu / (1 + np.exp(-gate.astype(np.float64))) - 1)
    assert error.max() <= 3e-7 + 2 * 2.0**-24
    assert _core.softmax("scalar", np.zeros(1, np.float32))[0] == 1
    assert np.array_equal(_core.softmax("scalar", np.array([0, -88], np.float32)), [1, 0])


@pytest.mark.parametrize("n", [1, 15, 16, 80, 100, 2048])
def test_vector_kernels_are_near_numpy_and_equal_scalar(n):
    rng = np.random.default_rng(n)
    x, w = rng.standard_normal((2, n)).astype(np.float32) * np.float32(4)
    a, b = x.astype(np.float64), w.astype(np.float64)
    e = np.exp(a - a.max())
    gate = np.minimum(a, 3)
    clamped = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(b, -3, 3) + 1)
    gelu = a / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) * b
    calls = [
        (lambda s: _core.rms_norm(s, x, w, 1e-6), a / np.sqrt((a**2).mean() + 1e-6) * b),
        (lambda s: _core.gate_up(s, x, w, _core.Gate.silu), a / (1 + np.exp(-a)) * b),
        (lambda s: _core.gate_up(s, x, w, _core.Gate.gelu_tanh), gelu),
        (lambda s: _core.gate_up(s, x, w, _core.Gate.clamped_swiglu, 1.702, 3), clamped),
        (lambda s: _core.gate_up(s, x, w, _core.Gate.bilinear), a * b),
        (lambda s: _core.gate_up(s, x, w, _core.Gate.relu2), np.maximum(b, 0) ** 2),
        (lambda s: _core.softmax(s, x), e / e.sum()),
        (lambda s: _core.softmax(s, x, 2.5), e / (e.sum() + np.exp(2.5 - a.max()))),
        (lambda s: _core.softmax(s, x, 99.0), np.exp(a - 99)),
    ]
    for call, want in calls:
        got = call("scalar")
        # A dozen roundings; exp multiplies those of its argument by that argument, which stays below 100.
        assert np.allclose(got, want, rtol=2e-5, atol=1e-7)
        assert all(same_bits(call(name), got) for name in FAST_SETS)


@pytest.mark.parametrize("n", [1, 15, 16, 80, 100, 2048])
def test_a_layer_norm_is_near_numpy_far_from_zero_and_equals_scalar(n):
    x, weight, bias = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    x += 50
    centred = x - x.mean(dtype=np.float64)
    got = _core.layer_norm("scalar", x, weight, bias, 1e-2)
    # The mean of x is rounded by 2e-6 at the most, and what is near 50 by as much.
    assert np.allclose(got, centred / np.sqrt((centred**2).mean() + 1e-2) * weight + bias, rtol=0, atol=5e-5)
    assert all(same_bits(_core.layer_norm(name, x, weight, bias, 1e-2), got) for name in FAST_SETS)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 100, 128])
def test_attention_is_near_numpy_and_equals_scalar(head_dim, half):
    rng = np.random.default_rng(head_dim)
    scale = head_dim**-0.5
    for queries in (1, 2, 3, 8, 13):
        for begin, end in [(0, 1), (0, 5), (0, 16), (3, 14), (3, 50), (17, 130), (129, 130)]:
            q = rng.standard_normal((queries, head_dim)).astype(np.float32)
            k, v = rng.standard_normal((2, end, head_dim)).astype(np.float32)
            got = _core.attend("scalar", q, k, v, begin, scale, half)
            if half:
                k, v = k.astype(np.float16), v.astype(np.float16)
            scores = q.astype(np.float64) @ k[begin:].astype(np.float64).T * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            want = weights / weights.sum(-1, keepdims=True) @ v[begin:]
            assert np.allclose(got, want, atol=1e-5)  # float32 sums of numbers near one
            assert all(same_bits(_core.attend(name, q, k, v, begin, scale, half), got) for name in FAST_SETS)


@pytest.mark.parametrize("spread", [0.1, 3])
def test_attention_over_131072_positions_stays_near_float64(spread):
    rng = np.random.default_rng(0)
    k, v = spread * rng.standard_normal((131_072, 64)).astype(np.float32), rng.standard_normal((131_072, 64))
    q, v = rng.standard_normal((2, 64)).astype(np.float32), (v + 1).astype(np.float32)
    scores = q.astype(np.float64) @ k.T.astype(np.float64) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)
    got = _core.attend(SETS[0], q, k, v, 0, 1 / 8)
    # One running float32 a value made 1e-4 of it where weights are uneven; half precision in the cache makes 9e-5.
    assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < 5e-6
    assert all(same_bits(_core.attend(name, q, k, v, 0, 1 / 8), got) for name in FAST_SETS)


@pytest.mark.parametrize("name", SETS)
def test_every_half_is_the_float_that_numpy_says(name):
    halves = np.arange(65536, dtype=np.uint16)
    want = halves.view(np.float16).astype(np.float32)
    got = _core.from_half(name, halves)
    np.testing.assert_array_equal(got, want)
    assert np.array_equal(np.signbit(got), np.signbit(want))


def test_floats_round_to_halves_as_numpy_rounds_them():
    rng = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float32)
    between = (np.sort(every)[1:] + np.sort(every)[:-1]) / 2  # ties
    bits = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    edges = np.float32([65504, 65519.99, 65520, 1e30, np.inf, -np.inf, 0, -0.0, 2**-24, 2**-25, 2**-25 * 1.0001, 6e-5])
    values = np.concatenate([every, between, np.nextafter(between, 0), np.nextafter(between, 1), bits, edges])
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(_core.to_half(values), values.astype(np.float16).view(np.uint16))
    assert np.isnan(_core.to_half(np.float32([np.nan])).view(np.float16)).all()


# ---- memory ----


def at_the_end_of_a_page(array, keep):
    """A copy of `array` whose last byte is the last before memory that may not be read."""
    room = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    keep.append(area)
    copy = np.frombuffer(area, array.dtype, array.size, room - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("width", ALL_WIDTHS)
def test_nothing_is_read_past_the_last_byte(name, width):
    rng, keep = np.random.default_rng(3), []
    for group in _core.GROUPS if width < 16 else [32]:
        for cols in (group, 3 * group, 5 * group, 17 * group) if width < 16 else (31, 160):
            matrix, _ = random_matrix(rng, 18, cols, width, group)
            x = rng.standard_normal((3, cols), np.float32)
            guarded = [at_the_end_of_a_page(part, keep) for part in matrix]
            for tokens in (1, 2, 3):
                got = _core.matmul(name, *guarded, width, at_the_end_of_a_page(x[:tokens], keep))
                assert same_bits(got, _core.matmul("scalar", *matrix, width, x[:tokens]))
            values = _core.dequantise(name, *guarded, width, cols)
            assert same_bits(values, _core.dequantise("scalar", *matrix, width, cols))
