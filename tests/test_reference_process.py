"""The model that a bundle is compared with: the same logits as in this process, and both under one cap."""

import json

import cgroup
import numpy as np
import pytest
from bundles import REFERENCE, run_python
from test_cli import error_of, object_of

from edge_moe.bench import reference_process
from edge_moe.bench.evaluate import Cached, checkpoint_logits
from edge_moe.bench.reference_process import ReferenceProcess
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.runtime import Runtime


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4096, 64)


@pytest.mark.parametrize("most_bytes", [0, 10_000_000])
def test_a_checkpoint_that_is_not_kept_whole_has_the_same_logits(ids, most_bytes):
    _, logits = checkpoint_logits(REFERENCE, most_bytes)
    for _ in range(2):
        np.testing.assert_array_equal(logits(ids), checkpoint_logits(REFERENCE)[1](ids))
    kept = Cached(Checkpoint(REFERENCE), most_bytes)
    reference.forward(kept.config, kept, ids)
    parts = [part for its in kept._kept.values() for part in (its if isinstance(its, tuple) else [its])]
    assert most_bytes / 2 <= sum(part.nbytes for part in parts) <= most_bytes


def test_the_other_process_gives_a_checkpoints_logits_and_a_bundles(ids, bundle_of):
    bundle = bundle_of("reference", width=4)
    with ReferenceProcess(REFERENCE, 10**9, 64, 1) as logits:
        np.testing.assert_array_equal(logits(ids), checkpoint_logits(REFERENCE)[1](ids))
    with ReferenceProcess(bundle, 10**9, 64, 1) as logits, Runtime(bundle, threads=1, context=64) as runtime:
        for part in (ids, ids[:1], ids[3:50]):
            np.testing.assert_array_equal(logits(part), runtime.logits(part))


def test_rows_of_a_large_window_come_in_slices_and_what_is_not_asked_for_is_passed_over(ids, monkeypatch):
    monkeypatch.setattr(reference_process, "WHOLE_BYTES", 0)
    want = checkpoint_logits(REFERENCE)[1](ids)
    with ReferenceProcess(REFERENCE, 10**9, 64, 1) as logits:
        for _ in range(2):
            rows = logits(ids)
            assert rows.shape == want.shape
            np.testing.assert_array_equal(rows[0:32], want[:32])
            np.testing.assert_array_equal(rows[40:60], want[40:60])


def test_what_the_other_process_cannot_open_is_raised_here(tmp_path, ids):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/config.json: no such file"):
        ReferenceProcess(tmp_path, 10**9, 64)
    with ReferenceProcess(REFERENCE, 10**9, 64) as logits, pytest.raises(ValueError, match="outside the vocabulary"):
        logits(ids + 4096)


def test_a_cap_is_divided_by_what_each_can_use(bundle_of):
    code = (
        "import json, sys; from edge_moe.bench.reference_process import shares; "
        "print(json.dumps([shares(sys.argv[1], sys.argv[2], ram, 64) for ram in (260_000_000, 10**9)]))"
    )
    parts = json.loads(run_python(code, bundle_of("reference", width=4), REFERENCE).stdout)
    for (mine, its), ram in zip(parts, (260_000_000, 10**9), strict=True):
        assert mine + its == ram and min(mine, its) > 70_000_000
    assert its < 300_000_000 < mine  # the checkpoint needs no more; the rest is the bundle's


def test_both_stay_under_the_cap(bundle_of, stdlib_calibration, tmp_path):
    bundle, cap = bundle_of("reference", width=4), 260_000_000
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 100)
    command = ("eval", bundle, "--text", tmp_path / "text.txt", "--context", "64", "--tokens", "300")
    free = object_of(*command, "--against", REFERENCE)
    capped, peak = cgroup.run_json([*command, "--against", REFERENCE, "--ram", cap], cap)
    assert capped["kld_mean"] == free["kld_mean"] and peak <= cap
    message = error_of(*command, "--against", REFERENCE, "--ram", "150MB")
    assert message.startswith(f"scoring {bundle} beside {REFERENCE} takes ")
    assert message.endswith(" MB, the cap is 150 MB; raise ram, or lower the context")
