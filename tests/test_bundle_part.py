"""Splitting a bundle: every tensor and record is in its part, and a part is not taken for a bundle."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
from bundles import table_bytes
from safetensors import deserialize

from edge_moe.__main__ import main
from edge_moe.compressor.writing.layer_cuts import first_layers, layer_bytes
from edge_moe.compressor.writing.parts import split
from edge_moe.runtime.bundle import Bundle, parts_to_verify, verify
from edge_moe.runtime.runtime import Runtime


def tensors_in(directory: Path) -> dict[str, dict]:
    """Type, shape and bytes of every tensor of a bundle's files, as the safetensors library reads them."""
    return {name: it for file in directory.glob("*.safetensors") for name, it in deserialize(file.read_bytes())}


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr("sys.argv", ["edge-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return (ended.value.code or 0, *capsys.readouterr())


@pytest.mark.parametrize("name", ["olmoe", "gemma4", "deepseek_v4", "qwen4_exp"])
def test_parts_have_every_tensor_where_it_is_needed(bundle_of, tmp_path, name):
    whole = Bundle.open(bundle_of(name, width=8))
    names = split(whole.path, tmp_path / "out", [1.0, 1.0])
    everything, found = tensors_in(whole.path), {}
    for number, (directory, part) in enumerate(names.items()):
        opened = Bundle.open(tmp_path / "out" / directory, parts=True)
        assert opened.part == part and opened.layers == part.layers and part.number == number
        assert opened.part.bundle == whole.table["checksum"]
        assert {layer for layer, _ in opened.experts} == set(whole.config.moe_layers).intersection(part.layers)
        tensors = tensors_in(opened.path)
        layers = {int(one.split(".")[1]) for one in tensors if one.startswith("layers.")}
        assert layers == set(part.layers)
        assert any(one.startswith("embedding") for one in tensors) == (number == 0 or whole.config.tied_head)
        assert any(one.startswith("output_") for one in tensors) == (number == 1)
        assert len(list(verify(opened))) == parts_to_verify(opened)
        assert {file.name for file in opened.path.iterdir()} >= set(opened.copies)
        found |= tensors
    assert found == everything
    assert len(names) == 2 and sum(len(part.layers) for part in names.values()) == whole.config.layer_count


@pytest.mark.parametrize("shares", [[1, 1], [1, 3], [5, 1, 1], [1, 1, 1, 1]])
def test_the_fullest_part_is_as_empty_as_can_be(bundle_of, shares):
    bundle = Bundle.open(bundle_of("reference"))
    begin, each, end = layer_bytes(bundle)
    twice = begin if bundle.config.tied_head else 0
    assert begin + sum(each) + end - twice == pytest.approx(bundle.trunk_bytes + bundle.expert_bytes, rel=0.01)

    def fullest(firsts) -> float:
        bounds = [*firsts, len(each)]
        filled = [sum(each[first:after]) for first, after in zip(bounds, bounds[1:], strict=False)]
        filled[0], filled[-1] = filled[0] + begin, filled[-1] + end
        return max(nbytes / share for nbytes, share in zip(filled, shares, strict=True))

    every = [(0, *others) for others in combinations(range(1, len(each)), len(shares) - 1)]
    assert fullest(first_layers(bundle, shares)) == min(map(fullest, every))


def test_a_part_says_what_it_is(bundle_of, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code, said, _ = command(
        monkeypatch, capsys, "split", bundle_of("olmoe", width=8), out, "--shares", "1GB,2GB", "--json"
    )
    parts = json.loads(said)["parts"]
    assert code == 0 and [part["part"]["number"] for part in parts] == [1, 2]
    for number in (1, 2):
        path = out / f"part-{number}-of-2"
        code, said, _ = command(monkeypatch, capsys, "inspect", path)
        text = parts[number - 1]["part"]["text"]
        assert code == 0 and text.startswith(f"part {number} of 2, layers ") and text in said
        code, said, _ = command(monkeypatch, capsys, "verify", path)
        assert code == 0 and f"OK ({text})" in said


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_other_devices_refuse_a_part_and_name_the_command(bundle_of, tmp_path, device):
    split(bundle_of("olmoe", width=8), tmp_path / "out", [1, 1])
    out = tmp_path / "out"
    run = f"`mlx.launch -n 2 --backend ring -- edge-moe generate {out} --device mlx` runs the parts together"
    with pytest.raises(ValueError) as error:
        Runtime(tmp_path / "out/part-2-of-2", device=device)
    assert str(error.value) == f"{tmp_path / 'out/part-2-of-2'}: is part 2 of 2, layers 1 to 1 of 2, of a bundle; {run}"
    with pytest.raises(ValueError) as error:
        Runtime(tmp_path / "out", device=device)
    assert str(error.value) == f"{tmp_path / 'out'}: has parts of a bundle, such as part-1-of-2; {run}"


def test_a_split_that_cannot_be_is_refused(bundle_of, tmp_path):
    with pytest.raises(ValueError, match="^parts is 3, expected 2 to 2: each part has a layer with experts"):
        split(bundle_of("olmoe", width=8), tmp_path / "out", [1, 1, 1])
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out: exists already"):
        split(bundle_of("olmoe", width=8), tmp_path / "out", [1, 1])


def test_a_damaged_bundle_is_not_split(bundle_of, tmp_path):
    path = shutil.copytree(bundle_of("olmoe", width=8), tmp_path / "whole.emoe")
    record = Bundle.open(path).experts[1, 3]
    with open(path / "experts-00001-of-00001.safetensors", "r+b") as file:
        file.seek(record.offset + 7)
        byte = file.read(1)[0]
        file.seek(record.offset + 7)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="expert 3 of layer 1 does not match its checksum; copy the bundle again"):
        split(path, tmp_path / "out", [1, 1])
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"first_layers": [0, 0]}, "first_layers of the parts are"),
        ({"first_layers": [1, 1]}, "first_layers of the parts are"),
        ({"first_layers": [0, "1"]}, "first_layers of the parts are"),
        ({"first_layers": [0]}, "first_layers of the parts are"),
        ({"first_layers": [0, 2]}, "a part begins at layer 2, config.json has 2"),
        ({"number": 2}, "'number' is 2, expected 0 to 1"),
        ({"number": 1}, "tensor embedding"),
        ({"bundle": "none"}, "the bundle of a part is 'none', expected a checksum"),
    ],
)
def test_a_part_that_cannot_be_is_refused(bundle_of, tmp_path, change, told):
    split(bundle_of("olmoe", width=8), tmp_path / "out", [1, 1])
    file = tmp_path / "out/part-1-of-2/bundle.json"
    table = json.loads(file.read_text())
    table["part"] |= change
    file.write_bytes(table_bytes(table))
    with pytest.raises(ValueError) as error:
        Bundle.open(file.parent, parts=True)
    assert told in str(error.value) or (change == {"number": 1} and "is missing" in str(error.value))


