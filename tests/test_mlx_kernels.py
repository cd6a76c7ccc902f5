"""The kernels of the mlx device: their text compiled as C++, and MLX's own operations, beside float64.

Metal's compiler is on a Mac alone. Here g++ compiles the text for the fibers of the simulated GPU, and clang checks the
whole source that MLX would compile, address spaces included.
"""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE, changed

from edge_moe.compressor.rounding.quantise import from_bfloat16, to_bfloat16
from edge_moe.devices.mlx.experts import (
    NUMBERS,
    PAGE_WORDS,
    Arena,
    Chosen,
    ExpertShape,
    LayerExperts,
    RecordKind,
    Router,
)
from edge_moe.runtime import reference
from edge_moe.runtime.codecs import encoding_of, record_layout
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.layers.mlp import RouterConfig

mx = pytest.importorskip("mlx.core")
from edge_moe.devices.mlx import kernels, plain, working  # noqa: E402

TESTS = Path(__file__).parent
DEVICES = TESTS.parent / "devices"
CLANG = next(
    (found for version in ("", *range(30, 12, -1)) if (found := shutil.which(f"clang++-{version}".rstrip("-")))), None
)

# ---- the kernels' text as C++

C_TYPES = {"x": "float", "inner": "float", "logits": "float", "bias": "float", "expert_scale": "float"}
C_TYPES |= {"numbers": "float", "weights": "float", "residual": "float", "out": "float", "arena": "uint"}
ATTRIBUTES = """
  const uint thread_index_in_simdgroup = lane_of_thread(), simdgroup_index_in_threadgroup = simdgroup_of_thread();
  const uint thread_index_in_threadgroup = thread_of_group();
  const uint3 threadgroup_position_in_grid = group_of_grid();
  (void)thread_index_in_simdgroup, (void)simdgroup_index_in_threadgroup, (void)thread_index_in_threadgroup;
"""
SIZES = ("DIM", "HIDDEN", "PLACES", "BASE")  # constants in MSL, so that MLX compiles a kernel for a model


@dataclass(frozen=True)
class Rule:
    """A rule of routing, with `experts` left of `of`, for which the kernel is compiled."""

    experts: int
    top_k: int
    config: RouterConfig
    of: int = 0
    listed: int = 0  # experts of a row of a table from which a token's are chosen

    @property
    def constants(self) -> tuple[int, ...]:
        c = self.config
        flags = (c.selection_bias, c.renormalise, c.expert_scale)
        return (self.experts, self.top_k, kernels.SCORES.index(c.score), c.groups, *map(int, flags), self.listed)


def router_of(rule: Rule, bias, group_of, expert_scale) -> Router:
    """The rule's Router with these arrays, as far as it has any use for them."""
    c = rule.config
    numbers = (c.score, c.renormalise, c.logits_scale, c.sum_eps, c.scale, c.threshold)
    of_groups = (c.groups, c.top_groups, c.group_score == "top2sum")
    has = (c.selection_bias, c.groups > 1, c.expert_scale)
    arrays = (array if wanted else None for array, wanted in zip((bias, group_of, expert_scale), has, strict=True))
    return Router(rule.experts, rule.top_k, *numbers, *of_groups, *arrays)


