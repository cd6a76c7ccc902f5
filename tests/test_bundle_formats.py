"""Bundles of every format that was ever written, and what format 2 may have that new bundles do not.

golden/format-1 was written by the release before format 2: dropped experts, eight combinations of widths, bfloat16
among them, and the logits that it gave then.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import (
    Kept,
    edit_table,
    flip,
    logits_of,
    make_engine,
    run_engine,
    same_bits,
    use,
    weights_of,
    with_output_bias,
    write_bundle,
)
from golden_checkpoints import DROPPED

from edge_moe import _core
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.describe import describe_bundle

FORMAT_1 = Path(__file__).parent / "golden" / "format-1"
WIDTHS = ((1, 2, 3), (4, 5, 6), (8, 16, 2), (16, 16, 16), (3, 3, 4), (2, 2, 8), (5, 5, 5), (6, 8, 3))
AGAIN = "copy the bundle again"


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the logits that the bundle of format 1 gave when it was written."""
    with np.load(FORMAT_1.with_name("format-1-logits.npz")) as stored:
        return stored["token_ids"], stored["logits"]


@pytest.fixture
def format_1(tmp_path) -> Path:
    """A copy of the bundle of format 1, to damage."""
    return Path(shutil.copytree(FORMAT_1, tmp_path / "old.emoe"))


def written_anew(golden, out: Path) -> Path:
    """What the bundle of format 1 was made from, written today."""
    source = golden["olmoe"][0]
    kept, layer_top_k = DROPPED["olmoe"]
    checkpoint = Checkpoint(source)
    config = replace(checkpoint.config, kept=kept, layer_top_k=layer_top_k)
    trunk = trunk_packing(trunk_shapes(config), 6, 64) | {"embedding": Packing((16,), 0)}
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts_of(layer))]
    experts = {key: Packing(WIDTHS[at % 8], 32) for at, key in enumerate(keys)}
    frequency = {(0, 1): 0.5, (1, 2): 0.25}
    return write_bundle(out, source, config, Kept(checkpoint, config), trunk, experts, frequency=frequency)


# ---- format 1


@pytest.mark.parametrize("kernels", _core.kernel_names())
def test_a_bundle_of_format_1_gives_the_logits_that_it_gave(logits, kernels):
    ids, want = logits
    assert same_bits(run_engine(make_engine(FORMAT_1, kernels=kernels), ids), want)
    paged = make_engine(FORMAT_1, kernels=kernels, slots=4, threads=2)
    assert same_bits(run_engine(paged, ids, 5), want)
    assert paged.counters["expert_misses"] > 0


def test_a_bundle_of_format_1_is_what_it_was(logits):
    bundle = Bundle.open(FORMAT_1)
    assert bundle.table["version"] == 1
    assert len(list(verify(bundle))) == 13
    assert [expert.widths for expert in bundle.experts.values()] == [WIDTHS[at % 8] for at in range(11)]
    about = describe_bundle(bundle)
    assert about["dropped"] == 5
    assert about["groups"] == [32]
    assert about["trunk_widths"] == {"attention": [6], "embedding": [16]}
    ids, want = logits
    exact = reference.forward(bundle.config, weights_of(FORMAT_1), ids)
    assert np.median(np.abs(exact - want)) < 0.1  # the engine rounds inputs, and a token's routing may flip


def test_only_the_table_differs_from_what_is_written_today(golden, tmp_path, logits):
    new = written_anew(golden, tmp_path / "new.emoe")
    assert {file.name for file in new.iterdir()} == {file.name for file in FORMAT_1.iterdir()}
    for file in new.iterdir():
        assert file.name == "bundle.json" or file.read_bytes() == (FORMAT_1 / file.name).read_bytes(), file.name
    old, bundle = Bundle.open(FORMAT_1), Bundle.open(new)
    assert (bundle.trunk, bundle.experts, bundle.config) == (old.trunk, old.experts, old.config)
    assert same_bits(logits_of(new, logits[0]), logits[1])


def of_record(table, layer=0, index=0) -> dict:
    return table["experts"]["records"][layer][index]


