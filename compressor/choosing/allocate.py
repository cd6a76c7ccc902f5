"""The integer programs that choose the width of each expert.

`allocate_layer` is the Mixture Compressor's (arXiv 2410.06270, section 3.2): one program a layer, in nominal bits.
`allocate_model` is one program over all layers in true bytes, scales, biases and padding included. HiGHS solves both.
`published` and `mixed` prepare a model's measures for the one and the other.
"""

from dataclasses import dataclass

import numpy as np

from ...runtime.config import ModelConfig
from ..writing.writer import KEPT, Packing, record_bytes_of
from .sensitivity import Measures

MC_WIDTHS = (1, 2, 3)
MC_EXPONENTS = {"mc": (1.0, 1.0, 2.0), "mc-release": (1.0, 1.5, 1.0)}  # alpha, beta, gamma: as printed, as released
FLAT = 2.0  # spread of sensitivity below which mixed widths gain nothing
RELATIVE_GAP = 2e-3  # of the optimum at which the program over all layers stops: below the error of any measurement,
#                      and a hundred times sooner than 1e-4 (0.3 s against 60 s for 64 experts)
NODE_LIMIT = 1000  # of the search tree, then the incumbent is taken; not a time limit: the same bytes on any machine


def packings(choices: list[tuple[int, int]]) -> list[Packing]:
    """The packings of an expert that pmq chooses from: gate and up at one width, down at the same or up to two wider.

    An error in down reaches the output directly: on the reference model it makes three quarters of the total error.
    There, at 2.5 bits, the expected divergence relative to uniform widths is 0.64 with the three matrices at one width,
    0.52 with down one step wider or narrower, and 0.51 with down up to two steps wider. A narrower down, or gate and up
    of different widths, gains nothing more.
    """
    options = []
    for group in sorted({group for _, group in choices}):
        widths = sorted(width for width, its in choices if its == group)
        for i, width in enumerate(widths):
            options += [Packing((width, width, down), group) for down in widths[i : i + 3]]
    return options


def options_of(measures: Measures) -> list[Packing]:
    """The packings that a model's experts may have: those of packings() and, of a checkpoint in MXFP4, its own codes,
    which cost nothing."""
    return packings(measures.choices) + ([KEPT] if measures.has_codes else [])


def packing_costs(measures: Measures, options: list[Packing]) -> np.ndarray:
    """Expected KL divergence in nats a token, (experts of all layers, options, domains + 1)."""
    cost, place = measures.cost(), {choice: i for i, choice in enumerate(measures.choices)}

    def of_experts(option: Packing) -> np.ndarray:
        if option == KEPT:
            return np.zeros_like(cost[:, 0, 0])
        return sum(cost[:, part, place[width, option.group]] for part, width in enumerate(option.widths))

    return np.stack([of_experts(option) for option in options], axis=1)


@dataclass(frozen=True, slots=True)
class Paging:
    """Limits for a bundle larger than the cap. Without them, bits tend to go to the experts that are used most, which
    are those to keep in memory."""

    hot: np.ndarray  # (experts of all layers,) whether the expert is to stay in memory
    hot_bytes: float  # the maximum that the hot experts may take together
    frequency: np.ndarray  # (experts of all layers,) uses a token
    missed_bytes: float  # the maximum of expected bytes read for a token, of experts that are not hot
    record_bytes: float  # the maximum of one record: as many as a token uses in a layer fit at once


def mixed(
    config: ModelConfig, measures: Measures, budget: float, unit: Packing, paging: Paging | None = None, options=None
) -> list[Packing]:
    """pmq: the packing of each expert of the model, in order, in at most `budget` bytes.

    unit: the cost of a domain is divided by its total with this packing for all experts. options: packings to choose
    from, by default options_of().
    """
    options = options_of(measures) if options is None else options
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
    """Which `count` experts the program drops, (experts of all layers,) bool, with width 0 as one more option.

    keep: for each layer or group, (its experts as a mask (experts of all layers,), the minimum that must stay).
    """
    options = options_of(measures)
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
    """The measured packing with one width for all matrices that is nearest to `bits` true bits a weight."""
    fitting = [packing for packing in packings(measures.choices) if len(set(packing.widths)) == 1]
    return min(fitting, key=lambda p: abs(8 * record_bytes_of(config, p) / config.expert_weights - bits))


def _priced(config: ModelConfig, measures: Measures, options: list[Packing], unit: Packing):
    """Costs in each domain's total at `unit`, (experts, options, domains + 1), and bytes, (experts, options)."""
    cost = packing_costs(measures, options) / _total(measures, unit)
    return cost, np.tile([float(record_bytes_of(config, option)) for option in options], (len(cost), 1))


def _total(measures: Measures, unit: Packing) -> np.ndarray:
    return np.maximum(packing_costs(measures, [unit])[:, 0].sum(axis=0), 1e-30)


def curves(config: ModelConfig, measures: Measures) -> list[tuple[np.ndarray, np.ndarray]]:
    """The nats and bytes, for each expert of the model in order, of each packing that pmq chooses from."""
    options = options_of(measures)
    cost = packing_costs(measures, options)[:, :, :-1].mean(axis=-1)
    sizes = np.array([record_bytes_of(config, option) for option in options], np.float64)
    return [(nats, sizes) for nats in cost]


def published(config: ModelConfig, measures: Measures, budget: float, method: str, group: int) -> list[Packing]:
    """mc and mc-release: like mixed(), but one program a layer, in nominal bits, with true bits within the budget."""
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
    """Widths of one layer's experts, (experts,), that minimise the sum of phi^alpha * w^beta * eps^gamma.

    phi is the frequency and w the routing_weight, (experts,); eps is the error, (experts, len(widths)): the change of
    the layer's output with one expert at one width. total_bits: the maximum of the sum of widths. At least one expert
    gets the largest width and one the second largest, as in the paper. The exponents are (1, 1.5, 1) in the authors'
    release; the paper has gamma 2. Raises ValueError if total_bits is below what the rule needs.
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
        raise ValueError(f"{total_bits} bits for {experts} experts is below {least}, the minimum that this rule needs")
    rows = [np.array([float(i % options == option) for i in range(experts * options)]) for option in required]
    chosen = _solve(cost[:, :, None], sizes, total_bits, at_least_one=rows)
    return np.array(widths)[chosen]


def allocate_model(cost, sizes, budget, limits=()) -> np.ndarray:
    """The option chosen for each expert of the model, (experts,), within a budget of bytes.

    cost: (experts, options, domains), each domain relative to its total at some common width. Minimises the mean over
    domains of their total plus the total of the worst domain: the mean alone lowers the error of prose at the expense
    of code, the worst alone spends too much on the last per cent. sizes: (experts, options). limits: further upper
    bounds, as (what each option takes (experts, options), bound). Raises ValueError if the smallest options do not fit.
    """
    cost, sizes = np.asarray(cost, np.float64), np.asarray(sizes, np.float64)
    smallest = sizes.min(axis=1).sum()
    if smallest > budget:
        raise ValueError(
            f"a budget of {budget:,.0f} bytes is below {smallest:,.0f}, what all experts take at their smallest option"
        )
    return _solve(cost, sizes, budget, gap=RELATIVE_GAP, limits=limits)


def _solve(cost, sizes, budget, at_least_one=(), gap=0.0, limits=()) -> np.ndarray:
    """Choose one option per row within the budget; each mask of `at_least_one` must contain a chosen option.

    cost: (items, options, domains). The last variable of the program is the total of the worst domain.
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
