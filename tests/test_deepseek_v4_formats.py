"""DeepSeek-V4 as the hub has it, attention in FP8 and experts in FP4 with powers of two as scales: read, and kept."""

from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of, make_engine, run_engine, same_bits, weights_of
from quantised_checkpoints import write_deepseek_v4, write_plain
from test_checkpoint import read_file, refusal, write_file
from test_checkpoint_formats import SUPPORTED, set_quantisation
from test_deepseek_v4 import as_on_the_hub

from edge_moe import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.source.formats import FP8, MXFP4
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle

NAME = "deepseek_v4"
W1, WQ_A = "layers.2.ffn.experts.3.w1", "layers.1.attn.wq_a"


@pytest.fixture(scope="module")
def hub(golden, tmp_path_factory) -> Path:
    """A bfloat16 checkpoint with the hub's names, and beside it fp4, as the hub has it, and plain with its values."""
    directory = tmp_path_factory.mktemp("v4")
    (directory / "bf16").mkdir()
    for file in ("config.json", "model.safetensors"):
        (directory / "bf16" / file).write_bytes((golden[NAME][0] / file).read_bytes())
    as_on_the_hub(directory / "bf16")
    values = write_deepseek_v4(directory / "bf16", directory / "fp4")
    write_plain(directory / "bf16", directory / "plain", values, "F32")
    return directory


def copied(source: Path, out: Path, **changes) -> Path:
    """The checkpoint with other tensors, by key with __ for dots; None removes one."""
    out.mkdir(exist_ok=True)
    tensors = read_file(source / "model.safetensors")
    for key, change in changes.items():
        key = key.replace("__", ".")
        tensors.pop(key)
        if change is not None:
            tensors[key] = change
    write_file(out / "model.safetensors", tensors)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


@pytest.mark.parametrize(
    ("experts", "block"), [("I8", (128, 128)), ("F4", (128, 128)), ("F8_E4M3", (128, 128)), ("I8", (32, 48))]
)
def test_every_tensor_has_the_values_that_its_codes_stand_for(hub, tmp_path, experts, block):
    """By the definitions of the formats; the last block of a matrix may be cut off."""
    values = write_deepseek_v4(hub / "bf16", tmp_path / "codes", experts=experts, block=block, seed=1)
    write_plain(hub / "bf16", tmp_path / "plain", values, "F32")
    found, plain = Checkpoint(tmp_path / "codes"), Checkpoint(tmp_path / "plain")
    assert found.unused == []
    assert found.dtype("layers.1.q_b") == found.dtype("layers.0.shared.down") == found.dtype("layers.2.o_a") == FP8
    assert found.dtype("layers.1.index.q") == FP8 and found.dtype("layers.1.index.kv") == "BF16"
    assert found.dtype("layers.2.experts.3.up") == (FP8 if experts == "F8_E4M3" else MXFP4)
    for name in found.trunk_names():
        np.testing.assert_array_equal(found.trunk(name), plain.trunk(name))
    for layer in (0, 4):
        for got, want in zip(found.expert(layer, 5), plain.expert(layer, 5), strict=True):
            np.testing.assert_array_equal(got, want)


