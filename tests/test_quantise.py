"""Packing: the searched range beats round to nearest, and no group of weights leads to nonsense."""

import numpy as np
import pytest
from bundles import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_moe import _core
from edge_moe.compressor.rounding.quantise import dequantise, quantise, to_bfloat16, trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing

PACKED = [width for width in _core.WIDTHS if width < 16]


def round_trip(weights, width, group=64, **options) -> np.ndarray:
    return dequantise(quantise(weights, width, group, **options), width, weights.shape[1])


def squared_error(weights, width, group=64, **options) -> np.ndarray:
    """Of each group, in float64: (rows, groups)."""
    miss = round_trip(weights, width, group, **options).astype(np.float64) - weights
    return np.square(miss).reshape(len(weights), -1, group).sum(-1)


@pytest.fixture(scope="module")
def trained() -> np.ndarray:
    return Checkpoint(REFERENCE).expert(1, 3)[0]


def gaussian(rows=24, cols=512, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32) * np.float32(0.02)


# ---- how good


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_the_search_is_never_worse_than_round_to_nearest(width, group, trained):
    for weights in (gaussian(), trained, np.random.default_rng(1).standard_cauchy((8, 512)).astype(np.float32)):
        searched, nearest = (squared_error(weights, width, group, search=search) for search in (True, False))
        # Errors are compared in float32 sums of `group` terms while searching.
        assert (searched <= nearest * (1 + group * 2.0**-23) + 1e-30).all()


@pytest.mark.parametrize(("width", "least"), [(1, 0.6), (2, 0.25), (3, 0.12), (4, 0.05)])
def test_the_search_takes_a_good_part_of_the_error_away(width, least, trained):
    for weights in (gaussian(), trained):
        searched, nearest = (squared_error(weights, width, search=search).sum() for search in (True, False))
        assert searched < (1 - least) * nearest


@pytest.mark.parametrize("width", PACKED)
def test_the_error_is_no_more_than_mlxs(width, trained):
    mx = pytest.importorskip("mlx.core")
    if width == 1:
        pytest.skip("mlx.core.quantize starts at 2 bits")
    for weights in (gaussian(), trained):
        packed = mx.quantize(mx.array(weights).astype(mx.bfloat16), 64, width)
        theirs = np.array(mx.dequantize(packed[0], *(x.astype(mx.float32) for x in packed[1:]), 64, width))
        assert squared_error(weights, width).sum() <= np.square(theirs.astype(np.float64) - weights).sum()


def test_importance_moves_the_error_to_where_it_counts_less():
    weights = gaussian()
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    errors = []
    for chosen in (None, importance):
        packed = _core.quantise_matrix(weights, 2, 64, importance=chosen)
        errors.append(np.square(_core.dequantise("scalar", *packed, 2, 512) - weights).sum(0))
    assert errors[1] @ importance < 0.8 * (errors[0] @ importance)
    assert errors[1].sum() > errors[0].sum()


# ---- bounds and exactness


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_weights_that_can_be_held_are_held_exactly(width, group):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 2**width, (6, 4, group))
    codes[..., 0], codes[..., 1] = 0, 2**width - 1
    # Scales of few bits, so that a bias plus any code times the scale is exact in float32.
    scales, biases = (rng.integers(1, 16, (6, 4, 1)) * 2.0 ** rng.integers(-9, -3, (6, 4, 1)) for _ in range(2))
    weights = (scales * codes - biases).astype(np.float32).reshape(6, 4 * group)
    for search in (True, False):
        np.testing.assert_array_equal(round_trip(weights, width, group, search=search), weights)


