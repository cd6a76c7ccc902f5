"""The command line: compress, what inspect shows of its result, and the demo."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE
from test_checkpoint import bf16, read_file, write_file
from test_cli import error_of, object_of, succeeds

from edge_moe.compressor.needs import needs_of
from edge_moe.compressor.pipeline import compress
from edge_moe.report import certificate_text, duration_text, spread_text
from edge_moe.runtime.bundle import Bundle


@pytest.fixture
def model(golden, tmp_path, monkeypatch) -> str:
    """A checkpoint without a tokenizer in the current directory: 2 layers of 6 experts. Also ids.npy and other.npy."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden["qwen3_moe"][0], "model")
    for seed, name in enumerate(("ids.npy", "other.npy")):
        np.save(name, np.random.default_rng(seed).integers(0, 128, 2048))
    return "model"


CALIBRATED = ("--calibration", "ids.npy", "--tokens", 512)


def test_compress_prints_what_it_made_and_leaves_a_bundle(model):
    done = succeeds("compress", model, "out.emoe", "--bits", "5", *CALIBRATED)
    made, lines = Bundle.open("out.emoe"), done.stdout.splitlines()
    needs, takes, note, *told = done.stderr.splitlines()
    assert needs.startswith("needs up to ") and re.fullmatch(r"takes about \d+ s on \d+ threads?, by .*", takes)
    assert note == "note: the checkpoint has no tokenizer.json; the bundle will take token ids, not text"
    assert [line.partition(" phase ")[2] for line in told] == [
        *("2 of 5 measure experts", "3 of 5 choose widths", "4 of 5 round experts"),
        "5 of 5 compare with the source",
    ]
    assert lines[0].startswith("out.emoe: ") and lines[1].startswith(f"{made.bits_per_weight:.3f} bits per expert")
    assert lines[2].startswith("experts by width in bits: ")
    assert lines[3].startswith("sensitivity spread ") and made.table["method"]["name"] == "pmq"
    ours, other = (made.table["certificate"][key] for key in ("bundle", "uniform"))
    rows = {line[:11]: line[11:].split() for line in lines[5:]}
    assert rows["certificate"] == [
        *("bits/weight", "perplexity", "ratio", "KLD", "mean", "KLD", "p99", "same", "top", "token"),
    ]
    for name, its in (("this bundle", ours), ("one width  ", other)):
        assert rows[name] == [
            *(f"{its['bits_per_weight']:.3f}", f"{its['perplexity']:.3f}", f"{its['perplexity_ratio']:.3f}"),
            *(f"{its['kld_mean']:.4f}", f"{its['kld_p99']:.3f}", f"{its['top1_agreement']:.1%}"),
        ]
    assert "on 256 tokens of the last part of ids.npy," in lines
    assert max(map(len, [needs, takes, note, *lines])) <= 100
    assert error_of("compress", model, "out.emoe", "--bits", "5").startswith("out.emoe: exists already")


def test_compress_json_describes_the_bundle(model):
    about = object_of("compress", model, "out.emoe", "--bits", "7.2", "--method", "rtn", "--trunk-width", "4")
    assert about == object_of("inspect", "out.emoe")
    assert about["widths"] == {"6": 12} and about["bits_per_weight"] == pytest.approx(7.111, abs=1e-3)
    assert about["widths_by_layer"] == {str(layer): {"6": 6} for layer in range(2)}
    assert about["widths_by_group"] == {"32": {"6": 12}}
    assert about["certificate"] is None and about["method"] == {"name": "rtn"}


def test_compress_takes_a_size_in_words(model):
    about = object_of("compress", model, "out.emoe", "--size", "0.25MB", "--method", "rtn")
    assert about["bundle_bytes"] <= 250_000
    assert "is not understood" in error_of("compress", model, "b.emoe", "--size", "big")