RULES = {
    "softmax": Rule(60, 4, RouterConfig()),
    "renormalised": Rule(128, 8, RouterConfig(renormalise=True, scale=2.5, logits_scale=0.5)),
    "sigmoid": Rule(33, 3, RouterConfig("sigmoid", renormalise=True, selection_bias=True, sum_eps=0.25)),
    "groups": Rule(64, 6, RouterConfig("sigmoid", True, True, groups=8, top_groups=3, group_score="top2sum")),
    "best of groups": Rule(32, 4, RouterConfig("softmax", groups=4, top_groups=2)),
    "dropped": Rule(
        11, 4, RouterConfig("sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="top2sum"), 16
    ),
    "too few": Rule(6, 5, RouterConfig(groups=4, top_groups=2), 16),
    "factors": Rule(7, 3, RouterConfig(renormalise=True, expert_scale=True)),
    "sparsemixer": Rule(16, 2, RouterConfig("sparsemixer", threshold=0.4)),
    "all": Rule(5, 5, RouterConfig(renormalise=True)),
    "wide": Rule(512, 10, RouterConfig(renormalise=True)),
    "roots": Rule(48, 6, RouterConfig("sqrtsoftplus", renormalise=True, selection_bias=True, scale=1.5)),
    "of a table": Rule(20, 3, RouterConfig("sqrtsoftplus", renormalise=True), listed=4),
}
ACTIVATIONS = {name: kernels.ACTIVATIONS.index(name) for name in kernels.ACTIVATIONS}


def as_cpp() -> str:
    """experts.metal, and a C function for each kernel; of routing for each of RULES."""

    def function(kernel: str, name: str, constants: str) -> str:
        arguments = [f"const {C_TYPES.get(its, 'int')}* {its}" for its in kernels.INPUTS[kernel]]
        arguments += [f"{C_TYPES.get(its, 'int')}* {its}" for its in kernels.OUTPUTS[kernel]]
        arguments += [f"int {size}" for size in (*SIZES, "TOP_GROUPS", "TWO", "y", "z", "threads")]
        body = re.sub(r"threadgroup (float \w+)\[PLACES", rf"static \1[{kernels.MOST_PLACES}", kernels.BODIES[kernel])
        launch = f"simt::launch({{1, uint(y), uint(z)}}, {{uint(threads), 1, 1}}, 0, [=] {{{ATTRIBUTES}{body}}});"
        return f'extern "C" void {name}({", ".join(arguments)}) {{\n{constants}\n{launch}\n}}\n'

    def route(number: int, rule: Rule) -> str:
        names = ("EXPERTS", "TOP_K", "SCORE", "GROUPS", "BIASED", "RENORMALISED", "SCALED", "GIVEN")
        constants = (f"constexpr int {name} = {value};" for name, value in zip(names, rule.constants, strict=True))
        return function("route", f"route_{number}", " ".join(constants))

    found = [f'#include "{TESTS / "cpp" / "metal.h"}"\n', kernels.SOURCE.read_text()]
    found += [function("gate_up", f"gate_up_{i}", f"constexpr int ACTIVATION = {i};") for i in ACTIVATIONS.values()]
    found += [function("down", "down_0", ""), *(route(i, rule) for i, rule in enumerate(RULES.values()))]
    return "".join(found)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Compiled:
    """kernels.Kernels, by the text compiled as C++, of NumPy arrays."""

    def __init__(self, directory: Path):
        source, library = directory / "kernels.cpp", directory / "kernels.so"
        source.write_text(as_cpp())
        flags = [
            "-std=c++20",
            "-O1",
            "-ffp-contract=off",
            "-fsanitize=alignment",
            "-fno-sanitize-recover",
            "-shared",
            "-fPIC",
        ]
        command = ["g++", *flags, "-o", library, source, DEVICES / "cuda" / "simt.cpp"]
        built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
        self._library = ctypes.CDLL(str(library))

    def _call(self, name: str, arrays: list[np.ndarray], sizes: dict[str, int], y: int, z: int, threads: int) -> None:
        numbers = (sizes.get(size, 0) for size in (*SIZES, "TOP_GROUPS", "TWO"))
        getattr(self._library, name)(*map(pointer, arrays), *map(ctypes.c_int, (*numbers, y, z, threads)))

    def route(self, router: Router, logits: np.ndarray, layer: LayerExperts, table, given, rule: str) -> Chosen:
        tokens, count = len(logits), len(logits) * router.top_k
        numbers = np.array([router.logits_scale, router.sum_eps, router.scale, router.threshold], np.float32)
        none, out = np.zeros(router.experts, np.float32), [np.zeros(count, dtype) for dtype in "ifii"]
        factors = [none if its is None else its for its in (router.bias, router.group_of, router.expert_scale)]
        sizes = {"TOP_GROUPS": router.top_groups, "TWO": router.top2sum}
        arrays = [logits, *factors, numbers, none if given is None else given, table, layer.kind_of, *out]
        self._call(f"route_{list(RULES).index(rule)}", arrays, sizes, 1, tokens, 32)
        return Chosen(*out)

    def experts(self, shape: ExpertShape, layer: LayerExperts, arena: Arena, x, chosen: Chosen, residual) -> np.ndarray:
        (tokens, dim), hidden, places = x.shape, shape.hidden, layer.top_k
        numbers, inner, out = (
            np.array([shape.alpha, shape.limit, shape.shift], np.float32),
            np.full((tokens * places, hidden), np.nan, np.float32),
            np.zeros_like(x),
        )
        sizes = {"DIM": dim, "HIDDEN": hidden, "PLACES": places, "BASE": arena.base}
        common = [arena.words, chosen.pages, chosen.kinds, layer.numbers]
        gate_up = f"gate_up_{ACTIVATIONS[shape.activation]}"
        self._call(gate_up, [x, *common, numbers, inner], sizes, -(-hidden // 8), tokens * places, 64)
        self._call("down_0", [inner, *common, chosen.weights, residual, out], sizes, -(-dim // 4), tokens, 32 * places)
        return out


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    return Compiled(tmp_path_factory.mktemp("kernels"))


def to_mlx(value):
    """A value with its NumPy arrays, and those of its fields, as MLX's."""
    if isinstance(value, np.ndarray):
        return mx.array(value)
    if isinstance(value, Chosen):
        return Chosen(*map(to_mlx, value))
    names = [name for name in value.__dataclass_fields__ if isinstance(getattr(value, name), np.ndarray)]
    return replace(value, **{name: mx.array(getattr(value, name)) for name in names})


# ---- experts


def encoded(matrix: np.ndarray, codec: str, width: int, group: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The parts of a matrix as MLX packs it, and what they stand for, float64."""
    if codec == "bfloat16":
        codes = to_bfloat16(matrix)
        return [codes], from_bfloat16(codes).astype(np.float64)
    if codec == "mxfp4":
        codes, scales = mx.quantize(mx.array(matrix), 32, 4, mode="mxfp4")
        want = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
        return [np.array(codes), np.array(scales)], np.array(want).astype(np.float64)
    codes, *rest = mx.quantize(mx.array(matrix), group, width)
    scales, biases = (its.astype(mx.bfloat16) for its in rest)
    want = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, width)
    parts = [np.array(codes), *(np.array(its.view(mx.uint16)) for its in (scales, biases))]
    return parts, np.array(want).astype(np.float64)


class Layer:
    """Random experts in an arena, in no order, and what their weights are in float64."""

    def __init__(
        self, shape: ExpertShape, encodings: list[tuple], top_k: int, biased=False, seed=0, first_page=3, base=5
    ):
        rng, self.shape, self.matrices, self.biases = np.random.default_rng(seed), shape, [], []
        gated, dim, hidden = shape.activation != "relu2", shape.dim, shape.hidden
        of_layout = [
            [
                encoding_of(width, group) if width else encoding_of(4, 32)._replace(codec="mxfp4", group=32)
                for width, group in three
            ]
            for three in encodings
        ]
        kinds = []
        for three in of_layout:
            layout = record_layout(dim, hidden, tuple(three), biased, gated)
            kinds.append(RecordKind(tuple(tuple(its) for its in three), dict(layout.parts), layout.bytes))
        self.table = np.full(max(len(kinds), 8), -1, np.int32)
        page = first_page
        for expert in rng.permutation(len(kinds)):
            self.table[expert], page = page, page + kinds[expert].pages
        words = np.zeros((page + 1, PAGE_WORDS), np.uint32)
        raw = words.reshape(-1).view(np.uint8)
        for expert, (three, kind) in enumerate(zip(of_layout, kinds, strict=True)):
            matrices, biases = [], []
            for projection, (name, (codec, width, group)) in enumerate(zip(("gate", "up", "down"), three, strict=True)):
                if name == "gate" and not gated:
                    matrices.append(None), biases.append(0)
                    continue
                rows, cols = (dim, hidden) if projection == 2 else (hidden, dim)
                parts, matrix = encoded(rng.standard_normal((rows, cols)).astype(np.float32), codec, width, group)
                bias = rng.standard_normal(rows).astype(np.float32)
                named = dict(zip(("codes", "scales", "biases"), parts, strict=False)) | (
                    {"output_bias": bias} if biased else {}
                )
                for part, values in named.items():
                    offset, nbytes = kind.parts[f"{name}.{part}"]
                    begin = base * 4 + int(self.table[expert]) * 4096 + offset
                    raw[begin : begin + nbytes] = values.reshape(-1).view(np.uint8)
                matrices.append(matrix), biases.append(bias.astype(np.float64) if biased else 0)
            self.matrices.append(matrices), self.biases.append(biases)
        self.arena = Arena(words, base)
        numbers = np.array([kind.numbers() for kind in kinds])
        assert numbers.shape[1] == NUMBERS
        kind_of = np.pad(np.arange(len(kinds), dtype=np.int32), (0, max(0, 8 - len(kinds))))
        self.layer = LayerExperts(top_k, kinds, numbers, kind_of, tuple(range(len(kinds))))

    def chosen(self, ids: np.ndarray, weights: np.ndarray) -> Chosen:
        flat = np.pad(ids.reshape(-1), (0, max(0, 8 - ids.size)), constant_values=-1).astype(np.int32)
        pages = np.where(flat >= 0, self.table[flat], -1).astype(np.int32)
        kinds = np.where(flat >= 0, flat, 0).astype(np.int32)
        return Chosen(flat, np.pad(weights.reshape(-1), (0, flat.size - weights.size)).astype(np.float32), pages, kinds)

    def wanted(self, x: np.ndarray, chosen: Chosen, residual: np.ndarray) -> np.ndarray:
        """The sum in float64, without places that have no record."""
        y, count = residual.astype(np.float64), self.layer.top_k
        for token, place in np.ndindex(len(x), count):
            at = token * count + place
            if chosen.pages[at] < 0:
                continue
            (gate, up, down), biases = self.matrices[chosen.ids[at]], self.biases[chosen.ids[at]]
            given = x[token].astype(np.float64)
            gate = None if gate is None else gate @ given + biases[0]
            inner = activated(self.shape, gate, up @ given + biases[1])
            y[token] += np.float64(chosen.weights[at]) * (down @ inner + biases[2])
        return y


def activated(shape: ExpertShape, gate, up):
    """The input of down in float64, as the papers have it."""
    if shape.activation == "relu2":
        return np.square(np.maximum(up, 0))
    if shape.activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if shape.activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = np.minimum(gate, shape.limit), np.clip(up, -shape.limit, shape.limit)
    return gate / (1 + np.exp(-shape.alpha * gate)) * (up + shape.shift)


AFFINE = (1, 2, 3, 4, 5, 6, 8)
TURNED = [tuple((AFFINE[(i + j) % 7], group) for j in range(3)) for i, group in enumerate((32,) * 7)]
LAYERS = {  # shape, (width, group) of gate, up and down of each expert (0: MXFP4), options
    "groups of 32": (ExpertShape(96, 160), TURNED, {}),
    "groups of 64": (ExpertShape(192, 64), [tuple((width, 64) for width, _ in three) for three in TURNED], {}),
    "groups of 128": (ExpertShape(128, 384), [tuple((width, 128) for width, _ in three) for three in TURNED], {}),
    "mixed": (
        ExpertShape(128, 128),
        [((3, 32), (0, 0), (16, 0)), ((16, 0), (2, 128), (0, 0)), ((0, 0), (8, 64), (5, 32))],
        {},
    ),
    "odd": (ExpertShape(70, 37), [((16, 0),) * 3] * 3, {}),
    "long": (ExpertShape(2080, 33), [((4, 32), (2, 32), (16, 0)), ((0, 0), (16, 0), (16, 0))], {}),
    "biases": (
        ExpertShape(64, 96, "clamped_swiglu", 1.702, 7.0),
        [((0, 0),) * 3, ((4, 32),) * 3, ((16, 0),) * 3],
        {"biased": True},
    ),
    "no shift": (ExpertShape(64, 32, "clamped_swiglu", 1.0, 0.5, 0.0), [((0, 0),) * 3, ((2, 32),) * 3], {}),
    "gelu": (ExpertShape(64, 64, "gelu_tanh"), [((8, 32),) * 3, ((4, 64),) * 3], {}),
    "no gate": (ExpertShape(64, 96, "relu2"), [((5, 32),) * 3, ((16, 0),) * 3], {"biased": True}),
}


@pytest.mark.parametrize("by", ["compiled", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_experts_are_those_of_float64(compiled, name, by):
    shape, encodings, options = LAYERS[name]
    rng, top_k = np.random.default_rng(7), len(encodings)
    layer = Layer(shape, encodings, top_k, **options)
    tokens = 3
    x, residual = (rng.standard_normal((tokens, shape.dim)).astype(np.float32) for _ in range(2))
    x /= np.sqrt(shape.dim)
    ids = np.array([rng.permutation(top_k) for _ in range(tokens)])
    weights = -np.sort(-rng.random((tokens, top_k)), axis=-1)
    ids[1, -1], weights[1, -1] = -1, 0  # pruned
    layer.table[ids[2, 0]] = -1  # not there
    chosen = layer.chosen(ids, weights)
    want = layer.wanted(x, chosen, residual)
    if by == "compiled":
        got = compiled.experts(shape, layer.layer, layer.arena, x, chosen, residual)
    else:
        got = plain.experts(shape, *map(to_mlx, (layer.layer, layer.arena, x, chosen, residual)))
    assert np.abs(np.array(got) - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("by", ["compiled", "plain"])
def test_a_tokens_bits_do_not_depend_on_others(compiled, by):
    shape, encodings, _ = LAYERS["mixed"]
    layer, rng = Layer(shape, encodings, 3), np.random.default_rng(1)
    x, residual = (rng.standard_normal((4, shape.dim)).astype(np.float32) for _ in range(2))
    ids, weights = np.array([rng.permutation(3) for _ in range(4)]), rng.random((4, 3))

    def run(tokens: slice) -> np.ndarray:
        chosen = layer.chosen(ids[tokens], weights[tokens])
        if by == "compiled":
            return compiled.experts(shape, layer.layer, layer.arena, x[tokens], chosen, residual[tokens])
        given = map(to_mlx, (layer.layer, layer.arena, x[tokens], chosen, residual[tokens]))
        return np.array(plain.experts(shape, *given))

    whole = run(slice(4))
    for token in range(4):
        assert np.array_equal(run(slice(token, token + 1)), whole[token : token + 1])


def test_records_beyond_four_gigabytes_are_found(compiled):
    shape, encodings, _ = LAYERS["mixed"]
    far = (5 << 30) // 4096  # memory that nobody touches takes no room
    layer, near = Layer(shape, encodings, 3, first_page=far, base=0), Layer(shape, encodings, 3)
    assert layer.table[:3].min() > 1 << 20
    x, residual = (np.random.default_rng(2).standard_normal((1, shape.dim)).astype(np.float32) for _ in range(2))
    ids, weights = np.array([[2, 0, 1]]), np.array([[0.5, 0.3, 0.2]])
    far, near = (
        compiled.experts(shape, one.layer, one.arena, x, one.chosen(ids, weights), residual) for one in (layer, near)
    )
    assert np.array_equal(far, near)


# ---- routing


@pytest.mark.parametrize("by", ["compiled", "plain"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_routes_are_those_of_float64(compiled, name, ties, by):
    rule, rng, tokens = RULES[name], np.random.default_rng(11), 40
    c, experts = rule.config, rule.experts
    base = load_config(REFERENCE)
    kept = (tuple(sorted(rng.choice(rule.of, experts, replace=False).tolist())),) if rule.of else ()
    hashed = bool(rule.listed)
    routed = changed(base.routed, experts=rule.of or experts, top_k=rule.top_k, router=c, hashed=hashed)
    given = np.array([rng.permutation(experts)[: rule.listed] for _ in range(tokens)], np.int32)
    given[1::3, 1:3], given[5] = -1, -1  # dropped
    config = replace(base, layers=(replace(base.layers[0], mlp=routed),), kept=kept)
    logits = (2 * rng.standard_normal((tokens, experts))).astype(np.float32)
    values = {"router_bias": rng.standard_normal(experts), "expert_scale": 0.5 + rng.random(experts)}
    if ties:
        logits, values = np.round(logits), {"router_bias": np.zeros(experts), "expert_scale": np.full(experts, 0.5)}
    values = {its: array.astype(np.float32) for its, array in values.items()}

    class Weights:
        """A router that gives the logits as they are."""

        def trunk(self, of: str) -> np.ndarray:
            return {"router": np.eye(experts), "router_table": given, **values}[of.split(".")[-1]]

    ids, weights = reference.route(config, Weights(), 0, logits.astype(np.float64), ids=np.arange(tokens))
    groups = np.array(config.groups_of(0), np.int32)
    router = router_of(rule, values["router_bias"], groups, values["expert_scale"])
    table = rng.permutation(max(experts, 8)).astype(np.int32)
    table[ids[0, 0]] = -1
    kind_of = rng.integers(0, 4, max(experts, 8)).astype(np.int32)
    layer = LayerExperts(rule.top_k, (), np.zeros(8), kind_of, ())
    if by == "compiled":
        found = compiled.route(router, logits, layer, table, given if hashed else None, name)
    else:
        found = plain.route(*map(to_mlx, (router, logits, layer, table)), mx.array(given) if hashed else None)
    ids, weights = ids.reshape(-1), weights.reshape(-1)
    got = [np.array(its)[: ids.size] for its in found]
    assert np.array_equal(got[0], ids)
    assert np.abs(got[1] - weights).max() <= 2e-6 * weights.max()
    assert np.array_equal(got[2], np.where(ids >= 0, table[ids], -1))
    assert np.array_equal(got[3][ids >= 0], kind_of[ids[ids >= 0]])
    assert ((ids < 0).any() == (name in ("too few", "of a table"))) and (got[2] < 0).any()


# ---- whether the kernels work


class AsMetal:
    """The compiled text in the place of kernels.Kernels. wrong: what gives other results; refused: what is refused."""

    def __init__(self, compiled: Compiled, wrong: str = "", refused: str = ""):
        self._compiled, self._wrong, self._refused = compiled, wrong, refused

    def _call(self, name: str, *given):
        if name == self._refused:
            raise RuntimeError("[metal::Device] Unable to build metal library from source")
        found = getattr(self._compiled, name)(*given)
        return (Chosen(*map(mx.array, found)) if name == "route" else mx.array(found)), name == self._wrong

    def route(self, router, logits, layer, table):
        rule = next(name for name, its in RULES.items() if (its.experts, its.top_k) == (router.experts, router.top_k))
        given = map(to_numpy, (router, logits, layer, table))
        chosen, wrong = self._call("route", *given, None, rule)
        return chosen._replace(weights=chosen.weights * 1.001) if wrong else chosen

    def experts(self, shape, *given):
        out, wrong = self._call("experts", shape, *map(to_numpy, given))
        return out * 0 if wrong else out


def to_numpy(value):
    """What to_mlx() had."""
    if isinstance(value, mx.array):
        return np.array(value)
    if isinstance(value, Chosen):
        return Chosen(*map(to_numpy, value))
    names = [name for name in value.__dataclass_fields__ if isinstance(getattr(value, name), mx.array)]
    return replace(value, **{name: np.array(getattr(value, name)) for name in names})


@pytest.mark.parametrize(
    "fault, name",
    [
        ({}, "mlx-metal"),
        ({"wrong": "route"}, "mlx-metal without route"),
        ({"refused": "route"}, "mlx-metal without route"),
        ({"wrong": "experts"}, "mlx-metal without experts"),
        ({"wrong": "experts", "refused": "route"}, "mlx-operations"),
    ],
)
@pytest.mark.parametrize("layer", ["mixed", "biases", "no gate"])
def test_a_kernel_that_does_not_work_is_not_used(compiled, layer, fault, name):
    shape, encodings, options = LAYERS[layer]
    kinds = Layer(shape, encodings, 3, **options).layer.kinds
    rules = [RULES[rule] for rule in ("renormalised", "groups", "best of groups", "factors")]
    routers = [
        to_mlx(router_of(rule, *(np.zeros(rule.experts, dtype) for dtype in (np.float32, np.int32, np.float32))))
        for rule in rules
    ]
    made = AsMetal(compiled, **fault)
    found = working.operations(routers, shape, kinds, made)
    assert found.name == name
    assert found.route == (plain.route if "route" in [*fault.values()] else made.route)
    assert found.experts == (plain.experts if "experts" in [*fault.values()] else made.experts)


def test_a_model_beyond_the_kernels_is_computed_by_mlx(compiled):
    shape, encodings, _ = LAYERS["mixed"]
    kinds = Layer(shape, encodings, 3).layer.kinds
    assert working.operations([Router(64, 33)], shape, kinds, AsMetal(compiled)).name == "mlx-operations"
    assert working.operations([Router(64, 3)], shape, kinds) == working.PLAIN or mx.metal.is_available()


# ---- the source that MLX would compile


@pytest.fixture
def metal(tmp_path, capfd) -> str:
    """What MLX makes of the kernels for each of RULES and each activation; it prints what it would compile."""
    made = kernels.Kernels(verbose=True)
    layers = {
        count: LayerExperts(count, (), mx.zeros((1, NUMBERS), mx.int32), mx.zeros((8,), mx.int32), ())
        for count in range(1, 11)
    }
    arena = Arena(mx.zeros((4, PAGE_WORDS), mx.uint32), 6)

    def token(logits, x, residual, table, floats, numbers):
        for rule in RULES.values():
            experts = rule.experts
            router = router_of(rule, floats[:experts], numbers[:experts], floats[:experts])
            given = numbers[None, : rule.listed] if rule.listed else None
            chosen = made.route(router, logits[:, :experts], layers[rule.top_k], table, given)
            for activation in kernels.ACTIVATIONS:
                residual = made.experts(ExpertShape(8, 3, activation), layers[rule.top_k], arena, x, chosen, residual)
        return residual

    floats, numbers, of_dim = mx.zeros((512,)), mx.zeros((512,), mx.int32), mx.zeros((1, 8))
    mx.export_function(str(tmp_path / "token"), token, floats[None], of_dim, of_dim, numbers, floats, numbers)
    sources = re.findall(r"```\n(.*?)```", capfd.readouterr().out, re.DOTALL)
    assert len(sources) == len(RULES) * (1 + 2 * len(kernels.ACTIVATIONS))
    header = kernels.SOURCE.read_text()
    return header + "".join(dict.fromkeys(source.replace(header, "") for source in sources))


def check_metal(source: str, directory: Path) -> str:
    """What clang says of Metal source, with Metal's address spaces and with stand-ins for the rest of its language."""
    source = re.sub(r"\[\[.*?\]\]", "", source).replace("threadgroup float parts", "static threadgroup float parts")
    (directory / "kernels.cpp").write_text(f'#include "{TESTS / "cpp" / "metal_spaces.h"}"\n{source}')
    command = [CLANG, "-std=c++14", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", directory / "kernels.cpp"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
def test_the_source_that_mlx_compiles_is_sound(metal, tmp_path):
    assert "constant float*" not in metal  # what MLX makes of inputs of less than eight values
    assert check_metal(metal, tmp_path) == ""


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
@pytest.mark.parametrize(
    "right, wrong, said",
    [
        (
            "const device uint* codes, const thread float* x",
            "const device uint* codes, const device float* x",
            "no matching function",
        ),
        ("threadgroup float parts", "thread float* parts = inner; (void)parts; float its", "cannot initialize"),
        ("thread_index_in_threadgroup;", "thread_index_in_grid;", "undeclared identifier"),
        ("const int page = pages[place];", "const int page = pages[place], unused = 0;", "unused variable"),
    ],
)
def test_a_mistake_in_the_source_is_found(metal, tmp_path, right, wrong, said):
    assert right in metal
    assert said in check_metal(metal.replace(right, wrong), tmp_path)
