"""Thousands of bundles, each spoilt in a way of its own: one clear error, or the right answer.

Each goes through open, inspect, verify, generate, generate with pruning, and one turn of a chat, as the command line
runs them. There may be no traceback, no end of the process, no hang, not much memory and no wrong result. Right is:

- unsigned (checksums are those from before), a file that is not listed, or signed where nothing of the model was
  changed (what is said of its making, where records lie, sizes): refused, or the very tokens and text from before;
- signed, and what makes the model was changed (weights, config.json, widths, tokenizer, template, advice): it is
  another model, and its answer another. It is refused, or the answer is the likeliest token each time by an engine that
  shares as little as possible with the one that answered: the kernels that are the definition of all others, records
  read one at a time into few slots instead of mapped, one token a step; with the same bits of every logit.

The suite runs SUITE of them; `python tests/test_bundle_mutations.py 10000` runs as many as are asked for, and counts.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
from bundles import LAST, make_engine, run_engine
from mutated_bundles import ARCHITECTURES, make_bundle, mutate, restore, snapshot

from edge_moe import _core
from edge_moe.runtime.bundle import Bundle

SUITE = 200
WORKERS = 2
HANG_S = 120
MOST_GROWTH = 600_000_000  # bytes that one of them may add to the process: JSON of 2 million values takes 400 MB
PROMPT, QUESTION, TOKENS, CONTEXT = "abc def", "Why?\n", 4, 128
COMMANDS = {
    "inspect": ("inspect",),
    "inspect --json": ("inspect", "--json"),
    "verify": ("verify",),
    "generate": ("generate", "-p", PROMPT, "--raw", "-n", TOKENS, "--json", "--ram", "1GB", "--context", CONTEXT),
    "pruned": ("generate", "-p", PROMPT, "--raw", "-n", TOKENS, "--json", "--ram", "1GB", "--prune", "0.2"),
    "chat": ("chat", "-n", TOKENS, "--ram", "1GB", "--context", CONTEXT),
}
ERROR = re.compile(r"edge-moe: error: .+")


# ---- in a worker: one mutation


def run_command(path: Path, name: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process; an exception that escapes is its traceback."""
    from edge_moe.cli import app

    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(QUESTION.encode() if name == "chat" else b""))
    command, *more = COMMANDS[name]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            app(args=[command, str(path), *map(str, more), *(["--threads", "1"] * ("--ram" in more))])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        return -1, out.getvalue(), traceback.format_exc()
    finally:
        sys.stdin = stdin
    return code, out.getvalue(), err.getvalue()


def result_of(name: str, out: str):
    """What of a command's output must not change."""
    if name in ("generate", "pruned"):
        answer = json.loads(out)
        return [answer["tokens"], answer["text"]]
    return out if name == "chat" else None


def use(path: Path) -> dict[str, list]:
    """By command: "ok" and its result, "refused" and its error, or "traceback"."""
    found = {}
    for name in COMMANDS:
        code, out, err = run_command(path, name)
        errors = ERROR.findall(err)
        if code == 0:
            found[name] = ["ok", result_of(name, out), err if name == "chat" else ""]
        elif code == 1 and len(errors) == 1 and "Traceback" not in err:
            found[name] = ["refused", errors[0], ""]
        else:
            found[name] = ["traceback", f"exit code {code}\n{err}", ""]
    return found


