"""The command line: what each command prints, where, and with which exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from bundles import REFERENCE, flip, run_python

from edge_moe import __version__
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.commands import options
from edge_moe.runtime.plan import Plan
from edge_moe.runtime.runtime import Generation, Runtime
from edge_moe.runtime.tokenizer import Tokenizer

COMMANDS = (
    "demo",
    "compress",
    "prune",
    "plan",
    "inspect",
    "verify",
    "split",
    "generate",
    "chat",
    "serve",
    "eval",
    "bench",
    "doctor",
)
CONFIGS = REFERENCE.parent / "configs"


def edge_moe(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def succeeds(*arguments, **options) -> subprocess.CompletedProcess:
    done = edge_moe(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def object_of(*arguments, **options) -> dict:
    """The one object that --json prints."""
    done = succeeds(*arguments, "--json", **options)
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def error_of(*arguments, **options) -> str:
    """The one line that a failing command prints."""
    done = edge_moe(*arguments, **options)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("edge-moe: error: ") and done.stderr.count("\n") == 1
    return done.stderr.removeprefix("edge-moe: error: ").removesuffix("\n")


@pytest.fixture(scope="module")
def bundle(bundle_of) -> Path:
    return bundle_of("reference", width=8)


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("import os\n\n\ndef main(path):\n    return os.path.join(path, 'name')\n" * 12)
    return file


# The door


def test_help_names_every_command_and_how_to_start():
    text = succeeds("--help").stdout
    assert [line.split()[0] for line in text.split("Commands:\n")[1].splitlines()[: len(COMMANDS)]] == list(COMMANDS)
    assert "edge-moe demo" in text and "..." not in text.split("Commands:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    text = succeeds(name, "-h").stdout
    assert text.startswith(f"Usage: edge-moe {name}") and "--help" in text


def test_the_help_of_compress_begins_with_what_matters_and_has_every_option_once():
    text = succeeds("compress", "-h").stdout
    titles = [line[:-1] for line in text.splitlines()[1:] if line and line[0] != " "]
    assert titles == ["Arguments", "How small (one of these; default: --bits 2.5)", "From what text", "How", "Options"]
    first = [line.split()[0] for line in text.splitlines() if line.startswith("  -")]
    assert first == [
        *("--bits", "--width", "--size", "--ram", "--paged", "--context"),
        *("--calibration", "--held-out", "--tokens", "--seed"),
        *("--method", "--group", "--trunk-width", "--drop-experts", "--drop-score", "--drop-counts"),
        *("--adjust-top-k", "--act-order", "--no-certificate", "--resume", "--force", "--threads", "--json", "-h,"),
    ]


def test_the_version_is_the_packages():
    assert succeeds("--version").stdout == f"edge-moe {__version__}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x.emoe", "--promt", "a"], "No such option: --promt"),
        (["generat"], "No such command 'generat'"),
        (["generate"], "Missing argument"),
        (["generate", "x.emoe", "-p", "a", "--tokens", "1"], "give one prompt: an argument, -p TEXT, -f FILE or --tok"),
        (["generate", "x.emoe", "a", "-f", "b"], "give one prompt: an argument, -p TEXT, -f FILE or --tokens 1,2,3"),
        (["generate", "x.emoe", "a", "--raw", "--system", "b"], "--system needs a message as the prompt: leave --raw"),
        (["generate", "x.emoe", "-p", "a", "-n", "many"], "Invalid value for '-n'"),
        (["compress", "x", "y", "--context", "64"], "--context needs --ram"),
        (["compress", "x", "y", "--drop-score", "age"], "Invalid value for '--drop-score'"),
        (["bench"], "give either a BUNDLE or --synthetic CONFIG"),
        (["bench", "x.emoe", "--layers", "2"], "--layers, --width, --vocab and --keep need --synthetic"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_wrong(arguments, message):
    done = edge_moe(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "no.emoe"], "no.emoe: no such bundle directory; make one with `edge-moe compress MODEL no.emoe`"),
        (["plan", "no"], "no: no such bundle, model directory or config.json"),
        (["compress", "no", "out.emoe"], "no/config.json: no such file; a model directory has a config.json"),
        (["bench", "--synthetic", "no.json"], "no.json: no such file; a model directory has a config.json"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, arguments, message):
    assert error_of(*arguments, cwd=tmp_path) == message


def test_a_bundle_that_is_damaged_is_one_line(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy.emoe")
    flip(copy / "experts-00001-of-00001.safetensors", 500_000)
    assert error_of("verify", copy).endswith("does not match its checksum; copy the bundle again")


# generate


def test_text_goes_to_stdout_and_statistics_to_stderr(bundle):
    done = succeeds("generate", bundle, "-p", "import os\n", "-n", "12", "--ram", "1GB")
    answer = object_of("generate", bundle, "-p", "import os\n", "-n", "12", "--ram", "1GB")
    assert done.stdout == answer["text"] + "\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("prompt ") and "generated 12 at " in lines[0]
    assert lines[1].startswith("experts 4.00 of 4 per token and layer; hits ")
    assert lines[2].startswith("memory ") and "cap 1.00 GB; device cpu" in lines[2]


def test_generate_json_has_the_fields_of_a_generation(bundle):
    answer = object_of("generate", bundle, "-p", "import os\n", "-n", "5", "--ram", "1GB")
    assert list(answer) == [field.name for field in fields(Generation)]
    assert len(answer["tokens"]) == answer["generation_tokens"] == 5
    assert answer["ram_bytes"] == 1_000_000_000 >= answer["peak_memory_bytes"]


def test_the_prompt_is_an_argument_an_option_a_file_or_comes_through_a_pipe(bundle, tmp_path):
    given = succeeds("generate", bundle, "-p", "import re\n", "-n", "8").stdout
    (tmp_path / "prompt.txt").write_text("import re\n")
    assert succeeds("generate", bundle, "import re\n", "-n", "8").stdout == given
    assert succeeds("generate", bundle, "-f", tmp_path / "prompt.txt", "-n", "8").stdout == given
    for arguments in ([], ["-"], ["-p", "-"], ["-f", "-"]):
        assert succeeds("generate", bundle, *arguments, "-n", "8", input="import re\n").stdout == given
    (tmp_path / "prompt.bin").write_bytes(b"import \xff")
    message = "not UTF-8 text, from byte 7 on; convert it first"
    assert error_of("generate", bundle, "-f", tmp_path / "prompt.bin") == f"{tmp_path}/prompt.bin: {message}"
    with (tmp_path / "prompt.bin").open() as file:
        assert error_of("generate", bundle, stdin=file) == f"stdin: {message}"


def test_no_more_of_a_prompt_is_read_than_the_context_could_hold(bundle):
    said = (
        "more than 65,536 bytes, which is more than the context of 1,024 tokens and the memory under the cap can hold"
    )
    with open("/dev/zero") as file:  # which never ends
        assert error_of("generate", bundle, "-p", "-", stdin=file).startswith(f"stdin: {said}")


def test_a_prompt_is_a_message_where_there_is_a_chat_template_unless_it_is_raw(templated, bundle):
    said = [{"role": "user", "content": "import re"}]
    with Runtime(templated) as runtime:
        answer, told, raw = (
            runtime.generate(prompt, 8).tokens
            for prompt in (said, [{"role": "system", "content": "be brief"}, *said], "import re")
        )
    assert answer != told != raw != answer
    assert object_of("generate", templated, "--temp", "0", "import re", "-n", "8")["tokens"] == answer
    assert object_of("generate", templated, "--temp", "0", "-n", "8", input="import re\n")["tokens"] == answer
    assert (
        object_of("generate", templated, "--temp", "0", "import re", "-n", "8", "--system", "be brief")["tokens"]
        == told
    )
    assert object_of("generate", templated, "--temp", "0", "import re", "-n", "8", "--raw")["tokens"] == raw
    refused = error_of("generate", bundle, "a", "--system", "b")
    assert refused == f"{bundle}: this model has no chat template; --system needs one"


def test_the_template_is_told_what_else_there_is(templated):
    with Runtime(templated) as runtime:
        thought = runtime.generate("user: a\nthinks: True\nassistant:", 4)
        short = runtime.generate("user: a\nthinks: False\nassistant:", 4)
    given = ("generate", templated, "a", "-n", "4", "--temp", "0")
    assert object_of(*given, "--thinking")["tokens"] == thought.tokens
    for how in (["--no-thinking"], ["--chat-template-kwargs", '{"enable_thinking": false}']):
        told = object_of(*given, *how)
        assert (told["tokens"], told["prompt_tokens"]) == (short.tokens, short.prompt_tokens)
    assert options.template_kwargs(False, '{"a": 1}') == {"a": 1, "enable_thinking": False, "thinking": False}
    assert error_of(*given, "--chat-template-kwargs", "[1]").startswith(
        "chat-template-kwargs '[1]' is not a JSON object"
    )


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("{% if thinking is defined %}{{ thinking }}{% endif %}", None),
        ("{{ messages[0].thinking }}", "this model's chat template cannot be told whether to think"),
        (
            "{{ reasoning_effort }}",
            "this model's chat template cannot be told whether to think; it has reasoning_effort, for "
            "--chat-template-kwargs",
        ),
    ],
)
def test_it_is_said_where_a_template_has_no_switch_for_thinking(tmp_path, template, note):
    shutil.copy(REFERENCE / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    assert options.thinking_note(Tokenizer(tmp_path), False) == note
    assert options.thinking_note(Tokenizer(tmp_path), None) is None


def test_an_answer_goes_on_until_the_context_is_full_and_a_text_for_64_tokens(bundle, templated):
    assert object_of("generate", bundle, "import re\n", "--context", "96")["generation_tokens"] == 64
    whole = object_of("generate", bundle, "import re\n", "--context", "96", "-n", "-1")
    assert whole["prompt_tokens"] + whole["generation_tokens"] == 97  # the last is not computed with
    assert object_of("generate", templated, "import re", "--context", "96")["generation_tokens"] > 64


def test_an_answer_is_sampled_as_the_model_advises_unless_it_is_said(templated):
    with Runtime(templated) as runtime:  # its generation_config.json has temperature 0.8 and top_p 0.95
        prompt = [{"role": "user", "content": "import re"}]
        advised = runtime.generate(prompt, 12, temperature=0.8, top_p=0.95, seed=5).tokens
        other = runtime.generate(prompt, 12, temperature=0.8, top_k=3, top_p=1.0, min_p=0.01, seed=5).tokens
        greedy, raw = runtime.generate(prompt, 12).tokens, runtime.generate("import re", 12).tokens
    assert len({*map(tuple, (advised, other, greedy, raw))}) == 4
    given = ("generate", templated, "import re", "-n", "12", "--seed", "5")
    assert object_of(*given)["tokens"] == advised
    assert object_of(*given, "--top-k", "3", "--top-p", "1", "--min-p", "0.01")["tokens"] == other
    assert object_of(*given, "--temp", "0")["tokens"] == greedy
    assert object_of(*given, "--raw")["tokens"] == raw


def test_logits_are_biased_as_given(bundle):
    given = ("generate", bundle, "-p", "import os", "--raw", "-n", "1", "--json")
    (likeliest,) = object_of(*given)["tokens"]
    (second,) = object_of(*given, "-l", f"{likeliest}-inf")["tokens"]
    assert second != likeliest
    assert object_of(*given, "--logit-bias", "7+1000", "--logit-bias", f"{likeliest}-2.5")["tokens"] == [7]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_closed_are_no_error_and_never_files(bundle, tmp_path, closed):
    command = f"{sys.executable} -m edge_moe generate {bundle} a -n 4 {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    command = f"{sys.executable} -m edge_moe chat {bundle} {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, input=b"").returncode == 0
    command = f"{sys.executable} -m edge_moe compress {REFERENCE} {tmp_path}/out.emoe --width 4 --method rtn {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0
    assert succeeds("verify", tmp_path / "out.emoe")


def test_a_path_that_is_not_utf_8_is_called_so(bundle, tmp_path):
    copy = os.fsencode(tmp_path) + b"/caf\xe9.emoe"
    shutil.copytree(os.fsencode(bundle), copy)
    message = f"edge-moe: error: {tmp_path}/caf\\xe9.emoe: this path is not UTF-8; rename it\n"
    for arguments in (["generate", copy, "a"], ["inspect", copy], ["plan", copy], ["compress", REFERENCE, copy]):
        done = subprocess.run([sys.executable, "-m", "edge_moe", *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, message)


def test_token_ids_give_token_ids(bundle):
    done = succeeds("generate", bundle, "--tokens", "5, 6,7", "-n", "4")
    answer = object_of("generate", bundle, "--tokens", "5,6,7", "-n", "4")
    assert [int(token) for token in done.stdout.split()] == answer["tokens"]
    assert answer["prompt_tokens"] == 3


def test_a_bundle_without_a_tokenizer_takes_token_ids_alone(bundle_of):
    path = bundle_of("olmoe", bits=16)
    assert len(succeeds("generate", path, "--tokens", "1,2", "-n", "3").stdout.split()) == 3
    assert error_of("generate", path, "-p", "a") == f"{path}: this bundle has no tokenizer; pass token ids"
    assert error_of("chat", path, input="") == f"{path}: this bundle has no tokenizer; chat needs one"


def test_options_reach_the_library(bundle):
    answer = object_of(
        "generate", bundle, "-p", "import", "--stop", "import", "--stop", "\n", "-n", "50", "--context", "64"
    )
    assert "\n" not in answer["text"]
    sampled = [
        object_of("generate", bundle, "-p", "import", "--temp", "1", "--top-p", "0.9", "--seed", seed, "-n", "20")[
            "tokens"
        ]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "1,x"], "tokens '1,x' are not whole numbers separated by commas"),
        (["-p", ""], "the prompt is empty; give at least one token"),
        (["-p", "a", "--ram", "8XB"], "size '8XB' is not understood; write 8GB, 8GiB, 500MB or a number of bytes"),
        (["-p", "a", "--temp", "-1"], "temperature is -1.0, expected 0 or more"),
        (["-p", "a", "-n", "0"], "max_tokens is 0, expected at least 1"),
        (
            ["-p", "a", "-l", "15043=2"],
            "logit-bias '15043=2' is not a token id, + or -, and a number, such as 15043+1 or 15043-inf",
        ),
        (["-p", "a", "-l", "99999999+1"], "a token id of logit_bias is 99999999, expected 0 to 4,095"),
        (["-p", "a", "--context", "2000"], "context is 2000, expected 1 to 1024, the model's own"),
    ],
)
def test_options_that_are_wrong_are_one_line(bundle, arguments, message):
    assert error_of("generate", bundle, *arguments) == message


def test_a_cap_below_the_floor_names_the_floor_and_the_floor_named_works(bundle):
    message = error_of("generate", bundle, "-p", "a", "--ram", "20MB")
    assert message.startswith("a cap of 20 MB is below the floor of ")
    floor_mb = int(message.split("floor of ")[1].split(" ")[0])
    assert object_of("generate", bundle, "-p", "a", "-n", "4", "--ram", f"{floor_mb + 1}MB")["expert_misses"] > 0


def test_a_reader_who_leaves_is_not_an_error(bundle):
    command = f"{sys.executable} -m edge_moe generate {bundle} -p a -n 500 | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(done.stdout) == 10
    assert done.stderr == ""


def test_ctrl_c_is_one_line_and_130(bundle):
    command = [sys.executable, "-m", "edge_moe", "generate", str(bundle), "-p", "a", "-n", "900", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate()
    assert child.returncode == 130
    assert errors.startswith(b"prompt 1 tokens at ") and b" tok/s (stopped)\n" in errors
    assert b"error" not in errors and errors.count(b"\n") == 3


def test_generate_imports_nothing_heavy(bundle):
    code = """
