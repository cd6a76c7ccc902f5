"""Bundles that are cut, changed or made to do harm: one clear error each, never a crash, never another answer."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
from bundles import edit_copy, edit_table, flip, logits_of, paged_runtime, use

from edge_moe.runtime.bundle import TRUNK_FILE, Bundle, verify
from edge_moe.runtime.runtime import Runtime

EXPERTS = "experts-00001-of-00001.safetensors"
AGAIN = "copy the bundle again"
IDS = list(range(1, 13))
REFUSALS = (ValueError, OSError)


@pytest.fixture
def olmoe(copy_of):
    return copy_of("olmoe", width=4)


@pytest.fixture
def without_experts(dropped_of, tmp_path):
    """olmoe without five of its eight experts in layer 1, and with a top_k of 2 in layer 0."""
    return shutil.copytree(dropped_of("olmoe", (4, 4, 4)), tmp_path / "dropped.emoe")


@pytest.fixture(scope="module")
def answer(bundle_of):
    return use(bundle_of("olmoe", width=4), IDS)


def header_bytes(file) -> int:
    with open(file, "rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def first_record(path, at=(0, 0)):
    bundle = Bundle.open(path)
    return bundle.files[0], bundle.experts[at]


# ---- cut short, and missing


@pytest.mark.parametrize("name", ["bundle.json", "config.json", TRUNK_FILE, EXPERTS])
def test_a_file_cut_anywhere_is_refused(olmoe, name):
    file = olmoe / name
    whole = file.read_bytes()
    cuts = {0, 1, 2, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 4096, len(whole) - 2, len(whole) - 1}
    if file.suffix == ".safetensors":
        header = header_bytes(file)
        cuts |= {header // 2, header - 1, header, header + 1}
    # bundle.json ends in a newline, without which it says the same
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(whole) - (name == "bundle.json")):
        file.write_bytes(whole[:cut])
        for attempt in (Bundle.open, lambda path: use(path, IDS)):
            with pytest.raises(REFUSALS, match=re.escape(str(file))):
                attempt(olmoe)
    file.write_bytes(whole)
    use(olmoe, IDS)


@pytest.mark.parametrize("name", ["bundle.json", "config.json", TRUNK_FILE, EXPERTS])
def test_a_file_that_grew_is_refused(olmoe, name):
    with open(olmoe / name, "ab") as file:
        file.write(b"\0" * 4096)
    with pytest.raises(REFUSALS, match=re.escape(str(olmoe / name))):
        Bundle.open(olmoe)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bundle.json", "{path}: this is not a bundle; make one with `edge-moe compress {path} OUT`"),
        ("config.json", "{path}/config.json: no such file, but bundle.json lists it; copy the bundle again"),
        (TRUNK_FILE, "{path}/trunk.safetensors: no such file, but bundle.json lists it; copy the bundle again"),
        (EXPERTS, f"{{path}}/{EXPERTS}: no such file, but bundle.json lists it; copy the bundle again"),
    ],
)
@pytest.mark.parametrize("instead", ["nothing", "directory", "fifo", "dangling link"])
def test_a_missing_file_is_named(olmoe, name, message, instead):
    file = olmoe / name
    file.unlink()
    {
        "nothing": lambda: None,
        "directory": file.mkdir,
        "fifo": lambda: os.mkfifo(file),
        "dangling link": lambda: file.symlink_to(olmoe / "nowhere"),
    }[instead]()
    with pytest.raises(REFUSALS) as caught:
        Bundle.open(olmoe)
    assert str(caught.value) == message.format(path=olmoe)


def moved_to(store, bundle) -> None:
    """Move a bundle's files to another directory and leave links."""
    files = list(bundle.iterdir())
    store.mkdir(parents=True)
    for file in files:
        shutil.move(file, store / file.name)
        file.symlink_to(os.path.relpath(store / file.name, bundle))


def test_links_inside_a_bundle_and_into_a_hub_cache_are_followed(olmoe, answer, tmp_path):
    inside, snapshot = olmoe, tmp_path / "models--org--name" / "snapshots" / "0123456789abcdef"
    shutil.copytree(olmoe, snapshot)
    moved_to(inside / "store", inside)
    moved_to(snapshot.parents[1] / "blobs", snapshot)
    for path in (inside, snapshot):
        np.testing.assert_array_equal(use(path, IDS), answer)


