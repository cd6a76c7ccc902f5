"""A small bundle with all that a bundle can have, and seeded ways to spoil it; test_bundle_mutations.py runs them.

A mutation is *signed* where every checksum and size was made right again afterwards, as whoever makes a hostile bundle
would do, and else *unsigned*, as an accident would leave it.
"""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bundles import Kept, mask_routers_of, write_bundle
from golden_checkpoints import DROPPED, write_checkpoint
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edge_moe import _core
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing import writer
from edge_moe.compressor.writing.writer import Packing, table_bytes
from edge_moe.runtime.bundle import TRUNK_FILE
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.pruning import MASK_FILE

ARCHITECTURES = ("olmoe", "qwen2_moe", "deepseek_v3")
TABLE = "bundle.json"
JSON_FILES = (TABLE, "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
# Of bundle.json: what a model depends on, though it is signed; and what a pruned run depends on beside.
MODEL_KEYS = {"trunk", "experts", "dropped", "top_k", "default_cut"}
PRUNED_KEYS = {*MODEL_KEYS, "pruning"}
HUGE = 3_000_000_000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 31, 32, 64, 4096, 16384, 2**31 - 1, 2**31, 2**32, 2**62, 2**63),
    *(2**64, 10**400, 0.5, -0.0, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "affine"),
    *("bfloat16", "00000000", "../x", "/etc/passwd", "\0", "\ud800", "\x1b[2J", "é" * 40, "x" * 1_000_000, "{{ 1/0 }}"),
    *([], [1], [4, 4, 4], [[]], [None] * 3, list(range(100_000)), {}, {"width": 8}, {"name": "x", "bytes": 1}),
    *({"": {}}, {"a": [{"b": {}}]}, "config.json", "trunk.safetensors", "<|im_end|>", "silu", "linear", "qwen3_moe"),
]  # fmt: skip
# Bits of bfloat16: what is no number, infinities, the largest numbers, zeros and the smallest.
FLOATS = np.array([0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x0000, 0x8000, 0x0001], "<u2")
TEXTS = [
    *(b"", b"{", b"{}", b"[]", b"null", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0" * 100),
    *(b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b"// x\n{}", b'{"x": "' + b"y" * 5_000_000),
]
TEMPLATES = [
    *("{{", "{% for %}", "{{ messages }}", "{{ raise_exception('no') }}", "{{ messages[99].a }}", "{{ 1 // 0 }}", ""),
    *("{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% set x = namespace(a=1) %}{{ x.b.c.d }}", "\0\x1b[2J"),
    *("{{ 10 ** 10 ** 10 }}", "{{ 'x' * 10 ** 10 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "a" * 100_000),
]


def make_bundle(directory: Path, architecture: str) -> Path:
    """DIRECTORY/bundle: experts of several widths in several files, some dropped, a tokenizer with a chat template,
    advice for sampling, pruning by every rule and a certificate."""
    source, _, _ = write_checkpoint(architecture, directory / "source")
    write_tokenizer(source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 0], "do_sample": False, "top_k": 20})
    )
    checkpoint = Checkpoint(source)
    config = replace(checkpoint.config, kept=DROPPED[architecture][0], layer_top_k=DROPPED[architecture][1])
    keys = [(layer, index) for layer, experts in enumerate(config.kept) for index in range(len(experts))]
    experts = {key: Packing(((2, 3, 4), (8, 1, 16), (6, 5, 4))[sum(key) % 3], 32) for key in keys}
    out, before = directory / "bundle", writer.SHARD_BYTES
    writer.SHARD_BYTES = 12_000
    try:
        trunk = trunk_packing(trunk_shapes(config), 6, 32)
        write_bundle(out, source, config, Kept(checkpoint, config), trunk, experts)
    finally:
        writer.SHARD_BYTES = before
    routers = mask_routers_of(config)
    save_file(routers, out / MASK_FILE)
    table, layers = json.loads((out / TABLE).read_text()), len(config.moe_layers)
    scores = ("bits_per_weight", "perplexity", "perplexity_ratio", "kld_mean", "kld_p99", "top1_agreement")
    table |= {
        "method": {"name": "pmq", "spread": 2.5, "flat": False, "drop_counts": "sensitivity"},
        "calibration": {"tokens": 512, "source": "a text", "sha256": "0" * 64, "seed": 0},
        "certificate": {
            "held_out": {"tokens": 256, "source": "another", "sha256": "0" * 64},
            "context": 256,
            "source_perplexity": 3.5,
            "bundle": dict.fromkeys(scores, 0.5),
            "uniform": dict.fromkeys(scores, 0.25),
        },
        "pruning": {
            "default": "loss",
            "cut": 0.2,
            "default_cut": None,
            "rules": {
                "otp": {"cuts": [0.1, 0.3], "prices": [0.1, 0.5]},
                "loss": {"cuts": [0.1, 0.3], "prices": [0.1, 0.5]},
                "share": {"cuts": [0.1, 0.3], "thresholds": [[0.9] * layers, [0.5] * layers]},
                "odp": {"cuts": [0.2], "thresholds": [[0.5] * layers], "protect": 0.02 * config.tells_received},
            },
            "mask_routers": {"bytes": 0, "crc32c": "00000000"},
            "certificate": [dict.fromkeys((*scores[2:], "cut", "reached"), 0.1) | {"tokens": 256}],
        },
    }
    (out / TABLE).write_bytes(table_bytes(table))
    sign(out)
    return out