import sys
from edge_moe.cli import main
sys.argv = ["edge-moe", "generate", sys.argv[1], "-p", "a", "-n", "2", "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"scipy", "safetensors", "transformers", "torch", "rich", "mlx", "jinja2", "edge_moe.compressor"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    assert run_python(code, bundle).stderr == "[]\n"


# The other commands; compress and demo are in test_cli_compress.py


def test_inspect_and_verify_describe_a_bundle(bundle):
    text = succeeds("inspect", bundle).stdout
    assert "qwen3_moe, 4 layers of 256, vocabulary 4,096, context 1,024" in text
    assert "16 a layer of 256, top 4" in text and "dropped      none" in text
    assert "certificate: none" in text
    done = succeeds("verify", bundle)
    assert done.stdout.startswith(f"{bundle}: OK, ") and done.stdout.endswith(" GB/s\n")


PLAN_KEYS = {
    *("total_bytes", "working_set_cap_bytes", "bits_per_weight", "disk_bytes"),
    *("expected_hit_rate", "calibrated", "expected_speed"),
}


def test_a_plan_of_a_bundle_is_the_one_that_generate_has(bundle):
    plan = object_of("plan", bundle, "--ram", "1GB", "--context", "256")
    assert set(plan) == {field.name for field in fields(Plan)} | PLAN_KEYS
    assert plan["working_set_experts"] == 16
    assert plan["working_set_bytes"] == plan["all_experts_bytes"] // 4
    assert plan["resident"] and plan["context"] == 256
    assert (
        object_of("generate", bundle, "-p", "a", "--ram", plan["floor_bytes"], "--context", "256")["expert_misses"] > 0
    )


def test_a_plan_needs_a_config_alone_and_comes_close_to_the_bundles(tmp_path):
    shutil.copyfile(CONFIGS / "qwen3-30b-a3b.json", tmp_path / "config.json")
    sizes = {"layers": 2, "vocab": 1024, "width": 3}
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2, "vocab_size": 1024}))
    made = make_synthetic(tmp_path, tmp_path / "made.emoe", **sizes)
    early = object_of("plan", tmp_path, "--ram", "1GB", "--width", "3")
    late = object_of("plan", made.path, "--ram", "1GB")
    assert (
        object_of("plan", tmp_path / "config.json", "--ram", "1GB", "--width", "3")["trunk_bytes"]
        == early["trunk_bytes"]
    )
    assert early["all_experts_bytes"] == late["all_experts_bytes"]
    assert 0 <= late["trunk_bytes"] - early["trunk_bytes"] < 10_000  # the file's header
    for key in ("kv_cache_bytes", "scratch_bytes", "slot_bytes", "context"):
        assert early[key] == late[key]


