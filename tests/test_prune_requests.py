"""Pruning as requests ask for it and bundles offer it: what is refused, and what a result does not depend on."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from bundles import edit_table, flip, logits_of, make_engine, mask_routers_of, prunable, routers_of, run_engine
from safetensors.numpy import load_file, save_file
from test_cli import error_of, object_of, succeeds

from edge_moe import _core
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.describe import describe_bundle
from edge_moe.runtime.pruning import MASK_FILE
from edge_moe.runtime.runtime import Runtime

IDS = list(range(1, 25))
CERTIFIED = ("cut", "reached", "perplexity_ratio", "kld_mean", "kld_p99", "top1_agreement")


@pytest.fixture(scope="module")
def bundle(golden, tmp_path_factory):
    """olmoe with random mask routers and curves of every rule. Not to be changed."""
    source = golden["olmoe"][0]
    return prunable(tmp_path_factory.mktemp("requests") / "b.emoe", source, mask_routers_of(Checkpoint(source).config))


@pytest.fixture
def own(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "own.emoe")


def refused(call, *args, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call(*args, **options)
    return str(error.value)


# ---- what a request may ask


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (0.05, "prune is 0.05, but loss is calibrated for 0.1 to 0.3 of expert uses"),
        (0.31, "prune is 0.31, but loss is calibrated for 0.1 to 0.3 of expert uses"),
        ("otp:0.5", "prune is 0.5, but otp is calibrated for 0.1 to 0.3 of expert uses"),
        ("odp:0.3", "prune is 0.3, but odp is calibrated for 0.2 of expert uses"),
        (
            math.nan,
            "prune is nan, expected off, bundle, a share of expert uses such as 0.2, or one of otp, loss, share, odp",
        ),
        ("most", "prune is 'most', expected off, bundle, a share"),
        ("share:much", "prune is 'share:much', expected off"),
    ],
)
def test_a_cut_outside_the_curve_and_an_unknown_rule_are_refused(bundle, prune, message):
    assert message in refused(Runtime, bundle, prune=prune)
    with Runtime(bundle, prune="off") as runtime:
        assert message in refused(runtime.stream, IDS, prune=prune)
        assert message in refused(runtime.logits, IDS, prune=prune)
        assert runtime.stats["tokens"] == 0


@pytest.mark.parametrize("prune", ["bundle", 0.2, "share"])
def test_a_bundle_without_calibration_says_how_to_calibrate_it(bundle_of, prune):
    path = bundle_of("olmoe", bits=16)
    message = (
        f"{path}: prune is {prune!r}, but this bundle is not calibrated for it; use off, or run `edge-moe prune {path}`"
    )
    assert refused(Runtime, path, prune=prune) == message
    with Runtime(path) as runtime:
        assert runtime.generate(IDS, 4).dropped_routing_weight == 0


def test_a_bundle_is_pruned_as_it_was_made_for_and_calls_may_say_otherwise(bundle):
    with Runtime(bundle) as runtime, Runtime(bundle, prune="off") as whole:
        assert np.array_equal(runtime.logits(IDS), runtime.logits(IDS, prune="bundle"))
        assert np.array_equal(runtime.logits(IDS), runtime.logits(IDS, prune=0.2))
        assert np.array_equal(runtime.logits(IDS, prune="off"), whole.logits(IDS))
        assert not np.array_equal(runtime.logits(IDS), whole.logits(IDS))
        answers = [runtime.generate(IDS, 8, prune=how) for how in ("off", "loss:0.1", "loss:0.3", "share", "off")]
    used = [answer.experts_used for answer in answers]
    assert used[0] == used[4] == answers[0].top_k > used[1] > used[2]
    assert [answer.dropped_routing_weight > 0 for answer in answers] == [False, True, True, True, False]
    assert answers[0].tokens == answers[4].tokens  # what other rules left in the KV cache is not used


def test_a_cut_between_two_calibrated_ones_is_interpolated(bundle):
    pruning = Bundle.open(bundle).pruning
    assert pruning.rule("otp:0.2").price == pytest.approx(0.3)
    assert [value for value in pruning.rule("share:0.25").threshold if value] == pytest.approx([0.6] * 2)
    assert pruning.rule("odp").threshold == pruning.rule("odp:0.2").threshold and pruning.rule("odp").protect == 0.02


# ---- what a result does not depend on


@pytest.mark.parametrize("rule", ["ratio", "share", "otp", "loss"])
def test_logits_are_the_same_for_any_threads_chunks_and_cap(bundle, rule):
    routers = {name: routers_of(bundle, name) for name in ("otp", "loss")}
    seen, reads = [], []
    for slots, threads, chunk in ((None, 1, 32), (None, 3, 32), (None, 2, 5), (3, 1, 32), (4, 2, 1), (6, 3, 7)):
        engine = make_engine(bundle, slots=slots, threads=threads, chunk=chunk, **routers)
        engine.set_prune(rule, [0.6, 0.7] if rule in ("ratio", "share") else [], 0.2, 0.0)
        seen.append(run_engine(engine, IDS, chunk))
        seen.append(run_engine(engine, IDS, chunk))  # with other experts in memory than before
        counters = engine.counters
        reads.append((counters["experts_used"], round(counters["dropped_weight"], 3)))
    assert all(np.array_equal(one, seen[0]) for one in seen) and len(set(reads)) == 1
    assert not np.array_equal(seen[0], logits_of(bundle, IDS))


def test_dropped_experts_are_not_read(bundle):
    read = []
    for rule in ("off", "loss"):
        engine = make_engine(bundle, slots=3, loss=routers_of(bundle, "loss"))
        engine.set_prune(rule, [], 0.5, 0.0)
        run_engine(engine, IDS, 1)
        read.append(engine.counters)
    assert read[1]["experts_used"] < read[0]["experts_used"]
    assert read[1]["bytes_read"] < read[0]["bytes_read"]
    for counters in read:
        assert counters["expert_hits"] + counters["expert_misses"] == counters["experts_used"]


def test_protected_tokens_of_a_prompt_keep_their_experts(golden, tmp_path):
    """Mixtral's rule at a ratio that drops every second expert: of 32 tokens, 2 % rounded up is one a layer."""
    source, ids, _ = golden["mixtral"]
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(Checkpoint(source).config))
    engine = make_engine(path, chunk=len(ids))
    engine.set_prune("ratio", [1.0, 1.0], 0.0, 0.02)
    run_engine(engine, ids, len(ids))
    layers = Bundle.open(path).config.layer_count
    assert engine.counters["experts_used"] == layers * (len(ids) + 1)
    before = engine.counters["experts_used"]
    engine.forward(np.array(ids[:1], np.int32), 1)  # one token alone: the ratio rule, as published for decoding
    assert engine.counters["experts_used"] == before + layers


