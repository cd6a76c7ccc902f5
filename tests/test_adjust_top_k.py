"""Fewer experts a token where some were dropped: every trial is the whole model's divergence, the best one is taken."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import Kept, changed, logits_of, weights_of
from golden_checkpoints import DROPPED
from test_resume import hashes, kill, start

from edge_moe.compressor.choosing import adjust_top_k as module
from edge_moe.compressor.choosing.adjust_top_k import adjust_top_k, fewest
from edge_moe.compressor.passes.calibrate import load_calibration
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.score import log_softmax

# (layer, top_k) that are tried: from the share kept of top_k, rounded, up to top_k itself.
TRIALS = {
    "mixtral": [(0, 1), (1, 1)],  # two a token; 5 and 3 of 8 are left
    "olmoe": [(1, 1), (1, 2)],  # three a token; 8 and 3 of 8
    "qwen2_moe": [(0, 2), (2, 2)],  # three a token; 5 and 4 of 8, and a dense layer: round(1.5) is 2
    "qwen3_moe": [(0, 2), (1, 2)],  # three a token; 3 and 5 of 6: round(1.5) and round(2.5) are 2
    # Three a token, in the first two layers by tables; 6, 3, 4, 4 and 3 of 8.
    "deepseek_v4": [(0, 2), (1, 1), (1, 2), (2, 2), (3, 2), (4, 1), (4, 2)],
    "deepseek_v3": [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)],  # five a token; 8 and 7 of 16
}


def cut(golden, architecture: str):
    checkpoint = Checkpoint(golden[architecture][0])
    return replace(checkpoint.config, kept=DROPPED[architecture][0]), checkpoint


def some_ids(config, sequences: int = 6) -> np.ndarray:
    return np.random.default_rng(8).integers(0, config.vocab, (sequences, 64))


class Adjusted:
    """One run: what it returned, the divergences it compared, what it told, and its streams."""

    def __init__(self, config, checkpoint, ids, workers: int = 1, files: Path | None = None):
        self.streams, self.told, self.nats = [], [], []

        def new_stream(name: str, rows: int, dim: int = 0) -> Stream:
            file = files / f"{len(self.streams)}-{name}" if files else None
            self.streams.append(Stream(rows, dim or config.width, file))
            return self.streams[-1]

        original = module._divergence

        def heard(*arguments):
            self.nats = original(*arguments)
            return self.nats

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_divergence", heard)
            self.top_k = adjust_top_k(config, checkpoint, ids, new_stream, workers, self.told.append)


def divergences(config, checkpoint, ids, trials) -> list[float]:
    """Of the model with top_k everywhere, then of each trial's: from the source, nats a token."""
    clean = log_softmax(reference.forward(checkpoint.config, checkpoint, ids).reshape(ids.size, -1))

    def of(layer_top_k: tuple[int, ...]) -> float:
        its = replace(config, layer_top_k=layer_top_k)
        moved = log_softmax(reference.forward(its, Kept(checkpoint, its), ids).reshape(ids.size, -1))
        return float((np.exp(clean) * (clean - moved)).sum(-1).mean())

    full = [0 if layer in config.dense_layers else config.top_k for layer in range(config.layer_count)]
    tried = [tuple(top_k if at == layer else one for at, one in enumerate(full)) for layer, top_k in trials]
    return [of(tuple(full)), *(of(one) for one in tried)]


@pytest.mark.parametrize("architecture", TRIALS)
def test_each_trial_is_the_divergence_of_the_whole_model_and_the_best_is_taken(golden, architecture):
    config, checkpoint = cut(golden, architecture)
    ids, trials = some_ids(config), TRIALS[architecture]
    found = Adjusted(config, checkpoint, ids)
    direct = divergences(config, checkpoint, ids, trials)
    # Sums in another order: a token whose scores are as good as equal may take another expert.
    np.testing.assert_allclose(found.nats, direct, rtol=1e-4)
    for layer in range(config.layer_count):
        if layer in config.dense_layers:
            assert found.top_k[layer] == 0
            continue
        options = {config.top_k: found.nats[0]}
        options |= {top_k: nats for (at, top_k), nats in zip(trials, found.nats[1:], strict=True) if at == layer}
        assert found.top_k[layer] == min(options, key=options.get)
    assert found.told == list(range(1, config.layer_count + 1))
    assert all(stream._values is None for stream in found.streams)  # closed


def test_a_layer_may_gain_by_fewer_and_another_not(golden):
    """Of the trials above, so that both answers are seen."""
    chosen = {}
    for architecture in TRIALS:
        config, checkpoint = cut(golden, architecture)
        found = adjust_top_k(
            config,
            checkpoint,
            some_ids(config),
            lambda _, rows, dim=0, c=config: Stream(rows, dim or c.width),
            1,
            lambda done: None,
        )
        for layer, _ in TRIALS[architecture]:
            chosen[architecture, layer] = found[layer] < config.top_k
    assert set(chosen.values()) == {False, True}


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3"])
def test_workers_files_and_blocks_do_not_change_the_result(golden, tmp_path, monkeypatch, architecture):
    config, checkpoint = cut(golden, architecture)
    ids = some_ids(config, 3)
    one = Adjusted(config, checkpoint, ids)
    for options in ({"workers": 3}, {"workers": 2, "files": tmp_path}):
        other = Adjusted(config, checkpoint, ids, **options)
        assert (other.top_k, other.nats) == (one.top_k, one.nats)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "LOGITS_BYTES", 8 * config.vocab * 50)  # 192 rows in pieces of 50
    np.testing.assert_allclose(Adjusted(config, checkpoint, ids).nats, one.nats, rtol=1e-6)