@pytest.mark.parametrize("name", ["bundle.json", "config.json", "tokenizer.json", TRUNK_FILE, EXPERTS])
def test_a_link_out_of_the_bundle_is_refused(copy_of, tmp_path, name):
    path = copy_of("reference", width=4)
    outside = shutil.move(path / name, tmp_path / "outside")
    (path / name).symlink_to(outside)
    with pytest.raises(ValueError) as caught:
        Bundle.open(path)
    assert str(caught.value) == (
        f"{path / name}: is a link to {outside}, outside of {path}; links are followed only inside it and into a "
        "Hugging Face cache: put the file itself there"
    )


def test_a_path_that_is_no_bundle_is_named(tmp_path):
    message = f"{tmp_path}/x: no such bundle directory; make one with `edge-moe compress MODEL {tmp_path}/x`"
    for make in (lambda: None, (tmp_path / "x").touch):
        make()
        with pytest.raises(FileNotFoundError) as caught:
            Runtime(tmp_path / "x")
        assert str(caught.value) == message


# ---- one byte


def test_a_changed_byte_anywhere_in_a_record_is_found_at_its_first_use_and_by_verify(olmoe):
    file, expert = first_record(olmoe)
    message = f"{file}: expert 0 of layer 0 does not match its checksum; {AGAIN}"
    rng = random.Random(0)
    places = [0, expert.nbytes - 1, *(rng.randrange(expert.nbytes) for _ in range(30))]
    for at in places:
        mask = 1 << rng.randrange(8)
        flip(file, expert.offset + at, mask)
        with pytest.raises(ValueError) as caught:
            list(verify(Bundle.open(olmoe)))
        assert str(caught.value) == message
        with pytest.raises(OSError) as caught:  # 12 tokens use every one of the layer's 8 experts
            logits_of(olmoe, IDS, ram="2GB", threads=1)
        assert str(caught.value) == message
        flip(file, expert.offset + at, mask)


@pytest.mark.parametrize("name", ["bundle.json", "config.json", TRUNK_FILE])
def test_a_changed_byte_of_any_other_file_is_found_at_opening(olmoe, name):
    rng = random.Random(1)
    size = (olmoe / name).stat().st_size
    # The last byte of bundle.json is white space.
    for at in [0, 1, size - 2, *(rng.randrange(size - 1) for _ in range(40))]:
        flip(olmoe / name, at)
        with pytest.raises(REFUSALS, match=re.escape(str(olmoe))):
            logits_of(olmoe, IDS, ram="2GB", threads=1)
        flip(olmoe / name, at)


def test_a_changed_byte_of_the_expert_header_is_found_at_opening(olmoe):
    size = header_bytes(olmoe / EXPERTS)
    rng = random.Random(2)
    for at in [
        0,
        7,
        8,
        size - 1,
        *(rng.randrange(size) for _ in range(60)),
        *(rng.randrange(8, 900) for _ in range(60)),
    ]:
        flip(olmoe / EXPERTS, at)
        with pytest.raises(ValueError, match=re.escape(str(olmoe / EXPERTS))):
            Bundle.open(olmoe)
        flip(olmoe / EXPERTS, at)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (TRUNK_FILE, "does not match its checksum"),
        ("config.json", "does not match its checksum"),
        ("tokenizer.json", "does not match its checksum"),
        ("tokenizer_config.json", "does not match its checksum"),
        ("bundle.json", "does not match its own checksum"),
    ],
)
def test_the_changed_file_is_named(copy_of, name, message):
    path = copy_of("reference", width=2)
    text = (path / name).read_bytes()
    if name == TRUNK_FILE:
        flip(path / name, len(text) - 1)
    else:  # still good JSON
        changed = re.sub(rb'"(rope_thet|conten|model_max_lengt|see|byte).":', rb'"\1_":', text, count=1)
        assert changed != text
        (path / name).write_bytes(changed)
    with pytest.raises(ValueError) as caught:
        Runtime(path, "2GB")
    assert str(caught.value) == f"{path / name}: {message}; {AGAIN}"


