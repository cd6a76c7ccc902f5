"""The sweep over caps: where they lie, what each row says, the knee, and the forms of the report."""

import csv
import io
import json
import subprocess
import sys

import pytest
from bundles import REFERENCE

from edge_moe.bench.bench import bench_synthetic
from edge_moe.bench.sweep import sweep
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.bench_text import bench_text
from edge_moe.commands.bench import depths_of
from edge_moe.runtime.bundle import Bundle

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 128,
}
TESTS = {"prompt": 32, "generate": 12, "repeats": 2, "threads": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("sweep") / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


@pytest.fixture(scope="module")
def bundle(config):
    return make_synthetic(config, config.parent / "sweep.emoe").path


@pytest.fixture(scope="module")
def swept(bundle):
    return sweep(bundle, ram="1GB", caps=4, **TESTS)


def edge_moe(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_caps_rise_evenly_from_the_floor_to_every_expert_in_memory(swept):
    caps = [row.ram_bytes for row in swept.rows[::2]]
    assert [row.test for row in swept.rows] == ["pp32", "tg12"] * 4
    assert caps == sorted(set(caps)) == [row.ram_bytes for row in swept.rows[1::2]]
    steps = {after - before for before, after in zip(caps, caps[1:], strict=False)}
    assert max(steps) - min(steps) <= 1
    assert 0 <= caps[0] - swept.floor_bytes < 3_000_000
    assert caps[-1] >= swept.resident_bytes


def test_more_memory_means_more_slots_and_hits_and_the_last_cap_reads_nothing(swept):
    generated = swept.rows[1::2]
    paged = [row for row in generated if not row.resident]
    assert [row.slots for row in paged] == sorted({row.slots for row in paged}) and paged[0].slots >= 4
    assert [row.hit_rate for row in paged] == sorted(row.hit_rate for row in paged)
    assert paged[0].hit_rate < 1 and paged[0].read_bytes_per_token > 0
    last = swept.rows[-1]
    assert last.resident and (last.slots, last.hit_rate, last.read_bytes_per_token) == (0, 1, 0)


def test_every_cap_holds(swept):
    assert all(0 < row.peak_memory_bytes <= row.ram_bytes for row in swept.rows)


def test_below_the_knee_every_token_reads_and_the_knee_is_the_working_sets(swept, bundle):
    opened = Bundle.open(bundle)
    assert swept.working_set_experts == 4 * 4
    assert swept.working_set_bytes == 16 * opened.expert_bytes // (4 * 32)
    for row in swept.rows:
        assert row.holds_working_set == (row.resident or row.slots >= 16)
        assert row.holds_working_set or row.ram_bytes < swept.knee_bytes
    lowest = swept.rows[1]
    assert not lowest.holds_working_set
    assert lowest.read_bytes_per_token >= (16 - lowest.slots) * opened.expert_bytes / len(opened.experts)


def test_the_cap_given_ends_the_sweep(bundle, swept):
    middle = (swept.floor_bytes + swept.resident_bytes) // 2
    rows = sweep(bundle, ram=middle, caps=2, **TESTS | {"prompt": 0}).rows
    assert [row.test for row in rows] == ["tg12"] * 2
    assert rows[-1].ram_bytes == middle and not rows[-1].resident


def test_what_cannot_be_swept_is_refused(bundle):
    with pytest.raises(ValueError, match="^a sweep of 1 caps is too short, expected at least 2$"):
        sweep(bundle, caps=1, **TESTS)
    with pytest.raises(MemoryError, match="^a cap of 9 MB is below the floor of "):
        sweep(bundle, ram="9MB", **TESTS)
    with pytest.raises(ValueError) as error:
        sweep(bundle, depths=[100], **TESTS)
    assert str(error.value).startswith(f"{bundle}: 32 tokens at depth 100 do not fit the model's context of 128")
    with pytest.raises(FileNotFoundError, match="no such bundle directory"):
        sweep(bundle.with_name("no.emoe"), **TESTS)


def test_the_table_has_a_line_a_cap_with_a_bar_and_says_where_the_knee_is(swept):
    text = bench_text(swept, "md").splitlines()
    assert text[0].startswith("sweep (qwen3_moe, 4.50 bits), cpu, 1 threads; each cap is a process of its own")
    head, rows = text[2], text[4:8]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        *("ram cap", "slots", "hits", "MB read/token", "pp32 t/s", "tg12 t/s", "peak", "tg12"),
    ]
    assert len({len(line) for line in text[2:8]}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]
    assert cells[0][-1].endswith("█ below the knee") and "below" not in cells[-1][-1]
    assert cells[-1][1:4] == ["resident", "100.0%", "0.00"]
    speeds, bars = [float(row[5]) for row in cells], [row[-1].count("█") for row in cells]
    assert bars[speeds.index(max(speeds))] == max(bars) == 24
    assert text[9].startswith("knee at ") and "the 16 experts (3.5 MB) that one token uses" in text[9]
    assert text[11].startswith("floor ") and "; every expert is in memory from " in text[11]


def test_json_and_csv_have_the_exact_rows_of_every_cap(swept):
    whole = json.loads(bench_text(swept, "json"))
    assert whole == swept.as_dict() and len(whole["rows"]) == 8
    lines = list(csv.DictReader(io.StringIO(bench_text(swept, "csv"))))
    assert [int(line["ram_bytes"]) for line in lines] == [row.ram_bytes for row in swept.rows]
    assert [line["holds_working_set"] for line in lines] == [str(row.holds_working_set) for row in swept.rows]


def test_the_command_sweeps_and_the_number_of_caps_may_be_left_out(bundle):
    short = ("-p", 0, "-n", 2, "-r", 1, "--threads", 1, "-o", "json")
    for given, caps in (
        (("--sweep-ram", bundle), 6),
        ((bundle, "--sweep-ram", "2"), 2),
        (("--sweep-ram=3", bundle), 3),
    ):
        done = edge_moe("bench", *given, *short)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["rows"]) == caps


def test_a_synthetic_model_can_be_swept_at_a_depth(config):
    options = TESTS | {"prompt": 0, "depths": [16]}
    swept = bench_synthetic(config, layers=1, vocab=64, run=sweep, caps=2, **options)
    assert [(row.model, row.test) for row in swept.rows] == [("config-1L", "tg12 @ d16")] * 2


def test_depths_are_numbers_or_several_with_commas():
    assert depths_of(None) == [0]
    assert depths_of(["0,512", "4096"]) == [0, 512, 4096]
    done = edge_moe("bench", REFERENCE, "-d", "x")
    assert done.returncode == 1
    assert done.stderr == "edge-moe: error: depth 'x' is not a number of tokens or a list such as 0,4096\n"