def likeliest(path: Path, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after `ids`, up to an end token; the logits of `ids` have the same bits by any engine."""
    bundle = Bundle.open(path)
    scalar = make_engine(path, slots=bundle.config.top_k + 1, chunk=1, context=CONTEXT, kernels="scalar", kv="float16")
    logits = run_engine(scalar, ids, 1)
    others = make_engine(path, chunk=32, context=CONTEXT, kv="float16")
    if not np.array_equal(logits, run_engine(others, ids, 32)):
        raise AssertionError("the logits of two engines differ")
    row, found = logits[-1], []
    while True:
        found.append(int(np.argmax(row)))
        if len(found) == tokens or found[-1] in bundle.config.eos_tokens:
            return found
        row = scalar.forward(np.array(found[-1:], np.int32), LAST)[-1]


def faults_of(path: Path, mutation, before: dict, found: dict) -> list[str]:
    """What is wrong with the results of a mutated bundle."""
    from edge_moe.runtime.tokenizer import Tokenizer

    faults = [f"{name}: {its[1]}" for name, its in found.items() if its[0] == "traceback"]
    for name, (kind, result, said) in found.items():
        if kind == "refused" and str(path) not in result and "floor" not in result and "context" not in result:
            faults.append(f"{name}: no file is named: {result}")
        same = mutation.pruned_same if name == "pruned" else mutation.same
        if kind != "ok" or result is None or result == before[name][1]:
            continue
        if same and not (name == "chat" and "this message was not kept" in said):
            faults.append(f"{name}: {result!r} instead of {before[name][1]!r}")
    if mutation.unlisted and found["generate"][0] == "ok" and found["verify"][0] == "ok":
        code, out, _ = run_command(path, "verify")
        if "unchecked, because bundle.json does not list them" not in out:
            faults.append("verify: says nothing of a file that is not listed")
    if found["generate"][0] == "ok" and found["generate"][1] != before["generate"][1]:
        tokens, _ = found["generate"][1]
        try:
            if likeliest(path, Tokenizer(path).encode(PROMPT), len(tokens)) != tokens:
                faults.append(f"generate: {tokens} is not what the scalar kernels give")
        except AssertionError as error:
            faults.append(f"generate: {error}")
    return faults


def reset_peak() -> int:
    """Let the process's peak begin anew where Linux can, and give what it is now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _core.peak_bytes()


def work(directory: Path) -> None:
    """Answer each seed that comes on stdin by a line of JSON on stdout. directory: of a bundle by architecture."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    paths = [directory / name / "bundle" for name in ARCHITECTURES]
    whole = [(path, snapshot(path), use(path)) for path in paths]
    for _, _, before in whole:
        assert all(kind == "ok" for kind, _, _ in before.values()), before
    print(json.dumps("ready"), file=answers)
    for line in iter(sys.stdin.readline, ""):
        path, files, before = whole[int(line) % len(whole)]
        restore(path, files)
        mutation, peak = mutate(path, int(line)), reset_peak()
        found = use(path)
        faults = faults_of(path, mutation, before, found)
        if (growth := _core.peak_bytes() - peak) > MOST_GROWTH:
            faults.append(f"memory: {growth / 1e6:.0f} MB more")
        kinds = [
            "refused" if its[0] == "refused" else "same" if its[1] == before[name][1] else "other"
            for name, its in found.items()
        ]
        told = {"seed": int(line), "what": mutation.what, "signed": mutation.signed, "faults": faults, "kinds": kinds}
        print(
            json.dumps({**told, "error": next((its[1] for its in found.values() if its[0] == "refused"), "")}),
            file=answers,
        )


# ---- outside: many of them


class Worker:
    """A process that runs mutations, started again when one ends it or hangs in it."""

    def __init__(self, directory: Path):
        self.directory, self.process = directory, None
        for name in ARCHITECTURES:
            (directory / name).mkdir(parents=True)
            make_bundle(directory / name, name)
        self.files = {path: snapshot(path) for path in directory.glob("*/bundle")}

    def start(self) -> None:
        for path, files in self.files.items():
            restore(path, files)
        command = [sys.executable, __file__, "--work", str(self.directory)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process has ended)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1
        )
        assert self.answer() == "ready", self.last_words()

    def last_words(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:]

    def answer(self):
        """The next line, None where the process ended; one that hangs is ended."""
        timer = threading.Timer(HANG_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def run(self, seed: int) -> dict:
        if self.process is None:
            self.start()
        print(seed, file=self.process.stdin)
        if (told := self.answer()) is not None:
            return told
        code = self.process.wait()
        said, self.process = self.last_words(), None
        path = self.directory / ARCHITECTURES[seed % len(ARCHITECTURES)] / "bundle"
        restore(path, self.files[path])
        what = mutate(path, seed).what
        return {"seed": seed, "what": what, "signed": None, "faults": [f"abort: code {code}: {said}"], "kinds": []}

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def run_many(seeds, directory: Path, workers: int, tell=lambda told: None) -> list[dict]:
    """Run the mutations of these seeds, `workers` at once; tell(told) is called for each as it is done."""
    left, results, lock = iter(seeds), [], threading.Lock()

    def target(number: int) -> None:
        worker = Worker(directory / str(number))
        while True:
            with lock:
                seed = next(left, None)
            if seed is None:
                return worker.stop()
            told = worker.run(seed)
            with lock:
                results.append(told)
                tell(told)

    threads = [threading.Thread(target=target, args=(number,)) for number in range(workers)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return sorted(results, key=lambda told: told["seed"])


def counts_of(results: list[dict]) -> dict[str, int]:
    """How many mutations there were, how they ended, and faults by kind."""
    ends = Counter(faulty=0)
    for told in results:
        kinds = set(told["kinds"])
        ends["signed" if told["signed"] else "unsigned"] += 1
        if told["faults"]:
            ends["faulty"] += 1
        elif "refused" in kinds:
            ends["refused" if kinds == {"refused"} else "refused by some"] += 1
        else:
            ends["other" if "other" in kinds else "same"] += 1
    return {"mutations": len(results), **ends}


def test_a_spoilt_bundle_is_refused_or_answers_right(tmp_path):
    results = run_many(range(SUITE), tmp_path, 1)
    assert [(told["seed"], told["what"], told["faults"]) for told in results if told["faults"]] == []
    counts = counts_of(results)
    assert counts["mutations"] == SUITE
    assert all(counts[end] > SUITE // 50 for end in ("signed", "unsigned", "refused", "same", "other")), counts


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(Path(sys.argv[2]))
    else:
        first, count = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
        began, done = time.monotonic(), Counter()

        def tell(told: dict) -> None:
            done["all"] += 1
            for fault in told["faults"]:
                print(f"seed {told['seed']}: {told['what']}\n  {fault}", flush=True)
            if done["all"] % 500 == 0:
                print(f"{done['all']:,} in {time.monotonic() - began:.0f} s", flush=True)

        with tempfile.TemporaryDirectory() as scratch:
            results = run_many(range(first, first + count), Path(scratch), WORKERS, tell)
        print(json.dumps(counts_of(results)))
        sys.exit(any(told["faults"] for told in results))
