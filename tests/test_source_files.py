"""What a bundle takes over from a checkpoint, and that no link makes it take anything else of this machine."""

import json
import os
import shutil
from pathlib import Path

import pytest
from bundles import REFERENCE
from golden_checkpoints import write_checkpoint

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.source.copied_files import contents
from edge_moe.runtime.bundle import COPIED
from edge_moe.runtime.tokenizer import Tokenizer

LINK = "links are followed only inside it and into a Hugging Face cache: put the file itself there"


@pytest.fixture
def olmoe(tmp_path) -> Path:
    return write_checkpoint("olmoe", tmp_path / "olmoe")[0]


@pytest.fixture
def secret(tmp_path) -> Path:
    file = tmp_path / "secret"
    file.write_text("root: *")
    return file


def refused(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_link_out_of_the_checkpoint_is_not_copied(olmoe, secret, tmp_path, name):
    (olmoe / name).symlink_to(secret)
    message = refused(ValueError, compress, olmoe, tmp_path / "out.emoe", method="rtn", width=4)
    assert message == f"{olmoe / name}: is a link to {secret}, outside of {olmoe}; {LINK}"
    assert not (tmp_path / "out.emoe").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_nor_is_one_read_for_the_model(olmoe, tmp_path, name):
    (olmoe / name).rename(tmp_path / name)
    (olmoe / name).symlink_to(tmp_path / name)
    assert (
        refused(ValueError, Checkpoint, olmoe)
        == f"{olmoe / name}: is a link to {tmp_path / name}, outside of {olmoe}; {LINK}"
    )


def test_a_folder_that_is_a_link_does_not_help(olmoe, secret, tmp_path):
    (olmoe / "inner").symlink_to(tmp_path)
    (olmoe / "merges.txt").symlink_to("inner/secret")
    assert (
        refused(ValueError, contents, olmoe, True)
        == f"{olmoe / 'merges.txt'}: is a link to {secret}, outside of {olmoe}; {LINK}"
    )


def test_links_inside_the_checkpoint_and_to_the_checkpoint_are_followed(olmoe, tmp_path):
    (olmoe / "store").mkdir()
    (olmoe / "model.safetensors").rename(olmoe / "store" / "weights")
    (olmoe / "model.safetensors").symlink_to("store/weights")
    (tmp_path / "link").symlink_to(olmoe)
    assert Checkpoint(tmp_path / "link").fingerprint() == Checkpoint(olmoe).fingerprint()


def test_what_is_no_regular_file_is_refused(olmoe):
    message = f"{olmoe / 'merges.txt'}: no such file; put the file itself there"
    os.mkfifo(olmoe / "merges.txt")
    assert refused(FileNotFoundError, contents, olmoe, True) == message
    for target in ("/dev/zero", "nowhere"):
        (olmoe / "merges.txt").unlink()
        (olmoe / "merges.txt").symlink_to(target)
        assert refused(FileNotFoundError, contents, olmoe, True) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file "
         "itself; run `git lfs pull` in its repository"),
        ("vocab.json", b"{", "is not what its name says (Expecting property name enclosed in double quotes: line 1 "
         "column 2 (char 1)); download it again"),
        ("vocab.json", b"[1]", "expected a JSON object, found list; download it again"),
        ("merges.txt", b"#version: 0.2\na b\nroot:*:19:\n", "line 3 is not two symbols with a space between; "
         "download it again"),
        ("chat_template.jinja", b"\xff\xfe", "is not what its name says ('utf-8' codec can't decode byte 0xff in "
         "position 0: invalid start byte); download it again"),
    ],
)  # fmt: skip
def test_what_is_not_what_its_name_says_is_refused(olmoe, tmp_path, name, content, message):
    (olmoe / name).write_bytes(content)
    found = refused(ValueError, compress, olmoe, tmp_path / "out.emoe", method="rtn", width=4)
    assert found == f"{olmoe / name}: {message}"


def test_a_file_that_is_too_large_is_refused_before_it_is_read(olmoe):
    with open(olmoe / "vocab.json", "wb") as file:
        file.truncate(1 << 40)
    assert refused(ValueError, contents, olmoe, True) == (
        f"{olmoe / 'vocab.json'}: has more than {COPIED['vocab.json']:,} bytes, which no such file needs; "
        "download it again"
    )


def test_everything_else_is_taken_as_it_is(olmoe, tmp_path):
    files = {"merges.txt": b"#version: 0.2\na b\n", "vocab.json": b'{"a": 0}', "chat_template.jinja": b"{{ x }}"}
    for name, content in files.items():
        (olmoe / name).write_bytes(content)
    made = compress(olmoe, tmp_path / "out.emoe", method="rtn", width=4).path
    for name in (*files, "config.json"):
        assert (made / name).read_bytes() == (olmoe / name).read_bytes()
    assert json.loads((made / "bundle.json").read_text())["copies"].keys() >= files.keys()
    shutil.rmtree(made)


def test_chat_templates_of_a_directory_come_into_the_tokenizer_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    source, bundle = shutil.copytree(REFERENCE, tmp_path / "source"), tmp_path / "bundle"
    (source / "chat_template.jinja").write_text("beside")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    bundle.mkdir()
    for name, content in contents(source, tied_head=True).items():
        (bundle / name).write_bytes(content)
    want = {"default": "beside", "tool_use": "tools: {{ tools }}"}
    for directory in (source, bundle):
        assert transformers.AutoTokenizer.from_pretrained(directory).chat_template == want
        assert Tokenizer(directory).chat_templates == want
    (tmp_path / "secret.jinja").write_text("a secret")
    (source / "additional_chat_templates" / "more.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(ValueError, match="more.jinja: is a link to .*secret.jinja, outside of"):
        contents(source, tied_head=True)