def write_tokenizer(directory: Path) -> None:
    """A token for each printable character of ASCII and for the ends of messages, in a vocabulary of 128."""
    names = ["<pad>", "<|im_end|>", "<|im_start|>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    backend.save(str(directory / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", "lstrip": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 256}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


# ---- checksums


def sign(path: Path) -> None:
    """Make every size and checksum right again, as far as bundle.json still says where they belong."""
    try:
        table = json.loads((path / TABLE).read_text())
        files = [path / item["name"] for item in table["experts"]["files"]]
        for name in table["copies"]:
            data = (path / name).read_bytes()
            table["copies"][name] = hashlib.sha256(data).hexdigest()
            if "copy_bytes" in table:
                table["copy_bytes"][name] = len(data)
        contents = {file: file.read_bytes() for file in {path / TRUNK_FILE, *files}}
        trunk = contents[path / TRUNK_FILE]
        table["trunk"] |= {"bytes": len(trunk), "crc32c": f"{_core.crc32c(trunk, 0):08x}"}
        for item, file in zip(table["experts"]["files"], files, strict=True):
            item["bytes"] = len(contents[file])
        sizes = [layout["bytes"] for layout in table["experts"]["layouts"]]
        for row in table["experts"]["records"]:
            for item in row:
                record = contents[files[item["file"]]][item["offset"] : item["offset"] + sizes[item["layout"]]]
                item["crc32c"] = f"{_core.crc32c(record, 0):08x}"
        if (path / MASK_FILE).exists():
            data = (path / MASK_FILE).read_bytes()
            table["pruning"]["mask_routers"] = {"bytes": len(data), "crc32c": f"{_core.crc32c(data, 0):08x}"}
        (path / TABLE).write_bytes(table_bytes(table))
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        sign_table(path)


