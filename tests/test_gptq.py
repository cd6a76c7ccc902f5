"""GPTQ against its definition in float64, and refinement against every change of a single code."""

import numpy as np
import pytest

from edge_moe import _core
from edge_moe.compressor.rounding.gptq import Curvature, damping_for, gptq
from edge_moe.compressor.rounding.quantise import dequantise, quantise

PACKED = [width for width in _core.WIDTHS if width < 16]
PARTS = ("codes", "scales", "biases")


def inputs(cols: int, rows: int = 300, seed: int = 0) -> np.ndarray:
    """Activations (rows, cols) that go together, a few of them large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols // 4)) @ rng.standard_normal((cols // 4, cols)) + rng.standard_normal(cols)
    x[:, :: cols // 8] *= 5
    return (x + 0.5 * rng.standard_normal((rows, cols))).astype(np.float32)


def moment_of(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


def gaussian(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32) * np.float32(0.02)


def damped(moment: np.ndarray, damping: float = 0.01) -> np.ndarray:
    h = moment.astype(np.float64)
    return h + damping * np.trace(h) / len(h) * np.eye(len(h))


def objective(weights, packed, width, h) -> np.ndarray:
    """E H E^T of each row, in float64."""
    e = weights.astype(np.float64) - dequantise(packed, width, weights.shape[1])
    return ((e @ h) * e).sum(1)


def codes_of(packed, width: int, cols: int) -> np.ndarray:
    bits = np.unpackbits(packed.codes, axis=1, bitorder="little").reshape(len(packed.codes), cols, width)
    return (bits.astype(np.int64) << np.arange(width)).sum(-1)


def float_of(bfloat16: np.ndarray) -> np.ndarray:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def by_definition(weights, h, width, group, scales, biases) -> np.ndarray:
    """Optimal brain surgery, a column at a time, with the inverse of what is left of H taken anew for each of them."""
    left, cols = weights.astype(np.float64), weights.shape[1]
    codes = np.empty(weights.shape, np.int64)
    for j in range(cols):
        inverse = np.linalg.inv(h[j:, j:])
        scale, bias = scales[:, j // group], biases[:, j // group]
        codes[:, j] = np.clip(np.rint((left[:, j] - bias) / scale), 0, 2**width - 1)
        error = (left[:, j] - (scale * codes[:, j] + bias)) / inverse[0, 0]
        left[:, j:] -= error[:, None] * inverse[0]
    return codes


# ---- GPTQ


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_codes_are_those_of_the_definition(width, group):
    weights, moment = gaussian(24, 128), moment_of(inputs(128))
    h = damped(moment)
    packed = gptq(weights, Curvature.of(moment), width, group, sweeps=0)
    scales, biases = float_of(packed.scales), float_of(packed.biases)
    want = by_definition(weights, h, width, group, scales, biases)
    found = codes_of(packed, width, 128)
    # A code halfway between two may fall either way in float32, and what follows it in its row then differs too.
    assert (found == want).all(axis=1).mean() > 0.9
    e = weights - (np.repeat(scales, group, 1) * want + np.repeat(biases, group, 1))
    assert objective(weights, packed, width, h).sum() == pytest.approx(((e @ h) * e).sum(), rel=1e-3)


@pytest.mark.parametrize("span", [128, 256])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_spans_of_columns_change_the_order_of_sums_alone(span, sweeps, monkeypatch):
    weights, curvature = gaussian(24, 640), Curvature.of(moment_of(inputs(640, 900)))
    whole = gptq(weights, curvature, 3, 64, sweeps=sweeps)
    monkeypatch.setattr("edge_moe.compressor.rounding.gptq.SPAN", 1024)
    alone = gptq(weights, curvature, 3, 64, sweeps=sweeps)
    monkeypatch.setattr("edge_moe.compressor.rounding.gptq.SPAN", span)
    parts = gptq(weights, curvature, 3, 64, sweeps=sweeps)
    want = codes_of(alone, 3, 640)
    for packed in (whole, parts):
        assert (codes_of(packed, 3, 640) == want).all(axis=1).mean() > 0.9
        h = curvature.moment.astype(np.float64)
        found, expected = (objective(weights, its, 3, h).sum() for its in (packed, alone))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_the_first_group_has_the_scales_that_its_errors_call_for(width, group):
    weights, moment = gaussian(8, 128), moment_of(inputs(128))
    packed = gptq(weights, Curvature.of(moment), width, group, sweeps=0)
    # What rounding column j costs once those behind it made up for it: 1 / (inverse of H from j on)[j, j].
    h = damped(moment)
    cost = np.array([1 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(group)])
    importance = (cost / cost.max()).astype(np.float32)
    _, scales, biases = _core.quantise_matrix(np.ascontiguousarray(weights[:, :group]), width, group, importance)
    np.testing.assert_allclose(float_of(packed.scales)[:, 0], float_of(scales)[:, 0], rtol=2.0**-7)
    np.testing.assert_allclose(float_of(packed.biases)[:, 0], float_of(biases)[:, 0], rtol=2.0**-7)


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_without_correlations_it_is_the_search_of_each_group(width, group):
    weights = gaussian(16, 256)
    found = gptq(weights, Curvature.of(np.eye(256, dtype=np.float32)), width, group, sweeps=0)
    want = quantise(weights, width, group)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(found, part), getattr(want, part))


@pytest.mark.parametrize("width", PACKED)
def test_correlated_inputs_lose_less_than_by_rounding_to_nearest(width):
    weights, moment = gaussian(16, 256), moment_of(inputs(256))
    h = damped(moment)
    found, nearest = gptq(weights, Curvature.of(moment), width, 64, sweeps=0), quantise(weights, width, 64)
    assert objective(weights, found, width, h).sum() < 0.7 * objective(weights, nearest, width, h).sum()


def test_inputs_that_were_never_seen_count_alike():
    weights = gaussian(8, 64)
    unseen = gptq(weights, Curvature.of(np.zeros((64, 64), np.float32)), 3, 32)
    alike = gptq(weights, Curvature.of(np.eye(64, dtype=np.float32)), 3, 32)
    assert objective(weights, unseen, 3, np.eye(64)).sum() == pytest.approx(
        objective(weights, alike, 3, np.eye(64)).sum(), rel=0.01
    )


def test_an_input_that_is_always_zero_is_no_difficulty():
    x = inputs(64)
    x[:, 5] = x[:, 40] = 0
    weights = gaussian(8, 64)
    for width in PACKED:
        found = dequantise(gptq(weights, Curvature.of(moment_of(x)), width, 32), width, 64)
        assert np.isfinite(found).all()
        assert np.abs(found[:, [5, 40]]).max() < 0.2


# ---- refinement


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_refinement_never_raises_the_objective_of_any_row(width, group):
    weights, moment = gaussian(32, 256), moment_of(inputs(256))
    curvature, h = Curvature.of(moment), damped(moment)
    before, after, longer = (
        objective(weights, gptq(weights, curvature, width, group, sweeps=sweeps), width, h) for sweeps in (0, 2, 4)
    )
    assert (after <= before * (1 + 1e-4) + 1e-12).all()  # gradients are float32
    assert (longer <= after * (1 + 1e-4) + 1e-12).all()
    if width <= 4:
        assert after.sum() < 0.97 * before.sum()


@pytest.mark.parametrize("width", [1, 2])
def test_no_change_of_a_single_code_is_left_that_would_help(width):
    rng = np.random.default_rng(3)
    moment = moment_of(inputs(32)) + 0.1 * np.eye(32, dtype=np.float32)
    h, weights = moment.astype(np.float64), gaussian(6, 32)
    codes = rng.integers(0, 2**width, (6, 32)).astype(np.uint8)
    scales, biases = np.full(6, 2.0**-6, np.float32), np.full(6, -(2.0**-6), np.float32)
    start = weights - (scales[:, None] * codes + biases[:, None])
    found, new_scales, new_biases, change = _core.refine_group(
        codes, scales, biases, width, start @ moment, moment, rounds=1000
    )
    rounded = new_scales[:, None].astype(np.float64) * found + new_biases[:, None]
    np.testing.assert_allclose(change, (scales[:, None] * codes + biases[:, None]) - rounded, atol=1e-7)

    def cost(rounded) -> np.ndarray:
        e = weights - rounded
        return ((e @ h) * e).sum(-1)

    least = cost(rounded)
    assert (least < cost(weights - start)).all()
    for j in range(32):
        for code in range(2**width):
            other = rounded.copy()
            other[:, j] = new_scales * np.float64(code) + new_biases
            assert (cost(other) >= least * (1 - 1e-5)).all()


# ---- both


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_weights_that_can_be_held_are_held_exactly(width, group):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 2**width, (6, 2, group))
    codes[..., 0], codes[..., 1] = 0, 2**width - 1
    # Scales of few bits, so that a bias plus any code times the scale is exact in float32.
    scales, biases = (rng.integers(1, 16, (6, 2, 1)) * 2.0 ** rng.integers(-9, -3, (6, 2, 1)) for _ in range(2))
    weights = (scales * codes - biases).astype(np.float32).reshape(6, 2 * group)
    for order_group in (0, group):
        curvature = Curvature.of(moment_of(inputs(2 * group)), order_group=order_group)
        found = dequantise(gptq(weights, curvature, width, group), width, 2 * group)
        np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("order_group", [0, 32])
def test_threads_do_not_change_the_result(width, order_group):
    weights = gaussian(100, 128)
    curvature = Curvature.of(moment_of(inputs(128)), order_group=order_group)
    packed = [gptq(weights, curvature, width, 32, threads=threads) for threads in (1, 3)]
    for part in PARTS:
        np.testing.assert_array_equal(*(getattr(x, part) for x in packed))


@pytest.mark.parametrize("group", _core.GROUPS)
@pytest.mark.parametrize("width", PACKED)
def test_in_activation_order_it_is_the_same_on_sorted_inputs(width, group):
    x, weights = inputs(256) * np.random.default_rng(5).uniform(0.2, 3, 256).astype(np.float32), gaussian(12, 256)
    moment = moment_of(x)
    diagonal = np.diagonal(moment)
    groups = sorted(range(256 // group), key=lambda g: -diagonal[g * group : (g + 1) * group].sum())
    order = [j for g in groups for j in sorted(range(g * group, (g + 1) * group), key=lambda j: -diagonal[j])]
    found = gptq(weights, Curvature.of(moment, order_group=group), width, group)
    ordered = gptq(np.ascontiguousarray(weights[:, order]), Curvature.of(moment[np.ix_(order, order)]), width, group)
    want = np.empty_like(weights)
    want[:, order] = dequantise(ordered, width, 256)
    np.testing.assert_array_equal(dequantise(found, width, 256), want)
    np.testing.assert_array_equal(found.scales[:, groups], ordered.scales)


def test_a_width_of_16_is_only_stored():
    weights = gaussian(4, 64)
    np.testing.assert_array_equal(gptq(weights, None, 16, 64).codes, quantise(weights, 16, 64).codes)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("scale", [30, 30_000])
def test_no_row_ends_worse_than_rounded_to_nearest(width, scale):
    """An input that is massive and weights for it that are not small: GPTQ alone fits its group to nothing else."""
    x, weights = inputs(128), gaussian(32, 128)
    x[:, 70] *= scale
    h = damped(moment_of(x), 0.0)
    found = gptq(weights, Curvature.of(moment_of(x)), width, 64)
    nearest = quantise(weights, width, 64, search=False)
    assert (objective(weights, found, width, h) <= 1.001 * objective(weights, nearest, width, h)).all()


# ---- curvature


@pytest.mark.parametrize("order_group", [0, 32])
@pytest.mark.parametrize("rows", [20, 2000])
def test_the_factor_is_that_of_the_inverse(rows, order_group):
    x = inputs(96, rows)
    moment, damping = moment_of(x), damping_for(rows, 96)
    c = Curvature.of(moment, damping, order_group)
    order = np.arange(96) if c.order is None else c.order
    h = damped(moment, damping)[np.ix_(order, order)]
    r = c.factor.astype(np.float64)
    assert not np.tril(r, -1).any()
    np.testing.assert_allclose(r.T @ r @ h, np.eye(96), atol=2e-3)
    np.testing.assert_allclose(c.moment, h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order_group", [0, 32])
def test_solve_gives_the_ridge_solution(order_group):
    rng = np.random.default_rng(4)
    x, weights = inputs(96), gaussian(10, 96)
    target = x @ weights.T + 0.1 * rng.standard_normal((300, 10), np.float32)
    c = Curvature.of(moment_of(x), 0.03, order_group)
    found = c.solve((target.T @ x / 300).astype(np.float32))
    # argmin over M of mean |target - x M^T|^2 + damping |M|^2
    h, cross = damped(moment_of(x), 0.03), target.astype(np.float64).T @ x / 300
    np.testing.assert_allclose(found, np.linalg.solve(h, cross.T).T, atol=1e-4)
    assert np.square(target - x @ found.T).mean() < 0.1 * np.square(target).mean()


@pytest.mark.parametrize("scale", [30, 30_000])
def test_a_massive_input_does_not_damp_the_others_away(scale):
    x = np.random.default_rng(5).standard_normal((300, 64)).astype(np.float32)
    ordinary = Curvature.of(moment_of(x))
    assert ordinary.damping == pytest.approx(0.01 * np.square(x).mean(), rel=1e-4)
    x[:, 9] *= scale
    diagonal = np.square(x, dtype=np.float64).mean(axis=0)
    others = np.delete(diagonal, 9)
    want = 0.01 * (others.sum() + min(diagonal[9], 64 * np.median(diagonal))) / 64
    assert Curvature.of(moment_of(x)).damping == pytest.approx(want, rel=1e-4)


def test_few_rows_are_damped_more():
    assert damping_for(10**9, 256) == pytest.approx(0.01)
    assert damping_for(256, 256) == pytest.approx(0.02)
    assert np.isfinite(damping_for(0, 256))


# ---- what is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("order_group", [0, 32])
def test_activations_that_are_not_numbers_are_refused(bad, order_group):
    x = inputs(64)
    x[7, 9] = bad
    with np.errstate(invalid="ignore"), pytest.raises(ValueError) as caught:
        Curvature.of(moment_of(x), order_group=order_group)
    assert str(caught.value) == "activations have NaN or Inf; the checkpoint is damaged or the text does not suit it"


def test_a_moment_that_cannot_be_inverted_is_refused():
    x = inputs(64)
    x[:, 5] = 0
    with pytest.raises(ValueError) as caught:
        Curvature.of(moment_of(x), damping=0.0)
    assert str(caught.value) == "the second moment of the inputs is not positive; raise the damping"


def test_weights_that_overflow_the_format_are_refused():
    weights = gaussian(8, 64)
    weights[3, 5] = -2e38
    with pytest.raises(ValueError) as caught:
        gptq(weights, Curvature.of(moment_of(inputs(64))), 4, 32)
    assert str(caught.value) == "a weight of 2e+38 is beyond 1e+37, which width 4 cannot hold; use bits 16"
