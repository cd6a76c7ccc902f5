"""Rounding: the inputs that it is done for, the target that it aims at, and what is written of it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from bundles import logits_of, weights_of
from golden_checkpoints import ARCHITECTURES
from test_inputs import step_by_definition
from test_sensitivity import Changed

from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.rounding import round_layers
from edge_moe.compressor.rounding.gptq import Curvature, damping_for, gptq
from edge_moe.compressor.rounding.quantise import dequantise, quantise, trunk_packing
from edge_moe.compressor.rounding.round_layers import PackedTrunk, Rounding, Track
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import BundleWriter, Packing
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle, verify
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.score import Score, log_softmax


def random_ids(config, sequences=8, tokens=128, seed=4) -> np.ndarray:
    tokens = min(tokens, config.independent_tokens or tokens)
    return np.random.default_rng(seed).integers(0, config.vocab, (sequences, tokens))


def go_through(
    checkpoint, weights, ids, widths, trunk_width, *, out=None, calibration_rows=None, written=None, **options
) -> Rounding:
    """Round every expert at these widths in groups of 32; with `out` a bundle is written.

    written: gets the three matrices of each expert, as they are read back, by (layer, number).
    """
    config = checkpoint.config
    trunk = trunk_packing(trunk_shapes(config), trunk_width, 64)
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts)]
    packing = dict.fromkeys(keys, Packing(widths, 32))

    class Kept:
        def write_expert(self, layer, number, packed, _bias):
            cols = (config.dim, config.dim, config.expert_hidden)
            written[layer, number] = [dequantise(*its) for its in zip(packed, widths, cols, strict=True)]

        def write_trunk(self, name, packed):
            pass

    def rounded(writer) -> Rounding:
        track = Track("bundle", config, PackedTrunk(weights, config, trunk, writer, 1), packing, writer)
        rounding = Rounding(
            config,
            weights,
            ids,
            calibration_rows or ids.size,
            [track],
            lambda name, rows, dim=0: Stream(rows, dim or config.width),
            **{"workers": 1, "threads": 1, **options},
        )
        rounding.start()
        for layer in range(config.layer_count):
            rounding.layer(layer, lambda done: None)
        rounding.head()
        return rounding

    if out is None:
        return rounded(None if written is None else Kept())
    with BundleWriter(out, checkpoint.directory, config, trunk, packing) as writer:
        rounding = rounded(writer)
        for missing in sorted(trunk.keys() - writer.trunk_written):
            rounding.tracks[0].trunk.trunk(missing)
        writer.finish()
    rounding.tracks[0].trunk.writer = None
    return rounding


def test_a_perplexity_beyond_all_numbers_is_still_one():
    logits = np.zeros((2, 4), np.float32)
    logits[:, 0] = 2000
    score = Score()
    score.add(logits, np.array([1, 2]))
    assert score.result() == {"tokens": 2, "perplexity": pytest.approx(np.exp(300.0))}
    score = Score()
    score.add(logits, np.array([0, 0]))
    assert score.result()["perplexity"] == pytest.approx(1)


def heads(rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the source and of the track, (rows, vocab)."""
    track = rounding.tracks[0]
    return tuple(
        reference.head(rounding.config, weights, x.read(0, x.rows))
        for weights, x in ((rounding.checkpoint, rounding.x), (track.trunk, track.x))
    )


