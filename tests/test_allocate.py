"""The integer programs against every assignment there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.compressor.choosing.allocate import RELATIVE_GAP, allocate_layer, allocate_model

WIDTHS = (1, 2, 3)
PAPER, RELEASE = (1.0, 1.0, 2.0), (1.0, 1.5, 1.0)


def layer_problem(seed: int, experts: int = 4):
    """Frequencies, routing weights and errors that fall with the width, as calibration gives them."""
    rng = np.random.default_rng(seed)
    frequency, weight = rng.dirichlet(np.ones(experts)), rng.dirichlet(np.ones(experts))
    return frequency, weight, -np.sort(-rng.gamma(2.0, size=(experts, 3)), axis=1)


def layer_cost(problem, exponents, assignment) -> float:
    frequency, weight, error = problem
    alpha, beta, gamma = exponents
    chosen = error[np.arange(len(error)), np.searchsorted(WIDTHS, assignment)]
    return float((frequency**alpha * weight**beta * chosen**gamma).sum())


@pytest.mark.parametrize("exponents", [PAPER, RELEASE])
@pytest.mark.parametrize("total_bits", [7, 8, 9, 10, 12])
def test_a_layer_gets_the_best_of_all_assignments(exponents, total_bits):
    for seed in range(6):
        problem = layer_problem(seed)
        allowed = [
            assignment
            for assignment in itertools.product(WIDTHS, repeat=4)
            if sum(assignment) <= total_bits and 3 in assignment and 2 in assignment
        ]
        best = min(layer_cost(problem, exponents, assignment) for assignment in allowed)
        found = allocate_layer(*problem, total_bits, *exponents)
        assert tuple(found) in allowed
        # HiGHS stops within 1e-6 of the largest term of its objective.
        largest = max(layer_cost(problem, exponents, (w,) * 4) for w in WIDTHS)
        assert layer_cost(problem, exponents, found) <= best + 1e-6 * largest


def test_the_exponents_decide_between_a_frequent_and_a_heavy_expert():
    # 6 bits for 3 experts: one has 3, one 2, one 1.
    error = np.array([[1.0, 0.2, 0.1]] * 3)
    frequency, weight = np.array([0.9, 0.5, 0.5]), np.array([0.1, 0.5, 0.1])
    assert allocate_layer(frequency, weight, error, 6, 4.0, 1.0, 1.0).tolist() == [3, 2, 1]
    assert allocate_layer(frequency, weight, error, 6, 1.0, 4.0, 1.0).tolist() == [2, 3, 1]


@given(experts=st.integers(2, 24), extra=st.integers(0, 30), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_layer_keeps_to_its_budget_and_to_the_rule(experts, extra, seed):
    total_bits = experts + 3 + extra
    found = allocate_layer(*layer_problem(seed, experts), total_bits, *PAPER)
    assert found.shape == (experts,)
    assert set(found) <= set(WIDTHS)
    assert found.sum() <= total_bits
    assert (found == 3).sum() >= 1
    assert (found == 2).sum() >= 1


def test_with_bits_for_all_every_expert_but_one_gets_the_largest():
    found = allocate_layer(*layer_problem(0), 100, *PAPER)
    assert sorted(found) == [2, 3, 3, 3]


def test_a_budget_below_the_rule_is_refused():
    with pytest.raises(ValueError) as caught:
        allocate_layer(*layer_problem(0), 6, *PAPER)
    assert str(caught.value) == "6 bits for 4 experts is below 7, the minimum that this rule needs"


# ---- the whole model


def model_problem(seed: int, items: int = 6, options: int = 3, domains: int = 3):
    """Costs that fall with the option, in units of a domain's total at option 1, and sizes that grow."""
    rng = np.random.default_rng(seed)
    cost = rng.gamma(0.5, size=(items, 1, domains)) * -np.sort(-rng.gamma(2.0, size=(items, options, 1)), axis=1)
    sizes = np.tile(np.cumsum(rng.integers(4096, 20_000, options)), (items, 1))
    return cost / cost[:, 1].sum(axis=0), sizes


def model_cost(cost, assignment) -> float:
    totals = cost[np.arange(len(cost)), assignment].sum(axis=0)
    return float(totals.mean() + totals.max())


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
def test_a_model_gets_the_best_of_all_assignments_within_the_gap(domains, share):
    for seed in range(6):
        cost, sizes = model_problem(seed, domains=domains)
        smallest, largest = sizes[:, 0].sum(), sizes[:, -1].sum()
        budget = smallest + share * (largest - smallest)
        everything = [
            assignment
            for assignment in itertools.product(range(3), repeat=6)
            if sizes[np.arange(6), assignment].sum() <= budget
        ]
        best = min(model_cost(cost, assignment) for assignment in everything)
        found = allocate_model(cost, sizes, budget)
        assert tuple(found) in everything
        assert model_cost(cost, found) <= best * (1 + RELATIVE_GAP) + 1e-6 * cost.max()


def test_the_worst_domain_counts_beside_the_mean():
    # Expert 0 matters to domain 0 alone, the others to domain 1 a little more in sum; one of the two can be large.
    cost = np.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.2], [0.0, 1.0]]])
    sizes = np.array([[1, 2], [1, 2]])
    assert allocate_model(cost, sizes, 3).tolist() == [1, 0]
    cost[0, 0, 0], cost[1] = 0.5, [[0.0, 1.2], [0.0, 0.75]]
    assert cost[0, 0].mean() > (cost[1, 0] - cost[1, 1]).mean()  # by the mean alone expert 0 would win again
    assert allocate_model(cost, sizes, 3).tolist() == [0, 1]


@given(items=st.integers(1, 40), options=st.integers(1, 5), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_model_keeps_to_its_budget_of_bytes(items, options, share, seed):
    rng = np.random.default_rng(seed)
    cost, sizes = rng.gamma(1.0, size=(items, options, 2)), rng.integers(1, 10**6, (items, options))
    budget = sizes.min(1).sum() + share * (sizes.max(1).sum() - sizes.min(1).sum())
    chosen = allocate_model(cost, sizes, budget)
    # HiGHS keeps constraints within 1e-6 of their scale.
    assert sizes[np.arange(items), chosen].sum() <= budget


def test_costs_of_zero_are_no_difficulty():
    chosen = allocate_model(np.zeros((4, 3, 2)), np.tile([1, 2, 3], (4, 1)), 7)
    assert np.array([1, 2, 3])[chosen].sum() <= 7


def test_a_budget_below_the_smallest_options_is_refused():
    with pytest.raises(ValueError) as caught:
        allocate_model(np.ones((2, 2, 1)), [[1000, 3000], [2000, 4000]], 2999)
    assert str(caught.value) == (
        "a budget of 2,999 bytes is below 3,000, what all experts take at their smallest option"
    )
