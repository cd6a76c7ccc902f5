"""Measures what pruning saves when experts are paged in: bytes read and decode speed under a cap, in one process.

    python -m bench.laboratory.prune_paged BUNDLE IDS.npy --ram SIZE

Text is decoded one token at a time; the settings take turns, so that other load on the machine affects all of them.
Prints one JSON object; prune_report.py makes a table of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edge_moe.bench.bench import generate_run
from edge_moe.runtime.runtime import Runtime

SETTINGS = ("off", "loss:0.2", "loss:0.35", "loss:0.5")
ROUNDS = 7
TOKENS = 192  # of a round
PAGED_SHARE = 0.4  # position of the cap between the floor and every expert in memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--plan", action="store_true", help="print only the plan")
    a = parser.parse_args()
    print(json.dumps(measure(a.bundle, np.load(a.ids).tolist(), a.ram, a.plan)))


def measure(bundle: Path, ids: list[int], ram: str, plan: bool = False) -> dict:
    """Tokens a second, bytes read and experts used of each round, by setting."""
    found = {setting: [] for setting in SETTINGS}
    with Runtime(bundle, ram, TOKENS, prune="off") as runtime:
        if plan:
            return runtime.plan.as_dict()
        for turn in range(ROUNDS + 1):
            part = ids[(start := turn * TOKENS % (len(ids) - TOKENS)) : start + TOKENS]
            for setting in SETTINGS:
                before, began = runtime.stats, time.perf_counter()
                generate_run(runtime, part, setting)
                seconds, after = time.perf_counter() - began, runtime.stats
                used = {key: after[key] - before[key] for key in ("bytes_read", "experts_used", "moe_tokens")}
                if turn:  # the first turn is a warm-up
                    found[setting].append({"tps": len(part) / seconds, **used})
        return {"settings": found, "peak_memory_bytes": runtime.stats["peak_memory_bytes"]}


def paged_table(bundle: Path, texts: dict[str, np.ndarray], tell) -> str:
    """Run main() in another process, with a cap between the floor and every expert in memory."""
    tell("decoding under a cap")
    with tempfile.TemporaryDirectory() as directory:
        np.save(file := Path(directory) / "ids.npy", np.concatenate(list(texts.values())))
        plan = _child(bundle, file, "--ram", "8GB", "--plan")
        cap = plan["floor_bytes"] + int(PAGED_SHARE * (plan["resident_bytes"] - plan["floor_bytes"]))
        result = _child(bundle, file, "--ram", str(cap))
    whole = result["settings"]["off"]
    lines = ["| prune | experts used | kB read a token | tok/s | bytes read, ratio | speed, ratio |", "|---" * 6 + "|"]
    for setting, rounds in result["settings"].items():
        used = sum(its["experts_used"] for its in rounds) / sum(its["moe_tokens"] for its in rounds)
        read, tps = (float(np.median([its[key] for its in rounds])) for key in ("bytes_read", "tps"))
        pairs = list(zip(rounds, whole, strict=True))
        ratios = [float(np.median([a[key] / max(b[key], 1e-9) for a, b in pairs])) for key in ("bytes_read", "tps")]
        lines.append(
            f"| {setting} | {used:.2f} | {read / TOKENS / 1e3:.1f} | {tps:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{bundle.stem} decoding text under a cap of {cap / 1e6:.1f} MB (floor {plan['floor_bytes'] / 1e6:.1f}, "
        f"resident from {plan['resident_bytes'] / 1e6:.1f}; peak {result['peak_memory_bytes'] / 1e6:.1f} MB): medians "
        f"of {ROUNDS} rounds of {TOKENS} tokens that take turns; ratios within a round."
    )


def _child(*arguments) -> dict:
    command = [sys.executable, "-m", "bench.laboratory.prune_paged", *map(str, arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise OSError(f"{' '.join(command[1:4])} failed")
    return json.loads(child.stdout)


if __name__ == "__main__":
    main()
