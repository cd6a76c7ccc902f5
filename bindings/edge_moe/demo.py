"""The demo: compresses the embedded model in four ways, scores them on held-out text, and runs one under a small cap.

Calibration takes modules of Python's standard library from the front of a seeded order; the score is on the others. The
run under the cap is a process of its own, so that its peak memory is what a user would see.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from .bench import EMBEDDED
from .bench.evaluate import Remembered, evaluate, windows
from .bench.texts import held_out_modules
from .compressor.passes.calibrate import load_calibration
from .compressor.pipeline import compress
from .report import certificate_text, spread_text
from .runtime.config_file import load_config
from .runtime.describe import describe_bundle
from .runtime.plan_table import size, table
from .runtime.runtime import Runtime
from .runtime.score import LOGITS_ROWS
from .runtime.tokenizer import Tokenizer

BITS = 2.5
VARIANTS = {  # options of compress() by displayed name; the last two calibrate on the same text
    "bf16": {"bits": 16},
    "rtn": {"bits": BITS, "method": "rtn"},
    "uniform": {"bits": BITS, "method": "uniform", "certificate": False},
    "pmq": {"method": "pmq"},  # and `size`, that of the bundle `uniform`
}
CALIBRATION_TOKENS = 8192
CONTEXT = 256
WINDOWS = 24  # of CONTEXT tokens, of held-out text
PROMPT = "def read_lines(path):\n"
ANSWER_TOKENS = 96
SEED = 0


def run_demo(keep: str | Path | None = None, progress=None) -> dict:
    """Compress, score and run; returns the report as a JSON object. keep: a directory in which to keep the bundles.

    Raises FileExistsError if `keep` has such bundles already, FileNotFoundError if the installation lacks the model.
    """
    if not EMBEDDED.is_dir():
        raise FileNotFoundError(
            f"{EMBEDDED}: this wheel does not contain the demo's model; install it with `pip install .` in a checkout"
        )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(keep or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        paths = {name: directory / f"{name}.emoe" for name in VARIANTS}
        text = _save_text(Path(temporary))
        for name, options in VARIANTS.items():
            if name == "pmq":
                options = {**options, "size": sum(file.stat().st_size for file in paths["uniform"].iterdir())}
            bundle = compress(EMBEDDED, paths[name], progress=_named(progress, name), **text, **options)
        return {
            "model": "embedded reference MoE: 14.4 M parameters, 4 layers of 16 experts, top 4",
            "text": "standard library modules that calibration did not see",
            "methods": _score(paths, progress),
            **{key: describe_bundle(bundle)[key] for key in ("method", "widths", "certificate")},
            "run": _run_under_cap(paths["pmq"]),
            "bundles": str(directory) if keep else None,
        }


def _save_text(directory: Path) -> dict:
    """Write calibration and held-out text to files of token ids; returns the options of compress() for them."""
    tokenizer, files = Tokenizer(EMBEDDED), {"calibration": "stdlib.npy", "held_out": "stdlib-held-out.npy"}
    paths = {name: directory / file for name, file in files.items()}
    np.save(paths["calibration"], load_calibration(tokenizer, load_config(EMBEDDED), [], CALIBRATION_TOKENS, SEED).ids)
    np.save(paths["held_out"], held_out_modules(tokenizer, SEED, WINDOWS, CONTEXT))
    return {name: (path,) for name, path in paths.items()} | {"tokens": CALIBRATION_TOKENS, "seed": SEED}


def _named(progress, name: str):
    return None if progress is None else lambda step, done, of: progress(f"{name}: {step}", done, of)


def _score(paths: dict[str, Path], progress) -> dict[str, dict]:
    """The result of evaluate() for each bundle, compared with the predictions of the first."""
    results, against = {}, None
    for name, path in paths.items():
        with Runtime(path, context=CONTEXT, logits_rows=LOGITS_ROWS) as runtime:
            ids = held_out_modules(runtime.tokenizer, SEED, WINDOWS, CONTEXT)
            if against is None:
                against = Remembered(runtime.logits)
                against.remember(windows(ids, CONTEXT))
            tell = _named(progress, name)
            results[name] = evaluate(runtime, ids, context=CONTEXT, against=against, progress=tell)
    return results


def _run_under_cap(bundle: Path) -> dict:
    """Generate in processes of their own, with memory for all experts and then at the floor of the plan."""
    options = ["--context", str(CONTEXT)]
    plan = _child("plan", bundle, "--ram", "1GB", *options)
    floor, resident = plan["floor_bytes"], plan["resident_bytes"]
    arguments = ["-p", PROMPT, "-n", ANSWER_TOKENS, "--temp", 0.7, "--top-p", 0.9, "--seed", SEED, *options]
    free = _child("generate", bundle, "--ram", "1GB", *arguments)
    capped = _child("generate", bundle, "--ram", str(floor), *arguments)
    return {
        "prompt": PROMPT,
        "floor_bytes": floor,
        "resident_bytes": resident,
        **capped,
        "same_text_without_cap": capped["tokens"] == free["tokens"],
        "generation_tps_without_cap": free["generation_tps"],
    }


def _child(*arguments) -> dict:
    command = [sys.executable, "-m", "edge_moe", *map(str, arguments), "--json"]
    child = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if child.returncode:
        raise OSError(f"{' '.join(command[1:4])} failed: {child.stderr.strip()}")
    return json.loads(child.stdout)


def report_text(report: dict) -> str:
    rows = [["method", "bits/weight", "bundle", "perplexity", "KLD vs bf16", "same top token"]]
    for name, result in report["methods"].items():
        rows.append(
            [
                name,
                f"{result['bits_per_weight']:.2f}",
                size(result["bundle_bytes"]),
                f"{result['perplexity']:.3f}",
                f"{result['kld_mean']:.4f}",
                f"{result['top1_agreement']:.1%}",
            ]
        )
    run, scored = report["run"], report["methods"]["bf16"]["tokens"]
    lookups = run["expert_hits"] + run["expert_misses"]
    kept = f"\n\nbundles are in {report['bundles']}" if report["bundles"] else ""
    return (
        f"{report['model']}\n"
        f"scored on {scored:,} tokens of {report['text']};\nKLD in nats a token\n\n"
        f"{table(rows, right=(1, 2, 3, 4, 5))}\n\n"
        f"{spread_text(report['method'], report['widths'])}\n{certificate_text(report['certificate'])}\n\n"
        f"pmq in a process capped at {size(run['ram_bytes'])} (floor {size(run['floor_bytes'])}, resident from "
        f"{size(run['resident_bytes'])});\nmost of it is Python itself\n"
        f"  peak memory  {size(run['peak_memory_bytes'])}\n"
        f"  speed        {run['generation_tps']:,.0f} tok/s; {run['generation_tps_without_cap']:,.0f} with all experts "
        f"in memory\n"
        f"  experts      {run['expert_hits']:,} hits, {run['expert_misses']:,} misses "
        f"({run['expert_hits'] / max(lookups, 1):.0%} hits), {run['bytes_read'] / 1e6:,.1f} MB read\n"
        f"  same text as without the cap: {'yes' if run['same_text_without_cap'] else 'NO'}\n\n"
        f"The model is tiny and knows nothing; it writes code-like text:\n\n{run['prompt']}{run['text'].rstrip()}{kept}"
    )
