"""Targets: bad ones are refused by name, and bundles made for a size, for memory or for paging keep to it."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bundles import changed, run_python
from test_checkpoint import write_file

from edge_moe.compressor.choosing import targets
from edge_moe.compressor.choosing.estimate import COMMAND_LINE_BYTES
from edge_moe.compressor.choosing.targets import Options, check, hot_experts
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.plan import READER_BYTES, READERS

CONTEXT = 2**20  # tokens whose KV cache, which is planned and hardly touched, takes more than compressing does
NOISE = 600_000  # bytes by which two processes of the same program differ; more where idle pages are reclaimed

# bundle, ram, context -> the plan, and that it generates
RUN = """
import json, sys
from edge_moe.runtime.plan import READER_BYTES, READERS
from edge_moe.runtime.runtime import Runtime
with Runtime(sys.argv[1], ram=int(sys.argv[2]), context=int(sys.argv[3]), threads=1) as runtime:
    assert len(runtime.generate([3, 4, 5], 4).tokens) == 4
    print(json.dumps(runtime.plan.as_dict()))
"""


def write_random(directory: Path, seed: int = 0, *, fused: bool = False, **changes) -> Path:
    """A random checkpoint of qwen3_moe with a context of CONTEXT tokens."""
    config = {
        "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128,
        "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "max_position_embeddings": CONTEXT, "eos_token_id": None,
    } | changes  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    dim, hidden, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    kv_heads, head_dim, experts = config["num_key_value_heads"], config["head_dim"], config["num_experts"]

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        tensors[f"{name}.weight"] = (
            "BF16",
            list(shape),
            (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(),
        )

    add("model.embed_tokens", config["vocab_size"], dim)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        add(f"{at}.input_layernorm", dim)
        for part, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            add(f"{at}.self_attn.{part}_proj", rows, dim)
        add(f"{at}.self_attn.q_norm", head_dim)
        add(f"{at}.self_attn.k_norm", head_dim)
        add(f"{at}.self_attn.o_proj", dim, heads * head_dim)
        add(f"{at}.post_attention_layernorm", dim)
        add(f"{at}.mlp.gate", experts, dim)
        if fused:
            add(f"{at}.mlp.experts.gate_up_proj", experts, 2 * hidden, dim)
            add(f"{at}.mlp.experts.down_proj", experts, dim, hidden)
            for part in ("gate_up_proj", "down_proj"):
                tensors[f"{at}.mlp.experts.{part}"] = tensors.pop(f"{at}.mlp.experts.{part}.weight")
            continue
        for expert in range(experts):
            for part, shape in (("gate", (hidden, dim)), ("up", (hidden, dim)), ("down", (dim, hidden))):
                add(f"{at}.mlp.experts.{expert}.{part}_proj", *shape)
    add("model.norm", dim)
    add("lm_head", config["vocab_size"], dim)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_file(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """16 experts of 49,152 weights: 8, 16, 20 and 28 KiB at 1 to 4 bits."""
    return write_random(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """Text of few different tokens, so that some experts are used much more than others."""
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.minimum(np.random.default_rng(0).geometric(0.3, 2048), 127))
    return {"calibration": file, "tokens": 512, "threads": 1, "certificate": False}


@pytest.fixture(scope="module")
def process():
    """One that does nothing but compress: with `ram`, what this one has loaded would count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone(process):
    """compress() in that process."""
    return lambda model, out, **options: process.submit(compress, model, out, **options).result()


def refused(model, out, error=ValueError, how=compress, **options) -> str:
    with pytest.raises(error) as caught:
        how(model, out, **options)
    assert not out.exists()
    return str(caught.value)


def least_of(message: str) -> int:
    return int(re.search(r"expected at least ([\d,]+)", message)[1].replace(",", ""))


def directory_bytes(bundle: Bundle) -> int:
    return sum(file.stat().st_size for file in bundle.path.iterdir())


def planned(model: Path, ram: int, context: int = CONTEXT) -> dict:
    """What `edge-moe plan` says."""
    command = [sys.executable, "-m", "edge_moe", "plan", str(model), "--ram", str(ram), "--json"]
    child = subprocess.run([*command, "--context", str(context)], capture_output=True, text=True)
    return json.loads(child.stdout)


