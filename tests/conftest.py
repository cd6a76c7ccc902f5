"""Bundles that many tests read, each made once a session; a test that damages one works on a copy."""

import shutil
import signal
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE, Kept, write_bundle
from golden_checkpoints import CHECKPOINTS, DROPPED, write_checkpoint

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.tokenizer import Tokenizer

# What tests need beside this package and its dependencies, by words of the reasons they are skipped for without it.
CHECKS = {
    "arm": ("g++-aarch64", "qemu-user"),
    "parity": ("'torch'", "'transformers'"),
    "mlx": ("'mlx.",),
    "clang": ("clang++",),
    "nvcc": ("nvcc",),
    "sanitizers": ("sanitizers",),
}
missing = {}  # by check: a reason


def pytest_addoption(parser):
    parser.addoption("--all-hostile", action="store_true", help="take all 200 runs of test_hostile_prompts.py")
    parser.addoption("--must-run", action="append", default=[], choices=CHECKS, help="fail where this check is skipped")


def pytest_configure():
    # What a shell ignores for a job in the background, or `nohup` for one that outlives it, tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        missing.update((check, reason) for check, words in CHECKS.items() if any(word in reason for word in words))


pytest_collectreport = pytest_runtest_logreport


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and missing.keys() & set(session.config.getoption("--must-run")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return  # of some tests alone
    terminalreporter.section("beside the package")
    for check in CHECKS:
        must = " (--must-run)" if check in missing.keys() & set(config.getoption("--must-run")) else ""
        terminalreporter.line(f"{check}: {'not run' + must + ', ' + missing[check] if check in missing else 'ran'}")


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray, np.ndarray]]:
    """By name: checkpoint, token ids (32,), transformers' logits (32, vocab)."""
    directory = tmp_path_factory.mktemp("golden")
    return {name: write_checkpoint(name, directory / name) for name in CHECKPOINTS}


@pytest.fixture(scope="session")
def bundle_of(golden, tmp_path_factory):
    """bundle_of("olmoe", width=3) is the path of that bundle; "reference" is the embedded model. Not to be changed."""
    directory, made = tmp_path_factory.mktemp("bundles"), {}

    def make(name: str, **options) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            source = REFERENCE if name == "reference" else golden[name][0]
            if not options.keys() & {"method", "calibration"}:
                options["method"] = "rtn"  # needs no text, and is quick
            made[key] = compress(source, directory / f"{len(made)}.emoe", threads=1, **options).path
        return made[key]

    return make


@pytest.fixture(scope="session")
def templated(tmp_path_factory) -> Path:
    """The embedded model with a chat template."""
    directory = tmp_path_factory.mktemp("templated")
    shutil.copytree(REFERENCE, directory, dirs_exist_ok=True)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if enable_thinking is defined %}thinks: {{ enable_thinking }}\n{% endif %}assistant:"
    )
    return compress(directory, directory / "templated.emoe", width=8, method="rtn").path


@pytest.fixture(scope="session")
def templated_with_tools(tmp_path_factory) -> Path:
    """The embedded model with a chat template that has tools, and calls in Hermes' form."""
    directory = tmp_path_factory.mktemp("tools")
    shutil.copytree(REFERENCE, directory, dirs_exist_ok=True)
    (directory / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}\n"
        "{% endfor %}assistant:{% if enable_thinking %}<think>\n{% endif %}"
    )
    return compress(directory, directory / "tools.emoe", width=8, method="rtn").path


@pytest.fixture(scope="session")
def mixed(bundle_of, golden, tmp_path_factory):
    """By architecture: a bundle whose experts have several widths, chosen by calibration on token ids."""
    directory = tmp_path_factory.mktemp("calibration")

    def make(architecture: str):
        file = directory / f"{architecture}.npy"
        if not file.exists():
            vocab = golden[architecture][2].shape[1]
            np.save(file, np.random.default_rng(3).integers(0, vocab, 1024))
        return bundle_of(architecture, method="pmq", bits=8, calibration=str(file), tokens=512, trunk_width=6)

    return make


@pytest.fixture(scope="session")
def dropped_of(golden, tmp_path_factory):
    """dropped_of("olmoe", (2, 3, 4)) is the path of a bundle without the experts of DROPPED, whose experts have these
    widths of gate, up and down in turn; each expert differs from the next. Not to be changed."""
    directory, made = tmp_path_factory.mktemp("dropped"), {}

    def make(name: str, widths: tuple[int, int, int]) -> Path:
        if (name, widths) not in made:
            source = golden[name][0]
            kept, layer_top_k = DROPPED[name]
            checkpoint = Checkpoint(source)
            config = replace(checkpoint.config, kept=kept, layer_top_k=layer_top_k)
            keys = [(layer, index) for layer, experts in enumerate(kept) for index in range(len(experts))]
            turned = {key: Packing(widths[sum(key) % 3 :] + widths[: sum(key) % 3], 32) for key in keys}
            trunk = trunk_packing(trunk_shapes(config), min(widths), 32)
            out = directory / f"{len(made)}.emoe"
            made[name, widths] = write_bundle(out, source, config, Kept(checkpoint, config), trunk, turned)
        return made[name, widths]

    return make


@pytest.fixture
def copy_of(bundle_of, tmp_path):
    """As bundle_of, but the test's own copy."""

    def make(name: str, **options) -> Path:
        return shutil.copytree(bundle_of(name, **options), tmp_path / f"{name}.emoe")

    return make


@pytest.fixture(scope="session")
def stdlib_ids() -> list[int]:
    """1,024 tokens of the standard library's source."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    return Tokenizer(REFERENCE).encode(text[:20_000])[:1024]


@pytest.fixture(scope="session")
def stdlib_calibration(tmp_path_factory) -> tuple[Path, Path]:
    """Files of token ids of the standard library's source, none of them in stdlib_ids: 8 sequences of 256 to calibrate
    on and 4 to hold out."""
    directory, stdlib = tmp_path_factory.mktemp("stdlib"), Path(sysconfig.get_paths()["stdlib"])

    def save(name: str, sources: tuple[str, ...], tokens: int) -> Path:
        text = "".join((stdlib / source).read_text(encoding="utf-8")[:10_000] for source in sources)
        np.save(directory / name, Tokenizer(REFERENCE).encode(text)[:tokens])
        return directory / name

    return save("ids.npy", ("ast.py", "csv.py", "tarfile.py"), 2048), save("held-out.npy", ("zipfile.py",), 1024)


@pytest.fixture(scope="session")
def calibrated(stdlib_calibration, tmp_path_factory) -> Bundle:
    """The embedded model at 2 bits, rounded for stdlib_calibration and certified. Not to be changed."""
    ids, held_out = stdlib_calibration
    options = {"calibration": ids, "held_out": held_out, "tokens": 2048, "threads": 1}
    return compress(REFERENCE, tmp_path_factory.mktemp("calibrated") / "2.emoe", width=2, method="uniform", **options)