def test_much_text_is_sampled_evenly(golden, monkeypatch):
    monkeypatch.setattr(module, "SEQUENCES", 3)
    config, checkpoint = cut(golden, "mixtral")
    ids = some_ids(config, 9)
    found = Adjusted(config, checkpoint, ids)
    np.testing.assert_allclose(
        found.nats, divergences(config, checkpoint, ids[[0, 4, 8]], TRIALS["mixtral"]), rtol=1e-4
    )


def test_where_no_fewer_can_be_nothing_is_tried(golden):
    """Seven of eight: the share kept of three is three again."""
    config, checkpoint = cut(golden, "olmoe")
    config = replace(config, kept=((0, 1, 2, 3, 4, 5, 6), (0, 2, 3, 4, 5, 6, 7)))
    found = Adjusted(config, checkpoint, some_ids(config))
    assert found.top_k == (3, 3)
    assert len(found.nats) == 1


@pytest.mark.parametrize(
    ("top_k", "left", "of", "want"),
    [(8, 64, 128, 4), (8, 96, 128, 6), (8, 128, 128, 8), (6, 10, 128, 1), (2, 3, 8, 1), (1, 4, 8, 1), (5, 7, 16, 2)],
)
def test_the_fewest_are_the_share_kept_of_top_k_but_one(golden, top_k, left, of, want):
    config = changed(load_config(golden["mixtral"][0]), experts=of, top_k=top_k)
    assert fewest(replace(config, kept=(tuple(range(left)), tuple(range(of)))), 0) == want
    assert fewest(replace(config, kept=(tuple(range(left)), tuple(range(of)))), 1) == top_k


# ---- whole bundles


@pytest.fixture(scope="module")
def model(golden) -> Path:
    return golden["qwen2_moe"][0]  # 3 layers, of which the second is dense


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 128, 2048))
    return {"bits": 8, "calibration": str(file), "tokens": 512, "threads": 1, "drop_experts": 0.5}


@pytest.fixture(scope="module")
def whole(model, options, tmp_path_factory) -> Bundle:
    """Made by a run that nothing interrupted. Not to be changed."""
    return compress(model, tmp_path_factory.mktemp("whole") / "new.emoe", adjust_top_k=True, **options)


def test_a_bundle_chooses_as_many_as_was_found_best(golden, model, options, whole):
    checkpoint = Checkpoint(model)
    config = replace(checkpoint.config, kept=whole.config.kept)
    ids = load_calibration(None, config, [Path(options["calibration"])], options["tokens"], 0).ids
    want = Adjusted(config, checkpoint, ids).top_k
    assert whole.config.layer_top_k == want
    assert whole.config.layer_top_k[1] == 0
    assert min(want[0], want[2]) < checkpoint.config.top_k  # else it would not show
    assert whole.table["top_k"] == [want[0], want[2]]  # of the layers with experts
    assert len(list(verify(whole))) == 2 + 2 * 4
    token_ids = golden["qwen2_moe"][1]
    logits, weights = logits_of(whole.path, token_ids), weights_of(whole.path)

    def distance(layer_top_k: tuple[int, ...]) -> float:
        its = reference.forward(replace(whole.config, layer_top_k=layer_top_k), weights, token_ids)
        return np.median(np.sqrt(np.square(logits - its).mean(-1))) / its.std()

    assert distance(want) < min(0.1, 0.5 * distance((3, 0, 3)))  # int8 activations


def test_without_it_every_layer_keeps_the_models_top_k(model, options, tmp_path, whole):
    bundle = compress(model, tmp_path / "new.emoe", **options)
    assert bundle.config.kept == whole.config.kept
    assert bundle.config.layer_top_k == ()
    assert bundle.table.get("top_k") is None


def test_without_dropping_it_is_refused(model, options, tmp_path):
    with pytest.raises(ValueError) as caught:
        compress(model, tmp_path / "new.emoe", adjust_top_k=True, **{**options, "drop_experts": 0.0})
    assert str(caught.value) == ("adjust_top_k needs drop_experts: without it every layer keeps the model's top_k")
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_once_it_was_found_goes_on_to_the_same_bundle(model, options, tmp_path, whole):
    out, options = tmp_path / "new.emoe", {**options, "adjust_top_k": True}
    with start(model, out, options) as child:
        while not (tmp_path / "new.emoe.work" / "top_k.json").exists():
            assert child.poll() is None, child.stderr.read()
        kill(child)
    assert hashes(compress(model, out, resume=True, **options).path) == hashes(whole.path)
    assert [left.name for left in tmp_path.iterdir()] == ["new.emoe"]


@pytest.mark.parametrize("step", ["adjust top_k", "round"])
def test_what_was_found_is_not_looked_for_again(model, options, tmp_path, whole, step):
    """Interrupted while it is looked for, or as the first expert is rounded."""
    seen, out, options = [], tmp_path / "new.emoe", {**options, "adjust_top_k": True}

    def stop(now: str, done: int, of: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, out, progress=stop, **options)
    file = tmp_path / "new.emoe.work" / "top_k.json"
    assert file.exists() == (step == "round")
    if step == "round":
        found = json.loads(file.read_text())
        assert found == list(whole.config.layer_top_k)
        file.write_text(json.dumps([3, 0, 1]))  # to see that it is this which is read
    bundle = compress(model, out, resume=True, progress=lambda *now: seen.append(now), **options)
    assert ("adjust top_k" in {now for now, _, _ in seen}) == (step != "round")
    if step == "round":
        assert bundle.config.layer_top_k == (3, 0, 1)
    else:
        assert [now[1:] for now in seen if now[0] == "adjust top_k"] == [(1, 3), (2, 3), (3, 3)]
        assert hashes(bundle.path) == hashes(whole.path)
