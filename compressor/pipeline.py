"""compress(): a checkpoint to a bundle in five steps: calibrate, measure, allocate, round, certify.

Measuring and rounding each go through the model once, layer by layer, one layer's experts one at a time; after each
layer their state is on disk, and a run that was killed goes on from there (journal.py). Methods: `uniform` one width
everywhere, `mc` and `mc-release` the published program a layer, `pmq` one program over the whole model in true bytes;
these round with GPTQ on calibration text. `rtn` is round to nearest, one width, without any text.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from .. import __version__, _core
from ..devices.probe import default_threads
from ..runtime import reference
from ..runtime.bundle import Bundle
from ..runtime.codecs import PROJECTIONS
from ..runtime.config import ModelConfig, trunk_shapes
from ..runtime.config_file import read_json
from ..runtime.tokenizer import tokenizer_of
from .certificate import certify
from .choosing import allocate, choose, targets, trunk
from .choosing.adjust_top_k import adjust_top_k
from .choosing.choose import Choosing
from .choosing.sensitivity import Measures, Sensitivity, load_measure, save_measure
from .choosing.targets import DEFAULT_TOKENS, Options, true_bits
from .memory import Memory
from .passes.calibrate import Calibration, load_calibration
from .passes.streams import Stream
from .rounding.quantise import quantise, trunk_packing
from .rounding.round_layers import PackedTrunk, Rounding, Track, kept
from .rounding.round_tables import write_table
from .source.checkpoint import Checkpoint
from .source.copied_files import contents
from .writing import own
from .writing.journal import CHOICE, FINISHED, TABLES, Journal, partial_of, work_of
from .writing.writer import BundleWriter, Packing

Progress = Callable[[str, int, int], None]  # (step, done, of)
Phase = Callable[[str, tuple[str, ...]], None]  # (name, all names)
LARGE_EXPERT = 4_000_000  # weights from which each expert's result is kept, not only each layer's
GAIN_LOGITS_BYTES = 64_000_000
UNIMPORTANT = ("resume", "force", "threads", "calibration", "held_out")  # to the result; texts count by their tokens
FINE_BELOW = 2.5  # true bits of an expert weight


def compress(
    model: str | Path,
    out: str | Path,
    *,
    bits: float | None = None,
    width: int | None = None,
    size: int | str | None = None,
    ram: int | str | None = None,
    context: int | None = None,
    paged: bool = False,
    method: str = "pmq",
    calibration: str | Path | Sequence[str | Path] = (),
    held_out: str | Path | Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    group: int | None = None,
    trunk_width: int | None = None,
    drop_experts: float = 0.0,
    drop_score: str = "mixture",
    drop_counts: str = "sensitivity",
    adjust_top_k: bool = False,
    act_order: bool = False,
    certificate: bool = True,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    on_phase: Phase | None = None,
) -> Bundle:
    """Compress the checkpoint directory `model` into the bundle directory `out`, and open it.

    bits: mean bits of an expert weight, scales, biases and padding included (default 2.5; 16 leaves everything,
    trunk included, bfloat16: float16 and float32 are rounded to its 8 significant bits, and the method in bundle.json
    says `rounded_from`). width: instead, one width for all experts (methods uniform, rtn). size: instead, the most
    bytes that the whole bundle may have ("8GB" or a number). ram: the most memory that compressing may take and, when
    it is the only target, that running the bundle takes with every expert in memory at `context` tokens; or, `paged`,
    with the experts that answer nine uses in ten.
    method: pmq, mc, mc-release, uniform, rtn, or keep: experts in MXFP4 as they are, without a loss, and the trunk in
    bfloat16 unless trunk_width says otherwise. calibration: text files, or .npy of token ids; none: the standard
    library's source. tokens: calibration tokens. held_out: text for the certificate; none: the end of calibration's.
    group: inputs that share a scale, 32, 64 or 128; none: the method's choice. trunk_width: bits of the trunk's
    matrices; none: with pmq each kind gets the width at which a byte buys as much as in an expert, else 8.
    drop_experts: share of the experts to leave out: with drop_counts `equal` in every layer those of least drop_score
    (mixture, weight, frequency, mean-weight), with `sensitivity` those that the model misses least. adjust_top_k: then
    let layers that gain by it choose fewer experts. act_order: round inputs of large second moment first.
    certificate: compare the result with the source, and with one width everywhere, on held-out text.
    resume: go on with an unfinished run of the same checkpoint and options; off: refuse where there is one. force:
    replace `out` where it is a bundle and nothing else, once the new one is whole, and start anew where an unfinished
    run had other options. progress(step, done, of) is called as work goes on, on_phase(name, names) as each of the
    phases `names` begins.

    Raises ValueError for bad options or a bad checkpoint, FileExistsError when `out`, or an OUT.work or OUT.partial
    that no run made, is there, OSError for the disk, MemoryError when `ram` is too small. An interrupted run leaves
    OUT.work and OUT.partial to go on from, or nothing where no layer was done.
    """
    given = locals()
    options = Options(**{name: given[name] for name in Options.__slots__})
    own.check_name(Path(out))
    with Checkpoint(model) as checkpoint:
        contents(checkpoint.directory, checkpoint.config.tied_head)  # what cannot be copied shows now
        o = targets.check(options, checkpoint.config)
        run = Compression(checkpoint, Path(out), o, progress or (lambda step, done, of: None))
        if on_phase:
            run.on_phase = on_phase
        return run.run()


@dataclass(slots=True)
class Compression:
    """One run: its inputs, and each step as a method, so that a study can take them apart."""

    checkpoint: Checkpoint
    out: Path
    o: Options
    tell: Progress
    config: ModelConfig = None  # after dropping experts
    trunk: dict[str, Packing] = None
    calibration: Calibration | None = None
    journal: Journal | None = None
    memory: Memory | None = None
    on_phase: Phase = lambda name, names: None
    _streams: int = 0

    def __post_init__(self):
        self.config = self.checkpoint.config
        keeps = self.o.method == "keep"
        if keeps and not self.checkpoint.kept_encodings:
            raise ValueError(
                f"{self.checkpoint.directory}: method keep needs experts in MXFP4, or in MLX's affine mode with scales "
                "in bfloat16, all alike, which these are not; use bits 16"
            )
        width = trunk.WIDTHS[0] if self.o.chooses_trunk else 16 if self.o.bits == 16 else self.o.trunk_width
        width = width or (16 if keeps else None)
        self.trunk = trunk_packing(trunk_shapes(self.config), width or targets.TRUNK_WIDTH, trunk.GROUP)

    @property
    def phases(self) -> tuple[str, ...]:
        """What a run does, in order."""
        tables = ("tables",) if self.config.tables else ()
        if not self.o.calibrates:
            return ("quantise", *tables)
        measure = ("measure",) if self.measured_choices() else ()
        certify = ("certify",) if self.o.certificate else ()
        return ("read text", *measure, "choose widths", "round", *certify, *tables)

    def begin(self, phase: str) -> None:
        self.on_phase(phase, self.phases)

    @property
    def threads(self) -> int:
        return self.o.threads or default_threads()

    def run(self) -> Bundle:
        there = self.out.exists() or self.out.is_symlink()
        if there and not self.o.force and not work_of(self.out).exists():
            raise FileExistsError(f"{self.out}: exists already; choose another name or remove it")
        for directory in (work_of(self.out), self.partial):
            own.check(directory)
        if self.o.calibrates:
            self.load_calibration()
        if there:
            if self.o.resume and Journal.has_finished(self.out, self.identity(), _checksum_of(self.out)):
                own.unmark(self.out)  # killed between its last two steps
                own.discard(work_of(self.out))
                return Bundle.open(self.out)
            if not self.o.force:
                raise FileExistsError(f"{self.out}: exists already; choose another name or remove it")
            own.check_bundle(self.out)
        if not self.o.paged and self.o.width is None:  # what cannot be met shows now
            targets.expert_budget(self.o, self.checkpoint, self.config, self.trunk)
        self.memory = Memory.plan(self.checkpoint, self.o, self.calibration)
        new = not self.out.parent.exists()
        workers, each = self.memory.workers(self.threads)
        opened = Journal(self.out, self.identity(), self.o.resume, self.o.force)
        with opened as self.journal, threadpool_limits(each):
            try:
                bundle = self._steps()
            except BaseException:
                if not self.journal.started():
                    self.journal.remove()
                    own.discard(self.partial)
                    if new:
                        _remove_empty(self.out.parent)
                raise
            self.journal.remove()
        return bundle

    @property
    def partial(self) -> Path:
        return partial_of(self.out)

    def identity(self) -> dict:
        """What the result depends on; a run is gone on with only where all of it is the same."""
        options = {k: v for k, v in asdict(self.o).items() if k not in UNIMPORTANT}
        text = None
        if self.calibration:
            text = [self.calibration.provenance["sha256"], self.calibration.held_out_provenance["sha256"]]
        return {
            "version": __version__,
            "format": _core.FORMAT_VERSION,
            "checkpoint": self.checkpoint.fingerprint(),
            "text": text,
            **options,
        }

    def load_calibration(self) -> None:
        self.begin("read text")
        tokenizer = tokenizer_of(self.checkpoint.directory)
        o = self.o
        self.calibration = load_calibration(tokenizer, self.config, o.calibration, o.tokens, o.seed, o.held_out)

    def _steps(self) -> Bundle:
        if not self.o.calibrates:
            self.begin("quantise")
            return self._write_plain()
        measures = None
        if self.measured_choices():
            self.begin("measure")
            measures = self.measure()
        self.begin("choose widths")
        packing, compared, method = self.allocate(measures)
        self.begin("round")
        return self.round(packing, compared, measures, method)

    # ---- measure

    def measured_choices(self) -> list[tuple[int, int]]:
        """(width, group) of a matrix that the method needs to know the cost of; none where nothing is chosen by it.

        pmq leaves out widths that would take over twice the mean, or two below it: such have never been worth it. Below
        FINE_BELOW bits it may take groups of 64 too: without them KLD on the reference was 1.05 times as large at 1.6
        bits, 1.02 at 2, and 1.01 (+- 0.015), 0.99, 1.01 at 2.5, 3.5, 4.5.
        """
        o, config = self.o, self.config
        groups = targets.groups(o, config)
        if o.method == "uniform":
            needed = o.drop_experts or o.paged
            return [(2, groups[-1])] if needed else []
        if o.method != "pmq":
            return [(width, groups[0]) for width in targets.MC_WIDTHS]
        bits = self.expected_bits()
        widths = [width for width in _core.WIDTHS if width < 16]
        low = max((width for width in widths if true_bits(config, (width,) * 3, groups[0]) <= bits), default=1) - 2
        return [
            (width, group)
            for group in targets.groups(o, config, fine=bits < FINE_BELOW)
            for width in widths
            if width >= low and (width == 1 or true_bits(config, (width,) * 3, group) <= 2 * bits)
        ]

    def expected_bits(self) -> float:
        """True bits a weight that the budget allows; a guess where frequencies will decide."""
        if self.o.paged:
            return targets.DEFAULT_BITS
        config, share = self.config, 1 - self.o.drop_experts
        budget = targets.expert_budget(self.o, self.checkpoint, config, self.trunk)
        return min(8 * budget / (config.expert_weights * config.expert_count) / (1 if self.o.bits else share), 8.5)

    def measure(self) -> Measures:
        """Measure every layer, going on where the journal ends."""
        config, choices, j = self.config, self.measured_choices(), self.journal
        bits = self.expected_bits()
        kinds = trunk.kinds(config) if self.o.chooses_trunk else ()
        near = [abs(true_bits(config, (width,) * 3, group) - bits) for width, group in choices]
        pass_ = Sensitivity(
            config,
            self.checkpoint,
            self.calibration,
            choices,
            int(np.argmin(near)),
            *self.memory.workers(self.threads),
            self.new_stream,
            self.keep,
            {kind: trunk.ProbedTrunk(self.checkpoint, config, kind) for kind in kinds},
        )
        measures, total = [], config.layer_count * config.experts
        while j.has(f"measure-{len(measures):04}.npz"):
            measures.append(load_measure(j.path(f"measure-{len(measures):04}.npz")))
        if j.has("gain.json"):
            found = j.read("gain.json")
            has_codes = self.checkpoint.has_codes
            return Measures(measures, choices, np.array(found["gain"]), found["trunk"], has_codes)
        if measures:
            name = f"measure-{len(measures) - 1:04}"
            saved = j.read(f"{name}.json").items()
            pass_.go_on({form: self.load_stream(f"{name}.{form}", rows, crc) for form, (rows, crc) in saved})
        else:
            pass_.start()
        for layer in range(len(measures), config.layer_count):
            measures.append(
                pass_.layer(layer, lambda e, layer=layer: self.tell("measure", layer * config.experts + e, total))
            )
            name = f"measure-{layer:04}"
            saved = {
                form: [stream.rows, stream.save(j.path(f"{name}.{form}"))] for form, stream in pass_.streams.items()
            }
            j.write(f"{name}.json", saved)
            save_measure(j.path(f"{name}.npz"), measures[-1])
            for suffix in (*pass_.forms, "json"):
                j.forget(f"measure-{layer - 1:04}.{suffix}")
            j.forget(f"measured-{layer:04}-*")
        rows = max(GAIN_LOGITS_BYTES // (8 * config.vocab), 1)
        found = replace(pass_.finish(measures, rows), has_codes=self.checkpoint.has_codes)
        pass_.close()
        self.tell("measure", total, total)
        j.write("gain.json", {"gain": found.gain.tolist(), "trunk": found.trunk})
        for suffix in (*pass_.forms, "json"):
            j.forget(f"measure-*.{suffix}")
        return found

    # ---- allocate

    def allocate(self, measures: Measures | None) -> tuple[dict, dict, dict]:
        """Packing of every expert by (layer, number), that of one width to compare with, and what bundle.json says."""
        if self.journal.has(CHOICE):
            self.config, self.trunk, chosen = choose.from_json(self.checkpoint.config, self.journal.read(CHOICE))
            if self.o.adjust_top_k:
                self.config = replace(self.config, layer_top_k=self.adjusted_top_k(self.config))
            return chosen
        choosing = Choosing(self.checkpoint, self.o, self.trunk, measures, self.adjusted_top_k, self.mixed)
        chosen = choosing.run()
        self.config, self.trunk = choosing.config, choosing.trunk
        self.journal.write(CHOICE, choose.as_json(self.config, self.trunk, chosen))
        return chosen

    def mixed(self, config: ModelConfig, *arguments) -> list[Packing]:
        """pmq's choice; see allocate.mixed()."""
        return allocate.mixed(config, *arguments)

    def adjusted_top_k(self, config: ModelConfig) -> tuple[int, ...]:
        """Of each layer, once experts were dropped."""
        if not self.journal.has("top_k.json"):
            found = adjust_top_k(
                config,
                self.checkpoint,
                self.calibration.ids,
                self.new_stream,
                self.memory.workers(self.threads)[0],
                lambda layer: self.tell("adjust top_k", layer, config.layer_count),
            )
            self.journal.write("top_k.json", found)
        return tuple(self.journal.read("top_k.json"))

    # ---- round

    rounding = Rounding

    def round(self, packing: dict, compared: dict, measures: Measures | None, method: dict) -> Bundle:
        """Write the bundle, going on where the journal ends, and certify it."""
        config, o, j = self.config, self.o, self.journal
        kept = measures.of(config) if measures and config.kept else measures
        frequency = kept.frequencies() if kept else {}
        extra = {"calibration": {**self.calibration.provenance, "seed": o.seed}, "method": method, "certificate": None}
        with BundleWriter(
            self.out, self.checkpoint.directory, config, self.trunk, packing, frequency, extra,
            resumable=True, begun=j.has("round-0000.json"), replace=o.force,
        ) as writer:  # fmt: skip
            tracks = [self.track("bundle", packing, writer)]
            ids, held_out = self.calibration.ids, self.calibration.held_out
            if o.certificate and compared != packing:
                tracks.append(self.track("uniform", compared, None))
            if o.certificate:
                ids = np.concatenate([ids, held_out])
            rounding = self.rounding(
                self.checkpoint.config, self.checkpoint, ids, self.calibration.ids.size, tracks, self.new_stream,
                *self.memory.workers(self.threads), o.act_order, self.keep,
            )  # fmt: skip
            done = 0
            while j.has(f"round-{done:04}.json"):
                state = j.read(f"round-{done:04}.json")
                writer.restore(done, {int(k): v for k, v in state["checksums"].items()}, state["trunk"])
                done += 1
            if done:
                name = f"round-{done - 1:04}"
                saved = [(f"{name}.{suffix}", state["streams"][suffix]) for suffix in rounding.names]
                rounding.go_on([self.load_stream(file, ids.size, checksum) for file, checksum in saved])
                for track in tracks:
                    track.changed = state["changed"][track.name]
            else:
                rounding.start()
            total = config.layer_count * self.checkpoint.config.experts
            for layer in range(done, config.layer_count):
                at = layer * self.checkpoint.config.experts
                rounding.layer(layer, lambda e, at=at: self.tell("round", at + e, total))
                name = f"round-{layer:04}"
                writer.flush()
                streams = {
                    suffix: stream.save(j.path(f"{name}.{suffix}"))
                    for suffix, stream in zip(rounding.names, rounding.streams, strict=True)
                }
                state = {"checksums": writer.checksums(layer), "trunk": writer.trunk_written, "streams": streams}
                state["changed"] = {track.name: track.changed for track in tracks}
                j.write(f"{name}.json", state)
                for suffix in rounding.names:
                    j.forget(f"round-{layer - 1:04}.{suffix}")
                j.forget(f"packed-{layer:04}-*")
            rounding.head()
            self.tell("round", total, total)
            if o.certificate:
                self.begin("certify")
                writer.extra["certificate"] = certify(rounding, self.calibration.held_out_provenance)
            rounding.close()
            for missing in sorted(self.trunk.keys() - writer.trunk_written):
                tracks[0].trunk.trunk(missing)
            self.write_tables(writer)
            writer.finish(publish=self._publish)
        return Bundle.open(self.out)

    def write_tables(self, writer: BundleWriter) -> None:
        """Write the tables of n-gram embeddings, without those that a run before has written."""
        if not writer.tables:
            return
        self.begin("tables")
        if writer.resumable and self.journal.has(TABLES):
            writer.tables_written |= set(self.journal.read(TABLES))
        before, total = 0, sum(table.rows for table in writer.tables)
        for table in writer.tables:
            if table.name not in writer.tables_written:
                tell = lambda rows, before=before: self.tell("tables", before + rows, total)  # noqa: E731
                write_table(writer, table, self.checkpoint, self.threads, tell)
                if writer.resumable:
                    self.journal.write(TABLES, sorted(writer.tables_written))
            before += table.rows

    def track(self, name: str, packing: dict, writer: BundleWriter | None) -> Track:
        weights = PackedTrunk(self.checkpoint, self.config, self.trunk, writer, self.threads)
        return Track(name, self.config, weights, packing, writer)

    # ---- round to nearest, or not at all

    def _write_plain(self) -> Bundle:
        config, o = self.config, self.o
        if o.method == "keep":
            packing = self.kept_packing
        elif o.width is not None or o.bits == 16:
            width = o.width or 16
            group = targets.groups(replace(o, method="rtn"), config)[0]
            packing = Packing((width,) * 3, group or targets.DEFAULT_GROUP)
        else:
            budget = targets.expert_budget(o, self.checkpoint, config, self.trunk)
            bits = 8 * budget / (config.expert_weights * config.expert_count)
            packing = targets.uniform_packing(config, bits, targets.groups(o, config))
        keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts)]
        method = {"name": o.method}
        if packing.widths[0] == 16 and (types := self.rounded_types()):
            method["rounded_from"] = types
        extra = {"calibration": None, "method": method, "certificate": None}
        with BundleWriter(
            self.out, self.checkpoint.directory, config, self.trunk, dict.fromkeys(keys, packing), extra=extra,
            replace=o.force,
        ) as writer:  # fmt: skip
            total, threads = len(writer.trunk) + len(keys), self.threads
            for done, (name, how) in enumerate(writer.trunk.items(), start=1):
                writer.write_trunk(
                    name, quantise(self.checkpoint.trunk(name), how.widths[0], how.group, threads=threads)
                )
                self.tell("quantise", done, total)
            for done, (layer, index) in enumerate(keys, start=len(writer.trunk) + 1):
                if o.method == "keep":
                    record = kept(self.checkpoint, layer, index)
                else:
                    parts = zip(self.checkpoint.expert(layer, index), packing.widths, strict=True)
                    search = o.method != "rtn"
                    record = [quantise(w, width, packing.group, search=search, threads=threads) for w, width in parts]
                bias = reference.expert_bias(config, self.checkpoint, layer, index)
                writer.write_expert(layer, index, record, bias)
                self.tell("quantise", done, total)
            self.write_tables(writer)
            writer.finish(publish=self._publish)
        return Bundle.open(self.out)

    @property
    def kept_packing(self) -> Packing:
        """Of experts whose codes are those of the checkpoint."""
        encodings = self.checkpoint.kept_encodings
        return Packing(tuple(one.width for one in encodings), encodings[0].group, encodings[0].codec)

    def rounded_types(self) -> list[str]:
        """Types of the checkpoint's matrices that have more significant bits than the bfloat16 of width 16."""
        parts = PROJECTIONS if self.config.gated else PROJECTIONS[1:]
        names = [f"layers.{self.config.moe_layers[0]}.experts.0.{part}" for part in parts]
        names += [name for name, how in self.trunk.items() if how.widths[0] == 16]
        return sorted({self.checkpoint.dtype(name) for name in names} & {"F16", "F32"})

    # ---- state

    @property
    def keep(self):
        """Where single experts' results are kept, when an expert takes long enough for that to pay."""
        return self.journal.arrays if self.config.expert_weights >= LARGE_EXPERT else None

    def new_stream(self, name: str, rows: int, dim: int = 0) -> Stream:
        """An empty stream, as wide as the residual stream unless `dim` is given."""
        self._streams += 1
        file = None if self.memory.streams_in_memory else self.journal.scratch / f"{self._streams}-{name}"
        return Stream(rows, dim or self.config.width, file)

    def load_stream(self, saved: str, rows: int, checksum: int) -> Stream:
        self._streams += 1
        file = None if self.memory.streams_in_memory else self.journal.scratch / f"{self._streams}-loaded"
        return Stream.load(self.journal.path(saved), rows, self.config.width, file, checksum)

    def _publish(self, checksum: str) -> None:
        self.journal.write(FINISHED, checksum)


def _checksum_of(out: Path) -> str | None:
    """The checksum that a bundle says it has."""
    file = out / "bundle.json"
    return read_json(file).get("checksum") if file.is_file() else None


def _remove_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
