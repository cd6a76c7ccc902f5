"""What several tests need: the embedded model's place, ways to damage a bundle, an engine of chosen sizes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_moe import _core
from edge_moe.bench import EMBEDDED
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.rounding.quantise import quantise, trunk_packing
from edge_moe.compressor.rounding.round_tables import write_table
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import BundleWriter, Packing, table_bytes
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle, verify
from edge_moe.runtime.config import ModelConfig, trunk_shapes
from edge_moe.runtime.engine_config import engine_config
from edge_moe.runtime.models import FAMILIES
from edge_moe.runtime.pruning import LEARNED, MASK_FILE, mask_router_shape
from edge_moe.runtime.runtime import Runtime

REFERENCE = EMBEDDED
NOTHING, LAST, ALL = 0, 1, 2  # rows of logits that Engine.forward returns


def changed(value, **changes):
    """A description with other values; a dict changes some of a part's. Of a model, those of every layer, too."""
    names = {field.name for field in fields(value)}
    own = {
        name: changed(getattr(value, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
        if name in names
    }
    if "layers" in names:
        rest = {name: change for name, change in changes.items() if name not in names}
        of_attention = {**rest, **changes.get("attention", {})}
        own["layers"] = tuple(
            replace(
                layer,
                attention=layer.attention and changed(layer.attention, **of_attention),
                mlp=layer.mlp and changed(layer.mlp, **rest),
            )
            for layer in value.layers
        )
    return replace(value, **own)


def logits_of(path: Path, ids, **options) -> np.ndarray:
    """Of every position, from keys and values in full precision, with whatever else a Runtime takes."""
    with Runtime(path, context=len(ids), **{"kv": "float32", "prune": "off", **options}) as runtime:
        return runtime.logits(ids)


def use(path: Path, ids) -> np.ndarray:
    """All that can be done with a bundle: open, verify and run it."""
    for _ in verify(Bundle.open(path)):
        pass
    return logits_of(path, ids, ram="2GB", threads=1)


class Kept:
    """A checkpoint's weights without the experts that `config.kept` leaves out."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        self.checkpoint, self.kept = checkpoint, config.kept

    def trunk(self, name: str) -> np.ndarray:
        weights = self.checkpoint.trunk(name)
        if name.endswith(".router_table"):
            kept = self.kept[int(name.split(".")[1])]
            return np.array([[kept.index(its) if its in kept else -1 for its in row] for row in weights], np.float32)
        of_router = name.endswith((".router", ".router_bias", ".router_logit_bias", ".expert_scale"))
        return weights[list(self.kept[int(name.split(".")[1])])] if of_router else weights

    def table_part(self, name: str, first: int, count: int) -> np.ndarray:
        return self.checkpoint.table_part(name, first, count)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.checkpoint.rows(name, rows)

    def expert(self, layer: int, index: int) -> tuple[np.ndarray, ...]:
        return self.checkpoint.expert(layer, self.kept[layer][index])

    def expert_bias(self, layer: int, index: int) -> tuple[np.ndarray, ...]:
        return self.checkpoint.expert_bias(layer, self.kept[layer][index])


def weights_of(path: Path) -> BundleWeights:
    """What a bundle's codes, scales and biases stand for."""
    return BundleWeights(Bundle.open(path))


def write_bundle(
    out: Path, source: Path, config: ModelConfig, weights, trunk: dict[str, Packing], experts: dict, **options
) -> Path:
    """Write the bundle of a Checkpoint's or Kept's weights in these packings."""
    with BundleWriter(out, source, config, trunk, experts, **options) as writer:
        for name, packing in trunk.items():
            writer.write_trunk(name, quantise(weights.trunk(name), packing.widths[0], packing.group))
        for key, packing in experts.items():
            matrices = zip(weights.expert(*key), packing.widths, strict=True)
            packed = [quantise(matrix, width, packing.group) for matrix, width in matrices]
            writer.write_expert(*key, packed, reference.expert_bias(config, weights, *key))
        for table in writer.tables:
            write_table(writer, table, weights, threads=1)
        writer.finish()
    return out


def write_lossless(out: Path, source: Path, config: ModelConfig, weights) -> Path:
    """Write the bundle that has every weight as the checkpoint has it."""
    kept = [(layer, index) for layer in config.moe_layers for index in range(config.experts_of(layer))]
    trunk = trunk_packing(trunk_shapes(config), 16, 32)
    return write_bundle(out, source, config, weights, trunk, dict.fromkeys(kept, Packing((16,) * 3, 32)))


def with_output_bias(golden, tmp_path: Path, monkeypatch, width: int) -> Path:
    """The OLMoE of golden/ at one width, each product of whose experts has a random bias.

    No family has them and nothing else; OLMoE's says that it does until the test ends.
    """
    family = FAMILIES["olmoe"]

    def parse(keys):
        config = family.parse(keys)
        layers = (replace(layer, mlp=replace(layer.mlp, output_bias=True)) for layer in config.layers)
        return replace(config, layers=tuple(layers))

    monkeypatch.setitem(FAMILIES, "olmoe", replace(family, parse=parse))
    source, rng = golden["olmoe"][0], np.random.default_rng(3)
    checkpoint = Checkpoint(source)
    config, trunk = checkpoint.config, trunk_packing(trunk_shapes(checkpoint.config), 16, 32)
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts)]
    sizes = (config.expert_hidden, config.expert_hidden, config.dim)
    with BundleWriter(
        tmp_path / "biased.emoe", source, config, trunk, dict.fromkeys(keys, Packing((width,) * 3, 32))
    ) as writer:
        for name, packing in trunk.items():
            writer.write_trunk(name, quantise(checkpoint.trunk(name), packing.widths[0], packing.group))
        for key in keys:
            matrices = [quantise(matrix, width, 32) for matrix in checkpoint.expert(*key)]
            writer.write_expert(*key, matrices, [rng.standard_normal(size).astype(np.float32) for size in sizes])
        writer.finish()
    return writer.out