def test_compress_to_run_in_ram_takes_the_most_that_fits(model):
    about = object_of("compress", model, "out.emoe", "--ram", "1GB", "--context", "64", "--method", "rtn")
    assert about["widths"] == {"8": 12}
    assert "compressing this model takes" in error_of("compress", model, "b.emoe", "--ram", "50MB", "--width", 2)


def test_the_options_of_compress_reach_the_library(model):
    drop = ("--drop-experts", "0.34", "--drop-counts", "sensitivity", "--adjust-top-k")
    made = object_of(
        "compress", model, "a.emoe", "--bits", 5, *CALIBRATED, *drop, "--held-out", "other.npy", "--seed", 3
    )
    assert made["dropped"] == sum(map(len, made["dropped_by_layer"].values())) == 4
    assert made["method"]["drop_counts"] == "sensitivity" and "drop_score" not in made["method"]
    assert made["method"]["trunk"].keys() == {"embedding", "attention", "head"}
    assert made["certificate"]["held_out"]["source"] == "other.npy"
    assert made["calibration"]["tokens"] == 512 and made["calibration"]["seed"] == 3
    plain = ("compress", model, "--width", 2, *CALIBRATED, "--no-certificate", "--threads", 1)
    first, second = (
        object_of(*plain, out, *options) for out, options in (("b.emoe", ()), ("c.emoe", ("--act-order",)))
    )
    assert first["certificate"] is second["certificate"] is None and first["method"]["name"] == "uniform"
    records = [Path(out, "experts-00001-of-00001.safetensors").read_bytes() for out in ("b.emoe", "c.emoe")]
    assert records[0] != records[1]
    assert object_of("compress", model, "d.emoe", "--bits", 6, "--method", "mc-release", *CALIBRATED)["method"] == {
        "name": "mc-release"
    }


@pytest.mark.parametrize(
    "options", [{"bits": 6}, {"width": 3, "method": "uniform"}, {"bits": 6, "drop_experts": 0.5}, {"bits": 16}]
)
def test_compressing_takes_the_disk_that_is_said_and_no_more(model, options):
    np.save("held.npy", np.random.default_rng(2).integers(0, 128, 8192))
    given = {"calibration": ("ids.npy",), "held_out": ("held.npy",), "tokens": 1792, **options}
    needs, sizes = needs_of(model, "new.emoe", given), []

    def look(*_):  # between two steps, when one layer's state is there; while it is replaced there are two
        sizes.append(sum(file.stat().st_size for file in Path("new.emoe.work").rglob("*") if file.is_file()))

    compress(model, "new.emoe", progress=look, **given)
    made = sum(file.stat().st_size for file in Path("new.emoe").iterdir())
    assert made <= needs.bundle_bytes <= 1.1 * made + 65_536
    tracks = 2 if options.get("method") == "uniform" else 3  # source and bundle; and one width to compare with
    assert 0 <= max(sizes) - needs.work_bytes * tracks / 6 < 20_000