# ---- damaged calibration


def rules(table: dict) -> dict:
    return table["pruning"]["rules"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(pruning=[]), "has no rules"),
        (lambda t: t["pruning"].update(rules={}), "has no rules"),
        (lambda t: rules(t).update(other=rules(t)["otp"]), "has a rule 'other'"),
        (lambda t: rules(t)["share"].update(cuts=[0.3, 0.1]), "has cuts of share that do not rise from 0 to 1"),
        (lambda t: rules(t)["share"].update(cuts=[0.1, 1.5]), "has cuts of share that do not rise"),
        (lambda t: rules(t)["share"].update(cuts=["0.1", 0.3]), "has cuts of share that do not rise"),
        (lambda t: rules(t)["share"]["thresholds"].pop(), "does not have one setting of share for each of its 2 cuts"),
        (lambda t: rules(t)["share"]["thresholds"][0].pop(), "has thresholds of share for other than the 2 layers"),
        (lambda t: rules(t)["share"]["thresholds"][0].__setitem__(0, math.nan), "has settings of share that are no"),
        (lambda t: rules(t)["share"]["thresholds"][0].__setitem__(0, 1.2), "has thresholds of share outside 0 to 1"),
        (lambda t: rules(t)["odp"]["thresholds"][0].__setitem__(1, -0.1), "has thresholds of odp outside 0 to 1"),
        (lambda t: rules(t)["loss"].update(prices=[0.1, math.inf]), "has settings of loss that are not finite numbers"),
        (lambda t: rules(t)["loss"].update(prices=0.1), "does not have one setting of loss"),
        (lambda t: rules(t)["odp"].update(protect=2), "protects a share of 2, expected 0 to 1"),
        (lambda t: t["pruning"].update(default="ratio"), "has a default rule 'ratio' that is not among its rules"),
        (lambda t: t["pruning"].update(cut=0), "has a cut of 0, expected a share of expert uses"),
        (lambda t: t["pruning"].update(cut=10**400), "has a cut of 1000000"),
        (lambda t: t["pruning"].update(default=[]), "has a default rule a list of 0 that is not among its rules"),
        (lambda t: t["pruning"].update(default_cut=0.9), "has a default_cut of 0.9, expected null or 0.1 to 0.3"),
        (lambda t: t["pruning"].update(default_cut="off"), "has a default_cut of 'off', expected null or 0.1 to 0.3"),
        (lambda t: t["pruning"].update(certificate=7), "has a certificate that is 7, expected a list"),
        (lambda t: rules(t)["loss"].update(prices=[0.1, 10**400]), "has settings of loss that are not finite numbers"),
        (lambda t: t["pruning"].pop("mask_routers"), "has a learned rule, but no mask_routers"),
    ],
)
def test_an_impossible_table_is_refused(own, change, message):
    edit_table(own, change)
    error = refused(Bundle.open, own)
    assert error.startswith(f"{own / 'bundle.json'}: pruning {message}") and error.endswith("copy the bundle again")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "pruning.certificate[0].cut is None, expected a number"),
        ([1], "pruning.certificate[0] is a list of 1, expected an object"),
        (
            {**dict.fromkeys(CERTIFIED, 0.1), "kld_p99": "x", "tokens": 1},
            "pruning.certificate[0].kld_p99 is 'x', expected",
        ),
        (
            {**dict.fromkeys(CERTIFIED, 0.1), "tokens": -1},
            "pruning.certificate[0].tokens is -1, expected a whole number",
        ),
    ],
)
def test_a_certificate_that_is_none_is_not_shown_and_the_bundle_runs(own, row, said):
    edit_table(own, lambda table: table["pruning"].update(certificate=[row]))
    assert refused(describe_bundle, Bundle.open(own)).startswith(f"{own / 'bundle.json'}: {said}")
    assert logits_of(own, IDS, prune=0.2).shape == (len(IDS), Bundle.open(own).config.vocab)


