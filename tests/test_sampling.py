"""Sampling: the draws follow the distribution that temperature and top_p leave, and repeat with a seed."""

import numpy as np
import pytest

from edge_moe.runtime.sampling import Sampler, likeliest

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.1, 0.025], np.float32))


def draws(count: int, logits=LOGITS, **options) -> np.ndarray:
    sampler = Sampler(**options)
    return np.bincount([sampler(logits) for _ in range(count)], minlength=len(logits))


def test_temperature_zero_takes_the_most_likely_token_and_of_equals_the_first():
    assert Sampler()(np.array([0.0, 3.0, 1.0, 3.0], np.float32)) == 1
    assert Sampler(0.0, top_p=0.1, seed=5)(LOGITS) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_that_temperature(temperature):
    want = np.exp(LOGITS.astype(np.float64) / temperature)
    want *= 4000 / want.sum()
    found = draws(4000, temperature=temperature, seed=1)
    # Pearson's statistic with 4 degrees of freedom passes 18.5 in one of 1,000 seeds.
    assert (np.square(found - want) / want).sum() < 18.5


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 5), (1e-9, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = np.log2(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))[[3, 0, 4, 2, 1]] * np.log(2)
    order = np.argsort(-logits, kind="stable")
    found = draws(2000, logits.astype(np.float64), temperature=1.0, top_p=top_p, seed=2)
    assert set(np.flatnonzero(found)) == set(order[:kept])


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.99999])
def test_the_likeliest_of_many_are_those_of_a_full_sort(spread, share):
    random = np.random.default_rng(4)
    probabilities = np.round(np.exp(random.standard_normal(20_000) * spread), 2)  # many are equal
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    assert likeliest(probabilities, share).tolist() == sorted(order[before < share].tolist())


def test_top_p_applies_after_temperature():
    assert np.count_nonzero(draws(2000, temperature=1.0, top_p=0.8, seed=3)) == 3
    assert np.count_nonzero(draws(2000, temperature=0.3, top_p=0.8, seed=3)) == 1


def test_the_same_seed_gives_the_same_draws_and_another_others():
    logits = np.zeros(1000, np.float32)
    runs = []
    for seed in (7, 7, 8):
        sampler = Sampler(1.0, seed=seed)
        runs.append([sampler(logits) for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


def test_without_a_seed_draws_differ():
    logits = np.zeros(1000, np.float32)
    first, second = Sampler(1.0), Sampler(1.0)
    assert [first(logits) for _ in range(20)] != [second(logits) for _ in range(20)]


def test_extreme_logits_and_temperatures_stay_finite():
    logits = np.array([-3e38, 3e38, 0, 3e38], np.float32)
    assert set(np.flatnonzero(draws(50, logits, temperature=1.0, seed=0))) == {1, 3}
    assert draws(20, temperature=1e-300, seed=0)[0] == 20
    assert np.count_nonzero(draws(500, LOGITS, temperature=1e30, seed=0)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
        ({"temperature": float("inf")}, "temperature is inf, expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan, expected above 0 and at most 1"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        Sampler(**options)
    assert str(caught.value) == message
