"""What type checkers and editors see of edge_moe: misspelt options and attributes of a client are found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edge_moe
from edge_moe import _core, bench, compressor, devices, runtime

pytest.importorskip("mypy")
CLIENT = """
from edge_moe import BelowFloor, Generation, Plan, Runtime, Stream, benchmark, compress, evaluate, examine, plan

def ask(path: str) -> str:
    with Runtime(path, ram="8GB", kv="float32") as model:
        table: str = str(model.plan)
        answer = model.generate("Once", max_tokens=5, temperature=0.5, stop=["x"], timeout=2.5)
        with model.stream([{"role": "user", "content": "hi"}], top_k=3) as stream:
            pieces: Stream[Generation] = stream
            for piece in pieces:
                table += piece.text
            stream.cancel()
        both: list[Generation] = model.batch(["Once", {"prompt": [1, 2], "prune": 0.2}], 5, temperature=0.5)
        return answer.text + table + both[0].text

async def ask_later(model: Runtime) -> str:
    text = ""
    async with model.stream_async("Once", top_k=3) as stream:
        async for piece in stream:
            text += piece.text
    return text

def others(path: str) -> Plan:
    compress("MODEL", path, bits=2.5, calibration=["my.txt"])
    evaluate(path, "held_out.txt", against="MODEL")
    benchmark(path, ram="8GB", prompt=16)
    examine(".")
    try:
        return plan("config.json", ram="8GB").plan
    except BelowFloor as error:
        return error.plan
"""
WRONG = {
    'Runtime("m", rma="8GB")': 'Unexpected keyword argument "rma"',
    "Runtime(42)": 'Argument 1 to "Runtime" has incompatible type "int"',
    'Runtime("m").generate("x", temprature=0.5)': 'Unexpected keyword argument "temprature"',
    'Runtime("m").generate("x", temperature="hot")': 'Argument "temperature" to "generate"',
    'Runtime("m").stream("x", max_token=3)': 'Unexpected keyword argument "max_token"',
    'Runtime("m").batch(["x"], temprature=0.5)': 'Unexpected keyword argument "temprature"',
    'Runtime("m").generate("x").txt': '"Generation" has no attribute "txt"',
    'next(Runtime("m").stream("x")).txt': '"Generation" has no attribute "txt"',
    'Runtime("m").stream("x").cancle()': 'has no attribute "cancle"',
    'Runtime("m").plan.slot_size': '"Plan" has no attribute "slot_size"',
    'compress("m", "o", bitz=2)': 'Unexpected keyword argument "bitz"',
    'evaluate("b", "t", agianst="m")': 'Unexpected keyword argument "agianst"',
    'plan("b", rma=1)': 'Unexpected keyword argument "rma"',
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The package as an installation has it, whichever way it was installed, and a place for clients."""
    root = tmp_path_factory.mktemp("typing")
    package = root / "edge_moe"
    package.mkdir()
    core = Path(_core.__file__).parent
    for file in [*Path(edge_moe.__file__).parent.iterdir(), core / "_core.pyi", core / "py.typed"]:
        if not (package / file.name).exists():
            (package / file.name).symlink_to(file)
    for part in (runtime, compressor, devices, bench):
        path = package / part.__name__.split(".")[1]
        if not path.exists():
            path.symlink_to(Path(part.__file__).parent)
    return root


def mypy(tree: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tree / "cache"), *arguments],
        capture_output=True,
        text=True,
        cwd=tree,
        env={**os.environ, "MYPYPATH": str(tree)},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_client_that_is_right_passes_and_what_is_misspelt_is_found(tree):
    lines = "\n".join(f"{call}  # line" for call in WRONG)
    (tree / "client.py").write_text(CLIENT)
    (tree / "wrong.py").write_text(f"from edge_moe import Runtime, compress, evaluate, plan\n{lines}\n")
    (tree / "client.ini").write_text("[mypy]\nstrict = True\n[mypy-edge_moe.*]\nignore_errors = True\n")  # as installed
    strict = ("--config-file", "client.ini", "--python-version", "3.10")
    code, found = mypy(tree, *strict, "client.py")
    assert (code, found) == (0, "Success: no issues found in 1 source file\n"), found
    code, found = mypy(tree, *strict, "wrong.py")
    assert code == 1
    for number, (call, message) in enumerate(WRONG.items(), start=2):
        errors = [line for line in found.splitlines() if line.startswith(f"wrong.py:{number}: error")]
        assert any(message in error for error in errors), f"{call}: {found}"
    assert len(re.findall(r": error: ", found)) == len(WRONG)


def test_pyright_finds_the_same(tree):
    """As editors show it: by an installation with py.typed, sources that are nobody's business left alone."""
    pytest.importorskip("pyright")
    lines = "\n".join(WRONG)
    (tree / "client.py").write_text(CLIENT)
    (tree / "wrong.py").write_text(f"from edge_moe import Runtime, compress, evaluate, plan\n{lines}\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "client.py", "wrong.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {(Path(one["file"]).name, one["range"]["start"]["line"]) for one in found if one["severity"] == "error"}
    assert errors == {("wrong.py", number) for number in range(1, len(WRONG) + 1)}, found


def test_what_programs_import_is_typed_without_errors(tree):
    settings = Path(__file__).parent.parent / "pyproject.toml"
    if not settings.is_file():
        pytest.skip("not in a source tree")
    assert mypy(tree, "--config-file", str(settings))[1].startswith("Success: no issues found in 9 source files")


def test_every_public_name_is_there_and_is_what_type_checkers_see():
    assert edge_moe.__all__ == [*sorted(edge_moe._HOMES), "__version__"]
    for name in edge_moe.__all__:
        assert getattr(edge_moe, name) is not None
    assert issubclass(edge_moe.BelowFloor, MemoryError) and issubclass(edge_moe.BelowFloor, edge_moe.EdgeMoeError)
    with pytest.raises(AttributeError, match="^module 'edge_moe' has no attribute 'Runtimes'$"):
        edge_moe.Runtimes  # noqa: B018