@given(hnp.arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_at_8_bits_no_weight_is_further_off_than_a_step_and_a_half(weights):
    miss = np.abs(round_trip(weights, 8, search=False).astype(np.float64) - weights)
    low, high = weights.min(1).astype(np.float64), weights.max(1).astype(np.float64)
    # Half a step; a scale rounded by 2^-8 of itself is a step off at the far end; the bias may be 2^-8 of itself off.
    bound = 1.5 * (high - low) / 255 + np.abs(low) * 2.0**-8 + 1e-30
    assert (miss <= bound[:, None] * (1 + 1e-6)).all()


@given(hnp.arrays(np.float32, (1, 64), elements=st.floats(-(2.0**122), 2.0**122, width=32)), st.sampled_from(PACKED))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_finite_weights_come_back_finite_and_near_their_range(weights, width):
    for search in (True, False):
        found = round_trip(weights, width, search=search).astype(np.float64)
        low, high = float(weights.min()), float(weights.max())
        slack = (high - low) / 4 + max(abs(low), abs(high)) * 2.0**-7 + 1e-38  # least squares may pass the ends
        assert np.isfinite(found).all()
        assert (found >= low - slack).all()
        assert (found <= high + slack).all()


GROUPS_OF_WEIGHTS = {
    "zeros": np.zeros(64),
    "one value": np.full(64, 0.375),
    "one negative value": np.full(64, -3e-5),
    "huge": np.linspace(-1e30, 1e30, 64),
    "largest": np.where(np.arange(64) % 2, 1e37, -1e37),
    "all huge and alike": np.full(64, 2.0**100),
    "denormal": np.linspace(-1e-40, 1e-40, 64),
    "smallest": np.where(np.arange(64) == 9, 1.4e-45, 0),
    "one among zeros": np.where(np.arange(64) == 9, 5.0, 0),
    "far from zero": 1000 + np.linspace(-1e-3, 1e-3, 64),
}


@pytest.mark.parametrize("kind", GROUPS_OF_WEIGHTS)
@pytest.mark.parametrize("width", PACKED)
def test_special_groups_come_back_finite_and_no_further_off_than_their_range(kind, width):
    weights = np.tile(GROUPS_OF_WEIGHTS[kind].astype(np.float32), (2, 2))
    for search in (True, False):
        found = round_trip(weights, width, search=search).astype(np.float64)
        assert np.isfinite(found).all()
        miss, spread = np.abs(found - weights).max(), float(weights.max()) - float(weights.min())
        assert miss <= spread / (2**width - 1) + np.abs(weights).max() * 2.0**-8 + 1e-38


@pytest.mark.parametrize("width", PACKED)
def test_codes_stay_in_range_and_fill_it(width):
    packed = quantise(gaussian(), width, 64, search=False)
    bits = np.unpackbits(packed.codes, axis=1, bitorder="little").reshape(24, 512, width)
    codes = (bits * (1 << np.arange(width))).sum(-1)
    assert codes.min() == 0
    assert codes.max() == 2**width - 1
    assert packed.codes.nbytes == 24 * 512 * width // 8
    assert packed.scales.shape == packed.biases.shape == (24, 8)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_threads_do_not_change_the_result(width):
    packed = [quantise(gaussian(), width, 32, threads=threads) for threads in (1, 3)]
    for part in ("codes", "scales", "biases"):
        np.testing.assert_array_equal(*(getattr(x, part) for x in packed))


# ---- widths that are not packed, and refusals


def test_width_16_and_32_keep_what_they_can_hold():
    weights = gaussian()
    np.testing.assert_array_equal(round_trip(weights, 32), weights)
    held = (to_bfloat16(weights).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(round_trip(held, 16), held)


def test_bfloat16_rounds_to_nearest_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x00000001], np.uint32).view(np.float32)
    assert to_bfloat16(halfway).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0]


@pytest.mark.parametrize("width", PACKED)
def test_weights_that_overflow_the_format_are_refused(width):
    weights = gaussian()
    weights[3, 5] = -2e38
    with pytest.raises(ValueError) as caught:
        quantise(weights, width, 64)
    assert str(caught.value) == f"a weight of 2e+38 is beyond 1e+37, which width {width} cannot hold; use bits 16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7, "group": 64}, "width must be 1, 2, 3, 4, 5, 6 or 8"),
        ({"width": 0, "group": 64}, "width must be 1, 2, 3, 4, 5, 6 or 8"),
        ({"width": 4, "group": 48}, "group must be 32, 64 or 128"),
        ({"width": 4, "group": 128}, "cols must be a multiple of group"),
        ({"width": 4, "group": 64, "threads": 0}, "threads must be at least 1"),
        ({"width": 4, "group": 64, "importance": np.ones(5, np.float32)}, "importance must have one value a column"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError) as caught:
        _core.quantise_matrix(np.zeros((2, 192), np.float32), **options)
    assert str(caught.value) == message


def test_trunk_matrices_take_the_largest_group_that_fits_and_vectors_stay_whole():
    shapes = {"q": (8, 192), "k": (8, 96), "v": (8, 100), "layers.0.router": (4, 128), "norm": (128,)}
    assert trunk_packing(shapes, 4, 128) == {
        "q": Packing((4,), 64),
        "k": Packing((4,), 32),
        "v": Packing((16,), 0),
        "layers.0.router": Packing((32,), 0),
        "norm": Packing((32,), 0),
    }
    assert trunk_packing({"q": (8, 192)}, 16, 64) == {"q": Packing((16,), 0)}