def make_engine(
    path: Path,
    *,
    slots: float | None = None,
    threads: int = 1,
    chunk: int = 32,
    context: int = 64,
    kernels: str = "",
    kv: str = "float32",
    config: ModelConfig | None = None,
    device: str = "cpu",
    sequences: int = 1,
    snapshots: int = 0,
    **options,
):
    """An Engine with memory for `slots` of a bundle's largest records, or resident, that returns all rows of logits.

    config: instead of the bundle's own, for another rule over the same shapes. options: otp or loss, mask routers by
    layer; graphs.
    """
    bundle = Bundle.open(path)
    largest = max(expert.nbytes for expert in bundle.experts.values())
    layouts, records, frequency = bundle.record_table()
    sizes = engine_config(config or bundle.config, context, chunk, logits_rows=chunk, threads=threads, kv=kv)
    sizes.sequences, sizes.snapshots = sequences, snapshots
    return _core.Engine(
        sizes,
        str(path / TRUNK_FILE),
        bundle.trunk_bytes,
        bundle.trunk_checksum,
        bundle.trunk_table(),
        [str(file) for file in bundle.files],
        layouts,
        records,
        frequency,
        slots is None and device == "cpu",
        bundle.expert_bytes if slots is None else int(slots * largest),
        2,
        kernels,
        device=device,
        tables=[table.as_row() for table in bundle.tables],
        **options,
    )


def run_engine(engine, ids, chunk: int = 32) -> np.ndarray:
    """Logits of every position, `chunk` tokens a step, from an empty KV cache."""
    engine.truncate(0)
    return run_on(engine, ids, chunk)


def run_on(engine, ids, chunk: int = 16, sequence: int = 0) -> np.ndarray:
    """Logits of every position, `chunk` tokens a step, from where the sequence is."""
    parts = [np.asarray(ids[at : at + chunk], np.int32) for at in range(0, len(ids), chunk)]
    return np.concatenate([engine.forward(part, ALL, sequence=sequence) for part in parts])


