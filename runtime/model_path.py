"""Resolving what names a model to its directory, with errors that recognise what else the path may be.

Errors say what to do: most paths that fail are a GGUF file, a checkpoint that is quantised already, or an incomplete
download.
"""

import os
import re
from pathlib import Path

from .hub import bundle_of

POINTER = b"version https://git-lfs"
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
METHODS = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes"}


def utf8_path(path: str | Path) -> Path:
    """The path. Raises ValueError if it is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise ValueError(f"{shown}: this path is not UTF-8; rename it") from None
    return Path(path)


def find_model(path: str | Path, gguf: bool = False) -> Path:
    """The directory that holds a model's files: `path` itself, or the snapshot of a folder of the hub's cache.

    A bundle on the hub is downloaded. gguf: a GGUF file is a model, too. Raises ValueError for a file of another
    format, with what to do, and what bundle_of() raises. Other errors are left to the code that reads the path.
    """
    if (bundle := bundle_of(path)) is not None:
        return bundle
    path = Path(path)
    if path.is_file() and not (gguf and is_gguf(path)):
        raise_if_other_format(path)
    return _snapshot(path) if path.is_dir() else path


def _snapshot(path: Path) -> Path:
    """The snapshot of models--ORG--NAME, the one that `main` names or the only one."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    reference = path / "refs" / "main"
    if reference.is_file():
        name = reference.read_bytes()[:64].decode("ascii", "replace").strip()
        if re.fullmatch(r"[0-9a-f]+", name) and (snapshots / name).is_dir():
            return snapshots / name
    found = sorted(one for one in snapshots.iterdir() if one.is_dir())
    if len(found) == 1:
        return found[0]
    raise FileNotFoundError(f"{path}: is a hub cache with {len(found)} snapshots and none is main; name one of them")


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(len(POINTER))
    return head.startswith(b"GGUF") or (path.suffix == ".gguf" and head != POINTER)


def gguf_in(directory: Path) -> Path | None:
    """The GGUF file of a directory that has no safetensors, or the first file of its only split one.

    Raises ValueError if there are several models.
    """
    names = sorted(one.name for one in directory.iterdir())
    found = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    if len({re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name) for name in found}) > 1:
        raise ValueError(f"{directory}: has several GGUF models, {found[0]} and others; name one of them")
    return directory / found[0]


def raise_if_other_format(path: Path) -> None:
    """Raise ValueError for a file or directory of an unsupported format, naming the format."""
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir())
        if gguf := [name for name in names if name.endswith(".gguf")]:
            raise ValueError(_gguf(path / gguf[0]))
        pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt")) and "model" in name.lower()]
        if pickled:
            raise ValueError(
                f"{path / pickled[0]}: is a PyTorch file; edge-moe reads safetensors: download the checkpoint in that "
                "format, or load it with transformers and save_pretrained() it"
            )
        return
    with open(path, "rb") as file:
        head = file.read(64)
    check_pointer(path, head)
    if is_gguf(path):
        raise ValueError(_gguf(path))
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: is one file of a checkpoint; name its directory, {path.parent}")


def _gguf(path: Path) -> str:
    return f"{path}: is a GGUF file, not a bundle; make one with `edge-moe compress {path} OUT`"


def check_pointer(path: Path, head: bytes) -> None:
    """Raise ValueError if a file that begins with `head` is a Git LFS pointer."""
    if head.startswith(POINTER):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def quantisation_in(raw: dict):
    """What a config.json says of quantised weights, the language model's part of it too; None if it says nothing."""
    inner = raw.get("text_config")
    for keys in (raw, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "quantization"):  # the latter is MLX's
            if keys.get(key) is not None:
                return keys[key]
    return None


def check_quantised(quantisation, where: str) -> None:
    """Raise ValueError if quantisation_in() names one of METHODS, which are not supported."""
    config = quantisation if isinstance(quantisation, dict) else {}
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        return
    bits = config.get("bits") or config.get("w_bit") or (4 if config.get("load_in_4bit") else None)
    group = config.get("group_size") or config.get("q_group_size")
    told = [f"{bits} bits"] * isinstance(bits, int) + [f"group {group}"] * (isinstance(group, int) and group > 0)
    told = f" ({', '.join(told)})" if told else ""
    raise ValueError(
        f"{where}: is quantised with {METHODS[method]}{told}; edge-moe compresses from the original checkpoint: "
        "download that one"
    )


def what_it_is(raw: dict) -> str:
    """An addition to the error about an unsupported architecture, such as that it is a dense model."""
    inner = [its for its in raw.values() if isinstance(its, dict)]
    if any(its.get(key) for its in (raw, *inner) for key in EXPERT_KEYS) or not isinstance(raw.get("model_type"), str):
        return ""
    return "; this is a dense model, and edge-moe runs mixtures of experts"