def with_mask_routers(path, change) -> None:
    """Other mask routers, with their checksum."""
    masks = load_file(path / MASK_FILE)
    change(masks)
    save_file(masks, path / MASK_FILE)
    data = (path / MASK_FILE).read_bytes()
    entry = {"bytes": len(data), "crc32c": f"{_core.crc32c(data, 0):08x}"}
    edit_table(path, lambda table: table["pruning"].update(mask_routers=entry))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({"layers.1.otp": m["layers.1.otp"][:, 1:]}),
            r"layers.1.otp is F32 \(8, \d+\), expected F32 \(",
        ),
        (
            lambda m: m.update({"layers.0.loss": m["layers.0.loss"].T.copy()}),
            r"layers.0.loss is F32 \(\d+, 8\), expected",
        ),
        (lambda m: m.update({"layers.0.loss": m["layers.0.loss"].astype(np.float16)}), "layers.0.loss is F16"),
        (lambda m: m.pop("layers.1.loss"), r"layers.1.loss is missing, expected F32"),
        (lambda m: m["layers.0.otp"].__setitem__((0, 0), np.nan), "layers.0.otp has values that are not finite"),
    ],
)
def test_a_mask_router_of_the_wrong_shape_is_refused(own, change, message):
    with_mask_routers(own, change)
    error = refused(Runtime, own)
    top_k = Bundle.open(own).config.top_k
    assert re.search(message.replace("8", str(top_k)) if "8" in message else message, error)
    assert str(own / MASK_FILE) in error


