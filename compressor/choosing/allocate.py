"""Which width for which expert: the integer programs.

`allocate_layer` is MC's (arXiv 2410.06270, section 3.2), one program a layer in nominal bits. `allocate_model` is
ours: one program over all layers in true bytes, scales, biases and padding included. Both are solved by HiGHS.
`mixed` and `published` bring a model's measures into the form that each takes.
"""

from dataclasses import dataclass

import numpy as np

from ...runtime.config import ModelConfig
from ..writing.writer import Packing, record_bytes_of
from .sensitivity import Measures

MC_WIDTHS = (1, 2, 3)
MC_EXPONENTS = {"mc": (1.0, 1.0, 2.0), "mc-release": (1.0, 1.5, 1.0)}  # alpha, beta, gamma: as printed, as released
FLAT = 2.0  # spread of sensitivity below which there is nothing to choose
RELATIVE_GAP = 2e-3  # of the optimum at which the program over all layers stops: below the error of any measurement,
#                      and a hundred times sooner than 1e-4 (0.3 s against 60 s for 64 experts)
NODE_LIMIT = 1000  # of the search tree; the best found so far is taken then. No clock: the same bytes on any machine


def packings(choices: list[tuple[int, int]]) -> list[Packing]:
    """The packings of an expert that pmq chooses from: gate and up alike, down as wide or up to two steps wider.

    An error in down goes straight to the output: it makes three quarters of the whole on the reference model. There, at
    2.5 bits, the expected divergence is 0.64 of one width's with the three alike, 0.52 with down one step wider or
    narrower, 0.51 with up to two wider; narrower ones add nothing, nor do gates unlike up.
    """
    options = []
    for group in sorted({group for _, group in choices}):
        widths = sorted(width for width, its in choices if its == group)
        for i, width in enumerate(widths):
            options += [Packing((width, width, down), group) for down in widths[i : i + 3]]
    return options


def packing_costs(measures: Measures, options: list[Packing]) -> np.ndarray:
    """(experts of all layers, options, domains + 1) expected KL divergence, nats a token."""
    cost, place = measures.cost(), {choice: i for i, choice in enumerate(measures.choices)}
    at = [[place[width, option.group] for width in option.widths] for option in options]
    return np.stack([sum(cost[:, part, where[part]] for part in range(3)) for where in at], axis=1)


@dataclass(frozen=True, slots=True)
class Paging:
    """A cap below the bundle's size. Bits tend to go to the experts that are used most, which are those to keep."""

    hot: np.ndarray  # (experts of all layers,) those that are to stay in memory
    hot_bytes: float  # what they may take
    frequency: np.ndarray  # (experts of all layers,) uses a token
    missed_bytes: float  # of the others, expected to be read for a token, at the most
    record_bytes: float  # of the largest expert, at the most: as many as a token uses in a layer fit at once


def mixed(
    config: ModelConfig, measures: Measures, budget: float, unit: Packing, paging: Paging | None = None, options=None
) -> list[Packing]:
    """pmq: the packing of each expert of the model, in order, in at most `budget` bytes.

    unit: one packing for all, in whose cost each domain's is counted. options: packings to choose from.
    """
    options = packings(measures.choices) if options is None else options
    limits = []
    if paging is not None:
        options = [option for option in options if record_bytes_of(config, option) <= paging.record_bytes]
    cost, sizes = _priced(config, measures, options, unit)
    if paging is not None:
        limits = [(sizes * paging.hot[:, None], paging.hot_bytes)]
        limits += [(sizes * np.where(paging.hot, 0, paging.frequency)[:, None], paging.missed_bytes)]
    return [options[i] for i in allocate_model(cost, sizes, budget, limits)]


def dropped(
    config: ModelConfig,
    measures: Measures,
    budget: float,
    unit: Packing,
    count: int,
    keep: list[tuple[np.ndarray, int]],
) -> np.ndarray:
    """(experts of all layers,) which `count` of them the program leaves out, with width 0 as one more choice.

    keep: (set of experts (experts of all layers,), how many of it must stay) for each layer or group.
    """
    options = packings(measures.choices)
    cost, sizes = _priced(config, measures, options, unit)
    present = [(m, gain) for m, gain in zip(measures.layers, measures.gain, strict=True) if m is not None]
    gone = np.concatenate([m.drop_errors * gain for m, gain in present])
    cost = np.concatenate([cost, (gone / _total(measures, unit))[:, None]], axis=1)
    sizes = np.concatenate([sizes, np.zeros((len(sizes), 1))], axis=1)
    out = np.zeros_like(sizes)
    out[:, -1] = 1
    limits = [(out, count), (-out, -count)]
    limits += [(out * its[:, None], np.count_nonzero(its) - least) for its, least in keep]
    return allocate_model(cost, sizes, budget, limits) == len(options)