def saved_positions(engine, positions: int, sequence: int = 0) -> bytes:
    """What a sequence knows of its first positions, as it is written."""
    pieces: list[bytes] = []
    engine.save_positions(positions, lambda piece: pieces.append(bytes(piece)), sequence=sequence)
    whole = b"".join(pieces)
    assert len(whole) == engine.saved_bytes(positions)
    return whole


def load_positions(engine, ids, whole: bytes, sequence: int = 0) -> None:
    """Let a sequence know what saved_positions() returned for the tokens `ids`."""
    left = np.frombuffer(whole, np.uint8)

    def read(piece: np.ndarray) -> None:
        nonlocal left
        piece[:], left = left[: len(piece)], left[len(piece) :]

    engine.load_positions(ids, read, sequence=sequence)
    assert not len(left)


def check_rewinds(engine, ids, want, seed: int, steps: int, chunk: int = 16) -> None:
    """Check the logits of `ids` against `want` in random steps, after random rewinds and snapshots."""
    random, at = np.random.default_rng(seed), 0
    for _ in range(steps):
        if random.random() < 0.25 or at == len(ids):
            wanted = max(0, at - int(random.integers(0, 60 if random.random() < 0.5 else 8)))
            left = engine.restorable(wanted)
            at = engine.truncate(wanted)
            assert at == left <= wanted
            continue
        count = int(random.integers(1, 1 + min(chunk, len(ids) - at)))
        assert same_bits(engine.forward(ids[at : at + count], ALL), want[at : at + count])
        at += count
        if random.random() < 0.2:
            engine.snapshot()


@dataclass
class Request:
    """Token ids that a sequence takes `chunk` a step, from step `arrives` on, under a rule of pruning."""

    ids: np.ndarray
    chunk: int = 1
    arrives: int = 0
    rule: tuple = ("off",)  # of Engine.set_prune
    logits: list[np.ndarray] = field(default_factory=list)  # what run_together gave


def run_together(engine, requests: list[Request], sequences: int) -> list[np.ndarray]:
    """Logits of every position of each request: one that arrives takes a sequence that is free, or waits for one."""
    waiting = sorted(requests, key=lambda request: request.arrives)
    running: dict[int, Request] = {}
    step = 0
    while waiting or running:
        for sequence in range(sequences):
            if sequence not in running and waiting and waiting[0].arrives <= step:
                running[sequence] = waiting.pop(0)
                engine.truncate(0, sequence=sequence)
                engine.set_prune(*running[sequence].rule, sequence=sequence)
        step += 1
        parts = []
        for sequence, request in running.items():
            done = sum(map(len, request.logits))
            parts.append((sequence, request.ids[done : done + request.chunk].astype(np.int32), ALL))
        if not parts:
            continue
        rows = engine.step(parts)
        for sequence, ids, _ in parts:
            request = running[sequence]
            request.logits.append(rows[: len(ids)])
            rows = rows[len(ids) :]
            if sum(map(len, request.logits)) == len(request.ids):
                del running[sequence]
    return [np.concatenate(request.logits) for request in requests]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def paged_runtime(path: Path, threads: int = 1) -> Runtime:
    """A Runtime of 64 tokens with slots for about a third of the experts.

    Its cap depends on this process's size, which moves: a second and third look find it at rest.
    """
    for _ in range(10):
        with Runtime(path, "8GB", 64, threads=threads) as runtime:
            plan = runtime.plan
        try:
            runtime = Runtime(path, (3 * plan.floor_bytes + plan.resident_bytes) // 4, 64, threads=threads)
        except MemoryError:
            continue
        if not runtime.plan.resident:
            return runtime
        runtime.close()
    raise AssertionError("the size of this process does not come to rest")


def edit_table(path: Path, change: Callable[[dict], None]) -> None:
    """Change bundle.json and make its checksum right again, so that what lies behind the checksum is reached."""
    table = json.loads((path / "bundle.json").read_text())
    change(table)
    (path / "bundle.json").write_bytes(table_bytes(table))


def edit_copy(path: Path, name: str, content: bytes) -> None:
    """Replace a copied file, with its checksum."""
    (path / name).write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()

    def listed(table: dict) -> None:
        table["copies"][name], table["copy_bytes"][name] = checksum, len(content)

    edit_table(path, listed)


def flip(file: Path, at: int, mask: int = 0x10) -> None:
    """Change one byte of a file in place; a second flip undoes the first."""
    with open(file, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ mask]))


