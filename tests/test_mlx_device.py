"""Runtime(device="mlx"): the answers of the other devices, inside the cap, and MLX imported only where it is chosen."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cgroup
import numpy as np
import pytest
from bundles import run_python, weights_of
from test_cap import ARGUMENTS, CONFIG, edge_moe
from test_kv_overflow import SCALED, times
from test_kv_overflow import lossless as scaled

from edge_moe import Runtime
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.runtime import device, reference
from edge_moe.runtime.plan import BelowFloor

pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def lossless(bundle_of):
    return bundle_of("olmoe", width=16)


def prompts(vocab: int, count: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocab, 20 + 7 * i).tolist() for i in range(count)]


def greedy(path, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens by the reference forward pass."""
    weights, ids = weights_of(path), list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(reference.forward(weights.config, weights, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_those_of_the_reference(lossless):
    with Runtime(lossless, "8GB", device="mlx", sequences=4, kv="float32") as runtime:
        assert runtime.device == "mlx" and runtime._engine.kernels.startswith("mlx-")
        asked = prompts(runtime.config.vocab, 4)
        wanted = [greedy(lossless, prompt, 12) for prompt in asked]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: runtime.generate(prompt, 12).tokens, asked)) == wanted
        again = runtime.generate(asked[3], 12)
        assert again.tokens == wanted[3] and again.cached_tokens == len(asked[3]) - 1