def sign_table(path: Path) -> None:
    """Make bundle.json's own checksum right again, where it is an object still."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        (path / TABLE).write_bytes(table_bytes(json.loads((path / TABLE).read_text())))


# ---- mutations


@dataclass(frozen=True, slots=True)
class Mutation:
    """What was done: to be read, and what may follow from it."""

    what: str
    signed: bool
    same: bool  # a run that is not refused must give what it gave before
    pruned_same: bool  # and so must a pruned one
    unlisted: bool = False  # a file was added that a bundle made before sizes were listed uses unchecked


def mutate(path: Path, seed: int) -> Mutation:
    """Spoil the bundle at `path` in the way of this seed."""
    rng = random.Random(seed)
    kinds = {edit_json: 50, edit_bytes: 14, edit_header: 8, edit_weights: 8, replace_file: 8, cut: 6, add_file: 6}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    old = rng.random() < 0.1
    if old:  # as bundles were before
        table = json.loads((path / TABLE).read_text())
        del table["copy_bytes"]
        (path / TABLE).write_bytes(table_bytes(table))
    made = kind(path, rng, old)
    return replace(made, what=f"{made.what}{', signed' if made.signed else ''}{', old' if old else ''}")


def edit_json(path: Path, rng: random.Random, old: bool) -> Mutation:
    """Values of every type and size at any place; keys and items taken away, doubled, exchanged and added."""
    name = rng.choices(JSON_FILES, (60, 15, 8, 8, 9))[0]
    if rng.random() < 0.06:
        return text_instead(path, rng, name)
    value = json.loads((path / name).read_text())
    tops, told = set(), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        top, said = edit_value(value, rng)
        tops.add(top), told.append(said)
    try:
        (path / name).write_text(json.dumps(value))
    except (ValueError, RecursionError):  # it was put inside itself
        (path / name).write_text("[" * 3000)
    signed = rng.random() < 0.9
    if signed:
        sign_table(path) if name == TABLE else sign(path)
    same, pruned_same = (not signed or (name == TABLE and not tops & keys) for keys in (MODEL_KEYS, PRUNED_KEYS))
    return Mutation(f"{name}: {'; '.join(told)}", signed, same, pruned_same)


def edit_value(value, rng: random.Random) -> tuple[str, str]:
    """Change one place of a JSON value; gives the outermost name that it is under, and words."""
    at = list(places(value))
    if not at:  # all was taken away before
        return "", "nothing is left"
    tops = sorted({str(path[0]) for _, _, path in at})  # else records would be nearly all that is ever changed
    top = rng.choice(tops) if rng.random() < 0.5 else None
    container, key, path = rng.choice([one for one in at if top in (None, str(one[2][0]))])
    own = path[-1] in ("frequency", "default_cut")
    top = str(path[-1 if own else 0])
    shown, action = ".".join(map(str, path)), rng.random()
    if action < 0.65:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))
        return top, f"{shown} = {str(container[key])[:40]!r}"
    if action < 0.8:
        del container[key]
        return top, f"{shown} taken away"
    if action < 0.9:
        other, its, where = rng.choice(at)
        container[key] = copy.deepcopy(other.get(its) if isinstance(other, dict) else other[its : its + 1])
        return top, f"{shown} = {'.'.join(map(str, where))}"
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
        return top, f"{shown} doubled"
    container[rng.choice(("x", "", "\x1b[2J", "a/b", "__class__"))] = rng.choice(HOSTILE)
    return ("x" if len(path) == 1 else top), f"a key beside {shown}"


def places(value, path=()) -> Iterator[tuple]:
    """Every (container, key, path to it) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key, (*path, key)
        yield from places(child, (*path, key))


def text_instead(path: Path, rng: random.Random, name: str) -> Mutation:
    text = rng.choice(TEXTS)
    (path / name).write_bytes(text)
    signed = rng.random() < 0.9 and name != TABLE
    if signed:
        sign(path)
    return Mutation(f"{name} is {text[:20]!r}", signed, same=not signed, pruned_same=not signed)


def edit_bytes(path: Path, rng: random.Random, old: bool) -> Mutation:
    """A few bytes of any file."""
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))] = rng.randrange(256)
    file.write_bytes(data)
    return done(path, rng, f"bytes of {file.name}", signed=rng.random() < 0.5 and file.name != TABLE)


def edit_weights(path: Path, rng: random.Random, old: bool) -> Mutation:
    """Numbers of the trunk, of records or of mask routers, infinities and what is no number among them."""
    file = rng.choice([one for one in sorted(path.iterdir()) if one.suffix == ".safetensors"])
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 4, 64))):
        at = rng.randrange(start, len(data) - 1) // 2 * 2
        data[at : at + 2] = (
            rng.choice(FLOATS).tobytes() if rng.random() < 0.5 else rng.randrange(1 << 16).to_bytes(2, "little")
        )
    file.write_bytes(data)
    return done(path, rng, f"weights of {file.name}", signed=rng.random() < 0.9)


def edit_header(path: Path, rng: random.Random, old: bool) -> Mutation:
    """The header of a safetensors file."""
    file = rng.choice([one for one in sorted(path.iterdir()) if one.suffix == ".safetensors"])
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = [edit_value(header, rng)[1] for _ in range(rng.choice((1, 1, 2)))]
    text = json.dumps(header).encode()
    if rng.random() < 0.7:
        text = text.ljust(length)
    claims = rng.choice((0, 1, 2, 2**20, 2**62, 2**64 - 1, length + 1))
    length = claims if rng.random() < 0.1 else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :])
    return done(path, rng, f"header of {file.name}: {'; '.join(told)}", signed=rng.random() < 0.9)