def kld(rounding: Rounding) -> float:
    clean, moved = (log_softmax(logits) for logits in heads(rounding))
    return float((np.exp(clean) * (clean - moved)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_16_bits_the_bundle_is_the_lossless_one(golden, bundle_of, tmp_path, architecture):
    checkpoint = Checkpoint(golden[architecture][0])
    out, ids = tmp_path / "new.emoe", random_ids(checkpoint.config)
    rounding = go_through(checkpoint, checkpoint, ids, (16, 16, 16), 16, out=out)
    lossless = bundle_of(architecture, bits=16)
    for file in (TRUNK_FILE, "experts-00001-of-00001.safetensors"):
        assert (out / file).read_bytes() == (lossless / file).read_bytes()
    want = reference.forward(checkpoint.config, checkpoint, ids)
    for logits in heads(rounding):
        np.testing.assert_allclose(logits, want.reshape(logits.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_errors_fall_with_the_width_and_are_tiny_at_8_bits(golden, architecture):
    checkpoint = Checkpoint(golden[architecture][0])
    ids = random_ids(checkpoint.config)
    divergence = [kld(go_through(checkpoint, checkpoint, ids, (width,) * 3, 16)) for width in (2, 4, 8)]
    assert divergence[0] > 5 * divergence[1] > 25 * divergence[2]
    assert divergence[2] < 2e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_written_bundle_computes_what_its_track_did(golden, tmp_path, architecture):
    checkpoint = Checkpoint(golden[architecture][0])
    out, ids = tmp_path / "new.emoe", random_ids(checkpoint.config)
    rounding = go_through(checkpoint, checkpoint, ids, (2, 3, 4), 6, out=out)
    assert len(list(verify(Bundle.open(out)))) > 1
    _, moved = heads(rounding)
    want = reference.forward(checkpoint.config, weights_of(out), ids).reshape(moved.shape)
    np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "olmoe", "mixtral", "gpt_oss"])
def test_an_expert_is_rounded_for_its_inputs_and_aims_at_what_is_lacking(golden, tmp_path, architecture):
    """The last layer's most used expert, from the definition in float64."""
    checkpoint = Checkpoint(golden[architecture][0])
    c, out, ids = checkpoint.config, tmp_path / "new.emoe", random_ids(checkpoint.config, sequences=12)
    go_through(checkpoint, checkpoint, ids, (2, 2, 3), 4, out=out)
    made, layer = weights_of(out), c.moe_layers[-1]

    def until_experts(weights):
        """The residual stream and the experts' input of that layer, both (rows, dim)."""
        x = reference.embed(c, weights, ids)
        for before in range(layer):
            x = reference.layer(c, weights, before, x)
        x = (x + reference.attention_block(c, weights, layer, x)).reshape(-1, c.dim)
        return x, reference.mlp_input(c, weights, layer, x)

    (a, h), (a_made, h_made) = until_experts(checkpoint), until_experts(made)
    chosen, weight = reference.route(c, made, layer, h_made)
    after = a + reference.moe_block(c, checkpoint, layer, a)
    common = a_made + (reference.shared_expert(c, made, layer, h_made) if c.shared_hidden else 0)
    lacking = after - common - reference.experts(c, checkpoint, layer, h, chosen, weight)
    size = np.square(after).sum(1) + np.square(lacking).sum(1)
    lacking /= weight.sum(1, keepdims=True)

    expert = int(np.argmax(np.bincount(chosen.reshape(-1))))
    rows, place = np.nonzero(chosen == expert)
    assert len(rows) >= 128
    counts = weight[rows, place] ** 2 / size[rows]
    counts = (counts / counts.sum()).astype(np.float64)
    matrices, found = checkpoint.expert(layer, expert), made.expert(layer, expert)

    def rounded(matrix, target, x, width) -> np.ndarray:
        x = x.astype(np.float64)
        best = matrix + step_by_definition(x, counts, target - x @ matrix.T)
        moment = (x * counts[:, None]).T @ x
        packed = gptq(best.astype(np.float32), Curvature.of(moment, damping_for(*x.shape)), width, 32)
        return dequantise(packed, width, matrix.shape[1])

    bias = reference.expert_bias(c, checkpoint, layer, expert)
    inner = reference.expert_inner(c, h_made[rows], *found[:2], bias=bias)
    target = reference.expert(c, h[rows], *matrices, bias=bias) + lacking[rows]
    target -= 0 if bias[2] is None else bias[2]
    for got, want in zip(
        found,
        (
            rounded(matrices[0], h[rows] @ matrices[0].T, h_made[rows], 2),
            rounded(matrices[1], h[rows] @ matrices[1].T, h_made[rows], 2),
            rounded(matrices[2], target, inner, 3),
        ),
        strict=True,
    ):
        # Codes that lie halfway may fall either way, as what lies before them is float32 here and float64 there.
        assert np.isclose(got, want, rtol=1e-5, atol=1e-7).mean() > 0.9


def test_nothing_is_fitted_to_held_out_rows(golden, tmp_path):
    checkpoint, written = Checkpoint(golden["qwen3_moe"][0]), []
    ids = random_ids(checkpoint.config)
    for seed in (5, 6):
        both = np.concatenate([ids, random_ids(checkpoint.config, seed=seed)])
        out = tmp_path / f"{seed}.emoe"
        go_through(checkpoint, checkpoint, both, (2, 2, 2), 8, out=out, calibration_rows=ids.size)
        written.append([(out / file.name).read_bytes() for file in Bundle.open(out).files])
    assert written[0] == written[1]


@pytest.mark.parametrize("options", [{"workers": 2}, {"workers": 3, "threads": 2}])
def test_workers_do_not_change_what_is_written(golden, tmp_path, options):
    checkpoint = Checkpoint(golden["mixtral"][0])
    ids = random_ids(checkpoint.config)
    for name, its in (("one", {}), ("other", options)):
        go_through(checkpoint, checkpoint, ids, (1, 2, 3), 8, out=tmp_path / name, **its)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("against", [0.05, 4.0])
def test_an_expert_that_no_token_chooses_is_rounded_near_to_what_it_was(golden, tmp_path, against):
    checkpoint = Checkpoint(golden["qwen3_moe"][0])
    router = checkpoint.trunk("layers.0.router")
    router[2] = -against
    changes = {"embedding": checkpoint.trunk("embedding") + 4, "layers.0.router": router}
    weights, out = Changed(checkpoint, changes), tmp_path / "new.emoe"
    go_through(checkpoint, weights, random_ids(checkpoint.config), (4, 4, 4), 8, out=out)
    for matrix, found in zip(checkpoint.expert(0, 2), weights_of(out).expert(0, 2), strict=True):
        assert np.square(found - matrix).mean() < 0.02 * np.square(matrix).mean()


def test_in_activation_order_the_error_is_no_larger_than_rtns(golden, bundle_of, tmp_path):
    checkpoint = Checkpoint(golden["qwen3_moe"][0])
    ids = random_ids(checkpoint.config)
    out = tmp_path / "new.emoe"
    ordered = kld(go_through(checkpoint, checkpoint, ids, (3, 3, 3), 8, out=out, act_order=True))
    plain = log_softmax(reference.forward(checkpoint.config, weights_of(bundle_of("qwen3_moe", width=3)), ids))
    clean = log_softmax(reference.forward(checkpoint.config, checkpoint, ids))
    assert ordered < 0.8 * (np.exp(clean) * (clean - plain)).sum(-1).mean()
    assert Bundle.open(out).nbytes == Bundle.open(bundle_of("qwen3_moe", width=3)).nbytes


def test_on_a_trained_model_calibration_takes_a_good_part_of_the_divergence_away(bundle_of, calibrated, stdlib_ids):
    exact, plain, found = (
        logits_of(path, stdlib_ids)
        for path in (bundle_of("reference", bits=16), bundle_of("reference", width=2), calibrated.path)
    )
    divergence = []
    for logits in (plain, found):
        score = Score()
        score.add(logits[:-1], np.array(stdlib_ids[1:]), exact[:-1])
        divergence.append(score.result()["kld_mean"])
    assert divergence[1] < 0.8 * divergence[0]
    assert calibrated.nbytes == Bundle.open(bundle_of("reference", width=2)).nbytes


# ---- tracks


def test_an_expert_that_calibration_would_make_worse_is_rounded_to_nearest(golden, tmp_path, monkeypatch):
    checkpoint, found = Checkpoint(golden["qwen3_moe"][0]), []

    def sometimes_wrong(matrix, *arguments, **options):
        found.append(matrix)
        return gptq(matrix if (len(found) - 1) % 6 < 3 else -matrix, *arguments, **options)

    monkeypatch.setattr(round_layers, "gptq", sometimes_wrong)
    go_through(checkpoint, checkpoint, random_ids(checkpoint.config), (2, 2, 3), 4, out=tmp_path / "new.emoe")
    made, to_nearest = weights_of(tmp_path / "new.emoe"), []
    for key in (
        (layer, expert) for layer in checkpoint.config.moe_layers for expert in range(checkpoint.config.experts)
    ):
        want = (
            dequantise(quantise(m, w, 32), w, m.shape[1])
            for m, w in zip(checkpoint.expert(*key), (2, 2, 3), strict=True)
        )
        to_nearest.append(all(map(np.array_equal, made.expert(*key), want)))
    assert np.mean(to_nearest) == 0.5
    assert len(found) == 3 * len(to_nearest)


def test_a_track_numbers_the_experts_that_were_kept(golden):
    checkpoint = Checkpoint(golden["qwen3_moe"][0])
    config = replace(checkpoint.config, kept=((0, 2, 5), (1, 2, 3, 4, 5)))
    track = Track("bundle", config, None, {})
    assert [track.config.number_of(0, expert) for expert in range(6)] == [0, None, 1, None, None, 2]
    assert [track.config.number_of(1, expert) for expert in range(6)] == [None, 0, 1, 2, 3, 4]
    assert [checkpoint.config.number_of(1, expert) for expert in range(6)] == list(range(6))


def test_weights_that_are_not_of_the_text_are_refused_with_their_reason(golden, tmp_path):
    """Activations overflow where the trunk is far too large for float32."""
    source = shutil.copytree(golden["qwen3_moe"][0], tmp_path / "model")
    checkpoint = Checkpoint(source)
    norm = checkpoint.trunk("layers.0.mlp_norm") * np.float32(1e30)
    with np.errstate(all="ignore"), pytest.raises(ValueError) as caught:
        go_through(
            checkpoint, Changed(checkpoint, {"layers.0.mlp_norm": norm}), random_ids(checkpoint.config), (2, 2, 2), 8
        )
    assert str(caught.value) == "activations have NaN or Inf; the checkpoint is damaged or the text does not suit it"
