"""Calibrating pruning: losses are what really is lost, curves are reached, and the bundle stays whole throughout."""

import shutil
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from bundles import REFERENCE, logits_of, use

from edge_moe.compressor.passes import adjoint, forward, mixes
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.pruning import prune, prune_curves, prune_losses
from edge_moe.compressor.pruning.mask_routers import fit_losses, train_otp
from edge_moe.compressor.pruning.prune import calibrate_pruning, set_default
from edge_moe.compressor.pruning.prune_losses import LayerLosses, collect, losses_of
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.pruning import MASK_FILE
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import log_softmax

CONFIG = load_config(REFERENCE)


def slope(function, x: np.ndarray, direction: np.ndarray) -> float:
    """The derivative of function(x) along a direction, by central differences in float64."""
    step = 1e-5
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def random(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---- gradients


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_passes_its_gradient_on(kind):
    config, (x, weight, g, direction) = replace(CONFIG, norm=kind), (random(3, 16, seed=i) for i in range(4))
    weights = type("", (), {"trunk": lambda self, name: weight[int(name.endswith("bias"))]})()
    want = slope(lambda at: (reference.norm(config, weights, "output_norm", at) * g).sum(), x, direction)
    got = (adjoint.norm_backward(config, x, weight[0], g[None])[0] * direction).sum()
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_swiglu", "relu2"])
def test_an_expert_passes_its_gradient_on(kind, biased):
    gated = kind != "relu2"
    clamped = {"swiglu_alpha": 1.702, "swiglu_limit": 3.0, "swiglu_shift": 0.3}
    config = type("", (), {"activation": kind, "gated": gated, **clamped})
    gate, up, down, g, h, direction = random(8, 16), random(8, 16, seed=1), random(16, 8, seed=2), *random(3, 5, 16)
    bias = (*random(2, 8, seed=3), random(16, seed=4)) if biased else reference.NO_BIAS
    inner = h @ gate.T, h @ up.T
    assert all((np.abs(one) > 3).any() and (np.abs(one) < 3).any() for one in inner)  # beyond the limits, and within

    def expert(at):
        return reference.expert(config, at, gate, up, down, bias=bias)

    want = slope(lambda at: (expert(at) * g).sum(), h, direction)
    y, back = adjoint.mlp_backward(config, h, (gate, up, down), g[None], bias)
    assert (back[0] * direction).sum() == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(y, expert(h), rtol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "at"),
    [
        *((name, -1) for name in ("mixtral", "olmoe", "deepseek_v3", "phimoe", "gpt_oss", "gemma4_text")),
        *(("deepseek_v4", at) for at in (0, -1)),  # the first looks experts up by token
    ],
)
def test_a_router_passes_its_gradient_on(golden, architecture, at):
    checkpoint = Checkpoint(golden[architecture][0])
    config, layer = checkpoint.config, checkpoint.config.moe_layers[at]
    h, direction = random(2, 6, config.dim)
    ids = np.arange(len(h))
    chosen, _ = reference.route(config, checkpoint, layer, h, ids=ids)
    g = random(6, config.top_k_of(layer), seed=5)

    def weights(at):
        return reference.route(config, checkpoint, layer, at, ids=ids)[1]

    want = slope(lambda at: (weights(at) * g).sum(), h, direction)
    scores, router = reference.router_scores(config, checkpoint, layer, h), checkpoint.trunk(f"layers.{layer}.router")
    scale = checkpoint.trunk(f"layers.{layer}.expert_scale") if config.router.expert_scale else None
    got = adjoint.router_backward(config, router, h, scores, chosen, weights(h), g[None], scale)[0]
    assert (got * direction).sum() == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "at"),
    [
        *((name, -1) for name in ("qwen2_moe", "granitemoe", "phimoe", "gemma4_text", "nemotron_h", "qwen4_exp_text")),
        *(("deepseek_v4", at) for at in (0, -1)),
    ],
)
def test_a_layer_passes_its_gradient_on(golden, architecture, at):
    """From its output to the residual stream after attention, and each expert's part of the output along it."""
    checkpoint, rows = Checkpoint(golden[architecture][0]), 40
    config, layer, ids = checkpoint.config, checkpoint.config.moe_layers[at], np.arange(rows)
    a, direction = 3 * random(2, rows, config.width).astype(np.float32)
    g = random(prune_losses.SAMPLES, rows, config.width, seed=3).astype(np.float32)
    of_g, back = (Stream(len(g) * rows, config.width) for _ in range(2))
    of_a, sums, inner = Stream(rows, config.width), Stream(rows, config.dim), Stream(len(g) * rows, config.dim)
    of_a.write(0, a)
    of_g.write(0, g.reshape(-1, config.width))
    routing = forward.route(config, checkpoint, layer, of_a, ids[None])
    if forward.sums_experts(config, layer):
        forward.common_mlp(config, checkpoint, layer, of_a, sums)
        prune_losses._add_experts(config, checkpoint, layer, of_a, sums, routing, 1)
    else:
        sums, inner = None, of_g
    q = prune_losses._layer_backward(config, checkpoint, layer, of_a, sums, routing, of_g, inner, back, 1)

    def output(at, prune=None):
        y = reference.moe_block(config, checkpoint, layer, at, prune=prune, ids=ids)
        return reference.with_mlp(config, checkpoint, layer, at, y)

    got = back.read(0, back.rows).reshape(g.shape)
    for sample in (0, 5):
        want = slope(lambda at, its=g[sample]: (output(at) * its).sum(), a.astype(np.float64), direction)
        assert (got[sample] * direction).sum() == pytest.approx(want, rel=1e-3)

    def without(last: float):
        """The output with the lightest expert's weight reduced by a share."""
        return output(
            a, lambda layer, h, chosen, weights: (chosen, weights * np.r_[[1] * (weights.shape[1] - 1), 1 - last])
        )

    lost = (without(0.0) - without(1e-3)) / 1e-3
    np.testing.assert_allclose((g * lost).sum((1, 2)), q[:, :, -1].sum(1), rtol=0.03, atol=0.3)


