"""Models named by their id on the hub, against a server that counts what is asked of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_checkpoints import write_checkpoint
from hub_server import COMMIT, serving
from quantised_checkpoints import write_mxfp4, write_nvfp4
from test_checkpoint import shard
from test_cli import error_of, object_of, succeeds

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.hub import hub_id

pytest.importorskip("huggingface_hub")
REFERENCE = Path(__file__).parent.parent / "bench" / "reference_moe"


@pytest.fixture
def source(tmp_path) -> Path:
    """OLMoE in four shards, with files that nothing reads."""
    directory = write_checkpoint("olmoe", tmp_path / "source")[0]
    shard(directory, 4)
    (directory / "README.md").write_text("# A model")
    (directory / "pytorch_model.bin").write_bytes(bytes(100))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return directory


@pytest.fixture
def hub(source, tmp_path):
    with serving({"some/olmoe": source}, gated=("gated/model",)) as hub:
        hub.models["gated/model"] = source
        hub.env = hub.environment(tmp_path / "cache")
        yield hub


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("some/olmoe", ("some/olmoe", None)),
        ("some/olmoe@v1.0/x", ("some/olmoe", "v1.0/x")),
        ("https://huggingface.co/some/olmoe", ("some/olmoe", None)),
        ("https://hf.co/some/olmoe/tree/v2", ("some/olmoe", "v2")),
        ("https://huggingface.co/some/model.emoe/", ("some/model.emoe", None)),
        ("some/olmoe.emoe", None),
        ("some/olmoe/", None),
        ("./some/olmoe", None),
        ("/some/olmoe", None),
        ("olmoe", None),
    ],
)
def test_an_id_has_an_owner_and_a_name(given, wanted):
    assert hub_id(given) == wanted


def test_what_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "olmoe").mkdir(parents=True)
    assert hub_id("some/olmoe") is None
    assert hub_id("some/other") is None  # as the directory it would be in is there
    assert hub_id("else/olmoe") == ("else/olmoe", None)


def test_plan_asks_for_the_config_alone(hub, source):
    planned = object_of("plan", "some/olmoe", "--bits", "8", env=hub.env)
    assert planned["parts"] == object_of("plan", source, "--bits", "8")["parts"]
    assert sorted(hub.whole()) == ["config.json", "generation_config.json"]
    assert all(span is None for _, _, span in hub.log)


def test_compressing_fetches_headers_first_and_each_shard_once(hub, source, tmp_path):
    out = tmp_path / "hub.emoe"
    options = ("--bits", "8", "--method", "rtn", "--threads", "1")
    succeeds("compress", "some/olmoe@v2", out, *options, env=hub.env)
    compress(source, tmp_path / "local.emoe", bits=8, method="rtn", threads=1)
    for file in sorted((tmp_path / "local.emoe").iterdir()):
        assert (out / file.name).read_bytes() == file.read_bytes() or file.name == ".edge-moe"
    whole = [file for file in hub.whole() if file.endswith(".safetensors")]
    assert sorted(whole) == sorted(set(whole)) == [file.name for file in sorted(source.glob("*.safetensors"))]
    assert not {"README.md", "pytorch_model.bin"} & {file for _, file, _ in hub.log}
    spans = [number for number, (_, file, span) in enumerate(hub.log) if span and file.endswith(".safetensors")]
    first_whole = hub.log.index(("GET", whole[0], None))
    assert len([number for number in spans if number < first_whole]) >= 4
    asked = len(hub.log)
    succeeds("compress", "some/olmoe@v2", tmp_path / "again.emoe", *options, env=hub.env)
    again = [request for request in hub.log[asked:] if request[0] == "GET" and request[1].endswith(".safetensors")]
    assert again and all(span for _, _, span in again)


def test_a_shard_is_fetched_when_one_of_its_tensors_is_read(hub, tmp_path):
    code = """if True:
        from edge_moe.compressor.source.checkpoint import Checkpoint
        with Checkpoint("some/olmoe") as checkpoint:
            print(checkpoint.fingerprint(), checkpoint.trunk("layers.1.k").sum())
            directory = checkpoint.directory
        assert not directory.exists()
        """
    done = subprocess.run([sys.executable, "-c", code], env=hub.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = Checkpoint(hub.models["some/olmoe"])
    fingerprint, total = done.stdout.split()
    assert fingerprint == local.fingerprint()
    assert np.float32(total) == local.trunk("layers.1.k").sum()
    shard_of = json.loads((hub.models["some/olmoe"] / "model.safetensors.index.json").read_text())["weight_map"]
    fetched = [file for file in hub.whole() if file.endswith(".safetensors")]
    assert fetched == [shard_of["model.layers.1.self_attn.k_proj.weight"]]


def test_codes_that_are_kept_are_fetched_too(hub, tmp_path):
    source = hub.models["some/mxfp4"] = tmp_path / "mxfp4"
    write_mxfp4(write_checkpoint("olmoe", tmp_path / "plain")[0], source)
    options = ("--method", "keep", "--threads", "1")
    succeeds("compress", "some/mxfp4", tmp_path / "hub.emoe", *options, env=hub.env)
    made = compress(source, tmp_path / "local.emoe", method="keep", threads=1)
    for file in made.files:
        assert (tmp_path / "hub.emoe" / file.name).read_bytes() == file.read_bytes()


def test_a_checkpoint_that_cannot_be_read_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    write_nvfp4(write_checkpoint("olmoe", tmp_path / "plain")[0], tmp_path / "nvfp4", method="modelopt")
    hub.models["some/other"] = tmp_path / "nvfp4"
    config = json.loads((tmp_path / "nvfp4" / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    (tmp_path / "nvfp4" / "config.json").write_text(json.dumps(config))
    for command in (("compress", "some/other", tmp_path / "out.emoe"), ("plan", "some/other")):
        assert "ModelOpt's quant_algo 'W4A8_AWQ' is not supported" in error_of(*command, env=hub.env)
    assert not any(file.endswith(".safetensors") for file in hub.whole())


def test_a_header_that_claims_too_much_is_not_asked_for(hub, tmp_path):
    shards = sorted(hub.models["some/olmoe"].glob("*.safetensors"))
    data = shards[2].read_bytes()
    shards[2].write_bytes((1 << 40).to_bytes(8, "little") + data[8:] + bytes(1_000_000))
    said = error_of("compress", "some/olmoe", tmp_path / "out.emoe", env=hub.env)
    assert f"/some--olmoe/{shards[2].name}: the header claims 1,099,511,627,776 bytes, the file has " in said
    assert not any(file.endswith(".safetensors") for file in hub.whole())


def test_a_bundle_on_the_hub_is_used_by_its_name(hub, bundle_of):
    bundle = hub.models["some/bundle"] = bundle_of("olmoe", width=4)
    assert object_of("plan", "some/bundle", env=hub.env)["floor_bytes"] > 0
    assert not any(file.endswith(".safetensors") for file in hub.whole())
    succeeds("verify", f"some/bundle@{COMMIT}", env=hub.env)
    weights = sorted(file.name for file in bundle.glob("*.safetensors"))
    assert sorted(file for file in hub.whole() if file.endswith(".safetensors")) == weights
    about = object_of("inspect", "some/bundle", env=hub.env)
    local = object_of("inspect", bundle)
    assert {**about, "path": ""} == {**local, "path": ""}


def test_a_model_on_the_hub_is_compared_with(hub, tmp_path):
    """The embedded model, which has a tokenizer, and a bundle of it, both by their names."""
    hub.models["some/reference"] = REFERENCE
    hub.models["some/compressed"] = tmp_path / "out.emoe"
    compress(REFERENCE, tmp_path / "out.emoe", bits=16, threads=1)
    (tmp_path / "text.txt").write_text("def double(x):\n    return 2 * x\n" * 4)
    options = ("--text", tmp_path / "text.txt", "--tokens", "32", "--against", "some/reference")
    found = object_of("eval", "some/compressed", *options, env=hub.env)
    assert found["kld_mean"] < 0.001
    assert "some/compressed: is on the hub, and this changes the bundle" in error_of(
        "prune", "some/compressed", "--default", "0.2", env=hub.env
    )


def test_every_failure_says_what_to_do(hub, tmp_path):
    assert error_of("generate", "some/olmoe", "x", env=hub.env) == (
        "some/olmoe: is a model on the hub, not a bundle; make one with `edge-moe compress some/olmoe olmoe.emoe`"
    )
    assert error_of("plan", "no/model", env=hub.env) == (
        "no/model: no such file or directory, and no such model on the Hugging Face hub, or it is private; "
        "`hf auth login` lets you use your own"
    )
    assert error_of("plan", "some/olmoe@v9", env=hub.env) == (
        "some/olmoe@v9: some/olmoe on the Hugging Face hub has no revision v9"
    )
    assert error_of("plan", "gated/model", env=hub.env) == (
        "gated/model: is gated; ask for access at https://huggingface.co/gated/model, then `hf auth login`"
    )
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "q4.gguf").write_bytes(b"GGUF")
    hub.models["some/gguf"] = tmp_path / "gguf"
    for command in (("plan", "some/gguf"), ("compress", "some/gguf", tmp_path / "out.emoe")):
        assert error_of(*command, env=hub.env) == (
            "some/gguf: has no config.json on the hub; `hf download some/gguf q4.gguf` gets one of its GGUF files: "
            "name that"
        )
    succeeds("plan", "some/olmoe", "--bits", "8", env=hub.env)
    said = error_of("plan", "some/olmoe", env={**hub.env, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert said.startswith("some/olmoe: no such file or directory, and the hub cannot be reached (")
    before = f"{tmp_path}/cache/hub/models--some--olmoe"
    assert said.endswith(f"; what was downloaded before is {before}")
    succeeds("plan", before, "--bits", "8")


@pytest.mark.parametrize(
    ("package", "model", "said"),
    [
        (
            "huggingface_hub",
            "some/olmoe",
            "no such file or directory, but it looks like a model on the Hugging Face hub; pip install 'edge-moe[hub]' "
            "to use it by name, or download it with `hf download some/olmoe --local-dir olmoe`",
        ),
        ("gguf", "model.gguf", "reading GGUF files needs the package gguf; pip install 'edge-moe[gguf]'"),
    ],
)
def test_without_the_package_the_extra_to_install_is_named(tmp_path, package, model, said):
    """A file of its name that raises ImportError stands for its absence."""
    (tmp_path / f"{package}.py").write_text("raise ImportError('absent')")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code = "import sys; sys.path.insert(0, '.'); from edge_moe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "plan", model], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == f"edge-moe: error: {model}: {said}\n"
