"""The trunk's widths: what is rounded while measuring, what that costs, and which width of each kind comes out."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from golden_checkpoints import ARCHITECTURES, CHECKPOINTS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from edge_moe.compressor.choosing import sensitivity, trunk
from edge_moe.compressor.choosing.sensitivity import Sensitivity
from edge_moe.compressor.choosing.trunk import (
    FITTED,
    PROBED,
    WIDTHS,
    ProbedTrunk,
    choose_widths,
    expected,
    packing_of,
    rate_at,
)
from edge_moe.compressor.passes.calibrate import Calibration
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.quantise import dequantise, quantise, trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.layers.mlp import Dense
from edge_moe.runtime.score import log_softmax

KINDS = {
    "mixtral": {"embedding", "attention", "head"},
    "olmoe": {"embedding", "attention"},  # whose head is the embedding
    "qwen2_moe": {"embedding", "attention", "dense", "shared", "head"},
    "qwen3_moe": {"embedding", "attention", "head"},
    "deepseek_v3": {"embedding", "attention", "dense", "shared", "head"},
    "moonlight": {"embedding", "attention", "dense", "shared", "head"},
    "deepseek_v2": {"embedding", "attention", "dense", "shared", "head"},
    "deepseek_v32": {"embedding", "attention", "dense", "shared", "head"},
    "deepseek_v4": {"embedding", "attention", "shared", "head"},
    "ernie4_5_moe": {"embedding", "attention", "dense", "shared"},
    "gemma4": {"embedding", "attention", "shared"},
    "gemma4_text": {"embedding", "attention", "shared", "head"},
    "glm4_moe": {"embedding", "attention", "dense", "shared", "head"},
    "glm4_moe_lite": {"embedding", "attention", "dense", "shared", "head"},
    "glm_moe_dsa": {"embedding", "attention", "dense", "shared"},
    "gpt_oss": {"embedding", "attention", "head"},
    "granitemoe": {"embedding", "attention"},
    "hunyuan_v1_moe": {"embedding", "attention", "shared", "head"},
    "kimi_k25": {"embedding", "attention", "shared", "head"},
    "lfm2_moe": {"embedding", "attention", "conv", "dense"},
    "minimax_m2": {"embedding", "attention", "head"},
    "mistral3": {"embedding", "attention", "shared", "head"},
    "mistral4": {"embedding", "attention", "dense", "shared", "head"},
    "nemotron_h": {"embedding", "attention", "mamba", "dense", "shared", "head"},
    "phimoe": {"embedding", "attention", "head"},
    "qwen3_5_moe": {"embedding", "attention", "delta", "shared", "head"},
    "qwen3_5_moe_text": {"embedding", "attention", "delta", "shared"},
    "qwen3_next": {"embedding", "attention", "delta", "dense", "shared", "head"},
    "qwen3_vl_moe": {"embedding", "attention", "head"},
    "qwen4_exp": {"embedding", "attention", "delta", "streams", "shared", "head"},
    "qwen4_exp_text": {"embedding", "attention", "delta", "streams", "shared"},
}
ATTENTION = {"q", "k", "v", "o", "o_gate", "q_a", "q_b", "kv_a", "kv_b", "kv", "o_a"}


def kind_of(name: str) -> str | None:
    """By name alone; None for norms, biases and routers."""
    parts = name.split(".")[2:] if name.startswith("layers.") else [name]
    if parts[0] == "delta":
        return "delta" if parts[1] in ("qkv", "gate", "o") else None
    if parts[0] in ("index", "pool"):
        return "attention" if parts[1] == "q" or (parts[0] == "pool" and parts[1] in ("kv", "gate")) else None
    if parts[0] == "mamba":
        return "mamba" if parts[1] in ("xbc", "gate", "o") else None
    if parts[0] == "conv":
        return "conv" if parts[1] != "weights" else None
    parts = name.split(".") if name.startswith("output_mix.") else parts
    if parts[0].endswith("_mix") or parts[0] == "ngrams":
        return "streams" if parts[1] in ("down", "up", "key", "value") else None
    if parts[0] in ("embedding", "head", "shared", "dense"):
        return parts[0]
    return "attention" if parts[0] in ATTENTION else None


def rounded(tensor: np.ndarray) -> np.ndarray:
    """At four bits, in groups of 64 or 32 inputs."""
    group = 64 if tensor.shape[1] % 64 == 0 else 32
    return dequantise(quantise(tensor, 4, group), 4, tensor.shape[1])


class OneKind:
    """A checkpoint with all tensors of a kind rounded beforehand."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        names = [name for name in checkpoint.trunk_names() if kind_of(name) == kind]
        self.checkpoint, self.changed = checkpoint, {name: rounded(checkpoint.trunk(name)) for name in names}

    def trunk(self, name: str) -> np.ndarray:
        return self.changed[name] if name in self.changed else self.checkpoint.trunk(name)

    def expert(self, layer: int, expert: int):
        return self.checkpoint.expert(layer, expert)

    def expert_bias(self, layer: int, expert: int):
        return self.checkpoint.expert_bias(layer, expert)


