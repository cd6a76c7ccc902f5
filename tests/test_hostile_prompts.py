"""Whatever a prompt, chat template or tokenizer asks for, the cap holds: 200 seeded runs in cgroups.

Each run is a process in a memory cgroup whose limit is its cap, so that the kernel kills it above that, with bundles,
prompts and options drawn by its seed. It must end by itself, with answers or with one clear error for each prompt. The
suite takes every eighth run; all are taken by

    python -m pytest tests/test_hostile_prompts.py --all-hostile
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import cgroup
import pytest
from bundles import edit_copy

RUNS = 200
BOMBS = (Path(__file__).parent / "chat_templates" / "bombs.txt").read_text(encoding="utf-8").splitlines()
TEMPLATES = [file.read_text(encoding="utf-8") for file in (Path(__file__).parent / "chat_templates").glob("*.jinja")]
SIGNS = (
    "a",
    " ",
    "\n",
    "=",
    "ab ",
    "x, ",
    "1",
    "漢",
    "字。",
    "😀",
    "e\u0301",
    "\u202e",
    "<|im_end|>",
    "def f(x):\n    ",
    "\0",
    "-!",
)
# Asks as each line of stdin says, and says what came of it: `answered`, or the error's kind and text.
ASK = """
import json, sys, threading, warnings
from edge_moe import Runtime, _core
warnings.simplefilter("ignore")
run = json.loads(sys.stdin.read())
def made(prompt):
    return prompt if not isinstance(prompt, dict) else prompt["of"] * prompt["times"]
def ask(runtime, prompt, options):
    try:
        if isinstance(prompt, dict) and prompt.get("role"):
            prompt = [{"role": prompt["role"], "content": made(prompt)}] * prompt["messages"]
        answer = runtime.generate(made(prompt), 3, **options)
        return ["answered", answer.generation_tokens, answer.prompt_tokens]
    except (ValueError, TypeError, OSError, MemoryError) as error:
        return [type(error).__name__, str(error)]
came, runtimes = [], []
for path in run["bundles"]:
    try:
        runtimes.append(Runtime(path, run["ram"], run["context"], threads=1))
    except (ValueError, TypeError, OSError, MemoryError) as error:
        came.append([type(error).__name__, str(error)])