def test_a_disk_that_is_too_small_is_said_before_the_work(model, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(OSError, match=r"^new.emoe: compressing needs 1 MB of disk, there are 0 MB free; make room"):
        needs_of(model, "new.emoe", {"bits": 16})


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_compress_says_how_to_go_on_and_does(model, sent):
    arguments = ["compress", model, "out.emoe", "--bits", "5", *map(str, CALIBRATED)]
    hook = f"""
import os, signal, sys
from edge_moe.compressor.writing import writer
write = writer.BundleWriter.write_expert
def interrupted(self, layer, *record):
    if layer == 1:
        os.kill(os.getpid(), signal.{sent})
    write(self, layer, *record)
writer.BundleWriter.write_expert = interrupted
sys.argv = ["edge-moe", *{arguments!r}]
from edge_moe.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", hook], capture_output=True, text=True)
    assert done.returncode == 128 + getattr(signal, sent) and done.stdout == ""
    assert done.stderr.endswith("\nedge-moe: error: interrupted; the same command with --resume goes on\n")
    assert not Path("out.emoe").exists()
    assert "--resume goes on with it" in error_of(*arguments, "--no-resume")
    assert "bits was 5.0, is 6.0" in error_of("compress", model, "out.emoe", "--bits", "6", *CALIBRATED, "--resume")
    succeeds(*arguments)
    succeeds("compress", model, "whole.emoe", "--bits", "5", *CALIBRATED)
    for file in Path("whole.emoe").iterdir():
        assert (Path("out.emoe") / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in Path().glob("out*")) == ["out.emoe"]


def test_a_compress_interrupted_before_anything_was_done_leaves_nothing(tmp_path):
    command = ["compress", str(REFERENCE), "out.emoe", "--bits", "16", "--json"]
    hook = f"""
import sys, signal, os
from edge_moe.compressor.writing import writer
write = writer.BundleWriter.write_expert
def interrupted(self, layer, *record):
    if layer == 2:
        os.kill(os.getpid(), signal.SIGINT)
    write(self, layer, *record)
writer.BundleWriter.write_expert = interrupted
sys.argv = ["edge-moe", *{command!r}]
from edge_moe.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", hook], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "edge-moe: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_a_terminal_alone(model):
    reader, terminal = os.openpty()
    command = [sys.executable, "-m", "edge_moe", "compress", model, "out.emoe", "--bits", "5", *map(str, CALIBRATED)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, env={**os.environ, "TERM": "xterm"}
    ) as child:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # what Linux gives for a terminal whose other side is closed
            while part := os.read(reader, 1 << 16):
                shown += part
        assert child.stdout.read().startswith(b"out.emoe: ") and child.wait() == 0
    os.close(reader)
    assert b"2 of 5 measure experts" in shown and b"12/12" in shown and b"0:00:00" in shown


def test_what_is_wrong_with_the_text_is_said_before_what_compressing_needs(model):
    for name, message in (
        ("gone.txt", "gone.txt: no such file of calibration or held-out text"),
        (".", ".: is a folder; name the text files in it, each with an option of its own"),
    ):
        assert error_of("compress", model, "out.emoe", "--bits", "5", "--calibration", name) == message
    message = "the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method rtn"
    assert error_of("compress", model, "out.emoe", "--bits", "5") == message
    assert list(Path().glob("out*")) == []


def set_dtype(name: str, kind: str) -> None:
    """Give one tensor of the model the type `kind`."""
    path = Path("model/model.safetensors")
    tensors = read_file(path)
    _, shape, data = tensors[name]
    tensors[name] = kind, shape, bf16(data).astype({"F16": np.float16, "F32": np.float32}[kind]).tobytes()
    write_file(path, tensors)


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_weights_that_16_bits_round_are_named(model, kind):
    set_dtype("model.layers.0.mlp.experts.0.gate_proj.weight", kind)
    done = succeeds("compress", model, "out.emoe", "--bits", "16")
    assert (
        f"note: the checkpoint has weights in {kind}; 16 bits are bfloat16, so these are rounded to 8 significant bits"
    ) in done.stderr.splitlines()
    assert Bundle.open("out.emoe").table["method"] == {"name": "pmq", "rounded_from": [kind]}
    assert "bfloat16" not in succeeds("compress", model, "other.emoe", "--width", "4", "--method", "rtn").stderr


def test_a_weight_that_bfloat16_cannot_hold_is_refused(model):
    path, name = Path("model/model.safetensors"), "model.layers.0.mlp.experts.0.gate_proj.weight"
    set_dtype(name, "F32")
    tensors = read_file(path)
    kind, shape, data = tensors[name]
    tensors[name] = kind, shape, np.float32([3.4028235e38]).tobytes() + data[4:]
    write_file(path, tensors)
    assert error_of("compress", model, "out.emoe", "--bits", "16") == (
        "a weight of 3.40282e+38 is beyond bfloat16; use another checkpoint"
    )


def test_tensors_that_are_left_out_are_named(model):
    path = Path("model/model.safetensors")
    write_file(path, {**read_file(path), "visual.a": ("F32", [1], bytes(4)), "visual.b": ("F32", [1], bytes(4))})
    stderr = succeeds("compress", model, "out.emoe", "--bits", "16").stderr
    assert "note: no part of the model, and left out: visual.a and 1 more tensors" in stderr.splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (100, "100 s"), (720, "12 min"), (32_000, "9 h"), (2_500_000, "29 days")]
)
def test_a_time_is_said_as_roughly_as_it_is_known(seconds, text):
    assert duration_text(seconds) == text