@pytest.mark.parametrize("architecture", ["qwen4_exp_text", "deepseek_v4"])
def test_streams_pass_their_gradients_on(golden, architecture):
    """Through the head's mix, and through attention's, whose output and weights are taken as they are."""
    checkpoint, rows = Checkpoint(golden[architecture][0]), 7
    config = checkpoint.config
    streams, x, direction = config.streams, *random(2, rows, config.width)
    g, g_x = random(rows, config.dim, seed=5), random(rows, config.width, seed=6)

    def head_input(at):
        return (reference.block_input(config, checkpoint, "output", at) * g).sum()

    got = mixes.input_backward(streams, checkpoint, "output", x, config.norm_eps, g[None])[0]
    assert (got * direction).sum() == pytest.approx(slope(head_input, x, direction), rel=1e-4)
    mixing = None
    if architecture == "deepseek_v4":
        mixing = streams.mixing(checkpoint, "layers.0.attention", x, config.norm_eps)
        np.testing.assert_allclose(mixing.sum(1), 1, atol=0.02)  # as near as five iterations and an eps of 0.001 come
        np.testing.assert_allclose(mixing.sum(2), 1, atol=0.2)

    def after(at):
        """The streams at + their change, with the weights of the streams x."""
        fixed = type("", (), {"trunk": staticmethod(checkpoint.trunk), "product": lambda _, name, h: of_x[name]})()
        y = reference.with_attention(config, fixed, 0, at, np.zeros((rows, config.dim)))
        return (y * g_x).sum()

    of_x = Products(checkpoint)
    reference.with_attention(config, of_x, 0, x, np.zeros((rows, config.dim)))
    of_x = of_x.seen
    got = mixes.pass_backward(streams, mixing, g_x)
    assert (got * direction).sum() == pytest.approx(slope(after, x, direction), rel=1e-4)