@pytest.mark.parametrize("resident", [True, False])
def test_after_a_failed_read_the_runtime_works_on(copy_of, resident):
    path = copy_of("reference", width=4)
    with Runtime(path, "2GB", 64, threads=2) as runtime:
        want = runtime.generate("import os", 16)
    file, _ = first_record(path)
    with Runtime(path, "2GB", 64, threads=2) if resident else paged_runtime(path) as runtime:
        begun = runtime.generate("import os", 2)
        assert begun.tokens == want.tokens[:2]
        for layer in range(4):  # one expert of each layer that the next prompt uses
            flips = [runtime.bundle.experts[layer, index].offset for index in range(16)]
            [flip(file, at) for at in flips]
            if resident:  # what was verified once is not read again
                runtime.close()
                runtime = Runtime(path, "2GB", 64, threads=2)
            with pytest.raises(OSError, match=rf"expert \d+ of layer {layer} does not match its checksum"):
                for prompt in ("class A:", "1 2 3 4", "the quick brown fox", "\n\n\n    return x"):
                    runtime.generate(prompt, 16)
            [flip(file, at) for at in flips]
            again = runtime.generate("import os", 16)
            assert again.tokens == want.tokens
            assert again.text == want.text
        runtime.close()


# ---- tables that lie


def record(table, layer=0, index=0) -> dict:
    return table["experts"]["records"][layer][index]


def layout(table) -> dict:
    return table["experts"]["layouts"][0]


