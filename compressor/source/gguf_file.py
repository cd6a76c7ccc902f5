"""Reading the headers of GGUF files, one or all of a split model, with the package gguf."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...runtime.model_path import gguf_in, is_gguf
from ...runtime.tensorfile import Stored
from . import codes

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensors of a GGUF file, or of all files of a split one."""

    path: Path
    fields: dict[str, object]
    tensors: dict[str, Stored]  # by GGUF's names

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    @property
    def layers(self) -> int:
        """The number of layers, without those for multi-token prediction."""
        return (self.value("block_count") or 0) - (self.value("nextn_predict_layers") or 0)

    def value(self, key: str):
        """A value of the metadata by its key without the architecture; None if it is not there.

        Numbers were float32, and have the digits that these keep.
        """
        value = self.fields.get(f"{self.architecture}.{key}")
        return float(f"{value:.7g}") if isinstance(value, float) else value


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and of the other files of a split one.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged, and another OSError without
    the package gguf.
    """
    fields: dict[str, object] = {}
    tensors: dict[str, Stored] = {}
    for number, file in enumerate(_files(path)):
        reader = _reader(file)
        if number == 0:
            fields = {name: its.contents() for name, its in reader.fields.items()}
        for tensor in reader.tensors:
            kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
            if tensor.data_offset + tensor.n_bytes > file.stat().st_size:
                raise ValueError(f"{file}: tensor {tensor.name} goes beyond the end; download it again")
            dtype = kind if kind in ("F32", "F16", "BF16") else codes.GGML + kind
            tensors[tensor.name] = Stored(file, dtype, shape, int(tensor.data_offset), int(tensor.n_bytes))
    return GgufFile(path, fields, tensors)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: the file itself, or the only model of a directory without safetensors."""
    return path if is_gguf(path) else gguf_in(path) if path.is_dir() else None


def _files(path: Path) -> list[Path]:
    """All files of a split model, of which `path` is one, or the file itself."""
    if not (name := SHARD.fullmatch(path.name)):
        return [path]
    count = int(name[3])
    files = [path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{absent[0]}: no such file, one of the {count} of {path}; download it")
    return files


def _reader(path: Path):
    try:
        from gguf import GGUFReader
    except ImportError:
        raise OSError(f"{path}: reading GGUF files needs the package gguf; pip install 'edge-moe[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: is not a GGUF file, or is cut short ({error}); download it again") from None
