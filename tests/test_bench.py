"""The benchmark: what it counts is what the runtime did, and its forms hold the same figures."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from bundles import prunable
from test_prune_engine import mask_routers_of

from edge_moe.bench.bandwidth import machine_bandwidth
from edge_moe.bench.bench import bench, bench_synthetic, compute, hold, measure
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.bench_text import bench_csv, bench_markdown, bench_text, cut_text
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.plan_table import size
from edge_moe.runtime.runtime import Runtime

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.json"
    file.write_text(json.dumps(CONFIG))
    return file


@pytest.fixture(scope="module")
def bundle(config):
    return make_synthetic(config, config.parent / "small.emoe").path


@pytest.fixture(scope="module")
def report(bundle):
    return bench(bundle, ram="1GB", prompt=512, generate=16, repeats=2, threads=1)


def test_tests_are_cut_to_the_context_and_named_by_their_tokens(report):
    assert [row.test for row in report.rows] == ["pp64", "tg16"]


def test_rows_at_a_depth_are_named_by_it_and_compute_the_tests_tokens_alone(bundle):
    rows, plan = measure(bundle, ram="1GB", prompt=24, generate=5, depths=[0, 32, 40, 32], repeats=2, threads=1)
    assert [row.test for row in rows] == ["pp24", "tg5", "pp24 @ d32", "tg5 @ d32", "pp24 @ d40", "tg5 @ d40"]
    assert [row.tokens for row in rows] == [24, 5] * 3  # as the engine counted them while the clock ran
    assert [row.depth for row in rows] == [0, 0, 32, 32, 40, 40]
    assert all(row.experts_used == 2 for row in rows)
    assert plan.context == 64  # the deepest test fits


def test_a_depth_is_computed_once_and_a_test_behind_it_gives_what_generating_would(bundle):
    ids = np.random.default_rng(1).integers(0, 512, 60).tolist()
    with Runtime(bundle, "1GB", 64, threads=1) as runtime:
        want = runtime.generate(ids, 4).tokens
        runtime.reset()
        hold(runtime, ids[:40], "off")
        before = runtime.stats["tokens"]
        for end, step in ((50, 1), (50, 16), (60, 1)):
            compute(runtime, ids[40:end], step)
            hold(runtime, ids[:40], "off")
        assert runtime.stats["tokens"] - before == 10 + 10 + 20  # nothing of the depth
        compute(runtime, ids[40:], 16)
        before = runtime.stats["tokens"]
        assert runtime.generate(ids + want[:1], 3).tokens == want[1:]
        assert runtime.stats["tokens"] - before == 3


def test_a_rule_that_protects_tokens_computes_no_more_than_the_tests_tokens(golden, tmp_path):
    source = golden["olmoe"][0]
    routers = mask_routers_of(load_config(source))
    path = prunable(tmp_path / "odp.emoe", source, routers)
    rows, _ = measure(path, ram="1GB", prompt=16, generate=4, depths=[8], repeats=2, threads=1, prune=["odp:0.2"])
    assert [row.tokens for row in rows] == [16, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": 40, "generate": 0, "depths": [0, 32]}, "40 tokens at depth 32 do not fit"),
        ({"prompt": 0, "generate": 8, "depths": [57]}, "8 tokens at depth 57 do not fit"),
        ({"depths": [1]}, "512 tokens at depth 1 do not fit"),
    ],
)
def test_a_depth_that_the_context_does_not_hold_is_refused(bundle, options, message):
    with pytest.raises(ValueError) as error:
        bench(bundle, **options)
    assert str(error.value) == f"{bundle}: {message} the model's context of 64; lower the depth or the tests' tokens"


@pytest.mark.parametrize("depths", [[], [-1], [0, -4]])
def test_a_depth_below_0_is_refused(bundle, depths):
    with pytest.raises(ValueError) as error:
        bench(bundle, depths=depths)
    assert str(error.value) == f"depths are {depths}, expected numbers of tokens from 0 up"


def test_a_resident_run_reads_nothing(report):
    for row in report.rows:
        assert row.resident and row.hit_rate == 1 and row.read_bytes_per_token == 0
        assert row.tps_mean > 0 and row.tps_sd >= 0 and row.repeats == 2
        assert row.peak_memory_bytes > 0 and row.ram_bytes == 1_000_000_000


def test_generated_bytes_a_second_count_trunk_and_chosen_experts(report, bundle):
    prompt, generated = report.rows
    opened = Bundle.open(bundle)
    record = opened.expert_bytes / len(opened.experts)
    embedding = 512 * 256 * (8 + 0.5) / 8  # one row of it is read
    token = opened.trunk_bytes - embedding + 3 * 2 * record  # three layers of top 2
    assert prompt.weights_gbps is None
    assert generated.weights_gbps == pytest.approx(token * generated.tps_mean / 1e9)


def test_a_capped_run_pages_and_stays_below_its_cap(bundle):
    command = [sys.executable, "-m", "edge_moe"]
    plan = subprocess.run([*command, "plan", bundle, "--ram", "1GB", "--json"], capture_output=True, check=True)
    floor = json.loads(plan.stdout)["floor_bytes"] + 3_000_000  # bench imports more than plan
    child = subprocess.run(
        [*command, "bench", bundle, "--ram", str(floor), "-p", "32", "-n", "16", "-r", "2", "-o", "json"],
        capture_output=True,
    )
    assert child.returncode == 0, child.stderr
    for row in json.loads(child.stdout)["rows"]:
        assert not row["resident"] and row["hit_rate"] < 1 and row["read_bytes_per_token"] > 0
        assert row["peak_memory_bytes"] <= floor


def test_a_synthetic_bundle_is_kept_only_on_request(config, tmp_path):
    options = {"prompt": 0, "generate": 4, "repeats": 1, "threads": 1}
    report = bench_synthetic(config, layers=1, width=2, vocab=64, keep=tmp_path / "kept.emoe", **options)
    kept = Bundle.open(tmp_path / "kept.emoe")
    assert (kept.config.layer_count, kept.config.vocab) == (1, 64)
    assert [row.test for row in report.rows] == ["tg4"] and report.rows[0].tps_sd == 0
    assert bench_synthetic(config, layers=1, **options).rows[0].model == "small-1L"
    with pytest.raises(FileExistsError):
        bench_synthetic(config, keep=tmp_path / "kept.emoe", **options)


def test_the_table_has_a_row_a_test_and_the_machines_limits(report):
    lines = bench_markdown(report).splitlines()
    assert lines[0].startswith("| model ") and " t/s |" in lines[0] and set(lines[1]) <= set("|-: ")
    assert len({len(line) for line in lines[:4]}) == 1
    assert "| pp64 |" in lines[2] and "| tg16 |" in lines[3] and "small (qwen3_moe, 4.50 bits)" in lines[2]
    assert lines[4] == "" and lines[5].startswith("this machine: memory reads ")


def test_a_test_that_the_context_cut_is_said(report, bundle):
    message = "note: the model's context holds 64 tokens: pp512 was measured as pp64"
    assert cut_text(report, {"pp": 512, "tg": 16}) == [message]
    assert cut_text(report, {"pp": 64, "tg": 16}) == []
    command = [sys.executable, "-m", "edge_moe", "bench", bundle, "-p", "65", "-n", "0", "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == message.replace("pp512", "pp65") + "\n" and json.loads(done.stdout)["rows"]


def test_a_table_that_is_too_wide_has_what_its_rows_share_above_it(report):
    wide, narrow = bench_markdown(report).split("\n\n"), bench_markdown(report, 80).split("\n\n")
    assert bench_markdown(report, 1000).split("\n\n") == wide
    assert narrow[0].startswith("small (qwen3_moe, 4.50 bits)\nsize ")
    assert {"threads 1", "ram cap 1.00 GB", "prune off", "hits resident"} <= {*narrow[0].replace("\n", " ").split(", ")}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in narrow[1].splitlines()]
    titles, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in wide[0].splitlines()]
    assert cells[0][:2] == ["test", "t/s"]
    assert cells[2:] == [[row[titles.index(title)] for title in cells[0]] for row in rows[1:]]
    assert max(map(len, "\n".join(narrow).splitlines())) <= 80


def test_json_and_csv_hold_the_exact_figures(report):
    rows = json.loads(bench_text(report, "json"))["rows"]
    assert rows == report.as_dict()["rows"]
    table = list(csv.DictReader(io.StringIO(bench_csv(report))))
    assert [float(row["tps_mean"]) for row in table] == [row.tps_mean for row in report.rows]
    assert table[0]["weights_gbps"] == ""


@pytest.mark.parametrize("counts", [{"prompt": 0, "generate": 0}, {"prompt": -1}, {"repeats": 0}])
def test_nothing_to_measure_is_refused(bundle, counts):
    with pytest.raises(ValueError, match="expected at least one test and one repeat$"):
        bench(bundle, **counts)


def test_bandwidth_is_measured_outside_this_process(bundle):
    measured = machine_bandwidth(bundle, 1)
    assert measured["memory_gbps"] > 0.1
    assert measured["disk_gbps"] is None or measured["disk_gbps"] > 0


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (61_440, "61.4 kB"), (5_964_736, "6.0 MB"), (1.1e9, "1.10 GB")]
)
def test_sizes_are_decimal(count, text):
    assert size(count) == text