def test_plan_tells_what_each_rank_needs(bundle_of, tmp_path, monkeypatch, capsys):
    whole = bundle_of("qwen3_next", width=8)
    split(whole, tmp_path / "out", [1, 1])
    given = ("--device", "mlx", "--ram", "8GB", "--json")
    _, said, _ = command(monkeypatch, capsys, "plan", whole, *given)
    alone = json.loads(said)
    code, said, _ = command(monkeypatch, capsys, "plan", tmp_path / "out", *given)
    parts = json.loads(said)["parts"]
    assert code == 0 and list(parts) == ["part-1-of-2", "part-2-of-2"]
    for name in ("kv_cache_bytes", "all_experts_bytes", "working_set_experts"):
        assert sum(part[name] for part in parts.values()) == alone[name]
    assert sum(part["trunk_bytes"] for part in parts.values()) == pytest.approx(alone["trunk_bytes"], rel=0.02)
    assert all(part["state_bytes"] < alone["state_bytes"] for part in parts.values())

    code, said, _ = command(monkeypatch, capsys, "plan", tmp_path / "out", *given[:2], "--ram", "20MB")
    assert code == 1 and said.count("floor") == 2

    code, _, told = command(monkeypatch, capsys, "plan", tmp_path / "out/part-1-of-2")
    assert code == 1 and "which device mlx runs; plan it with --device mlx" in told
