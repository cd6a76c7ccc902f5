"""The step of a matrix towards a target: from its definition, what it is worth on other tokens, and what it ignores."""

import numpy as np
import pytest

from edge_moe.compressor.rounding.gptq import damping_for
from edge_moe.compressor.rounding.inputs import Inputs, curvature_of


def step_by_definition(x: np.ndarray, token_weights: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """In float64, where no input is massive: least squares, each row as far as each half of the tokens confirms."""
    x, missing, token_weights = (one.astype(np.float64) for one in (x, missing, token_weights / token_weights.sum()))

    def fitted(rows: slice) -> np.ndarray:
        its, count = x[rows], token_weights[rows, None]
        moment = (its * count).T @ its
        added = damping_for(*its.shape) * np.trace(moment) / len(moment)
        return np.linalg.solve(moment + added * np.eye(len(moment)), (its * count).T @ missing[rows]).T

    halves = slice(0, None, 2), slice(1, None, 2)
    gain = curve = 0.0
    for mine, other in (halves, halves[::-1]):
        # mean over the other half of |missing - share * step x|^2, of which share's best is gain / curve
        output = x[other] @ fitted(mine).T
        gain = gain + (token_weights[other, None] * output * missing[other]).sum(axis=0)
        curve = curve + (token_weights[other, None] * output * output).sum(axis=0)
    share = np.clip(gain / curve, 0, 1)
    return fitted(slice(None)) * share[:, None]


def tokens(rows: int = 600, cols: int = 32, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    return rng, x, rng.random(rows).astype(np.float32)


def step_of(x: np.ndarray, token_weights: np.ndarray, missing: np.ndarray) -> np.ndarray:
    inputs = Inputs()
    for at in (slice(0, 100), slice(100, None)):
        inputs.add(x[at], token_weights[at], missing[at])
    return inputs.step()


def test_a_step_is_the_defined_one():
    rng, x, weights = tokens()
    missing = x @ rng.standard_normal((32, 8), np.float32) + 3 * rng.standard_normal((600, 8), np.float32)
    found = step_of(x, weights, missing)
    np.testing.assert_allclose(found, step_by_definition(x, weights, missing), rtol=1e-3, atol=1e-4)


def test_a_step_after_other_inputs_is_the_one_to_what_the_matrix_gives_there():
    rng, x, weights = tokens()
    clean = x @ rng.standard_normal((32, 32), np.float32) + rng.standard_normal((600, 32), np.float32)
    matrix = rng.standard_normal((8, 32)).astype(np.float32)
    inputs = Inputs()
    inputs.add(x, weights, clean - x)
    found = inputs.step(matrix)
    np.testing.assert_allclose(found, step_of(x, weights, (clean - x) @ matrix.T), rtol=1e-3, atol=1e-4)


def test_what_every_token_asks_for_is_done_whole():
    rng, x, weights = tokens()
    wanted = rng.standard_normal((8, 32)).astype(np.float32)
    found = step_of(x, weights, x @ wanted.T)
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()  # damping takes a hundredth


def test_noise_asks_for_little_and_a_target_that_is_met_for_nothing():
    rng, x, weights = tokens(rows=100)
    noise = rng.standard_normal((100, 400)).astype(np.float32)
    plain = curvature_of(x, weights).solve((noise * (weights / weights.sum())[:, None]).T @ x)
    found = step_of(x, weights, noise)
    assert np.square(found).sum() < 0.2 * np.square(plain).sum()
    assert not step_of(x, weights, np.zeros_like(noise)).any()


def test_a_token_that_lacks_a_thousand_times_as_much_moves_its_rows_alone_and_these_little():
    rng, x, weights = tokens()
    wanted = rng.standard_normal((8, 32)).astype(np.float32)
    missing = x @ wanted.T
    calm = step_of(x, weights, missing)
    missing[77, 3] += 1e5
    found = step_of(x, weights, missing)
    np.testing.assert_array_equal(np.delete(found, 3, axis=0), np.delete(calm, 3, axis=0))
    whole = curvature_of(x, weights).solve((missing * (weights / weights.sum())[:, None]).T @ x)
    assert np.abs(found[3]).max() < 0.1 * np.abs(whole[3]).max()


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_or_no_tokens_give_finite_steps(rows):
    rng, x, weights = tokens(rows=rows)
    found = step_of(x, weights, rng.standard_normal((rows, 4)).astype(np.float32))
    assert found.shape == (4, 32)
    assert np.isfinite(found).all()