def test_a_flat_model_is_said_to_have_one_width():
    assert spread_text({"spread": 1.234, "flat": True}, {"2": 4}) == (
        "sensitivity spread 1.23 (90th over 10th percentile of experts): flat,\n"
        "so all experts have one width; below 2 a mix of widths gains nothing"
    )
    assert spread_text({"spread": 3.0, "flat": False}, {"2": 3, "3": 1}).endswith("of experts): widths are mixed")
    assert spread_text({"spread": 3.0, "flat": False}, {"8": 4}).endswith("percentile of experts)")


def test_inspect_shows_what_was_dropped_where(dropped_of):
    path = dropped_of("olmoe", (2, 3, 4))
    about, lines = object_of("inspect", path), succeeds("inspect", path).stdout.splitlines()
    assert about["experts_by_layer"] == {"0": 8, "1": 3} and about["top_k_by_layer"] == {"0": 2, "1": 3}
    assert about["dropped_by_layer"] == {"0": [], "1": [0, 1, 2, 4, 7]} and about["dropped"] == 5
    assert any(line.startswith("experts      3 to 8 of 8 a layer of ") and "top 2 to 3" in line for line in lines)
    assert "dropped      5 of 16" in lines
    assert lines[-3].split()[0] == "layer" and lines[-3].split()[-1] == "dropped"
    assert [line.split()[-1] for line in lines[-2:]] == ["0", "5"]


def test_inspect_shows_the_certificate_method_and_groups(model):
    made = compress(model, "out.emoe", bits=5, calibration=("ids.npy",), tokens=512)
    text = succeeds("inspect", "out.emoe").stdout
    assert certificate_text(made.table["certificate"]) in text
    assert spread_text(made.table["method"], dict.fromkeys("23")) in text
    assert "method       pmq, written by edge-moe" in text and "calibration  512 tokens of ids.npy, seed 0" in text
    assert "group 32" in text


def test_the_demo_pages_experts_and_says_the_same_as_without_a_cap(tmp_path):
    report = object_of("demo", "--keep", tmp_path / "kept")
    methods, run, certificate = report["methods"], report["run"], report["certificate"]
    assert list(methods) == ["bf16", "rtn", "uniform", "pmq"]
    assert methods["pmq"]["bundle_bytes"] <= methods["uniform"]["bundle_bytes"]
    kld = {name: result["kld_mean"] for name, result in methods.items()}
    assert 0 == kld["bf16"] < kld["pmq"] < kld["uniform"] < kld["rtn"]
    # on the same text, by the compressor's own forward pass: float32 where the engine rounds inputs to int8
    assert certificate["bundle"]["kld_mean"] == pytest.approx(kld["pmq"], rel=0.05)
    assert certificate["bundle"]["tokens"] == methods["pmq"]["tokens"]
    assert run["floor_bytes"] == run["ram_bytes"] < run["resident_bytes"]
    assert run["peak_memory_bytes"] <= run["ram_bytes"]
    assert run["expert_misses"] > 0 and run["same_text_without_cap"]
    kept = [path.name for path in (tmp_path / "kept").iterdir()]
    assert sorted(kept) == ["bf16.emoe", "pmq.emoe", "rtn.emoe", "uniform.emoe"]
