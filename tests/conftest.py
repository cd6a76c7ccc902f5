"""Bundles that many tests read, each made once a session; a test that damages one works on a copy."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE
from golden_checkpoints import ARCHITECTURES, write_checkpoint

from edge_moe.compressor.pipeline import compress
from edge_moe.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray, np.ndarray]]:
    """By architecture: checkpoint, token ids (32,), transformers' logits (32, vocab)."""
    directory = tmp_path_factory.mktemp("golden")
    return {name: write_checkpoint(name, directory / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def bundle_of(golden, tmp_path_factory):
    """bundle_of("olmoe", width=3) is the path of that bundle; "reference" is the embedded model. Not to be changed."""
    directory, made = tmp_path_factory.mktemp("bundles"), {}

    def make(name: str, **options) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            source = REFERENCE if name == "reference" else golden[name][0]
            if not options.keys() & {"method", "calibration"}:
                options["method"] = "uniform"
            made[key] = compress(source, directory / f"{len(made)}.emoe", threads=1, **options).path
        return made[key]

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