def test_a_plan_below_the_floor_is_shown_and_refused():
    config = CONFIGS / "qwen3-30b-a3b.json"
    done = edge_moe("plan", config, "--ram", "1GB")
    assert done.returncode == 1
    assert "floor" in done.stdout and "the smallest cap that works" in done.stdout
    assert done.stderr.startswith("edge-moe: error: a cap of 1,000 MB is below the floor of ")
    floor = json.loads(edge_moe("plan", config, "--ram", "1GB", "--json").stdout)["floor_bytes"]
    assert succeeds("plan", config, "--ram", floor + 5_000_000)


def test_a_plan_from_a_config_names_each_part_and_the_largest_context():
    model = ("plan", CONFIGS / "deepseek-v3.json", "--ram", "128GB", "--keep-experts", "192")
    text = succeeds(*model, "--recipe", "collaborative").stdout
    parts, plan, rest = text.split("\n\n", 1)[0], text.split("\n\n", 1)[1], text.split("\n\n")[-1].split("\n")
    rows = {line.split("  ")[0]: line.split() for line in parts.splitlines()}
    assert rows["total"] == ["total", "507,522,615,168", "1.756", "111.39", "GB"]
    assert rows["experts, down"][-3:] == ["1.825", "37.30", "GB"]
    assert "every expert in memory" in plan and "of a cap of 128.00 GB" in plan
    assert rest[0].startswith("longest context under this cap: 163,840 tokens; with every expert in memory:")
    assert "which is another format; 192 of 256 experts a layer" in " ".join(rest)
    assert "--bits" not in text  # another format is not compared

    result = object_of(*model, "--width", "1", "--widths", "down=2,edge_down=3", "--trunk-width", "4")
    more = {"parts", "largest_context", "largest_resident_context"}
    assert set(result) - {field.name for field in fields(Plan)} == PLAN_KEYS | more
    assert result["largest_context"] == 163840
    assert sum(part["bytes"] for part in result["parts"]) == result["trunk_bytes"] + result["all_experts_bytes"]
    down = next(part for part in result["parts"] if part["name"] == "down")
    assert down["bits_per_weight"] == pytest.approx((44 * 2.5 + 14 * 3.5) / 58)
    assert set(down) == {"name", "weights", "bits_per_weight", "bytes"}


