"""Which width for which expert: the integer programs.

`allocate_layer` is MC's (arXiv 2410.06270, section 3.2), one program a layer in nominal bits. `allocate_model` is
ours: one program over all layers in true bytes, scales, biases and padding included. Both are solved by HiGHS.
"""

import numpy as np

RELATIVE_GAP = 2e-3  # of the optimum at which the program over all layers stops: below the error of any measurement,
#                      and a hundred times sooner than 1e-4 (0.3 s against 60 s for 64 experts)
TIME_LIMIT_S = 120  # the best found so far is taken then


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
    chosen = _solve(cost[:, :, None], sizes, total_bits, at_least_one=rows)
    return np.array(widths)[chosen]


def allocate_model(cost, sizes, budget) -> np.ndarray:
    """Option of each expert of the whole model, (experts,), within a budget of bytes.

    cost: (experts, options, domains), each domain in its own unit (its total at some common width). Minimises the
    mean over domains of their total plus the total of the worst: the mean alone buys the error of prose with that
    of code, the worst alone pays too much for the last per cent. sizes: (experts, options). Raises ValueError when
    the smallest options do not fit.
    """
    cost, sizes = np.asarray(cost, np.float64), np.asarray(sizes, np.float64)
    smallest = sizes.min(axis=1).sum()
    if smallest > budget:
        raise ValueError(f"a budget of {budget:,.0f} bytes is below {smallest:,.0f}, every expert at its smallest")
    return _solve(cost, sizes, budget, gap=RELATIVE_GAP)


def _solve(cost, sizes, budget, at_least_one=(), gap=0.0) -> np.ndarray:
    """Choose one option a row within the budget; every mask of `at_least_one` must have one chosen option.

    cost: (items, options, domains). The last variable is the worst domain's total.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    items, options, domains = cost.shape
    count = items * options
    flat = (cost / (cost.max() or 1.0)).reshape(count, domains)
    one_each = csr_array(
        (np.ones(count), (np.repeat(np.arange(items), options), np.arange(count))), shape=(items, count + 1)
    )

    def row(values, last=0.0):
        return csr_array(np.append(values, last)[None])

    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(row(sizes.reshape(count)), -np.inf, budget),
        *(LinearConstraint(row(flat[:, domain], -1.0), -np.inf, 0) for domain in range(domains)),
        *(LinearConstraint(row(mask), 1, np.inf) for mask in at_least_one),
    ]
    result = milp(
        np.append(flat.mean(axis=1), 1.0),
        integrality=np.append(np.ones(count), 0),
        bounds=Bounds(0, np.append(np.ones(count), np.inf)),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        raise ValueError(f"the integer program has no solution within {budget:,.0f}: {result.message}")
    return np.argmax(result.x[:count].reshape(items, options), axis=1)