class Products:
    """Weights that keep the products with them."""

    def __init__(self, weights):
        self.trunk, self.weights, self.seen = weights.trunk, weights, {}

    def product(self, name, x):
        self.seen[name] = x @ self.weights.trunk(name).T
        return self.seen[name]


# ---- losses


def test_a_loss_is_half_the_square_of_what_is_missing():
    weights = np.array([[0.6, 0.3, 0.1]])
    q = np.array([[[2.0, 1.0, -1.0]], [[0.0, 3.0, 3.0]]])  # two labels
    renormalised = type("", (), {"router": type("", (), {"renormalise": True})})
    plain = type("", (), {"router": type("", (), {"renormalise": False})})
    # first alone, scaled by 1 / 0.6: what changes is 2 (1 - 1/0.6) + 1 - 1 and 0 + 3 + 3
    one, two = ((-4 / 3) ** 2 + 36) / 4, ((3 * (1 - 1 / 0.9) - 1) ** 2 + (3 * (1 - 1 / 0.9) + 3) ** 2) / 4
    np.testing.assert_allclose(losses_of(renormalised, weights, q), [[one, two, 0]])
    np.testing.assert_allclose(losses_of(plain, weights, q), [[36 / 4, (1 + 9) / 4, 0]])


@pytest.fixture(scope="module")
def found():
    """LayerLosses of the reference by layer, and the ids (sequences, 64)."""
    with Checkpoint(REFERENCE) as checkpoint:
        ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (12, 64))
        return collect(
            CONFIG,
            checkpoint,
            ids,
            lambda name, rows, dim=0: Stream(rows, dim or CONFIG.dim),
            2,
            0,
            lambda done, of: None,
        ), ids


def test_losses_are_the_divergence_that_pruning_causes(found):
    """Of the last layer, whose outputs no attention reads: measured by leaving the experts out."""
    layers, ids = found
    last = CONFIG.moe_layers[-1]
    with Checkpoint(REFERENCE) as checkpoint:
        whole = log_softmax(reference.forward(CONFIG, checkpoint, ids).reshape(ids.size, -1))
        for kept in (2, 3):

            def drop(layer, h, chosen, weights, kept=kept):
                return reference.keep_first(CONFIG, chosen, weights, np.full(len(h), kept if layer == last else 4))

            pruned = log_softmax(reference.forward(CONFIG, checkpoint, ids, prune=drop).reshape(ids.size, -1))
            kld = (np.exp(whole) * (whole - pruned)).sum(axis=-1).mean()
            assert layers[last].losses[:, kept - 1].mean() == pytest.approx(kld, rel=0.2)
    assert np.all(layers[last].losses[:, -1] == 0)
    for layer in layers.values():
        mean = layer.losses.mean(axis=0)
        assert mean[0] > mean[1] > mean[2] > 0


def test_losses_are_the_same_for_any_number_of_workers(found):
    layers, ids = found
    with Checkpoint(REFERENCE) as checkpoint:
        alone = collect(
            CONFIG,
            checkpoint,
            ids,
            lambda name, rows, dim=0: Stream(rows, dim or CONFIG.dim),
            1,
            0,
            lambda done, of: None,
        )
    for layer in layers:
        np.testing.assert_array_equal(alone[layer].losses, layers[layer].losses)


# ---- mask routers


