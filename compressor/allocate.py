"""Which width for which expert: the integer programs.

`allocate_layer` is MC's (arXiv 2410.06270, section 3.2), one program a layer in nominal bits. `allocate_model` is
ours: one program over all layers in true bytes, scales, biases and padding included. Both are solved by HiGHS.
"""

import numpy as np

RELATIVE_GAP = 1e-4  # of the optimum at which the solver may stop; far below the error of any measurement


def allocate_layer(frequency, routing_weight, error, total_bits, alpha, beta, gamma, widths=(1, 2, 3)) -> np.ndarray:
    """Widths of one layer's experts, (experts,), minimising sum of phi^alpha * w^beta * eps^gamma.

    frequency, routing_weight: (experts,). error: (experts, len(widths)), the change of the layer's output with one
    expert at one width. total_bits: the most that the widths may add up to. At least one expert gets the largest
    width and one the one below, as in the paper, where the budget allows both. Exponents (1, 1.5, 1) are the
    authors' release, gamma 2 is the paper. Raises ValueError when total_bits is below what the rule needs.
    """
    frequency, routing_weight, error = (np.asarray(x, np.float64) for x in (frequency, routing_weight, error))
    experts, options = error.shape
    importance = frequency**alpha * routing_weight**beta
    cost = importance[:, None] * error**gamma
    sizes = np.tile(np.array(widths, np.float64), (experts, 1))
    order = np.argsort(widths)
    required = [int(order[-1]), int(order[-2])] if options > 1 and experts > 1 else []
    least = (experts - len(required)) * min(widths) + sum(widths[option] for option in required)
    if total_bits < least:
        raise ValueError(f"{total_bits} bits for {experts} experts is below {least}, the least this rule needs")
    rows = [np.array([float(i % options == option) for i in range(experts * options)]) for option in required]
    chosen = _solve(cost, sizes, total_bits, at_least_one=rows)
    return np.array(widths)[chosen]


def allocate_model(cost, sizes, budget) -> np.ndarray:
    """Option of each expert of the whole model, (experts,), minimising total cost within a budget of bytes.

    cost, sizes: (experts, options). Raises ValueError when the smallest options do not fit.
    """
    cost, sizes = np.asarray(cost, np.float64), np.asarray(sizes, np.float64)
    if sizes.min(axis=1).sum() > budget:
        raise ValueError(
            f"a budget of {budget:,} bytes is below {int(sizes.min(axis=1).sum()):,}, every expert at its smallest"
        )
    return _solve(cost, sizes, budget)


def _solve(cost, sizes, budget, at_least_one=()) -> np.ndarray:
    """Choose one option a row within the budget; every mask of `at_least_one` must have one chosen option."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    items, options = cost.shape
    count = items * options
    scale = cost.max() or 1.0
    one_each = csr_array(
        (np.ones(count), (np.repeat(np.arange(items), options), np.arange(count))), shape=(items, count)
    )
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(sizes.reshape(1, count)), -np.inf, budget),
        *(LinearConstraint(csr_array(mask.reshape(1, count)), 1, np.inf) for mask in at_least_one),
    ]
    result = milp(
        cost.reshape(-1) / scale,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if result.x is None:
        raise ValueError(f"the integer program has no solution within {budget:,}: {result.message}")
    return np.argmax(result.x.reshape(items, options), axis=1)
