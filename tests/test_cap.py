"""The cap holds: in a cgroup that kills above it, at caps from the floor up, with the same tokens as without."""

import json
import re
import subprocess
import sys

import cgroup
import pytest

from edge_moe.bench.synthetic import make_synthetic

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
}
ARGUMENTS = ["--tokens", ",".join(map(str, range(1, 40))), "-n", "40"]


def edge_moe(*arguments) -> dict:
    command = [sys.executable, "-m", "edge_moe", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cap")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return make_synthetic(directory, directory / "cap.emoe", width=4).path  # 57 MB of experts


@pytest.fixture(scope="module")
def plan(bundle):
    return edge_moe("plan", bundle, "--ram", "1GB")


@pytest.fixture(scope="module")
def uncapped(bundle):
    return edge_moe("generate", bundle, *ARGUMENTS, "--ram", "1GB")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_a_run_stays_below_its_cap_and_says_the_same(bundle, plan, uncapped, share):
    cap = int(plan["floor_bytes"] + share * (plan["resident_bytes"] - plan["floor_bytes"]))
    answer, counted = cgroup.run_json(["generate", bundle, *ARGUMENTS, "--ram", cap], limit_bytes=cap)
    assert answer["peak_memory_bytes"] <= cap
    assert counted <= cap
    assert answer["expert_misses"] > 0
    assert answer["bytes_read"] > 0
    assert answer["tokens"] == uncapped["tokens"]


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_the_automatic_cap_of_a_cgroup_below_the_floor_is_refused_and_the_floor_named(bundle, plan, share):
    limit = int(share * plan["floor_bytes"])
    child, _ = cgroup.run(["generate", bundle, *ARGUMENTS, "--ram", "auto"], limit_bytes=limit)
    message = r"edge-moe: error: a cap of (\d+) MB is below the floor of (\d+) MB \(.*\); raise the cap, or lower .*\n"
    found = re.fullmatch(message, child.stderr)
    assert (child.returncode, child.stdout) == (1, "")
    assert int(found[1]) < int(found[2])
    assert abs(int(found[2]) * 1_000_000 - plan["floor_bytes"]) < 4_000_000  # the process's own size moves by less


def test_the_automatic_cap_of_a_cgroup_above_the_floor_works(bundle, plan, uncapped):
    limit = int(1.5 * plan["floor_bytes"])
    answer, counted = cgroup.run_json(["generate", bundle, *ARGUMENTS, "--ram", "auto"], limit_bytes=limit)
    assert answer["tokens"] == uncapped["tokens"]
    assert answer["peak_memory_bytes"] <= answer["ram_bytes"] < limit
    assert counted <= limit


def test_with_room_for_all_experts_nothing_is_paged(plan, uncapped):
    assert uncapped["ram_bytes"] >= plan["resident_bytes"] >= uncapped["peak_memory_bytes"]
    assert uncapped["expert_misses"] == 0


def test_the_plan_accounts_for_most_of_the_peak(bundle, plan):
    cap = (plan["floor_bytes"] + plan["resident_bytes"]) // 2
    peak = edge_moe("generate", bundle, *ARGUMENTS, "--ram", cap)["peak_memory_bytes"]
    assert 0.7 * cap < peak <= cap