def test_a_plan_from_a_config_takes_bits_as_compress_does_and_compares_them(tmp_path):
    config = ("plan", CONFIGS / "qwen3-30b-a3b.json", "--ram", "8GB")
    plain, three = object_of(*config), object_of(*config, "--bits", "3")
    weights = 48 * 128 * 3 * 2048 * 768
    assert plain["all_experts_bytes"] == weights * 2.5 / 8 and three["all_experts_bytes"] == weights * 3 / 8
    sized = object_of(*config, "--size", three["disk_bytes"] + 10_000_000)
    assert sized["all_experts_bytes"] == pytest.approx(three["all_experts_bytes"], rel=0.001)
    text = succeeds(*config, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}).stdout
    rows = [line.split() for line in text.split("by bits of an expert weight:\n")[1].split("\n\n")[0].splitlines()]
    assert rows[0] == ["--bits", "bundle", "experts", "in", "memory", "all", "from"]
    assert [row[0] for row in rows[1:]] == ["2.0", "2.5", "3.0", "3.5", "4.5"]
    share = plain["experts_bytes"] / plain["all_experts_bytes"]
    assert rows[2][3] == f"{share:.0%}" and rows[2][1:3] == ["10.73", "GB"]
    assert "`edge-moe doctor DIR` measures this machine" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "option, message",
    [
        (["--bits", "0.5"], "bits is 0.5, expected 1.25 to 16 (experts of width 1 take 1.25)"),
        (["--bits", "3", "--size", "9GB"], "bits, width and size exclude each other; give one of them"),
        (["--bits", "3", "--width", "2"], "bits and size apply to all experts together; leave width out"),
        (
            ["--size", "5GB"],
            "size is 5,000,000,000 bytes, expected at least 6,208,793,384: 4,529,848,320 for experts of width 1 and "
            "1,678,945,064 for the rest; raise it, lower trunk_width, or keep fewer experts",
        ),
        (["--widths", "gate"], "widths 'gate' are not NAME=BITS separated by commas, such as gate=2,down=3"),
        (["--widths", "gate=2.5"], "widths 'gate=2.5' are not NAME=BITS separated by commas, such as gate=2,down=3"),
        (
            ["--keep-experts", "most"],
            "keep-experts 'most' is neither a number of experts such as 192 nor a share such as 0.75",
        ),
        (["--recipe", "collaborative"], "recipe 'collaborative' is for deepseek_v3, the model is qwen3_moe"),
    ],
)
def test_what_a_plan_cannot_take_is_one_line(option, message):
    assert error_of("plan", CONFIGS / "qwen3-30b-a3b.json", *option) == message