def test_an_edited_or_missing_file_of_mask_routers_is_refused(own):
    flip(own / MASK_FILE, (own / MASK_FILE).stat().st_size - 3)
    for call in (Runtime, lambda path: list(verify(Bundle.open(path)))):
        assert refused(call, own) == f"{own / MASK_FILE}: does not match its checksum; copy the bundle again"
    (own / MASK_FILE).unlink()
    assert "no such file, but bundle.json lists it" in refused(Runtime, own)


def test_a_table_edited_without_its_checksum_is_refused(own):
    table = json.loads((own / "bundle.json").read_text())
    table["pruning"]["cut"] = 0.25
    (own / "bundle.json").write_text(json.dumps(table))
    assert "does not match its own checksum" in refused(Runtime, own)


# ---- the command line


def test_prune_calibrates_and_requests_choose(copy_of, stdlib_calibration):
    path, (text, held_out) = copy_of("reference", width=4), stdlib_calibration
    given = ["--calibration", text, "--held-out", held_out, "--tokens", 512, "--default", 0.1]
    shown = succeeds("prune", path, *given, "--rule", "share").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0][0] == "pruning" and rows[1][0].startswith("share:0.")
    assert shown.endswith("a run without --prune leaves out 0.1\n")
    assert shown in succeeds("inspect", path).stdout
    certificate = object_of("inspect", path, "--json")["pruning"]["certificate"]
    assert [f"{row['kld_mean']:.4f}" for row in certificate] == [row[3] for row in rows[1 : 1 + len(certificate)]]
    prompt = ("-p", "import os\n", "-n", 12, "--json")
    answers = [object_of("generate", path, *prompt, *how) for how in ((), ("--prune", "0.3"), ("--prune", "off"))]
    assert 4 == answers[2]["experts_used"] > answers[0]["experts_used"] > answers[1]["experts_used"]
    assert answers[2]["dropped_routing_weight"] == 0 < answers[0]["dropped_routing_weight"]
    assert "% of routing weight dropped; hits" in succeeds("generate", path, *prompt[:-1]).stderr
    assert "prune is 0.9, but share is calibrated for 0." in error_of("generate", path, *prompt, "--prune", 0.9)
    said = "this bundle leaves out 0.1 of expert uses where --prune is not given; --prune off: none"
    assert succeeds("generate", path, *prompt[:-1]).stderr.splitlines()[-1] == said
    assert said not in succeeds("generate", path, *prompt[:-1], "--prune", "off").stderr
    assert "already; --force calibrates it again" in error_of("prune", path)
    assert "default is 0.7, expected 0.05 to 0.5" in error_of("prune", path, "--force", "--default", 0.7)
    table = succeeds("bench", path, "-p", 16, "-n", 8, "-r", 1).stdout.splitlines()
    titles = [cell.strip() for cell in table[0].split("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in table[2:6]]
    used = {(row[titles.index("test")], row[titles.index("prune")]): row[titles.index("experts")] for row in cells}
    assert used["pp16", "off"] == used["tg8", "off"] == "4.00"
    assert float(used["tg8", "bundle"]) < 4 > float(used["pp16", "bundle"])
    shown = succeeds("prune", path, "--default", "off").stdout
    assert shown.endswith("a run without --prune runs all experts\n")
    assert object_of("generate", path, *prompt)["tokens"] == answers[2]["tokens"]
