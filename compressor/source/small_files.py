"""The small files of a model, without its weights, wherever it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime.hub import HubModel
from ...runtime.model_path import find_model
from .gguf_file import find_gguf
from .gguf_model import unpacked
from .hub_files import tables


@contextmanager
def small_files(model: str | Path) -> Iterator[Path]:
    """The model's own directory or config.json, or one made of a GGUF file's metadata or of what the hub has.

    Of a model on the hub config.json is downloaded, of a bundle all but the weights. Raises what find_model() and
    HubModel.open() raise.
    """
    if (remote := HubModel.open(model)) is not None:
        with tables(remote) as directory:
            yield directory
    elif (file := find_gguf(path := find_model(model, gguf=True))) is not None:
        with unpacked(file) as (directory, _):
            yield directory
    else:
        yield path