def run_python(code: str, *arguments, stdin: str | None = None) -> subprocess.CompletedProcess:
    """Run Python in a process of its own; the test fails with its stderr when it does."""
    if "EDGE_MOE_CORE" in os.environ:
        code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import other_core\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, input=stdin)
    assert child.returncode == 0, child.stderr
    return child


class Pruned:
    """A model by runtime/reference.py, whose tokens leave out experts; and an account of them."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.used = self.pairs = 0
        self.dropped = 0.0  # share of routing weight, summed over tokens and layers

    @property
    def cut(self) -> float:
        return 1 - self.used / self.pairs

    def logits(self, ids, kept) -> np.ndarray:
        """kept(layer, h, routing weights) -> how many experts each row keeps."""

        def prune(layer, h, chosen, weights):
            counts = kept(layer, h, weights)
            self.pairs += chosen.size
            self.used += int(counts.sum())
            stays = np.arange(chosen.shape[1]) < counts[:, None]
            self.dropped += float((np.where(stays, 0, weights).sum(-1) / weights.sum(-1)).sum())
            return reference.keep_first(self.config, chosen, weights, counts)

        return reference.forward(self.config, self.checkpoint, ids, prune=prune)


def prunable(out: Path, source: Path, mask_routers: dict[str, np.ndarray], **pruning) -> Path:
    """A lossless bundle with mask routers, by name, and a curve of each rule."""
    checkpoint = Checkpoint(source)
    layers = len(checkpoint.config.moe_layers)
    write_lossless(out, source, checkpoint.config, checkpoint)
    save_file(mask_routers, out / MASK_FILE)
    data = (out / MASK_FILE).read_bytes()
    table = json.loads((out / "bundle.json").read_text())
    table["pruning"] = {
        "default": "loss",
        "cut": 0.2,
        "rules": {
            "otp": {"cuts": [0.1, 0.3], "prices": [0.1, 0.5]},
            "loss": {"cuts": [0.1, 0.3], "prices": [0.1, 0.5]},
            "share": {"cuts": [0.1, 0.3], "thresholds": [[0.9] * layers, [0.5] * layers]},
            "odp": {"cuts": [0.2], "thresholds": [[0.5] * layers], "protect": 0.02},
        },
        "mask_routers": {"bytes": len(data), "crc32c": f"{_core.crc32c(data, 0):08x}"},
        "certificate": [],
        **pruning,
    }
    (out / "bundle.json").write_bytes(table_bytes(table))
    return out


def routers_of(bundle, rule: str) -> list[np.ndarray]:
    masks = load_file(bundle / MASK_FILE)
    return [masks[f"layers.{layer}.{rule}"].reshape(-1) for layer in range(Bundle.open(bundle).config.layer_count)]


def mask_routers_of(config, seed=0) -> dict[str, np.ndarray]:
    """Random ones, by layer and rule, that like each count of experts now and then."""
    rng = np.random.default_rng(seed)
    return {
        f"layers.{layer}.{rule}": rng.standard_normal(mask_router_shape(config, layer)).astype(np.float32) * 0.3
        for layer in config.moe_layers
        for rule in LEARNED
    }


def assert_logits_of_transformers(directory: Path) -> None:
    """The reference and a lossless bundle give transformers' logits for what lies in `directory`; needs torch."""
    from make_golden import logits_of as transformers_logits

    ids = np.random.default_rng(5).integers(0, 128, 60)
    want = transformers_logits(directory, ids)
    checkpoint = Checkpoint(directory)
    path = write_lossless(directory / "lossless.emoe", directory, checkpoint.config, checkpoint)
    for got in (reference.forward(checkpoint.config, checkpoint, ids), logits_of(path, ids)):
        assert np.abs(got - want).max() <= 1e-4
        assert np.array_equal(got.argmax(-1), want.argmax(-1))