def test_eval_scores_each_text_and_all_together(bundle, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("class Name:\n    pass\n" * 30)
    result = object_of("eval", bundle, "--text", text, "--text", other, "--tokens", "200", "--context", "64")
    texts = list(result["texts"].values())
    assert list(result["texts"]) == ["text.txt", "other.txt"]
    assert result["tokens"] == sum(one["tokens"] for one in texts) == 2 * (200 - 4)
    assert result["perplexity"] == pytest.approx((texts[0]["perplexity"] * texts[1]["perplexity"]) ** 0.5)
    assert set(result) == {
        "tokens",
        "perplexity",
        "experts_used",
        "bits_per_weight",
        "bundle_bytes",
        "expert_bytes",
        "texts",
    }


def test_eval_against_a_checkpoint_and_against_a_bundle_of_it_agree(bundle, bundle_of, text):
    options = ("--text", text, "--tokens", "130", "--context", "64", "--against")
    checkpoint = object_of("eval", bundle, *options, REFERENCE)
    lossless = object_of("eval", bundle, *options, bundle_of("reference", bits=16))
    itself = object_of("eval", bundle, *options, bundle)
    assert {"kld_mean", "kld_p99", "top1_agreement"} <= set(checkpoint)
    assert checkpoint["kld_mean"] == pytest.approx(lossless["kld_mean"], rel=0.1)
    assert itself["kld_mean"] == pytest.approx(0, abs=1e-12) and itself["top1_agreement"] == 1
    shown = succeeds("eval", bundle, *options, REFERENCE).stdout
    assert "kld_mean" in shown and "windows of 64 tokens without overlap" in shown


def test_eval_refuses_what_cannot_be_scored(bundle, bundle_of, text, tmp_path):
    olmoe = bundle_of("olmoe", bits=16)
    assert error_of("eval", bundle, "--text", tmp_path / "no.txt") == f"{tmp_path / 'no.txt'}: no such text file"
    assert error_of("eval", olmoe, "--text", text, "--context", "8").endswith("has no tokenizer; text cannot be scored")
    assert "compare models that share a tokenizer" in error_of("eval", bundle, "--text", text, "--against", olmoe)