def cut(path: Path, rng: random.Random, old: bool) -> Mutation:
    """A file that ends early, or goes on."""
    file = rng.choice(sorted(path.iterdir()))
    size = file.stat().st_size
    grows = rng.random() < 0.4
    end = size + rng.choice((1, 4096, 100_000, HUGE)) if grows else rng.choice((0, 1, 7, 8, size // 2, size - 1))
    os.truncate(file, end)
    signed = rng.random() < 0.6 and end < HUGE and file.name != TABLE
    if not signed and end >= HUGE and rng.random() < 0.5:
        sign_huge(path, file.name, end)
        return Mutation(f"{file.name} of {end:,} bytes, its size signed", True, same=True, pruned_same=True)
    return done(path, rng, f"{file.name} of {end:,} bytes", signed=signed)


def sign_huge(path: Path, name: str, size: int) -> None:
    """Make the size of a file right, not its checksum, which would take seconds."""
    table = json.loads((path / TABLE).read_text()) if name != TABLE else {}
    if name in table.get("copy_bytes", {}):
        table["copy_bytes"][name] = size
    for item in (*table.get("experts", {}).get("files", ()), {"name": TRUNK_FILE}, {"name": MASK_FILE}):
        if item["name"] == name:
            holder = {TRUNK_FILE: table["trunk"], MASK_FILE: table["pruning"]["mask_routers"]}.get(name, item)
            holder["bytes"] = size
    if table:
        (path / TABLE).write_bytes(table_bytes(table))


def replace_file(path: Path, rng: random.Random, old: bool) -> Mutation:
    """No file, or something that is none, in the place of a file."""
    file = rng.choice(sorted(path.iterdir()))
    inside, outside = path / f"own-{file.name}", path.parent / f"outside-{file.name}"
    shutil.copyfile(file, outside)
    how = rng.choice(
        ("gone", "directory", "fifo", "link out", "link in", "dangling", "circle", "zero", "environ", "other")
    )
    if how == "link in":
        os.replace(file, inside)
    else:
        file.unlink()
    {
        "gone": lambda: None,
        "directory": file.mkdir,
        "fifo": lambda: os.mkfifo(file),
        "link out": lambda: file.symlink_to(outside),
        "link in": lambda: file.symlink_to(inside.name),
        "dangling": lambda: file.symlink_to("nowhere"),
        "circle": lambda: file.symlink_to(file.name),
        "zero": lambda: file.symlink_to("/dev/zero"),
        "environ": lambda: file.symlink_to("/proc/self/environ"),
        "other": lambda: shutil.copyfile(rng.choice([one for one in sorted(path.iterdir()) if one.is_file()]), file),
    }[how]()
    signed = how == "other" and rng.random() < 0.5 and file.name != TABLE
    return done(path, rng, f"{file.name} is {how}", signed=signed)


def add_file(path: Path, rng: random.Random, old: bool) -> Mutation:
    """A file that bundle.json does not list; some would be used."""
    table = json.loads((path / TABLE).read_text())
    used = ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    more = "additional_chat_templates/default.jinja"
    name = rng.choice(
        (*used, more, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "README.md")
    )
    content = rng.choice((*TEXTS[:12], *(one.encode("utf-8", "replace") for one in TEMPLATES), b'{"eos_token_id": 7}'))
    if name in used and rng.random() < 0.5:  # listed, and another
        (path / name).write_bytes(content)
        sign(path)
        return Mutation(f"{name} is {content[:20]!r}", True, same=False, pruned_same=False)
    table["copies"].pop(name, None)
    if "copy_bytes" in table:
        table["copy_bytes"].pop(name, None)
    (path / TABLE).write_bytes(table_bytes(table))
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    unlisted = name != "README.md"
    return Mutation(f"{name}, unlisted, is {content[:20]!r}", True, not unlisted, not unlisted, unlisted=unlisted)


def done(path: Path, rng: random.Random, what: str, signed: bool) -> Mutation:
    if signed:
        sign(path)
    return Mutation(what, signed, same=not signed, pruned_same=not signed)


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def restore(path: Path, files: dict[str, bytes]) -> None:
    """Make the bundle's directory what it was, without touching the files that are."""
    for file in list(path.iterdir()):
        if file.name not in files or file.is_symlink() or not file.is_file():
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    for name, content in files.items():
        file = path / name
        if not file.exists() or file.stat().st_size != len(content) or file.read_bytes() != content:
            file.write_bytes(content)
