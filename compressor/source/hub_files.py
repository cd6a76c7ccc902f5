"""The files of a checkpoint on the hub: small ones at once, and each shard when a tensor in it is first read."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...runtime.bundle import COPIED, TEMPLATES
from ...runtime.config_file import read_json
from ...runtime.hub import HubModel, write_headers
from ...runtime.tensorfile import Stored

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TO_PLAN = ("config.json", "generation_config.json")


class HubFiles:
    """A temporary directory with a checkpoint's small files, and with its shards as they are fetched into the cache.

    Until forget_headers() the directory has every shard's header, and nothing else of it.
    """

    def __init__(self, model: HubModel, directory: Path):
        model.check()
        self.model, self.directory, self._lock = model, directory, Lock()
        small = [file for file in model.files if file in COPIED or file == INDEX or _is_template(file)]
        for file in ("config.json", *small):
            (directory / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(model.download(file), directory / file)
        shards = [SINGLE] if SINGLE in model.files else self._in_index() if INDEX in model.files else []
        self.sizes = write_headers(model, shards, directory)

    def _in_index(self) -> list[str]:
        shard_of = read_json(self.directory / INDEX).get("weight_map")
        named = set(shard_of.values()) if isinstance(shard_of, dict) else set()
        return [file for file in self.model.files if file in named and "/" not in file]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.sizes.values())

    def forget_headers(self) -> None:
        """Remove the shards that have nothing but a header, so that none can be taken for weights."""
        for file in self.sizes:
            (self.directory / file).unlink()

    def fetch(self, path: Path) -> None:
        """Download a shard, if it is not there."""
        with self._lock:
            if not path.exists():
                path.symlink_to(self.model.download(path.name).resolve())

    def start_of(self, tensor: Stored, most_bytes: int) -> bytes:
        """The first bytes of a tensor; its shard is not downloaded."""
        return self.model.part(tensor.path.name, tensor.offset, min(most_bytes, tensor.nbytes))[0]


@contextmanager
def hub_files(model: HubModel) -> Iterator[HubFiles]:
    with _directory(model) as directory:
        yield HubFiles(model, directory)


@contextmanager
def tables(model: HubModel) -> Iterator[Path]:
    """A temporary directory with what `plan` needs: a checkpoint's config.json, or a bundle without weights."""
    model.check()
    with _directory(model) as directory:
        files = [file for file in model.files if file in TO_PLAN]
        if model.is_bundle:
            files = [file for file in model.files if file.endswith((".json", ".jinja", ".txt")) and "/" not in file]
            weights = [file for file in model.files if file.endswith(".safetensors") and "/" not in file]
            write_headers(model, weights, directory)
        for file in files:
            shutil.copyfile(model.download(file), directory / file)
        yield directory


@contextmanager
def _directory(model: HubModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edge-moe-hub-") as name:
        directory = Path(name) / model.name.replace("/", "--")
        directory.mkdir()
        yield directory


def _is_template(file: str) -> bool:
    return file.startswith(f"{TEMPLATES}/") and file.endswith(".jinja") and file.count("/") == 1