EDITS = {
    "width 7": (
        lambda t: of_record(t).update(widths=[7, 4, 4]),
        f"widths [7, 4, 4] of record 0 of row 0 are not three of (1, 2, 3, 4, 5, 6, 8, 16); {AGAIN}",
    ),
    "another width": (
        lambda t: of_record(t).update(widths=[8, 8, 8]),
        f"a record has 4,096 bytes, expected 8,192; {AGAIN}",
    ),
    "unknown codec": (
        lambda t: of_record(t).update(codecs=["affine", "affine", "codebook"]),
        "codecs ['affine', 'affine', 'codebook'] of record 0 of row 0 are not known; upgrade edge-moe",
    ),
    "a codec of another width": (
        lambda t: of_record(t).update(codecs=["affine", "affine", "bfloat16"]),
        "codecs ['affine', 'affine', 'bfloat16'] of record 0 of row 0 are not known; upgrade edge-moe",
    ),
    "group 48": (
        lambda t: of_record(t).update(group=48),
        f"group 48 of record 0 of row 0 is not one of (32, 64, 128); {AGAIN}",
    ),
    "short record": (lambda t: of_record(t).update(bytes=0), f"a record has 0 bytes, expected 4,096; {AGAIN}"),
    "alignment 0": (
        lambda t: t["experts"].update(alignment=0),
        f"a record has 4,096 bytes, expected 2,304; {AGAIN}",
    ),
    "no row": (lambda t: t["experts"]["records"].__setitem__(1, 3), f"the records of a layer are no list; {AGAIN}"),
    "trunk width": (
        lambda t: t["trunk"]["tensors"]["layers.0.q"].update(width=7),
        f"width 7 of layers.0.q is not possible; {AGAIN}",
    ),
    "layouts of format 2": (
        lambda t: t["experts"].update(layouts=[]),
        f"bundles of format 1 have no 'layouts'; {AGAIN}",
    ),
    "a layout of format 2": (
        lambda t: of_record(t).update(layout=0),
        f"record 0 of row 0 has a 'layout', which format 1 does not have; {AGAIN}",
    ),
    "version 2": (lambda t: t.update(version=2), f"'codec' is missing; {AGAIN}"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_table_of_format_1_that_lies_is_refused(format_1, edit):
    change, message = EDITS[edit]
    edit_table(format_1, change)
    with pytest.raises(ValueError) as caught:
        Bundle.open(format_1)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{format_1}/bundle.json: ")


def test_a_damaged_record_of_format_1_is_found(format_1, logits):
    flip(format_1 / "experts-00001-of-00001.safetensors", 40_000)
    with pytest.raises((OSError, ValueError), match="does not match its checksum"):
        use(format_1, logits[0])


# ---- format 2


def test_parts_may_lie_in_any_order_in_a_record(golden, tmp_path, logits):
    """As a writer of another release may place them: the last first, with gaps between."""
    path = written_anew(golden, tmp_path / "new.emoe")
    table = json.loads((path / "bundle.json").read_text())
    old_places = [layout["parts"] for layout in table["experts"]["layouts"]]
    for layout in table["experts"]["layouts"]:
        at, moved = 0, {}
        for name in sorted(layout["parts"], reverse=True):
            nbytes = layout["parts"][name][1]
            moved[name] = [at, nbytes]
            at += -(-nbytes // 64) * 64
        layout["parts"] = moved
    file = path / table["experts"]["files"][0]["name"]
    data = bytearray(file.read_bytes())
    for row in table["experts"]["records"]:
        for record in row:
            layout, places = table["experts"]["layouts"][record["layout"]], old_places[record["layout"]]
            was = bytes(data[record["offset"] :][: layout["bytes"]])
            now = bytearray(layout["bytes"])
            for name, (at, nbytes) in layout["parts"].items():
                now[at : at + nbytes] = was[places[name][0] :][:nbytes]
            data[record["offset"] : record["offset"] + layout["bytes"]] = now
            record["crc32c"] = f"{_core.crc32c(bytes(now), 0):08x}"
    file.write_bytes(data)
    edit_table(path, lambda current: current.update(experts=table["experts"]))
    assert Bundle.open(path).layouts[0].parts != Bundle.open(FORMAT_1).layouts[0].parts
    assert same_bits(logits_of(path, logits[0]), logits[1])
    assert same_bits(run_engine(make_engine(path, slots=4), logits[0], 3), logits[1])


@pytest.mark.parametrize("width", [4, 16])
def test_output_biases_of_experts_are_added_to_their_products(golden, tmp_path, monkeypatch, width):
    path, ids = with_output_bias(golden, tmp_path, monkeypatch, width), golden["olmoe"][1]
    config, weights = Bundle.open(path).config, weights_of(path)
    want = reference.forward(config, weights, ids)
    got = run_engine(make_engine(path), ids)
    none = reference.forward(config, Without(weights), ids)
    assert np.abs(got - want).mean() < (0.03 if width == 4 else 1e-5) < 0.3 < np.abs(none - want).mean()
    for slots, chunk, threads in ((None, 7, 2), (4, 1, 1), (5, 16, 2)):
        assert same_bits(run_engine(make_engine(path, slots=slots, threads=threads), ids, chunk), got)
    for kernels in _core.kernel_names():
        assert same_bits(run_engine(make_engine(path, kernels=kernels), ids), got)


class Without:
    """The same weights with output biases of zero."""

    def __init__(self, weights):
        self.trunk, self.expert = weights.trunk, weights.expert

    def expert_bias(self, _layer, _number):
        return 0, 0, 0


def test_a_record_without_the_biases_that_the_model_has_is_refused(golden, tmp_path, monkeypatch):
    path = with_output_bias(golden, tmp_path, monkeypatch, 4)
    edit_table(path, lambda table: table["experts"]["layouts"][0]["parts"].pop("down.output_bias"))
    with pytest.raises(ValueError, match="layout 0: part down.output_bias is missing; copy the bundle again"):
        Bundle.open(path)


def test_what_no_kernel_multiplies_is_refused():
    for encodings, message in (
        ([("affine", 7, 64)] * 3, "codec affine has no width 7"),
        ([("trellis", 2, 64)] * 3, "no codec 'trellis'"),
        ([("affine", 4, 48)] * 3, "group must be 32, 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.RecordLayout(64, 32, encodings)