def test_values_are_those_that_transformers_reads(hub):
    """Its dequantiser, on the bytes as torch has them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, checkpoint = read_file(hub / "fp4" / "model.safetensors"), Checkpoint(hub / "fp4")
    types = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}

    def tensor(key: str):
        dtype, shape, data = tensors[key]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(types[dtype]).reshape(shape)

    def theirs(key: str, rows: int, cols: int) -> np.ndarray:
        """Scales of blocks that are cut off are repeated, as transformers has whole ones alone."""
        weight, scale = tensor(f"{key}.weight"), tensor(f"{key}.scale")
        if weight.dtype == torch.float8_e4m3fn:
            scale = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        return Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32).numpy()

    gate, up, down = checkpoint.expert(2, 3)
    np.testing.assert_array_equal(gate, theirs(W1, *gate.shape))
    np.testing.assert_array_equal(up, theirs(W1.replace("w1", "w3"), *up.shape))
    np.testing.assert_array_equal(down, theirs(W1.replace("w1", "w2"), *down.shape))
    q_a = checkpoint.trunk("layers.1.q_a")
    np.testing.assert_array_equal(q_a, theirs(WQ_A, *q_a.shape))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_checkpoint_of_codes_gives_the_logits_of_transformers(golden, hub, tmp_path, seed):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits

    values = write_deepseek_v4(hub / "bf16", tmp_path / "codes", seed=seed)
    write_plain(hub / "bf16", tmp_path / "plain", values, "F32")
    ids, checkpoint = np.random.default_rng(seed).integers(0, 128, 60), Checkpoint(tmp_path / "codes")
    got = reference.forward(checkpoint.config, checkpoint, ids)
    want = transformers_logits(tmp_path / "plain", ids)
    assert np.abs(got - want).max() <= 1e-4 and np.array_equal(got.argmax(-1), want.argmax(-1))


def test_codes_are_kept_to_the_last_bit_and_run_alike_everywhere(hub, golden, tmp_path):
    kept = compress(hub / "fp4", tmp_path / "b.emoe", method="keep")
    checkpoint, made, ids = Checkpoint(hub / "fp4"), weights_of(kept.path), golden[NAME][1]
    assert {encoding.codec for expert in kept.experts.values() for encoding in expert.encodings} == {"mxfp4"}
    for key in kept.experts:
        for got, want in zip(made.expert(*key), checkpoint.expert(*key), strict=True):
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    want = run_engine(make_engine(kept.path), ids)
    exact = reference.forward(kept.config, made, ids)
    assert np.abs(want - exact).mean() < 0.05 * exact.std()  # inputs of products are rounded to 8 bits or 15
    for slots, chunk, threads in ((None, 7, 2), (3, 1, 1), (4, 16, 2)):
        assert same_bits(run_engine(make_engine(kept.path, slots=slots, threads=threads), ids, chunk), want)
    assert np.array_equal(logits_of(kept.path, ids).argmax(-1), want.argmax(-1))


def test_pmq_keeps_codes_where_nothing_better_has_room(hub, tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(0, 128, 1024))
    options = {"calibration": tmp_path / "ids.npy", "tokens": 512, "trunk_width": 8}
    bundle = compress(hub / "fp4", tmp_path / "b.emoe", bits=7.2, **options)
    checkpoint, made = Checkpoint(hub / "fp4"), weights_of(bundle.path)
    kept = [key for key, expert in bundle.experts.items() if expert.encodings[0].codec == "mxfp4"]
    assert kept
    for key in kept:
        for got, want in zip(made.expert(*key), checkpoint.expert(*key), strict=True):
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    assert Bundle.open(bundle.path).bits_per_weight <= 7.2


REFUSED = {
    "scales that are missing": (
        {f"{WQ_A}.scale": None},
        f"tensor {WQ_A}.weight is F8_E4M3 and its scales {WQ_A}.weight_scale_inv are missing; download the checkpoint "
        "again, or use the one that is not quantised",
    ),
    "scales of another number": (
        {f"{W1}.scale": ("F8_E8M0", [32, 1], bytes(32))},
        f"tensor {W1}.scale has shape (32, 1), expected (32, 2), the scales of {W1}.weight (32, 64); config.json's "
        "quantization_config and the weights do not belong together",
    ),
    "scales of another type": (
        {f"{W1}.scale": ("BF16", [32, 2], bytes(128))},
        f"tensor {W1}.scale of type BF16 is not supported; {SUPPORTED}",
    ),
    "codes of another number": (
        {f"{W1}.weight": ("I8", [32, 64], bytes(32 * 64))},
        f"tensor {W1}.weight has shape (32, 64), config.json makes it (32, 32); config.json and the weights do not "
        "belong together",
    ),
    "four bits of another size": (
        {f"{W1}.weight": ("F4", [32, 64], bytes(32 * 64))},
        f"type, shape and offsets of tensor {W1}.weight do not agree; download it again",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_damaged_codes_are_refused_by_tensor(hub, tmp_path, what):
    changes, message = REFUSED[what]
    directory = copied(hub / "fp4", tmp_path, **{key.replace(".", "__"): its for key, its in changes.items()})
    assert refusal(ValueError, lambda: Checkpoint(directory)) == f"{directory}/model.safetensors: {message}"


def test_experts_of_an_unknown_type_are_refused(hub, tmp_path):
    directory = copied(hub / "fp4", tmp_path)
    set_quantisation(directory, {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "int4"})
    assert refusal(ValueError, lambda: Checkpoint(directory)) == (
        f"{directory}/config.json: expert_dtype 'int4' is not supported; {SUPPORTED}"
    )