EDITS = {
    "version 3": (
        lambda t: t.update(version=3),
        "format version 3 is newer than 2, the newest this edge-moe reads; upgrade edge-moe",
    ),
    "version 1": (
        lambda t: t.update(version=1),
        f"bundles of format 1 have no 'layouts'; {AGAIN}",
    ),
    "layouts of format 2 with version 1": (
        lambda t: (t.update(version=1), t["experts"].pop("layouts")),
        f"record 0 of row 0 has a 'layout', which format 1 does not have; {AGAIN}",
    ),
    "widths of format 1": (
        lambda t: record(t).update(widths=[4, 4, 4]),
        f"expert 0 of layer 0 has 'widths', which format 2 has in its layout; {AGAIN}",
    ),
    "version text": (
        lambda t: t.update(version="1"),
        f"format version is '1', expected a whole number; {AGAIN}",
    ),
    "no trunk": (lambda t: t.pop("trunk"), f"'trunk' is missing; {AGAIN}"),
    "no copies": (lambda t: t.pop("copies"), f"'copies' is missing; {AGAIN}"),
    "config not listed": (lambda t: t["copies"].clear(), f"'config.json' is missing from 'copies'; {AGAIN}"),
    "negative offset": (
        lambda t: record(t).update(offset=-16384),
        f"'offset' is -16384, expected 0 to {2**62}; {AGAIN}",
    ),
    "huge offset": (
        lambda t: record(t).update(offset=10**30),
        f"'offset' is {10**30}, expected 0 to {2**62}; {AGAIN}",
    ),
    "fraction": (lambda t: record(t).update(offset=16384.0), f"'offset' is float, expected int; {AGAIN}"),
    "unaligned offset": (
        lambda t: record(t).update(offset=16385),
        f"expert 0 of layer 0 is at 16,385, expected a multiple of 4,096; {AGAIN}",
    ),
    "short record": (
        lambda t: layout(t).update(bytes=0),
        f"layout 0 has 0 bytes, expected 4,096; {AGAIN}",
    ),
    "no layouts": (lambda t: t["experts"].update(layouts=[]), f"'layout' is 0, expected 0 to -1; {AGAIN}"),
    "no such layout": (lambda t: record(t).update(layout=1), f"'layout' is 1, expected 0 to 0; {AGAIN}"),
    "a part twice as long": (
        lambda t: layout(t)["parts"].update({"up.codes": [1280, 2048]}),
        f"layout 0: part up.codes has 2048 bytes, expected 1024; {AGAIN}",
    ),
    "an unaligned part": (
        lambda t: layout(t)["parts"].update({"up.codes": [1281, 1024]}),
        f"layout 0: part up.codes begins at byte 1281, expected a multiple of 64; {AGAIN}",
    ),
    "parts that overlap": (
        lambda t: layout(t)["parts"].update({"up.codes": [0, 1024]}),
        f"layout 0: parts overlap; {AGAIN}",
    ),
    "a part outside the record": (
        lambda t: layout(t)["parts"].update({"up.codes": [4096, 1024]}),
        f"layout 0 has 4,096 bytes, expected 8,192; {AGAIN}",
    ),
    "a part that no codec has": (
        lambda t: layout(t)["parts"].update({"up.table": [3840, 64]}),
        f"layout 0: there are parts that the codecs do not have; {AGAIN}",
    ),
    "a part too few": (lambda t: layout(t)["parts"].pop("up.codes"), f"layout 0: part up.codes is missing; {AGAIN}"),
    "a place that is none": (
        lambda t: layout(t)["parts"].update({"up.codes": [1280]}),
        f"part 'up.codes' of layout 0 is not an offset and a size; {AGAIN}",
    ),
    "a bias that the model lacks": (
        lambda t: layout(t)["parts"].update({"up.output_bias": [3840, 128]}),
        f"layout 0: there are parts that the codecs do not have; {AGAIN}",
    ),
    "no such file": (lambda t: record(t).update(file=1), f"'file' is 1, expected 0 to 0; {AGAIN}"),
    "width 7": (
        lambda t: layout(t)["matrices"][0].update(width=7),
        f"codec affine of layout 0 has no width 7; {AGAIN}",
    ),
    "width 32": (
        lambda t: layout(t)["matrices"][1].update(codec="float32", width=32),
        f"widths [4, 32, 4] of layout 0 are not three of (1, 2, 3, 4, 5, 6, 8, 16); {AGAIN}",
    ),
    "two matrices": (
        lambda t: layout(t)["matrices"].pop(),
        f"layout 0 has 2 matrices, expected gate, up and down; {AGAIN}",
    ),
    "true as a width": (
        lambda t: layout(t)["matrices"][0].update(width=True),
        f"'width' is bool, expected int; {AGAIN}",
    ),
    "unknown codec": (
        lambda t: layout(t)["matrices"][2].update(codec="codebook"),
        "codec 'codebook' of layout 0 is not known; upgrade edge-moe",
    ),
    "group 48": (
        lambda t: layout(t)["matrices"][0].update(group=48),
        f"group 48 of layout 0 does not divide 64; {AGAIN}",
    ),
    "group 0": (
        lambda t: layout(t)["matrices"][2].update(group=0),
        f"group 0 of layout 0 does not divide 32; {AGAIN}",
    ),
    "checksum": (
        lambda t: record(t).update(crc32c="-0000001"),
        f"crc32c is '-0000001', expected 8 hexadecimal digits; {AGAIN}",
    ),
    "frequency": (
        lambda t: record(t).update(frequency=10**400),
        f"frequency of expert 0 of layer 0 is not from 0 to 1; {AGAIN}",
    ),
    "alignment": (lambda t: t["experts"].update(alignment=512), f"record alignment 512 is not possible; {AGAIN}"),
    "a layer too few": (
        lambda t: t["experts"]["records"].pop(),
        f"records of 1 layers, config.json has 2 with experts; {AGAIN}",
    ),
    "an expert too few": (
        lambda t: t["experts"]["records"][1].pop(),
        f"layer 1 needs 8 records; {AGAIN}",
    ),
    "trunk width": (
        lambda t: t["trunk"]["tensors"]["layers.0.q"].update(width=7),
        f"codec affine of layers.0.q has no width 7; {AGAIN}",
    ),
    "quantised norm": (
        lambda t: t["trunk"]["tensors"]["output_norm"].update(codec="affine", width=8, group=64),
        f"codec affine of output_norm is not possible; {AGAIN}",
    ),
    "trunk group": (
        lambda t: t["trunk"]["tensors"]["layers.0.q"].update(group=128),
        f"group 128 of layers.0.q does not divide 64; {AGAIN}",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_table_that_lies_is_refused(olmoe, edit):
    change, message = EDITS[edit]
    edit_table(olmoe, change)
    with pytest.raises(ValueError) as caught:
        Bundle.open(olmoe)
    assert str(caught.value) == f"{olmoe}/bundle.json: {message}"


DROPPED_EDITS = {  # of a bundle with "dropped": [[], [0, 1, 2, 4, 7]], "top_k": [2, 3]
    "no dropped": (lambda t: t.pop("dropped"), f"'dropped' is missing; {AGAIN}"),
    "dropped null": (lambda t: t.update(dropped=None), f"'dropped' is NoneType, expected list; {AGAIN}"),
    "dropped object": (lambda t: t.update(dropped={}), f"'dropped' is dict, expected list; {AGAIN}"),
    "a layer too few": (
        lambda t: t["dropped"].pop(0),
        f"'dropped' has 1 layers, config.json has 2 with experts; {AGAIN}",
    ),
    **{
        f"dropped {numbers}": (
            lambda t, numbers=numbers: t["dropped"].__setitem__(1, numbers),
            f"dropped experts of layer 1 are not numbers from 0 to 7, ascending and each once; {AGAIN}",
        )
        for numbers in (
            *(7, None, "01247", {}, [[0]], [0, 1, 2, 4, 8], [-1, 0, 1, 2, 4], [0, 1, 2, 4, 10**30]),
            *([0, 1, 2, 7, 4], [0, 1, 2, 4, 4], [0, 1, 2, 4, 7.0], [False, True, 2, 4, 7], [0, 1, 2, 4, "7"]),
        )
    },
    "too many dropped": (
        lambda t: t["dropped"].__setitem__(1, [0, 1, 2, 3, 4, 7]),
        f"top_k of layer 1 is 3 with 2 experts left, expected 1 to 2; {AGAIN}",
    ),
    "all dropped": (
        lambda t: t["dropped"].__setitem__(0, [*range(8)]),
        f"top_k of layer 0 is 2 with 0 experts left, expected 1 to 0; {AGAIN}",
    ),
    "a record too few": (lambda t: t["experts"]["records"][1].pop(), f"layer 1 needs 3 records; {AGAIN}"),
    "a record too many": (
        lambda t: t["experts"]["records"][1].append(record(t)),
        f"layer 1 needs 3 records; {AGAIN}",
    ),
    "top_k number": (lambda t: t.update(top_k=2), f"'top_k' is int, expected list; {AGAIN}"),
    "top_k empty": (lambda t: t.update(top_k=[]), f"'top_k' has 0 layers, config.json has 2 with experts; {AGAIN}"),
    "top_k too many": (
        lambda t: t["top_k"].append(1),
        f"'top_k' has 3 layers, config.json has 2 with experts; {AGAIN}",
    ),
    **{
        f"top_k {top_k!r}": (
            lambda t, top_k=top_k: t["top_k"].__setitem__(0, top_k),
            f"top_k of layer 0 is {top_k!r} with 8 experts left, expected 1 to 3; {AGAIN}",
        )
        for top_k in (0, -1, 4, 2**64, 2.0, True, "2", None, [2])
    },
}


@pytest.mark.parametrize("edit", DROPPED_EDITS)
def test_a_table_that_lies_about_dropped_experts_is_refused(without_experts, edit):
    change, message = DROPPED_EDITS[edit]
    edit_table(without_experts, change)
    with pytest.raises(ValueError) as caught:
        Bundle.open(without_experts)
    assert str(caught.value) == f"{without_experts}/bundle.json: {message}"


@pytest.mark.parametrize(
    ("dropped", "left"), [([[], [0, 1, 2, 4]], 4), ([], 8), ([[], []], 8), ([[], [0, 1, 2, 4, 7]], None)]
)
def test_a_router_with_rows_for_other_experts_is_refused(without_experts, dropped, left):
    edit_table(without_experts, lambda table: table.update(dropped=dropped))
    if left is None:  # as it was
        Bundle.open(without_experts)
        return
    with pytest.raises(ValueError) as caught:
        Bundle.open(without_experts)
    assert str(caught.value) == (
        f"{without_experts / TRUNK_FILE}: tensor layers.1.router is F32 (3, 64), bundle.json makes it "
        f"F32 ({left}, 64); {AGAIN}"
    )


def test_a_table_of_a_bundle_with_all_experts_cannot_drop_some(olmoe):
    edit_table(olmoe, lambda table: table.update(dropped=[[0], []]))
    with pytest.raises(ValueError, match=r"layers.0.router is F32 \(8, 64\), bundle.json makes it F32 \(7, 64\)"):
        Bundle.open(olmoe)


def test_records_that_point_at_one_another_are_refused(olmoe):
    edit_table(olmoe, lambda table: record(table).update(offset=record(table, 0, 1)["offset"]))
    with pytest.raises(ValueError) as caught:
        Bundle.open(olmoe)
    file = olmoe / EXPERTS
    assert str(caught.value) == (f"{file}: layers.0.experts.0 starts at byte 16,384, bundle.json says 20,480; {AGAIN}")


@pytest.mark.parametrize("name", ["../trunk.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a\\b"])
def test_a_file_name_that_leaves_the_bundle_is_refused(olmoe, name):
    message = f"{olmoe}/bundle.json: {name!r} is not a file name inside the bundle; {AGAIN}"
    before = (olmoe / "bundle.json").read_bytes()
    for change in (
        lambda table: table["experts"]["files"][0].update(name=name),
        lambda table: table["copies"].update({name: "0" * 64}),
    ):
        (olmoe / "bundle.json").write_bytes(before)
        edit_table(olmoe, change)
        with pytest.raises(ValueError) as caught:
            Bundle.open(olmoe)
        assert str(caught.value) == message


# ---- random edits


HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 31, 32, 64, 4096, 16384, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400),
    *(0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "affine", "bfloat16", "00000000", "../x", "\0", "\ud800"),
    *([], [1], [4, 4, 4], [[]], {}, {"width": 8}, {"name": "trunk.safetensors", "bytes": 1}, "config.json", EXPERTS),
]  # fmt: skip


