"""Bundles whose parts are huge, which bring files of their own or cannot be read: one clear error, in little memory."""

import errno
import json
import shutil
import subprocess

import pytest
from bundles import edit_table, run_python
from test_bundle_attacks import AGAIN, EXPERTS

from edge_moe.report import bundle_text
from edge_moe.runtime.bundle import COPIED, TRUNK_FILE, Bundle, verify
from edge_moe.runtime.config_file import read_json
from edge_moe.runtime.describe import describe_bundle
from edge_moe.runtime.files import MOST_JSON_BYTES, MOST_JSON_VALUES
from edge_moe.runtime.pruning import MASK_FILE

HUGE = 3_000_000_000
MOST_GROWTH = 30_000_000  # bytes of memory that an error may take


@pytest.fixture
def olmoe(copy_of):
    return copy_of("olmoe", width=4)


def opened(path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        Bundle.open(path)
    return str(caught.value)


def grow(file, nbytes: int) -> None:
    """Make a file of so many bytes, of which all that are new take no room on disk."""
    with open(file, "ab") as handle:
        handle.truncate(nbytes)


def list_copy(path, name: str) -> None:
    def listed(table: dict) -> None:
        table["copies"][name], table["copy_bytes"][name] = "0" * 64, (path / name).stat().st_size

    edit_table(path, listed)


def with_header(file, header: dict) -> int:
    """Replace the header of a safetensors file and leave its data; returns the file's new size."""
    data = file.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 16384)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file.stat().st_size


# ---- more than memory holds


def huge_copy(path, name):
    grow(path / name, HUGE)
    list_copy(path, name)
    return f"{path / name}: has {HUGE:,} bytes, expected at most {COPIED[name]:,}; {AGAIN}"


def huge_unlisted(path, name):
    edit_table(path, lambda table: table.pop("copy_bytes"))
    grow(path / name, HUGE)
    return f"{path / name}: has {HUGE:,} bytes, expected at most {COPIED[name]:,}; {AGAIN}"


def huge_mask_routers(path):
    grow(path / MASK_FILE, HUGE)
    edit_table(
        path,
        lambda table: table.update(
            pruning={
                "rules": {"loss": {"cuts": [0.1], "prices": [0.1]}},
                "default": "loss",
                "cut": 0.1,
                "mask_routers": {"bytes": HUGE, "crc32c": "00000000"},
            }
        ),
    )
    return f"{path / MASK_FILE}: has {HUGE:,} bytes, expected "


def many_names_of_one_file(path):
    edit_table(path, lambda table: table["experts"].update(files=100_000 * table["experts"]["files"]))
    return f"{path}/bundle.json: 'files' has a name twice; {AGAIN}"


def many_files(path):
    def change(table: dict) -> None:
        table["experts"]["files"] += [{"name": f"{number}", "bytes": 1} for number in range(100_000)]

    edit_table(path, change)
    return f"{path}/bundle.json: no record is in 0; {AGAIN}"


def many_tensors(path, name):
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    size = with_header(path / name, {f"{number}": empty for number in range(300_000)})

    def change(table: dict) -> None:
        (table["trunk"] if name == TRUNK_FILE else table["experts"]["files"][0])["bytes"] = size

    edit_table(path, change)
    return f"{path / name}: the header claims "


def huge_table(path):
    grow(path / "bundle.json", HUGE)
    return f"{path}/bundle.json: has more than {MOST_JSON_BYTES:,} bytes, which no such file needs; {AGAIN}"


def many_values(path):
    (path / "bundle.json").write_text('{"version": 1, "x": [' + "[]," * MOST_JSON_VALUES + "0]}")
    return f"{path}/bundle.json: has more than {MOST_JSON_VALUES:,} values, which no such file needs; {AGAIN}"


def huge_trunk(path):
    grow(path / TRUNK_FILE, 400_000_000)
    edit_table(path, lambda table: table["trunk"].update(bytes=400_000_000))
    return f"{path / TRUNK_FILE}: does not match its checksum; {AGAIN}"