for runtime in runtimes:
    for prompt in run["prompts"]:
        came.append(ask(runtime, prompt, run["options"]))
    if run["threads"]:
        threads = [threading.Thread(target=lambda: came.append(ask(runtime, run["prompts"][0], {}))) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
ram = min([runtime.plan.ram_bytes for runtime in runtimes], default=run["ram"])
print(json.dumps({"came": came, "peak": _core.peak_bytes(), "ram": ram, "loaded": len(runtimes)}))
"""


@pytest.fixture(scope="module")
def make_bundle(bundle_of, tmp_path_factory):
    """make_bundle({"chat_template.jinja": text, ...}) is a bundle of the embedded model with these files."""
    base, made = bundle_of("reference", width=4), {}

    def make(files: dict[str, str]) -> Path:
        key = tuple(sorted(files.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("hostile") / "x.emoe"
            out.mkdir()
            for file in base.iterdir():
                linked = file.suffix == ".safetensors"
                (os.link if linked else shutil.copyfile)(file, out / file.name)
            for name, text in files.items():
                edit_copy(out, name, text.encode("utf-8", "surrogatepass"))
            made[key] = out
        return made[key]

    return make


def tokenizer_file(rng: random.Random, base: Path) -> str:
    """A tokenizer.json that asks for too much, is damaged, or only odd."""
    table = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    model, kind = table["model"], rng.randrange(14)
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * rng.choice([2, 60, 10**5])}
    if kind == 0:
        table["normalizer"] = {"type": "Sequence", "normalizers": [replace] * rng.randrange(1, 5)}
    elif kind == 1:
        table["decoder"] = {"type": "Sequence", "decoders": [replace] * 3}
    elif kind == 2:
        model["continuing_subword_prefix"] = rng.choice(["##", "é", "Ġ" * 9])
    elif kind == 3:
        table["normalizer"] = {"type": "Prepend", "prepend": "x" * rng.choice([1, 10**6])}
    elif kind == 4:
        padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        table["padding"] = {**padding, "strategy": {"Fixed": 10**12}}
    elif kind == 5:
        table["normalizer"] = {"type": rng.choice(["NFKD", "NFC", "Lowercase", "StripAccents"])}
    elif kind == 6:
        pattern = {"Regex": rng.choice(["x*", ".", "(a|b|ab)*c", r"\s+|\w", "("])}
        table["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    elif kind == 7:
        table["decoder"] = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    elif kind == 8:
        special = {"z": {"id": "z", "ids": list(range(4000)), "tokens": ["z"] * 4000}}
        single = [{"SpecialToken": {"id": "z", "type_id": 0}}] * rng.randrange(1, 40)
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        steps = {"single": single, "pair": [], "special_tokens": special}
        table["post_processor"] = {"type": "TemplateProcessing", **steps}
    elif kind == 9:
        table["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    elif kind == 10:
        table["pre_tokenizer"] = {"type": "FixedLength", "length": rng.choice([0, 1, 5])}
    elif kind == 11:
        model["vocab"] |= {f"word{number}" * 30: 4096 + number for number in range(rng.choice([10, 20_000]))}
    elif kind == 12:
        model["dropout"] = rng.choice([1.0, 0.5])
    else:
        text = json.dumps(table, ensure_ascii=False)
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", "{", '"', "\0", "é", "[" * 3000]) + text[at + rng.randrange(9) :]
    return json.dumps(table, ensure_ascii=False)


def draw_run(seed: int, base: Path) -> dict:
    """Files of one or two bundles, prompts and options."""
    rng = random.Random(seed)

    def prompt(templated: bool):
        kind = rng.randrange(10)
        if kind == 0:
            return [rng.randrange(-1, 5000) for _ in range(rng.choice([0, 1, 2000]))]
        if kind == 1:
            return rng.choice(
                [None, 5, ["a", "b"], [{"role": "user"}], [{"content": "x"}], [1.5], {"of": [5], "times": 10**5}]
            )
        of = "".join(rng.choices(SIGNS, k=rng.choice([1, 1, 3, 40])))
        if kind == 2:
            of = rng.choice(["\ud800", "x" * 10 + "\udfff"])
        times = max(1, int(10 ** rng.uniform(0, 6)) // len(of))
        if templated and rng.random() < 0.8:
            messages = rng.choice([1, 1, 3, 50])
            return {"of": of, "times": max(1, times // messages), "role": "user", "messages": messages}
        return {"of": of, "times": times}

    def bundle() -> dict[str, str]:
        files = {}
        if rng.random() < 0.5:
            template = rng.choice(BOMBS if rng.random() < 0.7 else TEMPLATES)
            files["chat_template.jinja"] = template if rng.random() < 0.8 else template * rng.randrange(2, 400)
        if rng.random() < 0.35:
            files["tokenizer.json"] = tokenizer_file(rng, base)
        if rng.random() < 0.1:
            files["added_tokens.json"] = json.dumps({"x" * rng.choice([3, 10**5]): 4096, "a b": 4097})
        return files

    bundles = [bundle() for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    templated = any("chat_template.jinja" in files for files in bundles)
    options = {}
    if rng.random() < 0.3:
        options["stop"] = ["ab" * rng.choice([1, 10_000]) + str(number) for number in range(rng.choice([1, 50]))]
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "temperature": 1.0, "top_p": 0.9, "seed": 1}
    return {
        "bundles": bundles,
        "prompts": [prompt(templated) for _ in range(rng.randrange(1, 5))],
        "options": options,
        "context": rng.choice([64, 1024, 1024]),
        "threads": rng.random() < 0.2,
        "over_floor": rng.choice([0, 0.5, 3, 20]) * 1e6,
    }


def ask(run: dict, bundles: list[Path], ram: int, **options) -> subprocess.CompletedProcess:
    asked = json.dumps({**run, "bundles": list(map(str, bundles)), "ram": ram})
    command = [sys.executable, "-c", ASK]
    return subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300, **options)


def floor_of(run: dict, bundles: list[Path]) -> int:
    """The smallest cap that the first of a run's bundles works under, and what more each other one takes; about so."""
    child = ask({**run, "prompts": [], "threads": False}, bundles[:1], 45_000_000)
    said = json.loads(child.stdout)["came"] if child.returncode == 0 else []
    text = said[0][1] if said else ""
    one = int(text.split("floor of ")[1].split(" MB")[0]) if "floor of " in text else 75
    return one * 1_000_000 + 14_000_000 * (len(bundles) - 1)


def seeds(config) -> range:
    return range(0, RUNS, 1 if config.getoption("--all-hostile") else 8)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config))


def test_the_cap_holds_and_every_refusal_is_one_clear_error(seed, make_bundle, bundle_of):
    run = draw_run(seed, bundle_of("reference", width=4))
    bundles = [make_bundle(files) for files in run["bundles"]]
    cap = int(floor_of(run, bundles) + run.pop("over_floor"))
    group = cgroup.make(cap)
    try:
        child = ask(run, bundles, cap, preexec_fn=group.join)
        counted = group.peak_bytes
    finally:
        group.remove()
    assert child.returncode == 0, f"exit code {child.returncode} (-9: killed at the limit): {child.stderr[-2000:]}"
    assert "Traceback" not in child.stderr
    said = json.loads(child.stdout)
    assert counted <= cap
    assert said["peak"] <= said["ram"] <= cap
    assert said["came"]
    for kind, text, *_ in said["came"]:
        if kind != "answered":
            assert text
            assert "\n" not in text
            assert len(text) < 900
    print(json.dumps({"seed": seed, "came": said["came"], "cap": cap, "peak": said["peak"], "counted": counted}))