# ---- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method is 'best', expected one of pmq, mc, mc-release, uniform, rtn, keep"),
        ({"group": 16}, "group is 16, expected one of 32, 64, 128"),
        ({"trunk_width": 7}, "trunk_width is 7, expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
        ({"drop_score": "size"}, "drop_score is 'size', expected one of mixture, weight, frequency, mean-weight"),
        ({"drop_counts": "all"}, "drop_counts is 'all', expected one of equal, sensitivity"),
        ({"bits": 3, "size": 10**9}, "bits, width and size exclude each other; give one of them"),
        ({"width": 3, "size": 10**9}, "bits, width and size exclude each other; give one of them"),
        ({"bits": 3, "width": 3}, "bits, width and size exclude each other; give one of them"),
        (
            {"width": 3},
            "width is one width for all experts; method pmq chooses widths, give bits instead",
        ),
        (
            {"width": 3, "method": "mc"},
            "width is one width for all experts; method mc chooses widths, give bits instead",
        ),
        ({"width": 7, "method": "uniform"}, "width is 7, expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
        ({"tokens": 255}, "tokens is 255, expected at least 256"),
        ({"drop_experts": 1.0}, "drop_experts is 1.0, expected a share from 0 up to 1, such as 0.25"),
        ({"drop_experts": -0.1}, "drop_experts is -0.1, expected a share from 0 up to 1, such as 0.25"),
        (
            {"adjust_top_k": True},
            "adjust_top_k needs drop_experts: without it every layer keeps the model's top_k",
        ),
        *(
            (
                {"drop_experts": 0.25, **its},
                "dropping experts needs calibration; choose method pmq, mc or uniform and fewer bits than 16",
            )
            for its in ({"method": "rtn"}, {"bits": 16}, {"width": 16, "method": "uniform"})
        ),
        *(
            (
                {"paged": True, **its},
                "paged needs ram and no other target: the bundle is made for paging under that cap",
            )
            for its in (
                {},
                {"bits": 3},
                {"ram": 10**9, "bits": 3},
                {"ram": 10**9, "size": 10**9},
                {"ram": 10**9, "width": 3, "method": "uniform"},
            )
        ),
        ({"size": "8XB"}, "size '8XB' is not understood; write 8GB, 8GiB, 500MB or a number of bytes"),
        ({"size": 0}, "size 0 must be above 0"),
        ({"ram": "much"}, "size 'much' is not understood; write 8GB, 8GiB, 500MB or a number of bytes"),
        ({"bits": 1.33}, "bits is 1.33, expected 1.33 to 16 (experts of width 1 take 1.33)"),
        ({"bits": 1.6, "group": 32}, "bits is 1.6, expected 2 to 16 (experts of width 1 take 2)"),
        ({"bits": 16.1}, "bits is 16.1, expected 1.33 to 16 (experts of width 1 take 1.33)"),
        ({"bits": float("nan")}, "bits is nan, expected 1.33 to 16 (experts of width 1 take 1.33)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError) as caught:
        check(Options(**options), load_config(model))
    assert str(caught.value) == message


def test_experts_that_cannot_be_grouped_are_refused_but_for_16_bits(model):
    config = changed(load_config(model), hidden=40)
    with pytest.raises(ValueError) as caught:
        check(Options(), config)
    assert str(caught.value) == (
        "experts are 40 x 128, not multiples of 32: they cannot be grouped; only bits 16 is possible"
    )
    assert check(Options(bits=16), config).bits == 16


def test_what_is_left_out_is_filled_in(model):
    config = load_config(model)
    assert check(Options(), config) == Options(bits=2.5)
    assert check(Options(width=3, method="uniform"), config).bits is None
    o = check(Options(ram="2GB", context=100, calibration="a.txt", held_out=["b.txt"]), config)
    assert (o.bits, o.size, o.ram) == (None, None, 2_000_000_000)
    assert (o.calibration, o.held_out) == ((Path("a.txt"),), (Path("b.txt"),))
    assert check(Options(size="1MiB", ram="2GB"), config).size == 2**20
    assert check(Options(bits=4, group=128), changed(config, hidden=96)).group == 32  # the largest that fits


# ---- size


@pytest.mark.parametrize(("method", "share"), [("pmq", 0.9), ("uniform", 0.8)])  # one step for all experts is long
def test_a_size_is_kept_and_made_use_of(model, tmp_path, options, method, share):
    bundle = compress(model, tmp_path / "new.emoe", size=500_000, method=method, **options)
    assert share * 500_000 < directory_bytes(bundle) <= 500_000


# ---- memory, with every expert in it


@pytest.mark.parametrize("method", ["pmq", "rtn"])
def test_the_least_memory_that_is_named_can_be_had_and_runs(alone, model, tmp_path, options, method):
    options = {**options, "method": method, "context": CONTEXT}
    least = least_of(refused(model, tmp_path / "small.emoe", how=alone, ram=10**6, **options))
    assert refused(model, tmp_path / "small.emoe", how=alone, ram=least - 1, **options).startswith(
        f"ram is {least - 1:,} bytes, "
    )
    bundle = alone(model, tmp_path / "least.emoe", ram=least, **options)
    record = 12_288 if method == "rtn" else 8192  # in groups of 64 and of 128
    assert {expert.nbytes for expert in bundle.experts.values()} == {record}
    assert planned(bundle.path, least)["resident_bytes"] <= least + NOISE
    plan = json.loads(run_python(RUN, bundle.path, least, CONTEXT).stdout)
    assert plan["resident"]
    assert plan["experts_bytes"] == 16 * record


def test_more_memory_is_made_use_of(alone, model, tmp_path, options):
    options = {**options, "context": CONTEXT}
    least = least_of(refused(model, tmp_path / "small.emoe", how=alone, ram=10**6, **options))
    for more in (70_000, 200_000):
        bundle = alone(model, tmp_path / f"{more}.emoe", ram=least + more, **options)
        grown = bundle.expert_bytes - 16 * 8192
        grown += sum(
            tensor.rows * tensor.cols * (tensor.width - 4) // 8 for tensor in bundle.trunk if tensor.width < 16
        )
        assert 0.8 * more < grown <= more


def test_all_of_a_large_bundle_is_in_memory_at_its_cap_and_not_below_it(alone, tmp_path):
    """Where a bit more for every expert is 2 MB, so that what two processes differ by does not hide it."""
    model = write_random(
        tmp_path / "model", hidden_size=256, moe_intermediate_size=512, num_experts=20, num_key_value_heads=1
    )
    options = {"method": "rtn", "context": CONTEXT, "threads": 1}
    least, step = (
        least_of(refused(model, tmp_path / "small.emoe", how=alone, ram=10**6, **options)),
        40 * 3 * 256 * 512 // 8,
    )
    ram = least + 3 * step + step // 2
    bundle = alone(model, tmp_path / "new.emoe", ram=ram, **options)
    assert {expert.widths for expert in bundle.experts.values()} == {(4, 4, 4)}
    below = ram - 2 * step - NOISE - COMMAND_LINE_BYTES
    assert below < planned(bundle.path, ram)["resident_bytes"] <= ram + NOISE
    assert not planned(bundle.path, below)["resident"]
    assert json.loads(run_python(RUN, bundle.path, ram, CONTEXT).stdout)["resident"]
    # Another tenth is more than all experts and what the program itself takes: the KV cache has no room.
    less = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle.path), str(ram - ram // 10), str(CONTEXT)],
        capture_output=True,
        text=True,
    )
    assert "BelowFloor: a cap of" in less.stderr


def test_the_tables_of_many_experts_are_counted(alone, tmp_path):
    model = write_random(
        tmp_path / "model", fused=True, hidden_size=32, moe_intermediate_size=32, num_experts=1000, head_dim=32
    )
    options = {"method": "rtn", "context": CONTEXT, "threads": 1}
    ram = least_of(refused(model, tmp_path / "small.emoe", how=alone, ram=10**6, **options))
    bundle = alone(model, tmp_path / "new.emoe", ram=ram, **options)
    assert planned(bundle.path, ram)["resident_bytes"] <= ram + NOISE


# ---- memory, with some experts in it


@pytest.mark.parametrize(
    ("frequency", "want"),
    [
        ([4, 2, 1, 1], [1, 1, 1, 1]),  # seven of eight are not yet nine of ten
        ([9, 1], [1, 0]),
        ([1, 9], [0, 1]),
        ([1, 5, 2, 12], [0, 1, 1, 1]),  # 18 of 20 are not 17
        ([1, 4, 14, 1], [0, 1, 1, 0]),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 11 + [0]),  # of equals the first
    ],
)
def test_hot_experts_are_the_fewest_that_answer_nine_uses_in_ten(frequency, want):
    assert hot_experts(np.array(frequency, float)).astype(int).tolist() == want


def rest_bytes(model: Path) -> int:
    """What a run takes beside experts and trunk, as compress() in this process sees it."""
    o = Options(ram=10**6, context=CONTEXT, paged=True)
    with Checkpoint(model) as checkpoint:
        return targets.running_bytes(checkpoint, o, {}) + READERS * READER_BYTES


@pytest.fixture
def other_bytes(process, model):
    """other_bytes(bundle) is what a run takes beside experts, as compress() saw it."""
    rest = process.submit(rest_bytes, model).result()
    return lambda bundle: (
        rest
        + sum(
            t.rows * t.cols * t.width // 8 + (4 * t.rows * t.cols // t.group if t.width < 16 else 0)
            for t in bundle.trunk
        )
    )


@pytest.fixture(scope="module")
def measured(model, options, tmp_path_factory) -> tuple[np.ndarray, Bundle]:
    """Uses of each expert a token, and a bundle whose trunk is as narrow as pmq makes it."""
    out = tmp_path_factory.mktemp("measured") / "new.emoe"
    # To drop a hundredth of eight experts is to drop none, but their uses are counted for it.
    bundle = compress(model, out, bits=3, method="uniform", trunk_width=4, drop_experts=0.01, **options)
    return np.array([expert.frequency for expert in bundle.experts.values()]), bundle


@pytest.mark.parametrize(("method", "each"), [("pmq", 26_000), ("uniform", 21_000)])  # bytes, of three bits and a half
def test_a_paged_bundle_keeps_its_hot_experts_in_the_room_and_reads_no_more(
    alone, other_bytes, model, tmp_path, options, measured, method, each
):
    frequency, narrow = measured
    hot = hot_experts(frequency)
    assert 0 < hot.sum() < 16
    ram = other_bytes(narrow) + each * int(hot.sum())
    options = {**options, "method": method, "context": CONTEXT, "trunk_width": 4}
    bundle = alone(model, tmp_path / "new.emoe", ram=ram, paged=True, **options)
    np.testing.assert_array_equal([expert.frequency for expert in bundle.experts.values()], frequency)
    nbytes = np.array([expert.nbytes for expert in bundle.experts.values()])
    room = ram - other_bytes(bundle)
    assert room == each * hot.sum()
    assert nbytes[hot].sum() <= room
    assert (nbytes * frequency)[~hot].sum() <= each * frequency[~hot].sum()
    assert nbytes.sum() <= each * len(nbytes)
    assert nbytes.sum() > 0.75 * each * len(nbytes)
    if method == "uniform":
        assert set(nbytes) == {20_480}  # three bits


def test_a_paged_bundle_takes_a_trunk_that_leaves_the_experts_room(
    alone, other_bytes, model, tmp_path, options, measured
):
    """With the widths of the trunk chosen by measuring."""
    frequency, narrow = measured
    hot = hot_experts(frequency)
    ram = other_bytes(narrow) + 9000 * int(hot.sum())  # at one bit, beside four bits of the trunk
    bundle = alone(model, tmp_path / "new.emoe", ram=ram, context=CONTEXT, paged=True, **options)
    nbytes = np.array([expert.nbytes for expert in bundle.experts.values()])
    assert nbytes[hot].sum() <= ram - other_bytes(bundle)


def test_a_paged_bundle_for_too_little_memory_is_refused_with_a_cap_that_works(alone, model, tmp_path, options):
    options = {**options, "context": CONTEXT, "paged": True}
    ram = 800_000_000
    message = refused(model, tmp_path / "small.emoe", how=alone, ram=ram, **options)
    assert message.startswith(f"ram is {ram:,} bytes, expected ")
    least = int(re.findall(r"[\d,]{5,}", message)[1].replace(",", ""))
    shutil.rmtree(tmp_path / "small.emoe.work", ignore_errors=True)
    alone(model, tmp_path / "least.emoe", ram=least, **options)