# ---- kinds


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_kind_that_a_model_has_is_named_once(golden, name):
    found = trunk.kinds(Checkpoint(golden[name][0]).config)
    assert set(found) == KINDS[name]
    assert len(found) == len(KINDS[name])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_kind_is_rounded_to_four_bits_and_nothing_else(golden, name):
    checkpoint = Checkpoint(golden[name][0])
    for kind in KINDS[name]:
        probed, changed = ProbedTrunk(checkpoint, checkpoint.config, kind), set()
        for tensor in checkpoint.trunk_names():
            if ".experts." in tensor:
                continue
            source, found = checkpoint.trunk(tensor), probed.trunk(tensor)
            assert found.shape == source.shape
            if not np.array_equal(found, source):
                changed.add(tensor)
                group = 64 if source.shape[1] % 64 == 0 else 32
                groups, before = found.reshape(-1, group), source.reshape(-1, group)
                assert max(len(np.unique(one)) for one in groups) <= 16
                step = (before.max(1) - before.min(1)) / 15
                assert (np.abs(groups - before).max(1) < 1.2 * step).all()
        its = {tensor for tensor in checkpoint.trunk_names() if kind_of(tensor) == kind}
        assert changed == {tensor for tensor in its if checkpoint.shape(tensor)[1] % 32 == 0}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_width_for_all_kinds_is_the_packing_of_that_width(golden, name, width):
    config = Checkpoint(golden[name][0]).config
    assert packing_of(config, dict.fromkeys(KINDS[name], width)) == trunk_packing(trunk_shapes(config), width, 64)


def test_each_tensor_gets_the_width_of_its_kind(golden):
    config = load_config(golden["qwen2_moe"][0])
    widths = {"embedding": 5, "attention": 6, "dense": 8, "shared": 4, "head": 5}
    found = packing_of(config, widths)
    assert found.keys() == trunk_shapes(config).keys()
    for name, packing in found.items():
        assert packing.widths == ((widths[kind_of(name)],) if kind_of(name) else (32,))


def test_a_matrix_that_cannot_be_grouped_stays_as_it_is_whatever_its_kind_gets(golden):
    config = load_config(golden["qwen2_moe"][0])
    narrow = [replace(layer, mlp=Dense(40)) if isinstance(layer.mlp, Dense) else layer for layer in config.layers]
    config = replace(config, layers=tuple(narrow))
    found = packing_of(config, dict.fromkeys(KINDS["qwen2_moe"], 5))
    assert {name: p.widths for name, p in found.items() if ".dense." in name} == {
        "layers.1.dense.gate": (5,),
        "layers.1.dense.up": (5,),
        "layers.1.dense.down": (16,),  # rows of 40 inputs
    }


# ---- the rate