LARGE = {
    "a configuration": lambda path: huge_copy(path, "generation_config.json"),
    "a vocabulary": lambda path: huge_copy(path, "vocab.json"),
    "a tokenizer that is not listed": lambda path: huge_unlisted(path, "tokenizer.json"),
    "mask routers": huge_mask_routers,
    "names of one file": many_names_of_one_file,
    "files": many_files,
    "tensors of experts": lambda path: many_tensors(path, EXPERTS),
    "tensors of the trunk": lambda path: many_tensors(path, TRUNK_FILE),
    "a table": huge_table,
    "values": many_values,
    "a trunk": huge_trunk,
}
OPEN = """
import sys
from edge_moe import _core
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.pruning import read_mask_routers
before = _core.peak_bytes()
try:
    bundle = Bundle.open(sys.argv[1])
    read_mask_routers(bundle.path, bundle.pruning, bundle.table)
    for _ in verify(bundle):
        pass
except (ValueError, OSError) as error:
    print(_core.peak_bytes() - before)
    print(error)
"""


@pytest.mark.parametrize("what", LARGE)
def test_a_bundle_with_more_than_memory_holds_is_refused_in_little(olmoe, what):
    message = LARGE[what](olmoe)
    growth, error = run_python(OPEN, olmoe).stdout.split("\n", 1)
    assert error.startswith(message) and AGAIN in error
    # What bundle.json says is read before it can be refused: 100,000 objects have 4 MB in the file, 50 in memory.
    assert int(growth) < MOST_GROWTH + 20 * min((olmoe / "bundle.json").stat().st_size, 15_000_000)


def test_json_beyond_a_limit_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json(file, 8) == {"a": 1}
    with pytest.raises(ValueError) as caught:
        read_json(file, 7)
    assert str(caught.value) == f"{file}: has more than 7 bytes, which no such file needs; copy the file again"


# ---- files that bundle.json does not list


@pytest.mark.parametrize("name", sorted(set(COPIED) - {"config.json"}))
def test_a_file_that_would_be_used_must_be_listed(olmoe, name):
    (olmoe / name).write_text("{}")
    assert opened(olmoe) == (
        f"{olmoe / name}: bundle.json does not list this file, which would be used; remove it, or compress the model "
        "again from a directory that has it"
    )


def test_a_bundle_made_before_sizes_were_listed_opens_and_says_what_is_unchecked(olmoe, tmp_path):
    edit_table(olmoe, lambda table: table.pop("copy_bytes"))
    assert Bundle.open(olmoe).unlisted == () and "unchecked" not in bundle_text(describe_bundle(Bundle.open(olmoe)))
    (olmoe / "generation_config.json").write_text('{"eos_token_id": 7}')
    (olmoe / "README.md").write_text("is not used")
    bundle, said = Bundle.open(olmoe), "unchecked, because bundle.json does not list them: generation_config.json"
    assert 7 in bundle.config.eos_tokens and bundle.unlisted == ("generation_config.json",)
    assert said in bundle_text(describe_bundle(bundle)).splitlines()
    verified = subprocess.run(["edge-moe", "verify", olmoe], capture_output=True, text=True)
    assert verified.returncode == 0 and verified.stdout.splitlines()[-1] == said
    shutil.move(olmoe / "generation_config.json", tmp_path / "mine")
    (olmoe / "generation_config.json").symlink_to(tmp_path / "mine")
    assert opened(olmoe).startswith(
        f"{olmoe}/generation_config.json: is a link to {tmp_path}/mine, outside of {olmoe};"
    )


@pytest.mark.parametrize("change", [{"config.json": 1}, {}, {"config.json": 904, "x": 1}])
def test_sizes_that_are_not_those_of_the_copies_are_refused(olmoe, change):
    edit_table(olmoe, lambda table: table.update(copy_bytes=change))
    size = (olmoe / "config.json").stat().st_size
    assert opened(olmoe) == (
        f"{olmoe}/config.json: has {size} bytes, expected 1; {AGAIN}"
        if len(change) == 1
        else f"{olmoe}/bundle.json: 'copies' and 'copy_bytes' do not list the same files; {AGAIN}"
    )