def test_the_cap_is_lowered_and_raised(lossless):
    with Runtime(lossless, "8GB", device="mlx") as runtime:
        asked = prompts(runtime.config.vocab, 1)[0]
        want, floor = runtime.generate(asked, 8).tokens, runtime.plan.floor_bytes
        for cap in (runtime.plan.total_bytes - runtime.plan.all_experts_bytes // 2, 8_000_000_000):
            assert runtime.set_ram(cap).experts_bytes == runtime._engine.slot_bytes
            assert runtime.generate(asked[::-1] + asked, 8) and runtime.generate(asked, 8).tokens == want
        with pytest.raises(BelowFloor):
            runtime.set_ram(floor // 2)


def test_a_process_above_its_cap_is_told_so(lossless):
    with Runtime(lossless, "8GB", device="mlx") as runtime:
        runtime._engine.cap_bytes = 10_000_000  # as on a Mac, where no limit of the system holds
        with pytest.raises(MemoryError, match="above its cap of 10 MB"):
            runtime.generate([1, 2, 3], 4)


def test_a_saved_session_goes_on_on_mlx_alone(lossless, tmp_path):
    with Runtime(lossless, "8GB", 160, "mlx") as runtime:
        asked = prompts(runtime.config.vocab, 1)[0]
        first = runtime.generate(asked, 8)
        tokens = runtime.save_session(tmp_path / "one")
    with Runtime(lossless, "8GB", 160, "mlx") as runtime:
        assert runtime.load_session(tmp_path / "one") == tokens == len(asked) + 7
        again = runtime.generate(asked + first.tokens, 4)
        assert again.cached_tokens == tokens
    with Runtime(lossless, "8GB", 160, "cpu") as runtime:
        assert runtime.load_session(tmp_path / "one") == 0


@pytest.mark.parametrize("what", SCALED)
def test_an_overflow_of_the_cache_names_float32(tmp_path, what):
    architecture, powers = SCALED[what]
    path, ids = scaled(tmp_path, architecture, times(powers))
    with Runtime(path, "8GB", 64, "mlx") as runtime:
        for prompt in (ids, ids[:1]):
            with pytest.raises(ValueError, match=r"beyond what a KV cache in float16 holds: pass kv=\"float32\""):
                runtime.generate(prompt, 4)
            assert runtime._engine.position == 0
    with Runtime(path, "8GB", 64, "mlx", kv="float32") as runtime:
        assert runtime.generate(ids, 4).tokens == greedy(path, ids, 4)


# ---- caps


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cap")
    config = CONFIG | {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    (directory / "config.json").write_text(json.dumps(config))
    return make_synthetic(directory, directory / "cap.emoe", width=4).path  # 28 MB of experts


@pytest.fixture(scope="module")
def plan(bundle):
    return edge_moe("plan", bundle, "--ram", "1GB", "--device", "mlx", "--context", 512)


@pytest.fixture(scope="module")
def arguments(bundle):
    return ["generate", bundle, *ARGUMENTS, "--device", "mlx", "--context", 512]


@pytest.fixture(scope="module")
def uncapped(arguments):
    return edge_moe(*arguments, "--ram", "1GB")


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_run_stays_below_its_cap_and_says_the_same(arguments, plan, uncapped, share):
    cap = int(plan["floor_bytes"] + share * (plan["resident_bytes"] - plan["floor_bytes"]))
    answer, counted = cgroup.run_json([*arguments, "--ram", cap], limit_bytes=cap)
    assert answer["peak_memory_bytes"] <= cap and counted <= cap
    assert answer["expert_misses"] > 64
    assert answer["tokens"] == uncapped["tokens"] and uncapped["expert_misses"] <= 64


UNFORESEEN = """
import json, sys
from edge_moe import Runtime
from edge_moe.runtime.mlx.engine import MlxEngine

module, allocated = sys.modules[Runtime.__module__], MlxEngine._new_timeline
with Runtime(sys.argv[1], "1GB", 512, "mlx") as runtime:
    assert runtime.plan.resident
    more = runtime.plan.ram_bytes - runtime.plan.total_bytes + 9_000_000

def spoiled(engine):
    taken = module.taken_bytes
    module.taken_bytes = lambda: taken() + more
    return allocated(engine)

MlxEngine._new_timeline = spoiled
with Runtime(sys.argv[1], "1GB", 512, "mlx") as runtime:
    plan = runtime.plan
    print(json.dumps([plan.all_experts_bytes, plan.experts_bytes, runtime._engine.slot_bytes]))
"""


def test_what_a_driver_takes_unforeseen_is_taken_from_the_slots(bundle):
    """In a process of its own, whose memory has no other history."""
    experts, planned, slots = json.loads(run_python(UNFORESEEN, bundle).stdout)
    assert 4_000_000 < experts - planned < 20_000_000
    assert slots == planned // 4096 * 4096


def test_a_cap_below_the_floor_is_refused(bundle, plan):
    with pytest.raises(BelowFloor, match="below the floor of"):
        Runtime(bundle, plan["floor_bytes"] // 3, 512, "mlx")


TINY = {"num_hidden_layers": 1, "max_position_embeddings": 2048, "hidden_size": 64, "moe_intermediate_size": 64}
LONG = """
import json, sys
from edge_moe import Runtime, _core
with Runtime(sys.argv[1], int(sys.argv[2]), 1400, "mlx") as runtime:
    runtime.generate(list(range(1, 300)), 40)
    before = _core.resident_bytes(), runtime.stats["peak_memory_bytes"]
    made = len(runtime.generate(list(range(2, 300)), 1000).tokens)
    after = _core.resident_bytes(), runtime.stats["peak_memory_bytes"]
print(json.dumps({"before": before, "after": after, "tokens": made}))
"""


def test_nothing_grows_over_a_thousand_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | TINY))
    path = make_synthetic(tmp_path, tmp_path / "tiny.emoe", width=4).path
    cap = 120_000_000
    command = [sys.executable, "-c", LONG, str(path), str(cap)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["tokens"] == 1000
    assert found["after"][1] <= cap and found["after"][0] - found["before"][0] < 1_500_000


# ---- whether MLX is there


def test_mlx_is_imported_only_where_it_is_chosen(lossless):
    code = (
        "import sys; from edge_moe import Runtime\n"
        "with Runtime(sys.argv[1], '1GB', device=sys.argv[2]) as runtime: runtime.generate([1, 2], 2)\n"
        "print('mlx.core' in sys.modules)"
    )
    for name, imported in (("cpu", "False"), ("mlx", "True")):
        command = [sys.executable, "-c", code, str(lossless), name]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == imported
    help_text = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "edge_moe", "doctor", "--help"], capture_output=True, text=True
    )
    assert " mlx" not in help_text.stderr


@pytest.mark.parametrize("found, said", [("", "which is not installed"), ("0.29.1", "this is 0.29.1")])
def test_mlx_that_is_absent_or_old_is_said(lossless, monkeypatch, found, said):
    monkeypatch.setattr(device, "mlx_version", lambda: found)
    with pytest.raises(ValueError) as refused:
        Runtime(lossless, "8GB", device="mlx")
    assert str(refused.value) == f"device mlx needs MLX 0.32.4 or newer, {said}: pip install 'edge-moe[mlx]'"


@pytest.mark.parametrize(
    "system, machine, mlx, chosen",
    [
        ("darwin", "arm64", "0.32.4", "mlx"),
        ("darwin", "arm64", "1.0", "mlx"),
        ("darwin", "arm64", "", "cpu"),
        ("darwin", "arm64", "0.31.9", "cpu"),
        ("darwin", "x86_64", "0.32.4", "cpu"),
        ("linux", "aarch64", "0.32.4", "cpu"),
    ],
)
def test_the_automatic_device_of_a_mac_is_mlx(monkeypatch, system, machine, mlx, chosen):
    monkeypatch.setattr(device.sys, "platform", system)
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(device, "mlx_version", lambda: mlx)
    monkeypatch.setattr(device._core, "cuda_build", lambda: "")
    assert device.device_name("auto") == chosen


def test_kernel_sets_are_the_processors(lossless):
    with pytest.raises(ValueError, match="kernels is 'scalar', but device mlx has no kernel sets"):
        Runtime(lossless, "8GB", device="mlx", kernels="scalar")