def random_curves(seed: int, items: int, options: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Neither convex nor sorted: some options are worth nothing."""
    rng = np.random.default_rng(seed)
    return [(rng.gamma(1.0, size=options), rng.integers(1, 1000, options).astype(float)) for _ in range(items)]


def dual(curves, budget: float) -> float:
    """Of the budget, in the linear program over all shares of options."""
    nats, sizes = (np.concatenate([curve[part] for curve in curves]) for part in (0, 1))
    owner = np.repeat(np.arange(len(curves)), [len(curve[0]) for curve in curves])
    one_each = (owner == np.arange(len(curves))[:, None]).astype(float)
    result = linprog(nats, A_ub=sizes[None], b_ub=[budget], A_eq=one_each, b_eq=np.ones(len(curves)))
    assert result.status == 0
    return -float(result.ineqlin.marginals[0])


@given(seed=st.integers(0, 2**32 - 1), items=st.integers(1, 8), options=st.integers(1, 6), share=st.floats(0.001, 1.05))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_rate_is_the_dual_of_the_budget(seed, items, options, share):
    curves = random_curves(seed, items, options)
    least, best = sum(s.min() for _, s in curves), sum(s[np.argmin(n)] for n, s in curves)
    budget = least + share * (best - least) + 0.123  # at no corner, where the dual is not one number
    assert rate_at(curves, budget) == pytest.approx(dual(curves, budget), rel=1e-6, abs=1e-12)


def test_the_rate_is_the_steepest_where_nothing_fits_and_nothing_where_everything_does():
    curves = [(np.array([8.0, 4.0, 3.0]), np.array([10.0, 12.0, 16.0])), (np.array([5.0, 4.0]), np.array([10.0, 20.0]))]
    # steps: 2 nats a byte for 2 bytes, 0.25 for 4, 0.1 for 10
    rates = {19: 2.0, 20: 2.0, 21.9: 2.0, 22: 0.25, 25.9: 0.25, 26: 0.1, 35.9: 0.1, 36: 0.0, 1e9: 0.0}
    assert {budget: rate_at(curves, budget) for budget in rates} == pytest.approx(rates)
    assert rate_at(curves[::-1], 23) == pytest.approx(0.25)
    assert rate_at([], 0) == 0


# ---- widths


@pytest.fixture(scope="module")
def config(golden):
    return load_config(golden["qwen2_moe"][0])


def kind_bytes(config, kind: str, width: int) -> float:
    """Codes, and a scale and a bias of two bytes each for a group."""
    shapes = [shape for name, shape in trunk_shapes(config).items() if kind_of(name) == kind]
    return sum(rows * cols * width / 8 + 4 * rows * cols / (64 if cols % 64 == 0 else 32) for rows, cols in shapes)


@dataclass(frozen=True)
class Problem:
    """Nats of each kind at four bits, and experts whose error falls with their size."""

    divergence: dict[str, float]
    experts: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def drawn(cls, seed: int, experts: int) -> "Problem":
        rng = np.random.default_rng(seed)
        sizes = np.array([4096.0, 4096, 8192, 12288, 16384])
        curves = [(rng.gamma(0.3) * np.array([1.3, 1, 0.3, 0.1, 0.03]), sizes) for _ in range(experts)]
        return cls({kind: float(rng.gamma(0.3)) for kind in sorted(KINDS["qwen2_moe"])}, curves)

    def curves(self, config):
        """(nats, bytes) of each kind's widths."""
        law = np.array([expected(width) for width in WIDTHS])
        left = dict.fromkeys(self.divergence, FITTED) | {"embedding": 1}
        return {
            kind: (nats * left[kind] * law, np.array([kind_bytes(config, kind, width) for width in WIDTHS]))
            for kind, nats in self.divergence.items()
        }


def at_price(curve, price: float) -> int:
    """The option that is best when a byte costs so many nats; of equals the smallest."""
    nats, sizes = curve
    total = nats + price * sizes
    return min(np.flatnonzero(total <= total.min() * (1 + 1e-12)), key=lambda option: sizes[option])


def cheapest_price(curves, budget: float) -> float:
    """The least price of a byte at which what everyone takes fits: tried are all at which anyone changes their mind."""
    prices = {0.0}
    for nats, sizes in curves:
        for a in range(len(nats)):
            prices |= {(nats[a] - nats[b]) / (sizes[b] - sizes[a]) for b in range(len(nats)) if sizes[b] > sizes[a]}
    fitting = (
        price
        for price in sorted(price for price in prices if price >= 0)
        if sum(curve[1][at_price(curve, price)] for curve in curves) <= budget
    )
    return next(fitting, max(prices))


@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(0, 12), share=st.floats(0, 1.1), whole=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_kind_is_as_wide_as_the_price_of_a_byte_makes_it(config, seed, experts, share, whole):
    problem = Problem.drawn(seed, experts)
    of_trunk = problem.curves(config)
    shared = [*problem.experts, *(of_trunk.values() if whole else ())]
    least, most = (sum(pick(sizes) for _, sizes in shared) for pick in (min, max))
    budget = least + share * (most - least)
    price = cheapest_price(shared, budget)
    narrowest = sum(sizes[0] for _, sizes in of_trunk.values()) if whole else 0  # which is added
    found = choose_widths(config, problem.divergence, problem.experts, budget - narrowest, whole)
    assert found == {kind: WIDTHS[at_price(curve, price)] for kind, curve in of_trunk.items()}
    if whole:  # beside experts that keep to the same price
        taken = sum(sizes[at_price((nats, sizes), price)] for nats, sizes in problem.experts)
        assert taken + sum(kind_bytes(config, kind, width) for kind, width in found.items()) <= budget


@given(seed=st.integers(0, 2**32 - 1), whole=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_more_budget_never_narrows(config, seed, whole):
    problem, before = Problem.drawn(seed, 6), dict.fromkeys(KINDS["qwen2_moe"], 0)
    for budget in np.linspace(0, 300_000, 25):
        found = choose_widths(config, problem.divergence, problem.experts, budget, whole)
        assert all(found[kind] >= before[kind] for kind in found)
        before = found
    assert set(before.values()) == {8}  # once everything fits


def test_a_kind_that_costs_nothing_is_narrow_and_one_that_costs_much_is_wide(config):
    problem = Problem.drawn(0, 6)
    divergence = dict.fromkeys(KINDS["qwen2_moe"], 1e-12) | {"shared": 1e6}
    found = choose_widths(config, divergence, problem.experts, 6 * 8192, whole=False)
    assert found == dict.fromkeys(KINDS["qwen2_moe"], 4) | {"shared": 8}


# ---- the measured divergence


def measured(checkpoint: Checkpoint, ids, workers=1, files: Path | None = None) -> dict[str, float]:
    config, made = checkpoint.config, []

    def new_stream(name: str, rows: int, dim: int = 0) -> Stream:
        made.append(Stream(rows, dim or config.width, files / f"{len(made)}-{name}" if files else None))
        return made[-1]

    calibration = Calibration(ids, "", np.zeros(len(ids), np.int64), ids[:0], "")
    trunks = {kind: ProbedTrunk(checkpoint, config, kind) for kind in trunk.kinds(config)}
    pass_ = Sensitivity(config, checkpoint, calibration, [(2, 32)], 0, workers, 1, new_stream, trunks=trunks)
    pass_.start()
    layers = [pass_.layer(layer, lambda done: None) for layer in range(config.layer_count)]
    found = pass_.finish(layers, 100).trunk
    pass_.close()
    return found


def divergence(checkpoint: Checkpoint, ids, kind: str) -> float:
    """Of the whole model with that kind rounded, nats a token."""
    clean, moved = (
        log_softmax(reference.forward(checkpoint.config, weights, ids).reshape(ids.size, -1))
        for weights in (checkpoint, OneKind(checkpoint, kind))
    )
    return float((np.exp(clean) * (clean - moved)).sum(-1).mean())


def some_ids(vocab: int, sequences: int = 4) -> np.ndarray:
    return np.random.default_rng(6).integers(0, vocab, (sequences, 64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_divergence_of_a_kind_is_that_of_the_model_with_it_rounded(golden, architecture):
    checkpoint = Checkpoint(golden[architecture][0])
    ids = some_ids(checkpoint.config.vocab)
    found = measured(checkpoint, ids)
    assert found.keys() == KINDS[architecture]
    # Sums in another order: a token whose scores are as good as equal may take another expert.
    for kind, nats in found.items():
        assert nats == pytest.approx(divergence(checkpoint, ids, kind), rel=1e-3), kind
    assert len({round(nats, 9) for nats in found.values()}) == len(found)


def test_of_much_text_a_sample_of_sequences_is_measured(golden, monkeypatch):
    monkeypatch.setattr(sensitivity, "GAIN_SEQUENCES", 3)
    monkeypatch.setattr(sensitivity, "GAIN_ROWS", 1)
    checkpoint = Checkpoint(golden["mixtral"][0])
    ids = some_ids(checkpoint.config.vocab, sequences=9)
    found = measured(checkpoint, ids)
    for kind, nats in found.items():
        assert nats == pytest.approx(divergence(checkpoint, ids[[0, 4, 8]], kind), rel=1e-3)
        assert nats != pytest.approx(divergence(checkpoint, ids, kind), rel=1e-3)


def test_workers_and_files_do_not_change_the_divergence(golden, tmp_path):
    checkpoint = Checkpoint(golden["qwen2_moe"][0])
    ids = some_ids(checkpoint.config.vocab)
    one = measured(checkpoint, ids)
    assert measured(checkpoint, ids, workers=2) == one
    assert measured(checkpoint, ids, workers=3, files=tmp_path) == one
    assert list(tmp_path.iterdir()) == []


# ---- whole bundles


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 128, 2048))
    return {"calibration": file, "tokens": 256, "threads": 1, "certificate": False}


def trunk_widths(bundle: Bundle) -> dict[str | None, set[int]]:
    """Of the tensors in the file, by kind."""
    found = {}
    for tensor in bundle.trunk:
        found.setdefault(kind_of(tensor.name), set()).add(tensor.width)
    return found


def directory_bytes(bundle: Bundle) -> int:
    return sum(file.stat().st_size for file in bundle.path.iterdir())


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe"])
def test_the_table_names_each_kinds_width_and_its_tensors_have_it(golden, tmp_path, options, architecture):
    bundle = compress(golden[architecture][0], tmp_path / "new.emoe", bits=6, **options)
    widths = bundle.table["method"]["trunk"]
    assert widths.keys() == KINDS[architecture]
    assert set(widths.values()) <= set(WIDTHS)
    assert trunk_widths(bundle) == {kind: {width} for kind, width in widths.items()} | {None: {32}}
    assert bundle.bits_per_weight <= 6


def test_a_larger_bundle_has_no_narrower_trunk_and_keeps_to_its_size(golden, tmp_path, options):
    """Between the least, where there is nothing to give, and where everything is at 8 bits."""
    before = dict.fromkeys(KINDS["qwen3_moe"], 4)
    for size in (205_000, 220_000, 240_000, 270_000, 310_000):
        bundle = compress(golden["qwen3_moe"][0], tmp_path / f"{size}.emoe", size=size, **options)
        widths = bundle.table["method"]["trunk"]
        assert directory_bytes(bundle) <= size
        assert all(widths[kind] >= before[kind] for kind in widths), size
        before = widths
    assert set(before.values()) != {4}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_least_size_that_is_named_can_be_had(golden, tmp_path, options, architecture):
    """With the trunk as narrow as it gets; and a little more is no worse."""
    model = golden[architecture][0]
    with pytest.raises(ValueError, match="expected at least") as caught:
        compress(model, tmp_path / "small.emoe", size=100_000, **options)
    least = int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))
    for size in (least, least + 5000):
        bundle = compress(model, tmp_path / f"{size}.emoe", size=size, **options)
        assert directory_bytes(bundle) <= size
        if size == least:
            assert set(bundle.table["method"]["trunk"].values()) == {PROBED}


@pytest.mark.parametrize(
    "changes", [{"trunk_width": 8}, {"method": "uniform"}, {"method": "mc"}, {"method": "rtn", "calibration": ()}]
)
def test_a_width_that_was_asked_for_and_other_methods_leave_it_at_8(golden, tmp_path, options, changes):
    bundle = compress(golden["qwen2_moe"][0], tmp_path / "new.emoe", bits=6, **{**options, **changes})
    assert "trunk" not in bundle.table["method"]
    assert trunk_widths(bundle) == {kind: {8} for kind in KINDS["qwen2_moe"]} | {None: {32}}