def test_a_copy_that_changes_after_opening_is_found_by_verify(olmoe):
    bundle, file = Bundle.open(olmoe), olmoe / "config.json"
    file.write_bytes(file.read_bytes().replace(b"silu", b"gelu"))
    with pytest.raises(ValueError) as caught:
        list(verify(bundle))
    assert str(caught.value) == f"{file}: does not match its checksum; {AGAIN}"


# ---- what is said of a bundle's making


CERTIFICATE = {
    "held_out": {"tokens": 1, "source": "text", "sha256": "0"},
    "context": 256,
    "source_perplexity": 2.0,
    "bundle": dict.fromkeys(
        ("bits_per_weight", "perplexity", "perplexity_ratio", "kld_mean", "kld_p99", "top1_agreement"), 1.5
    ),
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"certificate": []}, "certificate is a list of 0, expected an object"),
        ({"certificate": {}}, "certificate.held_out is None, expected an object"),
        (
            {"certificate": {**CERTIFICATE, "context": True}},
            "certificate.context is True, expected a whole number from 0",
        ),
        (
            {"certificate": {**CERTIFICATE, "bundle": {**CERTIFICATE["bundle"], "kld_p99": "\33[2J"}}},
            "certificate.bundle.kld_p99 is '\\x1b[2J', expected a number",
        ),
        ({"certificate": {**CERTIFICATE, "source_perplexity": 10**400}}, "certificate.source_perplexity is 1000000"),
        ({"certificate": {**CERTIFICATE, "source_perplexity": float("nan")}}, "certificate.source_perplexity is nan"),
        ({"calibration": {"tokens": 1.5}}, "calibration.tokens is 1.5, expected a whole number from 0"),
        ({"calibration": {"tokens": 1}}, "calibration.source is None, expected a text"),
        ({"method": "pmq"}, "method is 'pmq', expected an object"),
        ({"method": {"name": "pmq", "spread": []}}, "method.spread is a list of 0, expected a number"),
        ({"method": {"name": "pmq", "flat": 1}}, "method.flat is 1, expected true or false"),
        ({"tool": ["x"]}, "tool is a list of 1, expected a text"),
    ],
)
def test_inspect_names_what_is_not_as_it_must_be_and_such_a_bundle_still_runs(olmoe, change, said):
    edit_table(olmoe, lambda table: table.update(change))
    with pytest.raises(ValueError) as caught:
        describe_bundle(Bundle.open(olmoe))
    assert str(caught.value).startswith(f"{olmoe}/bundle.json: {said}") and str(caught.value).endswith(AGAIN)
    edit_table(olmoe, lambda table: table.update(certificate=CERTIFICATE, calibration=None, method=None, tool=None))
    assert "on 1 tokens of text,\nin windows of 256" in bundle_text(describe_bundle(Bundle.open(olmoe)))


# ---- reads that fail


FAILING = """
import builtins, errno, io, sys
from edge_moe.runtime.bundle import Bundle, verify
path, name = sys.argv[1:]
bundle = Bundle.open(path)
class Failing(io.FileIO):
    def read(self, *_):
        raise OSError(errno.EIO, "Input/output error")
opened = builtins.open
builtins.open = lambda file, *args, **given: Failing(file) if str(file).endswith(name) else opened(file, *args, **given)
for what in (lambda: Bundle.open(path), lambda: list(verify(bundle))):
    try:
        what()
    except OSError as error:
        print(error.errno, error.filename)
"""


@pytest.mark.parametrize("name", ["config.json", "bundle.json", TRUNK_FILE, EXPERTS])
def test_a_read_that_fails_names_its_file(olmoe, name):
    failures = 1 if name == "bundle.json" else 2
    assert run_python(FAILING, olmoe, name).stdout.splitlines() == failures * [f"{errno.EIO} {olmoe / name}"]