def unit_of(config: ModelConfig, measures: Measures, bits: float) -> Packing:
    """The packing with one width, of those measured, that is nearest to `bits` true bits a weight."""
    fitting = [packing for packing in packings(measures.choices) if len(set(packing.widths)) == 1]
    return min(fitting, key=lambda p: abs(8 * record_bytes_of(config, p) / config.expert_weights - bits))


def _priced(config: ModelConfig, measures: Measures, options: list[Packing], unit: Packing):
    """(experts, options, domains + 1) cost in each domain's total at `unit`, and (experts, options) bytes."""
    cost = packing_costs(measures, options) / _total(measures, unit)
    return cost, np.tile([float(record_bytes_of(config, option)) for option in options], (len(cost), 1))


def _total(measures: Measures, unit: Packing) -> np.ndarray:
    return np.maximum(packing_costs(measures, [unit])[:, 0].sum(axis=0), 1e-30)


def curves(config: ModelConfig, measures: Measures) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each expert of the model, in order: nats and bytes of each packing that pmq chooses from."""
    options = packings(measures.choices)
    cost = packing_costs(measures, options)[:, :, :-1].mean(axis=-1)
    sizes = np.array([record_bytes_of(config, option) for option in options], np.float64)
    return [(nats, sizes) for nats in cost]


def published(config: ModelConfig, measures: Measures, budget: float, method: str, group: int) -> list[Packing]:
    """mc and mc-release: as mixed(), a program a layer, in nominal bits that keep the true ones within the budget."""
    count = config.expert_count
    true = [8 * record_bytes_of(config, Packing((w,) * 3, group)) / config.expert_weights for w in MC_WIDTHS]
    overhead = max(bits - width for bits, width in zip(true, MC_WIDTHS, strict=True))
    nominal = 8 * budget / (config.expert_weights * count) - overhead
    at = [measures.choices.index((width, group)) for width in MC_WIDTHS]
    chosen = []
    for layer in config.moe_layers:
        m = measures.layers[layer]
        error = np.sqrt(np.square(m.norm_errors[:, :, at]).sum(axis=1))  # of the three matrices together
        total_bits = int(nominal * config.experts_of(layer) + 1e-6)
        widths = allocate_layer(m.frequency, m.routing_weight, error, total_bits, *MC_EXPONENTS[method])
        chosen += [Packing((int(width),) * 3, group) for width in widths]
    return chosen


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


def allocate_model(cost, sizes, budget, limits=()) -> np.ndarray:
    """Option of each expert of the whole model, (experts,), within a budget of bytes.

    cost: (experts, options, domains), each domain in its own unit (its total at some common width). Minimises the
    mean over domains of their total plus the total of the worst: the mean alone buys the error of prose with that
    of code, the worst alone pays too much for the last per cent. sizes: (experts, options). limits:
    further sums that are bounded, as (what each option takes (experts, options), bound). Raises ValueError when the
    smallest options do not fit.
    """
    cost, sizes = np.asarray(cost, np.float64), np.asarray(sizes, np.float64)
    smallest = sizes.min(axis=1).sum()
    if smallest > budget:
        raise ValueError(f"a budget of {budget:,.0f} bytes is below {smallest:,.0f}, every expert at its smallest")
    return _solve(cost, sizes, budget, gap=RELATIVE_GAP, limits=limits)


def _solve(cost, sizes, budget, at_least_one=(), gap=0.0, limits=()) -> np.ndarray:
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
        *(LinearConstraint(row(np.reshape(taken, count)), -np.inf, bound) for taken, bound in limits),
    ]
    result = milp(
        np.append(flat.mean(axis=1), 1.0),
        integrality=np.append(np.ones(count), 0),
        bounds=Bounds(0, np.append(np.ones(count), np.inf)),
        constraints=constraints,
        options={"mip_rel_gap": gap, "node_limit": NODE_LIMIT},
    )
    if result.x is None:
        raise ValueError(f"the integer program has no solution within {budget:,.0f}: {result.message}")
    return np.argmax(result.x[:count].reshape(items, options), axis=1)