def places(value, path=()):
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from places(child)


def widths(path) -> list:
    return [(expert.widths, expert.group) for expert in Bundle.open(path).experts.values()]


def test_random_edits_of_the_table_are_refused_or_change_nothing(olmoe, answer):
    original, right_widths = (olmoe / "bundle.json").read_bytes(), widths(olmoe)
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)

        def change(table, rng=rng):
            for _ in range(rng.choice((1, 1, 2))):
                container, key = rng.choice(list(places(table)))
                action = rng.random()
                if action < 0.7:
                    container[key] = rng.choice(HOSTILE)
                elif action < 0.85:
                    del container[key]
                else:
                    container[key] = rng.choice(list(places(table)))[0]

        (olmoe / "bundle.json").write_bytes(original)
        try:
            edit_table(olmoe, change)
        except (ValueError, RecursionError):  # an edit that put a value inside itself cannot be written
            continue
        try:
            logits = use(olmoe, IDS)
        except REFUSALS:
            refused += 1
        else:  # where padding hides the difference, widths of the same bytes can only be told by the checksum made anew
            assert np.array_equal(logits, answer) or widths(olmoe) != right_widths
    assert refused > 100


@pytest.mark.parametrize("key", ["dropped", "top_k"])
def test_hostile_values_among_the_dropped_experts_are_refused_or_run(without_experts, key):
    original = (without_experts / "bundle.json").read_bytes()
    count, refused = len(list(places({key: json.loads(original)[key]}))), 0
    for place in range(count):
        for value in HOSTILE:

            def change(table, place=place, value=value):
                changed = {key: table[key]}
                container, inner = list(places(changed))[place]
                container[inner] = value
                table |= changed

            (without_experts / "bundle.json").write_bytes(original)
            edit_table(without_experts, change)
            try:
                assert np.isfinite(use(without_experts, IDS)).all()  # another model, as its author's checksum says
            except REFUSALS:
                refused += 1
    assert refused > count * len(HOSTILE) // 2


def test_random_edits_of_the_config_are_refused_or_run(olmoe):
    original = json.loads((olmoe / "config.json").read_text())
    refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        config = json.loads(json.dumps(original))
        container, key = rng.choice(list(places(config)))
        container[key] = rng.choice(HOSTILE)
        edit_copy(olmoe, "config.json", json.dumps(config).encode())
        try:
            assert np.isfinite(use(olmoe, IDS)).all()  # another model, which only its author's checksum could tell
        except REFUSALS:
            refused += 1
    assert refused > 50
