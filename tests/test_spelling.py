"""What people who come from other tools type: it is understood where it can be, else the error says what is meant."""

import pytest
from test_cli import COMMANDS, edge_moe, error_of, object_of, succeeds

from edge_moe import __version__


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("reference", width=8)


def usage_error(*arguments) -> str:
    """The last line of a usage error."""
    done = edge_moe(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",)])
def test_help_is_no_error(arguments):
    done = succeeds(*arguments)
    assert "Commands:\n" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_may_come_first(name):
    assert succeeds("help", name).stdout == succeeds(name, "--help").stdout


@pytest.mark.parametrize("arguments", [("-V",), ("version",), ("--version",)])
def test_the_version_has_three_spellings(arguments):
    assert succeeds(*arguments).stdout == f"edge-moe {__version__}\n"


def test_the_shell_can_complete():
    assert "_EDGE_MOE_COMPLETE=complete_bash" in succeeds("--show-completion", "bash").stdout


@pytest.mark.parametrize(
    "name, hint",
    [
        ("run", "edge-moe chat BUNDLE talks with a model, edge-moe generate BUNDLE TEXT answers once"),
        ("convert", "edge-moe compress MODEL OUT.emoe makes a bundle"),
        ("quantize", "edge-moe compress MODEL OUT.emoe makes a bundle"),
        ("server", "edge-moe serve BUNDLE answers over HTTP"),
        (
            "pull",
            "edge-moe downloads nothing: `hf download ORG/NAME --local-dir DIR`, then edge-moe compress DIR OUT.emoe",
        ),
    ],
)
def test_commands_of_other_tools_have_a_hint(name, hint):
    assert usage_error(name, "x") == f"No such command {name!r}; {hint}"


@pytest.mark.parametrize(
    "other",
    [
        ("--temperature", "0", "--max_tokens", "6", "-c", "64", "-t", "1"),
        ("--temperature=0", "--n-predict=6", "--ctx-size=64", "-t1"),
        ("--temp", "0", "--max-new-tokens", "6", "-c64", "--threads", "1"),
    ],
)
def test_options_of_other_tools_mean_the_same(bundle, other):
    plain = object_of(
        "generate", bundle, "-p", "import os\n", "--temp", "0", "-n", "6", "--context", "64", "--threads", "1"
    )
    assert object_of("generate", bundle, "-p", "import os\n", *other)["tokens"] == plain["tokens"]


@pytest.mark.parametrize("model", ["-m", "--model"])
def test_the_bundle_may_be_named_by_an_option(bundle, model):
    assert object_of("inspect", model, bundle)["path"] == str(bundle)
    assert object_of("inspect", f"--model={bundle}")["path"] == str(bundle)


def test_the_output_may_be_named_by_an_option(tmp_path):
    message = "no/config.json: no such file; a model directory has a config.json"
    assert error_of("compress", "no", "-o", "out.emoe", cwd=tmp_path) == message
    assert error_of("compress", "--out", "out.emoe", "--hf-path", "no", cwd=tmp_path) == message
    assert usage_error("compress", "no", "--outfile", "out.emoe", "third").startswith("Got unexpected extra argument")


def test_values_are_never_respelled(bundle):
    plain = object_of("generate", bundle, "--prompt=--temperature", "-n", "3")
    assert object_of("generate", bundle, "-p", "--temperature", "-n", "3")["tokens"] == plain["tokens"]
    assert (
        succeeds("generate", "-p", "a", "-n", "1", "--", bundle).stdout
        == succeeds("generate", bundle, "-p", "a", "-n", "1").stdout
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "x", "-p", "a", "-ngl", "99"), "No such option: -ngl; a GPU computes every layer or none"),
        (
            ("compress", "x", "y", "-q"),
            "No such option: -q; --bits B is the mean of true bits a weight: what others call 4-bit, with a scale for "
            "64 weights, is 4.5",
        ),
        (("verify", "x", "--temperature", "1"), "No such option: --temperature"),
        (("plan", "x", "--context", "many"), "'many' is not a number of tokens such as 4096 or 32k"),
    ],
)
def test_options_that_are_not_there_say_what_there_is(arguments, message):
    assert usage_error(*arguments).endswith(message)


@pytest.mark.parametrize("context, tokens", [("1k", 1024), ("0.5k", 512), ("1,000", 1000), ("64", 64)])
def test_a_context_may_be_in_thousands(bundle, context, tokens):
    assert object_of("plan", bundle, "--ram", "1GB", "--context", context)["context"] == tokens
