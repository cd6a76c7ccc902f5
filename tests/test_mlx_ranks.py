"""Two and three processes on loopback, by mlx.launch: the bits of one process, and every error on all of them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import rank_programs
from bundles import mask_routers_of, prunable, write_lossless

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.parts import split
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.runtime import Runtime

pytest.importorskip("mlx.core")
FAMILIES = {  # by name: the pruning of some answers, what is special
    "olmoe": "loss:0.2",  # a head that is the embedding
    "qwen3_next": None,  # recurrent states
    "qwen4_exp": None,  # tables of n-grams, several streams
    "deepseek_v4": None,  # tables by token, mixed streams, states of windows
    "glm_moe_dsa": None,  # a layer that takes the choice of one on the other rank
}

BATCHES = ["olmoe", "qwen3_next"]  # they answer several prompts at once, too


def launch(count: int, *command: object, **options) -> subprocess.CompletedProcess:
    """Run a command as ranks on loopback."""
    launcher = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    launcher = launcher if launcher.exists() else Path(shutil.which("mlx.launch") or "mlx.launch")
    ring = ("--backend", "ring", "-n", str(count), "-p", str(free_port(count)))
    tests = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, launcher, *ring, "--", *map(str, command)],
        stdin=subprocess.DEVNULL if "input" not in options else None,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
        **options,
    )


def free_port(count: int) -> int:
    """The first of some ports in a row that are free."""
    for first in range(20_000 + os.getpid() % 20_000, 60_000, count):
        taken = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(taken):
                one.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
    raise AssertionError("no ports are free")


def run_program(name: str, out: Path, count: int = 2, **arguments) -> list[dict]:
    """What a program of rank_programs.py returns on each rank."""
    done = launch(count, sys.executable, rank_programs.__file__, name, out, json.dumps(arguments))
    files = [Path(f"{out}.{rank}.json") for rank in range(count)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory) -> dict[str, dict]:
    """By name: a lossless bundle, its two parts, and the golden token ids."""
    directory, made = tmp_path_factory.mktemp("parts"), {}
    for name, prune in FAMILIES.items():
        source, ids, _ = golden[name]
        checkpoint, path = Checkpoint(source), directory / f"{name}.emoe"
        if prune:
            prunable(path, source, mask_routers_of(checkpoint.config))
        else:
            write_lossless(path, source, checkpoint.config, checkpoint)
        split(path, directory / f"{name}.parts", [1, 1])
        made[name] = {"bundle": str(path), "parts": str(directory / f"{name}.parts"), "ids": ids.tolist()}
    return made


@pytest.fixture(scope="module")
def told(models, tmp_path_factory) -> list[dict]:
    """The answers of one process, and of each of two."""
    ids = {name: its["ids"] for name, its in models.items()}
    prune = {name: rule for name, rule in FAMILIES.items() if rule}
    given = {"ids": ids, "prune": prune, "batches": BATCHES}
    alone = rank_programs.answers({name: its["bundle"] for name, its in models.items()}, **given)
    paths = {name: its["parts"] for name, its in models.items()}
    return [alone, *run_program("answers", tmp_path_factory.mktemp("told") / "out", paths=paths, **given)]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_have_the_bits_of_one_process(told, name):
    alone, first, second = (its[name] for its in told)
    for rank in (first, second):
        assert rank["logits"] == alone["logits"]
        for kind in ("whole", "paged"):
            assert [its["tokens"] for its in rank[kind]] == [its["tokens"] for its in alone[kind]]
        assert rank["paged"][0]["tokens"] == rank["whole"][1]["tokens"]
        assert rank["below_cap"] and not rank["all_held"]
    if name in BATCHES:
        assert first["batch"] == second["batch"] == alone["batch"]
        assert first["unseeded"] == second["unseeded"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_counted_is_the_sum_of_all_ranks(told, name):
    alone, first, second = (its[name] for its in told)
    for kind in ("whole", "paged"):
        assert first[kind] == second[kind]
        for one, its in zip(alone[kind], first[kind], strict=True):
            assert its["expert_hits"] + its["expert_misses"] == one["expert_hits"] + one["expert_misses"]
            assert its["experts_used"] == one["experts_used"] and its["cached_tokens"] == one["cached_tokens"]
            assert its["dropped_routing_weight"] == pytest.approx(one["dropped_routing_weight"], rel=1e-6)
    assert first["paged"][0]["bytes_read"] > first["whole"][1]["bytes_read"]
    assert first["whole"][1]["cached_tokens"] >= 16
    assert (first["whole"][0]["dropped_routing_weight"] > 0) == bool(FAMILIES[name])


def test_an_error_of_one_rank_ends_the_call_on_both(models, golden, tmp_path):
    bundle, parts = Path(models["olmoe"]["bundle"]), Path(models["olmoe"]["parts"])
    damaged = shutil.copytree(parts, tmp_path / "damaged")
    opened = Bundle.open(damaged / "part-2-of-2", parts=True)
    with open(opened.files[0], "r+b") as file:
        for record in opened.experts.values():
            file.seek(record.offset)
            byte = file.read(1)[0]
            file.seek(record.offset)
            file.write(bytes([byte ^ 1]))
    other = tmp_path / "other.emoe"
    checkpoint = Checkpoint(golden["olmoe"][0])
    write_lossless(other, golden["olmoe"][0], checkpoint.config, checkpoint)
    split(other, tmp_path / "other", [1, 1])
    paths = {"parts": [str(bundle), str(parts)], "other": str(tmp_path / "other"), "damaged": str(damaged)}
    first, second = run_program("errors", tmp_path / "out", small=50_000_000, **paths)

    def check(name: str, kind: str, text: str, rank: int = 1) -> None:
        """The rank where it happened says it, and the other one who did."""
        there, here = (second, first) if rank else (first, second)
        assert there[name].startswith(f"{kind}: ") and text in there[name], there[name]
        assert here[name].partition(": ")[2].startswith(f"rank {rank}: ") and text in here[name], here[name]

    split_it = f"{bundle}: is a whole bundle, but each rank runs a part: `edge-moe split {bundle} OUT --parts 2`"
    assert split_it in first["whole bundle"] and split_it in second["whole bundle"]
    mine = f"{parts}/part-1-of-2: is part 1 of 2, layers 0 to 0 of 2, but this is rank 1 of the 2 that mlx.launch has"
    check("part of the other rank", "ValueError", mine)
    assert first["part of another bundle"].startswith("ValueError: the ranks differ in bundle: ")
    assert (
        first["context"] == second["context"] == "ValueError: the ranks differ in context: 32 on rank 0, 33 on rank 1"
    )
    assert second["cap"].startswith("BelowFloor: a cap of 50 MB is below the floor of ")
    assert first["cap"].startswith("MemoryError: rank 1: a cap of 50 MB is below the floor of ")
    check("damaged record", "DamagedFile", f"{damaged}/part-2-of-2/experts-00001-of-00001.safetensors: expert ")
    assert "the ranks are not at the same step" in first["prompt"] and "not at the same step" in second["prompt"]
    assert second["lower cap"].startswith("BelowFloor: ") and first["lower cap"].startswith("MemoryError: rank 1: ")
    assert first["cap then"] == second["cap then"] == "2000000000"
    check("too long", "PromptTooLong", "65 tokens")
    assert first["stopped"] == second["stopped"] == "(2, 'cancelled')"
    assert first["interrupted"].startswith("KeyboardInterrupt: ") and second["interrupted"].startswith(
        "KeyboardInterrupt: "
    )
    assert first["then"] == second["then"] == "True"
    assert first["ended"].startswith("OSError: rank 0: another rank has ended, or the connection to it")


def test_the_first_rank_alone_prints_the_answer(bundle_of, tmp_path):
    bundle, given = bundle_of("reference"), ("--device", "mlx", "--ram", "1GB", "--json", "-n", "5", "--raw", "def f(")
    split(bundle, tmp_path / "out", [1, 1, 1])
    with Runtime(bundle, "8GB", device="mlx") as runtime:
        alone = runtime.generate("def f(", 5)
    done = launch(3, sys.executable, "-m", "edge_moe", "generate", tmp_path / "out", *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == alone.tokens
