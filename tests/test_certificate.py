"""The certificate says what the engine finds on the same text, and what one width everywhere would have given."""

import hashlib

import numpy as np
import pytest
from bundles import weights_of
from golden_checkpoints import ARCHITECTURES

from edge_moe.bench.evaluate import checkpoint_logits, evaluate
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of token ids of one made-up language: a next token is likely by the one before."""
    directory, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(7)
    likely = rng.integers(0, 128, (128, 3))
    for name, tokens in (("ids", 1024), ("held-out", 700)):
        ids = [0]
        for choice, one in zip(rng.random(tokens - 1), rng.integers(0, 128, tokens - 1), strict=True):
            ids.append(int(likely[ids[-1], int(choice * 4)] if choice < 0.75 else one))
        np.save(directory / f"{name}.npy", ids)
    return directory / "ids.npy", directory / "held-out.npy"


def windows_of(file, context: int) -> np.ndarray:
    """As many windows (windows, context) as fit, spread evenly."""
    ids = np.load(file)
    starts = np.linspace(0, len(ids) - context, len(ids) // context, dtype=int)
    return np.stack([ids[start : start + context] for start in starts])


def certified(model, out, texts, **options):
    return compress(model, out, calibration=texts[0], held_out=texts[1], tokens=1024, threads=1, **options)


def test_it_is_close_to_what_the_engine_finds_on_the_same_text(calibrated, bundle_of, stdlib_calibration):
    certificate, ids = calibrated.table["certificate"], np.load(stdlib_calibration[1])
    with (
        Runtime(bundle_of("reference", bits=16), context=256, prune="off", logits_rows=LOGITS_ROWS) as lossless,
        Runtime(calibrated.path, context=256, prune="off", logits_rows=LOGITS_ROWS) as runtime,
    ):
        found = evaluate(runtime, ids, context=certificate["context"], against=lossless.logits)
        exact = evaluate(lossless, ids, context=certificate["context"])
    bundle = certificate["bundle"]
    assert bundle["tokens"] == found["tokens"] == 1020
    assert certificate["source_perplexity"] == pytest.approx(exact["perplexity"], rel=1e-3)
    # The engine's activations are int8, the certificate's are float32.
    assert bundle["perplexity"] == pytest.approx(found["perplexity"], rel=0.01)
    assert bundle["perplexity_ratio"] == pytest.approx(found["perplexity"] / exact["perplexity"], rel=0.01)
    assert bundle["kld_mean"] == pytest.approx(found["kld_mean"], rel=0.05, abs=0.001)
    assert bundle["kld_p99"] == pytest.approx(found["kld_p99"], rel=0.1)
    assert bundle["top1_agreement"] == pytest.approx(found["top1_agreement"], abs=0.01)
    assert bundle["bits_per_weight"] == found["bits_per_weight"] == 2.5


def test_it_names_its_text_and_its_hash(calibrated, stdlib_calibration):
    ids = np.load(stdlib_calibration[1]).astype("<i8")
    assert calibrated.table["certificate"]["held_out"] == {
        "source": "held-out.npy",
        "sequences": 4,
        "tokens": 1024,
        "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    assert calibrated.table["calibration"]["source"] == "ids.npy"
    assert calibrated.table["calibration"]["sha256"] != calibrated.table["certificate"]["held_out"]["sha256"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_source_is_scored_as_the_checkpoint_itself(golden, tmp_path, texts, architecture):
    """By reference.forward, window by window, for a text that fills no whole number of windows."""
    model = golden[architecture][0]
    certificate = certified(model, tmp_path / "new.emoe", texts, width=3, method="uniform").table["certificate"]
    context, (_, logits), nll = certificate["context"], checkpoint_logits(model), []
    for window in windows_of(texts[1], context):
        scores = logits(window).astype(np.float64)[:-1]
        nll += list(np.log(np.exp(scores).sum(1)) - scores[np.arange(context - 1), window[1:]])
    assert certificate["bundle"]["tokens"] == len(nll)
    assert certificate["source_perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def test_one_width_is_what_it_would_be_as_a_bundle_of_its_own(golden, tmp_path, texts):
    model = golden["qwen3_moe"][0]
    mixed = certified(model, tmp_path / "mixed.emoe", texts, bits=7, method="mc")
    uniform = certified(model, tmp_path / "uniform.emoe", texts, bits=7, method="uniform")
    assert len({expert.widths for expert in mixed.experts.values()}) > 1
    assert mixed.table["certificate"]["uniform"] == uniform.table["certificate"]["bundle"]
    assert "uniform" not in uniform.table["certificate"]
    for bundle in (mixed, uniform):
        assert bundle.table["certificate"]["bundle"]["bits_per_weight"] == pytest.approx(bundle.bits_per_weight)
    assert mixed.table["certificate"]["bundle"] != uniform.table["certificate"]["bundle"]


def test_more_bits_are_nearer_to_the_source(golden, tmp_path, texts):
    found = [
        certified(golden["olmoe"][0], tmp_path / f"{width}.emoe", texts, width=width, method="uniform").table[
            "certificate"
        ]["bundle"]
        for width in (2, 4, 8)
    ]
    assert found[0]["kld_mean"] > 5 * found[1]["kld_mean"] > 25 * found[2]["kld_mean"] > 0
    assert found[0]["top1_agreement"] < found[1]["top1_agreement"] < found[2]["top1_agreement"] <= 1
    assert all(one["kld_p99"] > one["kld_mean"] for one in found)


def test_without_one_the_weights_are_the_same(golden, tmp_path, texts):
    with_, without = (
        certified(
            golden["qwen3_moe"][0],
            tmp_path / f"{certificate}.emoe",
            texts,
            bits=5,
            certificate=certificate,
        )
        for certificate in (True, False)
    )
    assert without.table["certificate"] is None
    for file in with_.path.iterdir():
        if file.name != "bundle.json":
            assert file.read_bytes() == (without.path / file.name).read_bytes()
    tables = [{**bundle.table, "certificate": 0, "checksum": 0} for bundle in (with_, without)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("options", [{"width": 4, "method": "rtn"}, {"bits": 16}])
def test_what_needs_no_text_has_none(golden, tmp_path, options):
    assert compress(golden["olmoe"][0], tmp_path / "new.emoe", **options).table["certificate"] is None


def test_the_divergence_is_that_of_the_forward_pass(golden, tmp_path, texts):
    """By reference.forward with the bundle's weights as they are read back."""
    model = golden["qwen3_moe"][0]
    made = certified(model, tmp_path / "new.emoe", texts, width=2, method="uniform")
    checkpoint, windows = Checkpoint(model), windows_of(texts[1], made.table["certificate"]["context"])
    clean, moved = (
        reference.forward(checkpoint.config, weights, windows)[:, :-1].astype(np.float64)
        for weights in (checkpoint, weights_of(made.path))
    )
    clean, moved = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (clean, moved))
    kld = (np.exp(clean) * (clean - moved)).sum(-1)
    found = made.table["certificate"]["bundle"]
    assert found["kld_mean"] == pytest.approx(kld.mean(), rel=1e-3)
    assert found["kld_p99"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-2)
    assert found["top1_agreement"] == pytest.approx((clean.argmax(-1) == moved.argmax(-1)).mean(), abs=2e-3)
    assert Bundle.open(made.path).table["certificate"] == made.table["certificate"]


def test_choices_of_experts_that_changed_are_counted(golden, tmp_path, texts):
    """By the routes of reference.forward's layers, with the bundle's weights and with the checkpoint's."""
    model = golden["mixtral"][0]
    made = certified(model, tmp_path / "new.emoe", texts, width=1, method="uniform", trunk_width=4)
    checkpoint, windows = Checkpoint(model), windows_of(texts[1], made.table["certificate"]["context"])
    config, routes = checkpoint.config, []
    for weights in (checkpoint, weights_of(made.path)):
        x, chosen = reference.embed(config, weights, windows), []
        for layer in range(config.layer_count):
            a = x + reference.attention_block(config, weights, layer, x)
            h = reference.mlp_input(config, weights, layer, a)
            chosen.append(reference.route(config, weights, layer, h)[0])
            x = a + reference.moe_block(config, weights, layer, a).reshape(a.shape)
        routes.append(chosen)
    lost = [
        np.mean([expert not in other for one, other in zip(*its, strict=True) for expert in one])
        for its in zip(*routes, strict=True)
    ]
    assert 0.01 < np.mean(lost) < 0.5
    assert made.table["certificate"]["bundle"]["routing_changed"] == pytest.approx(np.mean(lost), abs=2e-3)