def labelled(rows=30_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, their expected losses by count, and losses that scatter around those like chi squares of few samples."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.standard_normal((rows, 6)), np.ones((rows, 1))], axis=1).astype(np.float32)
    expected = np.exp(np.stack([x[:, 0] - 4, x[:, 1] - 5, x[:, 0] - x[:, 2] - 6, np.full(rows, -np.inf)], axis=1))
    return x, expected, expected * rng.chisquare(4, (rows, 1)) / 4


def test_the_regression_finds_the_mean_of_scattered_losses():
    x, expected, losses = labelled()
    got = x @ fit_losses(x, losses).T
    np.testing.assert_allclose(got[:, :3], np.log(expected[:, :3]), atol=0.35)


def test_otp_learns_to_choose_at_any_price():
    x, expected, losses = labelled()
    prices = (1e-3, 1e-2)
    scores = x @ train_otp(x, losses, prices, 0).T
    unit, rows = np.sqrt(prices[0] * prices[1]), np.arange(len(x))
    for price in (2e-3, 5e-3):
        best = prune_curves.kept_at(expected, price)
        kept = prune_curves.kept_at(-scores, price / unit)

        def paid(counts, price=price):
            return (expected[rows, counts - 1] + price * counts).mean()

        constant = min(paid(np.full(len(x), count)) for count in (1, 2, 3, 4))
        assert paid(best) <= paid(kept) < paid(best) + 0.35 * (constant - paid(best))


def test_a_seed_gives_one_router():
    x, _, losses = labelled(600)
    first, again, other = (train_otp(x, losses, (1e-3, 1e-2), seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ---- curves


def layers_of(weights: np.ndarray, losses) -> dict[int, LayerLosses]:
    return {layer: LayerLosses(None, weights, np.asarray(its)) for layer, its in enumerate(losses)}


def test_median_ratios_drop_half_of_the_second_experts_of_pruned_layers():
    """Mixtral's rule: a quarter of the uses of a layer, layer after layer, those that lose least first."""
    second = np.random.default_rng(0).uniform(0.05, 0.5, (1000, 1))
    weights = np.concatenate([1 - second, second], axis=1)
    losses = [np.concatenate([np.full((1000, 1), loss), np.zeros((1000, 1))], axis=1) for loss in (3.0, 1.0, 2.0, 4.0)]
    cuts, thresholds = prune_curves.median_ratios(layers_of(weights, losses))
    assert cuts == pytest.approx([1 / 16, 2 / 16, 3 / 16, 4 / 16])
    assert [np.flatnonzero(row).tolist() for row in thresholds] == [[1], [1, 2], [0, 1, 2], [0, 1, 2, 3]]
    for threshold in thresholds[-1]:
        assert reference.kept_by_ratio(weights, threshold).sum() == 1500


def test_prices_cut_as_much_as_they_say():
    expected = [labelled(2000)[1], labelled(1000)[1] * 3]
    for cut, price in zip((0.2, 0.5), prune_curves.prices(expected, (0.2, 0.5)), strict=True):
        kept = [prune_curves.kept_at(its, price) for its in expected]
        assert prune_curves.cut_of(kept, expected) == pytest.approx(cut, abs=0.001)


def test_thresholds_spare_the_layer_that_loses_more():
    weights = np.sort(np.random.default_rng(0).dirichlet((1, 1, 1, 1), 500), axis=1)[:, ::-1]
    dear, cheap = 1 - np.cumsum(weights, axis=1), 0.01 * (1 - np.cumsum(weights, axis=1))
    cuts, thresholds = prune_curves.thresholds(layers_of(weights, (dear, cheap)), reference.kept_by_share, [0.2, 0.3])
    assert cuts == pytest.approx([0.2, 0.3], abs=0.02)
    assert all(low > high for low, high in thresholds)


# ---- a bundle


@pytest.fixture(scope="module")
def pruned_bundle(bundle_of, stdlib_calibration, tmp_path_factory):
    """A calibrated bundle of the reference, and what it was before."""
    before = bundle_of("reference", bits=16)
    path = shutil.copytree(before, tmp_path_factory.mktemp("prune") / "bundle.emoe")
    text, held_out = stdlib_calibration
    calibrate_pruning(path, calibration=(text,), held_out=(held_out,), tokens=2048)
    return path, before


def test_the_certificate_is_what_each_cut_costs(pruned_bundle, stdlib_calibration):
    path, before = pruned_bundle
    opened, held_out = Bundle.open(path), np.load(stdlib_calibration[1]).reshape(-1, 256)
    rows = opened.pruning.certificate
    assert [row["cut"] for row in rows] == list(opened.pruning.curves["loss"].cuts)
    klds = [row["kld_mean"] for row in rows]
    assert klds == sorted(klds) and 0 < klds[0] < 0.01 < klds[-1] < 0.5
    for row in rows:
        assert row["reached"] == pytest.approx(row["cut"], abs=0.08)
    row = next(row for row in rows if row["cut"] == 0.3)
    with Runtime(before, context=256) as whole, Runtime(path, context=256, prune=0.3) as pruned:
        divergence = []
        for window in held_out:
            p, q = log_softmax(whole.logits(window)[:-1]), log_softmax(pruned.logits(window)[:-1])
            divergence.append((np.exp(p) * (p - q)).sum(axis=-1))
        used = pruned.stats["experts_used"] / pruned.stats["moe_tokens"]
    assert np.mean(divergence) == pytest.approx(row["kld_mean"], rel=1e-4)
    assert 1 - used / 4 == pytest.approx(row["reached"], abs=1e-5)


def test_off_is_the_bundle_as_it_was(pruned_bundle, stdlib_ids):
    path, before = pruned_bundle
    assert np.array_equal(logits_of(path, stdlib_ids[:64]), logits_of(before, stdlib_ids[:64]))
    for file in before.iterdir():
        assert file.name == "bundle.json" or file.read_bytes() == (path / file.name).read_bytes()
    assert MASK_FILE in dict(verify(Bundle.open(path)))


def test_a_calibration_is_replaced_only_by_force_and_its_default_changes_alone(pruned_bundle, tmp_path, stdlib_ids):
    path = shutil.copytree(pruned_bundle[0], tmp_path / "own.emoe")
    before = (path / "bundle.json").read_bytes()
    with pytest.raises(FileExistsError) as caught:
        calibrate_pruning(path, default=0.3)
    assert str(caught.value) == (
        f"{path}: is calibrated for pruning already; --force calibrates it again, --default alone changes what a run "
        "without --prune leaves out"
    )
    assert (path / "bundle.json").read_bytes() == before
    whole, ids = logits_of(pruned_bundle[1], stdlib_ids[:64]), stdlib_ids[:64]
    assert np.array_equal(logits_of(path, ids, prune=None), whole)
    assert set_default(path, 0.3).pruning.default_cut == 0.3
    pruned = logits_of(path, ids, prune=None)
    assert np.array_equal(pruned, logits_of(path, ids, prune=0.3)) and not np.array_equal(pruned, whole)
    with pytest.raises(ValueError, match="prune is 0.9, but loss is calibrated for"):
        set_default(path, 0.9)
    assert set_default(path, None).pruning.default_cut is None
    assert np.array_equal(logits_of(path, ids, prune=None), whole)
    with pytest.raises(ValueError, match="is not calibrated for pruning; run `edge-moe prune"):
        set_default(shutil.copytree(pruned_bundle[1], tmp_path / "before.emoe"), 0.3)


def test_a_learned_choice_differs_between_tokens_and_beats_a_constant_one(pruned_bundle, stdlib_ids):
    path, _ = pruned_bundle
    ids = stdlib_ids[:256]
    with Runtime(path, context=256, prune="off") as runtime:
        whole = log_softmax(runtime.logits(ids))

        def lost(logits):
            return float((np.exp(whole) * (whole - log_softmax(logits))).sum(axis=-1).mean())

        before = runtime.stats["experts_used"]
        learned = lost(runtime.logits(ids, prune="loss:0.35"))
        used = (runtime.stats["experts_used"] - before) / (256 * 4)
    with Checkpoint(REFERENCE) as checkpoint:
        constant = lost(
            reference.forward(
                CONFIG,
                checkpoint,
                np.array(ids),
                prune=lambda layer, h, chosen, weights: reference.keep_first(
                    CONFIG, chosen, weights, np.full(len(h), 3)
                ),
            )
        )
    assert used < 3 and learned < constant


def test_the_same_text_gives_the_same_bytes_and_other_rules_take_their_place(
    pruned_bundle, stdlib_calibration, tmp_path
):
    text, held_out = stdlib_calibration
    made = []
    for name in ("first", "again"):
        path = shutil.copytree(pruned_bundle[0], tmp_path / name)
        given = {"calibration": (text,), "held_out": (held_out,)}
        made_again = calibrate_pruning(path, **given, tokens=1024, rules=("loss",), default=0.1, force=True)
        assert made_again.pruning.cut == made_again.pruning.default_cut == 0.1
        made.append([(path / file).read_bytes() for file in ("bundle.json", MASK_FILE)])
    assert made[0] == made[1]
    its = calibrate_pruning(path, **given, tokens=256, rules=("share", "odp"), force=True)
    assert list(its.pruning.curves) == ["share", "odp"] and its.pruning.cut == 0.2 and its.pruning.default_cut is None
    assert not (path / MASK_FILE).exists() and {file.name for file in tmp_path.iterdir()} == {"first", "again"}
    assert use(path, [1, 2, 3]).shape == (3, CONFIG.vocab)


@pytest.mark.parametrize("call", ["write_whole", "_write_table", "certify"])
def test_an_interrupt_leaves_a_bundle_that_runs(pruned_bundle, stdlib_calibration, tmp_path, monkeypatch, call):
    """Each of the calls that store what was found is the last one in turn."""
    path = shutil.copytree(pruned_bundle[0], tmp_path / "bundle.emoe")
    text, held_out = stdlib_calibration
    whole, its, calls = logits_of(path, [1, 2, 3]), getattr(prune, call), 0
    for last in range(1, 9):
        calls = 0

        def interrupted(*args, last=last):
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            return its(*args)

        monkeypatch.setattr(prune, call, interrupted)
        try:
            calibrate_pruning(path, calibration=(text,), held_out=(held_out,), tokens=256, rules=("loss",), force=True)
            break
        except KeyboardInterrupt:
            assert np.array_equal(logits_of(path, [1, 2, 3]), whole)
    assert last > 1 and Bundle.open(path).pruning.certificate


def test_hidden_states_beyond_half_of_the_ram_are_in_files(found, tmp_path):
    """Which changes nothing, and leaves nothing."""
    (layers, ids), made = found, []
    alive = 4 * CONFIG.dim * ids.size * (CONFIG.layer_count + 3 + 2 * prune_losses.SAMPLES)
    for ram in (2 * alive, 2 * alive - 1):
        with ExitStack() as stack, Checkpoint(REFERENCE) as checkpoint:
            new_stream = prune._streams(stack, tmp_path / "b.emoe", ram, ids.size, CONFIG)
            got = collect(CONFIG, checkpoint, ids, new_stream, 1, 0, lambda done, of: None)
            made.append([file.parent.name[:13] for file in tmp_path.glob("*/*")])
        for layer in layers:
            np.testing.assert_array_equal(got[layer].losses, layers[layer].losses)
    assert not made[0] and set(made[1]) == {"b.emoe.prune-"} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default": 0.9}, "default is 0.9, expected 0.05 to 0.5 of expert uses"),
        ({"rules": ("top-p",)}, "rules are top-p, expected some of odp, share, otp, loss"),
        ({"rules": ()}, "rules are none, expected some of odp, share, otp, loss"),
        ({"tokens": 10}, "tokens is 10, expected at least 256"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(bundle_of, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_pruning(bundle_of("reference", bits=16), **options)


def test_samples_are_named_in_the_bundle(pruned_bundle, stdlib_calibration):
    provenance = Bundle.open(pruned_bundle[0]).table["pruning"]["calibration"]
    assert provenance["tokens"] == 2048 and provenance["samples"] == prune_losses.SAMPLES
    assert provenance["source"] == stdlib_calibration[0].name and provenance["seed"] == 0
